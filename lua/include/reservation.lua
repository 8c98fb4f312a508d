-- reservation: the record of one, while it is open and after.

local OPEN = '>sdddd'
--   the word open; when it was made and when its lease ends; how often it was revised; and, from here as reserve was
--   told: how many limits it holds, then these, then the payload

local ENDED = '>sddds'
--   how it ended; number of its ledger entry; when it was made, and when it ended; the digest of what was settled.
--   What ended without being settled keeps the open record behind that: late usage can still be put in its place.

-- The record of a reservation as it was read, or as it shall be.
local function record_at(field)
  local record = state[field]
  if record == nil then
    record = call('HGET', state_key, field)
    state[field] = record
  end
  return record
end

local function reservation_of(record)
  local _, reserved_at, expires_at, revision, hold_count, holds_at = from_bytes(OPEN, record)
  if hold_count * 8 > #record then error('a record that holds more than it can') end  -- no loop without end
  local payload_at = holds_at
  for _ = 1, hold_count do payload_at = payload_at + from_bytes('>d', record, payload_at) end
  local digest, call_facts, estimate = from_bytes(PAYLOAD, record, payload_at)
  return {reserved_at = reserved_at, expires_at = expires_at, revision = revision, digest = digest,
    call_facts = call_facts, estimate = estimate, hold_count = hold_count, record = record, holds_at = holds_at,
    payload_at = payload_at}
end

local function record_of(reservation)
  return to_bytes(OPEN, 'open', reservation.reserved_at, reservation.expires_at, reservation.revision,
    reservation.hold_count) .. sub(reservation.record, reservation.holds_at, reservation.payload_at - 1)
    .. to_bytes(PAYLOAD, reservation.digest, reservation.call_facts, reservation.estimate)
end

-- The hold that begins somewhere in a reservation's record: where the next one begins, the field of its window (which
-- is at hand from then on), unit and amount, the times at which it stands and at which it is settled.
local function hold_of(reservation, at)
  local limit_size, window_field, unit, amount, _, _, span_ms, sub_window_ms, _, period_end_ms, on_expiry =
    from_bytes(LIMIT, reservation.record, at)
  local hold_ms, settle_ms = times_of(sub_window_ms, period_end_ms, on_expiry, reservation.reserved_at,
    reservation.expires_at)
  window_at(window_field, span_ms)
  return at + limit_size, window_field, unit, amount, hold_ms, settle_ms
end

local function ended_record_of(kind, entry_number, reserved_at, digest, reservation)
  local record = to_bytes(ENDED, kind, entry_number, reserved_at, now_ms, digest)
  return reservation and record .. record_of(reservation) or record
end

-- How a reservation ended; nil if it is open.
local function end_of(record)
  local kind, entry_number, reserved_at, booked_at, digest, at = from_bytes(ENDED, record)
  if kind == 'open' then return nil end
  return {kind = kind, number = entry_number, reserved_at = reserved_at, booked_at = booked_at, digest = digest,
    reservation = at <= #record and reservation_of(sub(record, at)) or nil}
end

local function id_of(field)
  return string.match(field, '[^/]*$')
end
