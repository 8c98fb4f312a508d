"""A primary that sentinels watch: every verb, and failovers while calls are made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis
import redis.asyncio.sentinel
import redis.sentinel

from meterlib import AsyncMeter, Meter, StoreOptions
from tests.store.test_clients import KINDS, one_of_each, one_of_each_async
from tests.store.test_clients import POLICY as PRESET
from tests.store.topologies import Sentinels, ask
from tests.store.traffic import CALL, HELD, POLICY, TENANTS, Traffic
from tests.support.servers import Server, available, start_server, wait_until

FACES = ["url", "client", "async url", "async client"]
OPTIONS = StoreOptions(prefix="s")
TICK_MS = 1600
"""How long a background sweep takes for all shards in these tests: it looks for the primary at each of sixteen."""


def needs(kind: str) -> None:
    reason = available(kind)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module", params=["valkey", "redis"])
def sentinels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sentinels]:
    """A primary, a replica and a sentinel that stay as they are."""
    needs(request.param)
    with Sentinels(tmp_path_factory.mktemp("sentinel"), request.param, count=1) as running:
        yield running


def sync_client(sentinels: Sentinels) -> Any:
    """What a gateway that knows redis-py has already."""
    sentinel: Any = redis.sentinel.Sentinel
    return sentinel(sentinels.addresses).master_for(sentinels.service)


def async_client(sentinels: Sentinels) -> Any:
    sentinel: Any = redis.asyncio.sentinel.Sentinel
    return sentinel(sentinels.addresses).master_for(sentinels.service)


def close(client: Any) -> None:
    for each in (client, *client.connection_pool.sentinel_manager.sentinels):
        each.close()


@pytest.mark.parametrize("face", FACES)
def test_every_verb_works_on_a_primary_that_sentinels_name(sentinels: Sentinels, face: str) -> None:
    """By the URL of the sentinels, or by a client that asks them."""
    ask(sentinels.primary, "FLUSHALL")

    async def awaited() -> list[Any]:
        meter: Any = sentinels.url if face == "async url" else async_client(sentinels)
        async with AsyncMeter(meter, PRESET) as own:
            entries = await one_of_each_async(own)
        if face == "async client":
            for client in (meter, *meter.connection_pool.sentinel_manager.sentinels):
                await client.aclose()
        return entries

    if face.startswith("async"):
        entries = asyncio.run(awaited())
    else:
        client: Any = sentinels.url if face == "url" else sync_client(sentinels)
        with Meter(client, PRESET) as meter:
            entries = one_of_each(meter)
        if face == "client":
            close(client)

    assert KINDS == [(entry.reservation_id, entry.kind) for entry in entries]


# ── Failovers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def through(face: str, sentinels: Sentinels, traffic: Traffic, meanwhile: Callable[[], None]) -> None:
    """Calls by this face while something happens."""
    if face == "async":
        traffic.through_async(
            lambda: AsyncMeter.connect(sentinels.url, POLICY, options=OPTIONS, sweep_interval_ms=TICK_MS), meanwhile
        )
    elif face == "async client":
        traffic.through_async(lambda: on_client(sentinels), meanwhile)
    elif face == "sync":
        with Meter.connect(sentinels.url, POLICY, options=OPTIONS, sweep_interval_ms=TICK_MS) as meter:
            traffic.through(meter, meanwhile)
    else:
        client = sync_client(sentinels)
        with Meter(client, POLICY, options=OPTIONS, sweep_interval_ms=TICK_MS) as meter:
            traffic.through(meter, meanwhile)
        close(client)


@asynccontextmanager
async def on_client(sentinels: Sentinels) -> AsyncIterator[AsyncMeter]:
    client = async_client(sentinels)
    async with AsyncMeter(client, POLICY, options=OPTIONS, sweep_interval_ms=TICK_MS) as meter:
        yield meter
    for each in (client, *client.connection_pool.sentinel_manager.sentinels):
        await each.aclose()


def survive(face: str, kind: str, folder: Path, happens: Callable[[Sentinels], None]) -> None:
    needs(kind)
    traffic = Traffic()
    with Sentinels(folder, kind) as sentinels:

        def meanwhile() -> None:
            traffic.more(200)
            happens(sentinels)
            traffic.more(len(TENANTS) * 3)

        through(face, sentinels, traffic, meanwhile)
        with Meter.connect(sentinels.url, POLICY, options=OPTIONS) as meter:
            traffic.settle_again(meter)
            traffic.check(meter, lost=True)


@pytest.mark.parametrize("face", ["sync", "async"])
def test_a_primary_dies_while_calls_are_made(tmp_path: Path, face: str) -> None:
    """Calls fail or wait meanwhile, go on by themselves, and no usage is booked twice.

    What the dead primary had not yet told its replica is lost; whoever settles once more has it booked, late.
    """
    survive(face, "valkey", tmp_path, Sentinels.lose_primary)


@pytest.mark.parametrize("face", ["sync", "async"])
def test_an_operator_fails_over_while_calls_are_made(tmp_path: Path, face: str) -> None:
    """As when a machine is taken out of service: the old primary is well, and becomes the replica."""
    survive(face, "valkey", tmp_path, Sentinels.failover)


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["valkey", "redis"])
@pytest.mark.parametrize("face", ["sync", "client", "async", "async client"])
@pytest.mark.parametrize("happens", [Sentinels.lose_primary, Sentinels.failover], ids=["dies", "told"])
def test_any_client_on_any_server_survives_a_failover(
    tmp_path: Path, face: str, kind: str, happens: Callable[[Sentinels], None]
) -> None:
    """Ready-made clients as well, and Redis 7."""
    survive(face, kind, tmp_path, happens)


class Replaced(NamedTuple):
    """A primary, another one that is to take its place by the sentinel's word alone, and how to have that happen."""

    one: Server
    other: Server
    url: str
    replace: Callable[[], None]


@pytest.fixture
def replaced(tmp_path: Path) -> Iterator[Replaced]:
    needs("valkey")
    with (
        start_server(tmp_path / "one", "valkey") as one,
        start_server(tmp_path / "other", "valkey") as other,
        start_server(
            tmp_path / "sentinel", "valkey", sentinel=True, config={"sentinel monitor": f"main 127.0.0.1 {one.port} 1"}
        ) as watcher,
    ):

        def replace() -> None:
            ask(watcher, "SENTINEL", "REMOVE", "main")
            ask(watcher, "SENTINEL", "MONITOR", "main", "127.0.0.1", other.port, 1)

        yield Replaced(one, other, f"redis+sentinel://127.0.0.1:{watcher.port}/main", replace)


@pytest.mark.parametrize("face", ["sync", "async"])
def test_a_primary_that_was_replaced_is_left_though_it_still_answers(replaced: Replaced, face: str) -> None:
    """What it would be told would be lost as soon as it learns that it is a replica."""
    one, other, url, replace = replaced
    if face == "sync":
        with Meter.connect(url, POLICY, options=OPTIONS, sweep_interval_ms=TICK_MS) as meter:
            meter.reserve("acme", CALL, HELD)
            replace()
            wait_until(lambda: reached(other, lambda: meter.reserve("acme", CALL, HELD)), "the other one")
    else:
        asyncio.run(follow(url, replace, other))
    assert 0 < ask(one, "DBSIZE")


@pytest.mark.parametrize("face", ["sync", "async"])
def test_connections_in_use_leave_a_primary_that_was_replaced_too(replaced: Replaced, face: str) -> None:
    """Of a busy gateway, some always are while the sentinels are asked."""
    _, other, url, replace = replaced

    async def busy() -> None:
        async with AsyncMeter.connect(url, POLICY, options=OPTIONS, sweep_interval_ms=0) as meter:
            await meter.reserve("acme", CALL, HELD)
            pool = meter._driver.client.connection_pool
            used = await pool.get_connection()
            replace()
            await meter._driver.follow()
            await pool.release(used)
            await meter.reserve("acme", CALL, HELD)

    if face == "async":
        asyncio.run(busy())
    else:
        with Meter.connect(url, POLICY, options=OPTIONS, sweep_interval_ms=0) as meter:
            meter.reserve("acme", CALL, HELD)
            pool = meter._driver.client.connection_pool
            used = pool.get_connection()
            replace()
            meter._driver.follow()
            pool.release(used)
            meter.reserve("acme", CALL, HELD)
    assert 0 < ask(other, "DBSIZE")


def reached(server: Server, act: Callable[[], object]) -> bool:
    act()
    return bool(ask(server, "DBSIZE") > 0)


async def follow(url: str, replace: Callable[[], None], other: Server) -> None:
    async with AsyncMeter.connect(url, POLICY, options=OPTIONS, sweep_interval_ms=TICK_MS) as meter:
        await meter.reserve("acme", CALL, HELD)
        await asyncio.to_thread(replace)
        async with asyncio.timeout(30):
            while not ask(other, "DBSIZE"):
                await meter.reserve("acme", CALL, HELD)
                await asyncio.sleep(0.01)
