-- record.lua: write an entry that had no reservation: usage, charged to its limits as of now, or a correction (which
-- names no limits).
--
-- Statuses by precedence: open (a reservation has this id), conflict, repeated (the same call again), stale_period,
-- recorded. Replies: {status, now, …}
--   recorded, repeated: kind, number, reserved_at, booked_at        conflict: kind, outcome
-- flags: allow-oom

-- @include shard
-- @include window
-- @include windows
-- @include limit
-- @include times
-- @include reservation
-- @include ledger
-- @include expire

local OPERATION = '>sssssd'             -- then so many limits
--   field        str   the field that remembers the id
--   kind         str   recorded or adjusted
--   digest       hex   of the payload: the same id with another one is a conflict
--   call_facts   json  tenant, attributes, funding; nobody looks inside here
--   outcome      json  usage and its quality; likewise
--   limit_count  int   how many limits follow

for position = 2, #ARGV do
  fields[position + 1] = from_bytes('>s', ARGV[position])
end
local writes, following = true, nil
-- @include open
-- @include overdue
for position = 2, #ARGV do
  local operation = ARGV[position]
  local field, kind, digest, call_facts, outcome, limit_count, at = from_bytes(OPERATION, operation)
  local reservation, past = reservation_at(field)
  local reply
  if reservation then
    reply = to_bytes('>ssd', 'sd', 'open', now_ms)
  elseif past and past.digest == digest then
    reply = to_bytes('>ssdsddd', 'sdsddd', 'repeated', now_ms, past.kind, past.number, 0, past.booked_at)
  elseif past then
    -- @include entry
    reply = to_bytes('>ssdss', 'sdss', 'conflict', now_ms, past.kind, entry.outcome or '')
  else
    -- @include charge_now
    if stale then
      reply = to_bytes('>ssd', 'sd', 'stale_period', now_ms)
    else
      append(kind, '', id_of(field), 0, call_facts, '', outcome, digest)
      finish(field, ended_record_of(kind, number, 0, digest))
      reply = to_bytes('>ssdsddd', 'sdsddd', 'recorded', now_ms, kind, number, 0, now_ms)
    end
  end
  replies[position - 1] = reply
end
-- @include books
-- @include commit
-- @include answer
