"""Who is measured: the bare server, meterlib and its peers, each asked to limit requests and tokens per minute.

Everyone gets the same job: one call of TOKENS input tokens by one tenant, under a limit of requests and one of input
tokens in a window of a minute. meterlib decides both in one script call, and keeps a reservation; peers take one call
per limit, and keep none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle
from typing import Any

import redis
import redis.asyncio
from redis.exceptions import MaxConnectionsError

from benchmarks.measure import Contender, WrongDecisionError, all_at_once
from meterlib import AsyncMeter, Limit, Meter, Policy, QuotaExceeded, Tenant, Usage
from meterlib.core.operations import Operation, packed
from meterlib.store.commands import Batch, Call
from meterlib.store.drivers import SyncDriver
from meterlib.store.flows import Context, reserve
from meterlib.store.keys import layout, shard_of
from meterlib.store.options import StoreOptions
from meterlib.store.wires import AsyncDirectWire, DirectWire
from meterlib.testing import Clock

ATTRIBUTES = {"provider": "anthropic", "model": "claude-sonnet-4-5"}
TOKENS = 1200
PLENTY = 10**12
TENANTS = 1000
MANY = f", {TENANTS:,} tenants"
"""What the names of contenders end in whose calls are each another tenant's."""

POOL = 64
NO_OP = "return {}"
BY_WIRE = "EVALSHA no-op, meterlib's wire"
"""The same on redis-py's connections, without its client: what there is to be had without any limiter."""

NO_OP_KEYS = tuple(f"noop:{{0}}:{name}" for name in "abcde")


@dataclass(frozen=True)
class Quotas:
    """How much may pass in any minute."""

    requests: int
    tokens: int


AMPLE = Quotas(PLENTY, PLENTY)
Decide = Callable[[str, int], Any]
"""Decides about a tenant's call of so many tokens; an awaitable of that for the async ones."""


def policy_of(quotas: Quotas) -> Policy:
    """A limit of requests and one of input tokens, in any minute, for each tenant and provider."""
    return Policy(
        limits=(
            Limit(name="requests", unit="requests", quota=quotas.requests, window="1m", per=("provider",)),
            Limit(name="input_tokens", unit="input_tokens", quota=quotas.tokens, window="1m", per=("provider",)),
        ),
        tenants=(Tenant(name="denied", quotas={"requests": 1}),),
    )


def reserve_operation(context: Context, tenant: str) -> Operation:
    """What a reserve of the job asks of its script."""
    command = next(reserve(context, tenant, ATTRIBUTES, Usage(input_tokens=TOKENS)))
    assert isinstance(command, Call)
    return command.operation


def fill_window(client: Any, prefix: str, tenant: str, requests: int, clock: Clock, quotas: Quotas = AMPLE) -> None:
    """Spread so many requests of a tenant evenly over the minute that ends now by `clock`, in batches."""
    options = StoreOptions(prefix=prefix)
    context = Context(policy_of(quotas), options, clock, "deny")
    driver = SyncDriver(client, options, clock)
    now_ms, shard, operations = clock.now_ms, shard_of(tenant, options.shards), []
    for made in range(1, requests + 1):
        clock.set(now_ms - 59_999 + made * 59_999 // requests)
        operations.append(reserve_operation(context, tenant))
        if len(operations) == max(1, min(100, requests // 600)) or made == requests:
            driver.call(Batch("reserve", shard, None, operations))
            operations = []


def _pool_of(kind: Any, url: str) -> Any:
    """Makes connections like those of a meter."""
    timeout_s = StoreOptions().timeout_ms / 1000
    return kind.from_url(url, protocol=2, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)


class Lineup:
    """Makes the contenders of one run, and checks that each of them really decides.

    Args:
        server: what is emptied between turns.
        url: where everybody connects to.
        runner: the event loop of those that need one.
        own: what this lineup's keys begin with, where several use a server at the same time.
    """

    def __init__(self, server: Any, url: str, runner: asyncio.Runner, own: str = "") -> None:
        self.server = server
        self.url = url
        self.runner = runner
        self.contenders: list[Contender] = []
        self._closing: list[Callable[[], Any]] = []
        self._prefixes = (f"{own}bench{number}" for number in count())

    def gather(self, task_counts: tuple[int, ...]) -> list[Contender]:
        """All contenders; `task_counts` without 0, which stands for no asyncio."""
        self._sync()
        for tasks in task_counts:
            self._async(tasks)
        return self.contenders

    def gather_async(self, tasks: int) -> list[Contender]:
        """Those of one number of tasks."""
        self._async(tasks)
        return self.contenders

    def close(self) -> None:
        """Close every client."""
        for close in reversed(self._closing):
            with suppress(redis.RedisError):
                answer = close()
                if answer is not None:
                    self.runner.run(answer)

    def _add(self, name: str, library: str, tasks: int, operation: Callable[[], Any], **more: Any) -> None:
        self.contenders.append(Contender(name, library, tasks, operation, **more))

    # -- without asyncio

    def _sync(self) -> None:
        client: Any = redis.Redis.from_url(self.url)
        self._closing.append(client.close)
        sha = client.script_load(NO_OP)
        self._add("PING", "bare", 0, client.ping, commands=("ping",))
        send = client.execute_command
        self._add("EVALSHA no-op", "bare", 0, lambda: send("EVALSHA", sha, len(NO_OP_KEYS), *NO_OP_KEYS) == [])
        wire = DirectWire(_pool_of(redis.BlockingConnectionPool, self.url))
        self._closing.append(wire.close)
        no_op = ("EVALSHA", sha, len(NO_OP_KEYS), *NO_OP_KEYS)
        self._add(BY_WIRE, "bare", 0, lambda: wire.ask(no_op) == [])
        words = self._reserve_words()
        self._add("EVALSHA no-op, reserve's arguments", "bare", 0, lambda: send("EVALSHA", sha, *words) == [])
        self._sync_meterlib()
        for library, name, make in (
            ("limits", "limits, sliding window counter", self._limits_sync),
            ("throttled", "throttled-py, sliding window", self._throttled_sync),
        ):
            check_sync(name, make)
            decide = make(AMPLE)
            self._add(name, library, 0, partial(decide, "acme", TOKENS))

    def _sync_meterlib(self) -> None:
        check_sync("meterlib", self._meterlib_sync)
        meter, prepare = self._meter(Meter)

        def take() -> bool:
            meter.reserve("acme", ATTRIBUTES, Usage(input_tokens=TOKENS))
            return True

        def take_and_settle() -> bool:
            held = meter.reserve("acme", ATTRIBUTES, Usage(input_tokens=TOKENS))
            held.settle(Usage(input_tokens=1000, output_tokens=200))
            return True

        def be_denied() -> bool:
            try:
                meter.reserve("denied", ATTRIBUTES, Usage(input_tokens=TOKENS))
            except QuotaExceeded:
                return False
            return True

        tenants = in_turn()

        def take_for_any() -> bool:
            meter.reserve(next(tenants), ATTRIBUTES, Usage(input_tokens=TOKENS))
            return True

        self._add("meterlib reserve", "meterlib", 0, take, prepare=prepare)
        self._add(f"meterlib reserve{MANY}", "meterlib", 0, take_for_any)
        self._add("meterlib reserve, denied", "meterlib", 0, be_denied, admits=False, prepare=prepare)
        self._add("meterlib reserve + settle", "meterlib", 0, take_and_settle, prepare=prepare)

    def _meterlib_sync(self, quotas: Quotas) -> Decide:
        options = StoreOptions(prefix=next(self._prefixes))
        meter = Meter.connect(self.url, policy_of(quotas), options=options, sweep_interval_ms=0)
        self._closing.append(meter.close)

        def decide(tenant: str, tokens: int) -> bool:
            try:
                meter.reserve(tenant, ATTRIBUTES, Usage(input_tokens=tokens))
            except QuotaExceeded:
                return False
            return True

        return decide

    def _limits_sync(self, quotas: Quotas) -> Decide:
        from limits import RateLimitItemPerMinute
        from limits.storage import RedisStorage
        from limits.strategies import SlidingWindowCounterRateLimiter

        storage = RedisStorage(self.url, key_prefix=next(self._prefixes))
        self._closing.append(storage.storage.close)
        hit = SlidingWindowCounterRateLimiter(storage).hit
        requests = RateLimitItemPerMinute(quotas.requests, namespace="requests")
        tokens = RateLimitItemPerMinute(quotas.tokens, namespace="tokens")
        return lambda tenant, amount: hit(requests, tenant) and hit(tokens, tenant, cost=amount)

    def _throttled_sync(self, quotas: Quotas) -> Decide:
        from throttled import RedisStore, Throttled, per_min

        store = RedisStore(server=self.url)
        prefix = next(self._prefixes)
        requests, tokens = (
            Throttled(using="sliding_window", quota=per_min(quota), store=store, key_prefix=f"{prefix}{unit}")
            for unit, quota in (("requests", quotas.requests), ("tokens", quotas.tokens))
        )
        return lambda tenant, amount: not requests.limit(tenant).limited and not tokens.limit(tenant, amount).limited

    # -- with asyncio

    def _async(self, tasks: int) -> None:
        self.runner.run(self._async_bare(tasks))
        self._async_meterlib(tasks)
        for library, name, make in (
            ("limits", "limits, sliding window counter", self._limits_async),
            ("throttled", "throttled-py, sliding window", self._throttled_async),
        ):
            self.runner.run(check_async(name, partial(make, blocking=False)))
            decide, notes = self._with_pool(tasks, make)
            self._add(name, library, tasks, partial(decide, "acme", TOKENS), notes=notes)
            if tasks > 1:
                self._add(name + MANY, library, tasks, for_any(decide), notes=notes)

    def _with_pool(self, tasks: int, make: Callable[..., Any]) -> tuple[Decide, list[str]]:
        """The library with its own pool; where that is too small for so many tasks, with a blocking one."""
        decide = make(AMPLE, blocking=False)
        try:
            self.runner.run(all_at_once(lambda: decide("acme", TOKENS), tasks))
            return decide, []
        except Exception as error:
            if not isinstance(error.__cause__ or error, MaxConnectionsError):
                raise
        return make(AMPLE, blocking=True), [f"MaxConnectionsError with its own pool; blocking pool of {POOL}"]

    async def _async_bare(self, tasks: int) -> None:
        notes = []
        client: Any = redis.asyncio.Redis.from_url(self.url)
        try:
            await all_at_once(client.ping, tasks)
        except MaxConnectionsError:
            await client.aclose()
            client = redis.asyncio.Redis(connection_pool=self._blocking_pool())
            notes = [f"MaxConnectionsError with redis-py's own pool; blocking pool of {POOL}"]
        self._closing.append(client.aclose)
        sha = await client.script_load(NO_OP)

        async def no_op() -> bool:
            return bool(await client.execute_command("EVALSHA", sha, len(NO_OP_KEYS), *NO_OP_KEYS) == [])

        self._add("PING", "bare", tasks, client.ping, commands=("ping",), notes=notes)
        self._add("EVALSHA no-op", "bare", tasks, no_op, notes=notes)
        wire = AsyncDirectWire(_pool_of(redis.asyncio.BlockingConnectionPool, self.url), StoreOptions().timeout_ms)
        self._closing.append(wire.aclose)

        async def no_op_by_wire() -> bool:
            return bool(await wire.ask(("EVALSHA", sha, len(NO_OP_KEYS), *NO_OP_KEYS)) == [])

        self._add(BY_WIRE, "bare", tasks, no_op_by_wire)

    def _async_meterlib(self, tasks: int) -> None:
        self.runner.run(check_async("meterlib", self._meterlib_async))
        meter, prepare = self._meter(AsyncMeter)

        async def take() -> bool:
            await meter.reserve("acme", ATTRIBUTES, Usage(input_tokens=TOKENS))
            return True

        async def take_and_settle() -> bool:
            held = await meter.reserve("acme", ATTRIBUTES, Usage(input_tokens=TOKENS))
            await held.settle(Usage(input_tokens=1000, output_tokens=200))
            return True

        async def take_of(tenant: str, tokens: int) -> bool:
            await meter.reserve(tenant, ATTRIBUTES, Usage(input_tokens=tokens))
            return True

        async def take_and_settle_of(tenant: str, tokens: int) -> bool:
            held = await meter.reserve(tenant, ATTRIBUTES, Usage(input_tokens=tokens))
            await held.settle(Usage(input_tokens=1000, output_tokens=200))
            return True

        self._add("meterlib reserve", "meterlib", tasks, take, prepare=prepare)
        self._add("meterlib reserve + settle", "meterlib", tasks, take_and_settle, prepare=prepare)
        if tasks > 1:
            self._add(f"meterlib reserve{MANY}", "meterlib", tasks, for_any(take_of))
            self._add(f"meterlib reserve + settle{MANY}", "meterlib", tasks, for_any(take_and_settle_of))

    def _meterlib_async(self, quotas: Quotas) -> Decide:
        options = StoreOptions(prefix=next(self._prefixes))
        meter = AsyncMeter.connect(self.url, policy_of(quotas), options=options, sweep_interval_ms=0)
        self._closing.append(meter.aclose)

        async def decide(tenant: str, tokens: int) -> bool:
            try:
                await meter.reserve(tenant, ATTRIBUTES, Usage(input_tokens=tokens))
            except QuotaExceeded:
                return False
            return True

        return decide

    def _limits_async(self, quotas: Quotas, *, blocking: bool) -> Decide:
        from limits import RateLimitItemPerMinute
        from limits.aio.storage import RedisStorage
        from limits.aio.strategies import SlidingWindowCounterRateLimiter

        more: dict[str, Any] = {"connection_pool": self._blocking_pool()} if blocking else {}
        prefix = next(self._prefixes)
        storage: Any = RedisStorage(f"async+{self.url}", implementation="redispy", key_prefix=prefix, **more)
        self._closing.append(storage.bridge.get_connection().aclose)
        hit = SlidingWindowCounterRateLimiter(storage).hit
        requests = RateLimitItemPerMinute(quotas.requests, namespace="requests")
        tokens = RateLimitItemPerMinute(quotas.tokens, namespace="tokens")

        async def decide(tenant: str, amount: int) -> bool:
            return await hit(requests, tenant) and await hit(tokens, tenant, cost=amount)

        return decide

    def _throttled_async(self, quotas: Quotas, *, blocking: bool) -> Decide:
        from throttled import per_min
        from throttled.asyncio import RedisStore, Throttled

        options: dict[str, Any] = {"REUSE_CONNECTION": False}
        if blocking:
            options["CONNECTION_POOL_CLASS"] = "redis.asyncio.BlockingConnectionPool"
            options["CONNECTION_POOL_KWARGS"] = {"max_connections": POOL}
        store = RedisStore(server=self.url, options=options)
        prefix = next(self._prefixes)
        requests, tokens = (
            Throttled(using="sliding_window", quota=per_min(quota), store=store, key_prefix=f"{prefix}{unit}")
            for unit, quota in (("requests", quotas.requests), ("tokens", quotas.tokens))
        )

        async def decide(tenant: str, amount: int) -> bool:
            return not (await requests.limit(tenant)).limited and not (await tokens.limit(tenant, amount)).limited

        return decide

    # -- for both

    def _meter(self, face: type[Any]) -> tuple[Any, Callable[[], None]]:
        """A meter, and what fills a tenant's windows: a busy tenant, with something in every sub-window.

        It has no background sweep, whose calls would be counted in other contenders' turns.
        """
        prefix = next(self._prefixes)
        meter = face.connect(self.url, policy_of(AMPLE), options=StoreOptions(prefix=prefix), sweep_interval_ms=0)
        self._closing.append(meter.close if face is Meter else meter.aclose)

        def prepare() -> None:
            seconds, microseconds = self.server.time()
            now_ms = seconds * 1000 + microseconds // 1000
            for tenant in ("acme", "denied"):
                fill_window(self.server, prefix, tenant, 120 if tenant == "acme" else 1, Clock(now_ms))

        return meter, prepare

    def _blocking_pool(self) -> Any:
        return redis.asyncio.BlockingConnectionPool.from_url(self.url, max_connections=POOL)

    def _reserve_words(self) -> list[Any]:
        """What a reserve sends behind its script's name."""
        context = Context(policy_of(AMPLE), StoreOptions(), None, "deny")
        call = packed((layout(StoreOptions().shards), 0, 2, 24 * 3_600_000))
        return [len(NO_OP_KEYS), *NO_OP_KEYS, call, reserve_operation(context, "acme").packed()]


def in_turn() -> Iterator[str]:
    """A thousand tenants, one after the other, and again."""
    return cycle([f"tenant-{number}" for number in range(TENANTS)])


def for_any(decide: Decide) -> Callable[[], Any]:
    """The same decision, each time about the next tenant's call."""
    tenants = in_turn()
    return lambda: decide(next(tenants), TOKENS)


TRIALS = (  # quotas, the tokens of the calls that follow each other, and which of them have to pass
    (Quotas(3, 100_000), (10, 10, 10, 10), [True, True, True, False]),
    (Quotas(100, 1000), (600, 600), [True, False]),
)


def check_sync(name: str, make: Callable[[Quotas], Decide]) -> None:
    """Raise WrongDecisionError unless a contender denies what exceeds its requests, and what exceeds its tokens."""
    for quotas, calls, right in TRIALS:
        for tries_left in (1, 0):  # peers that count by the clock's minutes may rightly differ when one begins
            decide = make(quotas)
            found = [decide("checked", tokens) for tokens in calls]
            if found == right:
                break
            if not tries_left:
                raise WrongDecisionError(f"{name} decides {found} instead of {right}")


async def check_async(name: str, make: Callable[[Quotas], Decide]) -> None:
    """As `check_sync`."""
    for quotas, calls, right in TRIALS:
        for tries_left in (1, 0):
            decide = make(quotas)
            found = [await decide("checked", tokens) for tokens in calls]
            if found == right:
                break
            if not tries_left:
                raise WrongDecisionError(f"{name} (asyncio) decides {found} instead of {right}")
