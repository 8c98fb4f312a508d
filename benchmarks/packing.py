"""What it costs a script to take, keep and give numbers in one form or another: `python -m benchmarks.packing`.

Each form is run many times within one script, and an empty loop is taken off. The quietest of several runs counts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from typing import Any, NamedTuple

import msgspec
import redis

from benchmarks.common import parser_of, server_of, show, table_of
from meterlib.core.operations import packed

TIMES, RUNS = 20_000, 7
LIMIT = ("w/acme/requests/anthropic", "requests", 1, 10**12, "admit", 60_000, 1000, 0, 0, "keep")
HEAD = (1790000060999, 12, 34567, 1790000000999, 1790000060999, 12, 34567)
FORM = "ssddsdddds" * 2
MATCH = "([^ ]+) " * 20

TEXTS = "for k = 1, 8 do local x = A[k] end"
SEVEN = "local a, b, c, d, e, f, g"
FORMS: dict[str, dict[str, str]] = {
    "twenty values of two limits, taken": {
        "one argument each, `tonumber` of 12": f"{TEXTS} for k = 9, 20 do local x = tonumber(A[k]) end",
        "one argument each, `+ 0` of 12": f"{TEXTS} for k = 9, 20 do local x = A[k] + 0 end",
        "JSON list, `cjson.decode`": "local x = cjson.decode(J)",
        "text, `string.match`": f"local a, b, c = string.match(T, '^{MATCH}$')",
        "msgpack list, `cmsgpack.unpack`": "local x = cmsgpack.unpack(M)",
        "msgpack values, `cmsgpack.unpack`": "local a, b, c = cmsgpack.unpack(V)",
        "texts and doubles, `struct.unpack`": f"local a, b, c = struct.unpack('>{FORM}', S)",
    },
    "seven numbers of a window, read": {
        "text of fixed width, `string.sub` and `+ 0`": f"{SEVEN} = sub(F, 1, 13) + 0, sub(F, 14, 29) + 0,"
        " sub(F, 30, 45) + 0, sub(F, 46, 58) + 0, sub(F, 59, 71) + 0, sub(F, 72, 87) + 0, sub(F, 88, 103) + 0",
        "`cmsgpack.unpack`": f"{SEVEN} = cmsgpack.unpack(H)",
        "`struct.unpack` of doubles": f"{SEVEN} = struct.unpack('>ddddddd', D)",
    },
    "seven numbers of a window, written": {
        "text, `..`": "local x = i .. ' ' .. i .. ' ' .. i .. ' ' .. i .. ' ' .. i .. ' ' .. i .. ' ' .. i",
        "text of fixed width, `string.format`": "local x = format('%013d%016d%016d%013d%013d%016d%016d',"
        " i, i, i, i, i, i, i)",
        "`cmsgpack.pack`": "local x = cmsgpack.pack(i, i, i, i, i, i, i)",
        "`struct.pack` of doubles": "local x = struct.pack('>ddddddd', i, i, i, i, i, i, i)",
    },
    "a window of sixty entries, one more added": {
        "text, 45 characters an entry": "local x = sub(L45, 46) .. format('%013d%016d%016d', i, i, i)",
        "doubles, 24 bytes an entry": "local x = sub(L24, 25) .. struct.pack('>ddd', i, i, i)",
        "only its totals and last entry": "local x = struct.pack('>ddddddd', i, i, i, i, i, i, i)",
    },
}


class Cost(NamedTuple):
    """What one form takes on the server, in microseconds."""

    what: str
    form: str
    us: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 0."""
    options = parser_of("packing", __doc__).parse_args(arguments)
    runs = 2 if options.quick else RUNS
    with server_of(options.server) as url, closing(redis.Redis.from_url(url)) as client:
        if client.dbsize():
            print("the server must be empty: it is emptied between turns", file=sys.stderr)
            return 2
        costs = measured(client, runs)
    table = table_of("Numbers, taken and written by a script", "", "form", "µs")
    table.columns[1].justify = "left"
    for cost in costs:
        table.add_row(cost.what, cost.form, f"{cost.us:.2f}")
    show(table)
    return 0


def measured(client: Any, runs: int) -> list[Cost]:
    """Every form's cost, without that of the loop."""
    loop_us = _us(client, "", runs)
    return [
        Cost(what, form, _us(client, body, runs) - loop_us)
        for what, forms in FORMS.items()
        for form, body in forms.items()
    ]


def _us(client: Any, body: str, runs: int) -> float:
    """Microseconds of the server for one time of the body, in the quietest run."""
    values = (*LIMIT, *LIMIT)
    numbers, texts = [v for v in values if isinstance(v, int)], [v for v in values if isinstance(v, str)]
    words = [
        msgspec.json.encode(values),
        msgspec.msgpack.encode(values),
        " ".join(map(str, values)) + " ",
        b"".join(map(msgspec.msgpack.encode, values)),
        packed(values),
        "{:013d}{:016d}{:016d}{:013d}{:013d}{:016d}{:016d}".format(*HEAD),
        b"".join(map(msgspec.msgpack.encode, HEAD)),
        packed(HEAD),
        "x" * 45 * 60,
        "x" * 24 * 60,
        *texts,
        *numbers,
    ]
    text = f"""
local sub, format = string.sub, string.format
local J, M, T, V, S, F, H, D, L45, L24 = unpack(ARGV, 1, 10)
local A = {{unpack(ARGV, 11)}}
for i = 1, {TIMES} do {body} end"""
    sha = client.script_load(text)
    took: list[float] = []
    for _ in range(runs):
        client.config_resetstat()
        client.evalsha(sha, 0, *words)
        took.append(client.info("commandstats")["cmdstat_evalsha"]["usec"] / TIMES)
    return min(took)


if __name__ == "__main__":
    sys.exit(main())
