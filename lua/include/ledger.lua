-- ledger: the entries this call appends, the reservations it ends, and their leases; written at the end (see books).

local entries, ended, leases, released = {nil}, {nil}, {nil, nil}, {nil}
local format = string.format

local function append(kind, after, id, reserved_at, call_facts, estimate, outcome, digest)
  number = number + 1
  entries[#entries + 1] = {'XADD', ledger_key, format('%d-0', number), 'kind', kind, 'after', after, 'id', id,
    'reserved_at', format('%d', reserved_at), 'booked_at', format('%d', now_ms), 'call', call_facts,
    'estimate', estimate, 'outcome', outcome, 'digest', digest, 'epoch', format('%013d', epoch)}
end

-- The record says from now on how the reservation ended.
local function finish(field, record)
  state[field], words[#words + 1], words[#words + 2] = record, field, record
  ended[#ended + 1] = format('%d ', now_ms) .. field
  released[#released + 1] = field
  if ended_ms > now_ms then ended_ms = now_ms end
end

local function lease(field, expires_at)
  leases[#leases + 1], leases[#leases + 2] = expires_at, field
  if due_ms > expires_at then due_ms = expires_at end
end
