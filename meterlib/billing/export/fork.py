"""Going on with a ledger that lost entries which were exported from it: what is where, and another epoch.

What was exported stays true, and nothing that is in the store is dropped. Entries that came after the loss bear numbers
that exported ones have; they are numbered anew, behind every number that was ever given, and under another epoch, which
the store remembers as following the last exported entry. So exports go on by themselves, each number is one entry's for
ever, and a correction that names it cannot mean another.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

import msgspec

from meterlib.billing.archive.lines import Lines, OddEntryError, Page
from meterlib.billing.archive.rows import SEPARATOR, STORED, entry_from, fields_of
from meterlib.billing.archive.segments import Position
from meterlib.billing.archive.sinks import Sink
from meterlib.billing.export.start import Run, Start
from meterlib.core.ledger import LedgerEntry
from meterlib.core.operations import Renumbered
from meterlib.errors import IntegrityError, StoreUnavailable
from meterlib.store import flows
from meterlib.store.commands import Seen, ShardHead
from meterlib.store.flows import NewEpoch

PAGE = 2000
SHOWN_MAX = 5
MOVE_US = 60
"""What an entry that is moved takes of the server's time; measured with 120,000 entries, on one core of 2026."""
PATIENCE = 10
"""So many times as long as that a store may take, until it is taken to be down."""


class Kept(NamedTuple):
    """The last entry that is in the store and was exported; all numbers are 0 if none is.

    Attributes:
        epoch, n: as it was exported.
        stored_n: its number in the store.
        same_n: of the last one that has the number under which it was exported; none below it was lost or moved.
        renumbered: those behind that, up to the last kept one, and what they were exported as.
    """

    epoch: str = ""
    n: int = 0
    stored_n: int = 0
    same_n: int = 0
    renumbered: tuple[Renumbered, ...] = ()


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
        seen: where the ledger ended.
        kept: the last entry that is the same on both sides.
        lost: entries that were exported behind it, and are not in the store any more.
        unexported: entries that are in the store and were never exported.
        twice: reservations that have an entry on either side: the call was told again, and would be billed twice.
    """

    shard: int
    problem: IntegrityError
    found_epoch: str
    exported: Position
    seen: Seen
    kept: Kept
    lost: Side
    unexported: Side
    twice: list[str]

    @property
    def move_ms(self) -> int:
        """About how long the server will answer nobody else."""
        return self.unexported.count * MOVE_US // 1000


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
    at_ms = run(flows.clock_ms(shard))
    head = run(flows.read_head(shard))
    try:
        Start(shard, position, known, head, run).found(None)
    except IntegrityError as problem:
        if problem.problem not in ("regress", "conflict", "epoch"):
            raise
        return _told(furthest, run, shard, head, _seen(run, shard, head, at_ms), position, problem)
    return None


def fork(loss: Loss, run: Run) -> NewEpoch:
    """Begin another epoch of the ledger behind what was exported; entries that came meanwhile are moved along.

    Raises:
        StoreError: the store failed, or was busy much longer than this should have taken it; repeating is safe.
    """
    exported, kept = loss.exported, loss.kept
    follows = (exported.epoch, exported.n)
    patient_until_s = time.monotonic() + PATIENCE * loss.move_ms / 1000
    while True:
        try:
            return run(flows.fork(loss.shard, loss.found_epoch, *follows, kept.same_n, loss.seen, kept.renumbered))
        except StoreUnavailable:
            if time.monotonic() > patient_until_s:
                raise


def _seen(run: Run, shard: int, head: ShardHead, at_ms: int) -> Seen:
    page = run(flows.read_stored(shard, head.ledger_last - 1, 1)) if head.ledger_last else []
    for n, fields in page:
        return Seen(fields.get(b"id", b"").decode(), n, int(fields.get(b"booked_at", b"0")), at_ms)
    return Seen("", 0, 0, at_ms)


def _told(
    sink: Sink[Any],
    run: Run,
    shard: int,
    head: ShardHead,
    seen: Seen,
    position: Position,
    problem: IntegrityError,
) -> Loss:
    kept = _known(sink, run, shard, _kept(sink, run, shard, head))
    unexported, ids = Side(), set()
    for n, fields in _stored(run, shard, kept.stored_n):
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
        seen=seen,
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
                return Kept(fields[b"epoch"].decode(), n, n, n)
        last = first - 1
    return Kept()


def _known(sink: Sink[Any], run: Run, shard: int, kept: Kept) -> Kept:
    """Entries behind it that were exported under other numbers are kept, too."""
    stored = {_content(line): n for n, fields in _stored(run, shard, kept.n) if (line := _line(n, fields))}
    runs: list[Renumbered] = []
    if stored:
        for portion in sink.behind(shard, kept.epoch, kept.n):
            for line in portion:
                if (n := stored.pop(_content(line), 0)) > kept.stored_n:
                    exported_n, fields = fields_of(line)
                    kept = kept._replace(epoch=fields[b"epoch"].decode(), n=exported_n, stored_n=n)
                    _add(runs, Renumbered(n, n, exported_n))
    return kept._replace(renumbered=tuple(runs))


def _add(runs: list[Renumbered], one: Renumbered) -> None:
    last = runs[-1] if runs else Renumbered(0, 0, 0)
    if runs and one.first_n == last.last_n + 1 and one.exported_n == last.exported_n + one.first_n - last.first_n:
        runs[-1] = last._replace(last_n=one.last_n)
    else:
        runs.append(one)


def _content(line: bytes) -> bytes:
    """What an entry is told from all others by, wherever it stands.

    That is not its number, its epoch, or its outcome: if it is a correction, that names a number. The digest tells of
    the outcome.
    """
    _, *values, more = line.split(SEPARATOR)
    told = [value for name, value in zip(STORED, values, strict=True) if name not in (b"outcome", b"epoch")]
    return sha256(SEPARATOR.join((*told, more))).digest()


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
