-- revise.lua: hold a better estimate in place of the old one, or prolong a lease, while the call runs.
--
-- What is known of a running call is never refused: a larger estimate may exceed a quota. Revisions are numbered by the
-- caller, so that one which was delayed cannot undo a later one; number 0 takes the next.
-- Statuses by precedence: absent, ended, repeated (that revision, or a later one, is in place), revised.
-- Replies: {status, now, …}        ended: kind        revised, repeated: reserved_at, expires_at, revision
-- flags: allow-oom

-- @include shard
-- @include window
-- @include windows
-- @include limit
-- @include times
-- @include reservation
-- @include ledger
-- @include expire

local OPERATION = '>sdddsd'             -- then so many units
--   field        str   the field of the reservation's record
--   revision     int   the caller's number of this revision; 0: the next
--   lease_ms     ms    prolongs the lease to so much from now; 0: leaves it
--   longest_ms   ms    how long a reservation may stay open altogether
--   estimate     json  the usage expected now; empty: as before
--   unit_count   int   how many units follow, with what is expected of each

local UNIT = '>sd'
--   unit         str   what is counted
--   amount       int   how much of it is expected

-- Holds of the units told are held at their new amount, in the place of the old one.
local function hold_instead(reservation, amounts)
  local at, next_at, window_field, unit, held, hold_ms = reservation.holds_at, nil, nil, nil, nil, nil
  for _ = 1, reservation.hold_count do
    next_at, window_field, unit, held, hold_ms = hold_of(reservation, at)
    local amount = amounts[unit]
    if amount then
      local record, amount_at = reservation.record, at + 8 + #window_field + 1 + #unit + 1
      charge(window_field, hold_ms, 0, amount - held)
      reservation.record = sub(record, 1, amount_at - 1) .. to_bytes('>d', amount) .. sub(record, amount_at + 8)
    end
    at = next_at
  end
end

-- A lease only ever gets longer. Holds that stand at its end move along.
local function prolong(reservation, expires_at)
  local at, window_field, _, held, hold_ms, settle_ms = reservation.holds_at, nil, nil, nil, nil, nil
  for _ = 1, reservation.hold_count do
    at, window_field, _, held, hold_ms, settle_ms = hold_of(reservation, at)
    if hold_ms ~= settle_ms then
      charge(window_field, hold_ms, 0, -held)
      charge(window_field, settle_ms > 0 and math.min(expires_at, settle_ms) or expires_at, 0, held)
    end
  end
  reservation.expires_at = expires_at
end

for position = 2, #ARGV do
  fields[position + 1] = from_bytes('>s', ARGV[position])
end
local writes, following = true, nil
-- @include open
-- @include overdue
for position = 2, #ARGV do
  local operation = ARGV[position]
  local field, revision, lease_ms, longest_ms, estimate, unit_count, at = from_bytes(OPERATION, operation)
  local amounts = {}
  for _ = 1, unit_count do
    local unit, amount, next_at = from_bytes(UNIT, operation, at)
    amounts[unit], at = amount, next_at
  end
  local reservation, past = reservation_at(field)
  local reply
  if past then
    reply = to_bytes('>ssds', 'sds', 'ended', now_ms, past.kind)
  elseif not reservation then
    reply = to_bytes('>ssd', 'sd', 'absent', now_ms)
  else
    local status = 'repeated'
    if revision == 0 or revision > reservation.revision then
      status = 'revised'
      reservation.revision = revision == 0 and reservation.revision + 1 or revision
      hold_instead(reservation, amounts)
      if estimate ~= '' then reservation.estimate = estimate end
      local expires_at = math.min(now_ms + lease_ms, reservation.reserved_at + longest_ms)
      if lease_ms > 0 and expires_at > reservation.expires_at then
        prolong(reservation, expires_at)
        lease(field, expires_at)
      end
      local revised = record_of(reservation)
      state[field], words[#words + 1], words[#words + 2] = revised, field, revised
    end
    reply = to_bytes('>ssdddd', 'sd*', status, now_ms, reservation.reserved_at, reservation.expires_at,
      reservation.revision)
  end
  replies[position - 1] = reply
end
-- @include books
-- @include commit
-- @include answer
