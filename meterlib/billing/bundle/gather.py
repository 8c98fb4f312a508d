"""What belongs into a bundle, from an archive: the rows of a tenant and period, and all that they are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import msgspec

from meterlib.billing.archive.rows import LINE, VERBATIM, entry_from
from meterlib.billing.bundle.bundle import ROW_COLUMNS, Bundle, Held, StatedClose, StatedPrice, StatedTerms
from meterlib.billing.duck import quoted
from meterlib.billing.postings.closes import Close
from meterlib.billing.postings.pieces import RatedFiles, TermsOf, terms_by_tenant
from meterlib.billing.postings.posted import Before, bases
from meterlib.billing.postings.postings import Postings
from meterlib.billing.prices.pinned import Scale
from meterlib.billing.prices.prices import PriceBooks, Rate
from meterlib.billing.prices.terms import Terms
from meterlib.billing.rating.corrections import Earlier, Place
from meterlib.billing.reports.invoice import Invoice

_PAGE = 5_000


def gather(connection: Any, postings: Postings, invoice: Invoice) -> Bundle:
    """All that belongs to an invoice; rows and entries are read as they are written.

    Args:
        connection: of DuckDB; two tables are left in it.
        postings: of the archive.
        invoice: of a tenant and period, from the same look at the archive.
    """
    whose = f"tenant = {quoted(invoice.tenant)}"
    rows = f"SELECT * FROM ({postings.rows_sql()}) WHERE {whose} AND period = {quoted(invoice.period)}"
    _make_keys(connection, postings.entries_sql(), rows, whose)
    pinned = _pinned(postings)
    close = next((close for close in postings.closes if close.period == invoice.period), None)
    return Bundle(
        invoice=invoice,
        rows=_rows(connection, rows),
        entries=_entries(connection, postings.entries_sql(), whose),
        prices=_prices(connection, rows, pinned),
        terms=_terms(connection, postings, rows, pinned, invoice.tenant),
        close=None if close is None else _stated(close, invoice.tenant),
    )


def _make_keys(connection: Any, entries: str, rows: str, whose: str) -> None:
    """A table of the entries that rows are of, those that corrections among them are about, and their corrections."""
    connection.execute(
        "CREATE OR REPLACE TABLE bundle_keys AS"
        f" SELECT DISTINCT epoch, shard, n, kind = 'adjusted' AS adjusted FROM ({rows})"
    )
    adjusted = f"SELECT epoch, shard, n, adjusts FROM ({entries}) WHERE kind = 'adjusted' AND {whose}"
    connection.execute(f"CREATE OR REPLACE TABLE bundle_corrections AS {adjusted}")
    more = (
        "SELECT DISTINCT e.epoch, e.shard, e.n, e.kind = 'adjusted' AS adjusted"
        f" FROM (SELECT epoch, shard, n, kind, coalesce(adjusts, '') AS adjusts FROM ({entries}) WHERE {whose}) e"
        " JOIN (SELECT c.* FROM bundle_corrections c SEMI JOIN bundle_keys USING (epoch, shard, n)) k"
        " ON e.shard = k.shard AND (concat(e.shard, ':', e.n) = k.adjusts"
        " OR (e.adjusts = k.adjusts AND e.kind = 'adjusted'))"
        " ANTI JOIN bundle_keys b ON (b.epoch, b.shard, b.n) = (e.epoch, e.shard, e.n)"
    )
    while connection.execute(f"INSERT INTO bundle_keys {more}").fetchone()[0]:
        pass


def _rows(connection: Any, rows: str) -> Iterator[Sequence[Any]]:
    cursor = connection.cursor()
    columns = ", ".join(ROW_COLUMNS)
    cursor.execute(f"SELECT {columns} FROM ({rows}) ORDER BY epoch, shard, n, line")
    while page := cursor.fetchmany(_PAGE):
        yield from page


def _entries(connection: Any, entries: str, whose: str) -> Iterator[Mapping[str, Any]]:
    names = ("shard", *VERBATIM)
    cursor = connection.cursor()
    cursor.execute(
        f"SELECT {', '.join(names)} FROM ({entries}) SEMI JOIN bundle_keys USING (epoch, shard, n) WHERE {whose}"
        " ORDER BY epoch, shard, n"
    )
    while page := cursor.fetchmany(_PAGE):
        for row in page:
            yield {name: "" if value is None else value for name, value in zip(names, row, strict=True)}


def _prices(connection: Any, rows: str, pinned: Sequence[_Pinned]) -> list[StatedPrice]:
    """Each price that rows name, as it was written down when they were rated."""
    used = connection.execute(f"SELECT DISTINCT price_digest FROM ({rows}) WHERE price_digest <> '' ORDER BY ALL")
    rates: dict[str, Rate] = {}
    held: dict[str, set[tuple[int, int, tuple[int, ...]]]] = {}
    for scale in (scale for one in pinned for scale in one.scales):
        for rate in scale.rates:
            rates[rate.digest] = rate
            tiers = tuple(each.above for each in scale.rates)
            held.setdefault(rate.digest, set()).add((scale.from_ms, scale.until_ms, tiers))
    return [_stated_price(digest, rates.get(digest), held.get(digest, set())) for (digest,) in used.fetchall()]


def _stated_price(digest: str, rate: Rate | None, held: set[tuple[int, int, tuple[int, ...]]]) -> StatedPrice:
    if rate is None:
        return StatedPrice(digest=digest, found=False)
    told: dict[str, Any] = {name: getattr(rate, name) for name in Rate.__struct_fields__} | {
        "prices": dict(rate.prices)
    }
    for_calls = [Held(from_ms=since, until_ms=until, tiers=list(tiers)) for since, until, tiers in sorted(held)]
    return StatedPrice(digest=digest, found=True, held=for_calls, **told | {"prices": dict(rate.prices)})


class _Pinned(NamedTuple):
    """What rows were made with: those of a range of entries of a shard, or those of a re-rating."""

    rating: int
    epoch: str
    shard: int
    first: int
    last: int
    reposts: int
    terms: Sequence[TermsOf]
    scales: Sequence[Scale]


def _pinned(postings: Postings) -> list[_Pinned]:
    files = RatedFiles(postings.archive)
    found = [
        _Pinned(0, file.segment.epoch, shard, made.first, made.last, made.reposts, made.terms, made.scales)
        for shard, rated in postings.rated.items()
        for file in rated
        for made in files.facts(file).made
    ]
    told = [(repost.number, repost.manifest) for repost in postings.reposts]
    return found + [_Pinned(number, "", 0, 0, 0, 0, manifest.terms, manifest.scales) for number, manifest in told]


def _terms(connection: Any, postings: Postings, rows: str, pinned: Sequence[_Pinned], tenant: str) -> list[StatedTerms]:
    """The tenant's terms, by the entries that its rows are of, and of re-ratings; corrections have those of calls."""
    keys = connection.execute("SELECT DISTINCT epoch, shard, n FROM bundle_keys ORDER BY ALL").fetchall()
    found: list[StatedTerms] = []
    for one in pinned:
        own = terms_by_tenant(one.terms).get(tenant)
        if own is None:
            continue
        if one.rating:
            found.append(_stated_terms(own, rating=one.rating))
            continue
        place = (one.epoch, one.shard)
        mine = [n for epoch, of, n in keys if (epoch, of) == place and one.first <= n <= one.last]
        if mine:
            found.append(_stated_terms(own, epoch=one.epoch, shard=one.shard, first=min(mine), last=max(mine)))
    return found + list(_kept_terms(connection, postings, rows, pinned))


def _kept_terms(connection: Any, postings: Postings, rows: str, pinned: Sequence[_Pinned]) -> Iterator[StatedTerms]:
    """The terms of each correction that rows of a first rating are of."""
    files = RatedFiles(postings.archive)
    lines = (
        f"SELECT shard, {LINE} FROM ({postings.entries_sql()}) SEMI JOIN (SELECT epoch, shard, n FROM ({rows})"
        " WHERE kind = 'adjusted' AND rating = 0) USING (epoch, shard, n) ORDER BY epoch, shard, n"
    )
    entries = [entry_from(shard, line.encode()) for shard, line in connection.execute(lines).fetchall()]
    for shard, several in groupby(sorted(entries, key=lambda one: one.shard), key=lambda one: one.shard):
        earlier = Earlier(postings.archive, connection, postings.segments[shard])
        corrected = earlier.corrected(list(several))
        for reposts, places in _by_reposts(corrected, shard, pinned).items():
            mine = {place: corrected[place] for place in places}
            for place, basis in bases(Before(files, reposts), connection, shard, mine, PriceBooks()).items():
                call = corrected[place].entry
                if basis.terms is not None:
                    yield _stated_terms(
                        basis.terms,
                        epoch=place[0],
                        shard=shard,
                        first=place[1],
                        last=place[1],
                        corrects=f"{shard}:{call.n}",
                        rerated=basis.rating,
                    )


def _by_reposts(corrected: Iterable[Place], shard: int, pinned: Sequence[_Pinned]) -> dict[int, list[Place]]:
    """Corrections by how many re-ratings there were when they were rated."""
    found: dict[int, list[Place]] = {}
    for epoch, n in corrected:
        for one in pinned:
            if (one.rating, one.epoch, one.shard) == (0, epoch, shard) and one.first <= n <= one.last:
                found.setdefault(one.reposts, []).append((epoch, n))
    return found


def _stated_terms(own: Terms, **where: Any) -> StatedTerms:
    told = {"rating": 0, **where}
    return StatedTerms(discount=own.discount, markup=own.markup, platform_fee=own.platform_fee, **told)


def _stated(close: Close, tenant: str) -> StatedClose:
    totals = [msgspec.to_builtins(total) for total in close.totals if total.tenant == tenant]
    return StatedClose(
        period=close.period,
        tz=close.tz,
        from_ms=close.from_ms,
        until_ms=close.until_ms,
        closed_at_ms=close.closed_at_ms,
        digest=close.digest,
        before=close.before,
        totals=[{name: total[name] for name in total if name != "upstream_cost"} for total in totals],
    )
