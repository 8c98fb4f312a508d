-- charge_now: usage that nobody reserved, charged as of now to the limits that an operation names.

-- Whether a caller's clock disagrees with the shard's about a calendar period.
local function stale(first_limit, last_limit)
  for limit = first_limit, last_limit, 10 do
    local period_start_ms = tonumber(ARGV[limit + 8])  -- ms    first moment of a calendar period; else 0
    if period_start_ms > 0 and (now_ms < period_start_ms or now_ms >= tonumber(ARGV[limit + 9])) then return true end
  end
  return false
end

local function charge_now(first_limit, last_limit)
  for limit = first_limit, last_limit, 10 do
    local window_field    = ARGV[limit + 1]            -- str   the field of its window
    local unit            = ARGV[limit + 2]            -- str   what it counts
    local amount          = tonumber(ARGV[limit + 3])  -- int   how much was used, in that unit
    local quota           = ARGV[limit + 4]            -- int   its quota; usage is charged whatever it is
    local oversize        = ARGV[limit + 5]            -- str   likewise of no account here
    local span_ms         = tonumber(ARGV[limit + 6])  -- ms    length of a sliding window; else 0
    local _, settle_time = times_of(limit, 0)
    if settle_time ~= '0' then charge(window_at(window_field, span_ms), settle_time, amount, 0) end
  end
end
