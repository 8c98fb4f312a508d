"""The provider's usage and cost reports, from files: Anthropic's, in both of their shapes.

The Usage & Cost Admin API answers with time buckets that have `results`; the Usage & Cost Analytics API with rows that
have a `group` and a `usage` or a `cost`. A file holds such answers as they came: a page, pages one behind the other, a
list of them, or one bucket or row a line. It is read page by page. What is told twice is refused, since it would be
counted twice; so is a report whose last page is missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import msgspec

from meterlib.billing.rating.measures import geo_of
from meterlib.billing.reconcile.cells import (
    MEASURES,
    NOTHING,
    Cell,
    Cost,
    CostCell,
    Counts,
    Group,
    added,
    base_model,
    both,
    moment_text,
    only,
)
from meterlib.billing.reconcile.json_objects import objects_of
from meterlib.errors import InvalidInput

Shape: TypeAlias = Literal["usage", "cost"]

_OPTION = "--provider-file"
_TOKEN_TYPES = {
    "uncached_input_tokens": "input",
    "output_tokens": "output",
    "cache_read_input_tokens": "cache_read",
    "cache_creation.ephemeral_5m_input_tokens": "cache_write_5m",
    "cache_creation.ephemeral_1h_input_tokens": "cache_write_1h",
}


class Told(NamedTuple):
    """What one report says in all.

    Attributes:
        usage: the tokens of each cell.
        requests: how many there were; nothing where reports do not count them.
        costs: the money of each cell.
        usage_buckets: from when to when usage is told, empty buckets included.
        cost_buckets: the same of money.
        usage_by: which fields of `Group` usage is told by.
        cost_by: the same of money, for each kind.
        currency: of the money.
        notes: what a reader should know.
    """

    usage: dict[Cell, Counts]
    requests: dict[Cell, int]
    costs: dict[CostCell, Cost]
    usage_buckets: set[tuple[int, int]]
    cost_buckets: set[tuple[int, int]]
    usage_by: frozenset[str]
    cost_by: dict[str, frozenset[str]]
    currency: str
    notes: list[str]


# ── What is in a page ─────────────────────────────────────────────────────────────────────────────────────────────────

_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


class _Dimensions(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    service_tier: str | None = None
    inference_geo: str | None = None
    speed: str | None = None
    workspace_id: str | None = None
    api_key_id: str | None = None
    rbac_group_id: str | None = None
    cost_type: str | None = None
    token_type: str | None = None


class _CacheCreation(msgspec.Struct, frozen=True, kw_only=True):
    ephemeral_5m_input_tokens: _Count
    ephemeral_1h_input_tokens: _Count


class _Tools(msgspec.Struct, frozen=True, kw_only=True):
    web_search_requests: _Count = 0


class _Used(msgspec.Struct, frozen=True, kw_only=True):
    uncached_input_tokens: _Count
    cache_creation: _CacheCreation
    cache_read_input_tokens: _Count
    output_tokens: _Count
    server_tool_use: _Tools | None = None
    requests: _Count | None = None
    total_tokens: _Count | None = None


class _Amounts(msgspec.Struct, frozen=True, kw_only=True):
    amount: Decimal
    currency: str
    list_amount: Decimal | None = None


class _Span(msgspec.Struct, frozen=True, kw_only=True):
    starting_at: datetime
    ending_at: datetime


_MEASURED = {*_Used.__struct_fields__, *_Amounts.__struct_fields__, "requests"}
_decode = msgspec.json.Decoder(float_hook=Decimal).decode


class _Row(NamedTuple):
    """One row: where it stands, its moments, what it is told by, and its numbers."""

    where: str
    bucket: tuple[int, int]
    shape: Shape
    group: dict[str, Any]
    numbers: dict[str, Any]


def read_reports(files: Iterable[Path]) -> Told:
    """What the provider's files tell.

    Raises:
        InvalidInput: a file cannot be read, is no such report, or tells what another one tells, too; it says which,
            and where.
    """
    reading = _Reading()
    for file in files:
        try:
            reading.read(file)
        except OSError as error:
            raise InvalidInput(_OPTION, f"{file} cannot be read: {error.strerror}") from None
    return reading.told()


class _Reading:
    def __init__(self) -> None:
        self._usage: dict[Cell, list[int]] = {}
        self._requests: dict[Cell, int] = {}
        self._counted = True
        self._costs: dict[CostCell, Cost] = {}
        self._buckets: dict[Shape, dict[tuple[int, int], str]] = {"usage": {}, "cost": {}}
        self._by: dict[tuple[str, str, str], set[str]] = {}  # file, shape and kind: fields that it tells
        self._seen: dict[bytes, str] = {}
        self._currency = ""
        self._of_unknown_kind = 0
        self._files: dict[tuple[Shape, str, tuple[int, int]], set[str]] = {}

    def read(self, file: Path) -> None:
        """Add what a file tells."""
        pages = ended = 0
        with file.open("rb") as opened:
            for number, raw in enumerate(objects_of(opened, str(file))):
                where = f"{file}, value {number + 1}"
                page = _page(raw, where)
                if "data" in page:
                    pages += 1
                    ended += not page.get("has_more")
                for row in _rows(page, where, self._empty):
                    self._add(str(file), row)
        if pages and not ended:
            problem = f"{file} ends before the report does: each of its pages says has_more; fetch the next page, too"
            raise InvalidInput(_OPTION, problem)

    def _empty(self, where: str, bucket: tuple[int, int], shape: Shape | None) -> None:
        """A bucket is there, be it without rows; of those nobody can say what they would have told."""
        if shape:
            self._buckets[shape].setdefault(bucket, where)

    def _add(self, file: str, row: _Row) -> None:
        self._once(row)
        if row.group.get("rbac_group_id") is not None:
            raise InvalidInput(_OPTION, f"{row.where}: rows by rbac_group_id overlap; fetch the report without it")
        by = _converted(row.group, _Dimensions, row.where)
        group = Group(
            model=base_model(by.model or ""),
            tier=by.service_tier or "standard",
            speed=by.speed or "standard",
            geo=geo_of(by.inference_geo),
            workspace=by.workspace_id or "",
            key=by.api_key_id or "",
        )
        self._empty(row.where, row.bucket, row.shape)
        kind = "" if row.shape == "usage" else _kind(by)
        fields = (by.model, by.service_tier, by.speed, by.inference_geo, by.workspace_id, by.api_key_id)
        told = {name for name, value in zip(Group._fields, fields, strict=True) if value is not None}
        self._by.setdefault((file, row.shape, kind), set()).update(told)
        self._files.setdefault((row.shape, kind, row.bucket), set()).add(file)
        if row.shape == "usage":
            self._add_usage(Cell(*row.bucket, group), _converted(row.numbers, _Used, row.where))
        else:
            self._add_cost(CostCell(*row.bucket, group, kind), _converted(row.numbers, _Amounts, row.where), row.where)

    def _once(self, row: _Row) -> None:
        """Each combination is told once; a page that was given twice would be counted twice."""
        identity = msgspec.json.encode((row.shape, row.bucket, row.group), order="sorted")
        digest = blake2b(identity, digest_size=16).digest()
        first = self._seen.setdefault(digest, row.where)
        if first != row.where:
            problem = f"{row.where} tells what {first} told already: was a page given twice?"
            raise InvalidInput(_OPTION, problem)

    def _add_usage(self, cell: Cell, used: _Used) -> None:
        split, tools = used.cache_creation, used.server_tool_use
        told = (
            *(used.uncached_input_tokens, split.ephemeral_5m_input_tokens, split.ephemeral_1h_input_tokens),
            *(used.cache_read_input_tokens, used.output_tokens, tools.web_search_requests if tools else 0),
        )
        known = self._usage.setdefault(cell, [*NOTHING])
        for at, count in enumerate(told):
            known[at] += count
        if used.total_tokens not in (None, sum(told[:5])):
            self._of_unknown_kind += 1
        if used.requests is None:
            self._counted = False
        else:
            self._requests[cell] = self._requests.get(cell, 0) + used.requests

    def _add_cost(self, cell: CostCell, told: _Amounts, where: str) -> None:
        amounts = (told.amount, told.list_amount)
        if any(amount is not None and not amount.is_finite() for amount in amounts):
            raise InvalidInput(_OPTION, f"{where}: an amount of money is no number")
        if self._currency not in ("", told.currency):
            raise InvalidInput(_OPTION, f"{where} is in {told.currency}, others are in {self._currency}")
        self._currency = told.currency
        self._costs[cell] = both(self._costs.get(cell), Cost(told.amount, told.list_amount))

    # ── All files together ────────────────────────────────────────────────────────────────────────────────────────────

    def told(self) -> Told:
        """What all files told."""
        for shape, buckets in self._buckets.items():
            _check_overlaps(buckets, shape)
        if not any(self._buckets.values()):
            raise InvalidInput(_OPTION, "no file has a bucket or a row of a usage or cost report")
        self._check_kinds()
        self._check_groupings()
        usage_by = self._told_by("usage", "")
        cost_by = {kind: self._told_by("cost", kind) for _, shape, kind in self._by if shape == "cost"}
        usage: dict[Cell, Counts] = {}
        requests: dict[Cell, int] = {}
        for cell, counts in self._usage.items():
            merged = cell._replace(group=only(cell.group, usage_by))
            usage[merged] = added(usage.get(merged, NOTHING), counts)
            requests[merged] = requests.get(merged, 0) + self._requests.get(cell, 0)
        costs: dict[CostCell, Cost] = {}
        for money, cost in self._costs.items():
            merged_cost = money._replace(group=only(money.group, cost_by[money.kind]))
            costs[merged_cost] = both(costs.get(merged_cost), cost)
        return Told(
            usage=usage,
            requests=requests if self._counted else {},
            costs=costs,
            usage_buckets=set(self._buckets["usage"]),
            cost_buckets=set(self._buckets["cost"]),
            usage_by=usage_by,
            cost_by=cost_by,
            currency=self._currency or "USD",
            notes=self._notes(),
        )

    def _notes(self) -> list[str]:
        if not self._of_unknown_kind:
            return []
        return [f"{self._of_unknown_kind:,} rows of the report have tokens of a kind that this version does not know"]

    def _told_by(self, shape: Shape, kind: str) -> frozenset[str]:
        return frozenset(name for (_, *what), names in self._by.items() if what == [shape, kind] for name in names)

    def _check_groupings(self) -> None:
        """Two files that tell a bucket apart by different fields tell the same usage twice."""
        for (shape, kind, bucket), files in self._files.items():
            first, *others = sorted(files)
            for other in others:
                one, two = self._by[first, shape, kind], self._by[other, shape, kind]
                if one != two:
                    by = [", ".join(sorted(names)) or "nothing" for names in (one, two)]
                    problem = (
                        f"{first} tells {shape} from {moment_text(bucket[0])} on apart by {by[0]}, {other} by {by[1]}:"
                        " it would be counted twice; give one of them"
                    )
                    raise InvalidInput(_OPTION, problem)

    def _check_kinds(self) -> None:
        """Money in total and money by kind are the same money."""
        kinds: dict[tuple[int, int], set[str]] = {}
        for cell in self._costs:
            kinds.setdefault((cell.start_ms, cell.end_ms), set()).add(cell.kind)
        for (start_ms, _), found in kinds.items():
            if ("" in found and len(found) > 1) or ("tokens" in found and found & set(MEASURES[:5])):
                when = moment_text(start_ms)
                problem = f"the cost from {when} on is told in total and by kind: it would be counted twice"
                raise InvalidInput(_OPTION, problem)


def _check_overlaps(buckets: dict[tuple[int, int], str], shape: Shape) -> None:
    """Buckets are the same or apart; an hour that is part of a day would be counted twice."""
    end_ms, last = 0, ""
    for (start, end), where in sorted(buckets.items()):
        if start < end_ms:
            problem = f"{where}: its {shape} from {moment_text(start)} on is part of what {last} tells"
            raise InvalidInput(_OPTION, f"{problem}; give reports of one width of buckets")
        end_ms, last = end, where


# ── Rows of a page ────────────────────────────────────────────────────────────────────────────────────────────────────


def _page(raw: bytes, where: str) -> dict[str, Any]:
    try:
        page: Any = _decode(raw)
    except msgspec.DecodeError as error:
        raise InvalidInput(_OPTION, f"{where} is no JSON: {error}") from None
    if not isinstance(page, dict):
        raise InvalidInput(_OPTION, f"{where} is no page of a report, but {type(page).__name__}")
    return page


def _rows(page: dict[str, Any], where: str, empty: Any) -> Iterator[_Row]:
    """The rows of a page, or of a bucket that stands alone, or the row itself."""
    if "data" not in page:
        yield from _rows_of(page, f"{where}: $", empty)
        return
    if not isinstance(page["data"], list):
        raise InvalidInput(_OPTION, f"{where}: $.data is no list")
    shapes = {_shape(row) for one in page["data"] if isinstance(one, dict) for row in _results(one)}
    shape = next(iter(shapes)) if len(shapes) == 1 else None
    for at, one in enumerate(page["data"]):
        place = f"{where}: $.data[{at}]"
        if not isinstance(one, dict):
            raise _no_report(place)
        yield from _rows_of(one, place, empty, shape)


def _results(one: dict[str, Any]) -> list[Any]:
    results = one.get("results")
    return results if isinstance(results, list) else []


def _rows_of(one: dict[str, Any], where: str, empty: Any, shape: Shape | None = None) -> Iterator[_Row]:
    span = _converted(one, _Span, where) if "starting_at" in one else None
    if span is None:
        raise _no_report(where)
    bucket = (_ms(span.starting_at, where), _ms(span.ending_at, where))
    if bucket[0] >= bucket[1]:
        raise InvalidInput(_OPTION, f"{where} ends before it begins")
    if isinstance(one.get("group"), dict):
        for name in ("usage", "cost"):
            if isinstance(one.get(name), dict):
                yield _Row(where, bucket, name, one["group"], one[name])
                return
        raise _no_report(where)
    if not isinstance(one.get("results"), list):
        raise _no_report(where)
    empty(where, bucket, shape)
    for at, row in enumerate(one["results"]):
        place = f"{where}.results[{at}]"
        found = _shape(row)
        if found is None:
            raise _no_report(place)
        group = {name: value for name, value in row.items() if name not in _MEASURED}
        yield _Row(place, bucket, found, group, row)


def _shape(row: Any) -> Shape | None:
    if not isinstance(row, dict):
        return None
    if "uncached_input_tokens" in row:
        return "usage"
    return "cost" if "amount" in row and "currency" in row else None


def _no_report(where: str) -> InvalidInput:
    known = (
        "neither a bucket with results of the Usage & Cost Admin API nor a row with a group and a usage or a cost"
        " of the Usage & Cost Analytics API"
    )
    return InvalidInput(_OPTION, f"{where} is {known}")


def _converted(value: dict[str, Any], kind: type[Any], where: str) -> Any:
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        text = str(error)
        path = re.search(r" - at `\$(.*)`$", text)
        place, problem = (path[1], text[: path.start()]) if path else ("", text)
        raise InvalidInput(_OPTION, f"{where}{place}: {problem}") from None


def _kind(by: _Dimensions) -> str:
    """What a cost is of, by the names that rated rows have for it."""
    if by.token_type is not None:
        return _TOKEN_TYPES.get(by.token_type, by.token_type)
    return by.cost_type or ""


def _ms(moment: datetime, where: str) -> int:
    if moment.tzinfo is None:
        raise InvalidInput(_OPTION, f"{where} has a time without a zone")
    whole = moment.astimezone(UTC)
    return int(whole.replace(microsecond=0).timestamp()) * 1000 + whole.microsecond // 1000
