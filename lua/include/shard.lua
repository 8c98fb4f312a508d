-- shard: one unit of work on one shard: fields of its state are read in one command, and written in one at the end.
--
-- Arguments, answers and what is stored are packed: text (s) ends with a zero byte, a number (d) takes the eight bytes
-- of a double. Reading and writing numbers as digits would cost more than all the rest. For the same reason the steps
-- that each call takes once are lines to include, and no functions: making one costs as much as using it.

local state_key    = KEYS[1]            -- hash    the head, every window and every reservation of the shard
local leases_key   = KEYS[2]            -- zset    open reservations, scored by the end of their lease in ms
local ended_key    = KEYS[3]            -- list    reservations that ended, oldest first
local ledger_key   = KEYS[4]            -- stream  ledger entries; entry number n has the stream id n-0
local windows_key  = KEYS[5]            -- zset    windows, scored by a time in ms at which they are to be looked at

local CALL = '>sddd'
--   layout        str   version of the layout and number of shards: must be the store's own
--   test_now_ms   ms    a test's clock; 0: the server's
--   sweep_max     int   how many overdue or forgettable reservations to clear in passing
--   retention_ms  ms    how long ended reservations are remembered

local HEAD, HEAD_SIZE = '>dddddd', 48   -- then the layout
--   the time of the last change and the server's time then; the number of the last ledger entry and the ledger's epoch;
--   times before which no lease ends, and no reservation ended: so nothing is overdue, or old enough to be forgotten

local NEVER = 9007199254740991
local call, sub, floor, to_bytes, from_bytes = redis.call, string.sub, math.floor, struct.pack, struct.unpack
local layout, test_now_ms, sweep_max, retention_ms = from_bytes(CALL, ARGV[1])
local state = {}                        -- fields as read or as they shall be
local now_ms, server_ms                 -- the shard's time; the server's, as the head will have it
local set_back = false                  -- the server's clock is behind what it was: to be noted, whatever else happens
local number, epoch                     -- of the last ledger entry; of the ledger
local due_ms, ended_ms                  -- as in the head

-- Fields to be read, and what is to be written: the head, then fields and values. Here and elsewhere, nils make room
-- for what mostly follows: a table that grows is moved each time.
local fields = {'head', 'pending', nil, nil, nil, nil}
local words = {'head', '', nil, nil, nil, nil, nil, nil}
local replies = {nil}
