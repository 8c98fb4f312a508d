-- expire: reservations whose lease ran out.
--
-- A sliding window keeps the hold until it slides out, a concurrency slot is free, and a period keeps the hold, or
-- frees it: then the hold stood at the end of the lease and is gone by itself.

local function expire(field, reservation)
  for _, hold in ipairs(reservation.holds) do
    local kept = hold.hold_time == hold.settle_time and hold.amount or 0
    charge(window_at(hold.window, hold.span_ms), hold.hold_time, kept, -hold.amount)
    hold.amount = kept
  end
  local entry_number = append('expired', '', id_of(field), reservation.reserved_at, reservation.call_facts,
    reservation.estimate, '', '')
  finish(field, ended_record_of('expired', entry_number, reservation.reserved_at, '', reservation))
end

-- The open reservation of a field, or else how it ended. One whose lease is over ends here, swept or not.
local function reservation_at(field)
  local record = read(field)
  if not record then return nil, nil end
  local past = end_of(record)
  if past then return nil, past end
  local reservation = reservation_of(record)
  if tonumber(reservation.expires_at) > now_ms then return reservation, nil end
  expire(field, reservation)
  return nil, end_of(state[field])
end

-- Expires what is overdue, at most `most` reservations; returns how many.
local function sweep(most)
  local expired = 0
  if call('ZCOUNT', leases_key, '-inf', now_ms) == 0 then return expired end
  for _, field in ipairs(call('ZRANGEBYSCORE', leases_key, '-inf', now_ms, 'LIMIT', 0, most)) do
    local reservation, past = reservation_at(field)
    if reservation then
      leases[#leases + 1], leases[#leases + 2] = reservation.expires_at, field
    elseif past and past.kind == 'expired' then
      expired = expired + 1
    else
      released[#released + 1] = field
    end
  end
  return expired
end
