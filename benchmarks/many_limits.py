"""What a call costs by the number of limits it touches: `python -m benchmarks.many_limits`.

meterlib decides all limits of a call in one script call; peers take one call for each. One client, no asyncio. Before
any timing each of them has to deny what only its last limit forbids.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import count
from typing import Any

import redis

from benchmarks.common import parser_of, server_of, show, table_of
from benchmarks.contenders import ATTRIBUTES, NO_OP, NO_OP_KEYS, PLENTY, TOKENS
from benchmarks.measure import Contender, Slice, WrongDecisionError, over_rounds, ratio, run_rounds
from meterlib import Limit, Meter, Policy, QuotaExceeded, StoreOptions, Usage

COUNTS = (1, 2, 4, 8, 16)
BARE = "EVALSHA no-op"
PEERS = ("limits", "throttled-py")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 0."""
    options = parser_of("many_limits", __doc__, seconds="how long altogether (30; 4 with --quick)").parse_args(
        arguments
    )
    rounds, seconds = (2, options.seconds or 4) if options.quick else (7, options.seconds or 30)
    with ExitStack() as end:
        url = end.enter_context(server_of(options.server))
        server = end.enter_context(closing(redis.Redis.from_url(url)))
        runner = end.enter_context(asyncio.Runner())
        contenders = [_bare(server)]
        prefixes = (f"many{number}" for number in count())
        for limits in COUNTS:
            for make in (_ours, _limits, _throttled):
                _check(make(url, [PLENTY] * (limits - 1) + [2 * TOKENS], next(prefixes), end))
                contenders.append(make(url, [PLENTY] * limits, next(prefixes), end))
        slices = run_rounds(server, contenders, runner, rounds, seconds, lambda made, contender: None)
    _show({contender.name: slices[at] for at, contender in enumerate(contenders)})
    return 0


def _bare(server: Any) -> Contender:
    sha, send = server.script_load(NO_OP), server.execute_command
    return Contender(BARE, "bare", 0, lambda: send("EVALSHA", sha, len(NO_OP_KEYS), *NO_OP_KEYS) == [])


def _check(contender: Contender) -> None:
    """Raise WrongDecisionError unless it admits two calls, and denies the third."""
    for tries_left in (1, 0):  # whoever counts by the clock's minutes may rightly differ when one begins
        found = [contender.operation() for _ in range(3)]
        if found == [True, True, False]:
            return
        if not tries_left:
            raise WrongDecisionError(f"{contender.name} decides {found}")


def _ours(url: str, quotas: Sequence[int], prefix: str, end: ExitStack) -> Contender:
    policy = Policy(
        limits=tuple(
            Limit(name=f"tokens-{at}", unit="input_tokens", quota=quota, window="1m", per=("provider",))
            for at, quota in enumerate(quotas)
        )
    )
    meter = end.enter_context(Meter.connect(url, policy, options=StoreOptions(prefix=prefix), sweep_interval_ms=0))

    def take() -> bool:
        try:
            meter.reserve("acme", ATTRIBUTES, Usage(input_tokens=TOKENS))
        except QuotaExceeded:
            return False
        return True

    return Contender(f"meterlib {len(quotas)}", "meterlib", 0, take)


def _limits(url: str, quotas: Sequence[int], prefix: str, end: ExitStack) -> Contender:
    from limits import RateLimitItemPerMinute
    from limits.storage import RedisStorage
    from limits.strategies import SlidingWindowCounterRateLimiter

    storage = RedisStorage(url, key_prefix=prefix)
    end.callback(storage.storage.close)
    hit = SlidingWindowCounterRateLimiter(storage).hit
    items = [RateLimitItemPerMinute(quota, namespace=f"tokens-{at}") for at, quota in enumerate(quotas)]
    checks = [partial(hit, item, "acme", cost=TOKENS) for item in items]
    return Contender(f"limits {len(quotas)}", "limits", 0, partial(_all, checks))


def _throttled(url: str, quotas: Sequence[int], prefix: str, _: ExitStack) -> Contender:
    from throttled import RedisStore, Throttled, per_min

    store = RedisStore(server=url)
    throttled = [
        Throttled(using="sliding_window", quota=per_min(quota), store=store, key_prefix=f"{prefix}tokens-{at}")
        for at, quota in enumerate(quotas)
    ]
    checks = [lambda each=each: not each.limit("acme", TOKENS).limited for each in throttled]
    return Contender(f"throttled-py {len(quotas)}", "throttled", 0, partial(_all, checks))


def _all(checks: Sequence[Callable[[], bool]]) -> bool:
    return all(check() for check in checks)


def _show(slices: dict[str, list[Slice]]) -> None:
    columns = ("p50 µs", "/ bare", "/ one limit", "server µs", "round trips", "limits /", "throttled-py /")
    table = table_of("A call by the number of its limits; the last two: the peers' time / ours", "limits", *columns)
    for limits in COUNTS:
        own = slices[f"meterlib {limits}"]
        numbers = [
            f"{over_rounds(own, 'p50_us'):,.0f}",
            f"{ratio(own, slices[BARE]):.2f}",
            f"{ratio(own, slices['meterlib 1']):.2f}",
            f"{over_rounds(own, 'server_us'):.1f}",
            f"{over_rounds(own, 'round_trips'):.0f}",
        ]
        table.add_row(str(limits), *numbers, *(f"{ratio(slices[f'{peer} {limits}'], own):.2f}" for peer in PEERS))
    show(table)


if __name__ == "__main__":
    sys.exit(main())
