"""What a report is asked for, and how that is said in SQL: which entries, grouped by what, in which calendar.

Words are told once here, for entries and for rated rows, so that all reports mean the same by them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec

from meterlib.billing.duck import quoted
from meterlib.billing.months import month_named
from meterlib.billing.rating.measures import PROVIDER
from meterlib.billing.reports.report import COLUMNS, check_zone, hour_text
from meterlib.core.checks import check_attributes
from meterlib.core.periods import Period, PeriodName, period_at, zone
from meterlib.errors import InvalidInput

TIMES: tuple[PeriodName, ...] = ("hour", "day", "week", "month")
TimeBasis: TypeAlias = Literal["booked", "event"]
BASES: tuple[TimeBasis, ...] = ("booked", "event")

month_of = month_named
"""The month of a zone by its name, such as `2026-10`."""


class Query(msgspec.Struct, frozen=True, kw_only=True):
    """Which entries a report is of, and what they are grouped by.

    Attributes:
        since_ms: leaves out what came before (ms since 1970 UTC).
        until_ms: leaves out what came then or later.
        tenant: leaves out all other tenants.
        by: what to group by, in this order: words of `WORDS` and `TIMES`, `attribute:NAME`, or an attribute's name.
        tz: IANA zone of hours, days, weeks (from Monday, ISO 8601) and months.
        time_basis: which moment of an entry counts: when it was `booked`, as bills go, or the `event`: when the call
            was made.
        period: a billing period, `2026-10`, in place of `since_ms` and `until_ms`.

    Raises:
        InvalidInput: one of them is not acceptable; `field` is its name here.
    """

    since_ms: int | None = None
    until_ms: int | None = None
    tenant: str | None = None
    by: tuple[str, ...] = ()
    tz: str = "UTC"
    time_basis: TimeBasis = "booked"
    period: str | None = None

    def __post_init__(self) -> None:
        check_zone(self.tz)
        if self.time_basis not in BASES:
            raise InvalidInput("time_basis", f"{self.time_basis!r:.40} is not one of {', '.join(BASES)}")
        if self.since_ms is not None and self.until_ms is not None and self.until_ms <= self.since_ms:
            raise InvalidInput("until", "nothing is in between: it is not after since")
        if self.period is not None:
            month_named(self.period, self.tz)
            if self.since_ms is not None or self.until_ms is not None:
                raise InvalidInput("period", "it says since when and until when already")
            if self.time_basis != "booked":
                raise InvalidInput("period", "a billing period is of what was booked; name since and until instead")
        names = [name_of(word) for word in self.by]
        for name in names:
            if names.count(name) > 1:
                raise InvalidInput("by", f"{name!r} is named twice")

    def bounds(self, billing_tz: str) -> tuple[int | None, int | None]:
        """From when and until when, whichever way that was said."""
        if self.period is None:
            return self.since_ms, self.until_ms
        month = month_named(self.period, billing_tz)
        return month.start_ms, month.end_ms


# ── Words ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Word(NamedTuple):
    """How SQL says a word, of an entry and of a rated row; None where it cannot."""

    entry: str | None
    row: str | None


MODEL = (
    """CASE WHEN contains(facts::VARCHAR, '"model"')"""
    " THEN coalesce(nullif(facts ->> '/model', ''), model) ELSE model END"
)
"""The model that was billed. JSON is looked into only where there is something to find."""

_VARIANT = (
    "coalesce(nullif(concat_ws('+', nullif(nullif(service_tier, 'standard'), ''),"
    " nullif(nullif(speed, 'standard'), '')), ''), 'standard')"
)
_GEO = "coalesce(nullif(nullif(inference_geo, 'not_available'), ''), 'global')"

PROMPT = """CASE WHEN contains(facts::VARCHAR, '"prompt"') THEN nullif(facts ->> '/prompt', '') END"""
"""The digest of a call's prompt, the same for all tries of a call."""

WORDS = {
    "tenant": Word("tenant", "tenant"),
    "provider": Word(f"coalesce(nullif(provider, ''), '{PROVIDER}')", "provider"),
    "model": Word(f"nullif({MODEL}, '')", "nullif(model, '')"),
    "requested_model": Word("nullif(model, '')", None),
    "kind": Word("kind", "kind"),
    "funding": Word("funding", "funding"),
    "quality": Word("quality", "quality"),
    "tier": Word("coalesce(nullif(service_tier, ''), 'standard')", None),
    "speed": Word("coalesce(nullif(speed, ''), 'standard')", None),
    "variant": Word(_VARIANT, "variant"),
    "geo": Word(_GEO, "geo"),
    "prompt": Word(PROMPT, None),
    "token_type": Word(None, "token_type"),
    "charge": Word(None, "charge"),
    "price_source": Word(None, "nullif(price_source, '')"),
    "period": Word(None, "period"),
    "corrects": Word(None, "nullif(corrects, '')"),
}
"""What entries can be grouped by, besides times and attributes."""

COSTS = ("list_cost", "contracted_cost", "billed_cost", "upstream_cost")
_TAKEN = {*WORDS, *TIMES, *COLUMNS, *COSTS, "margin", "currency", "quantity", "unpriced"}


def name_of(word: str) -> str:
    """The name of the column that a word groups by.

    Raises:
        InvalidInput: nothing can be grouped by it.
    """
    if word in WORDS or word in TIMES:
        return word
    attribute = word.removeprefix("attribute:")
    try:
        check_attributes({attribute: "x"})
    except InvalidInput as error:
        raise InvalidInput("by", str(error).removeprefix("attributes: ")) from None
    return f"attribute:{attribute}" if attribute in _TAKEN or "." in attribute else attribute


def of_entry(word: str) -> str | None:
    """SQL of a word's value in an entry; None if only rated rows have it."""
    if word in WORDS:
        return WORDS[word].entry
    return f"attributes ->> {quoted('/' + word.removeprefix('attribute:'))}"


def of_row(word: str) -> str | None:
    """SQL of a word's value in a rated row; None if only the entry tells."""
    return WORDS[word].row if word in WORDS else None


# ── Time ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

_STEPS = (900_000, 60_000, 1_000)
_ROWS_AT_ONCE = 1000


class Calendar:
    """The hours, days, weeks or months of a zone as a table that moments are looked up in.

    To ask the zone about each of ten million moments would take longer than all the rest. Clocks are changed at
    quarters of an hour nearly everywhere, so it is asked once for each quarter that occurs, by the same function that
    cuts the periods of limits; where a period does end within a quarter, once for each minute or second.

    Attributes:
        table: the table's name, with the columns `key`, `start_ms` and `label`.
        step_ms: a moment's key is the whole number of these in it.
    """

    def __init__(self, connection: Any, word: PeriodName, tz: str, moments: str) -> None:
        """Make the table in the temporary schema, for all moments that `moments` selects, in its column `moment`."""
        self.table = f"calendar_{word}"
        for self.step_ms in _STEPS:
            asked = f"SELECT DISTINCT moment // {self.step_ms} AS key FROM ({moments}) ORDER BY key"
            keys = [key for (key,) in connection.execute(asked).fetchall()]
            ranges = _ranges(keys, self.step_ms, word, tz)
            if ranges is not None:
                break
        label: Callable[[Period], str] = (
            (lambda period: hour_text(period.start_ms, tz)) if word == "hour" else (lambda period: period.label)
        )
        connection.execute(f"CREATE OR REPLACE TABLE {self.table} (key BIGINT, start_ms BIGINT, label VARCHAR)")
        values = [
            f"({first}, {last}, {period.start_ms}, {quoted(label(period))})" for first, last, period in ranges or ()
        ]
        for at in range(0, len(values), _ROWS_AT_ONCE):
            connection.execute(
                f"INSERT INTO {self.table} SELECT unnest(range(c0, c1 + 1)), c2, c3"
                f" FROM (VALUES {', '.join(values[at : at + _ROWS_AT_ONCE])}) v(c0, c1, c2, c3)"
            )


def _ranges(keys: Iterable[int], step_ms: int, word: PeriodName, tz: str) -> Sequence[tuple[int, int, Period]] | None:
    """First and last key of each period; None if one ends within a step."""
    ranges: list[tuple[int, int, Period]] = []
    for key in keys:
        first_ms, last_ms = key * step_ms, (key + 1) * step_ms - 1
        period = period_at(word, tz, first_ms)
        # Clocks that are put back across midnight bring the day before once more: its end says nothing then.
        steady = (
            period.start_ms <= first_ms and last_ms < period.end_ms and _offset(first_ms, tz) == _offset(last_ms, tz)
        )
        if not steady and step_ms > _STEPS[-1] and period_at(word, tz, last_ms) != period:
            return None
        if ranges and ranges[-1][2] == period:
            ranges[-1] = (ranges[-1][0], key, period)
        else:
            ranges.append((key, key, period))
    return ranges


def _offset(at_ms: int, tz: str) -> timedelta | None:
    return datetime.fromtimestamp(at_ms // 1000, zone(tz)).utcoffset()
