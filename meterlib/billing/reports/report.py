"""Usage reports as folds over ledger entries: sums for each group, and whether an entry is missing. Pure.

Entries go by one at a time, so memory grows with the groups and not with the ledger.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import msgspec

from meterlib.core.checks import check_attributes
from meterlib.core.ledger import LedgerEntry
from meterlib.core.periods import zone
from meterlib.errors import InvalidInput

DIMENSIONS = ("tenant", "provider", "model", "kind", "funding", "quality", "day", "hour")
"""Words that entries can be grouped by; any other word is the name of an attribute."""

COLUMNS = (
    "calls",
    "input_tokens",
    "cache_creation_input_tokens",
    "ephemeral_5m_input_tokens",
    "ephemeral_1h_input_tokens",
    "cache_read_input_tokens",
    "output_tokens",
    "thinking_tokens",
    "web_search_requests",
    "web_fetch_requests",
    "code_execution_requests",
    "late",
    "expired",
    "cancelled",
    "partial",
    "adjusted",
)
"""What every row has, in this order; amounts of units of one's own follow as `amounts.<unit>`."""

_PLACES = {
    "requests": "calls",
    "input_tokens": "input_tokens",
    "cache_creation_input_tokens": "cache_creation_input_tokens",
    "cache_creation.ephemeral_5m_input_tokens": "ephemeral_5m_input_tokens",
    "cache_creation.ephemeral_1h_input_tokens": "ephemeral_1h_input_tokens",
    "cache_read_input_tokens": "cache_read_input_tokens",
    "output_tokens": "output_tokens",
    "output_tokens_details.thinking_tokens": "thinking_tokens",
    "server_tool_use.web_search_requests": "web_search_requests",
    "server_tool_use.web_fetch_requests": "web_fetch_requests",
    "server_tool_use.code_execution_requests": "code_execution_requests",
}
"""Where a usage has the number of a column."""

_OWN_PASSES = ("compaction", "advisor_message")
"""Passes within a call whose tokens the call's own numbers leave out, and which the provider bills besides."""

Group: TypeAlias = tuple[str | None, ...]
Sums: TypeAlias = dict[str, int]
Of = TypeVar("Of")


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """The sums of one group: `group` has a value for each thing grouped by, None where the calls had none."""

    group: Group
    sums: Sums


class Grouped(Generic[Of]):
    """Entries of a time and of a tenant, by groups; what is kept of a group is the subclass's.

    Args:
        by: what to group by: words of `DIMENSIONS`, `attribute:NAME`, or an attribute's name as it is.
        tz: IANA name of the zone that `day` and `hour` are worked out in.
        since_ms: leaves out what was booked before (ms since 1970 UTC).
        until_ms: leaves out what was booked then or later.
        tenant: leaves out all other tenants.

    Raises:
        InvalidInput: there is no such zone, or nothing can be grouped by such a word.
    """

    def __init__(
        self,
        by: Sequence[str] = (),
        *,
        tz: str = "UTC",
        since_ms: int | None = None,
        until_ms: int | None = None,
        tenant: str | None = None,
    ) -> None:
        check_zone(tz)
        self._dimensions = tuple(_dimension(word, tz) for word in by)
        self.by = tuple(dimension.name for dimension in self._dimensions)
        for name in self.by:
            if self.by.count(name) > 1:
                raise InvalidInput("by", f"{name!r} is named twice")
        self.tz = tz
        self.since_ms = since_ms
        self.until_ms = until_ms
        self.tenant = tenant
        self.entries = 0
        self._groups: dict[Group, Of] = {}

    def add(self, entry: LedgerEntry) -> None:
        """Count an entry, if it is one of those asked for."""
        if self.since_ms is not None and entry.booked_at < self.since_ms:
            return
        if self.until_ms is not None and entry.booked_at >= self.until_ms:
            return
        if self.tenant is not None and entry.tenant != self.tenant:
            return
        self.entries += 1
        self._count(entry)

    @abstractmethod
    def _count(self, entry: LedgerEntry) -> None:
        """Count an entry that is asked for."""

    def _group_of(self, entry: LedgerEntry, model: object = None) -> Group:
        return tuple(
            str(model) if model and dimension.attribute == "model" else dimension.value_of(entry)
            for dimension in self._dimensions
        )

    def _order(self, group: Group) -> tuple[Any, ...]:
        return tuple(
            (value is None, value if value is None else dimension.order(value))
            for dimension, value in zip(self._dimensions, group, strict=True)
        )


class Report(Grouped[Sums]):
    """Usage summed up by groups.

    A row counts `calls` (settled, late or recorded), what they used, and among them the `late` and `partial` ones;
    `expired` and `cancelled` reservations; and `adjusted` entries, whose differences are in the sums. Tokens of
    compaction and advisor passes, which the call's own numbers leave out, are in the sums too, under the model that
    did the pass.
    """

    def _count(self, entry: LedgerEntry) -> None:
        for model, amounts in contributions(entry):
            sums = self._groups.setdefault(self._group_of(entry, model), {})
            for column, amount in amounts.items():
                sums[column] = sums.get(column, 0) + amount

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of all sums: those that every report has, then those that only these entries have."""
        found = {column for sums in self._groups.values() for column in sums}
        return (*COLUMNS, *sorted(found.difference(COLUMNS)))

    def rows(self) -> list[Row]:
        """One row for each group, in order of what is grouped by; each has all columns."""
        columns = self.columns
        rows = [
            Row(group=group, sums={column: sums.get(column, 0) for column in columns})
            for group, sums in self._groups.items()
        ]
        return sorted(rows, key=lambda row: self._order(row.group))

    def total(self) -> Sums:
        """The sums of all groups together."""
        total = dict.fromkeys(self.columns, 0)
        for sums in self._groups.values():
            for column, amount in sums.items():
                total[column] += amount
        return total


AnyReport = TypeVar("AnyReport", bound=Grouped[Any])


def fold(entries: Iterable[LedgerEntry], report: AnyReport) -> AnyReport:
    """The report with all these entries counted."""
    for entry in entries:
        report.add(entry)
    return report


def check_zone(tz: str) -> str:
    """Return `tz` if it is the IANA name of a time zone."""
    try:
        zone(tz)
    except (OSError, ValueError, KeyError):
        raise InvalidInput("tz", f"{tz!r:.80} is no IANA time zone, such as 'Europe/Berlin'") from None
    return tz


# ── What an entry adds to which group ─────────────────────────────────────────────────────────────────────────────────


class _Dimension(msgspec.Struct, frozen=True):
    name: str
    value_of: Callable[[LedgerEntry], str | None]
    attribute: str = ""
    order: Callable[[str], Any] = str


def _dimension(word: str, tz: str) -> _Dimension:
    if word in ("tenant", "kind", "funding", "quality"):
        return _Dimension(word, lambda entry: str(getattr(entry, word)))
    if word == "day":
        return _Dimension(word, lambda entry: _local(entry, tz).date().isoformat())
    if word == "hour":
        return _Dimension(word, lambda entry: hour_text(entry.booked_at, tz), order=datetime.fromisoformat)
    attribute = word.removeprefix("attribute:")
    try:
        check_attributes({attribute: "x"})
    except InvalidInput as error:
        raise InvalidInput("by", str(error).removeprefix("attributes: ")) from None
    taken = attribute in COLUMNS or attribute in ("tenant", "kind", "funding", "quality", "day", "hour")
    name = f"attribute:{attribute}" if taken or "." in attribute else attribute
    return _Dimension(name, lambda entry: entry.attributes.get(attribute), attribute)


def hour_text(at_ms: int, tz: str) -> str:
    """The hour on the zone's clocks, with its offset: one hour a year comes twice."""
    text = datetime.fromtimestamp(at_ms // 1000, zone(tz)).isoformat(timespec="hours")
    return f"{text[:13]}:00{text[13:]}"


def _local(entry: LedgerEntry, tz: str) -> datetime:
    return datetime.fromtimestamp(entry.booked_at // 1000, zone(tz))


def contributions(entry: LedgerEntry) -> Iterator[tuple[object, Sums]]:
    """What an entry adds to which columns: first itself, then each pass that its own numbers leave out.

    With each goes the model that did the pass; None where it is the entry's own.
    """
    sums: Sums = dict.fromkeys(_counted(entry), 1)
    _add(sums, entry.usage)
    yield None, sums
    for own in _own_passes(entry.usage):
        sums = {}
        _add(sums, own)
        yield own.get("model"), sums


def _counted(entry: LedgerEntry) -> tuple[str, ...]:
    """The columns that an entry adds one to."""
    if entry.kind in ("expired", "cancelled", "adjusted"):
        return (entry.kind,)
    columns = [] if "requests" in entry.usage else ["calls"]  # an entry may stand for many, and says so itself
    if entry.kind == "late":
        columns.append("late")
    if entry.quality == "partial":
        columns.append("partial")
    return tuple(columns)


def _add(sums: Sums, usage: Mapping[str, object], path: str = "") -> None:
    for name, value in usage.items():
        place = f"{path}{name}"
        if type(value) is int:
            # A name that nobody knows is shown and not dropped: it may be a new one of the API's.
            column = _PLACES.get(place) or (place if path == "amounts." else f"usage.{place}")
            sums[column] = sums.get(column, 0) + value
        elif isinstance(value, Mapping):
            _add(sums, value, f"{place}.")


def _own_passes(usage: Mapping[str, object]) -> list[Mapping[str, object]]:
    passes = usage.get("iterations")
    if not isinstance(passes, list | tuple):
        return []
    return [own for own in passes if isinstance(own, Mapping) and own.get("type") in _OWN_PASSES]


# ── Whether an entry is missing ───────────────────────────────────────────────────────────────────────────────────────


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers that no entry has, from `first` to `last`, both included."""

    first: int
    last: int

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


class ShardCompleteness(msgspec.Struct, frozen=True, kw_only=True):
    """What was read of one shard's ledger, and what should have been there.

    Attributes:
        shard: which.
        complete: no entry of the time asked for is missing.
        entries: how many were booked in that time, of all tenants.
        first: number of the first of them; 0 if there is none.
        last: number of the last of them.
        gaps: numbers that are missing between them, or that may have been booked in that time.
        state_last: number of the shard's last entry, by its state.
        ledger_last: number of the shard's last entry, by its ledger; the two differ if one lost its tail.
        open_reservations: not settled yet, of all tenants: what they use is in none of the entries.
        late: entries that came after their reservation had ended.
        expired: reservations that were never settled.
        epochs: the ledger's epochs that the entries are of; more than one means that it was begun anew.
    """

    shard: int
    complete: bool
    entries: int
    first: int
    last: int
    gaps: tuple[Gap, ...]
    state_last: int
    ledger_last: int
    open_reservations: int
    late: int
    expired: int
    epochs: tuple[str, ...]


class Completeness(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a report counts every entry that it should; `of` makes it from what is known of each shard."""

    complete: bool
    entries: int
    gaps: int
    open_reservations: int
    late: int
    expired: int
    shards: tuple[ShardCompleteness, ...]

    @classmethod
    def of(cls, shards: Iterable[ShardCompleteness]) -> Completeness:
        """All shards together."""
        shards = tuple(shards)
        return cls(
            complete=all(shard.complete for shard in shards),
            entries=sum(shard.entries for shard in shards),
            gaps=sum(len(shard.gaps) for shard in shards),
            open_reservations=sum(shard.open_reservations for shard in shards),
            late=sum(shard.late for shard in shards),
            expired=sum(shard.expired for shard in shards),
            shards=shards,
        )


class Head(Protocol):
    """A shard's own word, at some moment, on where its ledger ends."""

    @property
    def last_number(self) -> int:
        """Of the last entry, by the state."""

    @property
    def ledger_last(self) -> int:
        """Of the last entry, by the ledger."""

    @property
    def open_reservations(self) -> int:
        """How many are not settled yet."""


class ShardCheck:
    """Watches the entries of one shard go by, in order, and tells afterwards whether one is missing.

    Args:
        shard: which.
        since_ms: what was booked before does not matter (ms since 1970 UTC).
        until_ms: what was booked then or later does not matter.
        after: the number that the entries were read behind.
    """

    def __init__(self, shard: int, *, since_ms: int | None = None, until_ms: int | None = None, after: int = 0) -> None:
        self._shard = shard
        self._since_ms = since_ms
        self._until_ms = until_ms
        self._number = after
        self._past_end = False
        self._entries = self._first = self._last = self._late = self._expired = 0
        self._gaps: list[Gap] = []
        self._epochs: dict[str, None] = {}

    def see(self, entry: LedgerEntry) -> bool:
        """Take note of the next entry; False if it and all behind it are too late to matter."""
        early = self._since_ms is not None and entry.booked_at < self._since_ms
        if entry.n > self._number + 1 and not early:
            # Times never go back, so whatever stood between two entries was booked between their times.
            self._gaps.append(Gap(first=self._number + 1, last=entry.n - 1))
        self._number = entry.n
        self._past_end = self._until_ms is not None and entry.booked_at >= self._until_ms
        if early or self._past_end:
            return not self._past_end
        self._entries += 1
        self._first = self._first or entry.n
        self._last = entry.n
        self._late += entry.kind == "late"
        self._expired += entry.kind == "expired"
        self._epochs[entry.epoch] = None
        return True

    def result(self, before: Head, after: Head) -> ShardCompleteness:
        """What came of it, with the shard's word from before and from after the entries were read.

        Both are needed because the ledger may be growing: only what the state knew before can be missing at the end,
        and only what it does not know afterwards can be too much.
        """
        ledger_last = max(self._number, before.ledger_last)
        state_last = min(max(ledger_last, before.last_number), after.last_number)
        gaps = list(self._gaps)
        if not self._past_end and self._number < before.last_number:
            gaps.append(Gap(first=self._number + 1, last=before.last_number))
        return ShardCompleteness(
            shard=self._shard,
            complete=not gaps,
            entries=self._entries,
            first=self._first,
            last=self._last,
            gaps=tuple(gaps),
            state_last=state_last,
            ledger_last=ledger_last,
            open_reservations=after.open_reservations,
            late=self._late,
            expired=self._expired,
            epochs=tuple(self._epochs),
        )
