-- overdue: expires reservations whose lease is over, at most `sweep_max`.

if due_ms <= now_ms then
  local overdue = call('ZRANGEBYSCORE', leases_key, '-inf', now_ms, 'LIMIT', 0, sweep_max)
  if #overdue < sweep_max then
    local next_lease = call('ZRANGEBYSCORE', leases_key, format('(%d', now_ms), '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
    due_ms = next_lease[2] and next_lease[2] + 0 or NEVER
  end
  for _, field in ipairs(overdue) do
    local reservation, past = reservation_at(field)
    if reservation then
      lease(field, reservation.expires_at)
    elseif not past or past.kind ~= 'expired' then
      released[#released + 1] = field
    end
  end
end
