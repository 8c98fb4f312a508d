"""Formulas: how a usage is turned into amounts, held against sums written out by hand."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterlib import InvalidInput, Iteration, Usage
from meterlib.core.usage import FORMULAS, amount_of, amounts_of

COUNTS = st.one_of(st.none(), st.integers(0, 10**9))
TYPES = st.sampled_from(["message", "compaction", "advisor_message", "something_new"])
ITERATIONS = st.builds(
    Iteration,
    type=TYPES,
    input_tokens=COUNTS,
    cache_creation_input_tokens=COUNTS,
    cache_read_input_tokens=COUNTS,
    output_tokens=COUNTS,
)
USAGES = st.builds(
    Usage,
    input_tokens=COUNTS,
    cache_creation_input_tokens=COUNTS,
    cache_read_input_tokens=COUNTS,
    output_tokens=COUNTS,
    iterations=st.lists(ITERATIONS, max_size=3).map(tuple),
    amounts=st.dictionaries(st.sampled_from(["cost_nanousd", "images"]), st.integers(0, 10**15)),
)


def beside(usage: Usage) -> list[Iteration]:
    """The passes whose tokens are not in the call's own numbers."""
    return [iteration for iteration in usage.iterations if iteration.type in ("compaction", "advisor_message")]


@given(USAGES)
def test_a_call_is_a_request(usage: Usage) -> None:
    """One, whatever else is known of it."""
    assert 1 == amount_of(usage, "requests")


@given(USAGES)
def test_input_is_what_was_read_anew_and_what_was_written_to_a_cache(usage: Usage) -> None:
    """Cache reads never count; of a call of which neither number is known, nothing is."""
    own = [usage.input_tokens, usage.cache_creation_input_tokens]
    more = [count for i in beside(usage) for count in (i.input_tokens, i.cache_creation_input_tokens)]
    expected = None if own == [None, None] else sum(count or 0 for count in own + more)

    assert expected == amount_of(usage, "input_tokens")


@given(USAGES)
def test_output_is_the_calls_own_and_that_of_passes_beside_it(usage: Usage) -> None:
    """Of a call whose own output is not known, nothing is."""
    expected = (
        None if usage.output_tokens is None else usage.output_tokens + sum(i.output_tokens or 0 for i in beside(usage))
    )

    assert expected == amount_of(usage, "output_tokens")


@given(USAGES)
def test_the_total_is_input_and_output(usage: Usage) -> None:
    """As those two count, so that the three never disagree."""
    both = [amount_of(usage, "input_tokens"), amount_of(usage, "output_tokens")]
    expected = None if both == [None, None] else sum(amount or 0 for amount in both)

    assert expected == amount_of(usage, "total_tokens")


@given(USAGES, COUNTS)
def test_cache_reads_make_no_difference(usage: Usage, reads: int | None) -> None:
    """Reading a cache is free for every limit."""
    other = msgspec.structs.replace(usage, cache_read_input_tokens=reads)

    assert [amount_of(usage, unit) for unit in FORMULAS] == [amount_of(other, unit) for unit in FORMULAS]


@given(USAGES)
def test_only_what_is_known_is_told(usage: Usage) -> None:
    """An amount that is not known is left out, and 0 is not."""
    units = (*FORMULAS, "cost_nanousd", "images", "pages", *usage.amounts)
    expected = {unit: amount_of(usage, unit) for unit in units if amount_of(usage, unit) is not None}

    assert expected == dict(amounts_of(usage))


def test_a_sum_is_never_more_than_what_can_be_counted() -> None:
    """Two counts may each be the largest there is; together they are held to the same."""
    largest = 2**53 - 1
    usage = Usage(input_tokens=largest, cache_creation_input_tokens=largest, output_tokens=largest)

    assert {"requests": 1} | dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), largest) == dict(
        amounts_of(usage)
    )


@given(USAGES)
def test_a_usage_survives_being_written_down(usage: Usage) -> None:
    """What a journal or a ledger holds is what was told: None stays None, and 0 stays 0."""
    assert usage == msgspec.json.decode(msgspec.json.encode(usage), type=Usage)


def test_a_usage_cannot_be_changed() -> None:
    """It was checked when it was made."""
    with pytest.raises(AttributeError):
        Usage(input_tokens=1).input_tokens = -1  # type: ignore[misc]
    with pytest.raises(InvalidInput):
        msgspec.structs.replace(Usage(input_tokens=1), input_tokens=-1)
