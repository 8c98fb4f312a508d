"""Timing: contenders take turns in rounds on one server, so that noise hits all alike; medians over rounds count."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

WARM_UP_SECONDS = 0.03


@dataclass
class Contender:
    """One way to decide, timed as one operation.

    Attributes:
        name: what the table calls it.
        library: who does it: `bare`, `meterlib`, or a peer's name.
        tasks: asyncio tasks that do it at the same time; 0: no asyncio at all.
        operation: does it once, and tells whether the call was admitted (awaited if there are tasks).
        admits: what the operation has to say each time.
        commands: what the client itself sends; what scripts call meanwhile is part of their time, and listed apart.
        prepare: brings the emptied server to where the operation starts from.
        notes: what a reader must know.

    """

    name: str
    library: str
    tasks: int
    operation: Callable[[], Any]
    admits: bool = True
    commands: tuple[str, ...] = ("evalsha", "eval", "script|load")
    prepare: Callable[[], None] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Slice:
    """What one contender did in its turn of one round; times in microseconds."""

    operations: int
    p50_us: float
    p99_us: float
    per_second: float
    server_us: float
    server_cpu_us: float
    round_trips: float
    inner_calls: dict[str, float]


class WrongDecisionError(Exception):
    """A contender did not decide as it has to: its time would mean nothing."""


def run_rounds(
    server: Any,
    contenders: Sequence[Contender],
    runner: asyncio.Runner,
    rounds: int,
    seconds: float,
    progress: Callable[[int, Contender], None],
) -> dict[int, list[Slice]]:
    """Let all contenders take turns, `seconds` altogether; the slices of each, by its position."""
    turn_seconds = seconds / rounds / len(contenders)
    slices: dict[int, list[Slice]] = {at: [] for at in range(len(contenders))}
    for made in range(rounds):
        order = list(range(len(contenders)))
        for at in order if made % 2 == 0 else reversed(order):
            progress(made, contenders[at])
            slices[at].append(_turn(server, contenders[at], runner, turn_seconds))
    return slices


def _turn(server: Any, contender: Contender, runner: asyncio.Runner, seconds: float) -> Slice:
    server.flushdb()
    if contender.prepare:
        contender.prepare()
    timed(contender, runner, min(seconds, WARM_UP_SECONDS))
    gc.collect()
    server.config_resetstat()
    cpu_us = _cpu_us(server)
    took_ns, elapsed_s = timed(contender, runner, seconds)
    cpu_us = _cpu_us(server) - cpu_us
    stats = {name.removeprefix("cmdstat_"): stat for name, stat in server.info("commandstats").items()}
    own = [stats[command] for command in contender.commands if command in stats]
    operations = len(took_ns)
    took_ns.sort()
    return Slice(
        operations=operations,
        p50_us=took_ns[operations // 2] / 1000,
        p99_us=took_ns[operations * 99 // 100] / 1000,
        per_second=operations / elapsed_s,
        server_us=sum(stat["usec"] for stat in own) / operations,
        server_cpu_us=cpu_us / operations,
        round_trips=sum(stat["calls"] for stat in own) / operations,
        inner_calls={
            name: stat["calls"] / operations
            for name, stat in stats.items()
            if name not in (*contender.commands, "config|resetstat", "info")
        },
    )


def _cpu_us(server: Any) -> float:
    cpu = server.info("cpu")
    thread = "_main_thread" if "used_cpu_user_main_thread" in cpu else ""
    return float((cpu[f"used_cpu_user{thread}"] + cpu[f"used_cpu_sys{thread}"]) * 1e6)


def timed(contender: Contender, runner: asyncio.Runner, seconds: float) -> tuple[list[int], float]:
    """How many ns each operation took, and how many seconds all of them."""
    if contender.tasks:
        return runner.run(timed_async(contender, seconds))
    return _time_sync(contender, seconds)


def _time_sync(contender: Contender, seconds: float) -> tuple[list[int], float]:
    operation, admits, clock_ns = contender.operation, contender.admits, time.perf_counter_ns
    took_ns: list[int] = []
    began_ns = before_ns = clock_ns()
    end_ns = began_ns + int(seconds * 1e9)
    while before_ns < end_ns:
        if operation() is not admits:
            raise WrongDecisionError(contender.name)
        after_ns = clock_ns()
        took_ns.append(after_ns - before_ns)
        before_ns = after_ns
    return took_ns, (before_ns - began_ns) / 1e9


async def timed_async(contender: Contender, seconds: float) -> tuple[list[int], float]:
    """As `timed`."""
    operation, admits, clock_ns = contender.operation, contender.admits, time.perf_counter_ns
    took_ns: list[int] = []
    began_ns = clock_ns()
    end_ns = began_ns + int(seconds * 1e9)

    async def work() -> None:
        before_ns = clock_ns()
        while before_ns < end_ns:
            if await operation() is not admits:
                raise WrongDecisionError(contender.name)
            after_ns = clock_ns()
            took_ns.append(after_ns - before_ns)
            before_ns = after_ns

    await asyncio.gather(*[work() for _ in range(contender.tasks)])
    return took_ns, (clock_ns() - began_ns) / 1e9


async def all_at_once(operation: Callable[[], Awaitable[Any]], count: int) -> list[Any]:
    """Do an operation so many times at once; raises the first failure when all have ended."""
    answers = await asyncio.gather(*[operation() for _ in range(count)], return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers


def over_rounds(slices: Sequence[Slice], what: str) -> float:
    """The median of a number over the rounds."""
    return float(median(getattr(made, what) for made in slices))


def ratio(slices: Sequence[Slice], base: Sequence[Slice], what: str = "p50_us") -> float:
    """The median over rounds of how a number compares with the base's of the same round."""
    return float(median(getattr(a, what) / getattr(b, what) for a, b in zip(slices, base, strict=True)))
