-- answer: one text for each operation; where there is but one, no list around it, which would cost more than its text.
--
-- An answer begins with the format of the rest: a status, the shard's time in ms, then what the script's header says.

return #replies == 1 and replies[1] or replies
