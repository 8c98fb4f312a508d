-- window: a log of amounts, oldest first, and its totals; an entry counts until `span_ms` after its own time.
--
-- Sliding windows, calendar periods and open reservations differ only in the time their entries bear: the last ms of a
-- sub-window, the end of the period, the end of the lease. Text of fixed width, so that an entry is found, compared and
-- replaced without reading the others: a head (when the last entry goes, settled total, held total), then the entries
-- (time, settled, held), in 13, 16 and 16 digits. Times are handed around as those 13 digits.
--
-- Every piece cut from a long text is a copy, and hashed. So a window's text stays as it was read, with the log from
-- its 46th character up to `to`; only the last entry, where nearly everything is charged, is kept apart.

local windows = {nil, nil, nil, nil}    -- in use, in order and by field (with room for some)

-- The window of a field as it stands now: what has slid out is gone from it.
local function window_at(field, span_ms)
  local window = windows[field]
  if window then return window end
  local text = state[field]
  if text == nil then text = read(field) end
  local settled, held, to, last = 0, 0, 45, ''
  if text then
    settled, held = sub(text, 14, 29) + 0, sub(text, 30, 45) + 0
    local at, size = 46, #text
    while at <= size and sub(text, at, at + 12) + span_ms <= now_ms do
      settled, held = settled - sub(text, at + 13, at + 28), held - sub(text, at + 29, at + 44)
      at = at + 45
    end
    if at > 46 then text = sub(text, at - 45) end        -- anything may stand where the head was
    if at <= size then to, last = #text - 45, sub(text, -45) end
  else
    text = string.rep('0', 45)
  end
  window = {field = field, span_ms = span_ms, settled = settled, held = held, text = text, to = to, last = last,
    changed = false}
  windows[field] = window
  windows[#windows + 1] = window
  return window
end

-- Puts the last entry back into the text, so that a later one can take its place.
local function keep_last(window)
  local text, to, last = window.text, window.to, window.last
  if last == '' then return end
  if sub(text, to + 1, to + 45) ~= last then window.text = sub(text, 1, to) .. last end
  window.to = to + 45
end

-- Where in the text the entry of an earlier time is, or has to be: its first and last character.
local function place_of(window, time)
  local text, low, high = window.text, 1, window.to / 45
  while low < high do
    local middle = floor((low + high) / 2)
    if sub(text, middle * 45 + 1, middle * 45 + 13) < time then low = middle + 1 else high = middle end
  end
  local from = low * 45 + 1
  return from, from < window.to and sub(text, from, from + 12) == time and from + 44 or from - 1
end

-- Puts an entry, or nothing, in place of the text from one character to another.
local function replace(window, from, to, entry)
  window.text = sub(window.text, 1, from - 1) .. entry .. sub(window.text, to + 1, window.to)
  window.to = #window.text
end

-- Adds to what is settled and held at a time. A time that has slid out is left alone; nothing falls below zero, nor
-- rises to 2^53, where numbers cease to be exact.
local function charge(window, time, settled, held)
  if time + window.span_ms <= now_ms then return end
  local old, last_time, from, to = '', sub(window.last, 1, 13), nil, nil
  if time == last_time then
    old = window.last
  elseif time > last_time then
    keep_last(window)
  else
    from, to = place_of(window, time)
    old = sub(window.text, from, to)
  end
  local old_settled, old_held = 0, 0
  if old ~= '' then old_settled, old_held = sub(old, 14, 29) + 0, sub(old, 30) + 0 end
  if held < -old_held then held = -old_held end
  if settled < -old_settled then settled = -old_settled end
  local room = 9007199254740991 - window.settled - window.held
  if held > room then held = room end
  if settled > room - held then settled = room - held end
  local entry = ''
  if old_settled + settled > 0 or old_held + held > 0 then
    entry = format('%s%016d%016d', time, old_settled + settled, old_held + held)
  end
  if from then
    replace(window, from, to, entry)
  elseif entry ~= '' then
    window.last = entry
  elseif window.to > 45 then
    window.to, window.last = window.to - 45, sub(window.text, window.to - 44, window.to)
  else
    window.last = ''
  end
  window.settled, window.held, window.changed = window.settled + settled, window.held + held, true
end

-- Four numbers: settled, held, when something goes, when all is gone (0: there is nothing).
local function describe(window, reply)
  local size, last, frees_at_ms, resets_at_ms = #reply, window.last, 0, 0
  if last ~= '' then
    resets_at_ms = sub(last, 1, 13) + window.span_ms
    frees_at_ms = window.to > 45 and sub(window.text, 46, 58) + window.span_ms or resets_at_ms
  end
  reply[size + 1], reply[size + 2] = window.settled, window.held
  reply[size + 3], reply[size + 4] = frees_at_ms, resets_at_ms
end

local function write_windows()
  for position = 1, #windows do
    local window = windows[position]
    if window.changed then
      local last, gone_ms = window.last, 0
      if last ~= '' then gone_ms = sub(last, 1, 13) + window.span_ms end
      local head = format('%013d%016d%016d', gone_ms, window.settled, window.held)
      write(window.field, head .. sub(window.text, 46, window.to) .. last)
    end
  end
end
