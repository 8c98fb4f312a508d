"""The same as `rerating.compare`, for a block of entries at once in DuckDB: rows that take back and post anew."""

from __future__ import annotations

from typing import Any

from meterlib.billing.postings.pieces import STORED
from meterlib.billing.rating.rated import COSTS
from meterlib.billing.rating.rerating import MONEY, RERATED_LINES, TAKEN_BACK, WHAT

_TAKEN = ("quantity", *COSTS)


def stage_deltas(database: Any, old: str, number: int, where: str) -> None:
    """Have the rows to post in a table `deltas`, with columns `delta_old` that says whether it is one taken back.

    Args:
        database: its table `rated` has what the entries cost by other prices.
        old: SQL of all rows that were posted of the same entries, re-ratings included.
        number: which re-rating it is.
        where: SQL of which rows are looked at, by their columns.
    """
    base = f"line & {TAKEN_BACK - 1}"
    database.execute(
        "CREATE OR REPLACE TEMP TABLE standing AS"
        f" WITH posted AS (SELECT * FROM ({old}) WHERE {where}),"
        f" gone AS (SELECT n, reverses AS line FROM posted WHERE line & {TAKEN_BACK} <> 0)"
        f" SELECT *, {base} AS base FROM posted p"
        f" WHERE line & {TAKEN_BACK} = 0 AND NOT EXISTS (SELECT 1 FROM gone g WHERE g.n = p.n AND g.line = p.line)"
    )
    differs = " OR ".join(
        ["(o.unpriced = '') <> (r.unpriced = '')"] + [f"o.{name} IS DISTINCT FROM r.{name}" for name in (*MONEY, *WHAT)]
    )
    database.execute(
        "CREATE OR REPLACE TEMP TABLE changed AS"
        " SELECT coalesce(o.n, r.n) AS n, coalesce(o.base, r.line) AS base"
        f" FROM standing o FULL JOIN (SELECT * FROM rated WHERE {where}) r ON o.n = r.n AND o.base = r.line"
        f" WHERE o.n IS NULL OR r.n IS NULL OR {differs}"
    )
    start = RERATED_LINES * number
    taken = _replaced(
        {
            "line": f"{start + TAKEN_BACK} + o.base",
            "reverses": "o.line",
            "posting": "-o.posting",
            **{name: f"-o.{name}" for name in _TAKEN},
        },
        "o",
    )
    posted = _replaced(
        {
            "line": f"{start} + r.line",
            "booked_at_ms": "coalesce(e.booked_at_ms, r.booked_at_ms)",
            "touches_ms": "coalesce(e.touches_ms, r.touches_ms)",
        },
        "r",
    )
    database.execute(
        "CREATE OR REPLACE TEMP TABLE deltas AS"
        f" SELECT {taken}, true AS delta_old FROM standing o JOIN changed c ON o.n = c.n AND o.base = c.base"
        f" UNION ALL BY NAME SELECT {posted}, false AS delta_old FROM rated r JOIN changed c ON r.n = c.n"
        " AND r.line = c.base LEFT JOIN (SELECT n, min(booked_at_ms) AS booked_at_ms, min(touches_ms) AS touches_ms"
        " FROM standing GROUP BY n) e ON r.n = e.n"
    )


def _replaced(changes: dict[str, str], table: str) -> str:
    return ", ".join(f"({changes.get(name, f'{table}.{name}')})::{kind} AS {name}" for name, kind in STORED.items())


LINES = (
    f"SELECT model, count(DISTINCT (n, line & {TAKEN_BACK - 1})), count(*) FILTER (delta_old AND unpriced <> ''),"
    " count(*) FILTER (NOT delta_old AND unpriced <> '') FROM deltas GROUP BY model ORDER BY model"
)
"""How many lines change of each model, and how many of them had and have no price."""

COSTS_CHANGED = (
    f"SELECT model, currency, {', '.join(f'CAST(sum({cost}) AS VARCHAR)' for cost in COSTS)} FROM deltas"
    " WHERE currency <> '' GROUP BY model, currency ORDER BY model, currency"
)
"""By how much the costs of each model grow, in each currency."""
