-- entry: the words of ledger entry `past.number`, whether it stands in the ledger or is about to; none if it was
-- trimmed.

local entry, entry_id, entry_words = {}, format('%d-0', past.number), {}
for _, command in ipairs(entries) do
  if command[3] == entry_id then entry_words = {unpack(command, 4)} end
end
if #entry_words == 0 then
  local found = call('XRANGE', ledger_key, entry_id, entry_id)[1]
  if found then entry_words = found[2] end
end
for at = 1, #entry_words, 2 do entry[entry_words[at]] = entry_words[at + 1] end
