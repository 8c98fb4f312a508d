-- cancel.lua: free the whole hold of reservations whose call was never sent.
--
-- An id that is not known is remembered as cancelled, so that a reserve which was delayed on its way opens nothing.
-- Statuses by precedence: ended, repeated (the same call again), cancelled. Replies: {status, now, …}
--   ended: kind        cancelled, repeated: number (0: there was nothing to cancel), reserved_at, booked_at
-- flags: allow-oom

-- @include shard
-- @include window
-- @include ledger
-- @include reservation
-- @include expire

local fields = {'head', 'pending'}
for operation = OPERATIONS, #ARGV - 1 do
  local field = ARGV[operation + 1]  -- str   the field of the reservation's record
  fields[#fields + 1] = field
end
local failure, following = open(fields), nil
if failure then return failure end
sweep(sweep_max)
local replies = {}
for position = 1, #fields - 2 do
  local field = fields[position + 2]
  local reservation, past = reservation_at(field)
  if past and past.kind ~= 'cancelled' then
    replies[position] = {'ended', now_ms, past.kind}
  elseif past then
    replies[position] = {'repeated', now_ms, tonumber(past.number), tonumber(past.reserved_at),
      tonumber(past.booked_at)}
  elseif not reservation then
    finish(field, ended_record_of('cancelled', '0', '0', ''))
    replies[position] = {'cancelled', now_ms, 0, 0, now_ms}
  else
    for _, hold in ipairs(reservation.holds) do
      charge(window_at(hold.window, hold.span_ms), hold.hold_time, 0, -hold.amount)
      hold.amount = 0
    end
    local entry_number = append('cancelled', '', id_of(field), reservation.reserved_at, reservation.call_facts,
      reservation.estimate, '', '')
    finish(field, ended_record_of('cancelled', entry_number, reservation.reserved_at, '', reservation))
    replies[position] = {'cancelled', now_ms, number, tonumber(reservation.reserved_at), now_ms}
  end
end
write_windows()
following, failure = follow()
if failure then return failure end
commit(following)
return replies
