"""Repeating: every verb may be sent again under its id, and what was done once is not done twice."""

from __future__ import annotations

import pytest

from meterlib import Limit, Meter, Policy, ReservationConflict, ReservationEnded, Usage
from meterlib.testing import Clock
from tests.fundamentals.conftest import Entries, States

POLICY = Policy(
    limits=(
        Limit(name="requests", quota=10, window="1m"),
        Limit(name="output", unit="output_tokens", quota=1_000, period="day"),
    )
)
HELD = Usage(output_tokens=400)
MODEL = {"model": "large"}


def test_reserving_again_gives_the_same_reservation(meter: Meter, clock: Clock, states: States) -> None:
    """A client that heard no answer asks again, and holds once; the lease is the first one's."""
    first = meter.reserve("acme", MODEL, HELD, reservation_id="call-1")
    clock.advance(ms=5_000)
    again = meter.reserve("acme", MODEL, HELD, reservation_id="call-1")

    assert (first.id, first.reserved_at_ms, first.expires_at_ms) == (
        again.id,
        again.reserved_at_ms,
        again.expires_at_ms,
    )
    assert (1, 400) == (states("acme", MODEL)["requests"].used, states("acme", MODEL)["output"].held)


@pytest.mark.parametrize(
    ("attributes", "usage"),
    [({"model": "small"}, HELD), (MODEL, Usage(output_tokens=401)), ({}, HELD), (MODEL, Usage())],
)
def test_reserving_something_else_under_an_open_id_is_a_conflict(
    meter: Meter, states: States, attributes: dict[str, str], usage: Usage
) -> None:
    """The error names both payloads, and neither limit changes."""
    meter.reserve("acme", MODEL, HELD, reservation_id="call-1")
    before = states("acme", MODEL)
    with pytest.raises(ReservationConflict) as conflict:
        meter.reserve("acme", attributes, usage, reservation_id="call-1")

    assert "call-1" == conflict.value.reservation_id
    assert conflict.value.existing != conflict.value.given
    assert before == states("acme", MODEL)


def test_settling_again_books_once(meter: Meter, clock: Clock, states: States, entries: Entries) -> None:
    """A client that retries after a time-out is not billed twice, and gets the same entry, late or not."""
    held = meter.reserve("acme", MODEL, HELD)
    first = held.settle(Usage(output_tokens=150))
    clock.advance(ms=5_000)
    again = held.settle(Usage(output_tokens=150))

    assert (first.n, first.kind, first.booked_at, first.usage) == (again.n, again.kind, again.booked_at, again.usage)
    assert (150, 0) == (states()["output"].used, states()["output"].held)
    assert 1 == len(entries())


@pytest.mark.parametrize("end", ["in time", "expired", "cancelled"])
def test_settling_again_by_id_gives_the_same_entry(meter: Meter, clock: Clock, end: str) -> None:
    """Field by field: whose call it was, what had been held, how it had ended before."""
    meter.reserve("acme", MODEL, HELD, reservation_id="call-1", lease_ms=30_000)
    if end == "cancelled":
        meter.cancel("acme", "call-1")
    clock.advance(ms=30_000 if end == "expired" else 1)
    first = meter.settle("acme", "call-1", Usage(output_tokens=150))
    clock.advance(ms=5_000)

    assert (MODEL, {"output_tokens": 400}) == (first.attributes, first.estimate)
    assert ("" if end == "in time" else end) == first.after
    assert first == meter.settle("acme", "call-1", Usage(output_tokens=150))


def test_settling_with_another_usage_is_a_conflict(meter: Meter, states: States, entries: Entries) -> None:
    """What is booked stays; a correction is an entry of its own."""
    held = meter.reserve("acme", MODEL, HELD)
    held.settle(Usage(output_tokens=150))
    with pytest.raises(ReservationConflict) as conflict:
        held.settle(Usage(output_tokens=151))

    assert "150" in (conflict.value.existing or "")
    assert "151" in (conflict.value.given or "")
    assert (150, 1) == (states()["output"].used, len(entries()))


def test_a_late_settle_may_be_repeated_as_well(meter: Meter, states: States, entries: Entries) -> None:
    """Also one of a reservation that nobody knows."""
    first = meter.settle("acme", "lost", HELD, attributes=MODEL)
    again = meter.settle("acme", "lost", HELD, attributes=MODEL)

    assert (first.n, "late") == (again.n, again.kind)
    assert (400, 1) == (states()["output"].used, len(entries()))


def test_cancelling_again_frees_once(meter: Meter, states: States, entries: Entries) -> None:
    """The second cancel takes nothing from other calls."""
    held = meter.reserve("acme", MODEL, HELD)
    meter.reserve("acme", MODEL, HELD)
    held.cancel()
    held.cancel()

    assert (1, 400) == (states()["requests"].used, states()["output"].held)
    assert 1 == len(entries())


@pytest.mark.parametrize("end", ["settle", "cancel"])
def test_a_reserve_that_comes_after_the_end_opens_nothing(meter: Meter, states: States, end: str) -> None:
    """A delayed repetition finds its call ended, and says how."""
    held = meter.reserve("acme", MODEL, HELD, reservation_id="call-1")
    held.settle(Usage(output_tokens=150)) if end == "settle" else held.cancel()
    before = meter.peek("acme")
    with pytest.raises(ReservationEnded) as ended:
        meter.reserve("acme", MODEL, HELD, reservation_id="call-1")

    assert {"settle": "settled", "cancel": "cancelled"}[end] == ended.value.kind
    assert before == meter.peek("acme")


def test_a_denied_call_may_be_tried_again_under_its_id(meter: Meter, clock: Clock) -> None:
    """A denial leaves nothing behind, not even the id."""
    meter.policy = Policy(limits=(Limit(name="requests", quota=1, window="1m"),))
    meter.reserve("acme").settle(Usage())
    with pytest.raises(Exception, match="denied"):
        meter.reserve("acme", reservation_id="call-1")
    clock.advance(ms=60_000)

    assert "call-1" == meter.reserve("acme", reservation_id="call-1").id
