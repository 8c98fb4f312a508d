"""What entries cost: known figures, every kind of entry, and laws that hold for any usage."""

from __future__ import annotations

import decimal
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from meterlib import LedgerEntry, Usage
from meterlib.billing.prices.prices import PER
from meterlib.billing.prices.terms import LIST, Terms
from meterlib.billing.rating.budget import CostTable
from meterlib.billing.rating.measures import passes_of
from meterlib.billing.rating.rated import COSTS, RatedRow, RatedRows, Totals
from meterlib.billing.rating.rating import add_usage, rate
from meterlib.billing.rating.rerating import Change, compare, standing, summary
from meterlib.billing.rating.rounding import rounded_lines
from meterlib.core.money import plain
from tests.billing.money import at_ms, books, claude, entries, entry, tokens

TERMS = Terms.of("12.5%", "3%", "5%", "7%")


def list_cost(model: str, usage: dict[str, Any], at: str = "2026-11-01", **fields: Any) -> str:
    rated = rate(entry(model, usage, at, **fields), claude())
    assert rated.totals.complete, [row.unpriced for row in rated]
    return plain(rated.totals.list_cost)


def total(rows: Iterable[RatedRow], cost: str = "list_cost") -> Decimal:
    found: Decimal = getattr(Totals(rows), cost)
    return found


def by_kind(rated: Iterable[RatedRow]) -> dict[str, str]:
    return {row.token_type: "-" if row.list_cost is None else plain(row.list_cost) for row in rated}


# ── Known figures ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_cache_writes_cost_by_their_time_to_live() -> None:
    """A thousand tokens written for an hour are not priced as written for five minutes: that would be 37 % less."""
    hour = tokens(input_tokens=25, cache_creation_input_tokens=1000, cache_creation={"ephemeral_1h_input_tokens": 1000})
    five = tokens(input_tokens=25, cache_creation_input_tokens=1000, cache_creation={"ephemeral_5m_input_tokens": 1000})

    assert list_cost("claude-sonnet-4-5", hour) == "0.006075"
    assert list_cost("claude-sonnet-4-5", five) == "0.003825"
    both = tokens(
        output_tokens=250, cache_creation_input_tokens=2000, cache_creation={"ephemeral_1h_input_tokens": 2000}
    )
    assert list_cost("claude-sonnet-4-5", both) == "0.01575"


def test_two_short_prompts_are_not_one_long_one() -> None:
    """Requests are rated one by one: sums of tokens would cross a limit that no request did."""
    assert list_cost("claude-haiku-5-5", tokens(input_tokens=60_000)) == "0.006"
    assert list_cost("claude-haiku-5-5", tokens(input_tokens=120_000)) == "0.06"
    assert list_cost("claude-haiku-5-5", tokens(input_tokens=3)) == "0.0000003"


def test_the_whole_prompt_decides_about_the_tier() -> None:
    """Cached tokens make a prompt long as others do, and then the output is dearer too."""
    short = tokens(input_tokens=1, cache_read_input_tokens=99_999, output_tokens=1000)
    long = tokens(input_tokens=1, cache_read_input_tokens=100_000, output_tokens=1000)

    assert list_cost("claude-haiku-5-5", short) == "0.00150009"
    assert list_cost("claude-haiku-5-5", long) == "0.0075005"


def test_the_price_is_that_of_the_day_of_the_call() -> None:
    """September's cache reads of Sonnet 5.5 stay at 0.20 when October's cost 0.10."""
    read = tokens(cache_read_input_tokens=1_000_000)

    assert list_cost("claude-sonnet-5-5", read, "2026-10-06T23:59:59.999") == "0.2"
    assert list_cost("claude-sonnet-5-5", read, "2026-10-07") == "0.1"
    late = entry("claude-sonnet-5-5", read, "2026-10-06T23:59:59", kind="late", booked_at=1_795_000_000_000)
    assert plain(total(rate(late, claude()))) == "0.2"
    unreserved = entry(
        "claude-sonnet-5-5", read, "2026-10-06", kind="recorded", reserved_at=0, booked_at=1_795_000_000_000
    )
    assert plain(total(rate(unreserved, claude()))) == "0.1"


def test_uncached_and_cached_input_are_disjoint() -> None:
    """The Claude API's own count: what was read from the cache is not in `input_tokens`."""
    usage = tokens(input_tokens=5000, cache_read_input_tokens=3000)
    assert list_cost("claude-sonnet-4-5", usage) == "0.0159"


def test_the_context_of_the_caller_does_not_matter() -> None:
    """Whoever computes with four digits elsewhere gets the same bill."""
    one = entry("claude-sonnet-5", tokens(input_tokens=123_456_789))
    with decimal.localcontext(decimal.Context(prec=4, traps=[])):
        assert plain(rate(one, claude(), TERMS).totals.list_cost) == "246.913578"
        assert rate(one, claude(), TERMS) == rate(one, claude(), TERMS)
        narrow = rate(one, claude(), TERMS)
    assert narrow == rate(one, claude(), TERMS)


@pytest.mark.parametrize(
    ("model", "facts", "cost"),
    [
        ("claude-opus-5-5", {"speed": "fast"}, "48"),
        ("claude-opus-5-5", {"service_tier": "batch"}, "12"),
        ("claude-opus-5-5", {"inference_geo": "us"}, "26.4"),
        ("claude-opus-5-5", {"speed": "fast", "inference_geo": "us"}, "52.8"),
        ("claude-opus-5-5", {"service_tier": "standard", "speed": "standard", "inference_geo": "not_available"}, "24"),
        ("claude-haiku-4-5", {"inference_geo": "global"}, "6"),
    ],
)
def test_how_and_where_a_call_was_served_is_in_its_price(model: str, facts: dict[str, str], cost: str) -> None:
    """Fast, batch and confined to a place, also together."""
    million = tokens(input_tokens=1_000_000, output_tokens=1_000_000)
    assert list_cost(model, million | facts) == cost


def test_searches_cost_by_the_thousand() -> None:
    """Ten dollars for a thousand searches, in batches too; fetches cost nothing but tokens, and the book says so."""
    used = tokens(server_tool_use={"web_search_requests": 3, "web_fetch_requests": 2}, service_tier="batch")
    rated = rate(entry("claude-sonnet-5-5", used), claude())

    assert by_kind(rated) == {"web_search": "0.03", "web_fetch": "0"}
    assert rated.totals.complete


# ── What has no price ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("model", "usage", "reason"),
    [
        ("claude-nova-9", {}, "no book has a price for model 'claude-nova-9' of 'anthropic'"),
        ("claude-haiku-4-5", {"speed": "fast"}, "book:claude has no price for 'fast' service of 'claude-haiku-4-5'"),
        (
            "claude-haiku-4-5",
            {"inference_geo": "us"},
            "book:claude has no price for inference in 'us' by 'claude-haiku-4-5'",
        ),
        ("claude-opus-5-5", {"service_tier": "priority"}, "book:claude has no price for 'priority' service"),
        ("", {}, "the model is not known"),
    ],
)
def test_what_has_no_price_is_counted_and_never_free(model: str, usage: dict[str, Any], reason: str) -> None:
    """Its cost is not 0 but none at all, and the sum says that it is a floor."""
    rated = rate(entry(model, tokens(input_tokens=7, output_tokens=2) | usage), claude(), TERMS)

    assert [row.list_cost for row in rated] == [None, None]
    assert [row.quantity for row in rated] == [7, 2]
    assert all(row.unpriced.startswith(reason) for row in rated)
    assert (rated.totals.unpriced, rated.totals.complete) == (2, False)


def test_only_the_line_without_a_price_lacks_one() -> None:
    """Time of containers cannot be told from a call; the tokens beside it are priced all the same."""
    used = tokens(input_tokens=1000, server_tool_use={"code_execution_requests": 2})
    rated = rate(entry("claude-sonnet-5-5", used), claude())

    assert by_kind(rated) == {"input": "0.002", "code_execution": "-"}


def test_an_unknown_number_is_not_nothing() -> None:
    """Of an answer that was cut short the output may not be known: it has a row, without a price."""
    rated = rate(entry("claude-sonnet-5-5", {"input_tokens": 1000}, quality="partial"), claude())

    assert [(row.token_type, row.quantity, bool(row.unpriced), row.quality) for row in rated] == [
        ("input", 1000, False, "partial"),
        ("output", 0, True, "partial"),
    ]
    assert rate(entry("claude-sonnet-5-5", {}), claude()).totals.unpriced == 2
    assert len(rate(entry("claude-sonnet-5-5", tokens()), claude())) == 0
    assert len(rate(entry("claude-sonnet-5-5", {"amounts": {"pages": 3}}, kind="recorded"), claude())) == 0


def test_a_usage_of_a_new_name_is_not_passed_over() -> None:
    """Who knows what the API will count next year: it shows, and somebody can look."""
    used = tokens(input_tokens=5, new_tokens=7, server_tool_use={"moon_flights": 1}, parts={"a_tokens": 2})
    (_, other) = rate(entry("claude-sonnet-5-5", used), claude())

    assert (other.token_type, other.quantity) == ("unknown", 10)
    assert other.unpriced == "nobody here knows what new_tokens, parts.a_tokens, server_tool_use.moon_flights is"


# ── Cache writes of unknown time to live ──────────────────────────────────────────────────────────────────────────────


def test_writes_of_unknown_time_to_live_are_priced_as_five_minutes_and_flagged() -> None:
    """The API's default; what of the total the split leaves out has a row of its own."""
    used = tokens(cache_creation_input_tokens=1000, cache_creation={"ephemeral_1h_input_tokens": 400})
    rated = rate(entry("claude-sonnet-4-5", used, quality="split_unknown"), claude())

    assert [(row.token_type, row.quantity, row.flags) for row in rated] == [
        ("cache_write_1h", 400, ""),
        ("cache_write_5m", 600, "split_unknown"),
    ]
    assert plain(rated.totals.list_cost) == "0.00465"


def test_a_split_that_is_more_than_its_total_is_taken_and_flagged() -> None:
    """Parts and total contradict each other: the parts are what has prices, and nothing is added to them."""
    used = tokens(cache_creation_input_tokens=3, cache_creation={"ephemeral_1h_input_tokens": 400})
    assert [(r.quantity, r.flags) for r in rate(entry("claude-sonnet-4-5", used), claude())] == [
        (400, "split_contradicts")
    ]


# ── Passes through other models ───────────────────────────────────────────────────────────────────────────────────────


def test_compaction_and_advice_are_billed_besides() -> None:
    """The call's own numbers leave them out; each is priced by the model that did it and its own prompt's length."""
    used = tokens(
        input_tokens=23_000,
        iterations=[
            {"type": "compaction", "input_tokens": 180_000, "output_tokens": 3500},
            {"type": "message", "input_tokens": 23_000},
            {"type": "advisor_message", "model": "claude-opus-5-5", "input_tokens": 1000, "output_tokens": 100},
        ],
    )
    rated = rate(entry("claude-haiku-5-5", used), claude())

    assert [
        (row.pass_kind, row.model, row.token_type, row.above, plain(row.list_cost or Decimal(-1))) for row in rated
    ] == [
        ("call", "claude-haiku-5-5", "input", 0, "0.0023"),
        ("compaction", "claude-haiku-5-5", "input", 100_000, "0.09"),
        ("compaction", "claude-haiku-5-5", "output", 100_000, "0.00875"),
        ("advisor_message", "claude-opus-5-5", "input", 0, "0.004"),
        ("advisor_message", "claude-opus-5-5", "output", 0, "0.002"),
    ]
    assert len({row.line for row in rated}) == 5


@pytest.mark.parametrize(("output_tokens", "billed"), [(0, False), (40, True)])
def test_a_declined_attempt_is_billed_if_it_had_begun_to_answer(output_tokens: int, billed: bool) -> None:
    """After a fallback the call's own numbers are those of the model that served it."""
    used = tokens(
        input_tokens=500,
        output_tokens=200,
        iterations=[
            {"type": "message", "model": "claude-fable-5", "input_tokens": 500, "output_tokens": output_tokens},
            {"type": "fallback_message", "model": "claude-opus-4-8", "input_tokens": 500, "output_tokens": 200},
        ],
    )
    rated = rate(entry("claude-fable-5", used), claude())

    assert {row.model for row in rated if row.pass_kind == "call"} == {"claude-opus-4-8"}
    declined = [row for row in rated if row.flags == "declined"]
    assert [row.model for row in declined] == (["claude-fable-5"] * 2 if billed else [])


def test_passes_that_do_not_add_up_are_flagged() -> None:
    """The numbers of the call are billed, and nobody guesses silently which of the two is right."""
    used = tokens(input_tokens=500, iterations=[{"type": "message", "input_tokens": 499}])
    (row,) = rate(entry("claude-opus-5", used), claude())
    assert (row.quantity, row.flags) == (500, "passes_differ")


def test_speed_says_nothing_of_another_model() -> None:
    """An advisor is priced at its standard price, even beside a fast call; its part in a batch counts."""
    advice = {"type": "advisor_message", "model": "claude-fable-5", "input_tokens": 1}
    fast = passes_of(entry("claude-opus-5", tokens(input_tokens=1, speed="fast", iterations=[advice])))
    batch = passes_of(entry("claude-opus-5", tokens(input_tokens=1, service_tier="batch", iterations=[advice])))

    assert [one.variant for one in fast] == ["fast", "standard"]
    assert [one.variant for one in batch] == ["batch", "batch"]


def test_the_model_that_answered_is_the_one_that_is_billed() -> None:
    """Where it is another than was asked for, the gateway notes it among the facts."""
    one = entry("claude-opus-5", tokens(input_tokens=1_000_000), facts={"model": "claude-haiku-4-5"})
    assert plain(rate(one, claude()).totals.list_cost) == "1"


# ── Who pays ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_hosted_usage_is_billed_by_the_terms() -> None:
    """Billed is list less discount plus mark-up; what the operator pays upstream stands beside it."""
    rated = rate(entry("claude-sonnet-5-5", tokens(input_tokens=1_000_000)), claude(), TERMS)
    (row,) = rated

    prices = (row.list_price, row.contracted_price, row.billed_price, row.upstream_price)
    assert [plain(price or Decimal(-1)) for price in prices] == ["2", "1.8025", "1.8025", "1.86"]
    assert [plain(total(rated, cost)) for cost in COSTS] == ["2", "1.8025", "1.8025", "1.86"]


def test_usage_with_a_key_of_ones_own_is_billed_nothing() -> None:
    """The provider bills it; the list price is kept to show, and nothing is owed upstream."""
    rated = rate(entry("claude-sonnet-5-5", tokens(input_tokens=1_000_000), funding="own"), claude(), Terms.of("50%"))
    assert [plain(total(rated, cost)) for cost in COSTS] == ["2", "2", "0", "0"]


def test_a_platform_fee_has_rows_of_its_own() -> None:
    """It is a part of the list price, and the usage beside it stays at 0."""
    rated = rate(entry("claude-sonnet-5-5", tokens(input_tokens=1_000_000), funding="own"), claude(), TERMS)

    assert [(row.charge, plain(row.billed_cost or Decimal(0))) for row in rated] == [
        ("usage", "0"),
        ("platform_fee", "0.1"),
    ]
    assert plain(total(rated, "list_cost")) == "2"
    unpriced = rate(entry("claude-nova-9", tokens(input_tokens=1), funding="own"), claude(), TERMS)
    assert (len(unpriced), unpriced.totals.unpriced) == (1, 1)


def test_a_price_of_terms_is_rounded_once_and_products_are_exact() -> None:
    """A third off makes a price of six decimals, and the bill is that price times the tokens, to the last digit."""
    (row,) = rate(entry("claude-sonnet-5-5", tokens(input_tokens=999_999)), claude(), Terms.of("33.3333%", "0.0001%"))
    assert plain(row.billed_price or Decimal(0)) == "1.333335"
    assert row.billed_cost == Decimal("1.333335") * 999_999 / 1_000_000


# ── Kinds of entries ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["cancelled", "expired"])
def test_what_used_nothing_costs_nothing(kind: str) -> None:
    """Reservations that were freed have no rows; what was estimated is no cost."""
    assert len(rate(entry("claude-opus-5", {}, kind=kind, estimate={"input_tokens": 10**6}), claude())) == 0


def adjusted(difference: dict[str, Any], at: str = "2026-11-20", **fields: Any) -> LedgerEntry:
    return entry("claude-haiku-5-5", difference, at, kind="adjusted", n=2, reserved_at=0, adjusts="0:1", **fields)


def test_a_correction_costs_the_difference_of_two_calls() -> None:
    """20,000 tokens less make a dear call a cheap one: all of it is taken back and posted at the other price."""
    call = entry("claude-haiku-5-5", tokens(input_tokens=110_000, output_tokens=1000))
    rated = rate(adjusted({"input_tokens": -20_000}), claude(), corrects=call)

    assert [(row.token_type, row.quantity, plain(row.list_cost or Decimal(0))) for row in rated] == [
        ("input", -110_000, "-0.055"),
        ("input", 90_000, "0.009"),
        ("output", -1000, "-0.0025"),
        ("output", 1000, "0.0005"),
    ]
    assert rated.totals.rows == 0
    assert {(row.n, row.kind) for row in rated} == {(2, "adjusted")}


def test_a_correction_without_its_entry_is_priced_as_booked_and_flagged() -> None:
    """Where length decides about the price, the difference alone cannot tell: so the row says."""
    (row,) = rate(adjusted({"input_tokens": -20_000}), claude())
    assert (row.quantity, plain(row.list_cost or Decimal(0)), row.flags) == (-20_000, "-0.002", "tier_of_difference")


def test_a_correction_is_priced_at_the_time_of_the_call() -> None:
    """A call of September that is corrected in November is corrected at September's price."""
    call = entry("claude-sonnet-5-5", tokens(cache_read_input_tokens=10**6), "2026-09-30")
    rated = rate(
        replace(adjusted({"cache_read_input_tokens": 10**6}), attributes=call.attributes), claude(), corrects=call
    )
    assert plain(rated.totals.list_cost) == "0.2"


def test_a_number_that_becomes_known_takes_the_gap_back() -> None:
    """The output of a broken answer, told later by the provider's own report."""
    call = entry("claude-haiku-5-5", {"input_tokens": 10}, quality="partial")
    rows = [*rate(call, claude()), *rate(adjusted({"output_tokens": 100}), claude(), corrects=call)]
    assert Totals(rows).complete
    assert plain(total(rows)) == "0.000051"


usages_of_corrections = st.fixed_dictionaries(
    {"input_tokens": st.integers(0, 200_000), "output_tokens": st.integers(0, 10**6)},
    optional={"cache_read_input_tokens": st.integers(0, 10**6), "speed": st.just("fast")},
)
differences = st.dictionaries(
    st.sampled_from(["input_tokens", "output_tokens", "cache_read_input_tokens"]),
    st.integers(-(10**6), 10**6),
    min_size=1,
)


@given(
    usages_of_corrections,
    differences,
    st.sampled_from(["plain", "steep", "nobody"]),
    st.sampled_from(["own", "hosted"]),
)
def test_a_call_and_its_correction_cost_what_the_corrected_call_costs(
    usage: dict[str, Any], difference: dict[str, Any], model: str, funding: str
) -> None:
    """To the last digit, whatever tiers the two are in; and the quantities add up as well."""
    call = entry(model, usage, funding=funding)
    correction = replace(call, kind="adjusted", n=2, usage=difference, reserved_at=0)
    rows = [*rate(call, books(), TERMS), *rate(correction, books(), TERMS, corrects=call)]
    wanted = rate(replace(call, usage=add_usage(usage, difference)), books(), TERMS)

    assert {cost: total(rows, cost) for cost in COSTS} == {cost: total(wanted, cost) for cost in COSTS}
    assert Totals(rows).unpriced >= wanted.totals.unpriced
    assert sum(row.quantity for row in rows) == sum(row.quantity for row in wanted)
    assert len({(row.n, row.line) for row in rows}) == len(rows)


# ── Laws ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(entries(), st.sampled_from([LIST, TERMS, Terms.of("100%"), Terms.of("0.0001%", "33.3333%", "0.0001%")]))
def test_every_cost_is_an_exact_product(one: LedgerEntry, terms: Terms) -> None:
    """Quantity times price, with whole 1e-12; a row has all costs or a reason why it has none."""
    for row in rate(one, books(), terms):
        for cost in COSTS:
            amount, price = getattr(row, cost), getattr(row, cost.replace("cost", "price"))
            assert (amount is None) == bool(row.unpriced) == (price is None)
            if amount is not None:
                assert amount.as_tuple().exponent == -12
                numerator, denominator = price.as_integer_ratio()
                whole, fraction = amount.as_integer_ratio()
                assert row.quantity * numerator * fraction == whole * denominator * PER[row.token_type]


@given(entries())
def test_no_token_is_lost_or_counted_twice(one: LedgerEntry) -> None:
    """The quantities of the rows are those of the passes, each once."""
    used = sum(amount or 0 for part in passes_of(one) for amount in part.amounts)
    assert sum(row.quantity for row in rate(one, books())) == used
    own = [
        row
        for row in rate(one, books())
        if row.pass_kind == "call" and row.token_type in ("input", "output", "cache_read")
    ]
    counts = [one.usage.get(name, 0) for name in ("input_tokens", "output_tokens", "cache_read_input_tokens")]
    assert sum(row.quantity for row in own) == (0 if one.kind in ("cancelled", "expired") else sum(counts))  # type: ignore[arg-type]


@given(st.lists(entries(), max_size=5))
def test_rating_adds_up_over_requests(several: list[LedgerEntry]) -> None:
    """The sum of a month is the sum of its requests, in whatever order and groups they are added."""
    rated = [rate(one, books(), TERMS) for one in several]
    rows = [row for one in rated for row in one]
    for cost in COSTS:
        parts = Totals()
        for one in rated:
            for row in reversed(one.rows):
                parts.add(row)
        assert getattr(parts, cost) == total(rows, cost)
    assert Totals(rows).unpriced == sum(one.totals.unpriced for one in rated)


@given(entries(), st.integers(1, 4))
def test_the_callers_context_has_no_influence(one: LedgerEntry, digits: int) -> None:
    """Rounding, precision and traps of whoever calls are theirs alone."""
    wide = rate(one, books(), TERMS)
    with decimal.localcontext(decimal.Context(prec=digits, rounding=decimal.ROUND_UP, traps=[decimal.Inexact])):
        assert rate(one, books(), TERMS).rows == wide.rows
        assert rate(one, books(), TERMS).totals.billed_cost == wide.totals.billed_cost


def test_currencies_do_not_add_up() -> None:
    """A sum over two of them is an error, and no number."""
    (row,) = rate(entry("plain", tokens(input_tokens=1)), books())
    with pytest.raises(ValueError, match="does not add up"):
        Totals([row, replace(row, currency="EUR")])


# ── Rating again ──────────────────────────────────────────────────────────────────────────────────────────────────────


def repriced(row: RatedRow) -> RatedRow:
    return replace(row, list_cost=(row.list_cost or Decimal(0)) * 2, price_digest="x") if not row.unpriced else row


def test_the_same_prices_change_nothing() -> None:
    """A re-rating at the same book posts not a single row."""
    rows = [*rate(entry("plain", tokens(input_tokens=5)), books(), TERMS)]
    assert list(compare(rows, rows)) == []


def test_a_re_rating_posts_reversals_and_new_rows() -> None:
    """What was posted stays; the difference by model says what it comes to before anything is posted."""
    call = entry("plain", tokens(input_tokens=1_000_000, output_tokens=1_000_000))
    old, dearer = rate(call, books(), LIST), rate(call, books(), Terms.of(markup="10%"))
    deltas = list(compare(old, dearer))
    rows = [*old, *(row for delta in deltas for row in delta.rows)]

    assert summary(deltas) == {"plain": Change(lines=2, contracted_cost=Decimal("1.8"), billed_cost=Decimal("1.8"))}
    assert [plain(total(rows, cost)) for cost in COSTS] == [plain(total(dearer, cost)) for cost in COSTS]
    assert len({row.line for row in rows}) == len(rows) == 6
    assert Totals(rows).rows == 2


def test_a_price_that_comes_to_be_known_closes_the_gap() -> None:
    """Unpriced rows are taken back too, so that nothing is counted as unpriced any more."""
    call = entry("claude-nova-9", tokens(input_tokens=10))
    old = rate(call, books())
    new = rate(replace(call, attributes={**call.attributes, "model": "plain"}), books())
    rows = [*old, *(row for delta in compare(old, new) for row in delta.rows)]

    assert Totals(rows).complete
    assert sum(row.quantity for row in rows) == 10


states = st.sampled_from(
    [
        (books(), LIST),
        (books(), TERMS),
        (claude(), LIST),
        (books(), Terms.of(platform_fee="5%")),
        (books(), Terms.of("1%")),
    ]
)


@given(st.lists(entries(), min_size=1, max_size=4), st.lists(states, min_size=1, max_size=4))
@example([entry("steep", tokens(input_tokens=5))], [(books(), LIST), (claude(), LIST), (books(), LIST)])
def test_any_series_of_re_ratings_ends_at_the_last_one(several: list[LedgerEntry], series: list[Any]) -> None:
    """Rows are only ever added, no key comes twice, and the sums are those of the last rating."""
    calls = [replace(one, n=n) for n, one in enumerate(several)]
    rows: list[RatedRow] = []
    for where, terms in series:
        rated = [row for one in calls for row in rate(one, where, terms)]
        deltas = list(compare(rows, rated))
        rows = sorted([*rows, *(row for delta in deltas for row in delta.rows)], key=lambda row: row.n)

        assert {cost: total(rows, cost) for cost in COSTS} == {cost: total(rated, cost) for cost in COSTS}
        assert Totals(rows).unpriced == Totals(rated).unpriced
        assert Totals(rows).rows == len(rated)
        assert list(compare(rows, rated)) == []
    assert len({(row.n, row.line) for row in rows}) == len(rows)
    left = [row for one in calls for row in standing(row for row in rows if row.n == one.n)]
    assert sum(row.quantity for row in left) == sum(row.quantity for row in rows)


# ── Invoice lines ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rounding_stands_on_a_line_of_its_own() -> None:
    """Three lines of a third of a cent are one cent, and the invoice adds up."""
    found = rounded_lines([Decimal("0.003333333333")] * 3, "USD")
    assert ([plain(line) for line in found.lines], plain(found.rounding), plain(found.total)) == (
        ["0", "0", "0"],
        "0.01",
        "0.01",
    )
    assert [plain(line) for line in rounded_lines([Decimal("0.005"), Decimal("0.015")], "USD").lines] == ["0", "0.02"]
    assert plain(rounded_lines([Decimal("10.5"), Decimal("11.5")], "JPY").total) == "22"


def test_nothing_is_never_less_than_nothing() -> None:
    """A correction of a tenth of a cent is shown as 0.00, and not as -0.00."""
    for told in (["-0.001"], ["-0.001", "0.001"], ["-0.004", "-0.004"], ["0.004", "0.004", "-0.009"]):
        found = rounded_lines([Decimal(amount) for amount in told], "USD")

        assert [] == [shown for shown in map(str, (*found.lines, found.rounding, found.total)) if shown == "-0.00"]


amounts = st.decimals(min_value=-1000, max_value=1000, places=12, allow_nan=False)


@given(st.lists(amounts, max_size=20), st.sampled_from(["USD", "EUR", "JPY", "KWD"]))
def test_invoice_lines_add_up_to_the_total(lines: list[Decimal], currency: str) -> None:
    """With the rounding line, in every currency, to the last digit; and the total is the rounded exact sum."""
    found = rounded_lines(lines, currency)
    with decimal.localcontext(decimal.Context(prec=60)):
        assert sum(found.lines, found.rounding) == found.total
        assert found.exact == sum(lines)
        assert abs(found.total - found.exact) * 2 <= Decimal(1).scaleb({"JPY": 0, "KWD": -3}.get(currency, -2))


def test_rows_are_a_record() -> None:
    """Rows come in order of their lines, and an empty rating is empty."""
    assert RatedRows().totals.complete
    rated = rate(entry("plain", tokens(input_tokens=1, output_tokens=1)), books())
    assert [row.line for row in rated] == sorted(row.line for row in rated)


def test_calls_that_are_booked_together_are_not_one_long_prompt() -> None:
    """Fifty of ten thousand tokens each stay in the first tier; that this is an average is said."""
    usage = Usage(requests=50, input_tokens=500_000, output_tokens=0)
    told = tokens(requests=50, input_tokens=500_000)

    (row,) = rate(entry("steep", told, "2026-10-10"), books())

    assert (row.above, plain(row.list_cost or Decimal(0)), row.flags) == (0, "0.05", "tier_of_average")
    assert 50_000_000 == CostTable(books()).cost_nanousd("steep", usage, at_ms=at_ms("2026-10-10"))


@pytest.mark.parametrize("requests", [0, 1])
def test_the_prompt_of_one_call_is_no_average(requests: int) -> None:
    """Whoever tells how many calls there were, and says one, has told how long its prompt was."""
    (row,) = rate(entry("steep", tokens(requests=requests, input_tokens=500_000), "2026-10-10"), books())

    assert (100_000, "") == (row.above, row.flags)
