"""Units: what a limit counts, from the numbers that a provider reports or from any that a caller works out."""

from __future__ import annotations

import pytest

from meterlib import CacheCreation, Iteration, Limit, Meter, Policy, QuotaExceeded, Usage
from meterlib.testing import Clock
from tests.fundamentals.conftest import States

POLICY = Policy(
    limits=(
        Limit(name="requests", quota=1_000, window="1m"),
        Limit(name="input", unit="input_tokens", quota=100_000, window="1m"),
        Limit(name="output", unit="output_tokens", quota=100_000, window="1m"),
        Limit(name="total", unit="total_tokens", quota=100_000, window="1m"),
    )
)


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        (Usage(), (0, 0, 0)),
        (Usage(input_tokens=31), (31, 0, 31)),
        (Usage(cache_creation_input_tokens=1_149), (1_149, 0, 1_149)),
        (Usage(input_tokens=31, cache_creation_input_tokens=1_149), (1_180, 0, 1_180)),
        (Usage(input_tokens=31, cache_read_input_tokens=90_000), (31, 0, 31)),
        (Usage(output_tokens=212), (0, 212, 212)),
        (Usage(input_tokens=31, output_tokens=212, cache_read_input_tokens=5), (31, 212, 243)),
        (
            Usage(
                input_tokens=31,
                cache_creation_input_tokens=100,
                cache_creation=CacheCreation(ephemeral_5m_input_tokens=60, ephemeral_1h_input_tokens=40),
            ),
            (131, 0, 131),
        ),
    ],
)
def test_input_tokens_are_what_was_read_and_written_but_not_what_came_from_a_cache(
    meter: Meter, states: States, usage: Usage, tokens: tuple[int, int, int]
) -> None:
    """`cache_creation_input_tokens + input_tokens`; cache reads are free, and a split is no addition."""
    meter.reserve("acme", usage=usage).settle(usage)

    assert (1, *tokens) == tuple(state.used for state in states().values())


def test_passes_that_a_provider_made_by_itself_count_too(meter: Meter, states: States) -> None:
    """Compaction and advisor passes are not in a call's own numbers; its other passes are."""
    usage = Usage(
        input_tokens=100,
        output_tokens=50,
        iterations=(
            Iteration(type="message", input_tokens=100, output_tokens=50),
            Iteration(type="compaction", input_tokens=2_000, output_tokens=300, cache_read_input_tokens=9_000),
            Iteration(type="advisor_message", input_tokens=30, cache_creation_input_tokens=7, output_tokens=4),
        ),
    )
    meter.reserve("acme").settle(usage)

    assert (2_137, 354, 2_491) == tuple(states()[name].used for name in ("input", "output", "total"))


def test_every_call_is_one_request(meter: Meter, states: States) -> None:
    """Whatever it used, and also if it is only told afterwards."""
    meter.reserve("acme").settle(Usage())
    meter.reserve("acme", usage=Usage(input_tokens=999)).settle(Usage(input_tokens=1))
    meter.record("acme", {}, Usage(output_tokens=1))

    assert 3 == states()["requests"].used


def test_a_budget_in_dollars_is_a_limit_like_any_other(meter: Meter, clock: Clock, states: States) -> None:
    """The caller works out what a call costs, in billionths of a dollar; a month of it is a quota."""
    meter.policy = Policy(limits=(Limit(name="usd", unit="cost_nanousd", quota=10 * 10**9, period="month"),))
    expected = Usage(input_tokens=1_200, amounts={"cost_nanousd": 9 * 10**9})
    meter.reserve("acme", usage=expected).settle(Usage(input_tokens=1_200, amounts={"cost_nanousd": 4 * 10**9}))
    assert 6 * 10**9 == states()["usd"].remaining

    meter.reserve("acme", usage=Usage(amounts={"cost_nanousd": 6 * 10**9}))
    with pytest.raises(QuotaExceeded) as denied:
        meter.reserve("acme", usage=Usage(amounts={"cost_nanousd": 1}))
    assert ("usd", "cost_nanousd") == (denied.value.denials[0].name, denied.value.denials[0].unit)


def test_large_numbers_are_exact(meter: Meter, states: States) -> None:
    """Up to 2^53 - 1 nothing is rounded, though the store counts in floating point."""
    largest = 2**53 - 1
    meter.policy = Policy(limits=(Limit(name="usd", unit="cost_nanousd", quota=largest, period="month"),))
    meter.record("acme", {}, Usage(amounts={"cost_nanousd": largest - 2}))
    meter.reserve("acme", usage=Usage(amounts={"cost_nanousd": 1}))
    assert (largest - 1, 1) == (states()["usd"].used, states()["usd"].remaining)

    with pytest.raises(QuotaExceeded):
        meter.reserve("acme", usage=Usage(amounts={"cost_nanousd": 2}))
    meter.reserve("acme", usage=Usage(amounts={"cost_nanousd": 1}))
    assert largest == states()["usd"].used


def test_the_preset_is_what_the_model_service_promises(meter: Meter) -> None:
    """50 requests and 50,000 input tokens in a minute, for each provider."""
    meter.policy = Policy.preset("buildkite-anthropic")
    attributes = {"provider": "anthropic"}
    for _ in range(50):
        meter.reserve("acme", attributes, Usage(input_tokens=1_000))
    with pytest.raises(QuotaExceeded) as denied:
        meter.reserve("acme", attributes, Usage(input_tokens=1))
    meter.reserve("acme", {"provider": "bedrock"}, Usage(input_tokens=50_000))

    assert {"requests": 50, "input_tokens": 50_000} == {d.name: d.quota for d in denied.value.denials}


def test_usage_counts_on_every_limit_that_its_reservation_holds(meter: Meter, states: States) -> None:
    """Whatever the limits are where it is settled: a process with an older policy, or with none, tells all it knows."""
    held_under = Policy(
        limits=(*POLICY.limits, Limit(name="usd", unit="cost_nanousd", quota=10 * 10**9, period="month"))
    )
    meter.policy = held_under
    expected = Usage(input_tokens=5_000, output_tokens=4_000, requests=3, amounts={"cost_nanousd": 9 * 10**9})
    meter.reserve("acme", usage=expected, reservation_id="revised")
    meter.reserve("acme", usage=Usage(), reservation_id="settled")

    meter.policy = Policy()
    meter.revise("acme", "revised", Usage(input_tokens=100, output_tokens=20, amounts={"cost_nanousd": 10**9}))
    meter.settle("acme", "settled", Usage(input_tokens=7, output_tokens=2, amounts={"cost_nanousd": 3}))

    meter.policy = held_under
    assert (2, 107, 22, 129, 10**9 + 3) == tuple(state.used for state in states().values())
