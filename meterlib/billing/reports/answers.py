"""Reports from an archive, worked out by DuckDB: usage, cost, and how good estimates were, grouped by anything.

Sums are of whole numbers and exact decimals, so they do not depend on the order in which they are added up: the same
files give the same answer, however many threads read them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol, Self, TypeAlias

from meterlib.billing import duck
from meterlib.billing.duck import quoted
from meterlib.billing.reports.query import TIMES, WORDS, Calendar, Query, name_of, of_entry
from meterlib.errors import InvalidInput

MEMORY_MAX = "800MB"
_PAGE = 2000
_PERIODS_MAX = 10_000

Value: TypeAlias = str | int | Decimal | None
Row: TypeAlias = tuple[Value, ...]
Totals: TypeAlias = Mapping[str, Value]
Kind: TypeAlias = Literal["key", "text", "count", "cost", "ratio"]


class Postings(Protocol):
    """Where entries and rated rows come from."""

    def rows_sql(self) -> str:
        """A SELECT of all rated rows."""

    def entries_sql(self) -> str:
        """A SELECT of all entries."""


class Column(NamedTuple):
    """A column of an answer: what is grouped by, a text besides, a whole number, an amount of money, or a ratio."""

    name: str
    kind: Kind


class Answer:
    """The rows of a report, which stay in the database until they are read.

    Attributes:
        query: what was asked.
        columns: all columns, in order; those that are grouped by first.
        totals: what all rows add up to: one for each currency, or just one.
    """

    def __init__(self, connection: Any, query: Query, columns: Sequence[Column], totals: Sequence[Totals]) -> None:
        self.query = query
        self.columns = tuple(columns)
        self.totals = tuple(totals)
        self._connection = connection

    @property
    def by(self) -> tuple[str, ...]:
        """The columns that are grouped by."""
        return tuple(column.name for column in self.columns if column.kind == "key")

    def rows(self) -> Iterator[Row]:
        """Each row once, in order of what is grouped by."""
        cursor = self._connection.cursor()
        columns = ", ".join(f"c{at}" for at in range(len(self.columns)))
        cursor.execute(f"SELECT {columns} FROM answer ORDER BY place")
        while page := cursor.fetchmany(_PAGE):
            yield from page

    def count(self) -> int:
        """How many rows there are."""
        found: Any = self._connection.execute("SELECT count(*) FROM answer").fetchone()
        return int(found[0])

    def never_told(self) -> list[str]:
        """Attributes that are grouped by and that nothing has."""
        places = [(at, name_of(word)) for at, word in enumerate(self.query.by) if word not in (*WORDS, *TIMES)]
        if not places or not self.count():
            return []
        found: Any = self._connection.execute(
            f"SELECT {', '.join(f'count(c{at})' for at, _ in places)} FROM answer"
        ).fetchone()
        return [name for (_, name), told in zip(places, found, strict=True) if not told]

    def write_parquet(self, file: Path, metadata: str) -> None:
        """Write the rows to a file, and a text into its metadata, under the key `meterlib`."""
        kinds = {"key": "VARCHAR", "text": "VARCHAR", "count": "DECIMAL(38,0)"}
        kinds |= {"cost": "DECIMAL(38,12)", "ratio": "DECIMAL(38,3)"}
        columns = ", ".join(
            f"CAST(c{at} AS {kinds[column.kind]}) AS {identifier(column.name)}"
            for at, column in enumerate(self.columns)
        )
        duck.write_parquet(self._connection, f"SELECT {columns} FROM answer ORDER BY place", file, metadata)


def identifier(name: str) -> str:
    """A name as SQL writes it."""
    return '"' + name.replace('"', '""') + '"'


class Reader:
    """A database in memory that reads an archive's entries and rated rows; a context manager.

    Args:
        postings: of the archive.
        billing_tz: the zone of billing periods.
    """

    def __init__(self, postings: Postings, billing_tz: str = "UTC") -> None:
        self._scratch = TemporaryDirectory(prefix="meterlib-report-")
        self.connection = duck.connect(Path(self._scratch.name))
        self.connection.execute(f"SET threads = {os.cpu_count() or 1}; SET memory_limit = '{MEMORY_MAX}'")
        self.entries = postings.entries_sql()
        self.rows = postings.rows_sql()
        self.billing_tz = billing_tz

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forget everything, and remove what was temporary."""
        self.connection.close()
        self._scratch.cleanup()

    # ── Selections ────────────────────────────────────────────────────────────────────────────────────────────────────

    def entries_of(self, query: Query, columns: str, condition: str = "") -> str:
        """SQL of these columns of the entries that are asked for, with their `moment`."""
        also = f" AND {condition}" if condition else ""
        told = "*" if columns == "*" else f"{columns}, moment"
        return f"SELECT {told} FROM ({self._entries_with_moment(query)}) {self._where(query)}{also}"

    def _entries_with_moment(self, query: Query) -> str:
        if query.time_basis == "booked":
            return f"SELECT *, booked_at AS moment FROM ({self.entries})"
        # A correction belongs to the call that it corrects; what that was, rated rows say.
        moments = f"SELECT epoch, shard, n, min(at_ms) AS at_ms FROM ({self.rows}) WHERE kind = 'adjusted' GROUP BY ALL"
        own = "if(reserved_at = 0, booked_at, reserved_at)"
        return (
            f"SELECT e.*, coalesce(a.at_ms, {own}) AS moment FROM ({self.entries}) e"
            f" LEFT JOIN ({moments}) a ON e.kind = 'adjusted' AND e.epoch = a.epoch AND e.shard = a.shard AND e.n = a.n"
        )

    def rows_of(self, query: Query, columns: str) -> str:
        """SQL of these columns of the rated rows that are asked for, with their `moment`."""
        source = f"SELECT *, {self._moment_of_row(query)} AS moment FROM ({self.rows})"
        period = "" if query.period is None else f" AND period = {quoted(query.period)}"
        bounds = query if query.period is None else Query(tenant=query.tenant)
        return f"SELECT {columns}, moment FROM ({source}) {self._where(bounds)}{period}"

    def _moment_of_row(self, query: Query) -> str:
        """When a row counts: when its entry was booked, or when it was posted, if that period was closed by then."""
        if query.time_basis == "event":
            return "at_ms"
        periods = self.connection.execute(
            f"SELECT DISTINCT period FROM ({self.rows}) WHERE rating > 0 ORDER BY period LIMIT {_PERIODS_MAX}"
        ).fetchall()
        cases = ""
        for (name,) in periods:
            since_ms, until_ms = Query(period=name).bounds(self.billing_tz)
            inside = f"booked_at_ms >= {since_ms} AND booked_at_ms < {until_ms}"
            moment = f"if({inside}, booked_at_ms, greatest(posted_at_ms, {since_ms}))"
            cases += f" WHEN period = {quoted(name)} THEN {moment}"
        return f"CASE WHEN rating = 0 THEN booked_at_ms{cases} ELSE posted_at_ms END" if cases else "booked_at_ms"

    def _where(self, query: Query) -> str:
        since_ms, until_ms = query.bounds(self.billing_tz)
        conditions = ["true"]
        if query.tenant is not None:
            conditions.append(f"tenant = {quoted(query.tenant)}")
        if since_ms is not None:
            conditions.append(f"moment >= {since_ms}")
        if until_ms is not None:
            conditions.append(f"moment < {until_ms}")
        return f"WHERE {' AND '.join(conditions)}"

    # ── Groups ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def grouped(self, words: Sequence[str], tz: str, relation: str, keys: Sequence[str], sums: Sequence[str]) -> None:
        """Make the table `answer` of a relation with a column `moment`.

        It has the columns `c0`, `c1`, …: one for each word, then the sums; and `place`, the place of each row in order
        of the words.

        Args:
            words: what to group by.
            tz: the zone that words of time are worked out in.
            relation: SQL of what is to be grouped.
            keys: SQL of each word's value, in order; of words of time it is not looked at.
            sums: SQL of each sum.
        """
        named = [f"{one} AS s{at}" for at, one in enumerate(sums)]
        self.ranked(len(words), len(sums), self.by_words(words, tz, relation, keys, named))

    def by_words(self, words: Sequence[str], tz: str, relation: str, keys: Sequence[str], rest: Sequence[str]) -> str:
        """SQL of a relation grouped by words, and by whatever of `rest` is no sum.

        Its columns are `k0`, `k1`, …, one for each word; `o0`, `o1`, …, which go before them in their order; and those
        of `rest`.
        """
        selected, joins = [], ""
        for at, (word, key) in enumerate(zip(words, keys, strict=True)):
            if word in TIMES:
                calendar = Calendar(self.connection, word, tz, relation)
                joins += f" JOIN {calendar.table} ON {calendar.table}.key = relation.moment // {calendar.step_ms}"
                selected.append(f"any_value({calendar.table}.label) AS k{at}, {calendar.table}.start_ms AS o{at}")
            else:
                selected.append(f"{key} AS k{at}, NULL AS o{at}")
        return f"SELECT {', '.join((*selected, *rest))} FROM ({relation}) relation{joins} GROUP BY ALL"

    def ranked(self, words: int, sums: int, groups: str, last: Sequence[str] = ()) -> None:
        """Make the table `answer` of groups with so many columns `k0`, …, `o0`, …, and `s0`, …, in their order."""
        order = ", ".join((*(f"o{at}, k{at} NULLS LAST" for at in range(words)), *last)) or "1"
        columns = [f"k{at} AS c{at}" for at in range(words)] + [f"s{at} AS c{words + at}" for at in range(sums)]
        self.connection.execute(
            f"CREATE OR REPLACE TABLE answer AS SELECT {', '.join(columns)},"
            f" row_number() OVER (ORDER BY {order}) AS place FROM ({groups})"
        )


def keys_of_entries(query: Query) -> list[str]:
    """SQL of each word of a query, in an entry; of words of time, nothing.

    Raises:
        InvalidInput: an entry has no such thing.
    """
    return ["NULL" if word in TIMES else _told(word, of_entry(word)) for word in query.by]


def _told(word: str, sql: str | None) -> str:
    if sql is None:
        raise InvalidInput("by", f"{word!r} is told by rated rows only: ask for `report cost`")
    return sql
