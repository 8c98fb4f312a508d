"""Windows that are over make room, however many tenants come and go, and whatever else a shard remembers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from meterlib import AsyncMeter, Limit, Meter, Policy, StoreOptions, Usage
from meterlib.store import flows
from meterlib.store.keys import shard_keys
from meterlib.testing import Clock
from tests.support.servers import Server

PARTITIONS = 10_000
POLICY = Policy(
    limits=(
        Limit(name="requests", quota=1000, window="1m"),
        Limit(name="input_tokens", unit="input_tokens", quota=100_000, window="1m"),
        Limit(name="month", unit="output_tokens", quota=100_000, period="month"),
    )
)
OPTIONS = StoreOptions(shards=4, prefix="dead", deadline_ms=120_000)
USED = Usage(input_tokens=100, output_tokens=7)
STATES, WINDOWS = zip(*((keys[0], keys[4]) for keys in (shard_keys("dead", at) for at in range(4))), strict=True)


@pytest.fixture
def client(valkey: Server) -> Iterator[redis.Redis]:
    with valkey.client() as client:
        client.flushall()
        yield client


@pytest.fixture
def clock() -> Clock:
    return Clock(1_790_000_000_000)


def one_call_each(url: str, clock: Clock, tenants: range) -> None:
    """Each of these tenants makes one call: three windows, and an id that is remembered for a day."""

    async def record() -> None:
        async with AsyncMeter.connect(url, POLICY, options=OPTIONS, clock=clock) as meter:
            await asyncio.gather(*(meter.record(f"t{at}", {}, USED, record_id="only") for at in tenants))

    asyncio.run(record())


def windows_of(client: Any) -> list[bytes]:
    """The fields of all windows there are, with their logs."""
    return [name for state in STATES for name in client.hkeys(state) if name.startswith((b"w/", b"l/"))]


def script_calls(client: Any, act: Callable[[], object]) -> int:
    client.config_resetstat()
    act()
    return int(client.info("commandstats")["cmdstat_evalsha"]["calls"])


def test_ten_thousand_partitions_that_ended_are_gone_after_one_sweep(valkey: Server, client: Any, clock: Clock) -> None:
    """Operator: what customers of a minute ago left takes no memory, nor many calls to clear away."""
    one_call_each(valkey.url, clock, range(PARTITIONS))
    assert 3 * PARTITIONS == len(windows_of(client))
    # Beside the window itself (some 90 bytes) this is all that it takes to find it again when it is over.
    assert sum(client.memory_usage(key, samples=0) for key in WINDOWS) <= 130 * 3 * PARTITIONS

    clock.advance(ms=61_000)
    with Meter.connect(valkey.url, POLICY, options=OPTIONS, clock=clock) as meter:
        calls = script_calls(client, meter.sweep)

        assert calls <= 2 * PARTITIONS / flows.WINDOWS_PIECE + len(STATES)
        assert all(name.startswith(b"w/t") and b"/month/" in name for name in windows_of(client))
        assert PARTITIONS == sum(client.zcard(key) for key in WINDOWS)
        assert len(STATES) == script_calls(client, meter.sweep), "what is alive was looked at again"

        clock.advance(ms=31 * 86_400_000)
        meter.sweep()

        assert [] == windows_of(client)
        assert 0 == client.exists(*WINDOWS)


def test_a_background_sweep_keeps_up_with_a_thousand_new_partitions_a_second(
    valkey: Server, client: Any, clock: Clock
) -> None:
    """Each shard's turn, once in ten seconds, clears what ended in the meantime, and more, in bounded pieces."""
    one_call_each(valkey.url, clock, range(PARTITIONS))
    clock.advance(ms=61_000)
    with Meter.connect(valkey.url, POLICY, options=OPTIONS, clock=clock) as meter:
        for shard in range(len(STATES)):
            swept = meter._run(flows.sweep_shard(shard, flows.PIECES_MAX))

            assert swept.windows_dropped > 2 * PARTITIONS / len(STATES) * 0.9
    assert PARTITIONS == len(windows_of(client))


def test_a_window_in_use_is_looked_at_once_a_span_and_stays(valkey: Server, client: Any, clock: Clock) -> None:
    """A busy tenant's window is not dropped, nor does the sweep come back to it more often than it could end."""
    with Meter.connect(valkey.url, POLICY, options=OPTIONS, clock=clock) as meter:
        looked_at = 0
        for _ in range(600):
            meter.record("busy", {}, USED)
            clock.advance(ms=1000)
            before = ends_of(client)
            assert 0 == meter.sweep().windows_dropped
            looked_at += ends_of(client) != before

        assert looked_at <= 11
        assert [60, 6000] == [state.used // 10 * 10 for state in meter.peek("busy")[:2]]


def ends_of(client: Any) -> list[Any]:
    return [client.zrange(key, 0, -1, withscores=True) for key in WINDOWS]


def test_a_window_that_comes_back_after_it_was_dropped_is_dropped_again(
    valkey: Server, client: Any, clock: Clock
) -> None:
    """Once found to be over does not mean forgotten for ever."""
    with Meter.connect(valkey.url, POLICY, options=OPTIONS, clock=clock) as meter:
        for _ in range(3):
            meter.record("rare", {}, USED)
            clock.advance(ms=61_000)

            assert 2 == meter.sweep().windows_dropped


def test_a_piece_of_a_sweep_is_bounded(valkey: Server, client: Any, clock: Clock) -> None:
    """Nobody's call waits behind thousands of windows."""
    one_call_each(valkey.url, clock, range(2_000))
    clock.advance(ms=61_000)
    with Meter.connect(valkey.url, POLICY, options=OPTIONS, clock=clock) as meter:
        swept = meter._run(flows.sweep_shard(0, 1))

        assert flows.WINDOWS_PIECE == swept.windows_dropped


def test_a_window_is_dropped_at_the_ms_at_which_it_is_over(valkey: Server, client: Any, clock: Clock) -> None:
    """Not before, when a call might still be denied by it, and not later than it counts."""
    options = StoreOptions(shards=1, prefix="dead")
    with Meter.connect(valkey.url, POLICY, options=options, clock=clock) as meter:
        meter.record("acme", {}, USED)
        dropped = []
        for passed_ms in (60_998, 1):
            clock.advance(ms=passed_ms)
            dropped.append(meter._run(flows.sweep_shard(0, 2)).windows_dropped)

    assert [0, 2] == dropped
