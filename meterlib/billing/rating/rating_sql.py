"""Rating many entries at once in DuckDB: the same rows as `rating.rate` makes, by joins with a table of prices.

Prices are looked up in Python, once for each combination of model, way of service and place that occurs, and once for
each set of terms; so there is one rule for what costs what. What SQL does is to find the case of each call, by its time
and the length of its prompt, and to multiply. Products are exact: a DECIMAL(19,0) by a DECIMAL(18,12)
makes a DECIMAL(37,12), which DuckDB computes in 128 bits (two of 18 digits it would compute in 64, and overflow).

Corrections, calls with several passes and usage under names that nobody here knows are few, and left to `rate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any

from meterlib.billing.duck import quoted
from meterlib.billing.prices.prices import PER, PriceBooks, Rate, Unpriced
from meterlib.billing.prices.terms import Terms
from meterlib.billing.rating.compiled import cases
from meterlib.billing.rating.measures import KINDS, OTHER, PROVIDER, SPLIT_CONTRADICTS, SPLIT_UNKNOWN, WRITE_UNSPLIT
from meterlib.billing.rating.rated import each_of
from meterlib.billing.rating.rating import FEE_LINES, customer_prices, reason_of
from meterlib.core.money import ZERO
from meterlib.core.policy import Funding

COLUMNS = {
    "epoch": "VARCHAR",
    "shard": "INTEGER",
    "n": "BIGINT",
    "line": "BIGINT",
    "kind": "VARCHAR",
    "at_ms": "BIGINT",
    "tenant": "VARCHAR",
    "funding": "VARCHAR",
    "charge": "VARCHAR",
    "provider": "VARCHAR",
    "model": "VARCHAR",
    "pass_kind": "VARCHAR",
    "token_type": "VARCHAR",
    "quantity": "BIGINT",
    "per": "INTEGER",
    "currency": "VARCHAR",
    **dict.fromkeys(("list_price", "contracted_price", "billed_price", "upstream_price"), "DECIMAL(18,6)"),
    **dict.fromkeys(("list_cost", "contracted_cost", "billed_cost", "upstream_cost"), "DECIMAL(38,12)"),
    "price_source": "VARCHAR",
    "price_model": "VARCHAR",
    "price_digest": "VARCHAR",
    "price_from": "VARCHAR",
    "variant": "VARCHAR",
    "geo": "VARCHAR",
    "above": "BIGINT",
    "quality": "VARCHAR",
    "flags": "VARCHAR",
    "unpriced": "VARCHAR",
    "reverses": "BIGINT",
    "posting": "INTEGER",
}
"""Columns of rated rows: the fields of `RatedRow`, in their order."""

_USAGE_NAMES = (
    *("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "cache_creation"),
    *("output_tokens_details", "server_tool_use", "service_tier", "speed", "inference_geo"),
    *("iterations", "amounts"),
)
_TOOL_NAMES = ("web_search_requests", "web_fetch_requests", "code_execution_requests")

_PASSES = f"""
SELECT epoch, shard, n, kind, tenant, funding, quality, booked_at, {{hard}} AS hard,
    if(reserved_at = 0, booked_at, reserved_at) AS at_ms,
    coalesce(nullif(provider, ''), '{PROVIDER}') AS provider,
    coalesce(nullif(facts ->> '$.model', ''), model, '') AS model,
    coalesce(nullif(concat_ws('+', nullif(nullif(service_tier, 'standard'), ''), nullif(nullif(speed, 'standard'), '')),
        ''), 'standard') AS variant,
    coalesce(nullif(nullif(inference_geo, 'not_available'), ''), 'global') AS geo,
    input_tokens AS a0, output_tokens AS a1,
    coalesce(ephemeral_5m_input_tokens, 0) AS a2, coalesce(ephemeral_1h_input_tokens, 0) AS a3,
    coalesce(cache_creation_input_tokens - a2 - a3, 0) AS unsplit, greatest(unsplit, 0) AS a4,
    coalesce(cache_read_input_tokens, 0) AS a5,
    coalesce(web_search_requests, 0) AS a6, coalesce(web_fetch_requests, 0) AS a7,
    coalesce(code_execution_requests, 0) AS a8,
    coalesce(a0, 0) + a2 + a3 + a4 + a5 AS prompt
FROM (SELECT *, coalesce(json_keys(outcome, '$.usage'), []) AS names FROM ({{source}}))
WHERE kind = 'adjusted' OR (kind IN ('settled', 'late', 'recorded') AND names <> ['amounts'])
"""
_HARD = (
    "(kind = 'adjusted' OR coalesce(json_array_length(iterations), 0) > 0"
    " OR NOT list_has_all({names}, names)"
    " OR CASE WHEN list_contains(names, 'server_tool_use') THEN"
    " NOT list_has_all({tools}, coalesce(json_keys(outcome, '$.usage.server_tool_use'), [])) ELSE false END)"
)


class SqlRating:
    """A rating of the entries of a relation, ready to be read.

    Args:
        connection: of DuckDB; five tables are left in its temporary schema, so one rating is read at a time.
        source: SQL of entries, with the columns of an archive and `shard`.
        books: where prices are looked up.
        terms_of: the terms of each tenant.
        carried: columns of the entries that rows have besides, behind their own: `booked_at`.

    Attributes:
        rows_sql: SQL of the rated rows, with the columns of `COLUMNS`, in no particular order.
        hard_sql: SQL of those entries that are left to `rate`, as they are in the source.
    """

    def __init__(
        self,
        connection: Any,
        source: str,
        books: PriceBooks,
        terms_of: Callable[[str], Terms],
        carried: Sequence[str] = (),
    ) -> None:
        hard = _HARD.format(names=_texts(_USAGE_NAMES), tools=_texts(_TOOL_NAMES))
        passes = _PASSES.format(source=source, hard=hard)
        connection.execute(f"CREATE OR REPLACE TEMP TABLE rating_passes AS {passes}")  # JSON is looked into once
        (left,) = connection.execute("SELECT count(*) FROM rating_passes WHERE hard").fetchone()
        which = "(epoch, shard, n) IN (SELECT (epoch, shard, n) FROM rating_passes WHERE hard)" if left else "false"
        self.hard_sql = f"SELECT * FROM ({source}) WHERE {which}"
        self._passes = "SELECT * FROM rating_passes WHERE NOT hard"
        self._carried = carried
        self._make_cases(connection, books, terms_of)
        connection.execute(f"CREATE OR REPLACE TEMP TABLE rating_calls AS {self._calls_sql()}")
        self.rows_sql = self._rows_sql()

    def _make_cases(self, connection: Any, books: PriceBooks, terms_of: Callable[[str], Terms]) -> None:
        """Tables of all that may apply: which case a call is, whose terms hold, and what each slot costs then."""
        found = connection.execute(f"SELECT DISTINCT {', '.join(_NAMES)} FROM ({self._passes})").fetchall()
        self._known = {name: _enum(told) for name, told in zip(_NAMES, zip(*found, strict=True), strict=False)}
        terms = {tenant: terms_of(tenant) for *_, tenant in found}
        numbers = {one: at for at, one in enumerate(dict.fromkeys(terms.values()))}
        # Only what occurs together: each customer may have terms of its own, and few of them use every model.
        held: dict[tuple[str, ...], dict[Terms, set[Funding]]] = {}
        for row in found:
            held.setdefault(row[:4], {}).setdefault(terms[row[-1]], set()).add(row[4])
        case_rows: list[tuple[Any, ...]] = []
        price_rows: list[tuple[Any, ...]] = []
        for key in sorted(held):
            for case in cases(books, *key):
                number = len(case_rows)
                case_rows.append((number, *key, case.from_ms, case.until_ms, case.above, case.upto))
                for own, fundings in held[key].items():
                    price_rows += _prices(number, numbers[own], case.found, own, sorted(fundings))
        _fill(connection, "rating_cases", _CASES, case_rows)
        texts = [_enum(row[at] for row in price_rows) for at in range(-len(_TEXTS), 0)]
        told = ", ".join(f"{name} {kind}" for name, kind in zip(_TEXTS, texts, strict=True))
        _fill(connection, "rating_prices", f"{_PRICES}, {told}", price_rows)
        term_rows = [(tenant, numbers[own]) for tenant, own in sorted(terms.items(), key=lambda item: item[0])]
        _fill(connection, "rating_terms", "tenant VARCHAR, terms INTEGER", term_rows)

    def _calls_sql(self) -> str:
        """SQL of each call, its case and terms; a table of it tells DuckDB how many there are, and so how to join."""
        known = ", ".join(f"p.{name}::{kind} AS {name}" for name, kind in self._known.items())
        replaced = f"REPLACE ({known})" if known else ""
        return (
            f"SELECT p.* {replaced}, c.c_case AS call_case, t.terms FROM ({self._passes}) p"
            " JOIN rating_cases c ON p.provider = c.c_provider AND p.model = c.c_model AND p.variant = c.c_variant"
            " AND p.geo = c.c_geo AND p.at_ms >= c.from_ms AND p.at_ms < c.until_ms"
            " AND p.prompt > c.c_above AND p.prompt <= c.upto"
            " JOIN rating_terms t ON p.tenant = t.tenant"
        )

    def _rows_sql(self) -> str:
        amounts = ", ".join(f"{{slot: {slot}, quantity: a{slot}}}" for slot in range(OTHER))
        flags = (
            f"(CASE WHEN slot = {WRITE_UNSPLIT} THEN '{SPLIT_UNKNOWN}'"
            f" WHEN slot IN (2, 3) AND unsplit < 0 THEN '{SPLIT_CONTRADICTS}' ELSE '' END)"
            f"::{_enum(('', SPLIT_UNKNOWN, SPLIT_CONTRADICTS))}"
        )
        lines = (
            f"SELECT * EXCLUDE (a0, a1, a2, a3, a4, a5, a6, a7, a8), unnest([{amounts}], recursive := true)"
            " FROM rating_calls"
        )
        joined = (
            f"SELECT l.*, r.*, {flags} AS flags"
            f" FROM (SELECT * FROM ({lines}) WHERE quantity IS NULL OR quantity <> 0) l JOIN rating_prices r"
            " ON r.r_case = l.call_case AND r.r_slot = l.slot AND r.r_terms = l.terms AND r.r_own = (l.funding = 'own')"
            " AND r.r_known = (l.quantity IS NOT NULL)"
        )
        names = (*COLUMNS, *self._carried)
        return f"SELECT {', '.join(f'{_SELECT.get(name, name)} AS {name}' for name in names)} FROM ({joined})"


_NAMES = ("provider", "model", "variant", "geo", "funding", "kind", "quality", "epoch", "tenant")
_TEXTS = ("charge", "token_type", "currency", "price_source", "price_model", "price_digest", "price_from", "unpriced")
_ENUM_MAX = 1_000
_CASES = (
    "c_case INTEGER, c_provider VARCHAR, c_model VARCHAR, c_variant VARCHAR, c_geo VARCHAR, from_ms BIGINT,"
    " until_ms BIGINT, c_above BIGINT, upto BIGINT"
)
_PRICES = (
    "r_case INTEGER, r_terms INTEGER, r_own BOOLEAN, r_slot INTEGER, r_known BOOLEAN, per INTEGER, above BIGINT,"
    " list_price DECIMAL(18,6), contracted_price DECIMAL(18,6), billed_price DECIMAL(18,6),"
    " upstream_price DECIMAL(18,6), list_each DECIMAL(18,12), contracted_each DECIMAL(18,12),"
    " billed_each DECIMAL(18,12), upstream_each DECIMAL(18,12)"
)
_SELECT: dict[str, str] = {
    "line": f"slot + if(charge = 'usage', 0, {FEE_LINES})",
    "pass_kind": "'call'::ENUM('call')",
    "quantity": "coalesce(quantity, 0)",
    **{
        f"{name}_cost": f"(quantity::DECIMAL(19,0) * {name}_each)::DECIMAL(38,12)"
        for name in ("list", "contracted", "billed", "upstream")
    },
    "reverses": "-1",
    "posting": "1",
}


def _prices(
    case: int, number: int, found: Rate | Unpriced, terms: Terms, fundings: Sequence[Funding]
) -> Iterable[tuple[Any, ...]]:
    """What each slot costs in a case by some terms, for some ways of funding."""
    for slot in range(OTHER):
        kind = KINDS[slot]
        price = found.prices.get(kind) if isinstance(found, Rate) else None
        unknown = ("usage", kind, "", "", "", "", "", reason_of(found, slot, None, ""))
        unpriced = (*unknown[:-1], "" if price is not None else reason_of(found, slot, 0, ""))
        for funding in fundings:
            key = (case, number, funding == "own", slot)
            yield (*key, False, PER[kind], 0, *[None] * 8, *unknown)
            if price is None or not isinstance(found, Rate):
                yield (*key, True, PER[kind], 0, *[None] * 8, *unpriced)
                continue
            told = (kind, found.currency, found.source, found.model, found.digest, found.valid_from, "")
            prices = customer_prices(price, terms, funding)
            yield (*key, True, PER[kind], found.above, *prices, *_each(prices, PER[kind]), "usage", *told)
            if funding == "own" and terms.platform_fee:
                fee = terms.fee(price)
                fees = (ZERO, fee, fee, ZERO)
                yield (*key, True, PER[kind], found.above, *fees, *_each(fees, PER[kind]), "platform_fee", *told)


def _enum(values: Iterable[str]) -> str:
    """The type of a column that has these values alone, so that DuckDB moves numbers and not texts."""
    known = sorted({value for value in values if value is not None})
    return f"ENUM({', '.join(map(quoted, known))})" if 0 < len(known) <= _ENUM_MAX else "VARCHAR"


def _each(prices: Iterable[Decimal], per: int) -> list[Decimal]:
    return [each_of(price, per) for price in prices]


def _fill(connection: Any, name: str, columns: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """A table of the rows. They go in by columns: as a text of values, each would have to be parsed."""
    connection.execute(f"CREATE OR REPLACE TEMP TABLE {name} ({columns})")
    if rows:
        told = [
            [f"{value:f}" if isinstance(value, Decimal) else value for value in column]
            for column in zip(*rows, strict=True)
        ]
        connection.execute(f"INSERT INTO {name} SELECT {', '.join(['unnest(?)'] * len(told))}", told)


def _texts(names: Iterable[str]) -> str:
    return "[" + ", ".join(quoted(name) for name in names) + "]"
