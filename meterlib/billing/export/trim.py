"""Removing from the store what is safe elsewhere: entries that every sink has, less a margin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from meterlib.billing.archive.sinks import Sink
from meterlib.billing.export.start import Run, Start
from meterlib.store import flows


def trim(sinks: Sequence[Sink[Any]], run: Run, shard: int, *, below: int, keep: int) -> int:
    """Remove a shard's entries below number `below` that every sink has, but never the last `keep` of those.

    The last entry of each sink always stays: by it, the next export tells that the ledger is still the same.

    Args:
        sinks: where they must be, on the disk.
        run: runs the store's flows.
        shard: which.
        below: entries from this number on stay, whatever is exported.
        keep: how many exported entries stay at least; 1 or more.

    Returns:
        How many were removed.

    Raises:
        IntegrityError: the store's ledger is not the one that was exported; nothing was removed.
        SinkError: a sink does not say what it has; nothing was removed.
    """
    ends = [sink.end(shard) for sink in sinks]
    head = run(flows.read_head(shard))
    for position, known in ends:
        epoch, after = Start(shard, position, known, head, run).found(None)
        if not position.n or epoch != position.epoch or after != position.n:
            return 0
        below = min(below, position.n - keep + 1)
    return run(flows.trim_ledger(shard, below)) if ends and 0 < head.ledger_first < below else 0
