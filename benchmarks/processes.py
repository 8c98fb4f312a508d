"""Several processes on one server, all the cores there are: `python -m benchmarks.processes`.

Each process is a gateway of its own, with 128 tasks and a thousand tenants; counted are the decisions that all of them
make together. They take turns in changing order, each on an emptied server.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
from collections.abc import Sequence
from contextlib import closing
from statistics import median
from typing import Any

import redis

from benchmarks.common import parser_of, server_of, show, table_of
from benchmarks.contenders import MANY, Lineup
from benchmarks.measure import WARM_UP_SECONDS, timed

TASKS = 128
PROCESSES = (1, 2, 4)
BEST_OF_US = f"meterlib reserve{MANY}"
NAMES = (
    "EVALSHA no-op",
    BEST_OF_US,
    f"meterlib reserve + settle{MANY}",
    f"limits, sliding window counter{MANY}",
    f"throttled-py, sliding window{MANY}",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 0."""
    parser = parser_of("processes", __doc__, seconds="how long each number of processes is timed, a turn (2; 0.5)")
    options = parser.parse_args(arguments)
    seconds, rounds = options.seconds or (0.5 if options.quick else 2.0), 1 if options.quick else 5
    found: dict[tuple[str, int], list[float]] = {}
    with server_of(options.server) as url, closing(redis.Redis.from_url(url)) as server:
        turns = [(name, processes) for processes in PROCESSES for name in NAMES]
        for made in range(rounds):
            for name, processes in turns if made % 2 == 0 else reversed(turns):
                server.flushdb()
                found.setdefault((name, processes), []).append(_together(url, name, processes, seconds))
    _show({key: median(rates) for key, rates in found.items()})
    return 0


def _together(url: str, name: str, processes: int, seconds: float) -> float:
    """How many decisions a second so many processes make."""
    spawning = multiprocessing.get_context("spawn")
    begin, rates = spawning.Barrier(processes), spawning.SimpleQueue()
    workers = [
        spawning.Process(target=_work, args=(url, name, f"p{at}-", seconds, begin, rates)) for at in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise SystemExit(f"a process that measured {name} failed")
    return sum(float(rates.get()) for _ in workers)


def _work(url: str, name: str, own: str, seconds: float, begin: Any, rates: Any) -> None:
    with closing(redis.Redis.from_url(url)) as server, asyncio.Runner() as runner:
        lineup = Lineup(server, url, runner, own=own)
        try:
            (contender,) = [made for made in lineup.gather_async(TASKS) if made.name == name]
            timed(contender, runner, WARM_UP_SECONDS)
            begin.wait()
            took_ns, elapsed_s = timed(contender, runner, seconds)
            rates.put(len(took_ns) / elapsed_s)
        finally:
            lineup.close()


def _show(rates: dict[tuple[str, int], float]) -> None:
    columns = [f"{processes} process{'es' if processes > 1 else ''}" for processes in PROCESSES]
    table = table_of("Decisions a second; meterlib reserves / these", "", *columns, *(f"/ {it}" for it in PROCESSES))
    for name in NAMES:
        own = [rates[name, processes] for processes in PROCESSES]
        ours = [rates[BEST_OF_US, processes] for processes in PROCESSES]
        ratios = [f"{a / b:.2f}" for a, b in zip(ours, own, strict=True)]
        table.add_row(name, *(f"{rate:,.0f}" for rate in own), *ratios)
    show(table)


if __name__ == "__main__":
    sys.exit(main())
