-- window: a log of amounts, oldest first, and its totals; an entry counts until `span_ms` after its own time.
--
-- Sliding windows, calendar periods and open reservations differ only in the time their entries bear: the last ms of a
-- sub-window, the end of the period, the end of the lease. Text of fixed width, so that an entry is found, compared and
-- replaced without reading the others: a head (when the last entry goes, settled total, held total), then the entries
-- (time, settled, held), in 13, 16 and 16 digits. Times are handed around as those 13 digits.

local windows = {}                      -- in use, in order and by field

-- The window of a field as it stands now: what has slid out is gone from it.
local function window_at(field, span_ms)
  local window = windows[field]
  if window then return window end
  local text = state[field]
  if text == nil then text = read(field) end
  local settled, held, log = 0, 0, ''
  if text then
    settled, held = tonumber(sub(text, 14, 29)), tonumber(sub(text, 30, 45))
    local at, size = 46, #text
    while at <= size and sub(text, at, at + 12) + span_ms <= now_ms do
      settled, held = settled - sub(text, at + 13, at + 28), held - sub(text, at + 29, at + 44)
      at = at + 45
    end
    log = sub(text, at)
  end
  window = {field = field, span_ms = span_ms, settled = settled, held = held, log = log}
  windows[field] = window
  windows[#windows + 1] = window
  return window
end

-- Adds to what is settled and held at a time. A time that has slid out is left alone; nothing falls below zero, nor
-- rises to 2^53, where numbers cease to be exact.
local function charge(window, time, settled, held)
  if time + window.span_ms <= now_ms then return end
  local log = window.log
  local from, to = #log - 44, #log                       -- most often it is the last entry, or a new last one
  local last = sub(log, from, from + 12)
  if last < time then
    from = to + 1
  elseif last > time then
    local low, high = 0, to / 45
    while low < high do
      local middle = floor((low + high) / 2)
      if sub(log, middle * 45 + 1, middle * 45 + 13) < time then low = middle + 1 else high = middle end
    end
    from = low * 45 + 1
    to = sub(log, from, from + 12) == time and from + 44 or from - 1
  end
  local old_settled, old_held = 0, 0
  if from < to then
    old_settled, old_held = tonumber(sub(log, from + 13, from + 28)), tonumber(sub(log, from + 29, to))
  end
  if held < -old_held then held = -old_held end
  if settled < -old_settled then settled = -old_settled end
  local room = 9007199254740991 - window.settled - window.held
  if held > room then held = room end
  if settled > room - held then settled = room - held end
  local at_settled, at_held = old_settled + settled, old_held + held
  local entry = ''
  if at_settled > 0 or at_held > 0 then entry = time .. format('%016d%016d', at_settled, at_held) end
  window.log = sub(log, 1, from - 1) .. entry .. sub(log, to + 1)
  window.settled, window.held, window.changed = window.settled + settled, window.held + held, true
end

-- Four numbers: settled, held, when something goes, when all is gone (0: there is nothing).
local function describe(window, reply)
  local size, log = #reply, window.log
  reply[size + 1], reply[size + 2], reply[size + 3], reply[size + 4] = window.settled, window.held, 0, 0
  if log ~= '' then
    reply[size + 3], reply[size + 4] = sub(log, 1, 13) + window.span_ms, sub(log, -45, -33) + window.span_ms
  end
end

local function write_windows()
  for _, window in ipairs(windows) do
    if window.changed then
      local log, gone_ms = window.log, 0
      if log ~= '' then gone_ms = sub(log, -45, -33) + window.span_ms end
      write(window.field, format('%013d%016d%016d', gone_ms, window.settled, window.held) .. log)
    end
  end
end
