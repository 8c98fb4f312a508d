"""Rating what is archived: each entry once, block by block, and for good.

What an entry cost is decided by whoever rates it first; a later price changes nothing about it (see `reratings` for
what to do then). A rater goes on behind the last rated entry, and keeps nothing in mind: it may die at any step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

import meterlib
from meterlib.billing import duck
from meterlib.billing.archive.archive import PIECES_MAX, Archive
from meterlib.billing.archive.rows import LINE, entry_from
from meterlib.billing.archive.segments import Segment, VanishedError
from meterlib.billing.postings.closes import closed_until
from meterlib.billing.postings.pieces import RATED_SCHEMA, Made, RatedFacts, RatedFiles, grouped, stage, unreadable_one
from meterlib.billing.postings.posted import Basis, Before, bases
from meterlib.billing.postings.reposts import reposts_of
from meterlib.billing.prices.pinned import scales_of
from meterlib.billing.prices.prices import PriceBooks
from meterlib.billing.prices.terms import Terms
from meterlib.billing.rating.corrections import Corrected, Earlier, Place, place_of
from meterlib.billing.rating.rating import rate
from meterlib.billing.rating.rating_sql import COLUMNS, SqlRating
from meterlib.core.ledger import LedgerEntry

_AT_ONCE = 5_000


class Prices(msgspec.Struct, frozen=True, kw_only=True):
    """What usage is rated by: the price books in force, and each tenant's terms."""

    books: PriceBooks
    terms_of: Callable[[str], Terms]


class Rated(msgspec.Struct, frozen=True, kw_only=True):
    """What came of rating.

    Attributes:
        entries: how many were rated.
        unpriced: how many rows have no price, by model.
    """

    entries: int = 0
    unpriced: Mapping[str, int] = {}

    def plus(self, other: Rated) -> Rated:
        """Both together."""
        unpriced = dict(self.unpriced)
        for model, rows in other.unpriced.items():
            unpriced[model] = unpriced.get(model, 0) + rows
        return Rated(entries=self.entries + other.entries, unpriced=unpriced)


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """Entries that are rated together: those from `first` to `last` in some segments of one epoch without a gap."""

    shard: int
    first: int
    last: int
    follows: tuple[str, int]
    segments: Sequence[Segment]

    @property
    def epoch(self) -> str:
        """Of all its entries."""
        return self.segments[0].epoch

    def source(self, archive: Archive) -> str:
        """SQL of its entries."""
        files = ", ".join(duck.quoted(archive.file(segment)) for segment in self.segments)
        return f"SELECT * FROM read_parquet([{files}]) WHERE n BETWEEN {self.first} AND {self.last}"


class Rater:
    """Rates what an archive has and is not rated yet; a context manager.

    Args:
        archive: where entries are, and rated rows are put.
        prices: what by.
        advance: is told how many entries were rated, as it goes.

    Raises (when it rates):
        IntegrityError: the archive's files do not fit together.
        OSError: the disk is full, or fails; what was rated before stays.
    """

    def __init__(
        self,
        archive: Archive,
        prices: Prices,
        *,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._archive = archive
        self._files = RatedFiles(archive)
        self._prices = prices
        self._advance = advance
        self._database: Any = None

    def __enter__(self) -> Self:
        self._database = duck.connect(self._archive.work().folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def rate(self, shard: int) -> Rated:
        """Rate what of a shard is not rated yet."""
        done = Rated()
        while (block := self._archive.settled(lambda: next_block(self._archive, self._files, shard))) is not None:
            with suppress(VanishedError):  # the archive was compacted: look again
                done = self._rate(block, done)
        self._files.steady(lambda: self._files.compact(shard, PIECES_MAX))
        return done

    def _rate(self, block: Block, done: Rated) -> Rated:
        """Rate a block, unless somebody else has begun where it begins; what is done with it."""
        link = self._archive.facts(block.segments[-1]).link
        scratch = self._archive.work().folder
        before = Before(self._files, len(reposts_of(self._files.path)))
        closed_ms = closed_until(self._archive.path)
        made = stage_block(self._database, self._archive, block, self._prices, scratch, closed_ms, before)
        facts = RatedFacts(
            schema=RATED_SCHEMA,
            shard=block.shard,
            epoch=block.epoch,
            first=block.first,
            last=block.last,
            follows_epoch=block.follows[0],
            follows_n=block.follows[1],
            link=link,
            sums={},
            made=[made],
        )
        unpriced = unpriced_models(self._database)
        if not self._files.put(self._database, facts):
            return done
        count = block.last - block.first + 1
        self._advance(count)
        return done.plus(Rated(entries=count, unpriced=unpriced))


def next_block(archive: Archive, files: RatedFiles, shard: int, after: Place | None = None) -> Block | None:
    """What is to be rated next of a shard: behind what is rated, or behind an entry; None if all is."""
    if after is None:
        rated = files.way(shard)
        after = (rated[-1].segment.epoch, rated[-1].segment.last) if rated else ("", 0)
    left = [segment for segment in archive.segments(shard) if (segment.epoch, segment.last) > after]
    if not left:
        return None
    first = after[1] + 1 if left[0].epoch == after[0] and left[0].first <= after[1] else left[0].first
    end = archive.block_end(first)
    taken = left[:1]
    for segment in left[1:]:
        if (segment.epoch, segment.first) != (taken[-1].epoch, taken[-1].last + 1) or segment.last > end:
            break
        taken.append(segment)
    return Block(shard=shard, first=first, last=taken[-1].last, follows=after, segments=taken)


def stage_block(
    database: Any,
    archive: Archive,
    block: Block,
    prices: Prices,
    scratch: Path,
    closed_ms: int = 0,
    before: Before | None = None,
) -> Made:
    """Have the rated rows of a block in the database's table `rated`; what they are made with.

    Args:
        database: to work with.
        archive: where the entries are.
        block: which.
        prices: what by.
        scratch: a folder for what is temporary.
        closed_ms: when the last closed period ended, in ms since 1970 UTC; 0 if none is closed.
        before: where corrections find what their calls were rated by; None to rate those by these prices, too.

    Raises:
        VanishedError: the archive was compacted meanwhile.
    """
    try:
        with duck.disk_errors():
            return _stage_block(database, archive, block, prices, scratch, closed_ms, before)
    except duck.failure() as error:
        raise unreadable_one([archive.file(segment) for segment in block.segments], error) from None
    except OSError as error:  # which a file that is gone is, too
        if any(not archive.file(segment).exists() for segment in block.segments):
            raise VanishedError(str(archive.file(block.segments[0]))) from error
        raise


def _stage_block(
    database: Any,
    archive: Archive,
    block: Block,
    prices: Prices,
    scratch: Path,
    closed_ms: int,
    before: Before | None,
) -> Made:
    source = block.source(archive)
    rating = SqlRating(database, source, prices.books, prices.terms_of, carried=["booked_at"])
    segments = [
        segment
        for segment in archive.segments(block.shard)
        if (segment.epoch, segment.first) <= (block.epoch, block.last)
    ]
    earlier = Earlier(archive, database, segments)
    corrections = f"SELECT * FROM ({rating.hard_sql}) WHERE kind = 'adjusted'"
    corrected = earlier.corrected(list(_entries(database, block.shard, corrections)))
    hard = _entries(database, block.shard, rating.hard_sql)
    known = {} if before is None else bases(before, database, block.shard, corrected, prices.books)
    rows = _rated(hard, prices, corrected, known)
    _fill(database, scratch, "rated_hard", {**COLUMNS, "booked_at": "BIGINT"}, rows)
    _fill_touched(database, scratch, _touches(database, source, block, earlier, corrected))
    ((left,),) = database.execute("SELECT count(*) FROM rated_hard").fetchall()
    stage(
        database,
        f"SELECT r.*, greatest(r.booked_at, {closed_ms}) AS booked_at_ms,"
        f" coalesce(t.touches_ms, if(r.booked_at < {closed_ms}, r.booked_at, 0)) AS touches_ms"
        f" FROM ({rating.rows_sql}{' UNION ALL BY NAME SELECT * FROM rated_hard' if left else ''}) r"
        " LEFT JOIN rated_touched t ON r.n = t.n",
    )
    return _made(database, source, block, prices, 0 if before is None else before.reposts)


def _entries(database: Any, shard: int, query: str) -> Iterator[LedgerEntry]:
    """The entries of a relation, in portions; nothing else may be asked of the database meanwhile."""
    database.execute(f"SELECT {LINE} FROM ({query}) ORDER BY n")
    while portion := database.fetchmany(_AT_ONCE):
        for (line,) in portion:
            yield entry_from(shard, line.encode())


def _rated(
    entries: Iterable[LedgerEntry], prices: Prices, corrected: dict[Place, Corrected], known: dict[Place, Basis]
) -> Iterator[dict[str, Any]]:
    """The rows of those entries that SQL leaves to `rate`, by column."""
    for entry in entries:
        found, basis = corrected.get(place_of(entry)), known.get(place_of(entry))
        call = None if found is None else found.entry
        terms = prices.terms_of(entry.tenant) if basis is None or basis.terms is None else basis.terms
        books, posted = (prices.books, []) if basis is None else (basis.books, basis.rows)
        for row in rate(entry, books, terms, corrects=call, posted=posted):
            yield {**{name: getattr(row, name) for name in COLUMNS}, "booked_at": entry.booked_at}


def _fill_touched(database: Any, scratch: Path, touched: dict[int, int]) -> None:
    rows = ({"n": n, "touches_ms": at} for n, at in touched.items())
    _fill(database, scratch, "rated_touched", {"n": "BIGINT", "touches_ms": "BIGINT"}, rows)


def _fill(database: Any, scratch: Path, name: str, columns: dict[str, str], rows: Iterable[dict[str, Any]]) -> None:
    """A table of rows, that go through a file of lines."""
    file = scratch / f"{name}.jsonl"
    encoder = msgspec.json.Encoder(decimal_format="string")
    with file.open("wb") as stream:
        count = 0
        for row in rows:
            stream.write(encoder.encode(row) + b"\n")
            count += 1
    told = ", ".join(f"{column}: {duck.quoted(kind)}" for column, kind in columns.items())
    empty = ", ".join(f"NULL::{kind} AS {column}" for column, kind in columns.items())
    source = _lines_of(file, told) if count else f"(SELECT {empty} WHERE false)"
    database.execute(f"CREATE OR REPLACE TEMP TABLE {name} AS SELECT * FROM {source}")
    file.unlink()


def _lines_of(file: Path, columns: str) -> str:
    return (
        f"read_json({duck.quoted(file)}, columns = {{{columns}}}, format = 'newline_delimited',"
        " maximum_object_size = 16000000)"
    )


def _touches(
    database: Any, source: str, block: Block, earlier: Earlier, corrected: dict[Place, Corrected]
) -> dict[int, int]:
    """When the entries were booked that entries of a block belong to, by number."""
    found = {n: one.touched.booked_at for (_, n), one in corrected.items()}
    late = database.execute(
        f"SELECT n, reservation_id, tenant, reserved_at FROM ({source})"
        " WHERE kind = 'late' AND after IN ('expired', 'cancelled')"
    ).fetchall()
    if late:
        ended = earlier.ended(((block.epoch, n), reservation_id, tenant, at) for n, reservation_id, tenant, at in late)
        found |= {n: booked_at for (_, n), booked_at in ended.items()}
    return found


def unpriced_models(database: Any) -> dict[str, int]:
    """How many rows of the table `rated` have no price, by model."""
    query = "SELECT model, count(*) FROM rated WHERE unpriced <> '' GROUP BY model ORDER BY model"
    return dict(database.execute(query).fetchall())


def _made(database: Any, source: str, block: Block, prices: Prices, reposts: int) -> Made:
    tenants = database.execute(f"SELECT DISTINCT tenant FROM ({source})").fetchall()
    key = "provider, model, variant, geo"
    used = database.execute(
        f"SELECT {key}, min(first_ms), max(last_ms) FROM (SELECT {key}, min(at_ms) AS first_ms, max(at_ms) AS last_ms"
        f" FROM rating_calls GROUP BY ALL UNION ALL SELECT {key}, at_ms, at_ms FROM rated_hard)"
        " GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    return Made(
        first=block.first,
        last=block.last,
        library=meterlib.__version__,
        reposts=reposts,
        terms=grouped({tenant: prices.terms_of(tenant) for (tenant,) in tenants}),
        scales=[scale for *key, first, last in used for scale in scales_of(prices.books, tuple(key), first, last)],
    )
