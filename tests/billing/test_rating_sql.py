"""Rating in DuckDB: the same rows as rating in Python, to the last digit and word."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from meterlib import LedgerEntry
from meterlib.billing.prices.terms import Terms
from meterlib.billing.rating.rated import RatedRow
from meterlib.billing.rating.rating import rate
from meterlib.billing.rating.rating_sql import COLUMNS, SqlRating
from tests.billing.money import books, entries, entry, tokens

duckdb = pytest.importorskip("duckdb")

TEXTS = ("epoch", "kind", "tenant", "funding", "provider", "model", "quality", "service_tier", "speed", "inference_geo")
JSONS = ("facts", "outcome", "iterations")
SPLIT = ("ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens")
TOOLS = ("web_search_requests", "web_fetch_requests", "code_execution_requests")
PLAIN = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
NUMBERS = ("shard", "n", "reserved_at", "booked_at", *PLAIN, *SPLIT, *TOOLS)
NAMES = (*TEXTS, *JSONS, *NUMBERS)
TERMS = {"acme": Terms.of("12.5%", "3%", "5%", "7%"), "globex": Terms.of(upstream_discount="1%")}


def as_archived(one: LedgerEntry) -> dict[str, Any]:
    """The columns that an archive has of an entry."""
    usage: dict[str, Any] = dict(one.usage)
    return {
        **{name: getattr(one, name) for name in ("epoch", "kind", "tenant", "funding", "quality", "shard", "n")},
        **{name: getattr(one, name) for name in ("reserved_at", "booked_at")},
        **{name: one.attributes.get(name) for name in ("provider", "model")},
        **{name: usage.get(name) for name in (*PLAIN, "service_tier", "speed", "inference_geo")},
        **{name: (usage.get("cache_creation") or {}).get(name) for name in SPLIT},
        **{name: (usage.get("server_tool_use") or {}).get(name) for name in TOOLS},
        "facts": json.dumps(dict(one.facts)) if one.facts else None,
        "outcome": json.dumps({"usage": usage} if usage else {}),
        "iterations": json.dumps(usage["iterations"]) if "iterations" in usage else None,
    }


def _columns() -> list[str]:
    kinds = {"VARCHAR": TEXTS, "JSON": JSONS, "BIGINT": NUMBERS}
    return [f"{name} {kind}" for kind, names in kinds.items() for name in names]


def _insert() -> str:
    return f"INSERT INTO archived VALUES ({', '.join('?' * len(NAMES))})"


def in_sql(several: Iterable[LedgerEntry]) -> tuple[list[tuple[Any, ...]], set[int]]:
    """The rows that DuckDB makes, and the numbers of the entries that it leaves to Python."""
    connection = duckdb.connect(config={"threads": 1})
    connection.execute(f"CREATE TABLE archived ({', '.join(_columns())})")
    for one in several:
        row = as_archived(one)
        connection.execute(_insert(), [row[name] for name in NAMES])
    made = SqlRating(connection, "SELECT * FROM archived", books(), TERMS.__getitem__)
    rows = connection.execute(f"SELECT * FROM ({made.rows_sql}) ORDER BY epoch, shard, n, line").fetchall()
    hard = connection.execute(f"SELECT n FROM ({made.hard_sql})").fetchall()
    return rows, {n for (n,) in hard}


def in_python(several: Iterable[LedgerEntry]) -> list[tuple[Any, ...]]:
    rated = [row for one in several for row in rate(one, books(), TERMS[one.tenant])]
    return sorted((tuple(getattr(row, name) for name in COLUMNS) for row in rated), key=lambda row: row[:4])


def test_the_columns_are_the_fields_of_a_row() -> None:
    """Whatever is added to a row has to be made in SQL too."""
    assert tuple(COLUMNS) == RatedRow.__struct_fields__


@settings(max_examples=40, deadline=None)
@given(st.lists(entries(), min_size=1, max_size=12))
def test_both_ratings_make_the_same_rows(several: list[LedgerEntry]) -> None:
    """Prices, costs, digests, flags and reasons, of any calls at any time; what is left to Python is said."""
    calls = [replace(one, n=n) for n, one in enumerate(several)]
    rows, hard = in_sql(calls)

    assert rows == in_python(one for one in calls if one.n not in hard)
    assert hard == {one.n for one in calls if is_hard(one)}


def is_hard(one: LedgerEntry) -> bool:
    """What no column has: passes, and how many calls there were; of a call that was not made it does not matter."""
    return bool(one.usage.get("iterations") or "requests" in one.usage) and one.kind not in ("cancelled", "expired")


@pytest.mark.parametrize(
    "usage",
    [
        tokens(new_tokens=5),
        tokens(server_tool_use={"moon_flights": 1}),
        tokens(iterations=[{"type": "compaction", "input_tokens": 5}]),
    ],
)
def test_what_columns_cannot_tell_is_left_to_python(usage: dict[str, Any]) -> None:
    """Usage under new names, and passes of a call."""
    assert in_sql([entry("plain", usage)]) == ([], {1})


def test_corrections_are_left_to_python() -> None:
    """They need the entry that they correct."""
    assert in_sql([entry("plain", {"input_tokens": -5}, kind="adjusted")]) == ([], {1})


def test_quotes_and_odd_names_do_no_harm() -> None:
    """Names come from callers."""
    odd = [
        entry('it\'s "x"; --', tokens(input_tokens=1), n=1),
        entry("plain", tokens(input_tokens=1), n=2, attributes={"model": "plain"}),
        entry("plain", tokens(input_tokens=1), n=3, attributes={"provider": "'"}),
        entry("plain", tokens(input_tokens=1), n=4, facts={"model": "steep"}),
        entry("plain", tokens(input_tokens=2**53 - 1, output_tokens=2**53 - 1, inference_geo="us"), n=5),
        entry("plain", {}, n=6),
        entry("plain", {"amounts": {"pages": 3}}, n=7),
        entry("plain", tokens(input_tokens=1, amounts={"cost_nanousd": 3000}), n=8),
    ]
    assert in_sql(odd) == (in_python(odd), set())


def test_nothing_to_rate_is_no_error() -> None:
    """A day without calls."""
    assert in_sql([]) == ([], set())


def test_many_terms_are_no_trouble() -> None:
    """Each tenant may have its own; the table of prices has a row for each of them."""
    connection = duckdb.connect(config={"threads": 1})
    several = [entry("plain", tokens(input_tokens=n), n=n, tenant=f"t{n}") for n in range(1, 120)]
    terms = {one.tenant: Terms.of(discount=f"{one.n % 100}%") for one in several}
    connection.execute(f"CREATE TABLE archived ({', '.join(_columns())})")
    connection.executemany(_insert(), [[as_archived(one)[name] for name in NAMES] for one in several])
    made = SqlRating(connection, "SELECT * FROM archived", books(), terms.__getitem__)
    found = dict(connection.execute(f"SELECT n, billed_cost FROM ({made.rows_sql})").fetchall())

    assert found == {one.n: rate(one, books(), terms[one.tenant]).rows[0].billed_cost for one in several}
