"""What belongs into a bundle, from an archive: the rows of a tenant and period, and all that they are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from meterlib.billing.archive.rows import VERBATIM
from meterlib.billing.bundle.bundle import ROW_COLUMNS, Bundle, StatedClose, StatedPrice, StatedTerms
from meterlib.billing.duck import quoted
from meterlib.billing.postings.closes import Close
from meterlib.billing.postings.pieces import RatedFiles, terms_by_tenant
from meterlib.billing.postings.postings import Postings
from meterlib.billing.prices.prices import PriceBooks, Rate, Unpriced
from meterlib.billing.prices.terms import Terms
from meterlib.billing.reports.invoice import Invoice

_PAGE = 5_000


def gather(connection: Any, postings: Postings, invoice: Invoice, books: PriceBooks) -> Bundle:
    """All that belongs to an invoice; rows and entries are read as they are written.

    Args:
        connection: of DuckDB; two tables are left in it.
        postings: of the archive.
        invoice: of a tenant and period, from the same look at the archive.
        books: where prices are looked up again, to be shown in full.
    """
    whose = f"tenant = {quoted(invoice.tenant)}"
    rows = f"SELECT * FROM ({postings.rows_sql()}) WHERE {whose} AND period = {quoted(invoice.period)}"
    _make_keys(connection, postings.entries_sql(), rows, whose)
    close = next((close for close in postings.closes if close.period == invoice.period), None)
    return Bundle(
        invoice=invoice,
        rows=_rows(connection, rows),
        entries=_entries(connection, postings.entries_sql(), whose),
        prices=_prices(connection, rows, books),
        terms=_terms(connection, postings, invoice.tenant),
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


def _prices(connection: Any, rows: str, books: PriceBooks) -> list[StatedPrice]:
    """Each price that rows name, from the books of today if one of them still has it."""
    used = connection.execute(
        f"SELECT DISTINCT price_digest, provider, model, variant, geo FROM ({rows})"
        " WHERE price_digest <> '' ORDER BY ALL"
    ).fetchall()
    found: dict[str, StatedPrice] = {}
    for digest, *key in used:
        rate = _rate(books, digest, *key)
        if rate is not None:
            told: dict[str, Any] = {name: getattr(rate, name) for name in Rate.__struct_fields__}
            found[digest] = StatedPrice(digest=digest, found=True, **told | {"prices": dict(rate.prices)})
        else:
            found.setdefault(digest, StatedPrice(digest=digest, found=False))
    return [found[digest] for digest in sorted(found)]


def _rate(books: PriceBooks, digest: str, provider: str, model: str, variant: str, geo: str) -> Rate | None:
    for label, priced in books.known(provider, model):
        for price in priced.prices:
            rates = price.rates(label, priced.provider, priced.name, variant, geo)
            for rate in () if isinstance(rates, Unpriced) else rates:
                if rate.digest == digest:
                    return rate
    return None


def _terms(connection: Any, postings: Postings, tenant: str) -> list[StatedTerms]:
    """The tenant's terms, by the entries that its rows are of, and of re-ratings."""
    keys = connection.execute("SELECT DISTINCT epoch, shard, n FROM bundle_keys ORDER BY ALL").fetchall()
    found: list[StatedTerms] = []
    files = RatedFiles(postings.archive)
    for shard, rated in postings.rated.items():
        for file in rated:
            facts = files.facts(file)
            for made in facts.made:
                own = terms_by_tenant(made.terms).get(tenant)
                mine = [
                    n for epoch, of, n in keys if (epoch, of) == (facts.epoch, shard) and made.first <= n <= made.last
                ]
                if own is not None and mine:
                    found.append(_stated_terms(own, 0, facts.epoch, shard, min(mine), max(mine)))
    for repost in postings.reposts:
        own = terms_by_tenant(repost.manifest.terms).get(tenant)
        if own is not None:
            found.append(_stated_terms(own, repost.number))
    return found


def _stated_terms(
    own: Terms, rating: int, epoch: str = "", shard: int = 0, first: int = 0, last: int = 0
) -> StatedTerms:
    return StatedTerms(
        rating=rating,
        epoch=epoch,
        shard=shard,
        first=first,
        last=last,
        discount=own.discount,
        markup=own.markup,
        platform_fee=own.platform_fee,
    )


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
