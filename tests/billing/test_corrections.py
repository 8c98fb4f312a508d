"""Corrections cost what they take back or add of their call: at its prices and terms, whatever was changed since."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meterlib import LedgerEntry
from meterlib.billing.export.export import Accepted
from meterlib.billing.postings import reratings
from meterlib.billing.postings.reposts import encoded
from meterlib.billing.postings.reratings import Rerating
from meterlib.billing.prices.terms import LIST, Terms
from tests.billing.money import BOOK, at_ms, tokens
from tests.billing.posting import Ledgers, amounts, prices

OCTOBER = at_ms("2026-10-10")
OLD = {"acme": Terms.of("10%", "3%", "5%", "7%")}
NEW = {"acme": Terms.of("40%", "20%", "25%", "30%")}
NO_FEE = {"acme": Terms.of("10%", "3%", "0%", "7%")}
TIERED = """
name = "{name}"
currency = "USD"
provider = "anthropic"
[[model]]
name = "steep"
[[model.price]]
source = "made up"
input = {x}
output = {x}5
cache_read = 0.{x}
[[model.price.above]]
tokens = {above}
input = 2{x}
output = 2{x}5
cache_read = 2.{x}
"""


def tiered(x: int, above: int) -> str:
    """A book with other prices for another x, and another length from which prompts are long."""
    return TIERED.format(name=f"x{x}", x=x, above=above)


@pytest.fixture
def ledgers(tmp_path: Path) -> Ledgers:
    return Ledgers(tmp_path)


def nothing_left(ledgers: Ledgers) -> bool:
    return [0, 0, 0, 0, 0] == list(ledgers.totals())


# ── Terms ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("funding", ["hosted", "own"])
@pytest.mark.parametrize(("then", "now"), [(OLD, NEW), (NO_FEE, NEW), (OLD, NO_FEE), ({}, OLD), (OLD, {})])
def test_a_call_that_is_taken_back_after_its_terms_changed_costs_nothing(
    ledgers: Ledgers, funding: str, then: Any, now: Any
) -> None:
    """Discount, mark-up, fee and what the operator pays: none of them is taken back at another rate than it had."""
    call = ledgers.call(OCTOBER, usage=tokens(input_tokens=1_000_000, output_tokens=9), funding=funding)
    ledgers.rate(BOOK, then)
    ledgers.correction(call, OCTOBER + 1000, {"input_tokens": -400_000})
    ledgers.rate(BOOK, now)
    ledgers.correction(call, OCTOBER + 2000, {"input_tokens": -600_000, "output_tokens": -9})
    ledgers.rate(BOOK, now)

    assert nothing_left(ledgers)
    assert [] == ledgers.problems()


def test_a_kind_of_token_that_the_call_had_none_of_is_added_at_the_terms_of_the_call(ledgers: Ledgers) -> None:
    """No row has its price; the terms of the call's time are written down beside its rows, and so is the book's."""
    call = ledgers.call(OCTOBER, usage=tokens(input_tokens=1_000_000))
    ledgers.rate(BOOK, OLD)
    ledgers.correction(call, OCTOBER + 1000, {"output_tokens": 1_000_000})
    ledgers.rate(BOOK.replace("output = 15", "output = 20"), NEW)

    (row,) = ledgers.rows("token_type = 'output'")
    assert ["15.000000", "13.905000", "13.905000", "13.950000"] == [
        f"{price}" for price in (row.list_price, row.contracted_price, row.billed_price, row.upstream_price)
    ]
    assert [] == ledgers.problems()


def test_a_fee_that_did_not_exist_is_not_charged_on_what_is_added(ledgers: Ledgers) -> None:
    """And one that did is charged, though it does not exist any more."""
    free = ledgers.call(OCTOBER, usage=tokens(input_tokens=1_000_000), funding="own")
    ledgers.rate(BOOK, NO_FEE)
    feed = ledgers.call(OCTOBER, usage=tokens(input_tokens=1_000_000), funding="own")
    ledgers.rate(BOOK, OLD)
    ledgers.correction(free, OCTOBER + 1000, {"output_tokens": 1_000_000})
    ledgers.correction(feed, OCTOBER + 2000, {"output_tokens": 1_000_000})
    ledgers.rate(BOOK, LATER)

    fees = [(row.n, row.token_type, f"{row.billed_cost}") for row in ledgers.rows("charge = 'platform_fee'")]
    assert [(2, "input", "0.150000000000"), (4, "output", "0.750000000000")] == fees
    assert [] == ledgers.problems()


LATER = {"acme": Terms.of(platform_fee="50%")}


def test_a_call_that_expired_has_the_terms_of_its_time(ledgers: Ledgers) -> None:
    """It had no row at all, but an entry, whose customer's terms were written down when it was rated."""
    expired = ledgers.call(OCTOBER, kind="expired", usage={})
    ledgers.rate(BOOK, OLD)
    ledgers.correction(expired, OCTOBER + 1000, {"input_tokens": 1_000_000})
    ledgers.rate(BOOK, NEW)
    ledgers.correction(expired, OCTOBER + 2000, {"input_tokens": -500_000})
    ledgers.rate(BOOK, {})

    assert ["2.781000", "2.781000"] == [f"{row.billed_price}" for row in ledgers.rows()]
    assert [] == ledgers.problems()


def test_a_correction_of_a_correction_has_the_terms_of_the_call(ledgers: Ledgers) -> None:
    """However many there are in between, each rated when other terms were in force."""
    one = ledgers.call(OCTOBER, usage=tokens(input_tokens=1_000_000))
    ledgers.rate(BOOK, OLD)
    for at, terms in enumerate([NEW, {}, NO_FEE, NEW]):
        one = ledgers.correction(one, OCTOBER + at, {"input_tokens": -250_000})
        ledgers.rate(BOOK, terms)

    assert nothing_left(ledgers)
    assert [] == ledgers.problems()


def test_a_correction_of_an_entry_that_the_store_lost_is_not_anothers(ledgers: Ledgers) -> None:
    """Another call has its number since; whose terms are others. The archive still has both."""
    ledgers.call(OCTOBER, usage=tokens(cache_read_input_tokens=1))
    lost = ledgers.call(OCTOBER + 1, usage=tokens(input_tokens=1_000_000), reservation_id="lost")
    ledgers.rate(BOOK, OLD)
    ledgers.lose(1, ANOTHER_EPOCH)
    ledgers.call(OCTOBER + 2, usage=tokens(input_tokens=1_000_000), reservation_id="found")
    assert ledgers.export(Accepted(epochs={0: ANOTHER_EPOCH})).problem is None
    ledgers.rate(BOOK, NEW)
    ledgers.correction(lost, OCTOBER + 1000, {"input_tokens": -1_000_000})
    ledgers.rate(BOOK, {})

    posted = {(row.epoch, row.n): row.billed_cost or 0 for row in ledgers.rows("token_type = 'input'")}
    assert 0 < posted[lost.epoch, 2] == -posted[ANOTHER_EPOCH, 3]
    assert posted[lost.epoch, 2] != posted[ANOTHER_EPOCH, 2]
    assert [] == ledgers.problems()


ANOTHER_EPOCH = "1600000009999"


def test_a_call_that_was_rated_again_is_corrected_at_what_it_was_rated_at_last(ledgers: Ledgers) -> None:
    """At other terms and another book; what the first rating said of it is over."""
    call = ledgers.call(OCTOBER, "steep", tokens(input_tokens=90_000))
    ledgers.rate(tiered(1, 100_000), OLD)
    ledgers.correction(call, OCTOBER + 1000, {"input_tokens": 1_000})
    ledgers.rate(tiered(2, 100_000), NEW)
    ledgers.rate_again(tiered(3, 95_000), terms=NEW)
    ledgers.correction(call, OCTOBER + 2000, {"input_tokens": 5_000})
    ledgers.rate(tiered(4, 200_000), OLD)

    assert by_hand(ledgers.entries, {call.n: Known(3, 95_000, NEW["acme"])}) == list(ledgers.totals())[:4]
    ledgers.correction(call, OCTOBER + 3000, {"input_tokens": -96_000})
    ledgers.rate(tiered(5, 100_000), {})
    assert nothing_left(ledgers)
    assert [] == ledgers.problems()


def test_a_correction_that_is_rated_while_somebody_reads_the_difference_is_rated_again(
    ledgers: Ledgers,
) -> None:
    """Exports go on meanwhile; it goes by its call's new prices, as it would have a moment later."""
    call = ledgers.call(OCTOBER, "steep", tokens(input_tokens=90_000))
    ledgers.rate(tiered(1, 100_000), OLD)
    with ledgers.archive() as archive, Rerating(archive, prices(tiered(3, 95_000), NEW), "a book") as rerating:
        rerating.work_out()
        ledgers.correction(call, OCTOBER + 1000, {"input_tokens": -90_000})
        ledgers.rate(tiered(1, 100_000), OLD)
        assert 1 == rerating.post(1_900_000_000_000)
        assert 0 == rerating.missed()

    assert nothing_left(ledgers)
    assert [] == ledgers.problems()


def test_what_is_rated_in_the_moment_before_a_re_rating_is_posted_is_told(
    ledgers: Ledgers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the prices from before; rating again mends that."""
    call = ledgers.call(OCTOBER, "steep", tokens(input_tokens=90_000))
    ledgers.rate(tiered(1, 100_000), OLD)
    with ledgers.archive() as archive, Rerating(archive, prices(tiered(3, 95_000), NEW), "a book") as rerating:
        rerating.work_out()

        def meanwhile(*args: Any) -> bytes:
            ledgers.correction(call, OCTOBER + 1000, {"input_tokens": -90_000})
            ledgers.rate(tiered(1, 100_000), OLD)
            return encoded(*args)

        monkeypatch.setattr(reratings, "encoded", meanwhile)
        assert 1 == rerating.post(1_900_000_000_000)
        assert 1 == rerating.missed()
        ledgers.call(OCTOBER, "steep")
        ledgers.rate(tiered(1, 100_000), OLD)
        assert 1 == rerating.missed()

    assert not nothing_left(ledgers)
    monkeypatch.undo()
    ledgers.rate_again(tiered(3, 95_000), terms=NEW)
    ledgers.correction(ledgers.entries[-1], OCTOBER + 1000, {"input_tokens": -1_000_000})
    ledgers.rate(tiered(1, 100_000), OLD)
    assert nothing_left(ledgers)
    assert [] == ledgers.problems()


def test_prices_that_a_re_rating_took_back_are_over(ledgers: Ledgers) -> None:
    """Those of rows that a correction had taken back itself, too: they are taken back once more then."""
    call = ledgers.call(OCTOBER, "steep", tokens(input_tokens=1_000))
    ledgers.rate(tiered(2, 60_000), NEW)
    ledgers.correction(call, OCTOBER + 1000, {"cache_read_input_tokens": 90_000})
    ledgers.rate(tiered(2, 60_000), NEW)
    ledgers.rate_again(tiered(1, 100_000), terms=OLD)
    ledgers.correction(call, OCTOBER + 2000, {"cache_read_input_tokens": 90_000})
    ledgers.rate(tiered(3, 60_000), NEW)

    assert by_hand(ledgers.entries, {call.n: Known(1, 100_000, OLD["acme"])}) == list(ledgers.totals())[:4]
    assert [] == ledgers.problems()


@pytest.mark.parametrize("above", [60_000, 200_000])
def test_how_long_a_prompt_is_long_is_what_the_book_of_the_call_said(ledgers: Ledgers, above: int) -> None:
    """A book that moves the boundary moves it for calls to come."""
    short = ledgers.call(OCTOBER, "steep", tokens(input_tokens=90_000, output_tokens=5))
    long = ledgers.call(OCTOBER, "steep", tokens(input_tokens=150_000, output_tokens=5))
    ledgers.rate(tiered(1, 100_000), OLD)
    for call in (short, long):
        ledgers.correction(call, OCTOBER + 1000, {"output_tokens": 7, "cache_read_input_tokens": 1_000})
    ledgers.rate(tiered(2, above), NEW)
    book = {call.n: Known(1, 100_000, OLD["acme"]) for call in (short, long)}

    assert by_hand(ledgers.entries, book) == list(ledgers.totals())[:4]
    ledgers.correction(short, OCTOBER + 2000, {"input_tokens": 60_000})
    ledgers.correction(long, OCTOBER + 2000, {"input_tokens": -60_000})
    ledgers.rate(tiered(2, above), NEW)
    assert by_hand(ledgers.entries, book) == list(ledgers.totals())[:4]
    assert [] == ledgers.problems()


# ── By hand ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Known(NamedTuple):
    """What a call is rated by: the book `tiered(x, above)`, and terms."""

    x: int
    above: int
    terms: Terms


FIELDS = ("input_tokens", "output_tokens", "cache_read_input_tokens")


def by_hand(entries: Sequence[LedgerEntry], known: dict[int, Known]) -> list[Decimal]:
    """What calls cost, each with all that was ever said of it, at what it is rated by: four sums, as rows have."""
    final: dict[int, dict[str, int]] = {}
    roots: dict[int, int] = {}
    for one in entries:
        root = roots[one.n] = roots[int(one.adjusts[2:])] if one.adjusts else one.n
        usage = final.setdefault(root, dict.fromkeys(FIELDS, 0))
        for name in FIELDS:
            usage[name] += one.usage.get(name, 0)  # type: ignore[operator]
    funding = {one.n: one.funding for one in entries}
    with localcontext() as context:
        context.prec = 60
        costs = [_cost(final[n], known[n], funding[n]) for n in final]
        return [sum(several, Decimal(0)) for several in zip(*costs, strict=True)]


def _cost(usage: dict[str, int], known: Known, funding: str) -> list[Decimal]:
    long = usage["input_tokens"] + usage["cache_read_input_tokens"] > known.above
    prices = [f"2{known.x}", f"2{known.x}5", f"2.{known.x}"] if long else [f"{known.x}", f"{known.x}5", f"0.{known.x}"]
    costs = [Decimal(0)] * 4
    for name, text in zip(FIELDS, prices, strict=True):
        for at, price in enumerate(_prices(Decimal(text), known.terms, funding)):
            costs[at] += price * usage[name] / 1_000_000
    return costs


def _prices(price: Decimal, terms: Terms, funding: str) -> list[Decimal]:
    def rounded(number: Decimal) -> Decimal:
        return number.quantize(Decimal("0.000001"), ROUND_HALF_EVEN)

    if funding == "own":
        fee = rounded(price * terms.platform_fee)
        return [price, price + fee, fee, Decimal(0)]
    contracted = rounded(price * (1 - terms.discount) * (1 + terms.markup))
    return [price, contracted, contracted, rounded(price * (1 - terms.upstream_discount))]


TERMS = [OLD, NEW, NO_FEE, {}]
BOOKS = [(1, 100_000), (2, 60_000), (3, 150_000)]


@st.composite
def histories(draw: st.DrawFn) -> list[Any]:
    """Calls and corrections of any of them, in bursts, each rated by another book and terms, and re-ratings."""
    steps: list[Any] = []
    count = 0
    token = st.sampled_from([0, 1, 7, 30_000, 70_000, 120_000])
    change = st.sampled_from([0, 0, -60_000, -5, 3, 40_000, 90_000])
    for _ in range(draw(st.integers(2, 5))):
        for _ in range(draw(st.integers(0 if count else 1, 3))):
            usage = {name: draw(token) for name in FIELDS} | {
                "input_tokens": draw(st.sampled_from([1, 55_000, 99_999]))
            }
            steps.append(("call", usage, draw(st.sampled_from(["hosted", "own"]))))
            count += 1
        for _ in range(draw(st.integers(0, 3))):
            steps.append(("correct", draw(st.integers(1, count)), {name: draw(change) for name in FIELDS}))
            count += 1
        kind = draw(st.sampled_from(["rate", "rate", "again"]))
        steps.append((kind, draw(st.sampled_from(BOOKS)), draw(st.sampled_from(TERMS))))
    steps.append(("rate", draw(st.sampled_from(BOOKS)), draw(st.sampled_from(TERMS))))
    return steps


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(histories())
def test_all_rows_of_a_call_come_to_its_last_usage_at_its_own_prices_and_terms(history: list[Any]) -> None:
    """Whatever is changed between a call and its corrections, and however often all is rated again."""
    with tempfile.TemporaryDirectory() as folder:
        ledgers = Ledgers(Path(folder))
        known: dict[int, Known] = {}
        for at, (word, *what) in enumerate(history):
            if word == "call":
                ledgers.call(OCTOBER + at, "steep", what[0], funding=what[1])
            elif word == "correct":
                ledgers.correction(ledgers.entries[what[0] - 1], OCTOBER + at, what[1])
            else:
                (x, above), terms = what
                now = Known(x, above, terms.get("acme", LIST))
                if word == "rate":
                    ledgers.rate(tiered(x, above), terms)
                    known = dict.fromkeys(calls(ledgers.entries), now) | known
                else:
                    ledgers.rate_again(tiered(x, above), terms=terms)
                    known = dict.fromkeys(known, now)
        rows = ledgers.rows()
        for n in calls(ledgers.entries):
            mine = [one for one in ledgers.entries if root_of(one, ledgers.entries) == n]
            numbers = {one.n for one in mine}

            assert by_hand(mine, known) == list(amounts(row for row in rows if row.n in numbers))[:4]
        assert [] == ledgers.problems()


def calls(entries: Sequence[LedgerEntry]) -> list[int]:
    return [one.n for one in entries if not one.adjusts]


def root_of(one: LedgerEntry, entries: Sequence[LedgerEntry]) -> int:
    while one.adjusts:
        one = entries[int(one.adjusts[2:]) - 1]
    return one.n
