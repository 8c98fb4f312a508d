-- peek.lua: how limits stand, changing nothing.
--
-- Statuses by precedence: stale_period, peeked. Replies: {status, now, …}        peeked: each limit (see describe)
-- flags: no-writes

-- @include shard
-- @include window

local operations, fields, at = {}, {'head', 'pending'}, OPERATIONS
while at < #ARGV do
  local limit_count  = tonumber(ARGV[at + 1])  -- int   how many limits follow
  operations[#operations + 1] = at
  for limit = at + 1, at - 3 + 4 * limit_count, 4 do fields[#fields + 1] = ARGV[limit + 1] end
  at = at + 1 + 4 * limit_count
end
operations[#operations + 1] = at
local failure = open(fields, true)
if failure then return failure end
local replies = {}
for position = 1, #operations - 1 do
  local reply = {'peeked', now_ms}
  for limit = operations[position] + 1, operations[position + 1] - 4, 4 do
    local window_field    = ARGV[limit + 1]            -- str   the field of its window
    local span_ms         = tonumber(ARGV[limit + 2])  -- ms    length of a sliding window; else 0
    local period_start_ms = tonumber(ARGV[limit + 3])  -- ms    first moment of a calendar period; else 0
    local period_end_ms   = tonumber(ARGV[limit + 4])  -- ms    first moment behind it; else 0
    if period_end_ms > 0 and (now_ms < period_start_ms or now_ms >= period_end_ms) then
      reply = {'stale_period', now_ms}
      break
    end
    describe(window_at(window_field, span_ms), reply)
  end
  replies[position] = reply
end
return replies
