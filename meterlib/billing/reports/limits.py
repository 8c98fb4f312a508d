"""How good the estimates before the calls were, and what came of reservations that nobody settled, from an archive.

It tells the same of estimates as a fold over the entries does (`Estimates`), and how much was let through too soon.
"""

from __future__ import annotations

from typing import Any

from meterlib.billing.reports.answers import Answer, Column, Reader, keys_of_entries
from meterlib.billing.reports.estimates import ESTIMATED_INPUT_TOKENS
from meterlib.billing.reports.query import Query, name_of
from meterlib.core.checks import AMOUNT_MAX

LIMITS_COLUMNS = (
    Column("calls", "count"),
    Column("over", "count"),
    Column("overrun_percent", "ratio"),
    Column("median", "ratio"),
    Column("p95", "ratio"),
    Column("expired", "count"),
    Column("tokens_at_risk", "count"),
    Column("late", "count"),
    Column("partial", "count"),
)
"""`calls` are settled ones of which estimate and charge are known, `over` those of them that were charged more, and
`overrun_percent` how much more, of all that was estimated. `tokens_at_risk` is what was estimated of `expired` ones."""

_SHAPE = """'{"input_tokens": "BIGINT", "cache_creation_input_tokens": "BIGINT", "output_tokens": "BIGINT"}'"""
_PASSES = """'[{"type": "VARCHAR", "input_tokens": "BIGINT", "cache_creation_input_tokens": "BIGINT"}]'"""
_OWN_PASSES = f"""CASE WHEN regexp_matches(iterations::VARCHAR, 'compaction|advisor_message') THEN
    list_sum(list_transform(list_filter(from_json(iterations, {_PASSES}),
        lambda one: one.type IN ('compaction', 'advisor_message')),
        lambda one: coalesce(one.input_tokens, 0) + coalesce(one.cache_creation_input_tokens, 0))) END"""
_TOLD = f"facts ->> '/{ESTIMATED_INPUT_TOKENS}'"
_CALLS = "kind IN ('settled', 'late', 'recorded')"

_ENTRY = f"""kind, quality,
    CASE WHEN kind = 'settled' AND quality <> 'estimated' AND (coalesce(input_tokens, 0) > 0
        OR coalesce(cache_creation_input_tokens, 0) > 0 OR coalesce(cache_read_input_tokens, 0) > 0)
        AND (input_tokens IS NOT NULL OR cache_creation_input_tokens IS NOT NULL)
        THEN least(coalesce(input_tokens, 0) + coalesce(cache_creation_input_tokens, 0)
            + coalesce({_OWN_PASSES}, 0), {AMOUNT_MAX}) END AS charged,
    CASE WHEN contains(facts::VARCHAR, '{ESTIMATED_INPUT_TOKENS}') AND regexp_full_match({_TOLD}, '[0-9]+')
        THEN try_cast({_TOLD} AS HUGEINT) END AS told,
    json_transform(nullif(estimate, ''), {_SHAPE}) AS held,
    CASE WHEN held['input_tokens'] IS NOT NULL OR held['cache_creation_input_tokens'] IS NOT NULL
        THEN coalesce(held['input_tokens'], 0) + coalesce(held['cache_creation_input_tokens'], 0) END AS held_input,
    coalesce(told, held_input) AS estimated,
    if(charged IS NOT NULL AND estimated IS NOT NULL, greatest(charged, 1) / greatest(estimated, 1), NULL) AS ratio"""

_SUMS = (
    "count(ratio)",
    "count(*) FILTER (ratio IS NOT NULL AND charged > estimated)",
    "(sum(greatest(charged - estimated, 0)) FILTER (ratio IS NOT NULL) * 100000"
    " // nullif(sum(estimated) FILTER (ratio IS NOT NULL), 0))::DECIMAL(35,0) * 0.001::DECIMAL(3,3)",
    "round(list_sort(list(ratio) FILTER (ratio IS NOT NULL))[(count(ratio) * 50 + 99) // 100], 3)::DECIMAL(38,3)",
    "round(list_sort(list(ratio) FILTER (ratio IS NOT NULL))[(count(ratio) * 95 + 99) // 100], 3)::DECIMAL(38,3)",
    "count(*) FILTER (kind = 'expired')",
    "coalesce(sum(coalesce(held_input, 0) + coalesce(held['output_tokens'], 0)) FILTER (kind = 'expired'), 0)",
    "count(*) FILTER (kind = 'late')",
    f"count(*) FILTER (quality = 'partial' AND {_CALLS})",
)


def limits_report(reader: Reader, query: Query) -> Answer:
    """How the entries that are asked for compare with what was held for them."""
    keys = keys_of_entries(query)
    named = [f"{key} AS k{at}" for at, key in enumerate(keys)]
    relation = reader.entries_of(query, ", ".join((*named, _ENTRY)))
    reader.grouped([], query.tz, relation, [], _SUMS)
    total: Any = reader.connection.execute("SELECT * EXCLUDE place FROM answer").fetchone()
    totals = dict(zip((column.name for column in LIMITS_COLUMNS), total, strict=True))
    reader.grouped(query.by, query.tz, relation, [f"k{at}" for at in range(len(keys))], _SUMS)
    columns = [*(Column(name_of(word), "key") for word in query.by), *LIMITS_COLUMNS]
    return Answer(reader.connection, query, columns, [totals])
