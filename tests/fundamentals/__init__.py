"""What meterlib does, one idea a file. Read in this order:

reserving, settling, revising, cancelling, leases, sliding_windows, oversize, calendar_periods, concurrency, partitions,
units, unknown_numbers, recording, looking, repeating, blocks, store_down.

Each test runs on a meter in memory, on fakeredis and on a real server, with the sync and the async face. `POLICY` at
the top of a file is what its meter enforces. Time stands still unless a test moves it.
"""
