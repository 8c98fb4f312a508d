"""What a page of usage and cost shows, as plain records, and how it is gathered from rated rows and entries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

import msgspec

from meterlib.billing.reports.answers import Reader
from meterlib.billing.reports.denied import Denied, denied
from meterlib.billing.reports.query import TIMES, WORDS, Calendar, Query
from meterlib.billing.reports.report import hour_text
from meterlib.billing.reports.usage import CALLS
from meterlib.core.money import ZERO, plus
from meterlib.core.periods import PeriodName, period_at, zone

TOKENS = {
    "input": ("input",),
    "cache write": ("cache_write_5m", "cache_write_1h"),
    "cache read": ("cache_read",),
    "output": ("output",),
}
"""Kinds of tokens as the page has them, and the token types that each is the sum of."""
_KIND_OF = {token_type: kind for kind, types in TOKENS.items() for token_type in types}
_DAYS_MAX, _WEEKS_MAX = 70, 420
_DAY_MS = 86_400_000


class Cost(msgspec.Struct, kw_only=True):
    """Amounts in one currency.

    Attributes:
        lines: how many rated rows they are the sum of.
        billed: what customers owe.
        listed: the same usage at list price, that of own keys left out.
        own: usage that customers' own keys paid for, at list price.
        upstream: what is owed to the provider.
    """

    lines: int = 0
    billed: Decimal = ZERO
    listed: Decimal = ZERO
    own: Decimal = ZERO
    upstream: Decimal = ZERO

    def add(self, other: Cost) -> None:
        """Add another one's amounts."""
        self.lines += other.lines
        for name in ("billed", "listed", "own", "upstream"):
            setattr(self, name, plus(getattr(self, name), getattr(other, name)))


class Sums(msgspec.Struct, kw_only=True):
    """What was used, and what it cost.

    Attributes:
        calls: settled, late or recorded ones.
        tokens: by the names of `TOKENS`.
        requests: of the provider's own tools.
        costs: by currency.
        unpriced: how many rated rows have no price, which makes costs a floor.
    """

    calls: int = 0
    tokens: dict[str, int] = {}
    requests: int = 0
    costs: dict[str, Cost] = {}
    unpriced: int = 0

    @property
    def prompt(self) -> int:
        """Tokens of all prompts."""
        return sum(amount for kind, amount in self.tokens.items() if kind != "output")

    @property
    def cached(self) -> int | None:
        """How many of 1,000 prompt tokens were read from the cache; None if there are none."""
        return self.tokens.get("cache read", 0) * 1000 // self.prompt if self.prompt > 0 else None

    def add(self, other: Sums) -> None:
        """Add another one's amounts."""
        self.calls += other.calls
        self.requests += other.requests
        self.unpriced += other.unpriced
        for kind, amount in other.tokens.items():
            self.tokens[kind] = self.tokens.get(kind, 0) + amount
        for currency, cost in other.costs.items():
            self.costs.setdefault(currency, Cost()).add(cost)


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """The sums of one tenant, model or time; of a time, `short` names it below a chart."""

    name: str
    sums: Sums
    short: str = ""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """All that a page shows.

    Attributes:
        heading: of the page.
        issuer: who operates the gateway; may be empty.
        tenant: the only one that the page is about; None for all.
        since: from when, in words; so `until`, which is exclusive.
        tz: the zone that times are of.
        step: how long each of `times` is: `hour`, `day`, `week` or `month`.
        times: without a gap, in order.
        tenants: those that used most first; so `models`.
        qualities: calls by how far their numbers are to be trusted.
        kinds: entries by kind.
        denials: the most frequent first.
        internal: whether to show what the operator itself pays.
        complete: whether no entry is missing and no price.
        footer: what to say about completeness, line by line.
    """

    heading: str = "Usage and cost"
    issuer: str = ""
    tenant: str | None = None
    since: str = ""
    until: str = ""
    tz: str = "UTC"
    step: PeriodName = "day"
    times: Sequence[Group] = ()
    tenants: Sequence[Group] = ()
    models: Sequence[Group] = ()
    qualities: dict[str, int] = {}
    kinds: dict[str, int] = {}
    denials: Sequence[Denied] = ()
    internal: bool = True
    complete: bool = True
    footer: Sequence[str] = ()

    @property
    def total(self) -> Sums:
        """Everything together."""
        total = Sums()
        for group in self.tenants:
            total.add(group.sums)
        return total


def facts(
    reader: Reader,
    query: Query,
    *,
    issuer: str = "",
    complete: bool = True,
    footer: Sequence[str] = (),
) -> Facts:
    """Gather what a page shows of the usage that is asked for; a word of time in `query.by` decides how fine.

    What the operator pays is left out of a page about one tenant, which may be meant for that tenant.
    """
    gathered = _Gathered(reader, query)
    first_ms, last_ms = gathered.range_ms
    since_ms, until_ms = query.bounds(reader.billing_tz)
    return Facts(
        issuer=issuer,
        tenant=query.tenant,
        since=_moment(first_ms if since_ms is None else since_ms, query.tz),
        until=_moment(last_ms + 1 if until_ms is None else until_ms, query.tz),
        tz=query.tz,
        step=gathered.step,
        times=gathered.times(),
        tenants=_ranked(gathered.by_tenant),
        models=_ranked(gathered.by_model),
        qualities=dict(sorted(gathered.qualities.items())),
        kinds=dict(sorted(gathered.kinds.items())),
        denials=denied(reader, query),
        internal=query.tenant is None,
        complete=complete,
        footer=tuple(footer),
    )


class _Gathered:
    """Sums by time, tenant and model, of one look at the rated rows and one at the entries."""

    def __init__(self, reader: Reader, query: Query) -> None:
        self._run = reader.connection
        self._tz = query.tz
        self.by_tenant: dict[str, Sums] = {}
        self.by_model: dict[str, Sums] = {}
        self.qualities: dict[str, int] = {}
        self.kinds: dict[str, int] = {}
        self._by_time: dict[int, Sums] = {}
        rows = reader.rows_of(
            query,
            "tenant, coalesce(nullif(model, ''), 'unknown') AS model, token_type, charge, funding, currency, quantity,"
            " posting, unpriced, list_cost, billed_cost, upstream_cost",
        )
        entries = reader.entries_of(
            query, f"tenant, coalesce({WORDS['model'].entry}, 'unknown') AS model, kind, quality, {CALLS} AS calls"
        )
        moments = f"SELECT moment FROM ({rows}) UNION ALL SELECT moment FROM ({entries})"
        found: Any = self._run.execute(f"SELECT min(moment), max(moment) FROM ({moments})").fetchone()
        self.range_ms: tuple[int, int] = (found[0] or 0, found[1] or 0)
        self.step: PeriodName = next((word for word in TIMES if word in query.by), _step(*self.range_ms))
        calendar = Calendar(self._run, self.step, query.tz, moments)
        joined = f"JOIN {calendar.table} c ON c.key = moment // {calendar.step_ms}"
        self._add_rows(f"({rows}) {joined}")
        self._add_entries(f"({entries}) {joined}")

    def _add_rows(self, relation: str) -> None:
        also = "token_type, charge, funding, currency"
        sums = ", ".join(f"coalesce(sum({cost}), 0)" for cost in ("billed_cost", "list_cost", "upstream_cost"))
        for start, tenant, model, token_type, charge, funding, currency, *numbers in self._grouped(
            f"{also}, sum(quantity), coalesce(sum(posting) FILTER (unpriced = ''), 0),"
            f" coalesce(sum(posting) FILTER (unpriced <> ''), 0), {sums}",
            relation,
            also,
        ):
            quantity, lines, unpriced, billed, listed, upstream = numbers
            own = funding == "own"
            cost = Cost(lines=int(lines), billed=billed, upstream=upstream, **{"own" if own else "listed": listed})
            one = Sums(unpriced=int(unpriced), costs={currency: cost} if currency else {})
            if charge == "usage":
                kind = _KIND_OF.get(token_type)
                one.tokens = {kind: int(quantity)} if kind else {}
                one.requests = 0 if kind else int(quantity)
            self._place(start, tenant, model).add(one)

    def _add_entries(self, relation: str) -> None:
        for start, tenant, model, kind, quality, count, calls in self._grouped(
            "kind, quality, count(*), sum(calls)::BIGINT", relation, "kind, quality"
        ):
            if not calls and kind == "recorded":
                continue  # counts of denials, which are no usage
            self._place(start, tenant, model).add(Sums(calls=calls))
            if tenant is not None:
                self.kinds[kind] = self.kinds.get(kind, 0) + int(count)
                if calls:
                    self.qualities[quality] = self.qualities.get(quality, 0) + calls

    def _grouped(self, columns: str, relation: str, also: str) -> Iterable[tuple[Any, ...]]:
        sets = ", ".join(f"({name}, {also})" for name in ("start_ms", "tenant", "model"))
        cursor = self._run.execute(
            f"SELECT start_ms, tenant, model, {columns} FROM {relation} GROUP BY GROUPING SETS ({sets})"
        )
        found: list[tuple[Any, ...]] = cursor.fetchall()
        return found

    def _place(self, start: int | None, tenant: str | None, model: str | None) -> Sums:
        if start is not None:
            return self._by_time.setdefault(start, Sums())
        if tenant is not None:
            return self.by_tenant.setdefault(tenant, Sums())
        return self.by_model.setdefault(str(model), Sums())

    def times(self) -> list[Group]:
        """The time axis, from the first time of which there is something to the last, without a gap."""
        if not self._by_time:
            return []
        groups = []
        at_ms, last_ms = min(self._by_time), max(self._by_time)
        while at_ms <= last_ms:
            period = period_at(self.step, self._tz, at_ms)
            name = hour_text(at_ms, self._tz) if self.step == "hour" else period.label
            sums = self._by_time.get(at_ms, Sums())
            groups.append(Group(name=name, short=_short(name, self.step), sums=sums))
            at_ms = period.end_ms
        return groups


def _step(first_ms: int, last_ms: int) -> PeriodName:
    """The finest step that leaves a chart readable."""
    days = (last_ms - first_ms) // _DAY_MS
    if days < 2:
        return "hour"
    if days <= _DAYS_MAX:
        return "day"
    return "week" if days <= _WEEKS_MAX else "month"


def _short(name: str, step: PeriodName) -> str:
    if step == "hour":
        return name[11:16]
    return name[5:] if step == "day" else name


def _ranked(groups: dict[str, Sums]) -> list[Group]:
    """Who cost most first, by list price in the currency that most rows are in; then by tokens, then by name."""
    lines: dict[str, int] = {}
    for sums in groups.values():
        for currency, cost in sums.costs.items():
            lines[currency] = lines.get(currency, 0) + cost.lines
    main = max(sorted(lines), key=lines.__getitem__, default="")

    def rank(item: tuple[str, Sums]) -> tuple[Any, ...]:
        cost = item[1].costs.get(main, Cost())
        return -plus(cost.listed, cost.own), -sum(item[1].tokens.values()), item[0]

    return [Group(name=name, sums=sums) for name, sums in sorted(groups.items(), key=rank)]


def _moment(at_ms: int, tz: str) -> str:
    if not at_ms:
        return ""
    moment = datetime.fromtimestamp(at_ms // 1000, zone(tz))
    return f"{moment:%Y-%m-%d}" if (moment.hour, moment.minute) == (0, 0) else f"{moment:%Y-%m-%d %H:%M}"
