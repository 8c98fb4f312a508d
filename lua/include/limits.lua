-- limits: what an operation says of each limit it touches, and what the limit says to that.

local LIMIT_ARGUMENTS = 10

-- Reads `count` limits that follow ARGV[at]; their windows are added to the fields to be read.
local function limits_at(at, count, fields)
  local limits = {}
  for position = 1, count do
    local limit = at + (position - 1) * LIMIT_ARGUMENTS
    local window          = ARGV[limit + 1]            -- str   the field of its window
    local unit            = ARGV[limit + 2]            -- str   what it counts
    local amount          = tonumber(ARGV[limit + 3])  -- int   how much of it, in the unit
    local quota           = tonumber(ARGV[limit + 4])  -- int   how much may count at any time, in the unit
    local oversize        = ARGV[limit + 5]            -- str   an amount above the quota: admit (when idle) or reject
    local span_ms         = tonumber(ARGV[limit + 6])  -- ms    length of a sliding window; else 0
    local sub_window_ms   = tonumber(ARGV[limit + 7])  -- ms    its resolution; else 0
    local period_start_ms = tonumber(ARGV[limit + 8])  -- ms    first moment of a calendar period; else 0
    local period_end_ms   = tonumber(ARGV[limit + 9])  -- ms    first moment behind it; else 0
    local on_expiry       = ARGV[limit + 10]           -- str   a period's hold when the lease runs out: keep or free
    fields[#fields + 1] = window
    limits[position] = {window = window, unit = unit, amount = amount, quota = quota, oversize = oversize,
      span_ms = span_ms, sub_window_ms = sub_window_ms, period_start_ms = period_start_ms,
      period_end_ms = period_end_ms, on_expiry = on_expiry}
  end
  return limits, at + count * LIMIT_ARGUMENTS
end

-- Callers work out calendar periods, and a caller's clock may disagree with the shard's.
local function stale(limits)
  for _, limit in ipairs(limits) do
    if limit.period_end_ms > 0 and (now_ms < limit.period_start_ms or now_ms >= limit.period_end_ms) then return true end
  end
  return false
end

-- The times at which a hold, and later what was settled, stand in the limit's window; 0: nothing is settled there.
local function times_of(limit, expires_at_ms)
  local period_end_ms = limit.period_end_ms
  if limit.sub_window_ms > 0 then
    local last_ms = floor(now_ms / limit.sub_window_ms + 1) * limit.sub_window_ms - 1
    return last_ms, last_ms
  elseif period_end_ms == 0 then
    return expires_at_ms, 0
  elseif limit.on_expiry == 'free' and expires_at_ms < period_end_ms then
    return expires_at_ms, period_end_ms
  end
  return period_end_ms, period_end_ms
end

-- Four numbers a limit: settled, held, when something frees, when all is free (0: nothing to wait for).
local function describe(limits, reply)
  for _, limit in ipairs(limits) do
    local window, size = window_at(limit.window, limit.span_ms), #reply
    local log = window.log
    reply[size + 1], reply[size + 2], reply[size + 3], reply[size + 4] = window.settled, window.held, 0, 0
    if log ~= '' then
      reply[size + 3], reply[size + 4] = sub(log, 1, 13) + limit.span_ms, sub(log, -45, -33) + limit.span_ms
    end
  end
  return reply
end
