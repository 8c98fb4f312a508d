"""Cancel: free the whole hold, since nothing was sent to the provider."""

from __future__ import annotations

import pytest

from meterlib import Limit, Meter, Policy, ReservationEnded, Usage
from tests.fundamentals.conftest import Entries, States

POLICY = Policy(
    limits=(
        Limit(name="requests", quota=3, window="1m"),
        Limit(name="tokens", unit="total_tokens", quota=1_000, period="day"),
        Limit(name="at_once", quota=2, open=True),
    )
)


def test_a_cancelled_call_counts_nowhere(meter: Meter, states: States) -> None:
    """All of the hold is free again, the request included."""
    before = meter.peek("acme")
    meter.reserve("acme", usage=Usage(input_tokens=400)).cancel()

    assert [0, 0, 0] == [state.used for state in states().values()]
    assert before == meter.peek("acme")


def test_a_cancelled_call_is_in_the_ledger(meter: Meter, entries: Entries) -> None:
    """The entry tells what had been held, and that nothing was used."""
    meter.reserve("acme", usage=Usage(input_tokens=400), reservation_id="call-1").cancel()

    assert [("cancelled", "call-1", {"input_tokens": 400}, {})] == [
        (entry.kind, entry.reservation_id, entry.estimate, entry.usage) for entry in entries()
    ]


def test_a_reserve_that_comes_after_its_cancel_opens_nothing(meter: Meter, states: States, entries: Entries) -> None:
    """A reserve that was delayed on its way finds that its call was given up, and holds nothing for ever."""
    meter.cancel("acme", "call-1")
    with pytest.raises(ReservationEnded) as ended:
        meter.reserve("acme", reservation_id="call-1")

    assert "cancelled" == ended.value.kind
    assert [0, 0, 0] == [state.used for state in states().values()]
    assert [] == entries()


def test_a_settled_call_cannot_be_cancelled(meter: Meter, states: States) -> None:
    """What was used stays used."""
    held = meter.reserve("acme", usage=Usage(input_tokens=400))
    held.settle(Usage(input_tokens=300))
    with pytest.raises(ReservationEnded) as ended:
        held.cancel()

    assert "settled" == ended.value.kind
    assert 300 == states()["tokens"].used
