"""The pure core: records and rules. Stdlib and msgspec only; no clock, no I/O, no randomness."""
