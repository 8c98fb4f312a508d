"""Whether an archive is what was exported, from its files alone: no store, no settings, nobody's word.

Each file is checked by its name (the digest of its bytes), by its metadata (row count, sums, what it follows), by the
chain of digests over every entry, and by making its columns once more from what the ledger said. What a file cannot
tell is that the newest ones were taken away: whoever keeps the links that an earlier check printed can tell by those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from meterlib.billing import duck
from meterlib.billing.archive.archive import Archive, lines_of_file
from meterlib.billing.archive.rows import COUNTS, MADE, SCHEMA, VERBATIM, chained, first_link, made_from
from meterlib.billing.archive.segments import Facts, Segment, digest_of_file
from meterlib.errors import IntegrityError


class ShardVerdict(msgspec.Struct, kw_only=True):
    """What was found of a shard.

    Attributes:
        shard: which.
        segments: how many files were checked.
        entries: how many entries are in them.
        epoch: of the last entry.
        last: its number.
        link: the digest of every entry up to that one; keep it, to tell later that none was taken away or changed.
        epochs: of all entries, in order; more than one if the ledger was begun anew.
        gaps: numbers that no entry has, by decision of whoever exported, as `shard:first-last`.
        unknown: names in entries that no column is made of.
        sums: of the columns of whole numbers.
        problems: what is wrong; empty if nothing is.
    """

    shard: int
    segments: int = 0
    entries: int = 0
    epoch: str = ""
    last: int = 0
    link: str = ""
    epochs: list[str] = []
    gaps: list[str] = []
    unknown: list[str] = []
    sums: dict[str, int] = {}
    problems: list[str] = []


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """What an earlier check found at the end of a shard."""

    shard: int
    epoch: str
    last: int
    link: str


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """A link that somebody has written down: `problem` is what to say if it is not behind that entry."""

    shard: int
    epoch: str
    n: int
    link: str
    problem: str


def verify(
    archive: Archive,
    known: Sequence[Known] = (),
    advance: Callable[[int], None] = lambda count: None,
    marks: Sequence[Mark] = (),
) -> list[ShardVerdict]:
    """Check every shard of an archive; problems are in the verdicts.

    Args:
        archive: where.
        known: what earlier checks found, which must still be there.
        advance: is told how many entries were checked, as it goes.
        marks: links that files made of the archive's entries have, which must be in it.
    """
    marks = [*marks, *(_mark(end) for end in known if end.last)]
    shards = {*archive.shards(), *(end.shard for end in known), *(mark.shard for mark in marks)}
    of_shard = {shard: [mark for mark in marks if mark.shard == shard] for shard in shards}
    return [_ShardCheck(archive, shard, of_shard[shard], advance).verdict() for shard in sorted(shards)]


def _mark(end: Known) -> Mark:
    problem = f"entry {end.shard}:{end.last} of epoch {end.epoch} was there at an earlier check, and is not"
    return Mark(shard=end.shard, epoch=end.epoch, n=end.last, link=end.link, problem=problem)


class _ShardCheck:
    def __init__(self, archive: Archive, shard: int, marks: Sequence[Mark], advance: Callable[[int], None]) -> None:
        self._archive = archive
        self._shard = shard
        self._marks: dict[tuple[str, int], list[Mark]] = {}
        for mark in marks:
            self._marks.setdefault((mark.epoch, mark.n), []).append(mark)
        self._advance = advance
        self._link = first_link(shard)
        self._found = ShardVerdict(shard=shard, sums=dict.fromkeys(COUNTS, 0))
        self._database = duck.connect()

    def verdict(self) -> ShardVerdict:
        found = self._found
        self._foreign_files()
        segments = self._segments()
        for segment in segments:
            try:
                self._check(segment)
            except IntegrityError as error:
                found.problems.append(str(error))
            except duck.failure() as error:
                found.problems.append(f"{self._archive.file(segment)} cannot be read: {str(error).splitlines()[0]}")
            found.segments += 1
            found.epoch, found.last = segment.epoch, segment.last
        found.link = self._link.hex() if found.last else ""
        found.problems += [mark.problem for marks in self._marks.values() for mark in marks]
        self._database.close()
        return found

    def _foreign_files(self) -> None:
        """Files in a shard's folder whose name is no segment's of this shard."""
        folder = self._archive.folder(self._shard)
        for file in sorted(folder.iterdir() if folder.is_dir() else ()):
            segment = Segment.named(file.name)
            if segment is None or segment.shard != self._shard:
                self._found.problems.append(f"{file} is not the name of a segment of shard {self._shard}")

    def _segments(self) -> list[Segment]:
        """The segments to check: those on the way, or all of them if there is none."""
        try:
            return self._archive.segments(self._shard)
        except IntegrityError as error:
            self._found.problems.append(str(error))
            return self._archive.listed(self._shard)

    def _check(self, segment: Segment) -> None:
        file = self._archive.file(segment)
        if digest_of_file(file) != segment.digest:
            raise IntegrityError("damaged", f"{file} is damaged, or not the file of that name: its digest is another")
        facts = self._archive.facts(segment)
        if facts.schema != SCHEMA:
            raise IntegrityError("damaged", f"{file} is of schema {facts.schema}; this version knows {SCHEMA}")
        self._check_place(segment, facts)
        self._link = bytes.fromhex(facts.before)
        self._check_lines(segment, facts)
        self._check_sums(segment, facts)
        self._check_columns(segment)

    def _check_place(self, segment: Segment, facts: Facts) -> None:
        """The segment follows the one before it, or says what it follows in its stead."""
        file, found = self._archive.file(segment), self._found
        if facts.before != self._link.hex():
            found.problems.append(f"{file} does not follow what is before it: the chain of digests is broken there")
        if facts.follows_epoch == segment.epoch and facts.follows_n + 1 < segment.first:
            found.gaps.append(f"{self._shard}:{facts.follows_n + 1}-{segment.first - 1}")
        if segment.epoch not in found.epochs:
            found.epochs = [*found.epochs, segment.epoch]

    def _check_lines(self, segment: Segment, facts: Facts) -> None:
        """The entries are those that were exported: numbers, epoch, and the digest of each."""
        file, n = self._archive.file(segment), segment.first
        for lines in lines_of_file(self._database, file):
            for line in lines:
                parts = line.split(b"\x1f")
                if (parts[0], parts[10]) != (b"%d" % n, segment.epoch.encode()):
                    raise IntegrityError("damaged", f"{file} has another entry where {self._shard}:{n} belongs")
                self._link = chained(self._link, (line,))
                if (marks := self._marks.get((segment.epoch, n))) is not None:
                    marks[:] = [mark for mark in marks if mark.link != self._link.hex()]
                n += 1
            self._advance(len(lines))
        self._found.entries += n - segment.first
        if n != segment.last + 1:
            raise IntegrityError("damaged", f"{file} ends before entry {self._shard}:{n}")
        if self._link.hex() != facts.link:
            raise IntegrityError(
                "damaged", f"{file} does not hold the entries that were exported: their digest is another"
            )

    def _check_sums(self, segment: Segment, facts: Facts) -> None:
        """Row count by kind and sums are those of the metadata."""
        file = self._archive.file(segment)
        columns = ", ".join(f"CAST(coalesce(sum({column}), 0) AS VARCHAR)" for column in COUNTS)
        source = f"read_parquet({duck.quoted(file)})"
        found: Any = self._database.execute(f"SELECT {columns} FROM {source}").fetchone()
        sums = {column: int(total) for column, total in zip(COUNTS, found, strict=True)}
        kinds = dict(self._database.execute(f"SELECT kind, count(*) FROM {source} GROUP BY kind").fetchall())
        if sums != facts.sums or kinds != facts.entries:
            wrong = [name for name, total in (sums | kinds).items() if (facts.sums | facts.entries).get(name) != total]
            raise IntegrityError("damaged", f"{file}: control totals differ: {', '.join(wrong) or 'kinds'}")
        self._found.sums = {column: self._found.sums[column] + total for column, total in sums.items()}
        self._found.unknown = sorted({*self._found.unknown, *facts.unknown})

    def _check_columns(self, segment: Segment) -> None:
        """Columns are what the ledger's words say, in every row."""
        file = self._archive.file(segment)
        verbatim = ", ".join(f"{name} AS {name}" for name in VERBATIM)
        held = ", ".join(f"{name} AS held_{name}" for name in MADE)
        source = f"(SELECT {verbatim}, shard AS held_shard, {held} FROM read_parquet({duck.quoted(file)}))"
        again = made_from(source, ", ".join(["n", "held_shard", *(f"held_{name}" for name in MADE)]))
        differs = " OR ".join(f"{name}::VARCHAR IS DISTINCT FROM held_{name}::VARCHAR" for name in MADE)
        query = f"SELECT n FROM ({again}) WHERE held_shard <> {self._shard} OR {differs} ORDER BY n LIMIT 1"
        wrong = self._database.execute(query).fetchone()
        if wrong is not None:
            raise IntegrityError("damaged", f"{file}: columns of entry {self._shard}:{wrong[0]} are not what it says")
