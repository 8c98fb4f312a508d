"""The rows of some entries as they were posted, and what they were posted with: corrections are rated by that, too.

What is taken back of a call is taken back at the price it had, and what is added costs what it would have cost: list
prices, terms and all are those that the call was rated by, whatever books and settings say by now. If a re-rating
posted rows of the call since, they are those of that re-rating. What of a correction no row of the call is of, such as
another model's pass, is looked up in the books in force.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from meterlib.billing import duck
from meterlib.billing.postings.pieces import Made, RatedFiles, terms_by_tenant, unreadable_one
from meterlib.billing.postings.reposts import Repost, reposts_of
from meterlib.billing.prices.pinned import Key, PinnedBooks, Scale
from meterlib.billing.prices.prices import PriceBooks
from meterlib.billing.prices.terms import Terms
from meterlib.billing.rating.corrections import Corrected, Place, place_of
from meterlib.billing.rating.rated import RatedRow
from meterlib.billing.rating.rating_sql import COLUMNS
from meterlib.billing.rating.rerating import standing

_AT_ONCE = 5_000


class Before(NamedTuple):
    """What stood when entries were rated: files of rated rows, and so many re-ratings."""

    files: RatedFiles
    reposts: int


class Posted(NamedTuple):
    """A row, and the number of the re-rating that posted it; 0 if that was the first rating."""

    rating: int
    row: RatedRow


class Basis(NamedTuple):
    """What a correction is rated by.

    Attributes:
        books: those of its call, and for what that did not need, those in force.
        terms: those of its call; None if it was not rated before, so that those in force hold.
        rows: those that stand of the call and of earlier corrections of it, in the order in which they were posted.
        rating: by which re-rating its call has those terms; 0 if it is as it was rated first.
    """

    books: PriceBooks
    terms: Terms | None
    rows: list[RatedRow]
    rating: int


def bases(
    before: Before, database: Any, shard: int, corrected: Mapping[Place, Corrected], books: PriceBooks
) -> dict[Place, Basis]:
    """What each of these corrections of a shard is, or was, rated by; `books` are those in force then.

    Raises:
        IntegrityError: a file is damaged or missing.
    """
    if not corrected:
        return {}
    places = {place for one in corrected.values() for place in one.places}
    look = before.files.steady(lambda: _Bases(before, database, shard, places))
    return {place: look.basis(one, books) for place, one in corrected.items()}


class _Bases:
    def __init__(self, before: Before, database: Any, shard: int, places: Collection[Place]) -> None:
        files = before.files
        self._reposts = reposts_of(files.path)[: before.reposts]
        self._made = [
            (file.segment.epoch, made)
            for file in files.way(shard)
            if any(e == file.segment.epoch and file.segment.first <= n <= file.segment.last for e, n in places)
            for made in files.facts(file).made
        ]
        self._rows = _posted_rows(files, database, shard, places, self._reposts)

    def basis(self, one: Corrected, books: PriceBooks) -> Basis:
        known = [(place, posted) for place in one.places for posted in self._rows.get(place, ())]
        rating = max((posted.rating for _, posted in known), default=0)
        return Basis(
            books=PinnedBooks(self._scales(known), books),
            terms=self._terms(place_of(one.entry), rating, one.entry.tenant),
            rows=[row for place in one.places for row in standing(row for _, row in self._rows.get(place, ()))],
            rating=rating,
        )

    def _terms(self, call: Place, rating: int, tenant: str) -> Terms | None:
        made = self._made_of(call)
        terms = self._reposts[rating - 1].manifest.terms if rating else made.terms if made is not None else []
        return terms_by_tenant(terms).get(tenant)

    def _made_of(self, place: Place) -> Made | None:
        epoch, n = place
        return next((made for of, made in self._made if of == epoch and made.first <= n <= made.last), None)

    def _scales(self, known: Sequence[tuple[Place, Posted]]) -> Iterator[Scale]:
        """Of all that the rows are of, what whoever posted them last went by; the earliest, where none was re-rated."""
        by: dict[Key, tuple[Place, int]] = {}
        for place, (rating, row) in known:
            key = row.provider, row.model, row.variant, row.geo
            if key not in by or rating > by[key][1]:
                by[key] = place, rating
        for key, (place, rating) in by.items():
            made = self._made_of(place)
            scales = self._reposts[rating - 1].manifest.scales if rating else made.scales if made is not None else []
            yield from (scale for scale in scales if scale.key == key)


def _posted_rows(
    files: RatedFiles, database: Any, shard: int, places: Collection[Place], reposts: Sequence[Repost]
) -> dict[Place, list[Posted]]:
    """What was posted of these entries of a shard, each one's rows in the order in which they were posted."""
    held = [
        (0, file.path)
        for file in files.way(shard)
        if any(e == file.segment.epoch and file.segment.first <= n <= file.segment.last for e, n in places)
    ]
    found: dict[Place, list[Posted]] = {}
    numbers = sorted({n for _, n in places})
    for rating, path in [*held, *((repost.number, path) for repost in reposts for path in repost.paths())]:
        for at in range(0, len(numbers), _AT_ONCE):
            listed = ", ".join(map(str, numbers[at : at + _AT_ONCE]))
            query = (
                f"SELECT {', '.join(COLUMNS)} FROM read_parquet({duck.quoted(path)})"
                f" WHERE shard = {shard} AND n IN ({listed}) ORDER BY n, line"
            )
            try:
                rows = database.execute(query).fetchall()
            except duck.failure() as error:
                raise unreadable_one([path], error) from None
            for row in (RatedRow(**dict(zip(COLUMNS, told, strict=True))) for told in rows):
                if (row.epoch, row.n) in places:
                    found.setdefault((row.epoch, row.n), []).append(Posted(rating, row))
    return found
