-- record.lua: write an entry that had no reservation: usage, charged to its limits as of now, or a correction (which
-- names no limits).
--
-- Statuses by precedence: open (a reservation has this id), conflict, repeated (the same call again), stale_period,
-- recorded. Replies: {status, now, …}
--   recorded, repeated: kind, number, reserved_at, booked_at        conflict: kind, outcome
-- flags: allow-oom

-- @include shard
-- @include window
-- @include limit
-- @include charge_now
-- @include ledger
-- @include reservation
-- @include expire

local operations, fields, at = {}, {'head', 'pending'}, OPERATIONS
while at < #ARGV do
  operations[#operations + 1] = at
  fields[#fields + 1] = ARGV[at + 1]
  at = at + 6 + 10 * ARGV[at + 6]
end
operations[#operations + 1] = at
local failure, following = open(fields), nil
if failure then return failure end
sweep(sweep_max)
local replies = {}
for position = 1, #operations - 1 do
  local operation   = operations[position]
  local field       = ARGV[operation + 1]  -- str   the field that remembers the id
  local kind        = ARGV[operation + 2]  -- str   recorded or adjusted
  local digest      = ARGV[operation + 3]  -- hex   of the payload: the same id with another one is a conflict
  local call_facts  = ARGV[operation + 4]  -- json  tenant, attributes, funding; nobody looks inside here
  local outcome     = ARGV[operation + 5]  -- json  usage and its quality; likewise
  local limit_count = ARGV[operation + 6]  -- int   how many limits follow
  local first_limit, last_limit = operation + 6, operations[position + 1] - 10
  local reservation, past = reservation_at(field)
  if reservation then
    replies[position] = {'open', now_ms}
  elseif past and past.digest == digest then
    replies[position] = {'repeated', now_ms, past.kind, tonumber(past.number), 0, tonumber(past.booked_at)}
  elseif past then
    replies[position] = {'conflict', now_ms, past.kind, entry_at(past.number).outcome or ''}
  elseif stale(first_limit, last_limit) then
    replies[position] = {'stale_period', now_ms}
  else
    charge_now(first_limit, last_limit)
    local entry_number = append(kind, '', id_of(field), '0', call_facts, '', outcome, digest)
    finish(field, ended_record_of(kind, entry_number, '0', digest))
    replies[position] = {'recorded', now_ms, kind, number, 0, now_ms}
  end
end
write_windows()
following, failure = follow()
if failure then return failure end
commit(following)
return replies
