"""A reconciliation: the provider's reports beside an archive, all differences explained, and whether they matter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, TypeVar

import msgspec

from meterlib.billing.reconcile.cells import NOTHING, Cell, Cost, CostCell, Counts, Group, added, both, only
from meterlib.billing.reconcile.files import Told
from meterlib.billing.reconcile.ids import Scope, id_of
from meterlib.billing.reconcile.money import MoneyDifference, MoneySide, Ours, explain_money
from meterlib.billing.reconcile.reconcile import Cause, Difference, differing, explain
from meterlib.billing.reconcile.sql import OurSide
from meterlib.core.money import ZERO, plus
from meterlib.errors import InvalidInput

HARMLESS: tuple[Cause, ...] = ("timing",)
"""Causes that are no reason to doubt either side: what is timing in one bucket is in its neighbour, too."""


class Reconciliation(msgspec.Struct, frozen=True, kw_only=True):
    """Both sides, and what lies between them.

    Attributes:
        start_ms: from when, in ms since 1970 UTC.
        end_ms: until when, excluded.
        by: what the report tells apart.
        currency: of the money; amounts are in its hundredths.
        told: the provider's tokens; None where there is no usage report.
        ours: our tokens of the same time.
        tokens: the differences, explained; their counts add up to `told` less `ours`.
        told_cents: the provider's money; None where there is no cost report.
        our_cents: ours.
        money: the differences; they add up likewise.
        notes: what a reader should know.
    """

    start_ms: int
    end_ms: int
    by: tuple[str, ...]
    currency: str
    told: Counts | None
    ours: Counts
    tokens: Sequence[Difference]
    told_cents: Decimal | None
    our_cents: Decimal
    money: Sequence[MoneyDifference]
    notes: Sequence[str]

    def tokens_off(self, accepted: Collection[Cause] = HARMLESS) -> int:
        """How many tokens and searches differ, counted without sign, for causes that are not accepted."""
        return sum(one.size for one in self.tokens if one.cause not in accepted)

    def cents_off(self, accepted: Collection[Cause] = HARMLESS) -> Decimal:
        """The same of money."""
        return _sum(abs(one.amount) for one in self.money if one.cause not in accepted)


class Sides(msgspec.Struct, frozen=True, kw_only=True):
    """What to compare.

    Attributes:
        told: what the provider's files say.
        scope: which calls count.
        since_ms: from when the provider was asked; None for its first bucket. Buckets without a row are told by none
            of the Analytics API's rows, so whoever asked from a quiet day on has to say so.
        until_ms: until when.
    """

    told: Told
    scope: Scope = Scope()
    since_ms: int | None = None
    until_ms: int | None = None


def reconcile(
    connection: Any, entries_sql: str, rows_sql: str, sides: Sides, begin: Callable[[str], None] = lambda phase: None
) -> Reconciliation:
    """Compare and explain.

    Args:
        connection: of DuckDB.
        entries_sql: SQL of all entries.
        rows_sql: SQL of all rated rows.
        sides: what to compare.
        begin: is told what comes next, as it goes.

    Raises:
        InvalidInput: the report does not tell apart what the map tells apart, or is in another currency.
    """
    notes = list(sides.told.notes)
    told = _comparable(sides.told, sides.scope, notes)
    told = _without_ids(told, sides.scope)
    cost_buckets = _filled(told.cost_buckets, sides)
    usage_buckets = _filled(told.usage_buckets, sides, cost_buckets if told.requests else ())

    def our_side(buckets: Iterable[tuple[int, int]], by: Iterable[str]) -> OurSide:
        return OurSide(connection, entries_sql, rows_sql, sides.scope, buckets, by)

    usage, requests = told.usage, told.requests
    ours: dict[Cell, Counts] = {}
    tokens: list[Difference] = []
    if usage_buckets:
        begin("adding up our tokens")
        side = our_side(usage_buckets, told.usage_by)
        ours = side.usage()
        left = differing(usage, ours)
        begin(f"looking for what explains {len(left):,} differences")
        more = _more(requests, side.requests()) if requests else None
        tokens = side.named(explain(left, side.calls(list(left)), more))
    own: dict[CostCell, Ours] = {}
    money: list[MoneyDifference] = []
    if cost_buckets:
        begin("adding up what they cost")
        finest = frozenset().union(*told.cost_by.values(), told.usage_by)
        side = our_side(cost_buckets, finest)
        own = side.costs(told.cost_by, told.currency)
        known = MoneySide(
            tokens=tokens,
            prices=side.prices(told.usage_by),
            unpriced=side.unpriced(),
            covered=sorted(usage_buckets),
        )
        money = explain_money(told.costs, own, known)
    buckets = usage_buckets | cost_buckets
    return Reconciliation(
        start_ms=min(start for start, _ in buckets),
        end_ms=max(end for _, end in buckets),
        by=tuple(name for name in Group._fields if name in told.usage_by.union(*told.cost_by.values())),
        currency=told.currency,
        told=_total(usage.values()) if usage_buckets else None,
        ours=_total(ours.values()),
        tokens=tokens,
        told_cents=_sum(cost.amount for cost in told.costs.values()) if cost_buckets else None,
        our_cents=_sum(one.amount for one in own.values()),
        money=money,
        notes=notes,
    )


def _comparable(told: Told, scope: Scope, notes: list[str]) -> Told:
    """What of a report can be compared by the ids of a map."""
    needed = [(field, ids) for field, ids in (("key", scope.ids.keys), ("workspace", scope.ids.workspaces)) if ids]
    vague = set()
    for field, _ in needed:
        if told.usage and field not in told.usage_by:
            raise InvalidInput("--map", _TELL.format(what="usage", field=_FIELDS[field]))
        vague |= {kind for kind, by in told.cost_by.items() if field not in by}
        if vague == told.cost_by.keys() != set() and not told.usage_buckets:
            raise InvalidInput("--map", _TELL.format(what="cost", field=_FIELDS[field]))
    if vague:
        kinds = ", ".join(sorted(kind or "all" for kind in vague))
        notes.append(f"money not compared, since the cost report does not tell the map's ids apart: {kinds}")
    return told._replace(
        usage=_mapped(told.usage, scope, notes),
        requests=_mapped(told.requests, scope, []),
        costs=_mapped({cell: cost for cell, cost in told.costs.items() if cell.kind not in vague}, scope, []),
        cost_by={kind: by for kind, by in told.cost_by.items() if kind not in vague},
        cost_buckets=set() if vague and vague == told.cost_by.keys() else told.cost_buckets,
    )


_FIELDS = {"key": "api_key_id", "workspace": "workspace_id"}
_TELL = "the {what} report does not tell {field} apart, which the map has; fetch it with group_by[]={field}"


C = TypeVar("C", Cell, CostCell)
V = TypeVar("V")


def _mapped(told: Mapping[C, V], scope: Scope, notes: list[str]) -> dict[C, V]:
    """Rows of ids that the map has; those of others are another application's, and said to be left out."""
    ids = scope.ids
    keys = {id_of(name) for name in ids.keys}
    workspaces = {id_of(name) for name in ids.workspaces}
    kept = {}
    left_out: set[str] = set()
    for cell, value in told.items():
        group = cell.group
        if (keys and group.key not in keys) or (workspaces and group.workspace not in workspaces):
            left_out.add(group.key or group.workspace or "none")
        else:
            kept[cell] = value
    if left_out:
        shown = ", ".join(sorted(left_out)[:8]) + (" …" if len(left_out) > 8 else "")
        notes.append(f"not compared, since the map does not have them: {len(left_out)} ids of the provider ({shown})")
    return kept


def _without_ids(told: Told, scope: Scope) -> Told:
    """The report with the ids summed up that no map tells us of."""
    unknown = {field for field, ids in (("key", scope.ids.keys), ("workspace", scope.ids.workspaces)) if not ids}
    usage_by = told.usage_by - unknown
    cost_by = {kind: by - unknown for kind, by in told.cost_by.items()}
    usage: dict[Cell, Counts] = {}
    requests: dict[Cell, int] = {}
    costs: dict[CostCell, Cost] = {}
    for cell, counts in told.usage.items():
        merged = cell._replace(group=only(cell.group, usage_by))
        usage[merged] = added(usage.get(merged, NOTHING), counts)
        if told.requests:
            requests[merged] = requests.get(merged, 0) + told.requests[cell]
    for money, cost in told.costs.items():
        sum_of = money._replace(group=only(money.group, cost_by[money.kind]))
        costs[sum_of] = both(costs.get(sum_of), cost)
    return told._replace(usage=usage, requests=requests, costs=costs, usage_by=usage_by, cost_by=cost_by)


def _filled(
    buckets: Collection[tuple[int, int]], sides: Sides, around: Collection[tuple[int, int]] = ()
) -> set[tuple[int, int]]:
    """The buckets, and those between and around them that have no rows, where all are of one width.

    The Analytics API tells nothing of buckets without usage, so its report is taken to be of all the time that money
    is told of.
    """
    widths = {end - start for start, end in buckets}
    if len(widths) != 1:
        return set(buckets)
    (width,) = widths
    first, last = min(start for start, _ in buckets), max(end for _, end in buckets)
    begins = [start for start, _ in around] + ([] if sides.since_ms is None else [sides.since_ms])
    ends = [end for _, end in around] + ([] if sides.until_ms is None else [sides.until_ms])
    first -= max(0, first - min(begins, default=first)) // width * width
    last += max(0, max(ends, default=last) - last) // width * width
    if any((start - first) % width for start, _ in buckets):
        return set(buckets)
    return {(start, start + width) for start in range(first, last, width)}


def _more(told: Mapping[Cell, int], ours: Mapping[Cell, int]) -> dict[Cell, int]:
    return {cell: told.get(cell, 0) - ours.get(cell, 0) for cell in told.keys() | ours.keys()}


def _total(all_counts: Iterable[Counts]) -> Counts:
    total = NOTHING
    for counts in all_counts:
        total = added(total, counts)
    return total


def _sum(amounts: Iterable[Decimal]) -> Decimal:
    total = ZERO
    for amount in amounts:
        total = plus(total, amount)
    return total
