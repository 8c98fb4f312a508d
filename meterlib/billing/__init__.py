"""What becomes of ledger entries: reports of usage, and the proof that none is missing."""
