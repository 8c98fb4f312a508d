-- windows: those in use, and what is done with them.

local windows = {}                      -- in use, by field

local logs
local function in_log()
  if not logs then
    -- @include log
    logs = {log_of = log_of, falls_to = falls_to, slide = slide, amounts_at = amounts_at, rewrite = rewrite}
  end
  return logs
end

-- The window of a field as it stands now.
local function window_at(field, span_ms)
  local window = windows[field]
  if window then return window end
  local text = state[field]
  if text == nil then
    text = call('HGET', state_key, field)
    state[field] = text
  end
  local _, settled, held, first_ms, last_ms, last_settled, last_held = 0, 0, 0, 0, 0, 0, 0
  if text then _, settled, held, first_ms, last_ms, last_settled, last_held = from_bytes(WINDOW, text) end
  if not (settled + held < 2 ^ 53) then error('a window that is none') end
  window = {span_ms = span_ms, settled = settled, held = held, first_ms = first_ms, last_ms = last_ms,
    last_settled = last_settled, last_held = last_held, changed = false}  -- eight: one more would double the table
  if last_ms > 0 and first_ms + span_ms <= now_ms then in_log().slide(field, window) end
  windows[field] = window
  return window
end

-- Adds to what is settled and held at a time. A time that has slid out is left alone; nothing falls below zero, nor
-- rises to 2^53, where numbers cease to be exact.
local function charge(field, time, settled, held)
  local window = windows[field]
  if time + window.span_ms <= now_ms then return end
  local last_ms, old_settled, old_held = window.last_ms, 0, 0
  if time == last_ms then
    old_settled, old_held = window.last_settled, window.last_held
  elseif time < last_ms then
    old_settled, old_held = in_log().amounts_at(field, window, time)
  end
  if held < -old_held then held = -old_held end
  if settled < -old_settled then settled = -old_settled end
  local all_settled, all_held = window.settled, window.held
  local room = 9007199254740991 - all_settled - all_held
  if held > room then held = room end
  if settled > room - held then settled = room - held end
  window.settled, window.held, window.changed = all_settled + settled, all_held + held, true
  settled, held = old_settled + settled, old_held + held
  local empty = settled + held == 0
  if not empty and (time == last_ms or last_ms == 0) then
    window.last_ms, window.last_settled, window.last_held = time, settled, held
    if last_ms == 0 then window.first_ms = time end
  elseif not empty or time <= last_ms then
    in_log().rewrite(field, window, time, settled, held)
  end
end

-- Four numbers: settled, held, when something goes, when all is gone (0: there is nothing).
local function describe(window)
  local last_ms, span_ms = window.last_ms, window.span_ms
  if last_ms == 0 then return to_bytes('>dddd', 0, 0, 0, 0) end
  return to_bytes('>dddd', window.settled, window.held, window.first_ms + span_ms, last_ms + span_ms)
end
