-- revise.lua: hold a better estimate in place of the old one, or prolong a lease, while the call runs.
--
-- What is known of a running call is never refused: a larger estimate may exceed a quota. Revisions are numbered by the
-- caller, so that one which was delayed cannot undo a later one; number 0 takes the next.
-- Statuses by precedence: absent, ended, repeated (that revision, or a later one, is in place), revised.
-- Replies: {status, now, …}        ended: kind        revised, repeated: reserved_at, expires_at, revision
-- flags: allow-oom

-- @include shard
-- @include window
-- @include ledger
-- @include reservation
-- @include expire

-- Holds of the units told are held at their new amount, in the place of the old one.
local function hold_instead(holds, amounts)
  for _, hold in ipairs(holds) do
    local amount = amounts[hold.unit]
    if amount then
      charge(window_at(hold.window, hold.span_ms), hold.hold_time, 0, amount - hold.amount)
      hold.amount = amount
    end
  end
end

-- A lease only ever gets longer. Holds that stand at its end move along.
local function prolong(reservation, expires_at)
  for _, hold in ipairs(reservation.holds) do
    if hold.hold_time ~= hold.settle_time then
      local window = window_at(hold.window, hold.span_ms)
      charge(window, hold.hold_time, 0, -hold.amount)
      if hold.settle_time ~= '0' and hold.settle_time < expires_at then
        hold.hold_time = hold.settle_time
      else
        hold.hold_time = expires_at
      end
      charge(window, hold.hold_time, 0, hold.amount)
    end
  end
  reservation.expires_at = expires_at
end

local operations, fields, at = {}, {'head', 'pending'}, OPERATIONS
while at < #ARGV do
  operations[#operations + 1] = at
  fields[#fields + 1] = ARGV[at + 1]
  at = at + 6 + 2 * ARGV[at + 6]
end
local failure, following = open(fields), nil
if failure then return failure end
sweep(sweep_max)
local replies = {}
for position, operation in ipairs(operations) do
  local field        = ARGV[operation + 1]            -- str   the field of the reservation's record
  local revision     = tonumber(ARGV[operation + 2])  -- int   the caller's number of this revision; 0: the next
  local lease_ms     = tonumber(ARGV[operation + 3])  -- ms    prolongs the lease to so much from now; 0: leaves it
  local longest_ms   = tonumber(ARGV[operation + 4])  -- ms    how long a reservation may stay open altogether
  local estimate     = ARGV[operation + 5]            -- json  the usage expected now; empty: as before
  local unit_count   = tonumber(ARGV[operation + 6])  -- int   how many units follow, with what is expected of each
  local amounts = {}
  for unit = operation + 6, operation + 4 + 2 * unit_count, 2 do
    amounts[ARGV[unit + 1]] = tonumber(ARGV[unit + 2])
  end
  local reservation, past = reservation_at(field)
  if past then
    replies[position] = {'ended', now_ms, past.kind}
  elseif not reservation then
    replies[position] = {'absent', now_ms}
  else
    local status = 'repeated'
    if revision == 0 or revision > reservation.revision then
      status = 'revised'
      reservation.revision = revision == 0 and reservation.revision + 1 or revision
      hold_instead(reservation.holds, amounts)
      if estimate ~= '' then reservation.estimate = estimate end
      local expires_at = format('%013d', math.min(now_ms + lease_ms, reservation.reserved_at + longest_ms))
      if lease_ms > 0 and expires_at > reservation.expires_at then
        prolong(reservation, expires_at)
        leases[#leases + 1], leases[#leases + 2] = expires_at, field
      end
      write(field, record_of(reservation))
    end
    replies[position] = {status, now_ms, tonumber(reservation.reserved_at), tonumber(reservation.expires_at),
      reservation.revision}
  end
end
write_windows()
following, failure = follow()
if failure then return failure end
commit(following)
return replies
