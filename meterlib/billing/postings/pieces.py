"""Files of rated rows: immutable, each for a range of entries, and for each beginning of a range only one can stand.

    archive/rated/shard-0003/1790000000000-0003-000000000001/1790000000000-0003-000000000001-000000050000-8c1f….parquet
                             epoch         shard first       the piece: first and last entry, digest of the file

What an entry cost is decided once, by whoever first puts down a piece for it. A piece begins right behind the one
before it, and comes into being by renaming its folder, whose name tells where it begins and nothing else: so of two
raters that were about to rate the same entries one finds the name taken, whatever its prices and however far it wanted
to go, and goes on behind what the other one rated. Nobody needs a lock, and the listing is the checkpoint.

Pieces are joined like the archive's segments, into a file beside their folders that tells its own range; then they are
removed. A joined file goes before a piece. That matters to a rater that was asleep since before its piece was rated by
another, joined and removed: it finds the name free again, but what it puts there is passed by.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from meterlib.billing import duck
from meterlib.billing.archive.archive import Archive
from meterlib.billing.archive.segments import (
    KEY,
    PARQUET,
    Segment,
    VanishedError,
    facts_of,
    publish,
    sync_folder,
    synced_digest,
    unreadable,
)
from meterlib.billing.prices.pinned import Scale, united
from meterlib.billing.prices.terms import Terms
from meterlib.billing.rating.rating_sql import COLUMNS
from meterlib.core.money import ZERO, plus
from meterlib.errors import IntegrityError

RATED_SCHEMA = 3
FOLDER = "rated"
STORED = {**COLUMNS, "booked_at_ms": "BIGINT", "touches_ms": "BIGINT"}
"""Columns of a file of rated rows.

`booked_at_ms` is when the entry was booked, or the first moment behind the last closed period, if a clock that was set
back booked it within that. `touches_ms` is when the entry was booked that a correction or a late usage belongs to, or
when the clock said that an entry was booked; 0 for others.
"""
_SUMS = ("quantity", "list_cost", "contracted_cost", "billed_cost", "upstream_cost")
_LOOKS = 10

T = TypeVar("T")


class TermsOf(msgspec.Struct, frozen=True, kw_only=True):
    """The terms that some tenants had."""

    tenants: list[str]
    terms: Terms


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """What rows of a range of entries were made with.

    Attributes:
        first: entry of the range; so `last`.
        library: the version of meterlib.
        reposts: how many re-ratings had been posted by then; corrections go by those and none after them.
        terms: those in force, of the tenants that have entries in the range. A correction's are those of its call.
        scales: what the books in force said of all that rows are of. A correction may have the prices of its call.
    """

    first: int
    last: int
    library: str
    reposts: int = 0
    terms: list[TermsOf]
    scales: list[Scale] = []


class RatedFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the metadata of a file of rated rows say.

    Attributes:
        schema: version of the columns.
        shard: as in the name; with epoch, first and last: the entries that the rows are of.
        follows_epoch: of the last entry that was rated before; with `follows_n`; empty and 0 if there is none.
        link: the archive's link behind the last entry: the rows are of these entries, and of no others.
        sums: control totals.
        made: what the rows were made with, by range.
    """

    schema: int
    shard: int
    epoch: str
    first: int
    last: int
    follows_epoch: str
    follows_n: int
    link: str
    sums: dict[str, str]
    made: list[Made]


class RatedFile(NamedTuple):
    """A file of rated rows: what its name says, and where it is."""

    segment: Segment
    path: Path
    joined: bool


class RatedFiles:
    """The files of rated rows of an archive.

    Raises (whatever reads or writes):
        IntegrityError: they do not fit together; the message names the file.
        VanishedError: one of them was joined with others meanwhile; look again.
        OSError: the disk is full, or fails.
    """

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        self.path = archive.path / FOLDER

    # ── Reading ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def shards(self) -> list[int]:
        """The shards of which anything is rated."""
        names = [folder.name.partition("-")[2] for folder in self.path.glob("shard-*")]
        return sorted(int(name) for name in names if name.isdigit())

    def folder(self, shard: int) -> Path:
        """Where a shard's files are."""
        return self.path / f"shard-{shard:04d}"

    def listed(self, shard: int) -> list[RatedFile]:
        """Every file of a shard, by epoch and number.

        Two listings have to agree: one alone may miss a joined file and still show what it made obsolete.
        """
        found = self._listing(shard)
        while (again := self._listing(shard)) != found:
            found = again
        return found

    def _listing(self, shard: int) -> list[RatedFile]:
        found: list[RatedFile] = []
        with suppress(FileNotFoundError):
            for place in self.folder(shard).iterdir():
                if (segment := Segment.named(place.name)) is not None:
                    found.append(RatedFile(segment, place, joined=True))
                    continue
                with suppress(FileNotFoundError, NotADirectoryError):
                    named = [(Segment.named(file.name), file) for file in place.iterdir()]
                    found += [
                        RatedFile(segment, file, joined=False)
                        for segment, file in named
                        if segment is not None and place.name == place_of(segment.epoch, segment.shard, segment.first)
                    ]
        return sorted(file for file in found if file.segment.shard == shard)

    def way(self, shard: int) -> list[RatedFile]:
        """The files of a shard that hold the rows of each entry once, in order.

        Raises:
            IntegrityError: one in between is missing.
        """
        starts: dict[tuple[str, int], RatedFile] = {}
        for file in self.listed(shard):
            at = file.segment.epoch, file.segment.first
            starts[at] = max(starts.get(at, file), file, key=lambda one: (one.joined, one.segment))
        way: list[RatedFile] = []
        end = ("", 0)
        for (epoch, first), file in sorted(starts.items()):
            if (epoch, first) <= end:
                continue
            if (epoch, first) != (end[0], end[1] + 1):
                self._check_follows(file, end)
            way.append(file)
            end = epoch, file.segment.last
        return way

    def _check_follows(self, file: RatedFile, end: tuple[str, int]) -> None:
        facts = self.facts(file)
        if (facts.follows_epoch, facts.follows_n) != end:
            shard = file.segment.shard
            lacks = f"{shard}:{facts.follows_n}" if facts.follows_n else f"{shard}:{file.segment.first - 1}"
            raise IntegrityError(
                "damaged",
                f"{self.folder(shard)} has no file with the rated rows up to entry {lacks}: it is missing",
                (lacks,),
            )

    def facts(self, file: RatedFile) -> RatedFacts:
        """What a file's metadata say; they agree with its name."""
        facts = facts_of(self.archive.database(), file.path, RatedFacts)
        segment = file.segment
        told = (facts.epoch, facts.shard, facts.first, facts.last)
        if told != (segment.epoch, segment.shard, segment.first, segment.last):
            held = f"{told[1]}:{told[2]}-{told[3]}"
            raise IntegrityError("damaged", f"{file.path} is another one's file: it holds rows of {held}")
        if facts.schema != RATED_SCHEMA:
            raise of_another_version(file.path, facts.schema, RATED_SCHEMA)
        return facts

    def steady(self, look: Callable[[], T]) -> T:
        """What a look at the files finds, once nobody removes one of them meanwhile."""
        for _ in range(_LOOKS):
            with suppress(VanishedError):
                return look()
        return look()

    # ── Writing ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def put(self, database: Any, facts: RatedFacts) -> bool:
        """Make a piece of the rows in the table `rated`; False if another rater has rated these entries already."""
        draft = self.archive.work().folder / f"rated-{facts.shard}-{facts.first}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        try:
            segment = write(database, facts, draft)
            folder = self._made_folder(facts.shard)
            sync_folder(draft)
            taken = not _renamed(draft, folder / place_of(segment.epoch, segment.shard, segment.first))
            sync_folder(folder)
            return not taken
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _made_folder(self, shard: int) -> Path:
        folder = self.folder(shard)
        for one in (self.path, folder):
            if not one.is_dir():
                one.mkdir(exist_ok=True)
                sync_folder(one.parent)
        return folder

    def compact(self, shard: int, pieces_max: int) -> int:
        """Join the pieces of each full block, and those of the last one if they are more than `pieces_max`.

        Returns:
            How many files were removed.
        """
        blocks: dict[tuple[str, int], list[RatedFile]] = {}
        for file in self.way(shard):
            blocks.setdefault((file.segment.epoch, self.archive.block_end(file.segment.first)), []).append(file)
        for (_, end), pieces in blocks.items():
            for run in runs_of(pieces):
                if len(run) > 1 and (run[-1].segment.last == end or len(run) > pieces_max):
                    with suppress(VanishedError):  # somebody else is at it
                        self._join(run)
        kept = set(self.way(shard))
        left_over = [file for file in self.listed(shard) if file not in kept]
        for file in left_over:
            file.path.unlink(missing_ok=True)
            if not file.joined:
                with suppress(OSError):
                    file.path.parent.rmdir()
        return len(left_over)

    def _join(self, pieces: Sequence[RatedFile]) -> None:
        facts = [self.facts(piece) for piece in pieces]
        database = duck.connect(self.archive.work().folder)
        try:
            names = ", ".join(duck.quoted(piece.path) for piece in pieces)
            joined = msgspec.structs.replace(
                facts[0],
                last=facts[-1].last,
                link=facts[-1].link,
                sums={name: _plus([one.sums[name] for one in facts]) for name in facts[0].sums},
                made=merged([made for one in facts for made in one.made]),
            )
            scratch = self.archive.work().folder
            try:
                stage(database, f"SELECT * FROM read_parquet([{names}])")
                segment = write(database, joined, scratch)
            except duck.failure() as error:
                raise unreadable_one([piece.path for piece in pieces], error) from None
            publish(scratch / segment.name, self.folder(segment.shard) / segment.name)
            (scratch / segment.name).unlink()
        finally:
            database.close()


def place_of(epoch: str, shard: int, first: int) -> str:
    """The folder's name of the piece that begins with an entry."""
    return f"{epoch}-{shard:04d}-{first:012d}"


def stage(database: Any, rows: str) -> None:
    """Have rated rows in the table `rated`, of the types that they are stored in."""
    # Texts stay as they are: what has few values is an ENUM, and written much faster; in a file there is no difference.
    columns = ", ".join(name if kind == "VARCHAR" else f"{name}::{kind} AS {name}" for name, kind in STORED.items())
    database.execute(f"CREATE OR REPLACE TEMP TABLE rated AS SELECT {columns} FROM ({rows})")


def write(database: Any, facts: RatedFacts, folder: Path) -> Segment:
    """Write the table `rated` into a folder, under its name, synced; its sums have to be those of the facts."""
    scratch = folder / f"{facts.shard}-{facts.first}.parquet"
    with duck.disk_errors():
        sums = sums_of(database, "rated")
        if facts.sums and sums != facts.sums:
            raise IntegrityError("damaged", f"the rated rows of {facts.shard}:{facts.first} on are not what they say")
        told = msgspec.json.encode(msgspec.structs.replace(facts, sums=sums), order="deterministic").decode()
        database.execute(
            f"COPY rated TO {duck.quoted(scratch)} (FORMAT parquet, {PARQUET},"
            f" KV_METADATA {{{KEY}: {duck.quoted(told)}}})"
        )
        database.execute("DROP TABLE rated")
    segment = Segment(facts.epoch, facts.shard, facts.first, facts.last, synced_digest(scratch))
    scratch.rename(folder / segment.name)
    return segment


def sums_of(database: Any, source: str) -> dict[str, str]:
    """Control totals of rated rows."""
    sums = ", ".join(f"CAST(coalesce(sum({name}), 0) AS VARCHAR)" for name in _SUMS)
    found = database.execute(
        f"SELECT CAST(count(*) AS VARCHAR), CAST(count(*) FILTER (unpriced <> '') AS VARCHAR), {sums} FROM {source}"
    ).fetchone()
    return dict(zip(("rows", "unpriced", *_SUMS), found, strict=True))


def of_another_version(file: Path, schema: int, known: int) -> IntegrityError:
    """What to say of a file that says too little, or more than is known here: nothing is made of it or added to it."""
    return IntegrityError(
        "damaged",
        f"{file} is of schema {schema}, which another version of meterlib wrote; this one knows {known}. Go on with"
        f" that version; or move the archive's folders {FOLDER} and closes away, have all rated anew by the prices"
        " and terms in force (meterlib rate), and close its months again",
    )


def unreadable_one(files: Sequence[Path], error: Exception) -> Exception:
    """What to say where one of several files cannot be read."""
    gone = [file for file in files if not file.exists()]
    return VanishedError(str(gone[0])) if gone else unreadable(files[0], error)


def merged(several: Sequence[Made]) -> list[Made]:
    """Ranges that were made with the same things become one."""
    found: list[Made] = []
    for made in several:
        last = found[-1] if found else None
        both = _of_both(last, made) if last is not None else None
        if both is None:
            found.append(made)
        else:
            found[-1] = both
    return found


def _of_both(one: Made, other: Made) -> Made | None:
    """One range in place of two; None if they were made with different things."""
    terms, scales = _terms_of_both(one.terms, other.terms), united(one.scales, other.scales)
    alike = (one.library, one.reposts) == (other.library, other.reposts)
    if not alike or terms is None or scales is None:
        return None
    return msgspec.structs.replace(one, last=other.last, terms=terms, scales=scales)


def terms_by_tenant(several: Sequence[TermsOf]) -> dict[str, Terms]:
    """The terms of each tenant."""
    return {tenant: one.terms for one in several for tenant in one.tenants}


def grouped(terms: dict[str, Terms]) -> list[TermsOf]:
    """The same, the tenants of equal terms together."""
    groups: dict[Terms, list[str]] = {}
    for tenant, own in sorted(terms.items()):
        groups.setdefault(own, []).append(tenant)
    return [TermsOf(tenants=tenants, terms=own) for own, tenants in groups.items()]


def _terms_of_both(one: Sequence[TermsOf], other: Sequence[TermsOf]) -> list[TermsOf] | None:
    """The terms of the tenants of both; None if a tenant had others."""
    mine, others = terms_by_tenant(one), terms_by_tenant(other)
    if any(mine.get(tenant, own) != own for tenant, own in others.items()):
        return None
    return grouped(mine | others)


def runs_of(files: Sequence[RatedFile]) -> list[list[RatedFile]]:
    """Files without a gap between them."""
    runs: list[list[RatedFile]] = []
    for file in files:
        if runs and runs[-1][-1].segment.last + 1 == file.segment.first:
            runs[-1].append(file)
        else:
            runs.append([file])
    return runs


def _plus(numbers: Sequence[str]) -> str:
    total = ZERO
    for number in numbers:
        total = plus(total, Decimal(number))
    return f"{total:f}"


def _renamed(draft: Path, place: Path) -> bool:
    """Give a folder its name for good; False if one of that name is there."""
    try:
        os.rename(draft, place)  # noqa: PTH104
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True
