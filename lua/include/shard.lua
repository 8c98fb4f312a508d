-- shard: one unit of work on one shard: fields of its state are read in one command, and written in one at the end.
--
-- That HSET is the commit point. What has to follow it elsewhere (ledger entries, leases, ended ids) is noted in the
-- field `pending` by the same HSET, done right afterwards and struck out. Redis never rolls back: should a script fail
-- half way, the next one finishes its work first, whichever operation it carries.

local state_key    = KEYS[1]            -- hash    the head, every window and every reservation of the shard
local leases_key   = KEYS[2]            -- zset    open reservations, scored by the end of their lease in ms
local ended_key    = KEYS[3]            -- list    reservations that ended, oldest first
local ledger_key   = KEYS[4]            -- stream  ledger entries; entry number n has the stream id n-0
local layout       = ARGV[1]            -- str     version of the layout and number of shards: must be the store's own
local test_now_ms  = ARGV[2]            -- ms      a test's clock; 0: the server's
local sweep_max    = ARGV[3]            -- int     how many overdue or forgettable reservations to clear in passing
local retention_ms = ARGV[4]            -- ms      how long ended reservations are remembered

local OPERATIONS = 4                    -- the operations follow the call's own arguments
local call, sub, format, floor = redis.call, string.sub, string.format, math.floor

local state = {}                        -- fields as read or as they shall be
local now_ms, server_ms                 -- the shard's time; the server's, as the head will have it
local set_back = false                  -- the server's clock is behind what it was: to be noted, whatever else happens
local number, epoch                     -- of the last ledger entry; of the ledger

-- What is to be written: the head, then fields and values. Here and elsewhere, nils make room for what mostly follows:
-- a table that grows is moved each time.
local words = {'head', '', nil, nil, nil, nil, nil, nil}

-- The head: time of the last change and the server's time then (13 digits each), number of the last ledger entry (16),
-- the ledger's epoch (13), the layout.
--
-- A server clock that was set back must not bring time to a halt until it has caught up (no window would slide), and
-- time must not go back: it goes on at half speed.
local function open(fields, read_only)
  local values = call('HMGET', state_key, unpack(fields))
  local head = values[1]
  if values[2] and not read_only then
    for line in string.gmatch(values[2], '[^\30]+') do
      local command = {}
      for word in string.gmatch(line, '([^\31]*)\31') do command[#command + 1] = word end
      local there = command[1] == 'XADD' and #call('XRANGE', ledger_key, command[3], command[3]) > 0
      if not there then call(unpack(command)) end
    end
    values = call('HMGET', state_key, unpack(fields))
  end
  for at = 3, #fields do state[fields[at]] = values[at] end
  server_ms = test_now_ms + 0
  if server_ms == 0 then
    local time = call('TIME')
    server_ms = time[1] * 1000 + floor(time[2] / 1000)
  end
  now_ms = server_ms
  if not head then
    number, epoch = 0, format('%013d', now_ms)
  else
    if sub(head, 56) ~= layout then
      return redis.error_reply('METERLIB_LAYOUT ' .. sub(head, 56) .. ' is the layout of the store, not ' .. layout)
    end
    local last_ms = sub(head, 1, 13) + 0
    if server_ms < last_ms then
      local last_server_ms = tonumber(sub(head, 14, 26))
      set_back = server_ms < last_server_ms
      local step_ms = math.max(0, floor((server_ms - last_server_ms) / 2))
      now_ms = last_ms + step_ms
      server_ms = math.min(server_ms, last_server_ms + 2 * step_ms)
    end
    number, epoch = sub(head, 27, 42) + 0, sub(head, 43, 55)
  end
end

local function read(field)
  local value = state[field]
  if value == nil then
    value = call('HGET', state_key, field)
    state[field] = value
  end
  return value
end

local function write(field, value)
  local size = #words
  state[field], words[size + 1], words[size + 2] = value, field, value
end

-- Writes all that changed, then what follows from it. Every key was read before, so none has a wrong type.
local function commit(following)
  if #words == 2 and not following and not set_back then return end
  words[2] = format('%013d%013d%016d', now_ms, server_ms, number) .. epoch .. layout
  if following then
    following[#following + 1] = {'HDEL', state_key, 'pending'}
    local lines = {nil, nil, nil, nil}
    for at, command in ipairs(following) do lines[at] = table.concat(command, '\31') end
    write('pending', table.concat(lines, '\31\30') .. '\31')
  end
  call('HSET', state_key, unpack(words))
  if following then
    for _, command in ipairs(following) do call(unpack(command)) end
  end
end
