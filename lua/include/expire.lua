-- expire: reservations whose lease ran out.
--
-- A sliding window keeps the hold until it slides out, a concurrency slot is free, and a period keeps the hold, or
-- frees it: then the hold stood at the end of the lease and is gone by itself.

local expired = 0                       -- how many did in this call

local function expire(field, reservation)
  local at, window_field, _, amount, hold_ms, settle_ms = reservation.holds_at, nil, nil, nil, nil, nil
  for _ = 1, reservation.hold_count do
    at, window_field, _, amount, hold_ms, settle_ms = hold_of(reservation, at)
    charge(window_field, hold_ms, hold_ms == settle_ms and amount or 0, -amount)
  end
  append('expired', '', id_of(field), reservation.reserved_at, reservation.call_facts, reservation.estimate, '', '')
  finish(field, ended_record_of('expired', number, reservation.reserved_at, '', reservation))
end

-- The open reservation of a field, or else how it ended. One whose lease is over ends here, swept or not.
local function reservation_at(field)
  local record = record_at(field)
  if not record then return nil, nil end
  local past = end_of(record)
  if past then return nil, past end
  local reservation = reservation_of(record)
  if reservation.expires_at > now_ms then return reservation, nil end
  expire(field, reservation)
  expired = expired + 1
  return nil, end_of(state[field])
end
