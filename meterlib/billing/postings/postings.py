"""All rated rows of an archive as one relation, for whoever makes bills of them: ratings, re-ratings and corrections.

Rows are never changed, so what a bill says of a period is a matter of which rows belong to it. A row belongs to the
month in which its entry was booked. Once that month is closed, what still changes about it is posted in a later one,
and says which month it corrects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from meterlib.billing import duck
from meterlib.billing.archive.archive import Archive
from meterlib.billing.archive.rows import COUNTS, MADE, VERBATIM
from meterlib.billing.archive.segments import VanishedError, unreadable
from meterlib.billing.months import month_at, month_sql, months
from meterlib.billing.postings.closes import Close, closes_of
from meterlib.billing.postings.pieces import STORED, RatedFiles
from meterlib.billing.postings.reposts import Repost, reposts_of
from meterlib.errors import PolicyError

T = TypeVar("T")

ENTRY_COLUMNS = (
    {"shard": "INTEGER"}
    | VERBATIM
    | dict.fromkeys(MADE, "VARCHAR")
    | dict.fromkeys(COUNTS, "BIGINT")
    | dict.fromkeys(("attributes", "iterations", "amounts", "facts"), "JSON")
)
_LOOKS = 10


class Postings:
    """Rated rows and entries of an archive, as they are when this is made, or `refresh` is called.

    Args:
        archive: where.
        tz: the zone that billing periods are months of.

    Attributes:
        closes: the closed periods, in order.
        reposts: the re-ratings, in order.

    Raises:
        PolicyError: periods were closed in another zone.
        IntegrityError: the archive's files do not fit together.
    """

    def __init__(self, archive: Archive, tz: str = "UTC") -> None:
        self.archive = archive
        self.tz = tz
        self.refresh()

    def refresh(self) -> None:
        """Look at the files anew."""
        files = RatedFiles(self.archive)
        self.closes: Sequence[Close] = closes_of(self.archive.path)
        for close in self.closes:
            if close.tz != self.tz:
                problem = f"{close.period} was closed in {close.tz!r}; the zone of periods cannot change after that"
                raise PolicyError("billing.tz", problem)
        self.reposts: Sequence[Repost] = reposts_of(files.path)
        self.rated = files.steady(lambda: {shard: files.way(shard) for shard in files.shards()})
        self.segments = {shard: self.archive.segments(shard) for shard in self.archive.shards()}

    def upto(self) -> dict[int, int]:
        """The number of the last rated entry of each shard that has entries; 0 where none is rated."""
        known = sorted({*self.segments, *self.rated})
        return {shard: rated[-1].segment.last if (rated := self.rated.get(shard)) else 0 for shard in known}

    def count(self) -> int:
        """About how many entries are archived; numbers that are lost for good count, too."""
        return sum(one.last - one.first + 1 for segments in self.segments.values() for one in segments)

    def unrated(self) -> dict[int, int]:
        """How many archived entries of each shard are not rated yet; shards without any are left out."""
        found = {}
        for shard, segments in self.segments.items():
            rated = self.rated.get(shard)
            end = (rated[-1].segment.epoch, rated[-1].segment.last) if rated else ("", 0)
            behind = [segment for segment in segments if (segment.epoch, segment.last) > end]
            count = sum(segment.last - segment.first + 1 for segment in behind)
            if behind and behind[0].epoch == end[0] and behind[0].first <= end[1]:
                count -= end[1] - behind[0].first + 1
            if count:
                found[shard] = count
        return found

    def files(self) -> list[Path]:
        """The files of first ratings."""
        return [file.path for rated in self.rated.values() for file in rated]

    def entries_sql(self) -> str:
        """SQL of all archived entries, in no order: the columns of `rows.VERBATIM` and `rows.MADE`, and `shard`."""
        files = [self.archive.file(segment) for segments in self.segments.values() for segment in segments]
        return _of_files(files, ENTRY_COLUMNS)

    def rows_sql(self) -> str:
        """SQL of all rated rows, re-ratings included, in no order.

        Columns are those of `rating_sql.COLUMNS`, and `booked_at_ms` and `touches_ms` (see `pieces.STORED`), `rating`
        (0, or the number of the re-rating), `posted_at_ms` (`booked_at_ms`, or when the re-rating was posted), `period`
        (the month that the row belongs to, such as `2026-10`) and `corrects` (the closed month that it corrects, else
        empty).
        """
        files = self.files()
        firsts = _of_files(files, STORED)
        known = self._months()
        made = [f"SELECT *, 0 AS rating, booked_at_ms AS posted_at_ms, {self._first_periods(known)} FROM ({firsts})"]
        for repost in self.reposts:
            if not repost.files:
                continue
            rows = _of_files(repost.paths(), STORED)
            made.append(
                f"SELECT *, {repost.number} AS rating, {repost.posted_at_ms}::BIGINT AS posted_at_ms,"
                f" {self._repost_periods(repost, known)} FROM ({rows})"
            )
        return " UNION ALL BY NAME ".join(made)

    def _months(self) -> list[Any]:
        """All months that a row may have to do with."""
        moments = [moment for close in self.closes for moment in (close.from_ms, close.until_ms)]
        moments += [repost.posted_at_ms for repost in self.reposts]
        if files := self.files():
            database = self.archive.database()
            listed = ", ".join(duck.quoted(file) for file in files)
            found = self._read(
                lambda: database.execute(
                    "SELECT min(stats_min_value::BIGINT), max(stats_max_value::BIGINT)"
                    f" FROM parquet_metadata([{listed}]) WHERE path_in_schema = 'booked_at_ms' AND num_values > 0"
                ).fetchone()
            )
            moments += [moment for moment in found if moment is not None]
        return months(self.tz, min(moments), max(moments)) if moments else [month_at(self.tz, 0)]

    def _read(self, look: Callable[[], T]) -> T:
        try:
            return look()
        except duck.failure() as error:
            gone = [file for file in self.files() if not file.exists()]
            if gone:
                raise VanishedError(str(gone[0])) from error
            raise

    def _first_periods(self, known: list[Any]) -> str:
        """Columns `period` and `corrects` of first ratings: an entry's own month, and that of the one it touches."""
        return f"{month_sql(known, 'booked_at_ms')} AS period, {self._touched(known)} AS corrects"

    def _touched(self, known: list[Any]) -> str:
        if not self.closes:
            return "''"
        first_ms, end_ms = self.closes[0].from_ms, self.closes[-1].until_ms
        touched, own = month_sql(known, "touches_ms"), month_sql(known, "booked_at_ms")
        closed = f"touches_ms >= {first_ms} AND touches_ms < {end_ms}"
        return f"CASE WHEN {closed} AND {touched} <> {own} THEN {touched} ELSE '' END"

    def _repost_periods(self, repost: Repost, known: list[Any]) -> str:
        """The same columns of a re-rating: months that were closed without it are corrected in a later one."""
        without = [close for close in self.closes if close.reposts < repost.number]
        if not without:
            return self._first_periods(known)
        own = month_sql(known, "booked_at_ms")
        later = month_at(self.tz, max(repost.posted_at_ms, without[-1].until_ms)).label
        closed = f"booked_at_ms >= {without[0].from_ms} AND booked_at_ms < {without[-1].until_ms}"
        return (
            f"CASE WHEN {closed} THEN '{later}' ELSE {own} END AS period,"
            f" CASE WHEN {closed} THEN {own} ELSE {self._touched(known)} END AS corrects"
        )

    def steady(self, look: Callable[[], T]) -> T:
        """What a look at the relations finds, once nobody removes one of their files meanwhile.

        The look has to ask for `rows_sql()` and `entries_sql()` itself, since they may name other files then.
        """
        for _ in range(_LOOKS):
            with suppress(VanishedError):
                return self._looked(look)
            self.refresh()
        return self._looked(look)

    def _looked(self, look: Callable[[], T]) -> T:
        try:
            return look()
        except (duck.failure(), OSError) as error:
            named = [self.archive.file(segment) for segments in self.segments.values() for segment in segments]
            files = (*self.files(), *named)
            if any(not file.exists() for file in files):
                raise VanishedError(str(error)) from error
            for file in files:
                if f"'{file}'" in str(error) or f'"{file}"' in str(error):
                    raise unreadable(file, error) from None
            raise


def _of_files(files: Sequence[Path], columns: dict[str, str]) -> str:
    """SQL of the columns of files; of none, of no rows of these types."""
    if files:
        return f"SELECT {', '.join(columns)} FROM read_parquet([{', '.join(duck.quoted(file) for file in files)}])"
    return f"SELECT {', '.join(f'NULL::{kind} AS {name}' for name, kind in columns.items())} WHERE false"
