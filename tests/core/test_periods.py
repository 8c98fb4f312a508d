"""Calendar periods lie end to end, contain what they are asked about, and follow the clocks of their zone."""

from __future__ import annotations

import zoneinfo
from datetime import UTC, date, datetime, timedelta
from typing import get_args
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meterlib.core.periods import Period, PeriodName, period_at

HOUR_MS = 3_600_000
PERIODS: tuple[PeriodName, ...] = get_args(PeriodName)
ZONES = st.one_of(
    st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Asia/Kathmandu", "Pacific/Chatham"]),
    st.sampled_from(["America/Havana", "Africa/Cairo", "America/Santiago", "Pacific/Apia", "America/St_Johns"]),
    st.sampled_from(sorted(zoneinfo.available_timezones())),
)
MOMENTS = st.datetimes(datetime(2015, 1, 1), datetime(2060, 1, 1)).map(lambda m: int(m.replace(tzinfo=UTC).timestamp()))
NOW = st.builds(lambda seconds, ms: seconds * 1000 + ms, MOMENTS, st.sampled_from([0, 1, 500, 999]))


def ms(text: str, tz: str, fold: int = 0) -> int:
    """The ms since 1970 of a wall clock's time."""
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(tz), fold=fold).timestamp()) * 1000


def wall(now_ms: int, tz: str) -> datetime:
    """What a clock on the wall shows."""
    return datetime.fromtimestamp(now_ms // 1000, UTC).astimezone(ZoneInfo(tz))


@given(st.sampled_from(PERIODS), ZONES, NOW)
@example("day", "Pacific/Apia", ms("2011-12-29 12:00", "Pacific/Apia"))
@example("day", "Africa/Cairo", ms("2026-04-24 01:00", "Africa/Cairo"))
@example("day", "America/Havana", ms("2026-11-01 00:30", "America/Havana"))
@example("day", "America/Havana", ms("2026-11-01 00:30", "America/Havana", fold=1))
@example("month", "America/Santiago", ms("2026-09-30 23:59", "America/Santiago"))
def test_a_period_contains_the_moment_it_was_asked_for(period: PeriodName, tz: str, now_ms: int) -> None:
    """No call is counted in a period that it does not lie in."""
    found = period_at(period, tz, now_ms)

    assert found.start_ms <= now_ms < found.end_ms


@given(st.sampled_from(["day", "week", "month"]), ZONES, NOW)
@example("day", "Pacific/Apia", ms("2011-12-29 12:00", "Pacific/Apia"))
@example("day", "America/Havana", ms("2026-11-01 00:30", "America/Havana", fold=1))
def test_periods_lie_end_to_end(period: PeriodName, tz: str, now_ms: int) -> None:
    """Each begins where the one before ends, is the same for every moment in it, and has a name of its own."""
    found = period_at(period, tz, now_ms)
    before, after = period_at(period, tz, found.start_ms - 1), period_at(period, tz, found.end_ms)

    assert found == period_at(period, tz, found.start_ms) == period_at(period, tz, found.end_ms - 1)
    assert (before.end_ms, found.end_ms) == (found.start_ms, after.start_ms)
    assert 3 == len({before.label, found.label, after.label})


@given(st.sampled_from(["Europe/Berlin", "America/New_York", "Asia/Kolkata", "Asia/Kathmandu", "UTC"]), NOW)
@example("Europe/Berlin", ms("2026-10-25 02:30", "Europe/Berlin"))
@example("Europe/Berlin", ms("2026-10-25 02:30", "Europe/Berlin", fold=1))
@example("Asia/Kathmandu", ms("2026-05-20 12:14", "Asia/Kathmandu"))
def test_hours_lie_end_to_end(tz: str, now_ms: int) -> None:
    """An hour is an hour long, begins when the wall clock says so, and one that clocks repeat is two."""
    found = period_at("hour", tz, now_ms)
    after = period_at("hour", tz, found.end_ms)

    assert found == period_at("hour", tz, found.start_ms) == period_at("hour", tz, found.end_ms - 1)
    assert (HOUR_MS, found.end_ms) == (found.end_ms - found.start_ms, after.start_ms)
    assert (0, 0) == (wall(found.start_ms, tz).minute, wall(found.start_ms, tz).second)
    assert found.label != after.label


@pytest.mark.parametrize(
    ("tz", "change"),
    [
        ("Australia/Lord_Howe", ms("2026-10-04 01:59:59", "Australia/Lord_Howe") + 1000),
        ("Australia/Lord_Howe", ms("2026-04-05 01:45", "Australia/Lord_Howe") + 15 * 60_000),
        ("Pacific/Chatham", ms("2026-09-27 02:44:59", "Pacific/Chatham") + 1000),
    ],
)
def test_hours_lie_end_to_end_where_clocks_change_within_one(tz: str, change: int) -> None:
    """Some zones change by half an hour, or at a quarter to: even there no hour has its quota twice."""
    before, after = period_at("hour", tz, change - 1), period_at("hour", tz, change)

    assert before == after or before.end_ms <= after.start_ms


@given(ZONES, NOW)
def test_a_day_is_a_date(tz: str, now_ms: int) -> None:
    """All moments of a day bear its date, which is the period's name."""
    found = period_at("day", tz, now_ms)

    assert f"{wall(now_ms, tz):%Y-%m-%d}" == found.label
    assert wall(found.start_ms, tz).date() == wall(found.end_ms - 1, tz).date() == wall(now_ms, tz).date()
    assert wall(found.start_ms - 1, tz).date() < wall(now_ms, tz).date() < wall(found.end_ms, tz).date()


@given(ZONES, NOW)
def test_a_week_begins_on_monday(tz: str, now_ms: int) -> None:
    """Seven dates from a Monday on, by the number that ISO 8601 gives the week."""
    found = period_at("week", tz, now_ms)
    monday = wall(found.start_ms, tz).date()

    assert (1, monday + timedelta(days=7)) == (monday.isoweekday(), wall(found.end_ms, tz).date())
    year, week, _ = wall(now_ms, tz).isocalendar()
    assert f"{year}-W{week:02}" == found.label


@given(ZONES, NOW)
def test_a_month_has_the_days_it_has(tz: str, now_ms: int) -> None:
    """From the first to the first, whatever the month's length."""
    found = period_at("month", tz, now_ms)
    first, following = wall(found.start_ms, tz).date(), wall(found.end_ms, tz).date()

    assert (1, 1) == (first.day, following.day)
    assert 28 <= (following - first).days <= 31
    assert (wall(now_ms, tz).year, wall(now_ms, tz).month) == (first.year, first.month)
    assert f"{first:%Y-%m}" == found.label


@pytest.mark.parametrize(
    ("tz", "day", "hours"),
    [
        ("Europe/Berlin", "2026-03-29", 23),
        ("Europe/Berlin", "2026-10-25", 25),
        ("Europe/Berlin", "2026-10-24", 24),
        ("America/New_York", "2026-03-08", 23),
        ("America/New_York", "2026-11-01", 25),
        ("Australia/Lord_Howe", "2026-04-05", 24.5),
        ("Australia/Lord_Howe", "2026-10-04", 23.5),
        ("America/Havana", "2026-11-01", 25),
        ("Asia/Kolkata", "2026-03-29", 24),
        ("UTC", "2026-03-29", 24),
    ],
)
def test_days_on_which_clocks_change_are_longer_or_shorter(tz: str, day: str, hours: float) -> None:
    """23 and 25 hours, and half-hours where zones change by those."""
    start_ms = ms(f"{day} 00:00", tz)

    assert Period(day, start_ms, start_ms + int(hours * HOUR_MS)) == period_at("day", tz, ms(f"{day} 12:00", tz))


@pytest.mark.parametrize(
    ("now", "first", "following"),
    [
        ("2026-02-28 23:59:59", "2026-02-01", "2026-03-01"),
        ("2028-02-29 23:59:59", "2028-02-01", "2028-03-01"),
        ("2026-12-31 23:59:59", "2026-12-01", "2027-01-01"),
        ("2027-01-01 00:00:00", "2027-01-01", "2027-02-01"),
        ("2026-10-31 23:30:00", "2026-10-01", "2026-11-01"),
    ],
)
@pytest.mark.parametrize("tz", ["UTC", "Europe/Berlin", "Asia/Kolkata", "America/Los_Angeles"])
def test_months_end_where_they_end(tz: str, now: str, first: str, following: str) -> None:
    """The last second of a month is in it, and the first one of the next is not."""
    found = period_at("month", tz, ms(now, tz))

    assert (ms(f"{first} 00:00", tz), ms(f"{following} 00:00", tz)) == (found.start_ms, found.end_ms)


@pytest.mark.parametrize("tz", ["America/New_York", "Asia/Tokyo"])
def test_the_same_moment_may_lie_in_two_days(tz: str) -> None:
    """It is the zone that decides which day it is."""
    now_ms = ms("2026-05-20 22:00", "Europe/Berlin")

    assert ("2026-05-21" if tz == "Asia/Tokyo" else "2026-05-20") == period_at("day", tz, now_ms).label


def test_a_day_that_a_place_left_out_has_no_period() -> None:
    """Samoa went from the 29th to the 31st of December 2011: the one ends where the other begins."""
    last = period_at("day", "Pacific/Apia", ms("2011-12-29 12:00", "Pacific/Apia"))
    following = period_at("day", "Pacific/Apia", last.end_ms)

    assert ("2011-12-29", "2011-12-31") == (last.label, following.label)
    assert date(2011, 12, 31) == wall(last.end_ms, "Pacific/Apia").date()
