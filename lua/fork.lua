-- fork.lua: begin another epoch of a ledger that lost entries which were exported from it.
--
-- Entries behind the last one that is as it was exported bear numbers that others have in the archive. They are facts
-- all the same: they are numbered anew, behind every number that was ever given, and are of the new epoch. So a number
-- is one entry's for ever, and corrections that name it cannot mean another.
-- Statuses by precedence: repeated (forked from there already), changed (the ledger is of another epoch, or has other
-- entries, than whoever decided has seen), forked. One operation a call. Replies: {status, now, …}
--   repeated, forked: epoch, first, moved (see FORK)
-- flags: allow-oom

-- @include shard
-- @include window
-- @include windows
-- @include limit
-- @include times
-- @include reservation
-- @include ledger

local OPERATION = '>sdddddddd'         -- then so many runs of entries
--   seen_id        str   of the last entry that was there when somebody looked: the reservation; empty: there was none
--   seen_n         int   its number, or 0
--   seen_booked_ms int   when it was booked
--   seen_at_ms     ms    the shard's time right before that look
--   found_epoch    int   the ledger's epoch as it was found; 0: it had none
--   follows_epoch  int   of the last entry that was exported
--   follows_n      int   its number
--   kept_n         int   of the last entry that is as it was exported; 0: none is
--   run_count      int   how many runs follow, of entries behind that which were exported under other numbers

local RENUMBERED = '>ddd'
--   first_n      int   the first of a run
--   last_n       int   the last
--   exported_n   int   the number under which the first was exported; the others follow it

local FORK = '>ddddd'
--   as in the operation: epoch and number of the entry that the new epoch follows; the new epoch; the first number in
--   it, and how many entries were moved there

-- A correction names its entry by the new number, if that is of the same call: else it means one that was lost.
local function renamed(outcome, call_facts, moved, calls, ids)
  local named = string.match(outcome, '"adjusts_id":"([%w_-]+)"')
  return (string.gsub(outcome, '"adjusts":"(%d+):(%d+)"', function(shard, n)
    n = n + 0
    if moved[n] and calls[n] == call_facts and (named or ids[n]) == ids[n] then
      return format('"adjusts":"%s:%d"', shard, moved[n])
    end
  end, 1))
end

local function told(entry, name)
  for place = 1, #entry[2], 2 do
    if entry[2][place] == name then return entry[2][place + 1] end
  end
end

-- Whether the ledger still is what was seen, and what came since. Its last entry may be gone: then more was lost. If
-- there are entries behind it that are older than the look, a better copy was put in place; those may be exported.
local function is_as_seen(seen_id, seen_n, seen_booked_ms, seen_at_ms)
  local id = format('%d-0', seen_n)
  local last = call('XRANGE', ledger_key, id, id)[1] or {id, {}}
  local following = call('XRANGE', ledger_key, format('%d-0', seen_n + 1), '+', 'COUNT', 1)[1]
  return (told(last, 'id') or '') == seen_id and tonumber(told(last, 'booked_at') or 0) == seen_booked_ms
    and (not following or (tonumber(told(following, 'booked_at') or 0) or 0) >= seen_at_ms)
end

local seen_id, seen_n, seen_booked_ms, seen_at_ms, found_epoch, follows_epoch, follows_n, kept_n, run_count,
  at = from_bytes(OPERATION, ARGV[2])
local known = {}
for _ = 1, run_count do
  local first_n, last_n, exported_n, next_at = from_bytes(RENUMBERED, ARGV[2], at)
  for n = first_n, last_n do known[n] = exported_n + n - first_n end
  at = next_at
end
fields[3] = 'fork'
local writes, following = true, nil
-- @include open
local past_fork = state.fork and {from_bytes(FORK, state.fork)} or {}
local first, from_ms, moved, moved_count, removed = 0, now_ms, {}, 0, {nil}
local status = 'forked'
if past_fork[1] == follows_epoch and past_fork[2] == follows_n and past_fork[3] == epoch then
  status = 'repeated'
elseif found_epoch ~= (head and epoch or 0) or not is_as_seen(seen_id, seen_n, seen_booked_ms, seen_at_ms) then
  status = 'changed'
else
  local last = call('XREVRANGE', ledger_key, '+', '-', 'COUNT', 1)[1]
  number = math.max(number, follows_n, last and string.match(last[1], '^%d+') + 0 or 0)
  epoch = math.max(now_ms, epoch + 1, follows_epoch + 1)
  first = number + 1
  local calls, ids = {}, {}
  for position, entry in ipairs(call('XRANGE', ledger_key, format('%d-0', kept_n + 1), '+')) do
    local n, values, places = string.match(entry[1], '^%d+') + 0, entry[2], {}
    for place = 1, #values, 2 do places[values[place]] = place + 1 end
    local outcome_at, booked_at, call_facts = places.outcome, places.booked_at, values[places.call or 0]
    if position == 1 then from_ms = booked_at and tonumber(values[booked_at]) or 0 end
    if outcome_at and values[places.kind or 0] == 'adjusted' then
      values[outcome_at] = renamed(values[outcome_at], call_facts, moved, calls, ids)
    end
    removed[position], calls[n], ids[n], moved[n] = entry[1], call_facts, values[places.id or 0], known[n]
    if not known[n] then
      number = number + 1
      moved[n] = number
      if places.epoch then values[places.epoch] = format('%013d', epoch) end
      entries[#entries + 1] = {'XADD', ledger_key, format('%d-0', number), unpack(values)}
    end
  end
  moved_count = #entries
  words[#words + 1], words[#words + 2] = 'fork', to_bytes(FORK, follows_epoch, follows_n, epoch, first, moved_count)
end
-- @include books
if #removed > 0 then
  call('LLEN', ended_key)  -- fails if it is of a foreign type
  following = following or {nil, nil}
end
for at = 1, #removed, 1000 do
  following[#following + 1] = {'XDEL', ledger_key, unpack(removed, at, math.min(at + 999, #removed))}
end
-- @include commit
-- Records of what ended with an entry that was moved: newest first, as far back as the first of those.
local older = #removed == 0
at = -1
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
  replies[1] = to_bytes('>ssdddd', 'sd*', status, now_ms, epoch, first, moved_count)
end
-- @include answer
