-- cancel.lua: free the whole hold of reservations whose call was never sent.
--
-- An id that is not known is remembered as cancelled, so that a reserve which was delayed on its way opens nothing.
-- Statuses by precedence: ended, repeated (the same call again), cancelled. Replies: {status, now, …}
--   ended: kind        cancelled, repeated: number (0: there was nothing to cancel), reserved_at, booked_at
-- flags: allow-oom

-- @include shard
-- @include window
-- @include windows
-- @include limit
-- @include times
-- @include reservation
-- @include ledger
-- @include expire

local OPERATION = '>s'
--   field        str   the field of the reservation's record

local function free_holds(reservation)
  local at, window_field, _, held, hold_ms = reservation.holds_at, nil, nil, nil, nil
  for _ = 1, reservation.hold_count do
    at, window_field, _, held, hold_ms = hold_of(reservation, at)
    charge(window_field, hold_ms, 0, -held)
  end
end

for position = 2, #ARGV do
  fields[position + 1] = from_bytes(OPERATION, ARGV[position])
end
local writes, following = true, nil
-- @include open
-- @include overdue
for position = 2, #ARGV do
  local field = fields[position + 1]
  local reservation, past = reservation_at(field)
  local reply
  if past and past.kind ~= 'cancelled' then
    reply = to_bytes('>ssds', 'sds', 'ended', now_ms, past.kind)
  elseif past then
    reply = to_bytes('>ssdddd', 'sd*', 'repeated', now_ms, past.number, past.reserved_at, past.booked_at)
  elseif not reservation then
    finish(field, ended_record_of('cancelled', 0, 0, ''))
    reply = to_bytes('>ssdddd', 'sd*', 'cancelled', now_ms, 0, 0, now_ms)
  else
    free_holds(reservation)
    append('cancelled', '', id_of(field), reservation.reserved_at, reservation.call_facts, reservation.estimate, '', '')
    finish(field, ended_record_of('cancelled', number, reservation.reserved_at, '', reservation))
    reply = to_bytes('>ssdddd', 'sd*', 'cancelled', now_ms, number, reservation.reserved_at, now_ms)
  end
  replies[position - 1] = reply
end
-- @include books
-- @include commit
-- @include answer
