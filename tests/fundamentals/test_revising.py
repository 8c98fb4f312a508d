"""Revise: hold a better estimate while the call runs, as when the provider tells how large the input really is."""

from __future__ import annotations

import pytest

from meterlib import Limit, Meter, Policy, QuotaExceeded, ReservationEnded, ReservationNotFound, Usage
from meterlib.testing import Clock
from tests.fundamentals.conftest import Entries, States

POLICY = Policy(
    limits=(
        Limit(name="input_tokens", unit="input_tokens", quota=1_000, window="1m"),
        Limit(name="output_tokens", unit="output_tokens", quota=1_000, window="1m"),
    )
)
HELD = Usage(input_tokens=400, output_tokens=300)


def test_a_revision_takes_the_place_of_the_estimate(meter: Meter, states: States) -> None:
    """A smaller estimate frees quota for others at once, a larger one takes more."""
    held = meter.reserve("acme", usage=HELD)
    held.revise(Usage(input_tokens=150, output_tokens=300))
    assert 150 == states()["input_tokens"].held

    held.revise(Usage(input_tokens=550, output_tokens=300))
    assert 550 == states()["input_tokens"].held


def test_what_a_revision_does_not_know_stays_held(meter: Meter, states: States) -> None:
    """The start of a stream tells the input; the output is still what was expected."""
    meter.reserve("acme", usage=HELD).revise(Usage(input_tokens=150))

    assert (150, 300) == (states()["input_tokens"].held, states()["output_tokens"].held)


def test_a_revision_is_never_refused(meter: Meter, states: States) -> None:
    """What is known of a running call may exceed the quota: the tokens are on their way. Later calls wait."""
    meter.reserve("acme", usage=HELD).revise(Usage(input_tokens=5_000))

    assert (5_000, 0) == (states()["input_tokens"].held, states()["input_tokens"].remaining)
    with pytest.raises(QuotaExceeded):
        meter.reserve("acme", usage=Usage(input_tokens=1))


def test_a_revision_that_arrives_late_changes_nothing(meter: Meter, states: States) -> None:
    """Revisions have numbers, so that one which was delayed on its way cannot undo a later one."""
    meter.reserve("acme", usage=HELD, reservation_id="call-1")
    meter.revise("acme", "call-1", Usage(input_tokens=200), revision=2)
    meter.revise("acme", "call-1", Usage(input_tokens=900), revision=1)
    meter.revise("acme", "call-1", Usage(input_tokens=900), revision=2)

    assert 200 == states()["input_tokens"].held


def test_a_revised_call_is_settled_like_any_other(meter: Meter, states: States, entries: Entries) -> None:
    """The hold that gives way is the revised one, and the entry has it as the estimate."""
    held = meter.reserve("acme", usage=HELD)
    held.revise(Usage(input_tokens=550, output_tokens=300))
    held.settle(Usage(input_tokens=500, output_tokens=20))

    assert [(500, 0), (20, 0)] == [(state.used, state.held) for state in states().values()]
    assert [{"input_tokens": 550, "output_tokens": 300}] == [entry.estimate for entry in entries()]


def test_only_an_open_reservation_can_be_revised(meter: Meter, clock: Clock) -> None:
    """The error tells whether there never was one, or how it ended."""
    with pytest.raises(ReservationNotFound):
        meter.revise("acme", "call-1", HELD)
    held = meter.reserve("acme", usage=HELD, lease_ms=1_000)
    clock.advance(ms=1_000)
    with pytest.raises(ReservationEnded) as ended:
        held.revise(HELD)

    assert "expired" == ended.value.kind
