"""A cluster of three nodes beside one server: `python -m benchmarks.cluster`.

256 tasks over a thousand tenants, whose shards lie on all nodes. All nodes share this machine's cores with the client,
so that this shows what finding one's way among nodes costs, and not what three machines could do.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import redis.asyncio
import redis.asyncio.cluster

from benchmarks.common import parser_of, server_of, show, table_of
from benchmarks.contenders import AMPLE, ATTRIBUTES, NO_OP, PLENTY, TOKENS, in_turn, policy_of
from benchmarks.measure import WARM_UP_SECONDS, Contender, timed_async
from meterlib import AsyncMeter, StoreOptions, Usage
from tests.store.topologies import Cluster
from tests.support.servers import available

TASKS = 256
Act = Callable[[str], Awaitable[bool]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 0."""
    parser = parser_of("cluster", __doc__, seconds="how long altogether (30; 4 with --quick)", servers=False)
    parser.add_argument("--server", default="valkey", choices=("valkey", "redis"), help="of which kind the nodes are")
    options = parser.parse_args(arguments)
    seconds, rounds = options.seconds or (4 if options.quick else 30), 2 if options.quick else 7
    if reason := available(options.server):
        raise SystemExit(reason)
    with (
        tempfile.TemporaryDirectory(prefix="meterlib-bench-") as folder,
        server_of(options.server) as url,
        Cluster(Path(folder), options.server) as cluster,
        asyncio.Runner() as runner,
    ):
        found = runner.run(_measure(url, cluster.url, seconds, rounds))
    _show(found)
    return 0


async def _measure(url: str, cluster_url: str, seconds: float, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """By contender: decisions a second, and the median time of one in ms; of each round."""
    makers: dict[str, Callable[[], Any]] = {
        "one server: meterlib reserve": partial(_ours, url, False),
        "one server: meterlib reserve + settle": partial(_ours, url, True),
        "cluster: EVALSHA no-op": partial(_bare, cluster_url),
        "cluster: meterlib reserve": partial(_ours, cluster_url, False),
        "cluster: meterlib reserve + settle": partial(_ours, cluster_url, True),
        "cluster: limits, sliding window counter": partial(_limits, cluster_url),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
    for _ in range(rounds):
        for name, make in makers.items():
            async with make() as act:
                contender = Contender(name, "", TASKS, partial(_next, act, in_turn()))
                await timed_async(contender, WARM_UP_SECONDS)
                took_ns, elapsed_s = await timed_async(contender, seconds / rounds / len(makers))
                found[name].append((len(took_ns) / elapsed_s, median(took_ns) / 1e6))
    return found


def _next(act: Act, tenants: Iterator[str]) -> Awaitable[bool]:
    return act(next(tenants))


@asynccontextmanager
async def _ours(url: str, settles: bool) -> AsyncIterator[Act]:
    async with AsyncMeter.connect(
        url, policy_of(AMPLE), options=StoreOptions(prefix="bench"), sweep_interval_ms=0
    ) as meter:

        async def act(tenant: str) -> bool:
            held = await meter.reserve(tenant, ATTRIBUTES, Usage(input_tokens=TOKENS))
            if settles:
                await held.settle(Usage(input_tokens=1000, output_tokens=200))
            return True

        yield act


@asynccontextmanager
async def _bare(url: str) -> AsyncIterator[Act]:
    plain = url.replace("+cluster", "")
    async with redis.asyncio.cluster.RedisCluster.from_url(plain, max_connections=2 * TASKS) as client:
        sha = await client.script_load(NO_OP)

        async def act(tenant: str) -> bool:
            answer = await client.execute_command("EVALSHA", sha, 1, f"noop:{{{tenant}}}")
            return bool(answer == [])

        yield act


@asynccontextmanager
async def _limits(url: str) -> AsyncIterator[Act]:
    from limits import RateLimitItemPerMinute
    from limits.aio.storage import RedisClusterStorage
    from limits.aio.strategies import SlidingWindowCounterRateLimiter

    storage: Any = RedisClusterStorage(f"async+{url}", implementation="redispy", max_connections=2 * TASKS)
    hit = SlidingWindowCounterRateLimiter(storage).hit
    requests = RateLimitItemPerMinute(PLENTY, namespace="requests")
    tokens = RateLimitItemPerMinute(PLENTY, namespace="tokens")

    async def act(tenant: str) -> bool:
        return await hit(requests, tenant) and await hit(tokens, tenant, cost=TOKENS)

    await act("first")  # its client learns the nodes before others come
    yield act
    with suppress(AttributeError):
        await storage.bridge.get_connection().aclose()


def _show(found: dict[str, list[tuple[float, float]]]) -> None:
    ours = [rate for rate, _ in found["cluster: meterlib reserve"]]
    title = f"{TASKS} tasks over 1,000 tenants; the last: meterlib's reserves on the cluster / these"
    table = table_of(title, "", "per second", "p50 ms", "ours / it")
    for name, rounds in found.items():
        rates = [rate for rate, _ in rounds]
        ratio = median(a / b for a, b in zip(ours, rates, strict=True))
        table.add_row(name, f"{median(rates):,.0f}", f"{median(ms for _, ms in rounds):.1f}", f"{ratio:.2f}")
    show(table)


if __name__ == "__main__":
    sys.exit(main())
