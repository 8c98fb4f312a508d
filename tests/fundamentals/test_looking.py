"""Peek and find: see how limits and reservations stand, and change nothing by it."""

from __future__ import annotations

import pytest

from meterlib import Limit, Meter, Policy, ReservationNotFound, Usage
from meterlib.testing import Clock
from tests.fundamentals.conftest import Entries

POLICY = Policy(
    limits=(
        Limit(name="output", unit="output_tokens", quota=1_000, window="1m"),
        Limit(name="at_once", quota=2, open=True),
    )
)
HELD = Usage(output_tokens=400)


def test_peek_tells_what_is_used_what_is_held_and_what_is_left(meter: Meter, clock: Clock) -> None:
    """`used` is all that counts now, `held` is the open part of it, and `remaining` is never negative."""
    meter.reserve("acme", usage=HELD).settle(Usage(output_tokens=150))
    meter.reserve("acme", usage=HELD)
    output, at_once = meter.peek("acme")

    assert ("output", "output_tokens", 1_000, 550, 400, 450) == (
        output.name,
        output.unit,
        output.quota,
        output.used,
        output.held,
        output.remaining,
    )
    assert ("at_once", 2, 1, 1, 1) == (at_once.name, at_once.quota, at_once.used, at_once.held, at_once.remaining)
    assert clock.now_ms == output.now_ms


def test_a_tenant_nobody_has_seen_has_all_of_its_quota(meter: Meter) -> None:
    """Looking needs no setting up."""
    assert [(0, 0, 1_000), (0, 0, 2)] == [(s.used, s.held, s.remaining) for s in meter.peek("new")]


def test_looking_changes_nothing(meter: Meter, clock: Clock, entries: Entries) -> None:
    """Not even an overdue reservation is ended by it, though it shows as expired."""
    meter.reserve("acme", usage=HELD, reservation_id="call-1", lease_ms=10_000)
    clock.advance(ms=10_000)
    for _ in range(3):
        meter.peek("acme")
        assert "expired" == meter.find("acme", "call-1").status

    assert [] == entries()
    assert 1 == meter.sweep().expired


def test_find_tells_where_a_reservation_stands(meter: Meter, clock: Clock) -> None:
    """Open with its lease, or how and when it ended and which entry says so."""
    began_ms = clock.now_ms
    for name in ("settled", "cancelled", "expired", "late"):
        meter.reserve("acme" if name == "settled" else name, reservation_id=name, lease_ms=30_000)
    found = meter.find("acme", "settled")
    assert ("open", began_ms, began_ms + 30_000, None) == (
        found.status,
        found.reserved_at_ms,
        found.expires_at_ms,
        found.n,
    )

    clock.advance(ms=5_000)
    entry = meter.settle("acme", "settled", HELD)
    meter.cancel("cancelled", "cancelled")
    clock.advance(ms=30_000)
    meter.sweep()
    meter.settle("late", "late", HELD)
    ends = {name: meter.find("acme" if name == "settled" else name, name) for name in ("settled", "cancelled", "late")}

    assert {name: name for name in ends} == {name: end.status for name, end in ends.items()}
    assert (entry.n, began_ms, began_ms + 5_000) == (
        ends["settled"].n,
        ends["settled"].reserved_at_ms,
        ends["settled"].booked_at_ms,
    )
    assert "expired" == meter.find("expired", "expired").status


def test_a_reservation_that_never_was_is_not_found(meter: Meter) -> None:
    """And so is one of another tenant."""
    meter.reserve("acme", reservation_id="call-1")
    with pytest.raises(ReservationNotFound):
        meter.find("acme", "call-2")
    with pytest.raises(ReservationNotFound):
        meter.find("other", "call-1")


def test_an_id_is_remembered_for_a_day(meter: Meter, clock: Clock) -> None:
    """Longer than anybody repeats a call; then the store forgets it, and the ledger has it for ever."""
    meter.reserve("acme", reservation_id="call-1").settle(HELD)
    clock.advance(ms=24 * 3_600_000 - 1)
    meter.sweep()
    assert "settled" == meter.find("acme", "call-1").status

    clock.advance(ms=1)
    meter.sweep()
    with pytest.raises(ReservationNotFound):
        meter.find("acme", "call-1")


def test_an_id_is_remembered_for_a_day_since_its_last_word(meter: Meter, clock: Clock) -> None:
    """A reservation that expired, and was settled late, is known for a day after that."""
    meter.reserve("acme", usage=HELD, reservation_id="call-1", lease_ms=1)
    clock.advance(ms=1)
    meter.sweep()
    clock.advance(ms=12 * 3_600_000)
    meter.settle("acme", "call-1", HELD)
    clock.advance(ms=24 * 3_600_000 - 1)
    meter.sweep()
    assert "late" == meter.find("acme", "call-1").status

    clock.advance(ms=1)
    meter.sweep()
    with pytest.raises(ReservationNotFound):
        meter.find("acme", "call-1")
