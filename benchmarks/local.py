"""Calls admitted in the process out of slices of a quota: `python -m benchmarks.local`.

Beside them, reserves that ask the store each, from as many tasks.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from statistics import median
from typing import Any

from benchmarks.common import parser_of, server_of, show, table_of
from benchmarks.contenders import AMPLE, ATTRIBUTES, TOKENS, policy_of
from meterlib import AsyncMeter, StoreOptions, Usage

TASKS = 256
PIECE = 1000
TARGET = 500_000
SLICE = Usage(requests=1_000_000, input_tokens=1_000_000 * TOKENS)
RESERVE = "reserve, 256 tasks"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 0."""
    options = parser_of("local", __doc__, seconds="how long altogether (20; 3 with --quick)").parse_args(arguments)
    seconds, rounds = options.seconds or (3 if options.quick else 20), 2 if options.quick else 9
    with server_of(options.server) as url:
        _show(asyncio.run(_measure(url, seconds / rounds / 4, rounds)))
    return 0


async def _measure(url: str, seconds: float, rounds: int) -> dict[str, list[float]]:
    """Decisions a second of each round; the slices that are taken meanwhile are part of that."""
    found: dict[str, list[float]] = {}
    options = StoreOptions(prefix="local")
    async with (
        AsyncMeter.connect(url, policy_of(AMPLE), options=options, sweep_interval_ms=0) as meter,
        meter.local("acme", ATTRIBUTES, SLICE) as lease,
    ):

        async def takes() -> int:
            taken = sum([lease.take(input_tokens=TOKENS) for _ in range(PIECE)])
            if taken < PIECE:
                await lease.admit(input_tokens=TOKENS)
            return taken

        async def admits() -> int:
            for _ in range(PIECE):
                await lease.admit(input_tokens=TOKENS)
            return PIECE

        async def admits_together() -> int:
            async def some() -> None:
                for _ in range(PIECE // 10):
                    await lease.admit(input_tokens=TOKENS)

            await asyncio.gather(*(some() for _ in range(TASKS)))
            return TASKS * (PIECE // 10)

        async def reserves() -> int:
            async def some() -> None:
                await meter.reserve("acme", ATTRIBUTES, Usage(input_tokens=TOKENS))

            await asyncio.gather(*(some() for _ in range(TASKS)))
            return TASKS

        ways: dict[str, Callable[[], Awaitable[int]]] = {
            "local: take": takes,
            "local: admit, one task": admits,
            "local: admit, 256 tasks": admits_together,
            RESERVE: reserves,
        }
        for _ in range(rounds):
            for name, act in ways.items():
                found.setdefault(name, []).append(await _rate(act, seconds))
    return found


async def _rate(act: Callable[[], Awaitable[int]], seconds: float) -> float:
    await act()
    made, began_s = 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - began_s) < seconds:
        made += await act()
    return made / elapsed_s


def _show(found: dict[str, list[float]]) -> None:
    title = f"Decisions a second in one process; target {TARGET:,}"
    table = table_of(title, "", "per second", "least", "/ reserve", "target")
    for name, rates in found.items():
        ratio = median(a / b for a, b in zip(rates, found[RESERVE], strict=True))
        reached: Any = "" if name == RESERVE else "reached" if median(rates) >= TARGET else "not reached in this run"
        table.add_row(name, f"{median(rates):,.0f}", f"{min(rates):,.0f}", f"{ratio:.1f}", reached)
    show(table)


if __name__ == "__main__":
    sys.exit(main())
