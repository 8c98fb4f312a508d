"""What the exit codes mean; they are part of the interface, and documented in `meterlib --help`."""

OK = 0
FAILURE = 1
USAGE = 2
INCOMPLETE = 3
OUTSIDE_TOLERANCE = 4
INTEGRITY = 5
INTERRUPTED = 130
