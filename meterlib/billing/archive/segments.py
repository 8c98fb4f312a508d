"""One segment of an archive: an immutable Parquet file of entries whose name and metadata say what is in it.

    archive/shard-0003/1790000000000-0003-000000000001-000000050000-8c1f09a2b7d4e650.parquet
                       epoch         shard first        last         of the file's SHA-256

A segment comes into being under its name or not at all: it is written to a work folder, synced, linked to its name
(never over another file), and the folder is synced. The same entries give the same bytes, so whoever writes a segment
that is there already finds its own work done.
"""

from __future__ import annotations

import os
import re
from errno import EACCES
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from meterlib.billing import duck
from meterlib.billing.archive.rows import COUNTS, LINE_SIZE, SCHEMA, rows_of_csv
from meterlib.errors import IntegrityError

KEY = "meterlib"
_NAME = re.compile(r"([0-9]{13,})-([0-9]{4,})-([0-9]{12,})-([0-9]{12,})-([0-9a-f]{16})\.parquet")
PARQUET = "COMPRESSION zstd, COMPRESSION_LEVEL 1, DICTIONARY_SIZE_LIMIT 5000, ROW_GROUP_SIZE 1000000"
"""Level 1 takes three quarters of the time of the default level, and for such rows makes smaller files."""

T = TypeVar("T")

_TOTALS = ", ".join(f"CAST(coalesce(sum({column}), 0) AS VARCHAR)" for column in COUNTS)


class Position(NamedTuple):
    """How far a shard is exported: its last entry and the link behind it; `n` is 0 where nothing is."""

    epoch: str
    n: int
    link: bytes


class Segment(msgspec.Struct, frozen=True, order=True):
    """What a segment's name says; `digest` is the first 16 digits of the file's SHA-256."""

    epoch: str
    shard: int
    first: int
    last: int
    digest: str

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.epoch}-{self.shard:04d}-{self.first:012d}-{self.last:012d}-{self.digest}.parquet"

    @classmethod
    def named(cls, name: str) -> Segment | None:
        """The segment of that name; None if the name is none of a segment."""
        match = _NAME.fullmatch(name)
        return cls(match[1], int(match[2]), int(match[3]), int(match[4]), match[5]) if match else None


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a segment's metadata say.

    Attributes:
        schema: version of the columns.
        shard: as in the name; with epoch, first and last.
        follows_epoch: epoch of the entry before the first one; empty if there is none.
        follows_n: its number; 0 if there is none.
        before: the link before the first entry, in hexadecimal: the digest of all that was archived before.
        link: the link behind the last one.
        entries: how many entries there are of each kind.
        sums: the sum of each column of whole numbers.
        unknown: names in the entries that no column is made of; they are in the verbatim columns alone.
    """

    schema: int
    shard: int
    epoch: str
    first: int
    last: int
    follows_epoch: str
    follows_n: int
    before: str
    link: str
    entries: dict[str, int]
    sums: dict[str, int]
    unknown: list[str] = []


class Range(msgspec.Struct, frozen=True, kw_only=True):
    """Lines that are to become a segment, and where they stand; names as in `Facts`."""

    shard: int
    epoch: str
    first: int
    last: int
    follows_epoch: str
    follows_n: int
    before: bytes
    link: bytes
    unknown: list[str]
    size: int  # bytes of all lines, without their ends
    longest: int  # bytes of the longest one


class VanishedError(Exception):
    """A file that was listed is gone: somebody has joined it with others since. Look again."""


def write(database: Any, lines: Path, told: Range, folder: Path, work: Path) -> Segment:
    """Make a segment in `folder` of a file of lines; it is there when this returns, whatever happens then.

    Raises:
        IntegrityError: the columns would not hold what the lines say; nothing was written.
        OSError: the disk is full or fails; the segment may be there, which the next listing tells.
    """
    scratch = work / f"{told.shard}-{told.first}.parquet"
    with duck.disk_errors():
        facts = _stage(database, lines, told)
        metadata = duck.quoted(msgspec.json.encode(facts, order="deterministic").decode())
        database.execute(
            f"COPY segment TO {duck.quoted(scratch)} (FORMAT parquet, {PARQUET}, KV_METADATA {{{KEY}: {metadata}}})"
        )
    segment = Segment(told.epoch, told.shard, told.first, told.last, synced_digest(scratch))
    publish(scratch, folder / segment.name)
    scratch.unlink()
    return segment


def _stage(database: Any, lines: Path, told: Range) -> Facts:
    """Read the lines into a table; what they are, as they stand there."""
    import duckdb

    source = rows_of_csv(str(lines), told.longest)
    try:
        database.execute(f"CREATE OR REPLACE TEMP TABLE segment AS SELECT {told.shard} AS shard, * FROM ({source})")
        held = database.execute(f"SELECT count(*), sum({LINE_SIZE}) FROM segment").fetchone()
    except (duckdb.ConversionException, duckdb.InvalidInputException) as error:
        raise _unfit(told, str(error).partition("\n")[0]) from None
    if held != (told.last - told.first + 1, told.size):
        raise _unfit(told, "the columns would not hold what the entries say")
    sums = database.execute(f"SELECT {_TOTALS} FROM segment").fetchone()
    kinds = database.execute("SELECT kind, count(*) FROM segment GROUP BY kind ORDER BY kind").fetchall()
    return Facts(
        schema=SCHEMA,
        shard=told.shard,
        epoch=told.epoch,
        first=told.first,
        last=told.last,
        follows_epoch=told.follows_epoch,
        follows_n=told.follows_n,
        before=told.before.hex(),
        link=told.link.hex(),
        entries=dict(kinds),
        sums={column: int(total) for column, total in zip(COUNTS, sums, strict=True)},
        unknown=told.unknown,
    )


def _unfit(told: Range, problem: str) -> IntegrityError:
    entries = f"{told.shard}:{told.first}-{told.last}"
    return IntegrityError("unreadable", f"one of the entries {entries} cannot be exported: {problem}", (entries,))


def synced_digest(file: Path) -> str:
    """Bring a file to the disk; the first 16 digits of its SHA-256.

    A sync that failed is not tried again: the kernel may have dropped what it could not write, and would not say so.
    """
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return digest_of_file(file)


def digest_of_file(file: Path) -> str:
    """The first 16 digits of a file's SHA-256."""
    digest = sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()[:16]


def publish(scratch: Path, final: Path) -> None:
    """Give a synced file its name, for good; one of that name that is there already must be the same."""
    try:
        os.link(scratch, final)
    except FileExistsError:
        if final.read_bytes() != scratch.read_bytes():
            raise IntegrityError("damaged", f"{final} is not what its name says: another exporter wrote it") from None
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def facts_of(database: Any, file: Path, kind: type[T]) -> T:
    """What the metadata of a file say: `Facts`, if it is a segment.

    Raises:
        IntegrityError: it is no Parquet file, or none of ours.
        VanishedError: it is gone.
    """
    try:
        found = database.execute(
            f"SELECT value FROM parquet_kv_metadata({duck.quoted(file)}) WHERE key = '{KEY}'"
        ).fetchone()
        return msgspec.json.decode(found[0], type=kind)
    except (duck.failure(), msgspec.MsgspecError, UnicodeDecodeError, TypeError) as error:
        raise unreadable(file, error) from None


def unreadable(file: Path, error: Exception) -> Exception:
    """What to say of a file that DuckDB cannot read."""
    if not file.exists():
        return VanishedError(str(file))
    if not os.access(file, os.R_OK):
        return PermissionError(EACCES, "Permission denied", str(file))
    return IntegrityError("damaged", f"{file} cannot be read as a segment: {str(error).splitlines()[0]}")
