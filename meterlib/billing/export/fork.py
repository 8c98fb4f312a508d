"""Going on with a ledger that lost entries which were exported from it: what is where, and another epoch.

What was exported stays true, and nothing that is in the store is dropped. Entries that came after the loss bear numbers
that exported ones have; they are numbered anew, behind every number that was ever given, and under another epoch, which
the store remembers as following the last exported entry. So exports go on by themselves, each number is one entry's for
ever, and a correction that names it cannot mean another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from meterlib.billing.archive.lines import Lines, OddEntryError, Page
from meterlib.billing.archive.rows import entry_from
from meterlib.billing.archive.segments import Position
from meterlib.billing.archive.sinks import Sink
from meterlib.billing.export.start import Run, Start
from meterlib.core.ledger import LedgerEntry
from meterlib.errors import IntegrityError
from meterlib.store import flows
from meterlib.store.commands import ShardHead
from meterlib.store.flows import NewEpoch

PAGE = 2000
SHOWN_MAX = 5


class Kept(NamedTuple):
    """The last entry that is in the store as it was exported; `n` is 0 if none is."""

    epoch: str
    n: int


class Side(msgspec.Struct, kw_only=True):
    """Entries that are in one place only.

    Attributes:
        count: how many.
        first, last: their numbers.
        shown: the first few of them.
    """

    count: int = 0
    first: int = 0
    last: int = 0
    shown: list[LedgerEntry] = []

    def add(self, entry: LedgerEntry) -> None:
        """Count one more."""
        self.count += 1
        self.first, self.last = self.first or entry.n, entry.n
        if len(self.shown) < SHOWN_MAX:
            self.shown.append(entry)


class Loss(msgspec.Struct, kw_only=True):
    """What became of a ledger that does not continue what was exported.

    Attributes:
        shard: which.
        problem: what stops its export.
        found_epoch: the ledger's epoch now; empty if it has none.
        exported: how far it was exported, by the sink that is furthest.
        kept: the last entry that is the same on both sides.
        lost: entries that were exported and are not in the store any more.
        unexported: entries that are in the store and were never exported.
        twice: reservations that have an entry on either side: the call was told again, and would be billed twice.
    """

    shard: int
    problem: IntegrityError
    found_epoch: str
    exported: Position
    kept: Kept
    lost: Side
    unexported: Side
    twice: list[str]


def loss_of(sinks: Sequence[Sink[Any]], run: Run, shard: int) -> Loss | None:
    """What a ledger lost; None if it continues what was exported, as far as anybody can tell.

    Raises:
        IntegrityError: the sinks do not hold the same entries, or what is wrong is not that the ledger lost any.
        SinkError: a sink does not say what it has.
    """
    ends = [(sink, *sink.end(shard)) for sink in sinks]
    furthest, position, known = max(ends, key=lambda end: end[1][:2])
    for sink, own, line in ends:
        if own.n and line not in [one for part in furthest.between(shard, own.n, own.n) for one in part]:
            entry = f"{shard}:{own.n}"
            raise IntegrityError("conflict", f"{sink.place} has another entry {entry} than {furthest.place}", (entry,))
    head = run(flows.read_head(shard))
    try:
        Start(shard, position, known, head, run).found(None)
    except IntegrityError as problem:
        if problem.problem not in ("regress", "conflict", "epoch"):
            raise
        return _told(furthest, run, shard, head, position, problem)
    return None


def fork(loss: Loss, run: Run) -> NewEpoch:
    """Begin another epoch of the ledger behind what was exported; entries that came meanwhile are moved along."""
    exported = loss.exported
    return run(flows.fork(loss.shard, loss.found_epoch, exported.epoch, exported.n, loss.kept.n))


def _told(sink: Sink[Any], run: Run, shard: int, head: ShardHead, position: Position, problem: IntegrityError) -> Loss:
    kept = _kept(sink, run, shard, head)
    unexported, ids = Side(), set()
    for n, fields in _stored(run, shard, kept.n):
        try:
            entry = entry_from(shard, Lines().of([(n, fields)])[0])
        except OddEntryError:  # which the export will name
            unexported.count, unexported.last = unexported.count + 1, n
            unexported.first = unexported.first or n
            continue
        unexported.add(entry)
        ids.add((entry.tenant, entry.reservation_id))
    lost, twice = Side(), []
    for portion in sink.behind(shard, kept.epoch, kept.n):
        for line in portion:
            entry = entry_from(shard, line)
            lost.add(entry)
            if (entry.tenant, entry.reservation_id) in ids:
                twice.append(entry.reservation_id)
    return Loss(
        shard=shard,
        problem=problem,
        found_epoch=head.epoch,
        exported=position,
        kept=kept,
        lost=lost,
        unexported=unexported,
        twice=list(dict.fromkeys(twice)),
    )


def _kept(sink: Sink[Any], run: Run, shard: int, head: ShardHead) -> Kept:
    """Looked for from the end: so no entry below it is moved, and none above it is on both sides."""
    last = head.ledger_last
    while last >= max(1, head.ledger_first):
        first = max(1, head.ledger_first, last - PAGE + 1)
        exported = {line for portion in sink.between(shard, first, last) for line in portion}
        page = run(flows.read_stored(shard, first - 1, last - first + 1))
        for n, fields in reversed(page):
            if n <= last and _line(n, fields) in exported:
                return Kept(fields[b"epoch"].decode(), n)
        last = first - 1
    return Kept("", 0)


def _line(n: int, fields: dict[bytes, bytes]) -> bytes:
    try:
        return Lines().of([(n, fields)])[0]
    except OddEntryError:
        return b""


def _stored(run: Run, shard: int, after: int) -> Iterator[tuple[int, dict[bytes, bytes]]]:
    page: Page
    while page := run(flows.read_stored(shard, after, PAGE)):
        yield from page
        after = page[-1][0]
