"""The archive: immutable files of ledger entries, chained by digest, whose listing is the checkpoint."""
