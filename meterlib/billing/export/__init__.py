"""From the store's ledgers into every sink, exactly once; and what an operator decides when a ledger lost its tail."""
