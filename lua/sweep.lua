-- sweep.lua: expire what is overdue, forget what ended long ago, drop windows that have slid out; a bounded piece.
--
-- One operation a call. Reply: {status, now, expired, overdue, forgotten, dropped, cursor}: how many reservations
-- expired, how many are still overdue, and how many windows were dropped; cursor is where to go on (0: once around).
-- flags: allow-oom

-- @include shard
-- @include window
-- @include ledger
-- @include reservation
-- @include expire

local failure, following = open({'head', 'pending'}), nil
if failure then return failure end
local cursor     = ARGV[OPERATIONS + 1]            -- int   where the last call left off; 0 at first
local scan_count = tonumber(ARGV[OPERATIONS + 2])  -- int   how many fields of the state to look at, about
local expired = sweep(sweep_max)
local scanned = call('HSCAN', state_key, cursor, 'MATCH', 'w/*', 'COUNT', scan_count)
local dropped = {}
for at = 1, #scanned[2], 2 do
  local field, text = scanned[2][at], scanned[2][at + 1]
  if not windows[field] and tonumber(sub(text, 1, 13)) <= now_ms then dropped[#dropped + 1] = field end
end
write_windows()
following, failure = follow()
if failure then return failure end
if #dropped > 0 then
  following = following or {}
  following[#following + 1] = {'HDEL', state_key, unpack(dropped)}
end
commit(following)
local overdue = call('ZCOUNT', leases_key, '-inf', now_ms)
return {{'swept', now_ms, expired, overdue, #dropped, tonumber(scanned[1])}}
