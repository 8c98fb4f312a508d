"""Memory: what tenants, reservations and ledger entries take on the server, and a window as requests fill it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import redis

from benchmarks.contenders import AMPLE, ATTRIBUTES, PLENTY, TOKENS, fill_window, policy_of
from meterlib import Meter, Usage
from meterlib.core.policy import window_field
from meterlib.store.drivers import StoreOptions
from meterlib.store.keys import shard_keys, shard_of
from meterlib.testing import Clock

TENANTS = 1000
NOW_MS = 1_790_000_000_000
ENTRY_BYTES = 24
SCRATCH = "scratch"


class Footprint(NamedTuple):
    """How many bytes one of something takes on the server, the keys' and the allocator's overhead included."""

    what: str
    bytes_each: float


class WindowSize(NamedTuple):
    """A limiter with so many requests in the window; all its keys for one limit."""

    limiter: str
    requests: int
    bytes_used: int
    entries: int | None
    server_us: float | None


def footprints(server: Any, url: str) -> list[Footprint]:
    """Bytes per partition, reservation and entry, measured with 1,000 tenants that made one call each."""
    server.flushdb()
    options = StoreOptions(prefix="bytes")
    found: list[Footprint] = []
    with Meter.connect(url, policy_of(AMPLE), options=options, clock=Clock(NOW_MS)) as meter:
        held = [meter.reserve(f"tenant-{at}", ATTRIBUTES, Usage(input_tokens=TOKENS)) for at in range(TENANTS)]
        states, leases, ended, ledgers = zip(*(shard_keys("bytes", at) for at in range(options.shards)), strict=True)
        windows = _copied(server, states, "w/")
        found.append(Footprint("meterlib: one limit of one partition (a window, one entry)", windows / TENANTS / 2))
        records = _copied(server, states, "r/") + _bytes(server, leases)
        found.append(Footprint("meterlib: an open reservation (record and lease)", records / TENANTS))
        for reservation in held:
            reservation.settle(Usage(input_tokens=1000, output_tokens=200))
        records = _copied(server, states, "r/") + _bytes(server, ended)
        found.append(Footprint("meterlib: the memory of an ended reservation (24 h)", records / TENANTS))
        found.append(Footprint("meterlib: a ledger entry", _bytes(server, ledgers) / TENANTS))
    for name, make in (("limits", _limits_counter), ("throttled-py", _throttled_counter)):
        server.flushdb()
        hit = make(url)
        for at in range(TENANTS):
            hit(f"tenant-{at}", 1)
        found.append(Footprint(f"{name}: one limit of one partition (first minute)", _all_bytes(server) / TENANTS))
    return found


def window_sizes(server: Any, url: str, fills: Iterable[int]) -> Iterator[WindowSize]:
    """A window of a minute with ever more requests in it, spread over the minute where the limiter's clock can be set.

    Peers go by the machine's clock. Those that keep counters hold the same state whether a count was reached by one hit
    or by many, so they are given it at once; the exact log is given one entry a request.
    """
    for requests in fills:
        yield _own_window(server, url, requests)
        for limiter, make in (
            ("limits, sliding window counter", _limits_counter),
            ("throttled-py, sliding window", _throttled_counter),
            ("limits, moving window (exact log)", _limits_log),
        ):
            server.flushdb()
            hit = make(url)
            for _ in range(max(1, requests // 1000)):
                hit("acme", min(requests, 1000))
            yield WindowSize(limiter, requests, _all_bytes(server), None, None)


def _own_window(server: Any, url: str, requests: int) -> WindowSize:
    server.flushdb()
    clock, prefix, probes = Clock(NOW_MS), "window", 300
    fill_window(server, prefix, "acme", requests, clock)
    options = StoreOptions(prefix=prefix)
    state = shard_keys(prefix, shard_of("acme", options.shards))[0]
    policy = policy_of(AMPLE)
    field = window_field(policy.limits[0], "acme", ATTRIBUTES)
    log_field = f"l{field[1:]}"
    window, log = server.hmget(state, field, log_field)
    server.hset(SCRATCH, mapping={field: window, log_field: log})
    used = int(server.memory_usage(SCRATCH, samples=0))
    with Meter.connect(url, policy, options=options, clock=clock) as meter:
        server.config_resetstat()
        for _ in range(probes):
            meter.reserve("acme", ATTRIBUTES, Usage(input_tokens=TOKENS))
        server_us = server.info("commandstats")["cmdstat_evalsha"]["usec"] / probes
    return WindowSize("meterlib", requests, used, len(log) // ENTRY_BYTES + 1, server_us)


def _limits_counter(url: str) -> Callable[[str, int], bool]:
    from limits import RateLimitItemPerMinute
    from limits.storage import RedisStorage
    from limits.strategies import SlidingWindowCounterRateLimiter

    limiter, item = SlidingWindowCounterRateLimiter(RedisStorage(url)), RateLimitItemPerMinute(PLENTY)
    return lambda tenant, amount: limiter.hit(item, tenant, cost=amount)


def _limits_log(url: str) -> Callable[[str, int], bool]:
    from limits import RateLimitItemPerMinute
    from limits.storage import RedisStorage
    from limits.strategies import MovingWindowRateLimiter

    limiter, item = MovingWindowRateLimiter(RedisStorage(url)), RateLimitItemPerMinute(1_000_000)
    return lambda tenant, amount: limiter.hit(item, tenant, cost=amount)


def _throttled_counter(url: str) -> Callable[[str, int], bool]:
    from throttled import RedisStore, Throttled, per_min

    throttled = Throttled(using="sliding_window", quota=per_min(PLENTY), store=RedisStore(server=url))
    return lambda tenant, amount: not throttled.limit(tenant, amount).limited


def _copied(server: Any, states: Iterable[str], begins: str) -> int:
    """Bytes of those fields of all states that begin so, in hashes of their own."""
    total = 0
    for state in states:
        fields = {name: text for name, text in server.hgetall(state).items() if name.startswith(begins.encode())}
        if fields:
            server.hset(SCRATCH, mapping=fields)
            total += _bytes(server, [SCRATCH])
            server.delete(SCRATCH)
    return total


def _bytes(server: Any, keys: Iterable[str | bytes]) -> int:
    return sum(server.memory_usage(key, samples=0) or 0 for key in keys)


def _all_bytes(server: redis.Redis) -> int:
    return _bytes(server, server.scan_iter(count=1000))
