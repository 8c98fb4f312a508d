"""Concurrency: how many calls of a tenant may run at the same time."""

from __future__ import annotations

import pytest

from meterlib import Limit, Meter, Policy, QuotaExceeded, Usage
from meterlib.testing import Clock
from tests.fundamentals.conftest import States

POLICY = Policy(limits=(Limit(name="at_once", quota=2, open=True, retry_hint_ms=750),))


def test_only_so_many_calls_run_at_once(meter: Meter, states: States) -> None:
    """The third one is denied while two are running."""
    meter.reserve("acme")
    meter.reserve("acme")
    with pytest.raises(QuotaExceeded):
        meter.reserve("acme")

    assert (2, 2, 0) == (states()["at_once"].used, states()["at_once"].held, states()["at_once"].remaining)


@pytest.mark.parametrize("end", ["settle", "cancel"])
def test_a_call_that_ends_makes_room_at_once(meter: Meter, states: States, end: str) -> None:
    """No time has to pass, and nothing of the call stays."""
    held = [meter.reserve("acme"), meter.reserve("acme")]
    held[0].settle(Usage()) if end == "settle" else held[0].cancel()

    assert 1 == states()["at_once"].used
    meter.reserve("acme")


def test_time_alone_makes_no_room(meter: Meter, clock: Clock, states: States) -> None:
    """A call that runs and renews its lease has its slot for as long as it takes."""
    held = meter.reserve("acme")
    for _ in range(6):
        clock.advance(ms=590_000)
        held.renew()

    assert 1 == states()["at_once"].used


def test_a_denial_for_want_of_a_slot_gives_a_hint(meter: Meter) -> None:
    """Nobody knows when a running call ends: the time to come back is a configured guess, marked as one."""
    meter.reserve("acme")
    meter.reserve("acme")
    with pytest.raises(QuotaExceeded) as denied:
        meter.reserve("acme")

    assert (750, True, True) == (denied.value.retry_after_ms, denied.value.hint, denied.value.retryable)
    assert denied.value.denials[0].hint


def test_a_slot_is_settled_only_once(meter: Meter, states: States) -> None:
    """Settling twice does not make room for two."""
    held = meter.reserve("acme")
    meter.reserve("acme")
    held.settle(Usage(output_tokens=5))
    held.settle(Usage(output_tokens=5))

    assert 1 == states()["at_once"].used


def test_what_a_call_used_takes_no_slot(meter: Meter, states: States) -> None:
    """Recorded usage, and usage that comes late, is of a call that is over."""
    meter.record("acme", {}, Usage(output_tokens=5))
    held = meter.reserve("acme")
    held.cancel()
    held.settle(Usage(output_tokens=5))

    assert 0 == states()["at_once"].used
