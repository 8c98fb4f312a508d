"""Leases: a reservation that nobody settles ends by itself, so that no crash holds anything for ever."""

from __future__ import annotations

import pytest

from meterlib import Limit, Meter, Policy, ReservationEnded, Usage
from meterlib.testing import Clock
from tests.fundamentals.conftest import Entries, States

POLICY = Policy(
    limits=(
        Limit(name="at_once", quota=1, open=True),
        Limit(name="per_hour", unit="output_tokens", quota=1_000, window="1h"),
        Limit(name="kept", unit="output_tokens", quota=1_000, period="day"),
        Limit(name="freed", unit="output_tokens", quota=1_000, period="day", on_expiry="free"),
    )
)
HELD = Usage(output_tokens=400)


def test_a_reservation_is_open_until_its_lease_ends(meter: Meter, clock: Clock) -> None:
    """To the millisecond: one before the end it can be revised, at the end it is over."""
    held = meter.reserve("acme", usage=HELD, lease_ms=30_000)
    assert clock.now_ms + 30_000 == held.expires_at_ms

    clock.advance(ms=29_999)
    held.revise(HELD)
    clock.advance(ms=1)
    with pytest.raises(ReservationEnded) as ended:
        held.revise(HELD)
    assert "expired" == ended.value.kind


def test_a_lease_is_ten_minutes_unless_told(meter: Meter, clock: Clock) -> None:
    """Long enough for a long answer, short enough for a crash."""
    assert clock.now_ms + 600_000 == meter.reserve("acme", usage=HELD).expires_at_ms


def test_an_expired_reservation_frees_its_slot(meter: Meter, clock: Clock, states: States) -> None:
    """The next call passes although the crashed one never said that it ended."""
    meter.reserve("acme", usage=HELD, lease_ms=30_000)
    clock.advance(ms=30_000)

    assert 0 == states()["at_once"].used
    meter.reserve("acme", usage=HELD)


def test_a_window_keeps_what_an_expired_reservation_held(meter: Meter, clock: Clock, states: States) -> None:
    """The call may well have been made, so it counts as expected until it slides out."""
    meter.reserve("acme", usage=HELD, lease_ms=30_000)
    clock.advance(ms=30_000)
    meter.sweep()
    assert (400, 0) == (states()["per_hour"].used, states()["per_hour"].held)

    clock.advance(ms=3_600_000 + 60_000)
    assert 0 == states()["per_hour"].used


def test_a_period_keeps_or_frees_it_as_the_limit_says(meter: Meter, clock: Clock, states: States) -> None:
    """`on_expiry` chooses between a budget that is never exceeded and one that no crash eats up."""
    meter.reserve("acme", usage=HELD, lease_ms=30_000)
    assert (400, 400) == (states()["kept"].used, states()["freed"].used)

    clock.advance(ms=30_000)
    meter.sweep()
    assert (400, 0) == (states()["kept"].used, states()["kept"].held)
    assert 0 == states()["freed"].used


@pytest.mark.parametrize("used", [150, 650])
def test_a_late_settle_sets_a_period_right(meter: Meter, clock: Clock, states: States, used: int) -> None:
    """Whether the expired hold was kept or freed, the day counts what was used in the end."""
    held = meter.reserve("acme", usage=HELD, lease_ms=30_000)
    clock.advance(ms=30_000)
    meter.sweep()
    held.settle(Usage(output_tokens=used))

    assert (used, used) == (states()["kept"].used, states()["freed"].used)


def test_a_settle_in_time_counts_on_both_kinds_of_period(meter: Meter, clock: Clock, states: States) -> None:
    """What was used stays for the rest of the period, long after the lease is over."""
    held = meter.reserve("acme", usage=HELD, lease_ms=30_000)
    clock.advance(ms=10_000)
    held.settle(Usage(output_tokens=150))
    clock.advance(ms=600_000)

    assert (150, 150) == (states()["kept"].used, states()["freed"].used)


def test_an_expired_reservation_is_in_the_ledger(meter: Meter, clock: Clock, entries: Entries) -> None:
    """The entry tells what had been held and for whom, so that nothing is lost silently."""
    meter.reserve("acme", {"model": "large"}, HELD, reservation_id="call-1", lease_ms=30_000)
    clock.advance(ms=45_000)
    swept = meter.sweep()

    assert 1 == swept.expired
    assert [("expired", "call-1", {"model": "large"}, {"output_tokens": 400}, {})] == [
        (entry.kind, entry.reservation_id, entry.attributes, entry.estimate, entry.usage) for entry in entries()
    ]
    assert [clock.now_ms] == [entry.booked_at for entry in entries()]


def test_a_renewed_lease_ends_later(meter: Meter, clock: Clock, states: States) -> None:
    """A long call says now and then that it still runs, and keeps its slot."""
    held = meter.reserve("acme", usage=HELD, lease_ms=30_000)
    clock.advance(ms=20_000)
    held.renew(60_000)
    assert clock.now_ms + 60_000 == held.expires_at_ms

    clock.advance(ms=59_999)
    assert (1, 400) == (states()["at_once"].used, states()["freed"].held)
    clock.advance(ms=1)
    assert (0, 0) == (states()["at_once"].used, states()["freed"].held)


def test_renewing_never_makes_a_lease_shorter(meter: Meter) -> None:
    """A careless renewal does not end a call."""
    held = meter.reserve("acme", usage=HELD, lease_ms=60_000)
    ends_ms = held.expires_at_ms
    held.renew(1_000)

    assert ends_ms == held.expires_at_ms


def test_a_lease_renewed_beyond_the_period_holds_until_its_end(meter: Meter, clock: Clock, states: States) -> None:
    """A call across midnight keeps its part of today's budget for as long as there is a today."""
    midnight_ms = 1_790_035_200_000
    clock.set(midnight_ms - 60_000)
    held = meter.reserve("acme", usage=HELD, lease_ms=30_000)
    clock.advance(ms=20_000)
    held.renew(600_000)
    clock.set(midnight_ms - 1)
    assert (400, 400) == (states()["freed"].held, states()["kept"].held)

    clock.set(midnight_ms)
    assert (0, 0) == (states()["freed"].held, states()["kept"].held)
    assert "settled" == held.settle(HELD).kind


def test_a_lease_renewed_beyond_the_period_lets_go_of_it_when_cancelled(
    meter: Meter, clock: Clock, states: States
) -> None:
    """Wherever its hold was moved by renewing, it is found again and freed."""
    clock.set(1_790_035_200_000 - 60_000)
    held = meter.reserve("acme", usage=HELD, lease_ms=30_000)
    held.renew(600_000)
    held.cancel()
    assert (0, 0) == (states()["freed"].used, states()["kept"].used)


def test_a_lease_is_over_to_the_millisecond_though_nobody_swept_it(meter: Meter, clock: Clock) -> None:
    """A call clears two in passing; the third that is overdue has ended all the same."""
    meter.policy = Policy()
    for name in ("first", "second", "third"):
        meter.reserve("acme", usage=HELD, reservation_id=name, lease_ms=30_000)
    clock.advance(ms=30_000)
    with pytest.raises(ReservationEnded) as ended:
        meter.reserve("acme", usage=HELD, reservation_id="third", lease_ms=30_000)
    assert "expired" == ended.value.kind


def test_no_reservation_lives_longer_than_a_day(meter: Meter, clock: Clock) -> None:
    """A client that renews for ever in a loop lets go in the end."""
    began_ms = clock.now_ms
    held = meter.reserve("acme", usage=HELD, lease_ms=20 * 3_600_000)
    clock.advance(ms=10 * 3_600_000)
    held.renew(20 * 3_600_000)

    assert began_ms + 24 * 3_600_000 == held.expires_at_ms


@pytest.mark.parametrize("verb", ["reserve", "revise", "settle", "cancel", "record"])
def test_every_call_ends_some_that_are_overdue_in_passing(
    meter: Meter, clock: Clock, entries: Entries, verb: str
) -> None:
    """A busy store needs no sweep to be rid of what a crash left behind."""
    running = meter.reserve("acme", usage=Usage(), reservation_id="running")
    meter.policy = Policy(limits=POLICY.limits[1:])
    meter.reserve("acme", usage=HELD, reservation_id="abandoned", lease_ms=30_000)
    clock.advance(ms=30_000)
    if verb == "reserve":
        meter.reserve("acme", usage=HELD)
    elif verb == "revise":
        running.revise(HELD)
    elif verb == "settle":
        running.settle(HELD)
    elif verb == "cancel":
        running.cancel()
    else:
        meter.record("acme", {}, HELD)

    assert ("expired", "abandoned", 1) == (entries()[0].kind, entries()[0].reservation_id, entries()[0].n)


def test_a_sweep_ends_everything_that_is_overdue(meter: Meter, clock: Clock, entries: Entries) -> None:
    """However many reservations a crash left behind, of whichever tenants; those in time are left alone."""
    for number in range(20):
        meter.reserve(f"tenant-{number}", usage=HELD, lease_ms=30_000)
    meter.reserve("busy", usage=HELD, lease_ms=60_000, reservation_id="running")
    clock.advance(ms=30_000)

    assert (20, 0) == (meter.sweep().expired, meter.sweep().expired)
    assert ["expired"] * 20 == [entry.kind for entry in entries()]
    assert "open" == meter.find("busy", "running").status
