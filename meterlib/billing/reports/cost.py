"""What usage cost, by groups, from rated rows: list, contracted, billed and upstream cost, and the margin. Exact.

Rows are added up, never rated: a row has its price. Where a row has none, the sum is a floor, and says so; a group
without any price has no cost, which is not a cost of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from meterlib.billing.duck import quoted
from meterlib.billing.reports.answers import Answer, Column, Reader, Totals, Value
from meterlib.billing.reports.query import COSTS, TIMES, Query, name_of, of_entry, of_row

_PRICED = "coalesce(sum(lines) FILTER (NOT lacks), 0)"
_UNPRICED = (
    "greatest(coalesce(sum(lines) FILTER (lacks AND NOT corrected), 0), 0)"
    " + greatest(coalesce(sum(lines) FILTER (lacks AND corrected), 0), 0)"
)
"""How many rows have no price. Those that a correction took back are not set off against those of this period."""
_PRICES = tuple(cost.replace("cost", "price") for cost in COSTS)
_ALIKE = ("currency", "unpriced <> '' AS lacks", "corrects <> '' AS corrected", "per", *_PRICES)
_ROW_COLUMNS = ("epoch", "shard", "n", "posting", "quantity", "currency", "unpriced", "corrects", "per", *_PRICES)


def cost_report(reader: Reader, query: Query) -> Answer:
    """What the rows that are asked for cost.

    The cost of a row is its quantity times its price, exactly; so is that of all rows of one price. Prices are few and
    quantities are short, so it takes half the time of adding up the rows' own costs.

    Amounts of different currencies are never added up: where there are several, each has rows and a total of its own,
    and so have the rows without a price, which are in none.
    """
    words, run = len(query.by), reader.connection.execute
    keys, relation = _relation(reader, query)
    parts = [*_ALIKE, "sum(quantity) AS amount", "sum(posting) AS lines"]
    run(f"CREATE OR REPLACE TABLE parts AS {reader.by_words(query.by, query.tz, relation, keys, parts)}")
    currencies = run("SELECT DISTINCT currency FROM parts WHERE currency <> '' ORDER BY currency").fetchall()
    currency = "nullif(currency, '')" if len(currencies) > 1 else quoted(currencies[0][0]) if currencies else "NULL"
    costs = [f"if({_PRICED} = 0 AND {_UNPRICED} > 0, NULL, coalesce(sum({_cost(price)}), 0))" for price in _PRICES]
    counted = ["coalesce(sum(amount), 0)"] if "token_type" in query.by else []
    sums = [currency, *counted, *costs, f"{costs[2]} - {costs[3]}", _UNPRICED]
    told = [f"k{at}, o{at}" for at in range(words)]
    groups = f"SELECT {', '.join((*told, *(f'{one} AS s{at}' for at, one in enumerate(sums))))} FROM parts GROUP BY ALL"
    reader.ranked(words, len(sums), groups, last=["s0 NULLS LAST"])
    columns = [
        *(Column(name_of(word), "key") for word in query.by),
        Column("currency", "text"),
        *(Column("quantity", "count") for _ in counted),
        *(Column(cost, "cost") for cost in (*COSTS, "margin")),
        Column("unpriced", "count"),
    ]
    return Answer(reader.connection, query, columns, _totals(reader, columns))


def _cost(price: str) -> str:
    """SQL of what an amount costs, with twelve decimals; an error where it would lose one."""
    each = f"({price} * if(per = 1000000, 0.000001, 0.001000))::DECIMAL(18,12)"
    return f"(amount::DECIMAL(20,0) * {each})"


def _relation(reader: Reader, query: Query) -> tuple[list[str], str]:
    """SQL of each word, and of the rows; entries are looked at only for what rows do not tell."""
    missing = [word for word in query.by if word not in TIMES and of_row(word) is None]
    keys = [f"w{at}" for at in range(len(query.by))]
    told = (
        f"{'NULL' if word in TIMES else of_row(word)} AS w{at}"
        for at, word in enumerate(query.by)
        if word not in missing
    )
    rows = reader.rows_of(query, ", ".join((*_ROW_COLUMNS, *told)))
    if not missing:
        return keys, rows
    asked = ", ".join(f"{of_entry(word)} AS w{query.by.index(word)}" for word in missing)
    tenant = "" if query.tenant is None else f" WHERE tenant = {quoted(query.tenant)}"
    entries = f"SELECT epoch AS e_epoch, shard AS e_shard, n AS e_n, {asked} FROM ({reader.entries}){tenant}"
    joined = f"SELECT * FROM ({rows}) LEFT JOIN ({entries}) ON (epoch, shard, n) = (e_epoch, e_shard, e_n)"
    return keys, joined


def _totals(reader: Reader, columns: list[Column]) -> Sequence[Totals]:
    """What all rows add up to, in each currency; rows without a price are in none, and their costs are not known."""
    place = {column.name: f"c{at}" for at, column in enumerate(columns)}
    currency, unpriced = place["currency"], place["unpriced"]
    costs = ", ".join(f"sum({place[cost]})" for cost in (*COSTS, "margin"))
    found: Any = reader.connection.execute(
        f"SELECT {currency}, {costs}, coalesce(sum({unpriced}), 0)::BIGINT FROM answer"
        f" GROUP BY {currency} ORDER BY {currency} NULLS LAST"
    ).fetchall()
    names = ("currency", *COSTS, "margin", "unpriced")
    told: list[dict[str, Value]] = [dict(zip(names, totals, strict=True)) for totals in found]
    for one in told:
        if one["currency"] is None and one["unpriced"]:
            one |= dict.fromkeys((*COSTS, "margin"))
    return told
