-- reserve.lua: hold an estimate on every limit a call touches, or on none of them.
--
-- Statuses by precedence: ended, conflict, stale_period, open (the same call again), denied, reserved. A denied
-- operation changes nothing. Replies: {status, now, …}, where a limit is four numbers (see describe)
--   ended: kind        conflict: call, estimate        open, reserved: reserved_at, expires_at, revision, each limit
--   denied: each limit, led by its verdict (passes, quota, oversize) and the time when this very call passes

-- @include shard
-- @include window
-- @include limit

-- passes, or why not: the quota is used up for now, or the amount can never fit.
local function verdict_of(window, amount, quota, oversize)
  local used = window.settled + window.held
  if used + amount <= quota then return 'passes' end
  if amount <= quota then return 'quota' end
  if quota == 0 or oversize == 'reject' then return 'oversize' end
  return used == 0 and 'passes' or 'quota'
end

local function deny(first_limit, last_limit)
  local reply = {'denied', now_ms}
  for limit = first_limit, last_limit, 10 do
    local window, amount, quota = windows[ARGV[limit + 1]], tonumber(ARGV[limit + 3]), tonumber(ARGV[limit + 4])
    local verdict, passes_at_ms = verdict_of(window, amount, quota, ARGV[limit + 5]), 0
    if verdict == 'quota' then
      local used, level = window.settled + window.held, amount > quota and 0 or quota - amount
      local text, at, last = window.text, 46, window.last
      while used > level and at < window.to do
        passes_at_ms = sub(text, at, at + 12) + window.span_ms
        used = used - sub(text, at + 13, at + 28) - sub(text, at + 29, at + 44)
        at = at + 45
      end
      if used > level and last ~= '' then passes_at_ms = sub(last, 1, 13) + window.span_ms end
    end
    reply[#reply + 1] = verdict
    reply[#reply + 1] = passes_at_ms
    describe(window, reply)
  end
  return reply
end

-- The id is known: it ended, or it is open with this payload or with another one.
local function known(present, digest)
  local kind = string.match(present, '^%l+')
  if kind then return {'ended', now_ms, kind} end
  local reserved_at, expires_at, revision, own_digest, own_call, own_estimate =
    string.match(present, '^(%d+) (%d+) (%d+) (%S+)\n([^\n]*)\n([^\n]*)')
  if tonumber(expires_at) <= now_ms then return {'ended', now_ms, 'expired'} end
  if own_digest ~= digest then return {'conflict', now_ms, own_call, own_estimate} end
  return {'open', now_ms, tonumber(reserved_at), tonumber(expires_at), tonumber(revision)}
end

local operations, fields, at = {nil, nil}, {'head', 'pending', nil, nil, nil, nil}, OPERATIONS
while at < #ARGV do
  local last_limit = at - 4 + 10 * ARGV[at + 6]
  operations[#operations + 1] = at
  fields[#fields + 1] = ARGV[at + 1]
  for limit = at + 6, last_limit, 10 do fields[#fields + 1] = ARGV[limit + 1] end
  at = last_limit + 10
end
operations[#operations + 1] = at
local failure = open(fields)
if failure then return failure end
local following
if call('ZCOUNT', leases_key, '-inf', now_ms) > 0 then
  -- Included here and not above, since calls that find nothing to expire shall not pay for it.
  -- @include ledger
  -- @include reservation
  -- @include expire
  sweep(sweep_max)
  following, failure = follow()
  if failure then return failure end
end
local replies, new_leases = {}, {nil, nil}
for position = 1, #operations - 1 do
  local operation    = operations[position]
  local reservation  = ARGV[operation + 1]            -- str   the field of its record
  local digest       = ARGV[operation + 2]            -- hex   of the payload: with another one the id is a conflict
  local call_facts   = ARGV[operation + 3]            -- json  tenant, attributes, funding; nobody looks inside here
  local estimate     = ARGV[operation + 4]            -- json  the usage expected; likewise
  local lease_ms     = ARGV[operation + 5]            -- ms    how long it may stay unsettled
  local limit_count  = ARGV[operation + 6]            -- int   how many limits follow
  local first_limit, last_limit = operation + 6, operations[position + 1] - 10
  local passes, stale = true, false
  for limit = first_limit, last_limit, 10 do
    local window_field    = ARGV[limit + 1]            -- str   the field of its window
    local amount          = ARGV[limit + 3]            -- int   how much the call takes, in the limit's unit
    local quota           = ARGV[limit + 4]            -- int   how much may count at any time, in that unit
    local oversize        = ARGV[limit + 5]            -- str   an amount above the quota: admit (when idle) or reject
    local span_ms         = ARGV[limit + 6]            -- ms    length of a sliding window; else 0
    local period_start_ms = ARGV[limit + 8]            -- ms    first moment of a calendar period; else 0
    if period_start_ms ~= '0' and (now_ms < period_start_ms + 0 or now_ms >= ARGV[limit + 9] + 0) then stale = true end
    local window = window_at(window_field, span_ms + 0)
    if verdict_of(window, amount + 0, quota + 0, oversize) ~= 'passes' then passes = false end
  end
  local present = read(reservation)
  local reply = present and known(present, digest)
  if not reply and passes and not stale then
    local expires_at_ms = now_ms + lease_ms
    local expires_at = format('%d', expires_at_ms)
    local record = format('%d ', now_ms) .. expires_at .. ' 0 ' .. digest .. '\n' .. call_facts .. '\n' .. estimate
    for limit = first_limit, last_limit, 10 do
      local unit       = ARGV[limit + 2]               -- str   what the limit counts
      local window, amount = windows[ARGV[limit + 1]], ARGV[limit + 3]
      local hold_time, settle_time = times_of(limit, expires_at_ms)
      charge(window, hold_time, 0, amount + 0)
      record = record .. '\n' .. window.field .. ' ' .. unit .. ' ' .. amount .. ' ' .. hold_time .. ' ' .. settle_time
        .. ' ' .. ARGV[limit + 6]
    end
    write(reservation, record)
    new_leases[#new_leases + 1] = expires_at
    new_leases[#new_leases + 1] = reservation
    reply = {'reserved', now_ms, now_ms, expires_at_ms, 0, nil, nil, nil, nil, nil, nil, nil, nil}
  end
  if not reply then
    reply = stale and {'stale_period', now_ms} or deny(first_limit, last_limit)
  elseif stale and reply[1] == 'open' then
    reply = {'stale_period', now_ms}
  elseif reply[1] == 'open' or reply[1] == 'reserved' then
    for limit = first_limit, last_limit, 10 do describe(windows[ARGV[limit + 1]], reply) end
  end
  replies[position] = reply
end
if #new_leases > 0 then call('ZADD', leases_key, unpack(new_leases)) end  -- one without a reservation harms nobody
write_windows()
commit(following)
return replies
