"""What calls cost in whole nanodollars: the same numbers as rating, in a few microseconds and without a decimal."""

from __future__ import annotations

import time
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterlib.billing.prices.files import parse_book
from meterlib.billing.prices.prices import BEGINNING_MS, END_MS, PriceBooks, Rate
from meterlib.billing.prices.terms import LIST, Terms
from meterlib.billing.rating.budget import CostTable, CostTables
from meterlib.billing.rating.compiled import cases
from meterlib.billing.rating.measures import passes_of_usage, variant_of
from meterlib.billing.rating.rated import RatedRow, Totals
from meterlib.billing.rating.rating import rate
from meterlib.core.usage import CacheCreation, Iteration, ServerToolUse, Usage
from tests.billing.money import BOOK, at_ms, books, claude, entry, models, moments, usages

NOW = at_ms("2026-11-22")
TERMS = Terms.of("12.5%", "3%", "5%", "7%")
WRITE = Usage(input_tokens=25, output_tokens=0, cache_creation=CacheCreation(ephemeral_1h_input_tokens=1000))


def used(searches: int = 0, executions: int = 0, **facts: Any) -> Usage:
    """A call of no token but those told."""
    tools = ServerToolUse(web_search_requests=searches, code_execution_requests=executions)
    told: dict[str, Any] = {"input_tokens": 0, "output_tokens": 0, "server_tool_use": tools}
    return Usage(**told | facts)


@pytest.mark.parametrize(
    ("model", "usage", "cost"),
    [
        ("claude-sonnet-4-5", WRITE, 6_075_000),
        ("claude-haiku-5-5", used(input_tokens=60_000), 6_000_000),
        ("claude-haiku-5-5", used(input_tokens=120_000), 60_000_000),
        ("claude-haiku-5-5", used(input_tokens=3), 300),
        ("claude-haiku-5-5", used(cache_read_input_tokens=1, service_tier="batch"), 5),
        ("claude-opus-5-5", used(input_tokens=1, output_tokens=1, speed="fast", inference_geo="us"), 52_800),
        ("claude-opus-5-5", used(1), 10_000_000),
        ("claude-opus-5-5", used(), 0),
    ],
)
def test_known_costs(model: str, usage: Usage, cost: int) -> None:
    """The figures that rating has, in nanodollars."""
    assert CostTable(claude()).cost_nanousd(model, usage, at_ms=NOW) == cost


@pytest.mark.parametrize(
    ("model", "usage"),
    [
        ("claude-nova-9", used(input_tokens=1)),
        ("claude-opus-5-5", used(input_tokens=1, service_tier="priority")),
        ("claude-opus-5-5", Usage(input_tokens=1)),
        ("claude-opus-5-5", Usage()),
        ("claude-opus-5-5", used(0, 1)),
        ("claude-opus-5-5", used(iterations=(Iteration(type="advisor_message", model="x", input_tokens=1),))),
    ],
)
def test_a_cost_that_is_not_known_is_none(model: str, usage: Usage) -> None:
    """None is not 0: a limit then goes on counting what was held for the call."""
    assert CostTable(claude()).cost_nanousd(model, usage, at_ms=NOW) is None


@pytest.mark.parametrize("usage", [{"requests": 0, "amounts": {"denied_rpm": 3}}, {"amounts": {"x": 1}}])
def test_what_is_no_call_has_nothing_to_be_priced(usage: dict[str, object]) -> None:
    """Counts of the caller's own, such as of denials."""
    assert () == passes_of_usage(usage, "anthropic", "claude-sonnet-4-5")


def test_how_many_calls_an_entry_stands_for_has_no_price() -> None:
    """Of many that were admitted locally the tokens are priced, and not their number."""
    (told,) = passes_of_usage({"requests": 7, "input_tokens": 5, "output_tokens": 5}, "anthropic", "claude-sonnet-4-5")

    assert ((5, 5, 0, 0, 0, 0, 0, 0, 0, 0), "") == (told.amounts, told.unknown)


def test_an_estimate_counts_what_is_known() -> None:
    """Before the call its output is not known; what is there has a cost already."""
    table = CostTable(claude())
    assert table.estimate_nanousd("claude-sonnet-5-5", Usage(input_tokens=1000), at_ms=NOW) == 2_000_000
    assert table.estimate_nanousd("claude-nova-9", Usage(input_tokens=1000), at_ms=NOW) is None


def test_another_currency_is_no_usd() -> None:
    """A price in euros is no amount of nanodollars."""
    table = CostTable(PriceBooks(parse_book(BOOK.replace("USD", "EUR"))))
    assert table.cost_nanousd("plain", Usage(input_tokens=1, output_tokens=0), at_ms=NOW) is None


def test_prices_change_while_the_table_lives() -> None:
    """A process that runs over midnight charges the new price from then on."""
    table = CostTable(claude())
    read = Usage(input_tokens=0, output_tokens=0, cache_read_input_tokens=1000)
    assert table.cost_nanousd("claude-sonnet-5-5", read, at_ms=at_ms("2026-10-07") - 1) == 200_000
    assert table.cost_nanousd("claude-sonnet-5-5", read, at_ms=at_ms("2026-10-07")) == 100_000


def nanos(rows: Any, cost: str) -> int | None:
    """A cost by rating, rounded up to whole nanodollars."""
    totals = Totals(rows)
    if not totals.complete:
        return None
    numerator, denominator = Decimal(getattr(totals, cost)).as_integer_ratio()
    return -(-numerator * 10**9 // denominator)


@given(models, usages(), moments, st.sampled_from(["hosted", "own"]), st.sampled_from([LIST, TERMS]))
def test_the_numbers_are_those_of_rating(model: str, usage: Usage, now: int, funding: Any, terms: Terms) -> None:
    """For any usage at any time, list or billed: the cost of all rows, rounded up once."""
    rows: list[RatedRow] = list(rate(entry(model, usage, now, funding=funding), books(), terms))

    listed = CostTable(books()).cost_nanousd(model, usage, at_ms=now)
    assert listed == nanos(rows, "list_cost")
    billed = CostTable(books(), "billed", terms, funding).cost_nanousd(model, usage, at_ms=now)
    assert billed == nanos(rows, "billed_cost")


@given(models, st.sampled_from(["standard", "batch", "fast", "batch+fast"]), st.sampled_from(["global", "us"]))
def test_every_call_finds_exactly_one_case(model: str, variant: str, geo: str) -> None:
    """The cases leave no moment and no length of prompt out, and none is in two of them."""
    table = cases(books(), "anthropic", model, variant, geo)
    times = sorted({case.from_ms for case in table} | {case.until_ms for case in table})
    assert (times[0], times[-1]) == (BEGINNING_MS, END_MS)
    for moment in (*times[:-1], NOW):
        for prompt in (-1, 0, 1, 100_000, 100_001, 10**9):
            found = [c for c in table if c.from_ms <= moment < c.until_ms and c.above < prompt <= c.upto]
            assert len(found) == 1
            rated = books().rate("anthropic", model, at_ms=moment, variant=variant, geo=geo, prompt=prompt)
            assert isinstance(rated, Rate) == isinstance(found[0].found, Rate)
            assert rated == found[0].found


def test_names_without_end_do_not_fill_the_memory() -> None:
    """Callers may invent models; the table forgets, and answers as before."""
    where = books()
    table = CostTable(where)
    for number in range(10_050):
        table.cost_nanousd(f"invented-{number}", Usage(input_tokens=1, output_tokens=1), at_ms=NOW)
    assert len(table._tables) <= 10_000
    assert len(where._found) <= 10_000
    assert table.cost_nanousd("plain", Usage(input_tokens=1, output_tokens=1), at_ms=NOW) == 18_000


def test_a_cost_takes_microseconds() -> None:
    """It is worked out before and after every call; the bound is many times what it takes."""
    table = CostTable(claude())
    best = min(_seconds(table) for _ in range(5))
    assert best / 2000 < 50e-6


def _seconds(table: CostTable) -> float:
    started = time.process_time()
    for _ in range(2000):
        table.cost_nanousd("claude-sonnet-4-5", WRITE, at_ms=NOW)
    return time.process_time() - started


@pytest.mark.parametrize(
    ("tier", "speed", "variant"),
    [(None, None, "standard"), ("standard", "fast", "fast"), ("batch", "fast", "batch+fast"), ("", "", "standard")],
)
def test_ways_of_service_have_one_name(tier: str | None, speed: str | None, variant: str) -> None:
    """A combination has a name of its own, so that no book prices it by chance."""
    assert variant_of(tier, speed) == variant


def test_tenants_of_the_same_terms_share_a_table() -> None:
    """However many tenants there are, there are no more tables than terms."""
    tables = CostTables(books(), {"acme": TERMS, "globex": LIST, "initech": LIST}.__getitem__, "billed")
    assert tables.of("globex", "hosted") is tables.of("initech", "hosted")
    cost = {
        tenant: tables.of(tenant, "hosted").cost_nanousd("plain", used(input_tokens=1000), at_ms=NOW)
        for tenant in ("acme", "globex")
    }
    assert cost == {"acme": 2_703_750, "globex": 3_000_000}
    assert tables.of("acme", "own").cost_nanousd("plain", used(input_tokens=1000), at_ms=NOW) == 150_000
