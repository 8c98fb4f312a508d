"""Ledgers of any entries at set times, exported, rated, rated again and closed: for tests of what becomes of money."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec

from meterlib import LedgerEntry
from meterlib.billing import duck
from meterlib.billing.archive.verify import verify
from meterlib.billing.postings.closes import Close
from meterlib.billing.postings.closing import Closing, word_of
from meterlib.billing.postings.postings import Postings
from meterlib.billing.postings.rater import Prices, Rated, Rater
from meterlib.billing.postings.reratings import Rerating
from meterlib.billing.postings.verify_rated import marks_of, verify_rated
from meterlib.billing.prices.files import parse_book
from meterlib.billing.prices.prices import PriceBooks
from meterlib.billing.prices.terms import LIST, Terms
from meterlib.billing.rating.rated import COSTS, RatedRow, Totals
from meterlib.billing.rating.rating import add_usage, rate
from meterlib.billing.rating.rating_sql import COLUMNS
from meterlib.core.ledger import CallFacts, Outcome, digest_of, encode
from tests.billing.exporting import LEDGER, Books
from tests.billing.money import BOOK, entry

EPOCH = "1600000000000"
TERMS = {"acme": Terms.of("12.5%", "3%", "5%", "7%"), "globex": Terms.of(upstream_discount="1%")}
DEARER = BOOK.replace("input = 3\n", "input = 4\n").replace('name = "test"', 'name = "dearer"')
WIDER = DEARER.replace('name = "old"', 'name = "new"')
"""A book with higher prices of `plain`, and one that besides knows `new` in the place of `old`."""

Amounts = tuple[Decimal, ...]


def prices(text: str = BOOK, terms: Mapping[str, Terms] = TERMS) -> Prices:
    """What usage is rated by, with terms of its own for each tenant."""
    return Prices(books=PriceBooks(parse_book(text)), terms_of=lambda tenant: terms.get(tenant, LIST))


def stored(one: LedgerEntry) -> dict[str, str | bytes]:
    """An entry as its fields stand in the store."""
    outcome = Outcome(
        usage=one.usage,
        quality=one.quality,
        facts=one.facts,
        adjusts=one.adjusts,
        adjusts_id=one.adjusts_id,
        reason=one.reason,
        actor=one.actor,
    )
    blob = encode(outcome)
    return {
        "kind": one.kind,
        "after": one.after,
        "id": one.reservation_id,
        "reserved_at": str(one.reserved_at),
        "booked_at": str(one.booked_at),
        "call": encode(CallFacts(tenant=one.tenant, attributes=one.attributes, funding=one.funding)),
        "estimate": b"",
        "outcome": blob,
        "digest": digest_of(blob),
        "epoch": one.epoch,
    }


class Ledgers(Books):
    """Books whose entries are written as they are wanted, numbered in their order; terms are those of `TERMS`."""

    def __init__(self, folder: Path, tz: str = "UTC", **more: Any) -> None:
        super().__init__(folder, **more)
        self.tz = tz
        self.epoch = EPOCH
        self.entries: list[LedgerEntry] = []

    def add(self, several: Iterable[LedgerEntry]) -> list[LedgerEntry]:
        """Append entries, as they are but for number and epoch."""
        added = []
        for one in several:
            numbered = msgspec.structs.replace(one, n=len(self.entries) + 1, epoch=self.epoch)
            self.client.xadd(LEDGER, stored(numbered), id=f"{numbered.n}-0")
            self.entries.append(numbered)
            added.append(numbered)
        return added

    def call(self, at: str | int, model: str = "plain", usage: Any = None, **fields: Any) -> LedgerEntry:
        """Append a call that was made and booked at a moment."""
        one = entry(model, usage or {"input_tokens": 1_000_000, "output_tokens": 0}, at, **fields)
        booked = fields.get("booked_at", one.reserved_at)
        return self.add([msgspec.structs.replace(one, booked_at=booked)])[0]

    def correction(self, of: LedgerEntry, at: int, usage: dict[str, Any]) -> LedgerEntry:
        """Append a correction of an entry."""
        facts: dict[str, Any] = {"kind": "adjusted", "adjusts": f"0:{of.n}", "adjusts_id": of.reservation_id}
        facts |= {"reason": "r", "usage": usage}
        return self.add([msgspec.structs.replace(of, reserved_at=0, booked_at=at, facts={}, after="", **facts)])[0]

    def lose(self, count: int, epoch: str) -> None:
        """The last entries are gone; the ledger goes on with their numbers in another epoch, which somebody accepts."""
        self.client.delete(LEDGER)
        del self.entries[-count:]
        for one in self.entries:
            self.client.xadd(LEDGER, stored(one), id=f"{one.n}-0")
        self.epoch = epoch

    def rate(self, text: str = BOOK, terms: Mapping[str, Terms] = TERMS) -> Rated:
        """Export, and rate what is not rated."""
        problem = self.export().problem
        assert problem is None, problem
        with self.archive() as archive, Rater(archive, prices(text, terms)) as rater:
            return rater.rate(0)

    def rate_again(
        self, text: str, now_ms: int = 1_900_000_000_000, terms: Mapping[str, Terms] = TERMS, **span: int
    ) -> int:
        """Rate again and post it; how many rows that were."""
        with self.archive() as archive, Rerating(archive, prices(text, terms), "a book", **span) as rerating:
            rerating.work_out()
            if rerating.rows:
                assert rerating.number == rerating.post(now_ms)
            return rerating.rows

    def close_period(self, period: str, clock_ms: int = 2_000_000_000_000) -> Close | list[str]:
        """Close a period by the store's word; the record, or why it cannot be."""
        with self.archive() as archive:
            words = [word_of(archive, self.run, 0, clock_ms)]
            closing = Closing(Postings(archive, self.tz), period)
            return closing.hindrances(words, 1) or closing.write(closing.drawn_up(clock_ms, "store"))

    def query(self, query: str) -> list[tuple[Any, ...]]:
        """Ask something of `rows` and `entries`."""
        database = duck.connect()
        with self.archive() as archive:
            postings = Postings(archive, self.tz)
            found: list[tuple[Any, ...]] = database.execute(
                f"WITH rows AS ({postings.rows_sql()}), entries AS ({postings.entries_sql()}) {query}"
            ).fetchall()
        database.close()
        return found

    def rows(self, where: str = "true") -> list[RatedRow]:
        """The rated rows, in order."""
        names = ", ".join(COLUMNS)
        found = self.query(f"SELECT {names} FROM rows WHERE {where} ORDER BY epoch, shard, n, line")
        return [RatedRow(**dict(zip(COLUMNS, row, strict=True))) for row in found]

    def totals(self) -> Amounts:
        """What all rows come to, and how many have no price."""
        return amounts(self.rows())

    def problems(self) -> list[str]:
        """What a check of the archive finds."""
        with self.archive() as archive:
            found = [problem for verdict in verify(archive, marks=marks_of(archive)) for problem in verdict.problems]
            return found + verify_rated(archive).problems

    def rated_files(self) -> dict[str, bytes]:
        """The files of rated rows."""
        return {name: data for name, data in self.files().items() if name.startswith("rated/")}


def amounts(rows: Iterable[RatedRow]) -> Amounts:
    """What rows come to."""
    totals = Totals(rows)
    return (*(getattr(totals, cost) for cost in COSTS), Decimal(totals.unpriced))


def as_rated(
    entries: Sequence[LedgerEntry],
    text: str = BOOK,
    posted: Sequence[RatedRow] = (),
    texts: Mapping[int, str] | None = None,
) -> list[RatedRow]:
    """The rows of these entries by `rate`, each correction with the call that it corrects as it was by then.

    A correction keeps the prices that rows of its call, and of earlier corrections, were posted with; `texts` are the
    books by which entries were rated.
    """
    rows = []
    by_n = {one.n: one for one in entries}
    for at, one in enumerate(entries):
        call = _call_of(one, by_n)
        corrects, numbers = None, [call.n]
        if one.kind == "adjusted":
            corrects = call
            for earlier in entries[:at]:
                if earlier.kind == "adjusted" and _call_of(earlier, by_n).n == call.n:
                    usage = add_usage(corrects.usage, earlier.usage)
                    corrects = msgspec.structs.replace(corrects, usage=usage)
                    numbers.append(earlier.n)
        known = [row for n in numbers for row in posted if row.n == n]
        book = (texts or {}).get(known[0].n, text) if known and corrects is not None else text
        books = PriceBooks(parse_book(book))
        rows += list(rate(one, books, TERMS.get(one.tenant, LIST), corrects=corrects, posted=known))
    return sorted(rows, key=lambda row: (row.n, row.line))


def _call_of(one: LedgerEntry, by_n: dict[int, LedgerEntry]) -> LedgerEntry:
    while one.kind == "adjusted":
        one = by_n[int(one.adjusts.partition(":")[2])]
    return one
