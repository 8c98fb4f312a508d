"""Calendar periods in a time zone: which one a moment belongs to, right across changes of daylight saving time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Literal, NamedTuple
from zoneinfo import ZoneInfo

PeriodName = Literal["hour", "day", "week", "month"]


class Period(NamedTuple):
    """From `start_ms` up to, but not including, `end_ms`; the label is part of the window's name in the store."""

    label: str
    start_ms: int
    end_ms: int


@lru_cache(maxsize=256)
def zone(tz: str) -> ZoneInfo:
    """The time zone of an IANA name. Raises an OSError, ValueError or KeyError where there is none."""
    return ZoneInfo(tz)


def period_at(period: PeriodName, tz: str, now_ms: int) -> Period:
    """The calendar hour, day, week (from Monday) or month of the zone that `now_ms` lies in."""
    local = datetime.fromtimestamp(now_ms // 1000, UTC).astimezone(zone(tz))
    if period == "hour":
        # An hour that the clocks repeat is two periods, and zones are off by half and quarter hours.
        offset_ms = int((local.utcoffset() or timedelta()).total_seconds()) * 1000
        start_ms = (now_ms + offset_ms) // 3_600_000 * 3_600_000 - offset_ms
        end_ms = start_ms + 3_600_000
        return Period(
            f"{local:%Y-%m-%dT%H%z}", _change_ms(tz, now_ms, start_ms), _change_ms(tz, now_ms, end_ms - 1, end_ms)
        )
    first = local.replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
    if period == "day":
        return Period(f"{first:%Y-%m-%d}", _ms(first), _ms(first + timedelta(days=1)))
    if period == "week":
        first -= timedelta(days=first.weekday())
        return Period(f"{first:%G-W%V}", _ms(first), _ms(first + timedelta(days=7)))
    first = first.replace(day=1)
    following = first.replace(year=first.year + first.month // 12, month=first.month % 12 + 1)
    return Period(f"{first:%Y-%m}", _ms(first), _ms(following))


def _change_ms(tz: str, now_ms: int, edge_ms: int, unchanged_ms: int | None = None) -> int:
    """The edge of an hour, or the moment between now and it at which the zone's offset changes.

    Some zones change by half an hour, within what the clock on the wall calls one hour.
    """

    def offset(at_ms: int) -> timedelta | None:
        return datetime.fromtimestamp(at_ms // 1000, UTC).astimezone(zone(tz)).utcoffset()

    here = offset(now_ms)
    if offset(edge_ms) == here:
        return edge_ms if unchanged_ms is None else unchanged_ms
    same_s, other_s = now_ms // 1000, edge_ms // 1000
    while abs(same_s - other_s) > 1:
        middle_s = (same_s + other_s) // 2
        if offset(middle_s * 1000) == here:
            same_s = middle_s
        else:
            other_s = middle_s
    return max(same_s, other_s) * 1000


def _ms(moment: datetime) -> int:
    """Wall-clock arithmetic on aware datetimes keeps the wall clock: the offset is looked up anew here."""
    return int(moment.timestamp()) * 1000
