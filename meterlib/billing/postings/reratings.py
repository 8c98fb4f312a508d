"""Rating anew what was rated, at other prices: the difference first, and then, if that is wanted, rows that post it.

Rows that were posted stay. A re-rating takes back the lines that cost something else now, and posts them anew; all of
it comes to stand at once, as a folder that is renamed into place. What it rates again in between is nobody's: so it may
die at any step, and of two at once that would post the same number only one does.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

import meterlib
from meterlib.billing import duck
from meterlib.billing.archive.archive import Archive
from meterlib.billing.archive.segments import KEY, PARQUET, Segment, VanishedError, sync_folder, synced_digest
from meterlib.billing.postings.pieces import (
    RATED_SCHEMA,
    STORED,
    RatedFile,
    RatedFiles,
    grouped,
    terms_by_tenant,
    unreadable_one,
)
from meterlib.billing.postings.pieces import sums_of as sums_of_rows
from meterlib.billing.postings.rater import Block, Prices, stage_block
from meterlib.billing.postings.reposts import MANIFEST, REPOST_SCHEMA, Manifest, Repost, encoded, folder_of, reposts_of
from meterlib.billing.postings.rerating_sql import COSTS_CHANGED, LINES, stage_deltas
from meterlib.billing.prices.pinned import Scale, united
from meterlib.billing.prices.terms import Terms
from meterlib.billing.rating.corrections import Place
from meterlib.billing.rating.rated import COSTS
from meterlib.core.money import ZERO, plus
from meterlib.errors import IntegrityError


class ModelChange(msgspec.Struct, kw_only=True):
    """What a re-rating changes of one model.

    Attributes:
        lines: how many change.
        priced: how many of them had no price and have one now.
        unpriced: how many had a price and have none now.
        costs: by currency, by how much the costs grow; see `rated.COSTS` for their names.
    """

    lines: int = 0
    priced: int = 0
    unpriced: int = 0
    costs: dict[str, dict[str, Decimal]] = msgspec.field(default_factory=dict)

    def add(self, currency: str, costs: dict[str, Decimal]) -> None:
        """Count some more."""
        known = self.costs.setdefault(currency, dict.fromkeys(COSTS, ZERO))
        for name, cost in costs.items():
            known[name] = plus(known[name], cost)


class Rerating:
    """A re-rating that is worked out and perhaps posted; a context manager that leaves nothing behind unless posted.

    Args:
        archive: what.
        prices: what by.
        book: what prices were asked for, in words.
        since_ms: calls from this moment on; None for all.
        until_ms: calls before this moment; None for all.

    Attributes:
        changes: what it changes, by model.
        rows: how many rows it would post.
    """

    def __init__(
        self,
        archive: Archive,
        prices: Prices,
        book: str,
        *,
        since_ms: int | None = None,
        until_ms: int | None = None,
    ) -> None:
        self._archive = archive
        self._files = RatedFiles(archive)
        self._prices = prices
        self._book = book
        self._span = since_ms, until_ms
        self._reposts: list[Repost] = reposts_of(self._files.path)
        self.number = len(self._reposts) + 1
        self._sums: dict[str, dict[str, str]] = {}
        self._scales: list[Scale] = []
        self._terms: dict[str, Terms] = {}
        self._done: dict[int, Place] = {}
        self.changes: dict[str, ModelChange] = {}
        self.rows = 0

    def __enter__(self) -> Self:
        self._draft = self._archive.work().folder / "rating"
        self._draft.mkdir()
        self._database = duck.connect(self._archive.work().folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()
        shutil.rmtree(self._draft, ignore_errors=True)

    def work_out(self, advance: Callable[[int], None] = lambda count: None) -> None:
        """Rate all again, and keep what differs; once more, what was rated since.

        Args:
            advance: is told how many entries were looked at, as it goes.

        Raises:
            IntegrityError: the archive's files do not fit together.
            OSError: the disk is full, or fails.
        """
        for shard in self._files.shards():
            while (file := next(self._behind(shard), None)) is not None:
                with suppress(VanishedError):  # it was joined with others, or the archive's segments were
                    advance(self._look(file, self._done.get(shard, ("", 0))))
                    self._done[shard] = file.segment.epoch, file.segment.last
        self.changes = dict(sorted(self.changes.items()))

    def _behind(self, shard: int) -> Iterator[RatedFile]:
        """The files that have rows of entries which were not looked at."""
        way = self._files.steady(lambda: self._files.way(shard))
        done = self._done.get(shard, ("", 0))
        return (file for file in way if (file.segment.epoch, file.segment.last) > done)

    def _look(self, file: RatedFile, done: Place) -> int:
        segment = file.segment
        first = max(segment.first, done[1] + 1) if done[0] == segment.epoch else segment.first
        if self._concerned(file):
            block = self._block(segment, first)
            made = stage_block(self._database, self._archive, block, self._prices, self._archive.work().folder)
            self._stage_deltas(file, first)
            self._keep(segment, first)
            self._terms |= terms_by_tenant(made.terms)
            self._scales = united(self._scales, made.scales) or []
        return segment.last - first + 1

    def _concerned(self, file: RatedFile) -> bool:
        """Whether a file has rows of calls of the time that is asked for."""
        rows = f"SELECT min(at_ms), max(at_ms) FROM read_parquet({duck.quoted(file.path)})"
        ((first_ms, last_ms),) = self._query(rows, [file.path])
        since_ms, until_ms = self._span
        if first_ms is None or (since_ms is not None and last_ms < since_ms):
            return False
        return until_ms is None or first_ms < until_ms

    def _query(self, query: str, files: list[Path]) -> Any:
        try:
            return self._database.execute(query).fetchall()
        except duck.failure() as error:
            raise unreadable_one(files, error) from None

    def _block(self, segment: Segment, first: int) -> Block:
        """The entries of a rated file from `first` on."""
        held = [
            one
            for one in self._archive.segments(segment.shard)
            if one.epoch == segment.epoch and one.first <= segment.last and one.last >= first
        ]
        if not held:
            entries = f"{segment.shard}:{first}-{segment.last}"
            raise IntegrityError("damaged", f"the archive has no entries {entries}, which were rated", (entries,))
        return Block(shard=segment.shard, first=first, last=segment.last, follows=("", 0), segments=held)

    def _stage_deltas(self, file: RatedFile, first: int) -> None:
        segment = file.segment
        files = [file.path, *(path for repost in self._reposts for path in repost.paths())]
        listed = ", ".join(duck.quoted(path) for path in files)
        old = (
            f"SELECT * FROM read_parquet([{listed}]) WHERE shard = {segment.shard}"
            f" AND epoch = {duck.quoted(segment.epoch)} AND n BETWEEN {first} AND {segment.last}"
        )
        since_ms, until_ms = self._span
        spans = [f"at_ms >= {since_ms}"] if since_ms is not None else []
        spans += [f"at_ms < {until_ms}"] if until_ms is not None else []
        try:
            with duck.disk_errors():
                stage_deltas(self._database, old, self.number, " AND ".join(spans) or "true")
        except (duck.failure(), OSError) as error:
            if not file.path.exists():
                raise VanishedError(str(file.path)) from error
            raise

    def _keep(self, segment: Segment, first: int) -> None:
        """Write the deltas of a block, and count them."""
        ((rows,),) = self._query("SELECT count(*) FROM deltas", [])
        if not rows:
            return
        self.rows += rows
        for model, lines, was_unpriced, is_unpriced in self._query(LINES, []):
            change = self.changes.setdefault(model, ModelChange())
            change.lines += lines
            change.priced += max(0, was_unpriced - is_unpriced)
            change.unpriced += max(0, is_unpriced - was_unpriced)
        for model, currency, *costs in self._query(COSTS_CHANGED, []):
            self.changes[model].add(currency, dict(zip(COSTS, map(Decimal, costs), strict=True)))
        self._write(segment, first)

    def _write(self, segment: Segment, first: int) -> None:
        scratch = self._draft / "rows.parquet"
        columns = ", ".join(STORED)
        with duck.disk_errors():
            sums = sums_of_rows(self._database, "deltas")
            self._database.execute(
                f"COPY (SELECT {columns} FROM deltas ORDER BY n, line) TO {duck.quoted(scratch)}"
                f" (FORMAT parquet, {PARQUET}, KV_METADATA {{{KEY}: '{RATED_SCHEMA}'}})"
            )
        named = Segment(segment.epoch, segment.shard, first, segment.last, synced_digest(scratch))
        scratch.rename(self._draft / named.name)
        self._sums[named.name] = sums

    def post(self, now_ms: int) -> int:
        """Have the rows stand in the archive, on the disk; those of what was rated since `work_out`, too.

        A correction that was rated in between went by the prices that its call had; the call gets others now.

        Returns:
            The number of the re-rating; 0 if another one was posted meanwhile, so that nothing was.

        Raises:
            IntegrityError: the archive's files do not fit together.
            OSError: the disk is full, or fails.
        """
        self.work_out()
        manifest = Manifest(
            schema=REPOST_SCHEMA,
            number=self.number,
            posted_at_ms=now_ms,
            library=meterlib.__version__,
            book=self._book,
            since_ms=self._span[0],
            until_ms=self._span[1],
            terms=grouped(self._terms),
            scales=self._scales,
            files=dict(sorted(self._sums.items())),
        )
        file = self._draft / MANIFEST
        file.write_bytes(encoded(manifest.sealed()))
        synced_digest(file)
        sync_folder(self._draft)
        place = self._files.path / folder_of(self.number)
        try:
            os.rename(self._draft, place)  # noqa: PTH104
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return 0
        sync_folder(place.parent)
        return self.number

    def missed(self) -> int:
        """How many entries were rated in the very moment before it was posted: they have the prices from before."""
        return self._files.steady(lambda: sum(map(self._missed, self._files.shards())))

    def _missed(self, shard: int) -> int:
        count = 0
        for file in self._behind(shard):
            epoch, n = self._done.get(shard, ("", 0))
            for made in self._files.facts(file).made:
                first = max(made.first, n + 1) if epoch == file.segment.epoch else made.first
                if made.reposts < self.number:
                    count += max(0, made.last - first + 1)
        return count
