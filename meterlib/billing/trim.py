"""Removing from the store what is safe elsewhere: entries that every sink has, less a margin."""

from __future__ import annotations

from meterlib.billing.archive import Archive
from meterlib.billing.start import Run, Start
from meterlib.store import flows


def trim(archive: Archive, run: Run, shard: int, *, below: int, keep: int) -> int:
    """Remove a shard's entries below number `below` that are archived, but never the last `keep` of those.

    The last archived entry always stays: by it, the next export tells that the ledger is still the same.

    Args:
        archive: where they must be, on the disk.
        run: runs the store's flows.
        shard: which.
        below: entries from this number on stay, whatever is archived.
        keep: how many archived entries stay at least; 1 or more.

    Returns:
        How many were removed.

    Raises:
        IntegrityError: the store's ledger is not the one that was archived; nothing was removed.
    """
    position, known = archive.end(shard)
    head = run(flows.read_head(shard))
    epoch, after = Start(shard, position, known, head, run).found(None)
    if not position.n or epoch != position.epoch or after != position.n:
        return 0
    below = min(below, position.n - keep + 1)
    return run(flows.trim_ledger(shard, below)) if 0 < head.ledger_first < below else 0
