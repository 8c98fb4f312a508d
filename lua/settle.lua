-- settle.lua: replace holds by what was really used and append the ledger entries, in one step, exactly once.
--
-- Usage is a fact: it is never refused for being late, larger than reserved, or unknown. Statuses by precedence:
-- conflict, repeated (the same settle again), unknown (when asked), stale_period, settled. Replies: {status, now, …}
--   settled, repeated: kind, number, reserved_at, booked_at, after, call, estimate        conflict: kind, outcome
-- flags: allow-oom

-- @include shard
-- @include window
-- @include limit
-- @include charge_now
-- @include ledger
-- @include reservation
-- @include expire

-- Each hold gives way to what was used; of a unit that is not told, what was held counts as used.
local function settle_holds(holds, used)
  for _, hold in ipairs(holds) do
    local window, amount = window_at(hold.window, hold.span_ms), used[hold.unit] or hold.amount
    if hold.hold_time == hold.settle_time then
      charge(window, hold.settle_time, amount, -hold.amount)
    else
      charge(window, hold.hold_time, 0, -hold.amount)
      if hold.settle_time ~= '0' then charge(window, hold.settle_time, amount, 0) end
    end
  end
end

-- What ended without being settled turns out to have used something; what it left in the windows is made up to that.
local function correct_holds(holds, used)
  for _, hold in ipairs(holds) do
    if hold.settle_time ~= '0' then
      local more = (used[hold.unit] or hold.amount) - hold.amount
      charge(window_at(hold.window, hold.span_ms), hold.settle_time, more, 0)
    end
  end
end

local operations, fields, at = {}, {'head', 'pending'}, OPERATIONS
while at < #ARGV do
  operations[#operations + 1] = at
  fields[#fields + 1] = ARGV[at + 1]
  at = at + 8 + 2 * ARGV[at + 7] + 10 * ARGV[at + 8]
end
operations[#operations + 1] = at
local failure, following = open(fields), nil
if failure then return failure end
sweep(sweep_max)
local replies = {}
for position = 1, #operations - 1 do
  local operation    = operations[position]
  local field        = ARGV[operation + 1]            -- str   the field of the reservation's record
  local digest       = ARGV[operation + 2]            -- hex   of the outcome: another outcome is a conflict
  local outcome      = ARGV[operation + 3]            -- json  usage and its quality; nobody looks inside here
  local call_facts   = ARGV[operation + 4]            -- json  who called, should the reservation be unknown
  local if_unknown   = ARGV[operation + 5]            -- str   what to do then: ask, or write (and charge the limits)
  local echo         = ARGV[operation + 6]            -- str   yes: the caller wants the reservation's call and estimate
  local unit_count   = tonumber(ARGV[operation + 7])  -- int   how many units follow, with what was used of each
  local limit_count  = ARGV[operation + 8]            -- int   how many limits follow them, for write
  local used, first_limit, last_limit = {}, operation + 8 + 2 * unit_count, operations[position + 1] - 10
  for unit = operation + 8, first_limit - 2, 2 do
    used[ARGV[unit + 1]] = tonumber(ARGV[unit + 2])
  end
  local reservation, past = reservation_at(field)
  local kind, after, reply = nil, '', nil
  if reservation then
    kind = 'settled'
    settle_holds(reservation.holds, used)
  elseif past and past.digest ~= '' then
    local entry = entry_at(past.number)
    if past.digest ~= digest then
      reply = {'conflict', now_ms, past.kind, entry.outcome or ''}
    else
      reply = {'repeated', now_ms, past.kind, tonumber(past.number), tonumber(past.reserved_at),
        tonumber(past.booked_at), entry.after or '', entry.call or '', entry.estimate or ''}
    end
  elseif past and past.reservation then
    kind, after, reservation = 'late', past.kind, past.reservation
    correct_holds(reservation.holds, used)
  elseif if_unknown == 'ask' then
    reply = {'unknown', now_ms}
  elseif stale(first_limit, last_limit) then
    reply = {'stale_period', now_ms}
  else
    kind, after = 'late', past and past.kind or 'unknown'
    reservation = {reserved_at = '0', call_facts = call_facts, estimate = ''}
    charge_now(first_limit, last_limit)
  end
  if not reply then
    local entry_number = append(kind, after, id_of(field), reservation.reserved_at, reservation.call_facts,
      reservation.estimate, outcome, digest)
    finish(field, ended_record_of(kind, entry_number, reservation.reserved_at, digest))
    reply = {'settled', now_ms, kind, number, tonumber(reservation.reserved_at), now_ms, after}
    if echo == 'yes' then reply[8], reply[9] = reservation.call_facts, reservation.estimate end
  end
  replies[position] = reply
end
write_windows()
following, failure = follow()
if failure then return failure end
commit(following)
return replies
