-- hold_ms: the time at which the hold of a call stands that was made at `made_at_ms`. A period's hold that the lease's
-- end shall free stands at that end.

local hold_ms = period_end_ms
if sub_window_ms > 0 then
  hold_ms = floor(made_at_ms / sub_window_ms + 1) * sub_window_ms - 1
elseif hold_ms == 0 or on_expiry == 'free' and expires_at_ms < hold_ms then
  hold_ms = expires_at_ms
end
