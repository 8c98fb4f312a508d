"""Billing periods: calendar months of a time zone, by name and as SQL."""

from __future__ import annotations

import re
from datetime import datetime

from meterlib.core.periods import Period, period_at, zone
from meterlib.errors import InvalidInput

_NAME = re.compile(r"([0-9]{4})-([0-9]{2})")


def month_at(tz: str, at_ms: int) -> Period:
    """The month of a zone that a moment is in."""
    return period_at("month", tz, at_ms)


def month_named(name: str, tz: str, field: str = "period") -> Period:
    """The month of a zone by its name, such as `2026-10`.

    Raises:
        InvalidInput: it is no such name.
    """
    match = _NAME.fullmatch(name)
    if match is None or not 1 <= int(match[2]) <= 12 or not 1971 <= int(match[1]) <= 9998:
        raise InvalidInput(field, f"{name!r:.40} is no month such as 2026-10")
    middle = datetime(int(match[1]), int(match[2]), 15, tzinfo=zone(tz))
    return month_at(tz, int(middle.timestamp()) * 1000)


def months(tz: str, first_ms: int, last_ms: int) -> list[Period]:
    """The months of a zone from one moment to another, those of both included."""
    found = [month_at(tz, first_ms)]
    while found[-1].end_ms <= last_ms:
        found.append(month_at(tz, found[-1].end_ms))
    return found


def month_sql(known: list[Period], column: str) -> str:
    """SQL for the name of the month that a column's moment is in; all its moments are in the known months."""
    *others, last = known
    cases = " ".join(f"WHEN {column} < {month.end_ms} THEN '{month.label}'" for month in others)
    return f"CASE {cases} ELSE '{last.label}' END" if cases else f"'{last.label}'"
