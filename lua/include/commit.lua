-- commit: writes all that changed, then what follows from it.
--
-- The HSET is the commit point. What has to follow it elsewhere (ledger entries, leases) is noted in the field
-- `pending` by the same HSET, done right afterwards and struck out. Redis never rolls back: should a script fail half
-- way, the next one finishes its work first, whichever operation it carries. Every key was read or written before, so
-- none has a wrong type.

local begun                             -- windows that are new, for the sweep to look at when they may be over
for field, window in pairs(windows) do
  if window.changed then
    local size, ends_at = #words, window.last_ms + window.span_ms
    words[size + 1], words[size + 2] = field, to_bytes(WINDOW, ends_at, window.settled, window.held, window.first_ms,
      window.last_ms, window.last_settled, window.last_held)
    if not state[field] then
      begun = begun or {nil, nil}
      begun[#begun + 1], begun[#begun + 2] = ends_at, field
    end
    if window.new_log then words[size + 3], words[size + 4] = 'l' .. sub(field, 2), window.new_log end
  end
end
if #words > 2 or following or set_back then
  words[2] = to_bytes(HEAD, now_ms, server_ms, number, epoch, due_ms, ended_ms) .. layout
  if following then
    following[#following + 1] = {'HDEL', state_key, 'pending'}
    local lines = {nil, nil, nil, nil}
    for at, command in ipairs(following) do lines[at] = table.concat(command, '\31') end
    words[#words + 1] = 'pending'
    words[#words + 1] = table.concat(lines, '\31\30') .. '\31'
  end
  if begun then call('ZADD', windows_key, unpack(begun)) end  -- one that does not begin after all harms nobody there
  call('HSET', state_key, unpack(words))
  if following then
    for _, command in ipairs(following) do call(unpack(command)) end
  end
end
