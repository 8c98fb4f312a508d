"""Entries, usages and books for tests of money."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from hypothesis import strategies as st

from meterlib import LedgerEntry
from meterlib.billing.prices.files import claude_book, parse_book
from meterlib.billing.prices.prices import PriceBooks
from meterlib.core.ledger import counts_of
from meterlib.core.usage import CacheCreation, Iteration, ServerToolUse, Usage

BOOK = """
name = "test"
currency = "USD"
provider = "anthropic"

[[model]]
name = "plain"
match = ["plain-{date}", "plain-latest"]
[[model.price]]
source = "made up"
valid_until = 2026-10-07
input = 3
output = 15
cache_write_5m = 3.75
cache_write_1h = 6
cache_read = 0.2
web_search = 10
[[model.price]]
source = "made up"
valid_from = 2026-10-07
input = 3
output = 15
cache_write_5m = 3.75
cache_write_1h = 6
cache_read = 0.1
web_search = 10
web_fetch = 0
geo = { us = 1.1 }
[model.price.variant.batch]
input = 1.5
output = 7.5
cache_write_5m = 1.875
cache_write_1h = 3
cache_read = 0.05

[[model]]
name = "steep"
[[model.price]]
source = "made up"
input = 0.1
output = 0.5
cache_write_5m = 0.125
cache_write_1h = 0.2
cache_read = 0.01
geo = { us = 1.1 }
[[model.price.above]]
tokens = 100_000
input = 0.5
output = 2.5
cache_write_5m = 0.625
cache_write_1h = 1
cache_read = 0.05
[model.price.variant.fast]
input = 0.33333
output = 1.00001

[[model]]
name = "old"
[[model.price]]
source = "made up"
valid_until = 2026-01-01
input = 1
output = 2
"""


def books() -> PriceBooks:
    return PriceBooks(parse_book(BOOK))


def claude() -> PriceBooks:
    return PriceBooks(claude_book())


def at_ms(text: str) -> int:
    moment = datetime.fromisoformat(text)
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


def entry(model: str = "plain", usage: Any = None, at: str | int = "2026-11-01", **fields: Any) -> LedgerEntry:
    when = at if isinstance(at, int) else at_ms(at)
    plain: dict[str, Any] = {
        "shard": 0,
        "n": 1,
        "kind": "settled",
        "reservation_id": "r1",
        "tenant": "acme",
        "attributes": {"provider": "anthropic", "model": model},
        "funding": "hosted",
        "usage": counts_of(usage) if isinstance(usage, Usage) else usage or {},
        "quality": "final",
        "reserved_at": when,
        "booked_at": when + 1000,
        "epoch": "0000000000001",
    }
    return LedgerEntry(**plain | fields)


def tokens(**counts: Any) -> dict[str, Any]:
    return {"input_tokens": 0, "output_tokens": 0} | counts


# ── Any usage of any call ─────────────────────────────────────────────────────────────────────────────────────────────

counts = st.none() | st.integers(0, 3) | st.integers(0, 250_000) | st.integers(0, 2**53 - 1)
known = st.integers(0, 3) | st.integers(0, 250_000)
models = st.sampled_from(["plain", "plain-20260101", "steep", "old", "nobody knows 'it'"])
caches = st.builds(CacheCreation, ephemeral_5m_input_tokens=counts, ephemeral_1h_input_tokens=counts)
passes = st.builds(
    Iteration,
    type=st.sampled_from(["message", "compaction", "advisor_message", "fallback_message"]),
    model=st.none() | models,
    input_tokens=counts,
    cache_read_input_tokens=counts,
    cache_creation_input_tokens=counts,
    cache_creation=st.none() | caches,
    output_tokens=counts,
)
tools = st.builds(ServerToolUse, web_search_requests=counts, web_fetch_requests=counts, code_execution_requests=counts)


def usages(iterations: bool = True) -> st.SearchStrategy[Usage]:
    return st.builds(
        Usage,
        input_tokens=known | counts,
        cache_creation_input_tokens=counts,
        cache_read_input_tokens=counts,
        output_tokens=known | counts,
        requests=st.none() | st.integers(0, 3),
        cache_creation=st.none() | caches,
        server_tool_use=st.none() | tools,
        service_tier=st.none() | st.sampled_from(["standard", "batch", "priority"]),
        speed=st.none() | st.sampled_from(["standard", "fast"]),
        inference_geo=st.none() | st.sampled_from(["global", "us", "not_available", "eu"]),
        iterations=st.lists(passes, max_size=3 if iterations else 0).map(tuple),
    )


moments = st.sampled_from(["2025-06-01", "2026-01-01", "2026-10-06T23:59:59.999", "2026-10-07", "2026-11-22"]).map(
    at_ms
)


@st.composite
def entries(draw: st.DrawFn, iterations: bool = True) -> LedgerEntry:
    return entry(
        draw(models),
        draw(usages(iterations)),
        draw(moments),
        kind=draw(st.sampled_from(["settled", "late", "recorded", "cancelled", "expired"])),
        n=draw(st.integers(1, 10**9)),
        tenant=draw(st.sampled_from(["acme", "globex"])),
        funding=draw(st.sampled_from(["hosted", "own"])),
        quality=draw(st.sampled_from(["final", "partial", "estimated", "split_unknown"])),
    )
