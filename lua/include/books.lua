-- books: what has to follow the commit for reservations that end. Fails before anything is written if the ledger has
-- entries of which the state knows nothing.

if #entries > 0 and #call('XRANGE', ledger_key, entries[1][3], '+', 'COUNT', 1) > 0 then
  return redis.error_reply('METERLIB_LEDGER entry ' .. entries[1][3] .. ' is in the ledger already')
end
if #leases + #released > 0 then call('ZCARD', leases_key) end  -- fails if it is of a foreign type
following = entries
-- Drops records that ended longer ago than anybody repeats a call. The list is in the order of that; an item whose
-- record is younger (the id was used anew, or usage came late) only makes room for the younger item.
if ended_ms + retention_ms <= now_ms then
  local items, dropped = call('LRANGE', ended_key, 0, sweep_max - 1), 0
  for _, item in ipairs(items) do
    local ended_at, field = string.match(item, '^(%d+) (.*)$')
    ended_ms = ended_at + 0
    if ended_ms + retention_ms > now_ms then break end
    local record = record_at(field)
    local past = record and end_of(record)
    if past and past.booked_at == ended_ms then following[#following + 1] = {'HDEL', state_key, field} end
    following[#following + 1] = {'LREM', ended_key, 1, item}
    dropped = dropped + 1
  end
  if dropped == #items and dropped < sweep_max then ended_ms = #ended > 0 and now_ms or NEVER end
end
if #leases > 0 then following[#following + 1] = {'ZADD', leases_key, unpack(leases)} end
if #released > 0 then following[#following + 1] = {'ZREM', leases_key, unpack(released)} end
if #ended > 0 then call('RPUSH', ended_key, unpack(ended)) end  -- what has not ended after all harms nobody there
if #following == 0 then following = nil end
