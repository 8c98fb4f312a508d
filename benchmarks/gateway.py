"""What metering costs a proxy, beside the provider alone and a bare pass-through: `python -m benchmarks.gateway`."""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import uvloop

from benchmarks.common import parser_of
from benchmarks.provider import Provider, exchange, open_stream
from meterlib import AsyncMeter, Policy, StoreOptions
from meterlib.cli.gateway import collect_seldom
from meterlib.gateway.app import Gateway
from meterlib.gateway.callers import Callers
from meterlib.gateway.exchange import ClientGone, Exchange
from meterlib.gateway.headers import for_client, for_upstream
from meterlib.gateway.server import Server
from meterlib.gateway.upstream import Upstream
from meterlib.settings import GatewaySettings

CLIENTS = 32
HELD_STREAMS = 1000
ROUNDS = 5


@dataclass(frozen=True)
class Contender:
    """One way to the provider."""

    name: str
    kind: str | None
    preset: str | None = None


CONTENDERS = (
    Contender("provider alone", None),
    Contender("bare pass-through", "bare"),
    Contender("gateway, no limits", "gateway"),
    Contender("gateway, 50 RPM preset's two limits", "gateway", "buildkite-anthropic"),
)


class PassThrough:
    """A proxy of the gateway's own parts that only forwards: what a gateway costs before it meters anything."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self._upstream = Upstream(settings)

    async def handle(self, exchange: Exchange) -> None:
        """Forward a request, and pass its answer back."""
        body = await exchange.body(self.settings.body_bytes_max, self.settings.body_timeout_ms)
        headers, _ = for_upstream(exchange.headers, ("x-api-key", "sk-benchmark"), None)
        answer = await self._upstream.send(exchange.method, exchange.path, exchange.query, headers, body)
        try:
            headers = for_client(answer.headers, keep_limits=True)
            await exchange.start(answer.status, headers, more=answer.has_begun)
            async for chunk in answer.chunks():
                await exchange.write(chunk)
            await exchange.finish()
        except ClientGone:
            pass
        finally:
            answer.close()

    async def tend_for_ever(self) -> None:
        """There is nothing to look after."""
        await asyncio.Event().wait()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._upstream.aclose()


# ── The proxy's process ───────────────────────────────────────────────────────────────────────────────────────────────


def _proxy(pipe: Connection, contender: Contender, upstream: str, store: str, core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    uvloop.run(_serve(pipe, contender, upstream, store))


async def _serve(pipe: Connection, contender: Contender, upstream: str, store: str) -> None:
    settings = GatewaySettings(listen="127.0.0.1:0", upstream=upstream, connections_max=100_000, shutdown_ms=0)
    served: Any = PassThrough(settings) if contender.kind == "bare" else _gateway(settings, contender, store)
    async with Server(served) as server:
        collect_seldom()
        pipe.send(server.url)
        loop = asyncio.get_running_loop()
        while await loop.run_in_executor(None, pipe.recv) != "stop":
            pipe.send((_resident_bytes(), resource.getrusage(resource.RUSAGE_SELF)))


def _gateway(settings: GatewaySettings, contender: Contender, store: str) -> Gateway:
    policy = Policy.preset(contender.preset) if contender.preset else Policy()
    # As many calls as a benchmark makes must pass: the limits are the preset's, their quotas are not.
    limits = [type(limit)(**{**_fields(limit), "quota": 2**50, "sub_windows": 60}) for limit in policy.limits]
    callers = Callers(settings, (), {}, bytes(32))
    options = StoreOptions(prefix=f"bench-{contender.kind}-{bool(contender.preset)}")
    meter = AsyncMeter.connect(store, Policy(limits=limits), options=options)
    return Gateway(settings, callers, meter, closes_meter=True)


def _fields(limit: Any) -> dict[str, Any]:
    return {name: getattr(limit, name) for name in limit.__struct_fields__}


def _resident_bytes() -> int:
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Proxy:
    """A proxy in a process of its own, on a core of its own where the machine lets us choose."""

    def __init__(self, contender: Contender, upstream: str, store: str, core: int | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_proxy, args=(theirs, contender, upstream, store, core), daemon=True)
        self._process.start()
        self.url: str = self._pipe.recv()

    def resident_bytes(self) -> int:
        """Its memory now."""
        self._pipe.send("measure")
        return int(self._pipe.recv()[0])

    def cpu_s(self) -> float:
        """The processor time it has used."""
        self._pipe.send("measure")
        used = self._pipe.recv()[1]
        return float(used.ru_utime + used.ru_stime)

    def stop(self) -> None:
        """It is gone."""
        self._pipe.send("stop")
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


# ── Measuring ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Slice:
    """One contender's turn: requests a second with many clients, and its time to the first byte with one."""

    plain_per_second: float = 0.0
    streamed_per_second: float = 0.0
    streamed_cpu_us: float = 0.0
    first_byte_p50_ms: float = 0.0
    first_byte_p99_ms: float = 0.0


async def _turn(url: str, proxy: Proxy | None, seconds: float) -> Slice:
    made = Slice()
    await _throughput(url, True, 0.2)
    before_s = proxy.cpu_s() if proxy else 0.0
    made.streamed_per_second, calls = await _throughput(url, True, seconds)
    made.streamed_cpu_us = (proxy.cpu_s() - before_s) / calls * 1e6 if proxy else 0.0
    made.plain_per_second, _ = await _throughput(url, False, seconds)
    took = await _first_bytes(url, seconds / 2)
    made.first_byte_p50_ms, made.first_byte_p99_ms = took[len(took) // 2], took[len(took) * 99 // 100]
    return made


async def _throughput(url: str, streamed: bool, seconds: float) -> tuple[float, int]:
    """Answers a second that CLIENTS get, each on its own connection, one after the other."""
    until_s = time.perf_counter() + seconds

    async def client() -> int:
        made = 0
        async with exchange(url, streamed) as ask:
            while time.perf_counter() < until_s:
                await ask()
                made += 1
        return made

    began_s = time.perf_counter()
    made = sum(await asyncio.gather(*(client() for _ in range(CLIENTS))))
    return made / (time.perf_counter() - began_s), made


async def _first_bytes(url: str, seconds: float) -> list[float]:
    """Times from the request to the answer's first byte, in ms, of one client that asks again and again."""
    took = []
    until_s = time.perf_counter() + seconds
    async with exchange(url, streamed=True) as ask:
        while time.perf_counter() < until_s:
            took.append(await ask() * 1000)
    return sorted(took)


async def _bytes_per_stream(proxy: Proxy, url: str) -> float:
    """The memory that an open stream takes, of HELD_STREAMS at once."""
    async with exchange(url, streamed=True) as ask:
        await ask()
    before = proxy.resident_bytes()
    streams = [await open_stream(url) for _ in range(HELD_STREAMS)]
    await asyncio.sleep(1)
    after = proxy.resident_bytes()
    for writer in streams:
        writer.close()
    return (after - before) / HELD_STREAMS


async def _measure(arguments: argparse.Namespace, store: str) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    core = cores[0] if len(cores) > 1 else None
    if core is not None:
        os.sched_setaffinity(0, set(cores[1:]))
    # What starts an embedded server decides which cores it has: it is to be here, not in the first gateway.
    async with AsyncMeter.connect(store, Policy()) as meter, Provider() as provider:
        await meter.head(0)
        proxies = {c.name: Proxy(c, provider.url, store, core) if c.kind else None for c in CONTENDERS}
        slices: dict[str, list[Slice]] = {contender.name: [] for contender in CONTENDERS}
        try:
            for made in range(arguments.rounds):
                for contender in CONTENDERS if made % 2 == 0 else reversed(CONTENDERS):
                    _progress(f"round {made + 1} of {arguments.rounds}: {contender.name}")
                    proxy = proxies[contender.name]
                    url = proxy.url if proxy else provider.url
                    slices[contender.name].append(await _turn(url, proxy, arguments.seconds))
            memory = {}
            for name, proxy in proxies.items():
                if proxy:
                    _progress(f"memory: {name}")
                    memory[name] = await _bytes_per_stream(proxy, proxy.url)
        finally:
            for proxy in proxies.values():
                if proxy:
                    proxy.stop()
    _progress("")
    return {"slices": slices, "memory": memory}


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


# ── Telling ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _rows(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    slices: Mapping[str, Sequence[Slice]] = measured["slices"]
    bare, alone = slices["bare pass-through"], slices["provider alone"]
    rows = []
    for name, made in slices.items():
        rows.append(
            {
                "name": name,
                "streamed_per_second": _over(made, "streamed_per_second"),
                "of_bare": _ratio(made, bare, "streamed_per_second"),
                "streamed_cpu_us": _over(made, "streamed_cpu_us"),
                "plain_per_second": _over(made, "plain_per_second"),
                "plain_of_bare": _ratio(made, bare, "plain_per_second"),
                "first_byte_p50_ms": _over(made, "first_byte_p50_ms"),
                "added_p50_ms": _over(made, "first_byte_p50_ms") - _over(alone, "first_byte_p50_ms"),
                "added_p99_ms": _over(made, "first_byte_p99_ms") - _over(alone, "first_byte_p99_ms"),
                "stream_kb": measured["memory"].get(name, 0) / 1000,
            }
        )
    return rows


def _over(slices: Sequence[Slice], what: str) -> float:
    return float(median(getattr(made, what) for made in slices))


def _ratio(slices: Sequence[Slice], base: Sequence[Slice], what: str) -> float:
    return float(median(getattr(a, what) / getattr(b, what) for a, b in zip(slices, base, strict=True)))


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    names = ("streamed/s", "/ bare", "CPU µs each", "plain/s", "/ bare", "first byte p50 ms", "added p50", "added p99")
    print("| | " + " | ".join((*names, "kB/stream")) + " |")
    print("|---" + "|--:" * (len(names) + 1) + "|")
    for row in rows:
        numbers = [
            f"{row['streamed_per_second']:,.0f}",
            f"{row['of_bare']:.2f}",
            f"{row['streamed_cpu_us']:,.0f}",
            f"{row['plain_per_second']:,.0f}",
            f"{row['plain_of_bare']:.2f}",
            f"{row['first_byte_p50_ms']:.2f}",
            f"{row['added_p50_ms']:.2f}",
            f"{row['added_p99_ms']:.2f}",
            f"{row['stream_kb']:.1f}" if row["stream_kb"] else "",
        ]
        print(f"| {row['name']} | " + " | ".join(numbers) + " |")


def main() -> None:
    """Measure, and print a table."""
    parser = parser_of("gateway", __doc__, "how long each is timed, a round (2; 0.7 with --quick)", servers=False)
    parser.add_argument("--rounds", type=int, help=f"how many ({ROUNDS}; 2 with --quick)")
    parser.add_argument("--store", help="the URL of a store; without it, an embedded one for the run")
    parser.add_argument("--json", action="store_true", help="print all numbers as one JSON object")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (2 if arguments.quick else ROUNDS)
    arguments.seconds = arguments.seconds or (0.7 if arguments.quick else 2.0)
    with tempfile.TemporaryDirectory() as folder:
        store = arguments.store or f"embedded://{folder}/data"
        measured = uvloop.run(_measure(arguments, store))
    rows = _rows(measured)
    print(json.dumps(rows, indent=1)) if arguments.json else _print(rows)


if __name__ == "__main__":
    main()
