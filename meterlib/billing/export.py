"""From each shard's ledger into an archive: every entry exactly once, or a stop that names those in doubt.

An exporter reads from the last archived entry on, that entry included: if the store still has it as it was archived,
numbers go on without a gap and the epoch is the same, what follows can be nothing else than what was booked since.
Nothing is skipped and nothing is corrected: of whatever does not fit, the part before it is exported, and then the
shard's export stops with an IntegrityError until somebody has looked. The other shards go on.

Reading and writing overlap: while DuckDB writes one block, the next is read. Memory holds one page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import msgspec

from meterlib.billing import duck
from meterlib.billing.archive import Archive, Position
from meterlib.billing.drafts import Draft, odd
from meterlib.billing.lines import Lines, OddEntryError, Page
from meterlib.billing.segments import Segment
from meterlib.billing.start import Run, Start, begun_anew, gap
from meterlib.errors import IntegrityError
from meterlib.store import flows

PAGE = 200
"""Entries read at once: less than a millisecond of the server's time; larger pages are slower, for Python's sake."""


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody has looked at and lets pass.

    Attributes:
        epochs: by shard: an epoch that may follow the archived one.
        gaps: shard, first and last number of entries that are lost for good.
    """

    epochs: Mapping[int, str] = {}
    gaps: frozenset[tuple[int, int, int]] = frozenset()


class Exported(msgspec.Struct, kw_only=True):
    """What came of a shard's export.

    Attributes:
        shard: which.
        entries: how many were exported now.
        epoch: of the last archived entry.
        last: its number.
        problem: why the export of the shard stopped; None if it is complete.
    """

    shard: int
    entries: int = 0
    epoch: str = ""
    last: int = 0
    problem: IntegrityError | None = None


class Exporter:
    """Exports shards of a store into an archive; a context manager.

    Args:
        archive: where to.
        run: runs the store's flows.
        accepted: what would stop an export otherwise.
        advance: is told how many entries were read, as it goes.
    """

    def __init__(
        self,
        archive: Archive,
        run: Run,
        *,
        accepted: Accepted | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.archive = archive
        self.run = run
        self.accepted = accepted or Accepted()
        self.advance = advance
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="meterlib-export")
        self._database: Any = None

    def __enter__(self) -> Self:
        self._database = duck.connect(self.archive.work().folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.shutdown(cancel_futures=True)
        self._database.close()

    def export(self, shard: int) -> Exported:
        """Bring the archive of a shard up to what its ledger has now; a problem is in the result.

        Raises:
            StoreError: the store failed; what was read before is exported by the next run.
            OSError: the disk is full, or fails; the same.
        """
        try:
            exported = _Job(self, shard).done()
            if exported.problem is None:
                self.archive.compact(shard)
        except IntegrityError as error:  # the archive itself is damaged
            return Exported(shard=shard, problem=error)
        return exported

    def seal(self, draft: Draft) -> Future[Segment]:
        """Have a segment made of a draft while others read on."""
        return self._writer.submit(self.archive.seal, self._database, draft)


class _Job:
    """The export of one shard."""

    def __init__(self, exporter: Exporter, shard: int) -> None:
        self._exporter = exporter
        self._archive = exporter.archive
        self._shard = shard
        self._position, self._known = self._archive.end(shard)
        self._epoch = self._position.epoch
        self._expected = self._position.n + 1
        self._lines = Lines()
        self._draft: Draft | None = None
        self._sealing: Future[Segment] | None = None

    def done(self) -> Exported:
        """Export what can be, and tell how far that was."""
        before = self._count()
        problem: IntegrityError | None = None
        try:
            try:
                self._read()
            except IntegrityError as error:
                problem = error
            self._seal()
            self._wait()
        except IntegrityError as error:  # the writer's, so it is about an earlier entry
            problem = error
        finally:
            if self._draft is not None:
                self._draft.discard()
        now = self._archive.position(self._shard)
        entries = self._count() - before
        return Exported(shard=self._shard, entries=entries, epoch=now.epoch, last=now.n, problem=problem)

    def _count(self) -> int:
        return sum(segment.last - segment.first + 1 for segment in self._archive.segments(self._shard))

    def _read(self) -> None:
        run = self._exporter.run
        head = run(flows.read_head(self._shard))
        start = Start(self._shard, self._position, self._known, head, run)
        self._epoch, after = start.found(self._exporter.accepted.epochs.get(self._shard))
        self._expected = after + 1
        while page := run(flows.read_stored(self._shard, after, PAGE)):
            self._take(page)
            after = page[-1][0]
            self._exporter.advance(len(page))
            if len(page) < PAGE:
                break
        if self._expected <= head.last_number:
            # A script that was cut short has counted an entry and not written it yet; the next call on the shard will.
            self._gap(self._expected, head.last_number, "unless the next call on this shard writes them, they are lost")

    def _take(self, page: Page) -> None:
        numbers = [n for n, _ in page]
        regular = numbers == list(range(self._expected, self._expected + len(page)))
        if regular and {fields.get(b"epoch") for _, fields in page} == {self._epoch.encode()}:
            self._add(page)
            return
        for n, fields in page:
            if n < self._expected:
                entry = f"{self._shard}:{n}"
                raise IntegrityError("conflict", f"the store has two entries {entry}: one is not meterlib's", (entry,))
            epoch = fields.get(b"epoch", b"").decode(errors="replace")
            if epoch != self._epoch:
                self._switch(n, epoch)
            if n > self._expected:
                self._gap(self._expected, n - 1, "the store has entries behind them")
            self._add([(n, fields)])

    def _switch(self, n: int, epoch: str) -> None:
        """The ledger goes on under another epoch."""
        if not self._epoch:
            self._epoch = epoch  # the first entry of all says which one it is
        elif epoch == self._exporter.accepted.epochs.get(self._shard):
            self._seal()
            self._epoch = epoch
        else:
            raise begun_anew(self._shard, self._epoch, self._expected - 1, epoch, n)

    def _gap(self, first: int, last: int, why: str) -> None:
        if (self._shard, first, last) not in self._exporter.accepted.gaps:
            raise gap(self._shard, first, last, why)
        self._seal()
        self._expected = last + 1

    def _add(self, page: Page) -> None:
        while page:
            if self._draft is None:
                self._draft = self._archive.draft(self._shard, self._epoch, self._expected, self._position)
            room = self._archive.block_end(self._expected) - self._draft.last
            part, page = page[:room], page[room:]
            self._add_to(self._draft, part)
            if len(part) == room:
                self._seal()

    def _add_to(self, draft: Draft, page: Page) -> None:
        try:
            lines = self._lines.of(page)
        except OddEntryError as error:
            draft.add(self._lines.of(page[: error.n - page[0][0]]), self._lines.unknown)
            raise odd(self._shard, error.n, error.reason) from None
        draft.add(lines, self._lines.unknown)
        self._lines.unknown.clear()
        self._expected += len(lines)

    def _seal(self) -> None:
        """Hand the draft over to the writer, once it is done with the one before."""
        self._wait()
        draft, self._draft = self._draft, None
        if draft is None:
            return
        if not draft.size:
            draft.discard()
            return
        self._position = Position(draft.epoch, draft.last, draft.link)
        self._sealing = self._exporter.seal(draft)

    def _wait(self) -> None:
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            sealing.result()
