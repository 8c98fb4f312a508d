"""What tenants, reservations and ledger entries take on the server, and a window as requests fill it.

`python -m benchmarks.memory`: with 100,000 tenants. What a million would take is ten times as much.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import redis
from rich.table import Table

from benchmarks.common import parser_of, server_of, show, table_of
from benchmarks.contenders import AMPLE, ATTRIBUTES, PLENTY, TOKENS, fill_window, policy_of
from meterlib import Meter, Usage
from meterlib.core.policy import window_field
from meterlib.store.keys import shard_keys, shard_of
from meterlib.store.options import StoreOptions
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 0."""
    parser = parser_of("memory", __doc__)
    parser.add_argument("--tenants", type=int, default=100_000, help="how many tenants make a call each (100,000)")
    options = parser.parse_args(arguments)
    tenants, fills = (2_000, (10, 1000)) if options.quick else (options.tenants, (10, 1000, 100_000))
    with server_of(options.server) as url, closing(redis.Redis.from_url(url)) as server:
        sizes, made = list(window_sizes(server, url, fills)), footprints(server, url, tenants)
    show(windows_table(sizes), footprints_table(made, tenants))
    return 0


def windows_table(sizes: Sequence[WindowSize]) -> Table:
    """Windows side by side, by how many requests are in them."""
    fills = sorted({size.requests for size in sizes})
    table = table_of("One limit's window of a minute, with so many requests in it", "bytes", *(f"{n:,}" for n in fills))
    for limiter in dict.fromkeys(size.limiter for size in sizes):
        own = {size.requests: size for size in sizes if size.limiter == limiter}
        table.add_row(limiter, *(f"{own[fill].bytes_used:,}" for fill in fills))
        if own[fills[0]].entries is not None:
            table.add_row("  its sub-windows in use", *(str(own[fill].entries) for fill in fills))
            table.add_row("  server µs of a reserve (two limits)", *(f"{own[fill].server_us:.1f}" for fill in fills))
    return table


def footprints_table(made: Sequence[Footprint], tenants: int) -> Table:
    """What one of each takes, and how that compares with our limit of one partition."""
    title = f"Bytes on the server, all overhead included; {tenants:,} tenants with a call each"
    table = table_of(title, "one of", "bytes", "/ ours")
    for footprint in made:
        table.add_row(
            footprint.what, f"{footprint.bytes_each:,.0f}", f"{footprint.bytes_each / made[0].bytes_each:.2f}"
        )
    return table


def footprints(server: Any, url: str, tenants: int = TENANTS) -> list[Footprint]:
    """Bytes per partition, reservation and entry, measured with so many tenants that made one call each."""
    server.flushdb()
    options = StoreOptions(prefix="bytes")
    found: list[Footprint] = []
    with Meter.connect(url, policy_of(AMPLE), options=options, clock=Clock(NOW_MS)) as meter:
        held = [meter.reserve(f"tenant-{at}", ATTRIBUTES, Usage(input_tokens=TOKENS)) for at in range(tenants)]
        keys = zip(*(shard_keys("bytes", at) for at in range(options.shards)), strict=True)
        states, leases, ended, ledgers, ends = keys
        windows = _copied(server, states, "w/") + _bytes(server, ends)
        found.append(Footprint("meterlib: one limit of one partition (a window, one entry)", windows / tenants / 2))
        found.append(Footprint("meterlib: an idle tenant with two limits", windows / tenants))
        records = _copied(server, states, "r/") + _bytes(server, leases)
        found.append(Footprint("meterlib: an open reservation (record and lease)", records / tenants))
        for reservation in held:
            reservation.settle(Usage(input_tokens=1000, output_tokens=200))
        records = _copied(server, states, "r/") + _bytes(server, ended)
        found.append(Footprint("meterlib: the memory of an ended reservation (24 h)", records / tenants))
        found.append(Footprint("meterlib: a ledger entry", _bytes(server, ledgers) / tenants))
    for name, make in (("limits", _limits_counter), ("throttled-py", _throttled_counter)):
        server.flushdb()
        hit = make(url)
        for at in range(tenants):
            hit(f"tenant-{at}", 1)
        found.append(Footprint(f"{name}: one limit of one partition (first minute)", _all_bytes(server) / tenants))
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


if __name__ == "__main__":
    sys.exit(main())
