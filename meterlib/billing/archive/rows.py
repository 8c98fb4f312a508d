"""A ledger entry as a line of text, as a row of a Parquet file, and back.

A row has what the ledger has, verbatim (`VERBATIM`), and beside it columns made from that, for whoever asks questions
in SQL (`MADE`). Nothing can get lost on the way, fields of a later version included: a reader decodes the verbatim part
by the same function as one of the store's; and since the columns are made by one expression, whoever doubts them makes
them again and compares. In Parquet the redundancy costs 10 of 85 bytes an entry.

The line is what digests are taken of. It holds the stored fields in their order, separated by a character that no valid
entry has; so it is at once a line of the CSV that DuckDB reads (no JSON is touched in Python: that alone would take
longer than all the rest).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import sha256
from typing import Any

from meterlib.billing.duck import quoted
from meterlib.core.ledger import LedgerEntry, entry_of

SCHEMA = 1
SEPARATOR = b"\x1f"
STORED = (
    *(b"kind", b"after", b"id", b"reserved_at", b"booked_at"),
    *(b"call", b"estimate", b"outcome", b"digest", b"epoch"),
)
"""The fields of an entry in the store, in their order there."""

VERBATIM = {
    "n": "BIGINT",
    "kind": "VARCHAR",
    "after": "VARCHAR",
    "reservation_id": "VARCHAR",
    "reserved_at": "BIGINT",
    "booked_at": "BIGINT",
    "call": "VARCHAR",
    "estimate": "VARCHAR",
    "outcome": "VARCHAR",
    "digest": "VARCHAR",
    "epoch": "VARCHAR",
    "more": "VARCHAR",
}
"""Columns that hold the line's parts, in its order; `more` has fields that this version does not know, by name."""

COUNTS = {
    "input_tokens": "input_tokens",
    "cache_creation_input_tokens": "cache_creation_input_tokens",
    "ephemeral_5m_input_tokens": "cache_creation.ephemeral_5m_input_tokens",
    "ephemeral_1h_input_tokens": "cache_creation.ephemeral_1h_input_tokens",
    "cache_read_input_tokens": "cache_read_input_tokens",
    "output_tokens": "output_tokens",
    "thinking_tokens": "output_tokens_details.thinking_tokens",
    "web_search_requests": "server_tool_use.web_search_requests",
    "web_fetch_requests": "server_tool_use.web_fetch_requests",
    "code_execution_requests": "server_tool_use.code_execution_requests",
}
"""Columns of whole numbers, and where a usage has them; null where it is not known, negative in corrections."""

USAGE: dict[str, Any] = {
    "cache_creation": {"ephemeral_5m_input_tokens": "BIGINT", "ephemeral_1h_input_tokens": "BIGINT"},
    "output_tokens_details": {"thinking_tokens": "BIGINT"},
    "server_tool_use": dict.fromkeys(
        ("web_search_requests", "web_fetch_requests", "code_execution_requests"), "BIGINT"
    ),
    **dict.fromkeys(
        ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens"), "BIGINT"
    ),
    **dict.fromkeys(("service_tier", "speed", "inference_geo"), "VARCHAR"),
    **dict.fromkeys(("iterations", "amounts"), "JSON"),
}
CALL: dict[str, Any] = {
    "tenant": "VARCHAR",
    "funding": "VARCHAR",
    "attributes": {"provider": "VARCHAR", "model": "VARCHAR"},
}
OUTCOME: dict[str, Any] = {
    "usage": USAGE,
    "facts": "JSON",
    **dict.fromkeys(("quality", "adjusts", "adjusts_id", "reason", "actor"), "VARCHAR"),
}
"""What columns are made of, in the parts that are JSON."""

MADE = {
    "tenant": "c.tenant",
    "funding": "coalesce(c.funding, 'hosted')",
    "provider": "c.attributes.provider",
    "model": "c.attributes.model",
    "attributes": "coalesce(call -> '$.attributes', '{}'::JSON)",
    "quality": "coalesce(o.quality, 'final')",
    **{column: f"o.usage.{place}" for column, place in COUNTS.items()},
    "service_tier": "o.usage.service_tier",
    "speed": "o.usage.speed",
    "inference_geo": "o.usage.inference_geo",
    "iterations": "o.usage.iterations",
    "amounts": "o.usage.amounts",
    "facts": "o.facts",
    "adjusts": "o.adjusts",
    "reason": "o.reason",
    "actor": "o.actor",
}
"""Columns made from the verbatim ones, and how."""

LINE = "concat_ws(chr(31), " + ", ".join(f"coalesce({name}::VARCHAR, '')" for name in VERBATIM) + ")"
"""The line of a row, in SQL."""


LINE_SIZE = " + ".join(f"coalesce(strlen({name}::VARCHAR), 0)" for name in VERBATIM) + f" + {len(VERBATIM) - 1}"
"""How many bytes the line of a row has, in SQL: what joins the parts is one byte each."""


def fields_of(line: bytes) -> tuple[int, dict[bytes, bytes]]:
    """An entry's number and its fields in the store, from its line."""
    n, *values, more = line.split(SEPARATOR)
    fields = dict(zip(STORED, values, strict=True))
    if more:
        fields |= {name.encode(): value.encode() for name, value in json.loads(more).items()}
    return int(n), fields


def number_of(line: bytes) -> int:
    """The number of the entry that a line holds."""
    return int(line.partition(SEPARATOR)[0])


def entry_from(shard: int, line: bytes) -> LedgerEntry:
    """The entry that a line holds."""
    return entry_of(shard, *fields_of(line))


LINE_MAX = 16_000_000
_LINE_USUAL = 625_000


def chained(link: bytes, lines: Iterable[bytes]) -> bytes:
    """The link behind these lines: each is the digest of the link before it and of its line.

    So the last link tells of every entry from the first on, however they are cut into files.
    """
    digest = sha256
    for line in lines:
        link = digest(link + line).digest()
    return link


def first_link(shard: int) -> bytes:
    """The link before the first entry of a shard."""
    return sha256(b"meterlib archive %d, shard %d" % (SCHEMA, shard)).digest()


def rows_of_csv(path: str, longest: int) -> str:
    """SQL for all columns of the lines of a file, of which the longest has so many bytes."""
    # DuckDB fills a buffer with zeros for each file. One of less than some times the longest line it may refuse or read
    # wrongly; one that is fit for the longest lines that are allowed would take half a gigabyte.
    line_max = min(LINE_MAX, max(_LINE_USUAL, longest + 16))
    columns = ", ".join(f"{name}: '{kind}'" for name, kind in VERBATIM.items())
    source = (
        f"read_csv({quoted(path)}, columns = {{{columns}}}, delim = chr(31), header = false, auto_detect = false,"
        f" quote = '', escape = '', new_line = '\\n', max_line_size = {line_max}, buffer_size = {32 * line_max})"
    )
    return made_from(source, ", ".join(VERBATIM))


def made_from(source: str, verbatim: str) -> str:
    """SQL for columns of a source that has the verbatim ones: those named in `verbatim`, and all that are made."""
    made = ", ".join(f"{how} AS {name}" for name, how in MADE.items())
    parsed = (
        f"SELECT *, json_transform(call, {quoted(json.dumps(CALL))}) AS c,"
        f" json_transform(coalesce(outcome, '{{}}'), {quoted(json.dumps(OUTCOME))}) AS o FROM {source}"
    )
    return f"SELECT {verbatim}, {made} FROM ({parsed})"
