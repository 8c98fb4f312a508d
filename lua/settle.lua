-- settle.lua: replace holds by what was really used and append the ledger entries, in one step, exactly once.
--
-- Usage is a fact: it is never refused for being late, larger than reserved, or unknown. Statuses by precedence:
-- conflict, repeated (the same settle again), unknown (when asked), stale_period, settled. Replies: {status, now, …}
--   settled, repeated: kind, number, reserved_at, booked_at, after, call, estimate        conflict: kind, outcome
-- flags: allow-oom

-- @include shard
-- @include window
-- @include windows
-- @include limit
-- @include times
-- @include reservation
-- @include ledger
-- @include expire

local OPERATION = '>sssssdd'            -- then so many units and limits
--   field        str   the field of the reservation's record
--   digest       hex   of the outcome: another outcome is a conflict
--   outcome      json  usage and its quality; nobody looks inside here
--   call_facts   json  who called, should the reservation be unknown
--   if_unknown   str   what to do then: ask, or write (and charge the limits)
--   unit_count   int   how many units follow, with what was used of each
--   limit_count  int   how many limits follow them, for write

local UNIT = '>sd'
--   unit         str   what is counted
--   amount       int   how much of it was used

local BOOKED = '>ssdsdddsss'           -- the answer's format, its status, now, and what the reply has (see above)

for position = 2, #ARGV do
  fields[position + 1] = from_bytes('>s', ARGV[position])
end
local writes, following = true, nil
-- @include open
-- @include overdue
for position = 2, #ARGV do
  local operation = ARGV[position]
  local field, digest, outcome, call_facts, if_unknown, unit_count, limit_count, at = from_bytes(OPERATION, operation)
  local used = {}
  for _ = 1, unit_count do
    local unit, amount, next_at = from_bytes(UNIT, operation, at)
    used[unit], at = amount, next_at
  end
  local reservation, past = reservation_at(field)
  local kind, after, reply = nil, '', nil
  if reservation then
    -- Each hold gives way to what was used; of a unit that is not told, what was held counts as used.
    kind = 'settled'
    local hold_at, window_field, unit, held, hold_ms, settle_ms = reservation.holds_at, nil, nil, nil, nil, nil
    for _ = 1, reservation.hold_count do
      hold_at, window_field, unit, held, hold_ms, settle_ms = hold_of(reservation, hold_at)
      if hold_ms == settle_ms then
        charge(window_field, settle_ms, used[unit] or held, -held)
      else
        charge(window_field, hold_ms, 0, -held)
        if settle_ms > 0 then charge(window_field, settle_ms, used[unit] or held, 0) end
      end
    end
  elseif past and past.digest ~= '' then
    -- @include entry
    if past.digest ~= digest then
      reply = to_bytes('>ssdss', 'sdss', 'conflict', now_ms, past.kind, entry.outcome or '')
    else
      reply = to_bytes(BOOKED, sub(BOOKED, 3), 'repeated', now_ms, past.kind, past.number, past.reserved_at,
        past.booked_at, entry.after or '', entry.call or '', entry.estimate or '')
    end
  elseif past and past.reservation then
    -- What ended without being settled turns out to have used something; what it left in the windows is made up to
    -- that. A cancelled one left nothing, an expired one what stood where it would have been settled.
    kind, after, reservation = 'late', past.kind, past.reservation
    local hold_at, window_field, unit, held, hold_ms, settle_ms = reservation.holds_at, nil, nil, nil, nil, nil
    for _ = 1, reservation.hold_count do
      hold_at, window_field, unit, held, hold_ms, settle_ms = hold_of(reservation, hold_at)
      local left = after == 'expired' and hold_ms == settle_ms and held or 0
      if settle_ms > 0 then charge(window_field, settle_ms, (used[unit] or left) - left, 0) end
    end
  elseif if_unknown == 'ask' then
    reply = to_bytes('>ssd', 'sd', 'unknown', now_ms)
  else
    -- @include charge_now
    kind, after = 'late', past and past.kind or 'unknown'
    reservation = {reserved_at = 0, call_facts = call_facts, estimate = ''}
    if stale then reply = to_bytes('>ssd', 'sd', 'stale_period', now_ms) end
  end
  if not reply then
    append(kind, after, id_of(field), reservation.reserved_at, reservation.call_facts, reservation.estimate, outcome,
      digest)
    finish(field, ended_record_of(kind, number, reservation.reserved_at, digest))
    reply = to_bytes(BOOKED, sub(BOOKED, 3), 'settled', now_ms, kind, number, reservation.reserved_at, now_ms, after,
      reservation.call_facts, reservation.estimate)
  end
  replies[position - 1] = reply
end
-- @include books
-- @include commit
-- @include answer
