-- limit: what an operation says of one limit; a reservation keeps it as it was said.

local LIMIT, NEXT_LIMIT = '>dssddsdddds', '>ds'
--   limit_size       int   how many bytes this takes: behind them is the next limit
--   window_field     str   the field of its window
--   unit             str   what it counts
--   amount           int   how much the call takes, or took, in that unit
--   quota            int   how much may count at any time
--   oversize         str   an amount above the quota: admit (when idle) or reject
--   span_ms          ms    length of a sliding window; else 0
--   sub_window_ms    ms    its resolution; else 0
--   period_start_ms  ms    first moment of a calendar period; else 0
--   period_end_ms    ms    first moment behind it; else 0
--   on_expiry        str   a period's hold when the lease runs out: keep or free

local PAYLOAD = '>sss'
--   digest           hex   of the other two: with other ones the id is a conflict
--   call_facts       json  tenant, attributes, funding; nobody looks inside here
--   estimate         json  the usage expected; likewise
