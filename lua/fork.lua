-- fork.lua: begin another epoch of a ledger that lost entries which were exported from it.
--
-- Entries behind the last one that is as it was exported bear numbers that others have in the archive. They are facts
-- all the same: they are numbered anew, behind every number that was ever given, and are of the new epoch. So a number
-- is one entry's for ever, and corrections that name it cannot mean another.
-- Statuses by precedence: repeated (forked from there already), changed (the ledger is of another epoch than whoever
-- decided has seen), forked. One operation a call. Replies: {status, now, …}
--   repeated, forked: epoch, first, moved (see FORK)

-- @include shard
-- @include window
-- @include limit
-- @include reservation
-- @include ledger

local OPERATION = '>dddd'
--   found_epoch    int   the ledger's epoch as it was found; 0: it had none
--   follows_epoch  int   of the last entry that was exported
--   follows_n      int   its number
--   kept_n         int   of the last entry that is as it was exported; 0: none is

local FORK = '>ddddd'
--   as in the operation: epoch and number of the entry that the new epoch follows; the new epoch; the first number in
--   it, and how many entries were moved there

local found_epoch, follows_epoch, follows_n, kept_n = from_bytes(OPERATION, ARGV[2])
fields[3] = 'fork'
local writes, following = true, nil
-- @include open
local past_fork = state.fork and {from_bytes(FORK, state.fork)} or {}
local first, from_ms, moved, removed = 0, now_ms, {}, {nil}
local status = 'forked'
if past_fork[1] == follows_epoch and past_fork[2] == follows_n and past_fork[3] == epoch then
  status = 'repeated'
elseif found_epoch ~= (head and epoch or 0) then
  status = 'changed'
else
  local last = call('XREVRANGE', ledger_key, '+', '-', 'COUNT', 1)[1]
  number = math.max(number, follows_n, last and string.match(last[1], '^%d+') + 0 or 0)
  epoch = math.max(now_ms, epoch + 1, follows_epoch + 1)
  first = number + 1
  for position, entry in ipairs(call('XRANGE', ledger_key, format('%d-0', kept_n + 1), '+')) do
    number = number + 1
    local command = {'XADD', ledger_key, format('%d-0', number), unpack(entry[2])}
    for at = 4, #command, 2 do
      if command[at] == 'epoch' then command[at + 1] = format('%013d', epoch) end
      if command[at] == 'booked_at' and position == 1 then from_ms = tonumber(command[at + 1]) or 0 end
    end
    entries[position], removed[position] = command, entry[1]
    moved[string.match(entry[1], '^%d+') + 0] = number
  end
  words[#words + 1], words[#words + 2] = 'fork', to_bytes(FORK, follows_epoch, follows_n, epoch, first, #removed)
end
-- @include books
for at = 1, #removed, 1000 do
  following[#following + 1] = {'XDEL', ledger_key, unpack(removed, at, math.min(at + 999, #removed))}
end
if #removed > 0 then call('LLEN', ended_key) end  -- fails if it is of a foreign type
-- @include commit
-- Records of what ended with an entry that was moved: newest first, as far back as the first of those.
local at, older = -1, #removed == 0
while not older do
  local items = call('LRANGE', ended_key, at - 999, at)
  for place = #items, 1, -1 do
    local ended_at, field = string.match(items[place], '^(%d+) (.*)$')
    older = older or ended_at + 0 < from_ms
    local record = not older and call('HGET', state_key, field)
    local past = record and end_of(record)
    if past and moved[past.number] then
      local kind, _, reserved_at, booked_at, digest, rest = from_bytes(ENDED, record)
      record = to_bytes(ENDED, kind, moved[past.number], reserved_at, booked_at, digest) .. sub(record, rest)
      call('HSET', state_key, field, record)
    end
  end
  at, older = at - 1000, older or #items < 1000
end
if status == 'changed' then
  replies[1] = to_bytes('>ssd', 'sd', status, now_ms)
elseif status == 'repeated' then
  replies[1] = to_bytes('>ssdddd', 'sd*', status, now_ms, epoch, past_fork[4], past_fork[5])
else
  replies[1] = to_bytes('>ssdddd', 'sd*', status, now_ms, epoch, first, #removed)
end
-- @include answer
