"""Forms in which a window can be stored, by their memory and time: `python -m benchmarks.stored`.

Each is asked for what a call over two limits asks: read what is used of both windows, and add to both. The server's own
statistics tell the time, commands included, of many such calls in one script; the quietest of several runs counts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import redis

from benchmarks.common import parser_of, server_of, show, table_of

TIMES, RUNS, TENANTS = 2_000, 41, 1_000
SUB_WINDOWS = 60
UNITS = ("requests", "input_tokens")

SEVEN = "local a, b, c, d, e, f, g"
ZEROS = "('0'):rep({})"


@dataclass(frozen=True)
class Form:
    """One way to store a tenant's two windows, as bodies of a script that knows their names as V and W.

    Attributes:
        full: writes both, with an entry in each of sixty sub-windows.
        one: writes both, with one entry each.
        last: reads what is used of both, and adds to the last sub-window.
        earlier: the same of a sub-window amid the others, as for a late settlement.
        slide: the same, when one sub-window has passed out of the window and another begins.
        keys: of one window: 0 if all windows are fields of one hash, H.
    """

    full: str
    one: str
    last: str
    earlier: str
    slide: str
    keys: int = 0


def _both(body: str) -> str:
    """A body that says `@` for the window's name, for both."""
    return "".join(f"do {body.replace('@', name)} end " for name in "VW")


def _text_form() -> Form:
    read = (
        f"local F = F@ {SEVEN} = sub(F, 1, 13) + 0, sub(F, 14, 29) + 0, sub(F, 30, 45) + 0, sub(F, 46, 58) + 0,"
        " sub(F, 59, 71) + 0, sub(F, 72, 87) + 0, sub(F, 88, 103) + 0 "
    )
    head = "format('%013d%016d%016d%013d%013d%016d%016d', a, b + 1, c, d, e, f + 1, g)"
    entry = "format('%013d%016d%016d', i, i, i)"

    def step(log: str) -> str:
        made = _both(f"{read} F@ = {head} .. {log}")
        return f"local FV, FW = unpack(call('HMGET', H, V, W)) {made} call('HSET', H, V, FV, W, FW)"

    return Form(
        full=_both(f"call('HSET', H, @, {ZEROS.format(103 + 45 * SUB_WINDOWS)})"),
        one=_both(f"call('HSET', H, @, {ZEROS.format(103 + 45)})"),
        last=step(f"sub(F, 104, {103 + 45 * (SUB_WINDOWS - 1)}) .. {entry}"),
        earlier=step(f"sub(F, 104, {103 + 45 * 30}) .. {entry} .. sub(F, {104 + 45 * 31})"),
        slide=step(f"sub(F, {104 + 45}) .. {entry}"),
    )


def _doubles_form() -> Form:
    read = f"local D, L = D@, L@ {SEVEN} = struct.unpack('>ddddddd', D)"
    head, entry = "struct.pack('>ddddddd', a, b + 1, c, d, e, f + 1, g)", "struct.pack('>ddd', i, i, i)"
    logs = "call('HMGET', H, V .. '/log', W .. '/log')"

    def step(log: str) -> str:
        change = f"L@ = {log}" if log else ""
        made = _both(f"{read} D@ = {head} {change}")
        fetched = f"local LV, LW = unpack({logs})" if log else "local LV, LW"
        kept = "V .. '/log', LV, W .. '/log', LW, " if log else ""
        return f"local DV, DW = unpack(call('HMGET', H, V, W)) {fetched} {made} call('HSET', H, {kept}V, DV, W, DW)"

    return Form(
        full=_both(f"call('HSET', H, @, {ZEROS.format(56)}, @ .. '/log', {ZEROS.format(24 * (SUB_WINDOWS - 1))})"),
        one=_both(f"call('HSET', H, @, {ZEROS.format(56)})"),
        last=step(""),
        earlier=step(f"sub(L, 1, 720) .. {entry} .. sub(L, 745)"),
        slide=step(f"sub(L, 25) .. {entry}"),
    )


def _hash_form() -> Form:
    read = "local s = 0 for _, v in ipairs(call('HVALS', @)) do s = s + v end"
    return Form(
        full=_both(f"for k = 1, {SUB_WINDOWS} do call('HSET', @, 1790000000000 + 1000 * k, 1234) end"),
        one=_both("call('HSET', @, '1790000060000', 1234) call('PEXPIRE', @, 3600000)"),
        last=_both(f"{read} call('HINCRBY', @, '1790000060000', 7)"),
        earlier=_both(f"{read} call('HINCRBY', @, '1790000030000', 7)"),
        slide=_both(
            f"{read} call('HDEL', @, 1790000000000 + 1000 * i) call('HSET', @, 1790000060000 + 1000 * i, 7)"
            " call('PEXPIRE', @, 3600000)"
        ),
        keys=1,
    )


def _string_form() -> Form:
    read = f"local D = call('GETRANGE', @, 0, 55) {SEVEN} = struct.unpack('>ddddddd', D)"
    head, entry = "struct.pack('>ddddddd', a, b + 1, c, d, e, f + 1, g)", "struct.pack('>ddd', i, i, i)"
    whole = f"local D = call('GET', @) {SEVEN} = struct.unpack('>ddddddd', D)"
    return Form(
        full=_both(f"call('SET', @, {ZEROS.format(56 + 24 * (SUB_WINDOWS - 1))}, 'PX', 3600000)"),
        one=_both(f"call('SET', @, {ZEROS.format(56)}, 'PX', 3600000)"),
        last=_both(f"{read} call('SETRANGE', @, 0, {head})"),
        earlier=_both(f"{read} call('SETRANGE', @, 0, {head}) call('SETRANGE', @, 776, {entry})"),
        slide=_both(f"{whole} call('SET', @, {head} .. sub(D, 81) .. {entry}, 'PX', 3600000)"),
        keys=1,
    )


def _strings_form() -> Form:
    each = f"for k = 1, {SUB_WINDOWS} do"
    read = "local s = 0 for _, v in ipairs(call('MGET', unpack(names@))) do s = s + v end"
    return Form(
        full=_both(f"{each} call('SET', @ .. '/' .. k, 1234, 'PX', 3600000) end"),
        one=_both("call('SET', @ .. '/1', 1234, 'PX', 3600000)"),
        last=_both(f"{read} call('INCRBY', names@[60], 7)"),
        earlier=_both(f"{read} call('INCRBY', names@[30], 7)"),
        slide=_both(
            f"{read} call('DEL', names@[i % {SUB_WINDOWS} + 1])"
            f" call('SET', names@[i % {SUB_WINDOWS} + 1], 7, 'PX', 3600000)"
        ),
        keys=SUB_WINDOWS,
    )


FORMS = {
    "text, a field of one hash for all": _text_form(),
    "doubles, a field for totals and one for the log (meterlib)": _doubles_form(),
    "doubles, a string of each window": _string_form(),
    "a hash of each window, a field for each sub-window": _hash_form(),
    "a string of each sub-window": _strings_form(),
}
"""meterlib's own form is what `lua/include/window.lua` describes; the others are what it was chosen from."""


@dataclass(frozen=True)
class Cost:
    """What a form takes: bytes of a window, and microseconds of a call over two windows."""

    form: str
    full_bytes: float
    one_bytes: float
    last_us: float
    earlier_us: float
    slide_us: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 0; or 2 if the server is not empty."""
    options = parser_of("stored", __doc__).parse_args(arguments)
    with server_of(options.server) as url, closing(redis.Redis.from_url(url)) as client:
        if client.dbsize():
            print("the server must be empty: it is emptied between turns", file=sys.stderr)
            return 2
        costs = [_cost(client, name, form, 2 if options.quick else RUNS) for name, form in FORMS.items()]
        client.flushdb()
    columns = ("bytes of 60 sub-windows", "of one", "last charged, µs", "an earlier one", "one out, one in")
    table = table_of("A window as it is stored, and a call over two of them", "", *columns)
    for cost in costs:
        times = (cost.last_us, cost.earlier_us, cost.slide_us)
        table.add_row(cost.form, f"{cost.full_bytes:,.0f}", f"{cost.one_bytes:,.0f}", *(f"{us:.1f}" for us in times))
    show(table)
    return 0


def _cost(client: Any, name: str, form: Form, runs: int) -> Cost:
    one_bytes, full_bytes = _bytes(client, form, form.one), _bytes(client, form, form.full)
    steps = []
    for body in (form.last, form.earlier, form.slide):
        took_us = []
        for _ in range(runs):
            _run(client, form, form.full, 1, 0)
            took_us.append((_run(client, form, body, TIMES, 0) - _run(client, form, "", TIMES, 0)) / TIMES)
        steps.append(min(took_us))
    return Cost(name, full_bytes, one_bytes, *steps)


def _bytes(client: Any, form: Form, body: str) -> float:
    """Of one window, of those of a thousand tenants: `MEMORY USAGE` of all keys."""
    client.flushdb()
    for tenant in range(TENANTS):
        _run(client, form, body, 1, tenant)
    used = sum(int(client.memory_usage(key, samples=0)) for key in client.scan_iter(count=10_000))
    return used / TENANTS / len(UNITS)


def _run(client: Any, form: Form, body: str, times: int, tenant: int) -> float:
    """Microseconds of the server for the body, so many times, about one tenant's windows."""
    windows = [f"w/tenant-{tenant:04d}/{unit}/anthropic" for unit in UNITS]
    if form.keys:
        windows = [f"bench:{{0}}:{window}" for window in windows]
    keys = windows if form.keys == 1 else [f"{window}/{at + 1}" for window in windows for at in range(form.keys)]
    text = f"""
local sub, format, call, H, V, W = string.sub, string.format, redis.call, KEYS[1], ARGV[1], ARGV[2]
local namesV, namesW = {{unpack(KEYS, 2, {1 + form.keys})}}, {{unpack(KEYS, {2 + form.keys})}}
for i = 1, {times} do {body} end"""
    client.config_resetstat()
    client.eval(text, 1 + len(keys), "bench:{0}:state", *keys, *windows)
    return float(client.info("commandstats")["cmdstat_eval"]["usec"])


if __name__ == "__main__":
    sys.exit(main())
