"""What was used, by groups, from an archive: the same sums as a fold over the entries makes, in SQL.

What columns tell is added up by DuckDB. The few entries that columns do not tell in full (passes that a call's own
numbers leave out, names that this version does not know) are left to the very function that the fold is made of.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from meterlib.billing.archive.rows import LINE, entry_from
from meterlib.billing.duck import quoted
from meterlib.billing.rating.measures import passes_of
from meterlib.billing.reports.answers import Answer, Column, Reader, keys_of_entries
from meterlib.billing.reports.query import WORDS, Query, name_of
from meterlib.billing.reports.report import COLUMNS, contributions
from meterlib.core.ledger import LedgerEntry

UNSPLIT = "unsplit_cache_creation_input_tokens"
"""Cache writes of which nobody told for how long they are kept."""

USAGE_COLUMNS = tuple(
    name for column in COLUMNS for name in ((column, UNSPLIT) if column == "ephemeral_1h_input_tokens" else (column,))
)
TOKEN_TYPES = {
    "input": "input_tokens",
    "output": "output_tokens",
    "cache_write_5m": "ephemeral_5m_input_tokens",
    "cache_write_1h": "ephemeral_1h_input_tokens",
    "cache_write_unsplit": UNSPLIT,
    "cache_read": "cache_read_input_tokens",
    "web_search": "web_search_requests",
    "web_fetch": "web_fetch_requests",
    "code_execution": "code_execution_requests",
}
"""Which column tells how much there is of a type; thinking is part of the output."""

_CALLS = "kind IN ('settled', 'late', 'recorded')"
CALLS = f"""CASE WHEN NOT ({_CALLS}) THEN 0
    WHEN contains(outcome, '"requests":') THEN coalesce((outcome::JSON ->> '$.usage.requests')::BIGINT, 1) ELSE 1 END"""
"""How many calls an entry stands for; one that stands for many, or for none, says so itself."""
_UNSPLIT_REST = (
    "cache_creation_input_tokens - coalesce(ephemeral_5m_input_tokens, 0) - coalesce(ephemeral_1h_input_tokens, 0)"
)
_MEASURES = {
    "calls": f"({_CALLS})::BIGINT",
    UNSPLIT: f"if(kind = 'adjusted', {_UNSPLIT_REST}, greatest({_UNSPLIT_REST}, 0))",
    "late": "(kind = 'late')::BIGINT",
    "expired": "(kind = 'expired')::BIGINT",
    "cancelled": "(kind = 'cancelled')::BIGINT",
    "partial": f"(quality = 'partial' AND {_CALLS})::BIGINT",
    "adjusted": "(kind = 'adjusted')::BIGINT",
}
_OWN_PASSES = "iterations IS NOT NULL AND regexp_matches(iterations::VARCHAR, 'compaction|advisor_message|fallback')"
REQUESTS = "outcome.usage.requests"
"""An entry may stand for many calls, or for none, and says so itself."""
_REQUESTS_TOLD = (
    """if(contains(outcome, '"requests"') AND json_type(outcome, '/usage/requests') IN ('BIGINT', 'UBIGINT'),"""
    f" (outcome ->> '/usage/requests')::BIGINT, {_MEASURES['calls']})"
)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]+")
_UNITS_MAX = 1000
_AT_ONCE = 1000


def usage_report(reader: Reader, query: Query, unknown: Iterable[str] = (REQUESTS,)) -> Answer:
    """What the entries that are asked for used.

    Args:
        reader: of the archive.
        query: what is asked.
        unknown: names in the archive's entries that no column is made of, as its segments tell them. All of them: the
            verbatim columns, which are half of the archive, are not looked into for names that no segment tells of.
    """
    if "token_type" in query.by:
        return _by_token_type(reader, query, unknown)
    keys = keys_of_entries(query)
    told = _Told(reader, query, unknown)
    columns = (*USAGE_COLUMNS, *told.extra)
    sums = [f"coalesce(sum(m{at}), 0)" for at in range(len(columns))]
    reader.grouped(query.by, query.tz, told.relation(keys, columns), [f"k{at}" for at in range(len(keys))], sums)
    named = [Column(name_of(word), "key") for word in query.by] + [Column(name, "count") for name in columns]
    totals = _totals(reader, named)
    return Answer(reader.connection, query, named, [totals])


def _totals(reader: Reader, columns: list[Column]) -> Mapping[str, Any]:
    counted = [(at, column.name) for at, column in enumerate(columns) if column.kind == "count"]
    sums = ", ".join(f"coalesce(sum(c{at}), 0)::HUGEINT" for at, _ in counted)
    found: Any = reader.connection.execute(f"SELECT {sums} FROM answer").fetchone()
    return dict(zip((name for _, name in counted), map(int, found), strict=True))


def _by_token_type(reader: Reader, query: Query, unknown: Iterable[str]) -> Answer:
    """One row for each type: how much of it. Types are not added up, since some are tokens and some are requests."""
    place = query.by.index("token_type")
    keys = ["NULL" if word == "token_type" else key for word, key in zip(query.by, _keys_but_type(query), strict=True)]
    told = _Told(reader, query, unknown)
    relation = told.relation(keys, tuple(TOKEN_TYPES.values()))
    types = ", ".join(f"{{token_type: {quoted(kind)}, quantity: m{at}}}" for at, kind in enumerate(TOKEN_TYPES))
    names = ", ".join(f"k{at}" for at in range(len(keys)) if at != place)
    unpivoted = (
        f"SELECT {names}{', ' if names else ''}moment, one.token_type AS k{place}, one.quantity AS quantity"
        f" FROM (SELECT *, unnest([{types}]) AS one FROM ({relation})) WHERE one.quantity <> 0"
    )
    reader.grouped(query.by, query.tz, unpivoted, [f"k{at}" for at in range(len(keys))], ["sum(quantity)"])
    named = [*(Column(name_of(word), "key") for word in query.by), Column("quantity", "count")]
    return Answer(reader.connection, query, named, [{"quantity": None}])


def _keys_but_type(query: Query) -> list[str]:
    rest = Query(by=tuple(word for word in query.by if word != "token_type"))
    keys = iter(keys_of_entries(rest))
    return ["" if word == "token_type" else next(keys) for word in query.by]


class _Told:
    """The entries asked for, as a relation of what each adds to which column.

    Attributes:
        extra: columns that only some entries have: units of one's own, and names that nobody knows.
    """

    def __init__(self, reader: Reader, query: Query, unknown: Iterable[str]) -> None:
        self._reader = reader
        self._query = query
        unknown = set(unknown)
        self._hard = _hard(unknown)
        self._measures = _MEASURES | ({"calls": _REQUESTS_TOLD} if REQUESTS in unknown else {})
        self._units = self._units_used()
        self._any_hard, names = self._tell_hard()
        self.extra = sorted({*self._units, *names}.difference(USAGE_COLUMNS))

    def relation(self, keys: list[str], columns: tuple[str, ...]) -> str:
        """SQL of it: `k0`, `k1`, … are the keys, `m0`, `m1`, … the columns, besides `moment`."""
        measures = [
            self._units.get(name) or self._measures.get(name, name if name in COLUMNS else "0") for name in columns
        ]
        told = (
            *(f"{key} AS k{at}" for at, key in enumerate(keys)),
            *(f"{m} AS m{at}" for at, m in enumerate(measures)),
        )
        rest = f"NOT coalesce({self._hard}, false)" if self._any_hard else ""
        easy = self._reader.entries_of(self._query, ", ".join(told), rest)
        if not self._any_hard:
            return easy
        own = ["h_model" if key == WORDS["model"].entry else key for key in keys]
        amounts = (f"if(h_name = {quoted(name)}, h_amount, 0) AS m{at}" for at, name in enumerate(columns))
        selected = ", ".join((*(f"{key} AS k{at}" for at, key in enumerate(own)), *amounts))
        entries = self._reader.entries_of(self._query, "*", f"({self._hard})")
        hard = f"SELECT {selected}, moment FROM ({entries}) JOIN hard ON (epoch, shard, n) = (h_epoch, h_shard, h_n)"
        return f"{easy} UNION ALL {hard}"

    def _units_used(self) -> dict[str, str]:
        """How to tell the amounts of units of one's own, by column."""
        entries = self._reader.entries_of(self._query, "amounts", "amounts IS NOT NULL")
        found = self._reader.connection.execute(
            f"SELECT DISTINCT unnest(json_keys(amounts)) AS name FROM ({entries}) ORDER BY name LIMIT {_UNITS_MAX}"
        ).fetchall()
        return {f"amounts.{name}": _amount(name) for (name,) in found}

    def _tell_hard(self) -> tuple[bool, set[str]]:
        """Fill the table `hard`; whether anything is in it, and the columns that occur there."""
        run = self._reader.connection
        run.execute(
            "CREATE OR REPLACE TABLE hard"
            " (h_epoch VARCHAR, h_shard INTEGER, h_n BIGINT, h_model VARCHAR, h_name VARCHAR, h_amount HUGEINT)"
        )
        lines = self._reader.entries_of(self._query, f"shard, {LINE} AS line", f"({self._hard})")
        cursor = run.cursor().execute(f"SELECT shard, line FROM ({lines})")
        values = (value for shard, line in _fetched(cursor) for value in _contributed(entry_from(shard, line.encode())))
        while part := list(islice(values, _AT_ONCE)):
            run.execute(f"INSERT INTO hard VALUES {', '.join(part)}")
        names = {name for (name,) in run.execute("SELECT DISTINCT h_name FROM hard").fetchall()}
        return bool(names), names - {""}


def _fetched(cursor: Any) -> Iterator[tuple[Any, ...]]:
    while page := cursor.fetchmany(_AT_ONCE):
        yield from page


def _hard(unknown: Iterable[str]) -> str:
    """SQL of which entries are left to Python; some that need not be do no harm."""
    told = (name for name in unknown if name.startswith("outcome.usage.") and name != REQUESTS)
    names = sorted({name.rpartition(".")[2] for name in told})
    if not all(map(_PLAIN_NAME.fullmatch, names)):
        return "true"
    # A name may itself have a point in it, of which only the end is looked for.
    found = (f"contains(outcome, {quoted(before + name + chr(34))})" for name in names for before in ('"', "."))
    return " OR ".join((f"({_OWN_PASSES})", *found))


def _amount(unit: str) -> str:
    place = quoted("/" + unit.replace("~", "~0").replace("/", "~1"))
    return f"if(json_type(amounts, {place}) IN ('BIGINT', 'UBIGINT'), (amounts ->> {place})::HUGEINT, 0)"


def _contributed(entry: LedgerEntry) -> Iterator[str]:
    """What an entry adds to which column, as SQL writes rows of the table `hard`."""
    billed = passes_of(entry)[:1]
    model = billed[0].model if billed else entry.facts.get("model") or entry.attributes.get("model", "")
    for own, sums in contributions(entry):
        unsplit = _unsplit(entry, sums)
        by = quoted(str(own or model))
        for name, amount in {**sums, **unsplit, "": 0}.items():  # the last one for those that add nothing
            yield f"({quoted(entry.epoch)}, {entry.shard}, {entry.n}, nullif({by}, ''), {quoted(name)}, {amount})"


def _unsplit(entry: LedgerEntry, sums: Mapping[str, int]) -> dict[str, int]:
    total = sums.get("cache_creation_input_tokens")
    if total is None:
        return {}
    rest = total - sum(sums.get(f"ephemeral_{ttl}_input_tokens", 0) for ttl in ("5m", "1h"))
    return {UNSPLIT: rest if entry.kind == "adjusted" else max(rest, 0)}
