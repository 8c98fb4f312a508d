"""A realistic archive, rated for real: two months of several customers' calls, of every kind that a bill may have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meterlib import Usage
from meterlib.billing.postings.closing import Closing
from meterlib.billing.postings.postings import Postings
from meterlib.billing.postings.rater import Prices, Rater
from meterlib.billing.postings.reratings import Rerating
from meterlib.billing.prices.files import parse_book
from meterlib.billing.prices.prices import PriceBooks
from meterlib.billing.prices.terms import Terms
from meterlib.core.usage import CacheCreation, ServerToolUse
from tests.billing.exporting import Books
from tests.billing.money import at_ms, claude

SONNET, OPUS, HAIKU, UNKNOWN = "claude-sonnet-5-5", "claude-opus-5-5", "claude-haiku-5-5", "nobody-knows-1"
TERMS = {
    "acme": Terms.of("10%", "2.5%", upstream_discount="15%"),
    "own-keys": Terms.of(platform_fee="5%"),
    "globex": Terms.of(upstream_discount="15%"),
}
CACHED = Usage(
    input_tokens=1_200,
    cache_creation_input_tokens=900,
    cache_creation=CacheCreation(ephemeral_5m_input_tokens=400, ephemeral_1h_input_tokens=500),
    cache_read_input_tokens=48_000,
    output_tokens=777,
)


class Ledger(Books):
    """The books of a gateway, with the prices that meterlib ships, and a clock that is set."""

    def at(self, text: str) -> None:
        """Set the clock."""
        self.clock.set(at_ms(text))

    def call(self, tenant: str, model: str = SONNET, usage: Usage = CACHED, **told: str) -> None:
        """Book a call; `told` are attributes, and `funding` and `quality`."""
        funding, quality = told.pop("funding", "hosted"), told.pop("quality", "final")
        attributes = {"provider": "anthropic", "model": model, **told}
        self.clock.advance(ms=10)
        self.meter.record(tenant, attributes, usage, funding=funding, quality=quality)  # type: ignore[arg-type]

    def rate(self) -> None:
        """Export, and rate what is new."""
        self.export()
        prices = Prices(books=claude(), terms_of=lambda tenant: TERMS.get(tenant, Terms()))
        with self.archive() as archive, Rater(archive, prices) as rater:
            rater.rate(0)

    def close_month(self, period: str) -> None:
        """Close a month; something has to be booked after it."""
        with self.archive() as archive:
            closing = Closing(Postings(archive), period)

            assert [] == closing.hindrances(None, 1)
            closing.write(closing.drawn_up(self.clock.now_ms, "archive"))

    def rate_again(self, book: str) -> int:
        """Rate everything by another book; how many rows that posts."""
        prices = Prices(books=PriceBooks(parse_book(book)), terms_of=lambda tenant: TERMS.get(tenant, Terms()))
        with self.archive() as archive, Rerating(archive, prices, "another") as rerating:
            rerating.work_out()
            return rerating.post(self.clock.now_ms)

    @contextmanager
    def postings(self, tz: str = "UTC") -> Iterator[Postings]:
        """What is rated."""
        with self.archive() as archive:
            yield Postings(archive, tz)


def fill_october(ledger: Ledger) -> None:
    """Hosted calls in every way of service, calls with own keys, and one that no book has a price for."""
    for day in (1, 2, 2, 15):
        ledger.at(f"2026-10-{day:02}T09:30")
        ledger.call("acme", SONNET, key="k1", team="red")
        ledger.call("acme", OPUS, key="k2", team="blue", quality="partial")
        ledger.call("globex", HAIKU, Usage(input_tokens=150_000, output_tokens=10), key="=cmd()")
        ledger.call("own-keys", SONNET, funding="own")
    ledger.at("2026-10-20T23:59:59.990")
    ledger.call("acme", SONNET, Usage(input_tokens=1_000, output_tokens=2_000, service_tier="batch"))
    ledger.call("acme", OPUS, Usage(input_tokens=1_000, output_tokens=2_000, speed="fast"))
    ledger.call("acme", OPUS, Usage(input_tokens=1_000, output_tokens=2_000, inference_geo="us"))
    ledger.call(
        "globex", SONNET, Usage(input_tokens=3, output_tokens=5, server_tool_use=ServerToolUse(web_search_requests=2))
    )
    ledger.call("globex", UNKNOWN, Usage(input_tokens=1_234, output_tokens=56))


def fill_november(ledger: Ledger) -> None:
    """Usual calls, and what turns out about October: a late usage, and a correction."""
    ledger.at("2026-10-31T23:59")
    late = ledger.meter.reserve("acme", {"provider": "anthropic", "model": OPUS}, Usage(input_tokens=9), lease_ms=1000)
    ledger.clock.advance(ms=2000)
    ledger.meter.sweep()
    first = next(iter(ledger.meter.ledger(0)))
    ledger.at("2026-11-03T10:00")
    ledger.meter.settle("acme", late.id, Usage(input_tokens=11, output_tokens=3))
    ledger.meter.adjust(first, {"output_tokens": -700}, "counted twice", actor="ann")
    ledger.call("acme", SONNET, key="k1")
    ledger.call("globex", HAIKU)


def ledger_of(folder: Path, *, closed: bool = True) -> Ledger:
    """Both months, archived and rated, and October closed."""
    ledger = Ledger(folder, block=50_000)
    fill_october(ledger)
    fill_november(ledger)
    ledger.rate()
    if closed:
        ledger.close_month("2026-10")
    return ledger
