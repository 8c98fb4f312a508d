-- lone: answers a call of one reservation that finds what is usual in windows with sub-windows, and in periods, of a
-- busy tenant: its id is unknown; each limit has room for it, and was charged last at the very time at which it is to
-- be charged now, or never. This needs no functions and hardly a table; with what else it leaves out it saves a
-- quarter of a reserve. All else is left to the long way, where the same is said of these, too.

local operation, described, usual, begun = ARGV[2], '', true, nil
local field, lease_ms, limit_count, at = from_bytes(OPERATION, operation)
local made_at_ms, expires_at_ms, kept_from = now_ms, now_ms + lease_ms, at - 8
for position = 4, limit_count + 3 do
  local limit_size, window_field, _, amount, quota, _, span_ms, sub_window_ms, period_start_ms, period_end_ms,
    on_expiry = from_bytes(LIMIT, operation, at)
  local _, settled, held, first_ms, last_ms, last_settled, last_held = 0, 0, 0, 0, 0, 0, 0
  local text = values[position]
  if text then _, settled, held, first_ms, last_ms, last_settled, last_held = from_bytes(WINDOW, text) end
  -- @include hold_ms
  if last_ms == 0 then
    first_ms, last_ms, usual = hold_ms, hold_ms, amount > 0
  elseif last_ms ~= hold_ms or first_ms + span_ms <= now_ms then
    usual = false
  end
  if period_start_ms > 0 and (now_ms < period_start_ms or now_ms >= period_end_ms) then usual = false end
  held = held + amount
  if not usual or not (settled + held <= quota) then
    usual = false
    break
  end
  local ends_at, size = last_ms + span_ms, #words
  words[size + 1], words[size + 2] = window_field, to_bytes(WINDOW, ends_at, settled, held, first_ms, last_ms,
    last_settled, last_held + amount)
  if not text then
    begun = begun or {nil, nil}
    begun[#begun + 1], begun[#begun + 2] = ends_at, window_field
  end
  described, at = described .. to_bytes('>dddd', settled, held, first_ms + span_ms, ends_at), at + limit_size
end
if usual then
  if due_ms > expires_at_ms then due_ms = expires_at_ms end
  words[2] = to_bytes(HEAD, now_ms, server_ms, number, epoch, due_ms, ended_ms) .. layout
  words[#words + 1] = field
  words[#words + 1] = to_bytes('>sddd', 'open', now_ms, expires_at_ms, 0) .. sub(operation, kept_from)
  call('ZADD', leases_key, expires_at_ms, field)  -- one without a reservation harms nobody
  if begun then call('ZADD', windows_key, unpack(begun)) end  -- nor does one that does not begin after all
  call('HSET', state_key, unpack(words))
  return to_bytes('>ssdddd', 'sd*', 'reserved', now_ms, now_ms, expires_at_ms, 0) .. described
end
words = {'head', ''}
