-- ledger: the entries this call appends, the reservations it ends, and the commands that follow the commit for them.

local entries, ended, leases, released = {}, {}, {}, {}

local function append(kind, after, id, reserved_at, call_facts, estimate, outcome, digest)
  number = number + 1
  local entry_number = format('%d', number)
  entries[#entries + 1] = {'XADD', ledger_key, entry_number .. '-0', 'kind', kind, 'after', after, 'id', id,
    'reserved_at', reserved_at, 'booked_at', format('%d', now_ms), 'call', call_facts, 'estimate', estimate,
    'outcome', outcome, 'digest', digest, 'epoch', epoch}
  return entry_number
end

-- The words of an entry, whether it stands in the ledger or is about to; none if it was trimmed.
local function entry_at(entry_number)
  local id, words = entry_number .. '-0', {}
  for _, command in ipairs(entries) do
    if command[3] == id then words = {unpack(command, 4)} end
  end
  local found = #words == 0 and call('XRANGE', ledger_key, id, id)[1]
  if found then words = found[2] end
  local entry = {}
  for at = 1, #words, 2 do entry[words[at]] = words[at + 1] end
  return entry
end

-- The record says from now on how the reservation ended.
local function finish(field, record)
  write(field, record)
  ended[#ended + 1] = format('%d ', now_ms) .. field
  released[#released + 1] = field
end

-- Drops records that ended longer ago than anybody repeats a call. The list is in the order of that; an item whose
-- record is younger (the id was used anew, or usage came late) only makes room for the younger item.
local function forget(following)
  for _, item in ipairs(call('LRANGE', ended_key, 0, sweep_max - 1)) do
    local ended_at, field = string.match(item, '^(%d+) (.*)$')
    if ended_at + retention_ms > now_ms then return end
    local record = read(field)
    if record and string.match(record, '^%l+ %d+ %d+ ' .. ended_at .. ' ') then
      following[#following + 1] = {'HDEL', state_key, field}
    end
    following[#following + 1] = {'LREM', ended_key, 1, item}
  end
end

-- What has to follow the commit; nil if nothing. Fails before anything is written if the ledger has entries of which
-- the state knows nothing.
local function follow()
  if #entries > 0 and #call('XRANGE', ledger_key, entries[1][3], '+', 'COUNT', 1) > 0 then
    return nil, redis.error_reply('METERLIB_LEDGER entry ' .. entries[1][3] .. ' is in the ledger already')
  end
  local following = entries
  forget(following)
  if #ended > 0 then following[#following + 1] = {'RPUSH', ended_key, unpack(ended)} end
  if #leases > 0 then following[#following + 1] = {'ZADD', leases_key, unpack(leases)} end
  if #released > 0 then following[#following + 1] = {'ZREM', leases_key, unpack(released)} end
  return #following > 0 and following or nil
end
