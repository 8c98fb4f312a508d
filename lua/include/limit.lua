-- limit: the times at which a hold, and later what was settled, stand in the window of the limit at ARGV[limit].
--
-- The second is '0' where nothing is settled (open reservations). A period's hold that the lease's end shall free
-- stands at that end.

local sub_window_times = {}                        -- by resolution

local function times_of(limit, expires_at_ms)
  local sub_window_ms = ARGV[limit + 7]            -- ms    resolution of a sliding window; else 0
  if sub_window_ms ~= '0' then
    local time = sub_window_times[sub_window_ms]
    if not time then
      time = format('%013d', floor(now_ms / sub_window_ms + 1) * sub_window_ms - 1)
      sub_window_times[sub_window_ms] = time
    end
    return time, time
  end
  local period_end_ms = tonumber(ARGV[limit + 9])  -- ms    first moment behind a calendar period; else 0
  local on_expiry     = ARGV[limit + 10]           -- str   a period's hold when the lease runs out: keep or free
  local expires_at, period_end = format('%013d', expires_at_ms), format('%013d', period_end_ms)
  if period_end_ms == 0 then return expires_at, '0' end
  if on_expiry == 'free' and expires_at < period_end then return expires_at, period_end end
  return period_end, period_end
end
