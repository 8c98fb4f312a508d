-- known: the answer to a reserve whose id is known: it ended, or is open with another payload. There is none yet for
-- one that is open with this payload: its limits are to be described.

-- @include reservation
local past = end_of(record)
local present = not past and reservation_of(record)
if past or present.expires_at <= now_ms then
  reply = to_bytes('>ssds', 'sds', 'ended', now_ms, past and past.kind or 'expired')
elseif from_bytes('>s', operation, payload_at) ~= present.digest then
  reply = to_bytes('>ssdss', 'sdss', 'conflict', now_ms, present.call_facts, present.estimate)
else
  status, reserved_at, expires_at, revision = 'open', present.reserved_at, present.expires_at, present.revision
end
