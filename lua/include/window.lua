-- window: a log of amounts, oldest first, and its totals; an entry counts until `span_ms` after its own time.
--
-- Sliding windows, calendar periods and open reservations differ only in the time their entries bear: the last ms of a
-- sub-window, the end of the period, the end of the lease.
--
-- A window is stored as two fields. The first has the totals and the last entry, where nearly everything is charged.
-- The log of the entries before it is read only when one of them slides out, is charged or gets a successor, and when a
-- denial has to tell how long to wait.

local WINDOW = '>ddddddd'
--   when the last entry goes; what is settled and held in all; times of the first and of the last entry (0: there is
--   none); what is settled and held in the last
