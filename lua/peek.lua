-- peek.lua: how limits stand, changing nothing.
--
-- Statuses by precedence: stale_period, peeked. Replies: {status, now, …}        peeked: each limit (see describe)
-- flags: no-writes

-- @include shard
-- @include window
-- @include windows

local OPERATION = '>d'                  -- then so many limits
--   limit_count      int   how many limits follow

local LIMIT = '>sddd'
--   window_field     str   the field of its window
--   span_ms          ms    length of a sliding window; else 0
--   period_start_ms  ms    first moment of a calendar period; else 0
--   period_end_ms    ms    first moment behind it; else 0

local function peek(operation)
  local reply = to_bytes('>ssd', 'sd*', 'peeked', now_ms)
  local limit_count, at = from_bytes(OPERATION, operation)
  for _ = 1, limit_count do
    local window_field, span_ms, period_start_ms, period_end_ms, next_at = from_bytes(LIMIT, operation, at)
    if period_end_ms > 0 and (now_ms < period_start_ms or now_ms >= period_end_ms) then
      return to_bytes('>ssd', 'sd', 'stale_period', now_ms)
    end
    reply, at = reply .. describe(window_at(window_field, span_ms)), next_at
  end
  return reply
end

for position = 2, #ARGV do
  local limit_count, at = from_bytes(OPERATION, ARGV[position])
  for _ = 1, limit_count do
    local window_field, _, _, _, next_at = from_bytes(LIMIT, ARGV[position], at)
    fields[#fields + 1], at = window_field, next_at
  end
end
local writes = false
-- @include open
for position = 2, #ARGV do
  replies[position - 1] = peek(ARGV[position])
end
-- @include answer
