"""Our side of a reconciliation, from an archive: sums by cell, and the entries that may explain a difference.

A call is counted in the bucket in which it began; whether the provider counts it where it ended is for the comparison
to find out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from math import gcd
from typing import Any

import msgspec

from meterlib.billing.duck import quoted
from meterlib.billing.rating.measures import PASSES_DIFFER, PROVIDER, SPLIT_UNKNOWN
from meterlib.billing.rating.rated import each_of
from meterlib.billing.rating.rating import LINES_PER_PASS
from meterlib.billing.reconcile.cells import MEASURES, NOTHING, Cell, CostCell, Counts, Group, added, only
from meterlib.billing.reconcile.ids import Scope, id_of, selects
from meterlib.billing.reconcile.money import Ours, PriceSpan
from meterlib.billing.reconcile.reconcile import Call, Difference, Evidence
from meterlib.core.money import EXACT, ZERO, plus
from meterlib.errors import InvalidInput

SLACK_MS = 60_000
"""How far the provider's clock, and its moment of counting, may be from ours."""
CALLS_MAX = 2_000
OTHERS_MAX = 50
"""Entries of a cell that are looked at: those with a mark that may explain something, and those without."""

_TYPES = (*MEASURES, "web_fetch", "code_execution")
HUNDRED = Decimal(100)
_GRID_MAX = 4_000_000
_PASS_LINES = 1 << 20
_FIELDS = ", ".join(Group._fields)


class OurSide:
    """The sums of rated rows between the moments of a report.

    Args:
        connection: of DuckDB; tables are left in its temporary schema.
        entries_sql: SQL of all entries, with the columns of an archive and `shard`.
        rows_sql: SQL of all rated rows, with `booked_at_ms`.
        scope: which calls count.
        buckets: those of the report.
        by: the fields of `Group` that the report tells apart; all others stay empty.
    """

    def __init__(
        self,
        connection: Any,
        entries_sql: str,
        rows_sql: str,
        scope: Scope,
        buckets: Iterable[tuple[int, int]],
        by: Iterable[str],
    ) -> None:
        self._database = connection
        self._entries = entries_sql
        self._scope = scope
        self._by = frozenset(by)
        self._buckets = sorted(buckets)
        self._start_ms, self._end_ms = self._buckets[0][0], max(end for _, end in self._buckets)
        self._slack = min(SLACK_MS, min(end - start for start, end in self._buckets) // 4)
        self._width = self._make_grid()
        self._lines = self._lines_sql(rows_sql)

    def usage(self) -> dict[Cell, Counts]:
        """What was used, by cell."""
        query = (
            f"SELECT b_start, b_end, {_FIELDS}, token_type, sum(quantity)::HUGEINT FROM ({self._lines})"
            f" JOIN rec_grid ON number = {self._number('at_ms')} WHERE at_ms >= {self._start_ms}"
            f" AND token_type IN ({', '.join(map(quoted, MEASURES))}) GROUP BY ALL"
        )
        found: dict[Cell, list[int]] = {}
        for start_ms, end_ms, *fields, kind, quantity in self._database.execute(query).fetchall():
            cell = Cell(start_ms, end_ms, Group(*fields))
            found.setdefault(cell, [*NOTHING])[MEASURES.index(kind)] += quantity
        return {cell: tuple(counts) for cell, counts in found.items()}

    def requests(self) -> dict[Cell, int]:
        """How many calls used something, by cell; an entry may stand for several."""
        several = (
            "SELECT epoch, shard, n, (nullif(outcome, '') ->> '$.usage.requests')::BIGINT AS requests"
            f" FROM ({self._entries}) WHERE contains(outcome, '\"requests\":')"
        )
        calls = (
            f"SELECT DISTINCT epoch, shard, n, at_ms, {_FIELDS} FROM ({self._lines})"
            " WHERE pass_kind = 'call' AND kind <> 'adjusted'"
        )
        query = (
            f"SELECT b_start, b_end, {_FIELDS}, sum(coalesce(requests, 1))::HUGEINT FROM ({calls})"
            f" LEFT JOIN ({several}) USING (epoch, shard, n) JOIN rec_grid ON number = {self._number('at_ms')}"
            f" WHERE at_ms >= {self._start_ms} GROUP BY ALL"
        )
        rows = self._database.execute(query).fetchall()
        return {Cell(start, end, Group(*fields)): count for start, end, *fields, count in rows}

    def costs(self, kinds: Mapping[str, frozenset[str]], currency: str) -> dict[CostCell, Ours]:
        """What it cost, in cents, by kinds of token as a report tells them, each by its own fields.

        Raises:
            InvalidInput: some of it is in another currency.
        """
        query = (
            f"SELECT b_start, b_end, {_FIELDS}, token_type, currency, sum(amount), sum(list_cost),"
            f" (sum(posting) FILTER (unpriced <> ''))::BIGINT FROM ({self._lines})"
            f" JOIN rec_grid ON number = {self._number('at_ms')} WHERE at_ms >= {self._start_ms} GROUP BY ALL"
        )
        found: dict[CostCell, Ours] = {}
        for start, end, *fields, kind, money, amount, listed, unpriced in self._database.execute(query).fetchall():
            if money not in ("", currency):
                raise InvalidInput("--provider-file", f"the report is in {currency}, and rated rows are in {money}")
            told = _kind_of(kind, kinds)
            cell = CostCell(start, end, only(Group(*fields), kinds.get(told, self._by)), told)
            known = found.get(cell, Ours(ZERO, ZERO, 0))
            found[cell] = Ours(
                plus(known.amount, _cents(amount)), plus(known.listed, _cents(listed)), known.unpriced + (unpriced or 0)
            )
        return found

    def prices(self, by: Iterable[str]) -> dict[tuple[Group, str], PriceSpan]:
        """What one of a kind costs us, by group with nothing but these fields."""
        query = (
            f"SELECT {_FIELDS}, token_type, per, min(price), max(price) FROM ({self._lines})"
            f" WHERE unpriced = '' AND at_ms >= {self._start_ms} AND at_ms < {self._end_ms} GROUP BY ALL"
        )
        found: dict[tuple[Group, str], PriceSpan] = {}
        for *fields, kind, per, least, most in self._database.execute(query).fetchall():
            low, high = (EXACT.multiply(each_of(price, per), HUNDRED) for price in (least, most))
            key = only(Group(*fields), by), kind
            known = found.get(key, PriceSpan(low, high))
            found[key] = PriceSpan(min(low, known.low), max(high, known.high))
        return found

    def calls(self, cells: Sequence[Cell]) -> list[Call]:
        """Entries of these cells that may explain something, the largest first where there are many."""
        if not cells:
            return []
        self._make_cells(cells)
        return [*self._used(), *self._unsettled(cells)]

    def named(self, found: Sequence[Difference]) -> list[Difference]:
        """The differences with the ids of their entries, by which people look for them."""
        calls = list({id(call): call for one in found for call, _ in one.evidence}.values())
        ids = {id(call): named for call, named in zip(calls, self._with_ids(calls), strict=True)}
        return [
            msgspec.structs.replace(
                one, evidence=tuple(Evidence(ids[id(call)], counts) for call, counts in one.evidence)
            )
            for one in found
        ]

    def unpriced(self) -> list[Call]:
        """Entries without a price, the largest first; no more than are looked at of a cell."""
        query = (
            f"SELECT epoch, shard, n, b_start, b_end, {_FIELDS} FROM ({self._lines})"
            f" JOIN rec_grid ON number = {self._number('at_ms')} WHERE at_ms >= {self._start_ms} AND unpriced <> ''"
            f" GROUP BY ALL ORDER BY sum(quantity) DESC, epoch, shard, n LIMIT {CALLS_MAX}"
        )
        rows = self._database.execute(query).fetchall()
        return self._with_ids(
            [
                Call(epoch=epoch, shard=shard, n=n, bucket=(start, end), group=Group(*fields))
                for epoch, shard, n, start, end, *fields in rows
            ]
        )

    # ── Tables ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _make_grid(self) -> int:
        """A table of bucket by number, where all buckets are made of equal steps; returns the step, in ms."""
        width = 0
        for start_ms, end_ms in self._buckets:
            width = gcd(width, start_ms - self._start_ms, end_ms - self._start_ms)
        if (self._end_ms - self._start_ms) // width > _GRID_MAX:
            raise InvalidInput("--provider-file", "buckets of minutes, hours or days are needed, not of odd moments")
        values = ", ".join(f"({start}, {end})" for start, end in self._buckets)
        first = self._start_ms
        self._database.execute(
            "CREATE OR REPLACE TEMP TABLE rec_grid AS SELECT unnest(range("
            f"(b_start - {first}) // {width}, (b_end - {first}) // {width})) AS number, b_start, b_end"
            f" FROM (VALUES {values}) AS buckets(b_start, b_end)"
        )
        return width

    def _number(self, moment: str) -> str:
        return f"({moment} - {self._start_ms}) // {self._width}"

    def _make_cells(self, cells: Sequence[Cell]) -> None:
        columns = ", ".join(f"{name} VARCHAR" for name in Group._fields)
        self._database.execute(f"CREATE OR REPLACE TEMP TABLE rec_cells (c_start BIGINT, {columns})")
        for at in range(0, len(cells), 1000):
            rows = (f"({cell.start_ms}, {', '.join(map(quoted, cell.group))})" for cell in cells[at : at + 1000])
            self._database.execute(f"INSERT INTO rec_cells VALUES {', '.join(rows)}")

    def _lines_sql(self, rows_sql: str) -> str:
        """Rated rows that count, with the fields of `Group`, and when each call ended."""
        made = {
            "model": "regexp_replace(model, '[-@]([0-9]{8}|latest)$', '')",
            "tier": "CASE WHEN variant = 'fast' THEN 'standard' ELSE regexp_replace(variant, '\\+fast$', '') END",
            "speed": "CASE WHEN variant = 'fast' OR suffix(variant, '+fast') THEN 'fast' ELSE 'standard' END",
            "geo": "geo",
            "workspace": self._id_sql("workspace"),
            "key": self._id_sql("key"),
        }
        fields = ", ".join(f"{how if name in self._by else repr('')} AS {name}" for name, how in made.items())
        ids = self._scope.ids
        source = f"({rows_sql})"
        if any(one.key != "*" for part in ids for one in part.values()):
            callers = f"SELECT epoch, shard, n, coalesce(attributes ->> '$.key', '') AS caller FROM ({self._entries})"
            source = f"({rows_sql}) JOIN ({callers}) USING (epoch, shard, n)"
        return (
            "SELECT epoch, shard, n, line, kind, at_ms, if(kind = 'settled', booked_at_ms, at_ms) AS end_ms, tenant,"
            f" quality, flags, pass_kind, unpriced, posting, token_type, quantity, list_cost, currency,"
            f" if(funding = 'own', list_cost, upstream_cost) AS amount,"
            f" if(funding = 'own', list_price, upstream_price) AS price, per, {fields} FROM {source}"
            f" WHERE charge = 'usage' AND provider = {quoted(self._scope.provider)} AND {self._scope_sql()}"
        )

    def _scope_sql(self) -> str:
        ids = self._scope.ids
        if ids.keys or ids.workspaces:
            parts = [part for part in ids if part]
            return " AND ".join(f"({' OR '.join(map(selects, part.values()))})" for part in parts)
        return "true" if self._scope.payer == "all" else f"funding = {quoted(self._scope.payer)}"

    def _id_sql(self, field: str) -> str:
        known = self._scope.ids.keys if field == "key" else self._scope.ids.workspaces
        if not known:
            return "''"
        cases = (f"WHEN {selects(one)} THEN {quoted(id_of(name))}" for name, one in known.items())
        return f"CASE {' '.join(cases)} ELSE '' END"

    # ── Entries ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _used(self) -> list[Call]:
        sums = ", ".join(
            f"coalesce(sum(quantity) FILTER (token_type = {quoted(kind)}), 0)::HUGEINT AS m{at}"
            for at, kind in enumerate(MEASURES)
        )
        costs = ", ".join(
            f"coalesce(sum(amount) FILTER (token_type = {quoted(kind)}), 0) AS c{at}"
            for at, kind in enumerate(MEASURES)
        )
        same = " AND ".join(f"l.{name} = c.{name}" for name in Group._fields)
        slack = self._slack
        near = (
            f"at_ms - {slack} < coalesce(b_start, {self._end_ms})"
            f" OR end_ms + {slack} >= coalesce(b_end, {self._start_ms})"
        )
        home = f"coalesce(b_start, if(at_ms < {self._start_ms}, {self._buckets[0][0]}, {self._buckets[-1][0]}))"
        lines = (
            f"SELECT l.*, b_start, b_end, {home} AS home FROM ({self._lines}) l LEFT JOIN rec_grid"
            f" ON number = {self._number('at_ms')} AND at_ms >= {self._start_ms}"
            f" WHERE b_start IS NOT NULL OR (at_ms < {self._start_ms} AND end_ms + {slack} >= {self._start_ms})"
            f" OR (at_ms >= {self._end_ms} AND at_ms - {slack} < {self._end_ms})"
        )
        fields = ", ".join(f"l.{name}" for name in Group._fields)
        grouped = (
            f"SELECT epoch, shard, n, tenant, kind, quality, at_ms, end_ms, b_start, b_end, home, {fields}, {sums},"
            f" {costs},"
            f" coalesce(sum(quantity) FILTER (contains(flags, '{SPLIT_UNKNOWN}')), 0)::HUGEINT AS unsplit,"
            f" bool_or(contains(flags, '{PASSES_DIFFER}')) AS doubtful,"
            f" list((line % {_PASS_LINES} // {LINES_PER_PASS}, token_type, quantity)) FILTER (pass_kind <> 'call')"
            " AS passes"
            f" FROM ({lines}) l JOIN rec_cells c ON home = c_start AND {same} GROUP BY ALL"
        )
        marked = f"(quality <> 'final' OR unsplit <> 0 OR doubtful OR passes IS NOT NULL OR {near})"
        size = " + ".join(f"abs(m{at})" for at in range(len(MEASURES)))
        query = (
            f"SELECT *, {marked} AS marked FROM ({grouped}) QUALIFY row_number() OVER (PARTITION BY home, {_FIELDS}"
            f" ORDER BY marked DESC, {size} DESC, epoch, shard, n) <= if(marked, {CALLS_MAX}, {OTHERS_MAX})"
            " ORDER BY epoch, shard, n"
        )
        cursor = self._database.execute(query)
        names = [column[0] for column in cursor.description]
        return [self._call(dict(zip(names, row, strict=True))) for row in cursor.fetchall()]

    def _call(self, row: Mapping[str, Any]) -> Call:
        bucket = None if row["b_start"] is None else (row["b_start"], row["b_end"])
        return Call(
            epoch=row["epoch"],
            shard=row["shard"],
            n=row["n"],
            tenant=row["tenant"],
            kind=row["kind"],
            quality=row["quality"],
            group=Group(*(row[name] for name in Group._fields)),
            bucket=bucket,
            counts=tuple(row[f"m{at}"] for at in range(len(MEASURES))),
            costs=tuple(_cents(row[f"c{at}"]) for at in range(len(MEASURES))),
            unsplit=row["unsplit"],
            passes=_passes(row["passes"] or ()),
            doubtful=row["doubtful"],
            **self._other(bucket, row["at_ms"], row["end_ms"]),
        )

    def _other(self, bucket: tuple[int, int] | None, at_ms: int, end_ms: int) -> dict[str, Any]:
        """Where else the provider may count a call: where it ended, or what is close to its begin or end."""
        for moment, ended in ((end_ms, True), (end_ms + self._slack, False), (at_ms - self._slack, False)):
            there = self._bucket_at(moment)
            if there is not None and there != bucket:
                return {"other": there, "ends_elsewhere": ended and bucket is not None}
            if there is None and bucket is not None:
                return {"leaves": True, "ends_elsewhere": ended}
        return {}

    def _bucket_at(self, ms: int) -> tuple[int, int] | None:
        at = bisect_right(self._buckets, (ms, 1 << 62)) - 1
        found = self._buckets[at] if at >= 0 else None
        return found if found and found[0] <= ms < found[1] else None

    def _unsettled(self, cells: Sequence[Cell]) -> list[Call]:
        """Reservations that expired in these cells; under which tier they would have been served nobody knows."""
        prompt = "+".join(
            f"coalesce((nullif(estimate, '') ->> '$.{name}')::BIGINT, 0)"
            for name in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
        )
        model = "regexp_replace(coalesce(model, ''), '[-@]([0-9]{8}|latest)$', '')" if "model" in self._by else "''"
        ids = ", ".join(f"{self._id_sql(name) if name in self._by else repr('')} AS {name}" for name in _IDS)
        query = (
            f"SELECT epoch, shard, n, tenant, b_start, b_end, {model} AS model, {ids}, {prompt} AS estimated"
            f" FROM (SELECT *, coalesce(attributes ->> '$.key', '') AS caller FROM ({self._entries}))"
            f" JOIN rec_grid ON number = {self._number('reserved_at')} WHERE kind = 'expired'"
            f" AND reserved_at >= {self._start_ms} AND {self._scope_sql()}"
            f" AND coalesce(nullif(provider, ''), '{PROVIDER}') = {quoted(self._scope.provider)} ORDER BY shard, n"
        )
        places: dict[tuple[Any, ...], list[Cell]] = {}
        for cell in cells:
            places.setdefault((cell.start_ms, cell.group.model, cell.group.workspace, cell.group.key), []).append(cell)
        found = []
        for epoch, shard, n, tenant, start, end, told, workspace, key, estimated in self._database.execute(
            query
        ).fetchall():
            for cell in places.get((start, told, workspace, key), ()):
                found.append(
                    Call(
                        epoch=epoch, shard=shard, n=n, tenant=tenant, kind="expired", group=cell.group,
                        bucket=(start, end), estimated=estimated,
                    )
                )  # fmt: skip
        return found

    def _with_ids(self, calls: Sequence[Call]) -> list[Call]:
        """The calls with the ids that people look for them by."""
        if not calls:
            return []
        self._database.execute("CREATE OR REPLACE TEMP TABLE rec_calls (epoch VARCHAR, shard INTEGER, n BIGINT)")
        keys = sorted({(call.epoch, call.shard, call.n) for call in calls})
        for at in range(0, len(keys), 1000):
            rows = (f"({quoted(epoch)}, {shard}, {n})" for epoch, shard, n in keys[at : at + 1000])
            self._database.execute(f"INSERT INTO rec_calls VALUES {', '.join(rows)}")
        query = (
            "SELECT epoch, shard, n, reservation_id, coalesce(facts ->> '$.request_id', '')"
            f" FROM ({self._entries}) SEMI JOIN rec_calls USING (epoch, shard, n)"
        )
        told = {(epoch, shard, n): ids for epoch, shard, n, *ids in self._database.execute(query).fetchall()}
        return [
            msgspec.structs.replace(call, reservation_id=ids[0] or "", request_id=ids[1])
            for call in calls
            for ids in (told.get((call.epoch, call.shard, call.n), ("", "")),)
        ]


_IDS = ("workspace", "key")


def _passes(lines: Iterable[tuple[int, str, int]]) -> tuple[Counts, ...]:
    found: dict[int, Counts] = {}
    for number, kind, quantity in lines:
        if kind in MEASURES:
            one = tuple(quantity if kind == name else 0 for name in MEASURES)
            found[number] = added(found.get(number, NOTHING), one)
    return tuple(counts for _, counts in sorted(found.items()))


def _kind_of(kind: str, kinds: Mapping[str, frozenset[str]]) -> str:
    """Where a report has the money of this kind of token or request."""
    if kind in kinds:
        return kind
    if kind in MEASURES[:5] and "tokens" in kinds:
        return "tokens"
    return "" if "" in kinds else kind


def _cents(amount: Decimal | None) -> Decimal:
    return ZERO if amount is None else EXACT.scaleb(amount, 2)
