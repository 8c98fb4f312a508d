-- sweep.lua: expire what is overdue, forget what ended long ago, drop windows that have slid out; a bounded piece.
--
-- A window is looked at when it may be over: first when it would be if nobody added to it, and if somebody did, when it
-- would be then. One operation a call. Reply: {status, now, expired, overdue, dropped, due}: how many reservations
-- expired and how many are still overdue, how many windows were dropped and how many are still to be looked at.
-- flags: allow-oom

-- @include shard
-- @include window
-- @include windows
-- @include limit
-- @include times
-- @include reservation
-- @include ledger
-- @include expire

local OPERATION = '>d'
--   window_count  int   how many windows to look at, at most

local window_count = from_bytes(OPERATION, ARGV[2])
local writes, following = true, nil
-- @include open
due_ms, ended_ms = 0, 0                 -- looks for itself: the head may have been restored from somewhere
-- @include overdue
local due = call('ZRANGEBYSCORE', windows_key, '-inf', now_ms, 'LIMIT', 0, window_count)
local texts = #due > 0 and call('HMGET', state_key, unpack(due))
local alive, over, dropped = {nil, nil}, {nil}, {nil, nil}
for at, field in ipairs(due) do
  local ends_at = texts[at] and from_bytes(WINDOW, texts[at]) or 0
  if ends_at > now_ms then
    alive[#alive + 1], alive[#alive + 2] = ends_at, field
  elseif not windows[field] then        -- what a reservation that expires has just changed is for the next call
    over[#over + 1] = field
    if texts[at] then dropped[#dropped + 1], dropped[#dropped + 2] = field, 'l' .. sub(field, 2) end
  end
end
-- @include books
if #alive > 0 then call('ZADD', windows_key, unpack(alive)) end
if #over > 0 then
  following = following or {}
  if #dropped > 0 then following[#following + 1] = {'HDEL', state_key, unpack(dropped)} end
  following[#following + 1] = {'ZREM', windows_key, unpack(over)}
end
-- @include commit
local overdue, still_due = call('ZCOUNT', leases_key, '-inf', now_ms), call('ZCOUNT', windows_key, '-inf', now_ms)
replies[1] = to_bytes('>ssddddd', 'sd*', 'swept', now_ms, expired, overdue, #dropped / 2, still_due)
-- @include answer
