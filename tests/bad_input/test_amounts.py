"""Amounts: whole numbers from 0 to 2^53 - 1 and nothing else, since a negative or odd one would hand out quota."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from fakeredis import FakeRedis
from hypothesis import given
from hypothesis import strategies as st

from meterlib import (
    CacheCreation,
    InvalidInput,
    Iteration,
    Limit,
    Meter,
    OutputTokensDetails,
    Policy,
    QuotaExceeded,
    ServerToolUse,
    Usage,
)
from meterlib.core.usage import amount_of
from meterlib.testing import Clock, MemoryMeter
from tests.bad_input.support import HUGE, Face
from tests.bad_input.test_names import ENTRY

LARGEST = 2**53 - 1
COUNTS: list[tuple[type[Any], str]] = [
    (Usage, "input_tokens"),
    (Usage, "cache_creation_input_tokens"),
    (Usage, "cache_read_input_tokens"),
    (Usage, "output_tokens"),
    (CacheCreation, "ephemeral_5m_input_tokens"),
    (CacheCreation, "ephemeral_1h_input_tokens"),
    (OutputTokensDetails, "thinking_tokens"),
    (ServerToolUse, "web_search_requests"),
    (Iteration, "input_tokens"),
    (Iteration, "output_tokens"),
]
NO_AMOUNTS: list[Any] = [
    -1,
    -LARGEST,
    1.0,
    0.5,
    1e2,
    math.nan,
    math.inf,
    -math.inf,
    True,
    False,
    Decimal(7),
    Fraction(7),
    b"7",
    2**53,
    2**63,
    2**64,
    pytest.param(HUGE, id="5000 digits"),
    pytest.param(-HUGE, id="-5000 digits"),
    {7},
    object(),
]
TEXT_AND_CONTAINERS: list[Any] = ["7", "1e2", "0x32", " 7", "7.0", "1_000", "٣", "", "9" * 5000, [7], (7,), {}, Usage()]
TAKEN_FOR_NESTED = list(TEXT_AND_CONTAINERS)


@pytest.mark.parametrize(("record", "field"), COUNTS, ids=[f"{kind.__name__}.{field}" for kind, field in COUNTS])
@pytest.mark.parametrize("amount", [*NO_AMOUNTS, *TAKEN_FOR_NESTED])
def test_a_count_is_a_whole_number(record: type[Any], field: str, amount: Any) -> None:
    """No usage with a negative, fractional, infinite, boolean, textual or too large count can even be made."""
    with pytest.raises(InvalidInput) as refused:
        record(**{field: amount})

    assert f"usage.{field}" == refused.value.field


@pytest.mark.parametrize("amount", [*NO_AMOUNTS, "7", "٣", "9" * 5000, [7], {}, None])
def test_an_amount_of_any_other_unit_is_a_whole_number_too(amount: Any) -> None:
    """A cost worked out with floats, or read from a text, is refused where it is made."""
    with pytest.raises(InvalidInput) as refused:
        Usage(amounts={"cost_nanousd": amount})

    assert "usage.amounts.cost_nanousd" == refused.value.field


@pytest.mark.parametrize(("record", "field"), COUNTS, ids=[f"{kind.__name__}.{field}" for kind, field in COUNTS])
@pytest.mark.parametrize("amount", [0, 1, LARGEST, None])
def test_a_count_may_be_anything_from_zero_to_the_largest(record: type[Any], field: str, amount: int | None) -> None:
    """0 is a count like any other, and None says that it is not known."""
    assert amount == getattr(record(**{field: amount}), field)


def test_an_error_says_what_is_wrong_with_an_amount() -> None:
    """Not whole, below zero and too large are three different mistakes."""
    with pytest.raises(InvalidInput, match=r"an integer is needed, not float"):
        Usage(input_tokens=1.5)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"must be 0 or more"):
        Usage(input_tokens=-1)
    with pytest.raises(InvalidInput, match=r"too large: at most 2\^53 - 1"):
        Usage(input_tokens=2**53)


@pytest.mark.parametrize("unit", ["requests", "input_tokens", "output_tokens", "total_tokens"])
def test_nobody_sets_what_is_worked_out(unit: str) -> None:
    """A unit with a formula has no amount of its own, so that the two can never disagree."""
    with pytest.raises(InvalidInput) as refused:
        Usage(amounts={unit: 1})

    assert f"usage.amounts.{unit}" == refused.value.field


@pytest.mark.parametrize("amounts", [None, 5, [], "x"])
def test_amounts_are_a_mapping(amounts: Any) -> None:
    """Amounts are told by unit."""
    with pytest.raises(InvalidInput) as refused:
        Usage(amounts=amounts)

    assert "usage.amounts" == refused.value.field


@pytest.mark.parametrize("unit", [5, None, "", "\ud800", "a b", "a\nb"])
def test_a_unit_has_a_plain_name(face: Face, unit: Any) -> None:
    """An amount of a unit that no limit could name is a mistake."""
    with pytest.raises(InvalidInput):
        face.call("settle", "acme", "call-1", Usage(amounts={unit: 1}))

    assert [] == face.wire.sent


@pytest.mark.parametrize(
    "odd",
    [
        {"service_tier": "\ud800"},
        {"service_tier": 5},
        {"speed": "a\nb"},
        {"inference_geo": "x" * 100_000},
        {"iterations": 5},
        {"iterations": [{}]},
        {"iterations": (5,)},
        {"cache_creation": {}},
        {"cache_creation": 5},
        {"cache_creation": Usage()},
        {"server_tool_use": "x"},
    ],
    ids=lambda odd: f"{next(iter(odd))}={next(iter(odd.values()))!r:.12}",
)
def test_what_is_not_a_count_is_of_its_kind_as_well(face: Face, odd: dict[str, Any]) -> None:
    """Text is short and printable, and a nested record is a record of that kind."""
    with pytest.raises(InvalidInput) as refused:
        face.call("settle", "acme", "call-1", Usage(**odd))

    assert refused.value.field.startswith(f"usage.{next(iter(odd))}")
    assert [] == face.wire.sent


def test_an_amount_cannot_be_changed_behind_the_checks(face: Face) -> None:
    """A usage is a frozen record: changing the mapping it was made of does not change it."""
    amounts = {"cost_nanousd": 5}
    usage = Usage(amounts=amounts)
    amounts["cost_nanousd"] = -50

    assert {"cost_nanousd": 5} == usage.amounts


@pytest.mark.parametrize("usage", [5, "7", [1], {"input_tokens": 5}, True])
def test_a_usage_is_a_usage(face: Face, usage: Any) -> None:
    """A plain mapping or a lone number is no usage, in whichever verb."""
    errors = [
        face.refusal("reserve", "acme", {}, usage),
        face.refusal("revise", "acme", "call-1", usage),
        face.refusal("settle", "acme", "call-1", usage),
        face.refusal("record", "acme", {}, usage),
    ]

    assert ["usage"] * 4 == [error.field for error in errors]
    assert "a Usage is needed" in str(errors[0])


@pytest.mark.parametrize(
    ("verb", "rest"),
    [
        pytest.param("reserve", ({}, 0)),
        pytest.param("reserve", ({}, {})),
        pytest.param("revise", ("call-1", None)),
        ("settle", ("call-1", None)),
        ("record", ({}, None)),
        ("settle", ("call-1", {})),
    ],
)
def test_what_is_empty_is_not_therefore_a_usage(face: Face, verb: str, rest: tuple[Any, ...]) -> None:
    """Nothing, or an empty mapping, in the place of a usage is a mistake."""
    assert "usage" == face.refusal(verb, "acme", *rest).field


@pytest.mark.parametrize("verb", ["reserve", "settle", "record", "revise"])
def test_zero_is_a_usage_like_any_other(face: Face, verb: str) -> None:
    """A call that turns out to have used nothing is booked with 0."""
    nothing = Usage(input_tokens=0, output_tokens=0, amounts={"cost_nanousd": 0})
    between: Any = {} if verb in ("reserve", "record") else "call-1"

    assert face.accepts(verb, "acme", between, nothing)


@pytest.mark.parametrize("revision", [-1, 1.5, "1", None, True, 2**53])
def test_a_revision_has_a_number_from_one_up(face: Face, revision: Any) -> None:
    """0 asks for the next number; below it there is none."""
    assert "revision" == face.refusal("revise", "acme", "call-1", Usage(input_tokens=1), revision=revision).field


@pytest.mark.parametrize(
    ("difference", "field"),
    [
        ({}, "difference"),
        (None, "difference"),
        ([("input_tokens", 1)], "difference"),
        ({"input_tokens": 1.5}, "difference.input_tokens"),
        ({"input_tokens": "1"}, "difference.input_tokens"),
        ({"input_tokens": True}, "difference.input_tokens"),
        ({"input_tokens": None}, "difference.input_tokens"),
        ({"input_tokens": 2**53}, "difference.input_tokens"),
        ({"input_tokens": -(2**53)}, "difference.input_tokens"),
        ({"input_tokens": math.nan}, "difference.input_tokens"),
        ({"cache_creation": {"ephemeral_5m_input_tokens": 0.5}}, "difference.cache_creation.ephemeral_5m_input_tokens"),
        ({"cache_creation": {}}, "difference.cache_creation"),
        pytest.param({"input_tokens": HUGE}, "difference.input_tokens"),
        pytest.param({"\ud800": 1}, "difference"),
        pytest.param({5: 1}, "difference"),
        pytest.param({"inptu_tokens": 1}, "difference.inptu_tokens"),
    ],
)
def test_a_correction_is_whole_numbers_by_a_usages_names(face: Face, difference: Any, field: str) -> None:
    """A correction may be negative, but it is whole, has a usage's names, and stays within 2^53."""
    assert field == face.refusal("adjust", ENTRY, difference, "a test").field


@given(st.one_of(st.integers(), st.floats(), st.booleans(), st.decimals(), st.none(), st.binary()))
def test_whatever_a_count_is_given_it_is_whole_or_refused(value: Any) -> None:
    """There is no third way: an amount is accepted as it is, or not at all."""
    fits = value is None or (type(value) is int and 0 <= value <= LARGEST)
    try:
        usage = Usage(input_tokens=value)
    except InvalidInput:
        assert not fits
    else:
        assert fits
        assert value is usage.input_tokens


TOTALS = Policy(limits=(Limit(name="tokens", unit="input_tokens", quota=100, window="1m"),))


def test_counts_whose_sum_is_too_large_do_not_break_a_script() -> None:
    """Two counts may each be the largest there is."""
    meter = Meter(FakeRedis(), TOTALS, clock=Clock())
    meter.reserve("acme", {}, Usage(input_tokens=LARGEST, cache_creation_input_tokens=LARGEST))

    assert LARGEST == meter.peek("acme")[0].used


def test_holds_whose_sum_is_too_large_do_not_garble_a_window() -> None:
    """However absurd an estimate a provider reports, all of it slides out."""
    clock = Clock()
    meter = Meter(FakeRedis(), TOTALS, clock=clock)
    for call in range(3):
        meter.reserve("acme", {}, Usage(input_tokens=1), reservation_id=f"call-{call}")
        clock.advance(ms=1000)
    for call in range(3):
        meter.revise("acme", f"call-{call}", Usage(input_tokens=LARGEST))
    assert LARGEST == meter.peek("acme")[0].used

    clock.advance(ms=120_000)
    assert 0 == meter.peek("acme")[0].used


# ── Sums that no longer fit ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_sum_of_counts_is_asked_for_as_far_as_the_store_can_count() -> None:
    """Each count of a call fits, but their sum does not: limits are asked for the largest amount there is, exactly."""
    largest = Usage(input_tokens=LARGEST, cache_creation_input_tokens=LARGEST, output_tokens=LARGEST)
    policy = Policy(limits=[Limit(name="total", unit="total_tokens", quota=100, window="1m", oversize="reject")])
    meter = MemoryMeter(policy, clock=Clock())

    with pytest.raises(QuotaExceeded) as denied:
        meter.reserve("acme", {}, largest)
    meter.record("acme", {}, largest)

    assert LARGEST == denied.value.denials[0].requested
    assert LARGEST == meter.peek("acme")[0].used
    assert {LARGEST} == {amount_of(largest, unit) for unit in ("input_tokens", "output_tokens", "total_tokens")}
