-- reservation: the record of one, while it is open and after.
--
-- Open, in lines: "reserved_at expires_at revision digest", the call, the estimate, then one line per hold:
-- "window unit amount hold_time settle_time span". Ended: "kind number reserved_at booked_at digest"; what ended
-- without being settled keeps the lines of the open record below, so that late usage can still be put in its place.

local function reservation_of(record)
  local reserved_at, expires_at, revision, digest, call_facts, estimate, lines =
    string.match(record, '^([^ ]+) ([^ ]+) ([^ ]+) ([^\n]*)\n([^\n]*)\n([^\n]*)(.*)$')
  local holds = {}
  for window, unit, amount, hold_time, settle_time, span_ms in
      string.gmatch(lines, '\n([^ ]+) ([^ ]+) ([^ ]+) ([^ ]+) ([^ ]+) ([^\n]+)') do
    holds[#holds + 1] = {window = window, unit = unit, amount = amount + 0, hold_time = hold_time,
      settle_time = settle_time, span_ms = span_ms + 0}
  end
  return {reserved_at = reserved_at, expires_at = expires_at, revision = tonumber(revision), digest = digest,
    call_facts = call_facts, estimate = estimate, holds = holds}
end

local function record_of(reservation)
  local lines = {
    reservation.reserved_at .. ' ' .. reservation.expires_at .. format(' %d ', reservation.revision)
      .. reservation.digest,
    reservation.call_facts, reservation.estimate}
  for _, hold in ipairs(reservation.holds) do
    lines[#lines + 1] = hold.window .. ' ' .. hold.unit .. format(' %d ', hold.amount) .. hold.hold_time .. ' '
      .. hold.settle_time .. format(' %d', hold.span_ms)
  end
  return table.concat(lines, '\n')
end

local function ended_record_of(kind, entry_number, reserved_at, digest, reservation)
  local head = kind .. ' ' .. entry_number .. ' ' .. reserved_at .. format(' %d ', now_ms) .. digest
  if not reservation then return head end
  return head .. '\n' .. record_of(reservation)
end

local function end_of(record)
  local kind, entry_number, reserved_at, booked_at, digest, rest =
    string.match(record, '^(%l+) (%d+) (%d+) (%d+) (%S*)\n?(.*)$')
  if not kind then return nil end
  return {kind = kind, number = entry_number, reserved_at = reserved_at, booked_at = booked_at, digest = digest,
    reservation = rest ~= '' and reservation_of(rest) or nil}
end

local function id_of(field)
  return string.match(field, '[^/]*$')
end
