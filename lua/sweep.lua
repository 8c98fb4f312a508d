-- sweep.lua: expire what is overdue, forget what ended long ago, drop windows that have slid out; a bounded piece.
--
-- One operation a call. Reply: {status, now, expired, overdue, dropped, cursor}: how many reservations expired, how
-- many are still overdue, and how many windows were dropped; cursor is where to go on (0: once around).
-- flags: allow-oom

-- @include shard
-- @include window
-- @include limit
-- @include reservation
-- @include ledger
-- @include expire

local OPERATION = '>dd'
--   cursor       int   where the last call left off; 0 at first
--   scan_count   int   how many fields of the state to look at, about

local cursor, scan_count = from_bytes(OPERATION, ARGV[2])
local writes, following = true, nil
-- @include open
due_ms, ended_ms = 0, 0                 -- looks for itself: the head may have been restored from somewhere
-- @include overdue
local scanned = call('HSCAN', state_key, format('%.0f', cursor), 'MATCH', 'w/*', 'COUNT', scan_count)
local dropped = {}
for at = 1, #scanned[2], 2 do
  local field, text = scanned[2][at], scanned[2][at + 1]
  if not windows[field] and from_bytes(WINDOW, text) <= now_ms then
    dropped[#dropped + 1] = field
    dropped[#dropped + 1] = 'l' .. sub(field, 2)
  end
end
-- @include books
if #dropped > 0 then
  following = following or {}
  following[#following + 1] = {'HDEL', state_key, unpack(dropped)}
end
-- @include commit
local overdue = call('ZCOUNT', leases_key, '-inf', now_ms)
replies[1] = to_bytes('>ssddddd', 'sd*', 'swept', now_ms, expired, overdue, #dropped / 2, scanned[1])
-- @include answer
