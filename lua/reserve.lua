-- reserve.lua: hold an estimate on every limit a call touches, or on none of them.
--
-- Statuses by precedence: ended, conflict, stale_period, open (the same call again), denied, reserved. A denied
-- operation changes nothing. Replies: status, now, …, where a limit is four numbers (see describe)
--   ended: kind        conflict: call, estimate        open, reserved: reserved_at, expires_at, revision, each limit
--   denied: each limit, led by its verdict (passes, quota, oversize) and the time when this very call passes

-- @include shard
-- @include window
-- @include limit

local OPERATION = '>sdd'                -- then so many limits, then the payload; the record keeps them, count and all
--   field            str   the field of the reservation's record
--   lease_ms         ms    how long it may stay unsettled
--   limit_count      int   how many limits follow

for position = 2, #ARGV do
  local operation = ARGV[position]
  local field, _, limit_count, at = from_bytes(OPERATION, operation)
  fields[#fields + 1] = field
  for _ = 1, limit_count do
    local limit_size, window_field = from_bytes(NEXT_LIMIT, operation, at)
    fields[#fields + 1], at = window_field, at + limit_size
  end
end
local writes = true
-- @include look
if #ARGV == 2 and due_ms > now_ms and not values[3] then
  -- @include lone
end

-- The long way, for several reservations or whatever is unusual. Its functions are made only here.
for at = 3, #fields do state[fields[at]] = values[at] end
-- @include windows
-- @include times

-- passes, or why not: the quota is used up for now, or the amount can never fit.
local function verdict_of(window, amount, quota, oversize)
  if quota == 0 then return 'oversize' end  -- also of what takes nothing: such a limit is there to deny
  local used = window.settled + window.held
  if used + amount <= quota then return 'passes' end
  if amount <= quota then return 'quota' end
  if oversize == 'reject' then return 'oversize' end
  return used == 0 and 'passes' or 'quota'
end

local following, close_books
if due_ms <= now_ms then
  -- Included here and not above, since calls that find nothing to expire shall not pay for it.
  -- @include reservation
  -- @include ledger
  -- @include expire
  -- @include overdue
  close_books = #ended + #leases + #released > 0 and function()
    -- @include books
  end
end
local new_leases, asked = {nil, nil}, {nil, nil, nil, nil, nil, nil}
for position = 2, #ARGV do
  local operation = ARGV[position]
  local field, lease_ms, limit_count, limits_at = from_bytes(OPERATION, operation)
  local reserved_at, expires_at, revision = now_ms, now_ms + lease_ms, 0
  local passes, stale, payload_at, asked_count = true, false, limits_at, 0
  for _ = 1, limit_count do
    local limit_size, window_field, _, amount, quota, oversize, span_ms, sub_window_ms, period_start_ms, period_end_ms,
      on_expiry = from_bytes(LIMIT, operation, payload_at)
    if period_start_ms > 0 and (now_ms < period_start_ms or now_ms >= period_end_ms) then stale = true end
    local window = window_at(window_field, span_ms)
    if verdict_of(window, amount, quota, oversize) ~= 'passes' then passes = false end
    asked[asked_count + 1], asked[asked_count + 2] = window_field, amount
    asked[asked_count + 3] = times_of(sub_window_ms, period_end_ms, on_expiry, now_ms, expires_at)
    payload_at, asked_count = payload_at + limit_size, asked_count + 3
  end
  local record, status, reply = state[field], 'reserved', nil
  if record then
    -- @include known
  end
  if not reply and stale then
    reply = to_bytes('>ssd', 'sd', 'stale_period', now_ms)
  elseif not reply and status == 'reserved' and not passes then
    -- @include denied
  end
  if not reply and status == 'reserved' then
    for at = 1, asked_count, 3 do charge(asked[at], asked[at + 2], 0, asked[at + 1]) end
    record = to_bytes('>sddd', 'open', now_ms, expires_at, 0) .. sub(operation, limits_at - 8)
    state[field], words[#words + 1], words[#words + 2] = record, field, record
    new_leases[#new_leases + 1], new_leases[#new_leases + 2] = expires_at, field
    if due_ms > expires_at then due_ms = expires_at end
  end
  if not reply then
    reply = to_bytes('>ssdddd', 'sd*', status, now_ms, reserved_at, expires_at, revision)
    for at = 1, asked_count, 3 do reply = reply .. describe(windows[asked[at]]) end
  end
  replies[position - 1] = reply
end
local failure = close_books and close_books()
if failure then return failure end
if #new_leases > 0 then call('ZADD', leases_key, unpack(new_leases)) end  -- one without a reservation harms nobody
-- @include commit
-- @include answer
