-- find.lua: where reservations stand, changing nothing.
--
-- Statuses: absent, open, or how it ended (settled, cancelled, expired, late, recorded, adjusted). A lease that is over
-- but not swept yet reads as expired. Replies: {status, now, …}
--   open: reserved_at, expires_at, call, estimate        ended: number, reserved_at, booked_at
-- flags: no-writes

-- @include shard
-- @include reservation

local fields = {'head', 'pending'}
for operation = OPERATIONS, #ARGV - 1 do
  local field = ARGV[operation + 1]  -- str   the field of the reservation's record
  fields[#fields + 1] = field
end
local failure = open(fields, true)
if failure then return failure end
local replies = {}
for position = 1, #fields - 2 do
  local record = read(fields[position + 2])
  local past = record and end_of(record)
  if not record then
    replies[position] = {'absent', now_ms}
  elseif past then
    replies[position] = {past.kind, now_ms, tonumber(past.number), tonumber(past.reserved_at), tonumber(past.booked_at)}
  else
    local reservation = reservation_of(record)
    local expires_at = tonumber(reservation.expires_at)
    replies[position] = {expires_at > now_ms and 'open' or 'expired', now_ms, tonumber(reservation.reserved_at),
      expires_at, reservation.call_facts, reservation.estimate}
  end
end
return replies
