-- denied: the answer to a reserve that at least one limit denies: how each of them stands, and when it lets this pass.

reply = to_bytes('>ssd', 'sd' .. string.rep('sddddd', limit_count), 'denied', now_ms)
local limit_at = limits_at
for _ = 1, limit_count do
  local limit_size, window_field, _, amount, quota, oversize = from_bytes(LIMIT, operation, limit_at)
  local window = windows[window_field]
  local verdict, passes_at_ms = verdict_of(window, amount, quota, oversize), 0
  if verdict == 'quota' then
    passes_at_ms = in_log().falls_to(window_field, window, amount > quota and 0 or quota - amount)
  end
  reply = reply .. to_bytes('>sd', verdict, passes_at_ms) .. describe(window)
  limit_at = limit_at + limit_size
end
