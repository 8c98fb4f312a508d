-- open: looks at the shard, and keeps what is there at hand.

-- @include look
for at = 3, #fields do state[fields[at]] = values[at] end
