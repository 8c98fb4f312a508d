"""A cluster of three nodes beside one server: `python -m benchmarks.cluster`.

256 tasks over a thousand tenants, whose shards lie on all nodes. All nodes share this machine's cores with the client,
so that this shows what finding one's way among nodes costs, and not what three machines could do. Contenders take turns
in changing order, each on emptied servers.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import redis.asyncio
import redis.asyncio.cluster

from benchmarks.common import parser_of, server_of, show, table_of
from benchmarks.contenders import (
    AMPLE,
    ATTRIBUTES,
    NO_OP,
    TRIALS,
    Decide,
    Quotas,
    for_any,
    policy_of,
)
from benchmarks.measure import WARM_UP_SECONDS, Contender, WrongDecisionError, timed_async
from meterlib import AsyncMeter, QuotaExceeded, StoreOptions, Usage
from tests.store.topologies import Cluster, ask
from tests.support.servers import available

TASKS = 256
BARE = "cluster: EVALSHA no-op"
Make = Callable[[Quotas], AbstractAsyncContextManager[Decide]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 0."""
    parser = parser_of("cluster", __doc__, seconds="how long altogether (40; 5 with --quick)", servers=False)
    parser.add_argument("--server", default="valkey", choices=("valkey", "redis"), help="of which kind the nodes are")
    options = parser.parse_args(arguments)
    seconds, rounds = options.seconds or (5 if options.quick else 40), 2 if options.quick else 8
    if reason := available(options.server):
        raise SystemExit(reason)
    with (
        tempfile.TemporaryDirectory(prefix="meterlib-bench-") as folder,
        server_of(options.server) as url,
        Cluster(Path(folder), options.server) as cluster,
        asyncio.Runner() as runner,
    ):

        def empty() -> None:
            for node in cluster.nodes:
                ask(node, "FLUSHALL")
            with redis.Redis.from_url(url) as client:
                client.flushall()

        found = runner.run(_measure(url, cluster.url, empty, seconds, rounds))
    _show(found)
    return 0


async def _measure(
    url: str, cluster_url: str, empty: Callable[[], None], seconds: float, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """By contender: decisions a second, and the median time of one in ms; of each round."""
    makers: dict[str, Make] = {
        "one server: meterlib reserve": partial(_ours, url, False),
        "one server: meterlib reserve + settle": partial(_ours, url, True),
        BARE: partial(_bare, cluster_url),
        "cluster: meterlib reserve": partial(_ours, cluster_url, False),
        "cluster: meterlib reserve + settle": partial(_ours, cluster_url, True),
        "cluster: limits, sliding window counter": partial(_limits, cluster_url),
        "cluster: throttled-py, sliding window": partial(_throttled, cluster_url),
    }
    for name, make in makers.items():
        empty()
        await _check(name, make)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
    names = list(makers)
    for made in range(rounds):
        for name in names if made % 2 == 0 else reversed(names):
            empty()
            async with makers[name](AMPLE) as decide:
                contender = Contender(name, "", TASKS, for_any(decide))
                await timed_async(contender, WARM_UP_SECONDS)
                took_ns, elapsed_s = await timed_async(contender, seconds / rounds / len(makers))
                found[name].append((len(took_ns) / elapsed_s, median(took_ns) / 1e6))
    return found


async def _check(name: str, make: Make) -> None:
    """Raise WrongDecisionError unless a contender denies what exceeds its requests, and what exceeds its tokens."""
    for number, (quotas, calls, right) in enumerate(TRIALS) if name != BARE else ():
        for tries_left in (1, 0):  # peers that count by the clock's minutes may rightly differ when one begins
            async with make(quotas) as decide:
                found = [await decide(f"checked-{number}-{tries_left}", tokens) for tokens in calls]
            if found == right:
                break
            if not tries_left:
                raise WrongDecisionError(f"{name} decides {found} instead of {right}")


@asynccontextmanager
async def _ours(url: str, settles: bool, quotas: Quotas) -> AsyncIterator[Decide]:
    options = StoreOptions(prefix="bench")
    async with AsyncMeter.connect(url, policy_of(quotas), options=options, sweep_interval_ms=0) as meter:

        async def decide(tenant: str, tokens: int) -> bool:
            try:
                held = await meter.reserve(tenant, ATTRIBUTES, Usage(input_tokens=tokens))
            except QuotaExceeded:
                return False
            if settles:
                await held.settle(Usage(input_tokens=tokens, output_tokens=200))
            return True

        yield decide


@asynccontextmanager
async def _bare(url: str, _: Quotas) -> AsyncIterator[Decide]:
    plain = url.replace("+cluster", "")
    async with redis.asyncio.cluster.RedisCluster.from_url(plain, max_connections=2 * TASKS) as client:
        sha = await client.script_load(NO_OP)

        async def decide(tenant: str, tokens: int) -> bool:
            answer = await client.execute_command("EVALSHA", sha, 1, f"noop:{{{tenant}}}")
            return bool(answer == [])

        yield decide


@asynccontextmanager
async def _limits(url: str, quotas: Quotas) -> AsyncIterator[Decide]:
    from limits import RateLimitItemPerMinute
    from limits.aio.storage import RedisClusterStorage
    from limits.aio.strategies import SlidingWindowCounterRateLimiter

    storage: Any = RedisClusterStorage(f"async+{url}", implementation="redispy", max_connections=2 * TASKS)
    hit = SlidingWindowCounterRateLimiter(storage).hit
    requests = RateLimitItemPerMinute(quotas.requests, namespace="requests")
    tokens = RateLimitItemPerMinute(quotas.tokens, namespace="tokens")

    async def decide(tenant: str, amount: int) -> bool:
        return await hit(requests, tenant) and await hit(tokens, tenant, cost=amount)

    await decide("first", 0)  # its client learns the nodes before others come
    yield decide
    with suppress(AttributeError):
        await storage.bridge.get_connection().aclose()


@asynccontextmanager
async def _throttled(url: str, quotas: Quotas) -> AsyncIterator[Decide]:
    from throttled import per_min
    from throttled.asyncio import RedisStore, Throttled

    more: Any = {"REDIS_CLIENT_KWARGS": {"max_connections": 2 * TASKS}}
    store = RedisStore(server=url, options=more)
    requests, tokens = (
        Throttled(using="sliding_window", quota=per_min(quota), store=store, key_prefix=f"bench-{unit}")
        for unit, quota in (("requests", quotas.requests), ("tokens", quotas.tokens))
    )

    async def decide(tenant: str, amount: int) -> bool:
        key = f"{{{tenant}}}"  # its script takes two keys, which otherwise lie in slots of their own
        return not (await requests.limit(key)).limited and not (await tokens.limit(key, amount)).limited

    await decide("first", 1)
    yield decide
    client: Any = store._backend.get_client()
    await client.aclose()


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
