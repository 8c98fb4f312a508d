-- times: where in its window an amount stands.

-- The times at which a hold, and later what was settled, stand in the window of a call that was made at some time. The
-- second is 0 where nothing is settled (open reservations).
local function times_of(sub_window_ms, period_end_ms, on_expiry, made_at_ms, expires_at_ms)
  -- @include hold_ms
  return hold_ms, sub_window_ms > 0 and hold_ms or period_end_ms
end
