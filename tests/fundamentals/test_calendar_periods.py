"""Calendar periods: a quota for an hour, a day, a week or a month, as clocks on the wall of a place have it."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from meterlib import Limit, Meter, Policy, QuotaExceeded, Usage
from meterlib.testing import Clock
from tests.fundamentals.conftest import States

POLICY = Policy(limits=(Limit(name="day", unit="output_tokens", quota=100, period="day", tz="Europe/Berlin"),))
ALL = Usage(output_tokens=100)
HOUR_MS = 3_600_000


def ms(text: str, tz: str = "Europe/Berlin") -> int:
    """The ms since 1970 of a wall clock's time."""
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(tz)).timestamp()) * 1000


def test_a_period_begins_at_midnight_where_the_customer_is(meter: Meter, clock: Clock, states: States) -> None:
    """One ms before local midnight today's budget is used up; at midnight there is a new one."""
    clock.set(ms("2026-05-20 15:00"))
    meter.reserve("acme", usage=ALL).settle(ALL)
    clock.set(ms("2026-05-21 00:00") - 1)
    assert 100 == states()["day"].used
    with pytest.raises(QuotaExceeded) as denied:
        meter.reserve("acme", usage=Usage(output_tokens=1))
    assert (1, True) == (denied.value.retry_after_ms, denied.value.denials[0].period)

    clock.advance(ms=1)
    assert 0 == states()["day"].used
    meter.reserve("acme", usage=ALL)


@pytest.mark.parametrize(
    ("first", "hours"), [("2026-03-29", 23), ("2026-10-25", 25), ("2026-06-01", 24)], ids=["spring", "autumn", "june"]
)
def test_the_day_on_which_clocks_change_has_another_length(meter: Meter, clock: Clock, first: str, hours: int) -> None:
    """23 hours in spring, 25 in autumn: the budget is renewed at local midnight, and not an hour off."""
    clock.set(ms(f"{first} 00:00"))
    meter.reserve("acme", usage=ALL)
    with pytest.raises(QuotaExceeded) as denied:
        meter.reserve("acme", usage=ALL)

    assert hours * HOUR_MS == denied.value.retry_after_ms


@pytest.mark.parametrize(
    ("period", "now", "next_one"),
    [
        ("hour", "2026-05-20 15:59", "2026-05-20 16:00"),
        ("day", "2026-05-20 15:00", "2026-05-21 00:00"),
        ("week", "2026-05-20 15:00", "2026-05-25 00:00"),
        ("week", "2026-12-30 15:00", "2027-01-04 00:00"),
        ("month", "2026-05-31 23:00", "2026-06-01 00:00"),
        ("month", "2028-02-29 12:00", "2028-03-01 00:00"),
        ("month", "2026-12-15 12:00", "2027-01-01 00:00"),
    ],
)
@pytest.mark.parametrize("tz", ["Europe/Berlin", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe"])
def test_periods_end_as_a_calendar_has_it(
    meter: Meter, clock: Clock, period: str, now: str, next_one: str, tz: str
) -> None:
    """Weeks begin on Mondays, months have their own lengths, and zones may be off by half hours."""
    meter.policy = Policy(limits=(Limit(name=period, unit="output_tokens", quota=100, period=period, tz=tz),))  # type: ignore[arg-type]
    clock.set(ms(now, tz))
    meter.reserve("acme", usage=ALL)
    with pytest.raises(QuotaExceeded) as denied:
        meter.reserve("acme", usage=Usage(output_tokens=1))

    assert ms(next_one, tz) - clock.now_ms == denied.value.retry_after_ms


def test_a_call_across_midnight_counts_for_the_day_it_began(meter: Meter, clock: Clock, states: States) -> None:
    """A settle after midnight does not touch the new day's budget."""
    clock.set(ms("2026-05-20 23:59"))
    held = meter.reserve("acme", usage=ALL)
    clock.set(ms("2026-05-21 00:01"))
    held.settle(ALL)

    assert 0 == states()["day"].used


def test_a_budget_beside_a_window(meter: Meter, clock: Clock) -> None:
    """A call has to fit both; a denial says which of the two it was, and whether it is a budget."""
    window = Limit(name="minute", unit="output_tokens", quota=60, window="1m")
    meter.policy = Policy(limits=(*POLICY.limits, window))
    meter.reserve("acme", usage=Usage(output_tokens=60)).settle(Usage(output_tokens=60))
    with pytest.raises(QuotaExceeded) as by_window:
        meter.reserve("acme", usage=Usage(output_tokens=40))
    clock.advance(ms=61_000)
    meter.reserve("acme", usage=Usage(output_tokens=40)).settle(Usage(output_tokens=40))
    clock.advance(ms=61_000)
    with pytest.raises(QuotaExceeded) as by_budget:
        meter.reserve("acme", usage=Usage(output_tokens=1))

    assert [("minute", False)] == [(denial.name, denial.period) for denial in by_window.value.denials]
    assert [("day", True)] == [(denial.name, denial.period) for denial in by_budget.value.denials]


@pytest.mark.parametrize("verb", ["reserve", "record", "settle"])
@pytest.mark.parametrize("off_ms", [0, -1, -HOUR_MS])
def test_it_is_the_stores_clock_that_says_which_day_it_is(
    meter: Meter, clock: Clock, states: States, verb: str, off_ms: int
) -> None:
    """A gateway whose clock is behind counts in the store's day, from its first millisecond on."""
    clock.set(ms("2026-05-21 00:00"))
    meter.record("acme", {}, Usage())
    clock.advance(ms=off_ms)
    used = Usage(output_tokens=30)
    if verb == "reserve":
        meter.reserve("acme", usage=used)
    elif verb == "record":
        meter.record("acme", {}, used)
    else:
        meter.settle("acme", "lost", used, attributes={})

    assert (30, ms("2026-05-22 00:00")) == (states()["day"].used, states()["day"].resets_at_ms)
    clock.set(ms("2026-05-21 00:00"))
    assert 30 == states()["day"].used
