"""What it costs a script to take, keep and give numbers in one form or another: `python -m benchmarks.packing`.

Each form is run many times within one script, and an empty loop is taken off. The quietest of several runs counts. Then
the forms in which a window can be stored: its memory, and what reading and writing it costs, commands included.
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
STORED_TIMES, WINDOWS = 2_000, 1_000
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


class Stored(NamedTuple):
    """A form in which a window of sixty sub-windows is stored, under its name W; H is what windows share, if they do.

    Attributes:
        fill: writes one.
        last: reads what is used, and adds to the last sub-window.
        earlier: the same of an earlier one: a late settlement.
        slide: one sub-window has passed out of the window, and a new one begins.
        keys: how many keys it has of its own, which are KEYS then.
    """

    fill: str
    last: str
    earlier: str
    slide: str
    keys: int = 0


_READ_TEXT = f"{FORMS['seven numbers of a window, read']['text of fixed width, `string.sub` and `+ 0`']}"
_HEAD_TEXT = "format('%013d%016d%016d%013d%013d%016d%016d', a, b + 1, c, d, e, f + 1, g)"
_ENTRY_TEXT = "format('%013d%016d%016d', i, i, i)"
_HEAD_DOUBLES = "struct.pack('>ddddddd', a, b + 1, c, d, e, f + 1, g)"
_ENTRY_DOUBLES = "struct.pack('>ddd', i, i, i)"
_TEXT = f"local F = call('HGET', H, W) {_READ_TEXT}"
_TWO = f"local D, L = unpack(call('HMGET', H, W, W .. '/log')) {SEVEN} = struct.unpack('>ddddddd', D)"
_SUM = "local s = 0 for _, v in ipairs({}) do s = s + v end"
_HASH = _SUM.format("call('HVALS', W)")
_MANY = _SUM.format("call('MGET', unpack(KEYS))")
STORED: dict[str, Stored] = {
    "text, in one field of all windows' hash": Stored(
        fill="call('HSET', H, W, ('0'):rep(104 + 45 * 60))",
        last=f"{_TEXT} call('HSET', H, W, {_HEAD_TEXT} .. sub(F, 105, 104 + 45 * 59) .. {_ENTRY_TEXT})",
        earlier=f"{_TEXT} call('HSET', H, W, {_HEAD_TEXT} .. sub(F, 105, 1454) .. {_ENTRY_TEXT} .. sub(F, 1500))",
        slide=f"{_TEXT} call('HSET', H, W, {_HEAD_TEXT} .. sub(F, 150) .. {_ENTRY_TEXT})",
    ),
    "doubles, totals in a field and the log in another (meterlib)": Stored(
        fill="call('HSET', H, W, ('x'):rep(56), W .. '/log', ('x'):rep(24 * 59))",
        last=f"local D = call('HGET', H, W) {SEVEN} = struct.unpack('>ddddddd', D) call('HSET', H, W, {_HEAD_DOUBLES})",
        earlier=f"{_TWO} call('HSET', H, W, {_HEAD_DOUBLES}, W .. '/log',"
        f" sub(L, 1, 720) .. {_ENTRY_DOUBLES} .. sub(L, 745))",
        slide=f"{_TWO} call('HSET', H, W, {_HEAD_DOUBLES}, W .. '/log', sub(L, 25) .. {_ENTRY_DOUBLES})",
    ),
    "a hash of each window, a field for each sub-window": Stored(
        fill="for k = 1, 60 do call('HSET', W, 1790000000000 + 1000 * k, 1234) end",
        last=f"{_HASH} call('HINCRBY', W, '1790000060000', 7)",
        earlier=f"{_HASH} call('HINCRBY', W, '1790000030000', 7)",
        slide=f"{_HASH} call('HDEL', W, 1790000000000 + 1000 * i) call('HSET', W, 1790000060000 + 1000 * i, 7)",
    ),
    "a string of each window, doubles": Stored(
        fill="call('SET', W, ('x'):rep(56 + 24 * 59))",
        last=f"local D = call('GETRANGE', W, 0, 55) {SEVEN} = struct.unpack('>ddddddd', D)"
        f" call('SETRANGE', W, 0, {_HEAD_DOUBLES})",
        earlier=f"local D = call('GETRANGE', W, 0, 55) {SEVEN} = struct.unpack('>ddddddd', D)"
        f" call('SETRANGE', W, 0, {_HEAD_DOUBLES}) call('SETRANGE', W, 776, {_ENTRY_DOUBLES})",
        slide=f"local D = call('GET', W) {SEVEN} = struct.unpack('>ddddddd', D)"
        f" call('SET', W, {_HEAD_DOUBLES} .. sub(D, 81) .. {_ENTRY_DOUBLES}, 'PX', 120000)",
        keys=1,
    ),
    "a string of each sub-window": Stored(
        fill="for k = 1, 60 do call('SET', KEYS[k], 1234, 'PX', 3600000) end",
        last=f"{_MANY} call('INCRBY', KEYS[60], 7)",
        earlier=f"{_MANY} call('INCRBY', KEYS[30], 7)",
        slide=f"{_MANY} call('DEL', KEYS[i % 60 + 1]) call('SET', KEYS[i % 60 + 1], 7, 'PX', 3600000)",
        keys=60,
    ),
}


class Cost(NamedTuple):
    """What one form takes on the server, in microseconds."""

    what: str
    form: str
    us: float


class StoredCost(NamedTuple):
    """What a stored form takes: bytes of a window, and microseconds."""

    form: str
    bytes: float
    last_us: float
    earlier_us: float
    slide_us: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 0."""
    options = parser_of("packing", __doc__).parse_args(arguments)
    runs = 2 if options.quick else RUNS
    with server_of(options.server) as url, closing(redis.Redis.from_url(url)) as client:
        if client.dbsize():
            print("the server must be empty: it is emptied between turns", file=sys.stderr)
            return 2
        costs, stored = measured(client, runs), measured_stored(client, runs)
    table = table_of("Numbers, taken and written by a script", "", "form", "µs")
    table.columns[1].justify = "left"
    for cost in costs:
        table.add_row(cost.what, cost.form, f"{cost.us:.2f}")
    columns = ("bytes", "last charged, µs", "an earlier one", "one out, one in")
    windows = table_of("A window of sixty sub-windows, as it is stored", "", *columns)
    for one in stored:
        windows.add_row(one.form, f"{one.bytes:,.0f}", *(f"{us:.2f}" for us in one[2:]))
    show(table, windows)
    return 0


def measured(client: Any, runs: int) -> list[Cost]:
    """Every form's cost, without that of the loop."""
    loop_us = _us(client, "", runs)
    return [
        Cost(what, form, _us(client, body, runs) - loop_us)
        for what, forms in FORMS.items()
        for form, body in forms.items()
    ]


def measured_stored(client: Any, runs: int) -> list[StoredCost]:
    """Every stored form's memory, of a thousand windows on their own, and what its steps cost."""
    found = []
    for name, form in STORED.items():
        client.flushdb()
        for number in range(WINDOWS):
            _run(client, form, form.fill, 1, f"w/tenant-{number:04d}/requests/anthropic")
        used = sum(client.memory_usage(key, samples=0) for key in client.scan_iter(count=10_000))
        steps = []
        for body in (form.last, form.earlier, form.slide):
            took = [_run(client, form, body, STORED_TIMES, "w/tenant-0500/requests/anthropic") for _ in range(runs)]
            steps.append(min(took) / STORED_TIMES)
        found.append(StoredCost(name, used / WINDOWS, *steps))
    client.flushdb()
    return found


def _run(client: Any, form: Stored, body: str, times: int, window: str) -> float:
    """Microseconds of the server for the body, so many times."""
    text = f"""
local sub, format, call, H, W = string.sub, string.format, redis.call, ARGV[1], ARGV[2]
for i = 1, {times} do {body} end"""
    own = [f"bench:{{0}}:{window}" + (f"/{at}" if form.keys > 1 else "") for at in range(form.keys)]
    name = own[0] if form.keys == 1 else f"bench:{{0}}:{window}" if "HVALS" in form.last else window
    sha = client.script_load(text)
    client.config_resetstat()
    client.evalsha(sha, len(own), *own, "bench:{0}:state", name)
    return float(client.info("commandstats")["cmdstat_evalsha"]["usec"])


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
