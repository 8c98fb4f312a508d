"""Which calls were made again because their answer did not come, and what the tries used that brought none.

A gateway notes a digest of each call's prompt. Calls of one tenant with the same prompt are tries of the same call, as
long as each but the last failed its caller, and the next came soon.
"""

from __future__ import annotations

from typing import Any

from meterlib.billing.reports.answers import Answer, Column, Reader, keys_of_entries
from meterlib.billing.reports.query import PROMPT, Query, name_of

AGAIN_WITHIN_MS = 600_000
"""Whoever asks the same so much later than a try has ended asks anew."""

TOKENS = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens")
RETRIES_COLUMNS = (
    *(Column(name, "count") for name in ("calls", "retried", "tries", "gave_up_streaming", "unanswered")),
    *(Column(f"extra_{name}", "count") for name in TOKENS),
)
"""`calls` are those that somebody wanted an answer to, `retried` those of them that took several `tries`;
`gave_up_streaming` those that were then made in one piece; `unanswered` those whose last try failed, too. What all
tries of a call but the last used is `extra_…`."""

_END, _CLIENT, _STREAM = (f"facts ->> '/{name}'" for name in ("end", "client", "stream"))
_TRY = f"""tenant, shard, n, reserved_at, booked_at, {PROMPT} AS prompt,
    coalesce({_STREAM}, '') = 'true' AS streamed,
    coalesce({_END}, '') <> 'complete' OR coalesce({_CLIENT}, '') = 'gone' AS failed,
    {", ".join(f"coalesce({name}, 0) AS {name}" for name in TOKENS)}"""
_HAS_PROMPT = f"""kind IN ('settled', 'late') AND contains(facts::VARCHAR, '"prompt"') AND {PROMPT} IS NOT NULL"""

_EARLIER = "(PARTITION BY tenant, prompt ORDER BY reserved_at, booked_at, shard, n)"
_IS_AGAIN = f"""coalesce(lag(failed) OVER {_EARLIER}
    AND reserved_at - lag(booked_at) OVER {_EARLIER} < {AGAIN_WITHIN_MS}, false)"""
_IN_ORDER = "ORDER BY reserved_at, booked_at, shard, n"
_CALL = f"""min(moment) AS moment, count(*) AS tries, last(failed {_IN_ORDER}) AS unanswered,
    bool_or(streamed) AND NOT last(streamed {_IN_ORDER}) AS in_one_piece,
    {", ".join(f"sum({name}) - last({name} {_IN_ORDER}) AS {name}" for name in TOKENS)}"""
_SUMS = (
    "count(*)",
    "count(*) FILTER (tries > 1)",
    "coalesce(sum(tries), 0)",
    "count(*) FILTER (in_one_piece)",
    "count(*) FILTER (unanswered)",
    *(f"coalesce(sum({name}), 0)" for name in TOKENS),
)


def retries_report(reader: Reader, query: Query) -> Answer:
    """How often the calls that are asked for were tried; they are grouped by what is told of the first try."""
    keys = keys_of_entries(query)
    named = [f"{key} AS k{at}" for at, key in enumerate(keys)]
    tries = reader.entries_of(query, ", ".join((*named, _TRY)), _HAS_PROMPT)
    marked = f"SELECT *, {_IS_AGAIN} AS again FROM ({tries})"
    counted = f"SELECT *, count(*) FILTER (NOT again) OVER {_EARLIER} AS call FROM ({marked})"
    firsts = [f"first(k{at} {_IN_ORDER}) AS k{at}" for at in range(len(keys))]
    calls = f"SELECT {', '.join((*firsts, _CALL))} FROM ({counted}) GROUP BY tenant, prompt, call"
    reader.grouped([], query.tz, calls, [], _SUMS)
    total: Any = reader.connection.execute("SELECT * EXCLUDE place FROM answer").fetchone()
    totals = dict(zip((column.name for column in RETRIES_COLUMNS), total, strict=True))
    reader.grouped(query.by, query.tz, calls, [f"k{at}" for at in range(len(keys))], _SUMS)
    columns = [*(Column(name_of(word), "key") for word in query.by), *RETRIES_COLUMNS]
    return Answer(reader.connection, query, columns, [totals])
