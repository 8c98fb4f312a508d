-- charge_now: usage that nobody reserved, charged as of now to the limits that an operation names, unless the caller's
-- clock disagrees with the shard's about a calendar period: then it is stale.

local stale, limit_at = false, at
for _ = 1, limit_count do
  local limit_size, _, _, _, _, _, _, _, period_start_ms, period_end_ms = from_bytes(LIMIT, operation, limit_at)
  if period_start_ms > 0 and (now_ms < period_start_ms or now_ms >= period_end_ms) then stale = true end
  limit_at = limit_at + limit_size
end
limit_at = at
for _ = 1, stale and 0 or limit_count do
  local limit_size, window_field, _, amount, _, _, span_ms, sub_window_ms, _, period_end_ms, on_expiry =
    from_bytes(LIMIT, operation, limit_at)
  local _, settle_ms = times_of(sub_window_ms, period_end_ms, on_expiry, now_ms, 0)
  if settle_ms > 0 then
    window_at(window_field, span_ms)
    charge(window_field, settle_ms, amount, 0)
  end
  limit_at = limit_at + limit_size
end
