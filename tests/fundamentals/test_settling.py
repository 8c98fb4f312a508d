"""Settle: replace the hold by what was really used, and write it down, in one step."""

from __future__ import annotations

import pytest

from meterlib import Limit, Meter, Policy, QuotaExceeded, Usage
from meterlib.testing import Clock
from tests.fundamentals.conftest import Entries, States

POLICY = Policy(
    limits=(
        Limit(name="per_minute", unit="output_tokens", quota=1_000, window="1m"),
        Limit(name="per_day", unit="output_tokens", quota=10_000, period="day"),
    )
)
HELD = Usage(output_tokens=400)


def test_a_settled_call_counts_what_it_used(meter: Meter, states: States) -> None:
    """The estimate gives way to the truth on every limit, be it less or more."""
    meter.reserve("acme", usage=HELD).settle(Usage(output_tokens=150))
    meter.reserve("acme", usage=HELD).settle(Usage(output_tokens=550))

    for state in states().values():
        assert (700, 0) == (state.used, state.held)


def test_a_settled_call_is_in_the_ledger(meter: Meter, clock: Clock, entries: Entries) -> None:
    """One entry tells who called, what was expected, what was used, and when."""
    held = meter.reserve("acme", {"provider": "anthropic"}, HELD, reservation_id="call-1")
    clock.advance(ms=2_500)
    entry = held.settle(Usage(output_tokens=150), facts={"request_id": "req_1"})
    written = entries()

    assert 1 == len(written)
    for told in (entry, written[0]):
        assert ("settled", "acme", "call-1", 1) == (told.kind, told.tenant, told.reservation_id, told.n)
        assert ({"provider": "anthropic"}, "hosted", "final") == (told.attributes, told.funding, told.quality)
        assert ({"output_tokens": 150}, {"request_id": "req_1"}) == (told.usage, told.facts)
        assert (1_790_000_000_000, 1_790_000_002_500) == (told.reserved_at, told.booked_at)
    assert {"output_tokens": 400} == written[0].estimate


def test_any_process_may_settle_by_id(meter: Meter) -> None:
    """The id is all it takes; the entry still has the call's attributes."""
    meter.reserve("acme", {"provider": "anthropic"}, HELD, reservation_id="call-1")
    entry = meter.settle("acme", "call-1", Usage(output_tokens=150))

    assert ("settled", {"provider": "anthropic"}) == (entry.kind, entry.attributes)


def test_usage_counts_at_the_time_of_its_reservation(meter: Meter, clock: Clock, states: States) -> None:
    """A long call's tokens slide out a minute after it began, not a minute after it ended."""
    held = meter.reserve("acme", usage=HELD)
    clock.advance(ms=50_000)
    held.settle(Usage(output_tokens=500))
    assert 500 == states()["per_minute"].used

    clock.advance(ms=11_000)
    assert 0 == states()["per_minute"].used


def test_a_settle_leaves_a_window_alone_that_has_slid_on(meter: Meter, clock: Clock, states: States) -> None:
    """Usage of two minutes ago does not count against this minute, but it does against the day."""
    held = meter.reserve("acme", usage=HELD)
    clock.advance(ms=120_000)
    held.settle(Usage(output_tokens=500))

    assert 0 == states()["per_minute"].used
    assert 500 == states()["per_day"].used


def test_usage_beyond_the_quota_is_debt(meter: Meter, clock: Clock, states: States) -> None:
    """What was used is charged in full; later calls wait until enough of it has slid out, and nothing is clamped."""
    meter.reserve("acme", usage=HELD).settle(Usage(output_tokens=1_500))

    assert (1_500, 0) == (states()["per_minute"].used, states()["per_minute"].remaining)
    with pytest.raises(QuotaExceeded) as denied:
        meter.reserve("acme", usage=Usage(output_tokens=1))
    assert (1_500, 1_000) == (denied.value.denials[0].used, denied.value.denials[0].quota)

    clock.advance(ms=denied.value.retry_after_ms or 0)
    meter.reserve("acme", usage=Usage(output_tokens=1))


def test_a_late_settle_is_booked_and_marked(meter: Meter, clock: Clock, states: States) -> None:
    """A call whose reservation has expired still used what it used: the entry is `late`, and the day counts it."""
    held = meter.reserve("acme", usage=HELD, lease_ms=30_000)
    clock.advance(ms=90_000)
    entry = held.settle(Usage(output_tokens=150))

    assert ("late", "expired") == (entry.kind, entry.after)
    assert 150 == states()["per_day"].used


def test_usage_of_a_cancelled_call_is_booked_and_marked(meter: Meter, states: States) -> None:
    """A call that was taken for unsent, and was not, is charged all the same."""
    held = meter.reserve("acme", usage=HELD)
    held.cancel()
    entry = held.settle(Usage(output_tokens=150))

    assert ("late", "cancelled") == (entry.kind, entry.after)
    assert [150, 150] == [state.used for state in states().values()]


def test_usage_of_an_unknown_call_is_booked_and_marked(meter: Meter, entries: Entries, states: States) -> None:
    """A reservation that a failover lost is no reason to lose its usage; with its attributes, limits count it too."""
    lost = meter.settle("acme", "lost-1", Usage(output_tokens=150))
    charged = meter.settle("acme", "lost-2", Usage(output_tokens=70), attributes={"provider": "anthropic"})

    assert [("late", "unknown"), ("late", "unknown")] == [(lost.kind, lost.after), (charged.kind, charged.after)]
    assert [{"output_tokens": 150}, {"output_tokens": 70}] == [entry.usage for entry in entries()]
    assert [70, 70] == [state.used for state in states().values()]


def test_every_call_ends_in_one_entry(meter: Meter, clock: Clock, entries: Entries) -> None:
    """Settled, cancelled or expired: each reservation has one end, and the numbers of a ledger have no gap."""
    meter.reserve("acme", usage=HELD).settle(HELD)
    meter.reserve("acme", usage=HELD).cancel()
    meter.reserve("acme", usage=HELD, lease_ms=1)
    clock.advance(ms=1)
    meter.sweep()

    assert [(1, "settled"), (2, "cancelled"), (3, "expired")] == [(entry.n, entry.kind) for entry in entries()]
