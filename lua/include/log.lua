-- log: the entries of a window before its last one. Made when first needed: most calls find what they charge last.

local ENTRY, ENTRY_SIZE = '>ddd', 24    -- time, settled, held
local sub, floor = string.sub, math.floor

local function log_of(field, window)
  if window.first_ms == window.last_ms then return '' end
  if window.new_log then return window.new_log end
  local log_field = 'l' .. sub(field, 2)
  if state[log_field] == nil then state[log_field] = call('HGET', state_key, log_field) end
  return state[log_field] or ''
end

-- Takes out what has slid out.
local function slide(field, window)
  local gone_ms, log, at, had_log = now_ms - window.span_ms, '', 1, window.first_ms < window.last_ms
  if window.last_ms <= gone_ms then
    window.settled, window.held, window.last_ms, window.last_settled, window.last_held = 0, 0, 0, 0, 0
  else
    log = log_of(field, window)
  end
  window.first_ms = window.last_ms
  while at < #log do
    local time, settled, held = from_bytes(ENTRY, log, at)
    if time > gone_ms then
      window.first_ms = time
      break
    end
    window.settled, window.held, at = window.settled - settled, window.held - held, at + ENTRY_SIZE
  end
  if had_log then window.new_log = sub(log, at) end
end

-- Where in a log the entry of a time is, or has to be, and how many bytes it takes there.
local function place_of(log, time)
  local low, high = 0, #log / ENTRY_SIZE
  while low < high do
    local middle = floor((low + high) / 2)
    if from_bytes('>d', log, middle * ENTRY_SIZE + 1) < time then low = middle + 1 else high = middle end
  end
  local at = low * ENTRY_SIZE + 1
  return at, at < #log and from_bytes('>d', log, at) == time and ENTRY_SIZE or 0
end

-- What is settled and held at a time before the last entry's.
local function amounts_at(field, window, time)
  local log, _, settled, held = log_of(field, window), nil, 0, 0
  local at, size = place_of(log, time)
  if size > 0 then _, settled, held = from_bytes(ENTRY, log, at) end
  return settled, held
end

-- Puts amounts where they change the log: at an earlier time, behind the last entry, or none in place of that.
local function rewrite(field, window, time, settled, held)
  local log, last_ms, entry = log_of(field, window), window.last_ms, ''
  local had_log = log ~= ''
  if settled + held > 0 then entry = to_bytes(ENTRY, time, settled, held) end
  if time < last_ms then
    local at, size = place_of(log, time)
    log = sub(log, 1, at - 1) .. entry .. sub(log, at + size)
  else
    if time > last_ms and last_ms > 0 then
      log = log .. to_bytes(ENTRY, last_ms, window.last_settled, window.last_held)
    elseif entry == '' then
      entry, log = sub(log, -ENTRY_SIZE), sub(log, 1, -ENTRY_SIZE - 1)
    end
    window.last_ms, window.last_settled, window.last_held = 0, 0, 0
    if entry ~= '' then window.last_ms, window.last_settled, window.last_held = from_bytes(ENTRY, entry) end
  end
  window.first_ms = log ~= '' and from_bytes('>d', log) or window.last_ms
  if had_log or log ~= '' then window.new_log = log end
end

-- When a window that is above a level will be down to it, if nobody adds to it.
local function falls_to(field, window, level)
  local used, log, at = window.settled + window.held, log_of(field, window), 1
  while at < #log do
    local time, settled, held = from_bytes(ENTRY, log, at)
    used, at = used - settled - held, at + ENTRY_SIZE
    if used <= level then return time + window.span_ms end
  end
  return window.last_ms + window.span_ms
end
