"""Unknown numbers: None is not 0; where a number is not known, what was held for it goes on counting."""

from __future__ import annotations

from meterlib import Limit, Meter, Policy, Usage
from meterlib.testing import Clock
from tests.fundamentals.conftest import Entries, States

POLICY = Policy(
    limits=(
        Limit(name="input", unit="input_tokens", quota=1_000, window="1m"),
        Limit(name="output", unit="output_tokens", quota=1_000, window="1m"),
        Limit(name="usd", unit="cost_nanousd", quota=1_000, period="day"),
    )
)
HELD = Usage(input_tokens=400, output_tokens=300, amounts={"cost_nanousd": 200})


def test_a_number_that_is_not_known_keeps_its_hold(meter: Meter, states: States) -> None:
    """A stream that broke off told its input, and never its output: the estimate of that is charged."""
    meter.reserve("acme", usage=HELD).settle(Usage(input_tokens=350), quality="partial")

    assert [(350, 0), (300, 0), (200, 0)] == [(state.used, state.held) for state in states().values()]


def test_a_number_that_is_zero_frees_its_hold(meter: Meter, states: States) -> None:
    """0 is known: nothing was used."""
    meter.reserve("acme", usage=HELD).settle(Usage(input_tokens=0, output_tokens=0, amounts={"cost_nanousd": 0}))

    assert [0, 0, 0] == [state.used for state in states().values()]


def test_an_entry_tells_only_what_is_known(meter: Meter, entries: Entries) -> None:
    """A bill can tell a number that nobody reported from a 0, and how far numbers are to be trusted."""
    meter.reserve("acme", usage=HELD).settle(Usage(input_tokens=350, cache_read_input_tokens=0), quality="partial")

    assert [{"input_tokens": 350, "cache_read_input_tokens": 0}] == [entry.usage for entry in entries()]
    assert ["partial"] == [entry.quality for entry in entries()]


def test_a_late_number_that_is_not_known_stays_as_it_was_left(meter: Meter, clock: Clock, states: States) -> None:
    """An expired call's hold is kept by its budget; a late settle that does not know better leaves it so."""
    held = meter.reserve("acme", usage=HELD, lease_ms=10_000)
    clock.advance(ms=10_000)
    held.settle(Usage(input_tokens=350))

    assert [350, 300, 200] == [state.used for state in states().values()]
