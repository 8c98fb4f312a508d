-- find.lua: where reservations stand, changing nothing.
--
-- Statuses: absent, open, or how it ended (settled, cancelled, expired, late, recorded, adjusted). A lease that is over
-- but not swept yet reads as expired. Replies: {status, now, …}
--   open: reserved_at, expires_at, call, estimate        ended: number, reserved_at, booked_at
-- flags: no-writes

-- @include shard
-- @include limit
-- @include times
-- @include reservation

local OPERATION = '>s'
--   field        str   the field of the reservation's record

for position = 2, #ARGV do
  fields[position + 1] = from_bytes(OPERATION, ARGV[position])
end
local writes = false
-- @include open
for position = 2, #ARGV do
  local record = state[fields[position + 1]]
  local past = record and end_of(record)
  local reply
  if not record then
    reply = to_bytes('>ssd', 'sd', 'absent', now_ms)
  elseif past then
    reply = to_bytes('>ssdddd', 'sd*', past.kind, now_ms, past.number, past.reserved_at, past.booked_at)
  else
    local reservation = reservation_of(record)
    reply = to_bytes('>ssdddss', 'sdddss', reservation.expires_at > now_ms and 'open' or 'expired', now_ms,
      reservation.reserved_at, reservation.expires_at, reservation.call_facts, reservation.estimate)
  end
  replies[position - 1] = reply
end
-- @include answer
