-- look: reads the fields and the clock; a script that writes first finishes what one that failed half way has left.

local values = call('HMGET', state_key, unpack(fields))
local head, pending = values[1], values[2]
if head and sub(head, HEAD_SIZE + 1) ~= layout then
  local found = sub(head, HEAD_SIZE + 1)
  return redis.error_reply('METERLIB_LAYOUT ' .. found .. ' is the layout of the store, not ' .. layout)
end
if pending and writes then
  for line in string.gmatch(pending, '[^\30]+') do
    local command = {}
    for word in string.gmatch(line, '([^\31]*)\31') do command[#command + 1] = word end
    local there = command[1] == 'XADD' and #call('XRANGE', ledger_key, command[3], command[3]) > 0
    if not there then call(unpack(command)) end
  end
  values = call('HMGET', state_key, unpack(fields))
  head = values[1]
end
server_ms = test_now_ms
if server_ms == 0 then
  local time = call('TIME')
  server_ms = time[1] * 1000 + floor(time[2] / 1000)
end
now_ms = server_ms
if head then
  local last_ms, last_server_ms
  last_ms, last_server_ms, number, epoch, due_ms, ended_ms = from_bytes(HEAD, head)
  -- A server clock that was set back must not bring time to a halt until it has caught up (no window would slide), and
  -- time must not go back: it goes on at half speed.
  if server_ms < last_ms then
    set_back = server_ms < last_server_ms
    local step_ms = math.max(0, floor((server_ms - last_server_ms) / 2))
    now_ms = last_ms + step_ms
    server_ms = math.min(server_ms, last_server_ms + 2 * step_ms)
  end
else
  number, epoch, due_ms, ended_ms = 0, now_ms, NEVER, NEVER
end
