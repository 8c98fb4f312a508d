"""Instructions that the server executes for one call, which no noise touches: `python -m benchmarks.instructions`.

The server runs under valgrind (`callgrind`, which has to be installed), some fifty times slower, with the time set.
Each line is the mean of some calls, with all that the server does in between. Windows have sixty entries; two limits.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import parser_of, show, table_of
from benchmarks.contenders import AMPLE, ATTRIBUTES, NO_OP, NO_OP_KEYS, PLENTY, Quotas, fill_window, policy_of
from meterlib import Meter, QuotaExceeded, Reservation, Usage
from meterlib.store.options import StoreOptions
from meterlib.testing import Clock
from tests.support.servers import available, start_server

CALLS, FEW = 50, 5
USAGE = Usage(input_tokens=1200)
USED = Usage(input_tokens=1000, output_tokens=200)
TOOLS = ("valgrind", "callgrind_control")
SERVERS = ("valkey", "redis")

NUMBERS = ", ".join(["1790000060999"] * 12)
ANSWERS = {
    "answer: a word and twelve numbers, list in a list": f"return {{{{'reserved', {NUMBERS}}}}}",
    "answer: the same in one list": f"return {{'reserved', {NUMBERS}}}",
    "answer: the same as packed text": f"return struct.pack('>sdddddddddddd', 'reserved', {NUMBERS})",
}
"""Ways to answer what a reserve has to."""

Step = Callable[[int], Any]
"""One of the calls that are counted; told which."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print, and return 0."""
    parser = parser_of("instructions", __doc__, servers=False)
    parser.add_argument("--server", choices=SERVERS, action="append", help="one of them only; else each there is")
    options = parser.parse_args(arguments)
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"not installed: {', '.join(missing)}")
    kinds = options.server or [kind for kind in SERVERS if available(kind) is None]
    counts = {kind: dict(counted(kind, FEW if options.quick else CALLS)) for kind in kinds}
    table = table_of("Instructions of the server for a call", "", *kinds)
    for what in counts[kinds[0]]:
        table.add_row(what, *(f"{counts[kind][what]:,.0f}" for kind in kinds))
    show(table)
    return 0


def counted(kind: str, calls: int) -> Iterator[tuple[str, float]]:
    """What each of the steps takes on one kind of server."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meterlib-bench-")))
        under = ("valgrind", "--tool=callgrind", "--quiet", "--callgrind-out-file=counted")
        server = stack.enter_context(start_server(folder, kind, config={"hz": "1"}, under=under))
        client = stack.enter_context(closing(server.client(socket_timeout=60)))
        for name, step in _steps(client, server.url, calls):
            _control(server.pid, "--zero")
            for call in range(calls):
                step(call)
            _control(server.pid, "--dump")
            dumps = sorted(folder.glob("counted.*"), key=lambda path: int(path.suffix[1:]))
            yield name, _total_of(dumps[-1]) / calls


def _steps(client: Any, url: str, calls: int) -> Iterator[tuple[str, Step]]:
    """Each step, after what has to be there for it was made; meters ask once before, so that scripts are loaded."""
    for what, script in {"EVALSHA no-op": NO_OP, **ANSWERS}.items():
        yield what, partial(_evalsha, client, client.script_load(script))
    clock = Clock()
    with _meter(url, "busy", AMPLE, clock) as meter:
        fill_window(client, "busy", "acme", 6000, clock)
        for tenant in ("acme", "other"):
            _reserve(meter, tenant).settle(USED)
            _reserve(meter, tenant).cancel()
        _reserve(meter).revise(USAGE)
        meter.peek("acme", ATTRIBUTES)
        yield "reserve, in the last call's sub-window", lambda _: _reserve(meter)
        yield "reserve of a new tenant", lambda call: _reserve(meter, f"tenant-{call}")
        yield "reserve, in a new sub-window while one slides out", lambda _: _reserve_later(meter, clock)
        held = [_reserve(meter) for _ in range(calls)]
        yield "revise", lambda call: held[call].revise(USED)
        yield "settle, in the reserve's sub-window", lambda call: held[call].settle(USED)
        held = [_reserve(meter) for _ in range(calls)]
        yield "cancel", lambda call: held[call].cancel()
        held = [_reserve(meter) for _ in range(calls)]
        for _ in range(10):
            _reserve_later(meter, clock)
        yield "settle, some sub-windows later", lambda call: held[call].settle(USED)
        yield "peek", lambda _: meter.peek("acme", ATTRIBUTES)
    clock = Clock()
    with _meter(url, "full", Quotas(1000, PLENTY), clock) as meter:
        fill_window(client, "full", "acme", 1000, clock, Quotas(1000, PLENTY))
        yield "reserve, denied by a window of 1,000 requests", lambda _: _denied(meter)


def _evalsha(client: Any, sha: str, _: int) -> None:
    client.evalsha(sha, len(NO_OP_KEYS), *NO_OP_KEYS)


def _meter(url: str, prefix: str, quotas: Quotas, clock: Clock) -> Meter:
    options = StoreOptions(prefix=prefix, timeout_ms=60_000)
    return Meter.connect(url, policy_of(quotas), options=options, clock=clock, sweep_interval_ms=0)


def _reserve(meter: Meter, tenant: str = "acme") -> Reservation:
    return meter.reserve(tenant, ATTRIBUTES, USAGE)


def _reserve_later(meter: Meter, clock: Clock) -> None:
    clock.advance(ms=1000)
    _reserve(meter)


def _denied(meter: Meter) -> None:
    try:
        _reserve(meter)
    except QuotaExceeded:
        return
    raise SystemExit("what had to be denied was admitted")


def _control(pid: int, what: str) -> None:
    subprocess.run([TOOLS[1], what, str(pid)], check=True, capture_output=True)


def _total_of(dump: Path) -> int:
    for line in dump.read_text(encoding="utf-8").splitlines():
        if line.startswith("totals:"):
            return int(line.split()[1])
    raise SystemExit(f"{dump.name} has no totals")


if __name__ == "__main__":
    sys.exit(main())
