"""From each shard's ledger into sinks: every entry exactly once, or a stop that names those in doubt.

An exporter reads from the last exported entry on, that entry included: if the store still has it as it was exported,
numbers go on without a gap and the epoch is the same, what follows can be nothing else than what was booked since.
Nothing is skipped and nothing is corrected: of whatever does not fit, the part before it is exported, and then the
shard's export stops with an IntegrityError until somebody has looked. The other shards go on.

Reading and writing overlap: while a sink writes one block, the next is read, and while a page is looked at, the store
sends the next. Memory holds two pages, or a sink's block.

Several sinks have a checkpoint each. The one that is furthest is held against the store first, since it knows most of
what the store may have lost. What the store does not have any more, the others take over from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import msgspec

from meterlib.billing.archive.drafts import Draft, odd
from meterlib.billing.archive.lines import Fields, Lines, OddEntryError, entries_of
from meterlib.billing.archive.rows import fields_of
from meterlib.billing.archive.segments import Position
from meterlib.billing.archive.sinks import MovedError, Sink
from meterlib.billing.export.start import Run, Start, begun_anew, gap
from meterlib.errors import IntegrityError, SinkError
from meterlib.store import flows
from meterlib.store.commands import Forked, StoredPage

PAGE = 200
"""Entries read at once: less than a millisecond of the server's time; larger pages are slower, for Python's sake."""


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody has looked at and lets pass.

    Attributes:
        epochs: by shard: an epoch that may follow the exported one.
        gaps: shard, first and last number of entries that are lost for good.
        aside: shard and number of entries that are kept apart from all others: no bill is made of them.
    """

    epochs: Mapping[int, str] = {}
    gaps: frozenset[tuple[int, int, int]] = frozenset()
    aside: frozenset[tuple[int, int]] = frozenset()


class Exported(msgspec.Struct, kw_only=True):
    """What came of a shard's export.

    Attributes:
        shard: which.
        sink: into what.
        entries: how many were exported now.
        aside: how many were set aside now.
        epoch: of the last exported entry.
        last: its number.
        problem: why the export of the shard stopped; None if it is complete.
        failure: what failed, where it was neither store nor ledger; the next export goes on.
    """

    shard: int
    sink: str = ""
    entries: int = 0
    aside: int = 0
    epoch: str = ""
    last: int = 0
    problem: IntegrityError | None = None
    failure: SinkError | OSError | None = None


class Export:
    """Exports shards into several sinks; a context manager.

    Args:
        sinks: where to.
        run: runs the store's flows.
        accepted: what would stop an export otherwise.
        advance: is told how many entries were read, as it goes.
    """

    def __init__(
        self,
        sinks: Sequence[Sink[Any]],
        run: Run,
        *,
        accepted: Accepted | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._exporters = [
            Exporter(sink, run, accepted=accepted, advance=advance, others=[one for one in sinks if one is not sink])
            for sink in sinks
        ]
        self._failed: dict[str, SinkError | OSError] = {}
        self._open = ExitStack()

    def __enter__(self) -> Self:
        for exporter in self._exporters:
            try:
                self._open.enter_context(exporter)
                self._remember(exporter)
            except (SinkError, OSError) as error:
                self._failed[exporter.sink.place] = error
        return self

    def _remember(self, exporter: Exporter) -> None:
        """The store knows the sink from before its first entry on, so that nothing is trimmed that it lacks."""
        name = exporter.sink.name
        if name not in exporter.run(flows.known_sinks()):
            exporter.run(flows.known_sinks(add=name))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def export(self, shard: int) -> list[Exported]:
        """Bring every sink up to what a shard's ledger has now; a sink that fails does not stop the others.

        Raises:
            StoreError: the store failed; what was read before is exported by the next run.
        """
        exported: dict[str, Exported] = {}
        lost: IntegrityError | None = None
        for exporter in self._by_position(shard, exported):
            name = exporter.sink.place
            if lost is not None:  # the others would not notice
                position = exporter.sink.end(shard)[0]
                exported[name] = Exported(shard=shard, epoch=position.epoch, last=position.n, problem=lost)
            else:
                exported[name] = self._attempt(exporter, shard)
                problem = exported[name].problem
                lost = problem if problem and problem.problem in ("regress", "conflict", "epoch") else None
            exported[name].sink = name
        for name, failure in self._failed.items():
            exported.setdefault(name, Exported(shard=shard, sink=name, failure=failure))
        return [exported[exporter.sink.place] for exporter in self._exporters]

    def _by_position(self, shard: int, exported: dict[str, Exported]) -> list[Exporter]:
        """The exporters whose sink works, that which is furthest first."""
        found: list[tuple[Position, Exporter]] = []
        for exporter in self._exporters:
            name = exporter.sink.place
            if name in self._failed:
                continue
            try:
                found.append((exporter.sink.end(shard)[0], exporter))
            except IntegrityError as error:
                exported[name] = Exported(shard=shard, sink=name, problem=error)
            except (SinkError, OSError) as error:
                self._failed[name] = error
        return [exporter for _, exporter in sorted(found, key=lambda one: one[0][:2], reverse=True)]

    def _attempt(self, exporter: Exporter, shard: int) -> Exported:
        try:
            return exporter.export(shard)
        except (SinkError, OSError) as error:
            self._failed[exporter.sink.place] = error
            return Exported(shard=shard, failure=error)


class Exporter:
    """Exports shards of a store into one sink; a context manager.

    Args:
        sink: where to.
        run: runs the store's flows.
        accepted: what would stop an export otherwise.
        advance: is told how many entries were read, as it goes.
        others: sinks that may have what the store has no more.
    """

    def __init__(
        self,
        sink: Sink[Any],
        run: Run,
        *,
        accepted: Accepted | None = None,
        advance: Callable[[int], None] = lambda count: None,
        others: Sequence[Sink[Any]] = (),
    ) -> None:
        self.sink = sink
        self.run = run
        self.accepted = accepted or Accepted()
        self.advance = advance
        self.others = others
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="meterlib-export")

    def __enter__(self) -> Self:
        self.sink.prepare()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.shutdown()  # what is with it already is taken up: so no draft is left open

    def export(self, shard: int) -> Exported:
        """Bring a shard's part of the sink up to what its ledger has now; a problem is in the result.

        Raises:
            StoreError: the store failed; what was read before is exported by the next run.
            SinkError: the sink did; the same.
            OSError: the disk is full, or fails; the same.
        """
        exported = Exported(shard=shard)
        try:
            while True:
                try:
                    _Job(self, exported).done()
                    break
                except MovedError:
                    continue  # whoever moved it has exported something, so this comes to an end
            if exported.problem is None:
                self.sink.finish(shard)
        except IntegrityError as error:  # the sink itself is damaged
            exported.problem = error
        return exported

    def seal(self, draft: Draft) -> Future[Any]:
        """Have a draft taken up while others read on."""
        return self._writer.submit(self.sink.seal, draft)


class _Job:
    """The export of one shard, as long as nobody else is at it."""

    def __init__(self, exporter: Exporter, exported: Exported) -> None:
        self._exporter = exporter
        self._exported = exported
        self._sink = exporter.sink
        self._shard = exported.shard
        self._position, self._known = self._sink.end(self._shard)
        self._epoch = self._position.epoch
        self._expected = self._position.n + 1
        self._lines = Lines()
        self._draft: Draft | None = None
        self._sealing: tuple[Future[Any], int] | None = None

    def done(self) -> None:
        """Export what can be, and tell how far that was."""
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
        now = self._sink.end(self._shard)[0]
        self._exported.epoch, self._exported.last, self._exported.problem = now.epoch, now.n, problem

    def _read(self) -> None:
        run = self._exporter.run
        head = run(flows.read_head(self._shard))
        for other in self._exporter.others:
            if not self._next_is_stored(head.forked):
                self._take_over(other)
        start = Start(self._shard, self._position, self._known, head, run)
        self._epoch, after = start.found(self._exporter.accepted.epochs.get(self._shard))
        self._expected = after + 1
        while page := run(flows.read_page(self._shard, after, PAGE)):
            after = self._take(page)
            self._exporter.advance(len(page))
            if len(page) < PAGE:
                break
        if self._expected <= head.last_number:
            # A script that was cut short has counted an entry and not written it yet; the next call on the shard will.
            self._gap(self._expected, head.last_number, "unless the next call on this shard writes them, they are lost")

    def _next_is_stored(self, forked: Forked | None) -> bool:
        n = self._position.n
        if forked is not None and (self._position.epoch, n) < (forked.follows_epoch, forked.follows_n):
            return False
        page = self._exporter.run(flows.read_stored(self._shard, n, 1))
        return bool(page) and page[0][0] == n + 1

    def _take_over(self, other: Sink[Any]) -> None:
        """Copy what another sink has and the store has no more: it was trimmed, or the store lost it."""
        try:
            end = other.end(self._shard)[0]
        except (SinkError, OSError):
            return  # which its own export tells
        own = self._position
        if end[:2] <= own[:2]:
            return
        if own.n and self._known not in [line for part in other.between(self._shard, own.n, own.n) for line in part]:
            entry = f"{self._shard}:{own.n}"
            raise IntegrityError(
                "conflict", f"{other.place} has another entry {entry} than {self._sink.place}", (entry,)
            )
        for portion in other.behind(self._shard, own.epoch, own.n):
            for line in portion:
                self._copy(line, end)
        self._seal()
        self._wait()
        self._position, self._known = self._sink.end(self._shard)
        if self._position != end:
            entries = f"{self._shard}:1-{end.n}"
            message = f"{other.place} and {self._sink.place} do not hold the same up to entry {self._shard}:{end.n}"
            raise IntegrityError("conflict", message, (entries,))

    def _copy(self, line: bytes, end: Position) -> None:
        n, fields = fields_of(line)
        epoch = fields[b"epoch"].decode()
        if (epoch, n) > end[:2]:
            return  # it goes on meanwhile
        if epoch != self._epoch or n != self._expected:
            self._seal()
            self._epoch, self._expected = epoch, n
        self._add_to(self._open_draft(), [line])
        self._close_full()
        self._exporter.advance(1)

    def _take(self, stored: StoredPage) -> int:
        """Take up a page; returns the number of its last entry."""
        aside = self._exporter.accepted.aside
        lines = None if aside else self._lines.plain(stored, self._expected, self._epoch)
        if lines is not None:
            self._add(lines)
            return self._expected - 1
        page = entries_of(stored)
        for n, fields in page:
            if n < self._expected:
                entry = f"{self._shard}:{n}"
                raise IntegrityError("conflict", f"the store has two entries {entry}: one is not meterlib's", (entry,))
            epoch = fields.get(b"epoch", b"").decode(errors="replace")
            if epoch != self._epoch and (self._shard, n) not in aside:
                self._switch(n, epoch)
            if n > self._expected:
                self._gap(self._expected, n - 1, "the store has entries behind them")
            if (self._shard, n) in aside:
                self._set_aside(n, fields)
            else:
                self._add(self._lines_of(n, fields))
        return page[-1][0]

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

    def _set_aside(self, n: int, fields: Fields) -> None:
        self._sink.set_aside(self._shard, self._epoch, n, fields)
        self._seal()
        self._expected = n + 1
        self._exported.aside += 1

    def _lines_of(self, n: int, fields: Fields) -> list[bytes]:
        try:
            return self._lines.of([(n, fields)])
        except OddEntryError as error:
            raise odd(self._shard, error.n, error.reason) from None

    def _add(self, lines: Sequence[bytes]) -> None:
        while lines:
            draft = self._open_draft()
            room = self._sink.block_end(self._expected) - draft.last
            part, lines = lines[:room], lines[room:]
            self._add_to(draft, part)
            self._close_full()

    def _add_to(self, draft: Draft, lines: Sequence[bytes]) -> None:
        draft.add(lines, self._lines.unknown)
        self._lines.unknown.clear()
        self._expected += len(lines)

    def _open_draft(self) -> Draft:
        if self._draft is None:
            made: Draft = self._sink.draft(self._shard, self._epoch, self._expected, self._position)
            self._draft = made
        return self._draft

    def _close_full(self) -> None:
        draft = self._draft
        if draft is not None and draft.size and draft.last == self._sink.block_end(draft.first):
            self._seal()

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
        self._sealing = self._exporter.seal(draft), draft.last - draft.first + 1

    def _wait(self) -> None:
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            sealing[0].result()
            self._exported.entries += sealing[1]
