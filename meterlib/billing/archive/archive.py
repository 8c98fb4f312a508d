"""An archive: a folder of immutable segments for each shard, whose listing is the checkpoint.

There is no second truth: what is in the archive is what its files say, and how far a shard is exported is where its
files end. Nothing else is written that could disagree with them.

**Where segments are cut.** Between two multiples of `segment_entries` lies a block. A full block becomes one segment,
so that runs give the same files whenever they ran. What is behind the last full block is written at the end of a run
all the same, as a short segment from the checkpoint to the last entry, since a report should not have to wait for the
block to fill; the next run goes on behind it, and never crosses the end of the block. When the block is full,
`compact` writes it as the one segment it would have become, and then removes the pieces. Segments can be cut and joined
freely because digests are chained by entry and not by file: the link behind entry n is the same in every cut, so the
links of a joined segment equal those of its pieces, and those that follow still fit.

**Two exporters at once** write the same block to the same name, or pieces that overlap; each entry of them has the
same link, or one of the two stops. Reading takes the shortest way from the first entry to the last, which uses the
longest segments; what it passes by holds nothing more, and goes with the next compaction. So nobody needs a lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from meterlib.billing import duck
from meterlib.billing.archive.drafts import FileDraft, Work, aside_document
from meterlib.billing.archive.lines import Fields
from meterlib.billing.archive.rows import LINE, entry_from, first_link, number_of
from meterlib.billing.archive.segments import (
    Facts,
    Position,
    Segment,
    VanishedError,
    facts_of,
    publish,
    sync_folder,
    synced_digest,
    unreadable,
    write,
)
from meterlib.core.ledger import LedgerEntry
from meterlib.errors import IntegrityError

SEGMENT_ENTRIES = 50_000
"""Entries of a block: some 4 MB on disk, written in a quarter of a second."""

PIECES_MAX = 32
"""Pieces of the last block that a run leaves alone."""

ASIDE = "set-aside"
"""The folder of entries that somebody had set aside."""

_FOLDER = "shard-{:04d}"
_LINES = 10_000
_LOOKS = 10


T = TypeVar("T")


class Archive:
    """The archive in a folder, which need not exist yet; a context manager that leaves no temporary file behind.

    Raises (whatever reads or writes):
        IntegrityError: its files do not fit together; the message names the file.
        UsageError: DuckDB is not installed.
        OSError: the disk is full, or fails.
    """

    def __init__(self, path: Path, segment_entries: int = SEGMENT_ENTRIES) -> None:
        self.path = path
        self.segment_entries = segment_entries
        self._work: Work | None = None
        self._reader: Any = None
        self._writer: Any = None

    @property
    def place(self) -> str:
        """Where it is, as messages tell it."""
        return str(self.path)

    @property
    def name(self) -> str:
        """What the store remembers it by."""
        return f"archive {self.path.absolute()}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove what is temporary."""
        for database in (self._reader, self._writer):
            if database is not None:
                database.close()
        self._reader = self._writer = None
        if self._work is not None:
            self._work.close()
            self._work = None

    # ── Reading ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def shards(self) -> list[int]:
        """The shards of which there is anything."""
        names = [folder.name.partition("-")[2] for folder in self.path.glob("shard-*")]
        return sorted(int(name) for name in names if name.isdigit())

    def folder(self, shard: int) -> Path:
        """Where a shard's segments are."""
        return self.path / _FOLDER.format(shard)

    def file(self, segment: Segment) -> Path:
        """Where a segment is."""
        return self.folder(segment.shard) / segment.name

    def listed(self, shard: int) -> list[Segment]:
        """Every segment of a shard, by epoch and number."""
        with suppress(FileNotFoundError):
            named = (Segment.named(file.name) for file in self.folder(shard).iterdir())
            return sorted(segment for segment in named if segment is not None and segment.shard == shard)
        return []

    def segments(self, shard: int) -> list[Segment]:
        """The segments of a shard that hold each entry once, in order.

        Raises:
            IntegrityError: a segment in between is missing.
        """
        return self.settled(lambda: self._ways(shard))

    def settled(self, look: Callable[[], T]) -> T:
        """What a look at the files finds, once nobody removes one of them meanwhile."""
        for _ in range(_LOOKS):
            with suppress(VanishedError):
                return look()
        return look()

    def _ways(self, shard: int) -> list[Segment]:
        found = self.listed(shard)
        way: list[Segment] = []
        for epoch in sorted({segment.epoch for segment in found}):
            part = self._way([segment for segment in found if segment.epoch == epoch])
            self._check_begin(part[0], way[-1] if way else None)
            way += part
        return way

    def _check_begin(self, segment: Segment, before: Segment | None) -> None:
        """What the first segment of an epoch follows is there."""
        facts = self.facts(segment)
        follows, there = (facts.follows_epoch, facts.follows_n), (before.epoch, before.last) if before else ("", 0)
        if follows > there:
            first = there[1] + 1 if not before or before.epoch == facts.follows_epoch else 1
            raise _missing(self.folder(segment.shard), segment.shard, first, facts.follows_n)

    def _way(self, found: Sequence[Segment]) -> list[Segment]:
        """The shortest way through the segments of one epoch."""
        end = found[0].first - 1
        reached: dict[int, tuple[int, Segment] | None] = {end: None}  # number: whence, and by which segment
        for segment in found:  # by first number, so that whoever reaches a number first comes from furthest away
            whence = segment.first - 1
            if whence > end:
                if not self._follows(segment, end):
                    raise _missing(self.folder(segment.shard), segment.shard, end + 1, whence)
                whence = end
            if whence in reached:
                reached.setdefault(segment.last, (whence, segment))
                end = max(end, segment.last)
        way: list[Segment] = []
        while (step := reached[end]) is not None:
            end, segment = step
            way.append(segment)
        return way[::-1]

    def _follows(self, segment: Segment, end: int) -> bool:
        """Whether a gap before a segment was there, and accepted, when it was written."""
        facts = self.facts(segment)
        return (facts.follows_epoch, facts.follows_n) == (segment.epoch, end)

    def facts(self, segment: Segment) -> Facts:
        """What a segment's metadata say; they agree with its name."""
        file = self.file(segment)
        facts = facts_of(self.database(), file, Facts)
        told = (facts.epoch, facts.shard, facts.first, facts.last)
        if told != (segment.epoch, segment.shard, segment.first, segment.last):
            raise IntegrityError("damaged", f"{file} is another segment's file: it holds {told[1]}:{told[2]}-{told[3]}")
        return facts

    def behind(self, shard: int, epoch: str, n: int) -> Iterator[list[bytes]]:
        """The lines of a shard behind an entry, in order, in portions."""
        left = [segment for segment in self.segments(shard) if (segment.epoch, segment.last) > (epoch, n)]
        yield from self.lines(left, n if left and left[0].epoch == epoch else 0)

    def between(self, shard: int, first: int, last: int) -> Iterator[list[bytes]]:
        """The lines of a shard with numbers from first to last, of whichever epoch, in portions."""
        for segment in self.segments(shard):
            if segment.first <= last and first <= segment.last:
                for portion in self.lines([segment], first - 1):
                    yield [line for line in portion if number_of(line) <= last]

    def position(self, shard: int) -> Position:
        """How far a shard is archived."""
        return self.settled(lambda: self._end(shard)[0])

    def end(self, shard: int) -> tuple[Position, bytes]:
        """How far a shard is archived, and the line of its last entry, empty if there is none; both of one look.

        Another exporter may have gone on between two of them.
        """
        return self.settled(lambda: self._end(shard))

    def _end(self, shard: int) -> tuple[Position, bytes]:
        segments = self._ways(shard)
        if not segments:
            return Position("", 0, first_link(shard)), b""
        facts = self.facts(segments[-1])
        ((line,),) = self.lines(segments[-1:], facts.last - 1)
        return Position(facts.epoch, facts.last, bytes.fromhex(facts.link)), line

    def lines(self, segments: Iterable[Segment], after: int = 0) -> Iterator[list[bytes]]:
        """The lines of segments, in portions; of the first one only those behind number `after`."""
        for segment in segments:
            yield from lines_of_file(self.database(), self.file(segment), after)
            after = 0

    def entries(self, shard: int) -> Iterator[LedgerEntry]:
        """The entries of a shard, in order."""
        seen = ("", 0)
        for look in range(_LOOKS + 1):
            left = [segment for segment in self.segments(shard) if (segment.epoch, segment.last) > seen]
            after = seen[1] if left and left[0].epoch == seen[0] else 0
            try:
                for portion in self.lines(left, after):
                    for line in portion:
                        entry = entry_from(shard, line)
                        seen = entry.epoch, entry.n
                        yield entry
                return
            except VanishedError:
                if look == _LOOKS:
                    raise

    def database(self) -> Any:
        """A database to read files with."""
        if self._reader is None:
            self._reader = duck.connect()
        return self._reader

    # ── Writing ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def work(self) -> Work:
        """The folder for what is temporary; what killed exporters left there is removed when it is made."""
        if self._work is None:
            self.path.mkdir(parents=True, exist_ok=True)
            self._work = Work(self.path)
        return self._work

    def block_end(self, n: int) -> int:
        """The last number of the block that entry `n` is in."""
        return -(-n // self.segment_entries) * self.segment_entries

    def prepare(self) -> None:
        """Make it ready to be written to."""
        if self._writer is None:
            self._writer = duck.connect(self.work().folder)
            # Each segment needs as much memory as the last one, so what that one leaves is kept and not given back.
            self._writer.execute("SET allocator_flush_threshold = '1GB'")
            self._writer.execute("SET allocator_bulk_deallocation_flush_threshold = '1GB'")

    def draft(self, shard: int, epoch: str, first: int, position: Position) -> FileDraft:
        """A segment that is to follow a position, still without entries."""
        folder = self.folder(shard)
        if not folder.is_dir():
            folder.mkdir(exist_ok=True)
            sync_folder(self.path)
        return FileDraft(self.work(), shard, epoch, first, position)

    def seal(self, draft: FileDraft) -> Segment:
        """Make a segment of a draft: it is in the archive, and on the disk, when this returns."""
        try:
            self.prepare()
            return write(self._writer, draft.file, draft.told(), self.folder(draft.shard), self.work().folder)
        finally:
            draft.discard()

    def finish(self, shard: int) -> None:
        """Join what has become a full block."""
        self.compact(shard)

    def set_aside(self, shard: int, epoch: str, n: int, fields: Fields) -> None:
        """Keep an entry that no bill is to be made of, in a file of its own beside the segments."""
        folder = self.path / ASIDE
        folder.mkdir(parents=True, exist_ok=True)
        scratch = self.work().folder / "aside.json"
        scratch.write_bytes(aside_document(shard, epoch, n, fields))
        synced_digest(scratch)
        publish(scratch, folder / f"{epoch}-{shard:04d}-{n:012d}.json")
        scratch.unlink()

    def compact(self, shard: int, pieces_max: int = PIECES_MAX) -> int:
        """Join the pieces of each full block, and those of the last one if they are more than `pieces_max`.

        Returns:
            How many files were removed.
        """
        blocks: dict[tuple[str, int], list[Segment]] = {}
        for segment in self.segments(shard):
            blocks.setdefault((segment.epoch, self.block_end(segment.first)), []).append(segment)
        for (_, end), pieces in blocks.items():
            for run in self._runs(pieces):
                if len(run) > 1 and (run[-1].last == end or len(run) > pieces_max):
                    with suppress(VanishedError):  # somebody else is at it
                        self._join(run)
        kept = set(self.segments(shard))
        left_over = [segment for segment in self.listed(shard) if segment not in kept]
        for segment in left_over:
            self.file(segment).unlink(missing_ok=True)
        return len(left_over)

    def _runs(self, pieces: Sequence[Segment]) -> list[list[Segment]]:
        """Pieces without a gap between them."""
        runs: list[list[Segment]] = []
        for piece in pieces:
            if runs and runs[-1][-1].last + 1 == piece.first:
                runs[-1].append(piece)
            else:
                runs.append([piece])
        return runs

    def _join(self, pieces: Sequence[Segment]) -> None:
        first, last = (self.facts(piece) for piece in (pieces[0], pieces[-1]))
        position = Position(first.follows_epoch, first.follows_n, bytes.fromhex(first.before))
        draft = self.draft(first.shard, first.epoch, first.first, position)
        unknown = [name for piece in pieces for name in self.facts(piece).unknown]
        try:
            for portion in self.lines(pieces):
                draft.add(portion, unknown)
            if draft.link.hex() != last.link:
                problem = f"the segments from {self.file(pieces[0])} on do not hold what they say"
                raise IntegrityError("damaged", problem)
        except BaseException:  # also one that somebody else has joined meanwhile
            draft.discard()
            raise
        self.seal(draft)


def lines_of_file(database: Any, file: Path, after: int = 0) -> Iterator[list[bytes]]:
    """The lines of a segment's file behind number `after`, in portions.

    Raises:
        IntegrityError: it cannot be read.
        VanishedError: it is gone.
    """
    import duckdb

    try:
        cursor = database.cursor()
        cursor.execute(
            f"SELECT {LINE} FROM read_parquet({duck.quoted(file)}) WHERE n > {after} ORDER BY file_row_number"
        )
        while portion := cursor.fetchmany(_LINES):
            yield [line.encode() for (line,) in portion]
    except duckdb.Error as error:
        raise unreadable(file, error) from None


def _missing(folder: Path, shard: int, first: int, last: int) -> IntegrityError:
    entries = f"{shard}:{first}-{last}" if last > first else f"{shard}:{first}"
    return IntegrityError("damaged", f"{folder} has no segment with entries {entries}: it is missing", (entries,))
