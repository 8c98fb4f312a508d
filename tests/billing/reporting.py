"""Entries and what they cost as an archive has them, for tests of reports: made by plain Python, read by DuckDB."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import duckdb

from meterlib import LedgerEntry
from meterlib.billing.archive.rows import VERBATIM, made_from
from meterlib.billing.duck import quoted
from meterlib.billing.prices.prices import PriceBooks
from meterlib.billing.prices.terms import LIST, Terms
from meterlib.billing.rating.rating import rate
from meterlib.billing.rating.rating_sql import COLUMNS
from meterlib.core.ledger import CallFacts, Outcome, encode
from meterlib.core.periods import period_at

_EXTRA = {
    "booked_at_ms": "BIGINT",
    "rating": "INTEGER",
    "posted_at_ms": "BIGINT",
    "period": "VARCHAR",
    "corrects": "VARCHAR",
}
ROW_COLUMNS = COLUMNS | _EXTRA


def stored(one: LedgerEntry) -> dict[str, Any]:
    """The verbatim columns of an entry."""
    call = encode(CallFacts(tenant=one.tenant, attributes=one.attributes, funding=one.funding))
    outcome = encode(
        Outcome(
            usage=one.usage, quality=one.quality, facts=one.facts, adjusts=one.adjusts, reason=one.reason,
            actor=one.actor,
        )
    )  # fmt: skip
    return {
        **dict.fromkeys(VERBATIM, ""),
        **{name: getattr(one, name) for name in ("n", "kind", "reserved_at", "booked_at", "epoch")},
        "call": call.decode(),
        "outcome": outcome.decode(),
        "estimate": json.dumps(dict(one.estimate)) if one.estimate else "",
    }


def rated(entries: Iterable[LedgerEntry], books: PriceBooks, terms: Mapping[str, Terms] = {}, tz: str = "UTC",
          posted: Iterable[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:  # fmt: skip
    """Rated rows of entries, and others that were posted besides."""
    rows = []
    for one in entries:
        for row in rate(one, books, terms.get(one.tenant, LIST)):
            rows.append(posting(row, booked_at_ms=one.booked_at, tz=tz))
    return [*rows, *map(dict, posted)]


def posting(row: Any, *, booked_at_ms: int, tz: str = "UTC", rating: int = 0, posted_at_ms: int | None = None,
            corrects: str = "") -> dict[str, Any]:  # fmt: skip
    """A rated row as it stands in an archive."""
    moment = booked_at_ms if posted_at_ms is None or not corrects else posted_at_ms
    return {
        **{name: getattr(row, name) for name in COLUMNS},
        "booked_at_ms": booked_at_ms,
        "rating": rating,
        "posted_at_ms": booked_at_ms if posted_at_ms is None else posted_at_ms,
        "period": period_at("month", tz, moment).label,
        "corrects": corrects,
    }


class Filed:
    """Entries and rated rows in Parquet files of a folder."""

    _numbers = count()

    def __init__(self, folder: Path, entries: Iterable[LedgerEntry], rows: Iterable[Mapping[str, Any]]) -> None:
        number = next(self._numbers)
        self._entries, self._rows = folder / f"entries-{number}.parquet", folder / f"rows-{number}.parquet"
        lines = [{"shard": one.shard, **stored(one)} for one in entries]
        _fill("line", {"shard": "INTEGER", **VERBATIM}, lines)
        _database.execute(f"COPY ({made_from('line', ', '.join(('shard', *VERBATIM)))}) TO '{self._entries}'")
        _fill("rated", ROW_COLUMNS, rows)
        _database.execute(f"COPY rated TO '{self._rows}'")

    def entries_sql(self) -> str:
        return f"SELECT * FROM read_parquet('{self._entries}')"

    def rows_sql(self) -> str:
        return f"SELECT * FROM read_parquet('{self._rows}')"


_database = duckdb.connect(config={"threads": 1})


def _fill(table: str, columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> None:
    _database.execute(
        f"CREATE OR REPLACE TABLE {table} ({', '.join(f'{name} {kind}' for name, kind in columns.items())})"
    )
    values = [f"({', '.join(_literal(row[name]) for name in columns)})" for row in rows]
    if values:
        _database.execute(f"INSERT INTO {table} VALUES {', '.join(values)}")


def _literal(value: object) -> str:
    return "NULL" if value is None else quoted(str(value))
