"""Whatever redis-py client a gateway has already, a meter on it works the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis
import redis.asyncio
from redis.cluster import RedisCluster

from meterlib import AsyncMeter, LedgerEntry, Meter, Policy, QuotaExceeded, StoreCorrupt, StoreOptions, Usage
from meterlib.store.connect import client_of
from meterlib.store.keys import layout_key
from tests.support.servers import Server, start_server

POLICY = Policy.preset("buildkite-anthropic")
CALL = {"provider": "anthropic", "model": "claude-sonnet-4-5"}

SYNC: dict[str, Callable[[Server], Any]] = {
    "plain": lambda server: redis.Redis(port=server.port),
    "decoding": lambda server: redis.Redis(port=server.port, decode_responses=True),
    "resp2": lambda server: redis.Redis(port=server.port, protocol=2),
    "pool of one": lambda server: redis.Redis(port=server.port, max_connections=1),
    "fakeredis": lambda server: fakeredis.FakeRedis(server=fakeredis.FakeServer()),
    "fakeredis decoding": lambda server: fakeredis.FakeRedis(server=fakeredis.FakeServer(), decode_responses=True),
}
ASYNC: dict[str, Callable[[Server], Any]] = {
    "plain": lambda server: redis.asyncio.Redis(port=server.port),
    "decoding": lambda server: redis.asyncio.Redis(port=server.port, decode_responses=True),
    "resp2": lambda server: redis.asyncio.Redis(port=server.port, protocol=2),
    "fakeredis": lambda server: fakeredis.FakeAsyncRedis(server=fakeredis.FakeServer()),
}


@pytest.fixture
def server(valkey: Server) -> Server:
    with valkey.client() as client:
        client.flushall()
    return valkey


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with start_server(tmp_path_factory.mktemp("cluster"), "valkey", cluster=True) as server:
        yield server


def one_of_each(meter: Meter) -> list[LedgerEntry]:
    """Every verb once; returns the tenant's ledger."""
    meter.reserve("acme", CALL, Usage(input_tokens=100), reservation_id="one").settle(Usage(input_tokens=90))
    reservation = meter.reserve("acme", CALL, Usage(input_tokens=100), reservation_id="two")
    reservation.revise(Usage(input_tokens=120))
    reservation.renew()
    reservation.cancel()
    recorded = meter.record("acme", CALL, Usage(input_tokens=7), record_id="three")
    meter.adjust(recorded, {"input_tokens": -3}, "counted twice", adjust_id="four")
    for _ in range(48):
        meter.reserve("acme", CALL)
    with pytest.raises(QuotaExceeded):
        meter.reserve("acme", CALL)
    meter.sweep()
    limits = {limit.name: limit.used for limit in meter.peek("acme", CALL)}

    assert {"requests": 50, "input_tokens": 97} == limits
    assert "settled" == meter.find("acme", "one").status

    return [entry for shard in range(meter.shards) for entry in meter.ledger(shard)]


async def one_of_each_async(meter: AsyncMeter) -> list[LedgerEntry]:
    """Every verb once, awaited; returns the tenant's ledger."""
    first = await meter.reserve("acme", CALL, Usage(input_tokens=100), reservation_id="one")
    await first.settle(Usage(input_tokens=90))
    second = await meter.reserve("acme", CALL, Usage(input_tokens=100), reservation_id="two")
    await second.revise(Usage(input_tokens=120))
    await second.renew()
    await second.cancel()
    recorded = await meter.record("acme", CALL, Usage(input_tokens=7), record_id="three")
    await meter.adjust(recorded, {"input_tokens": -3}, "counted twice", adjust_id="four")
    await meter.sweep()
    limits = {limit.name: limit.used for limit in await meter.peek("acme", CALL)}

    assert {"requests": 2, "input_tokens": 97} == limits
    assert "settled" == (await meter.find("acme", "one")).status

    return [entry for shard in range(meter.shards) async for entry in meter.ledger(shard)]


KINDS = [("one", "settled"), ("two", "cancelled"), ("three", "recorded"), ("four", "adjusted")]


@pytest.mark.parametrize("kind", SYNC)
def test_every_verb_works_on_any_sync_client(server: Server, kind: str) -> None:
    """A gateway brings the client it has."""
    with SYNC[kind](server) as client, Meter(client, POLICY) as meter:
        entries = one_of_each(meter)

    assert KINDS == [(entry.reservation_id, entry.kind) for entry in entries]


def test_every_verb_works_on_a_cluster(cluster: Server) -> None:
    """All keys of a call are in one slot, and the client finds its node."""
    with RedisCluster(host="127.0.0.1", port=cluster.port) as client, Meter(client, POLICY) as meter:
        entries = one_of_each(meter)

    assert KINDS == [(entry.reservation_id, entry.kind) for entry in entries]


def test_a_cluster_is_reached_by_its_url(cluster: Server) -> None:
    """redis+cluster:// names any node."""
    options = StoreOptions(prefix="by-url")
    with Meter.connect(f"redis+cluster://127.0.0.1:{cluster.port}", POLICY, options=options) as meter:
        entries = one_of_each(meter)

    assert KINDS == [(entry.reservation_id, entry.kind) for entry in entries]


@pytest.mark.parametrize("kind", ASYNC)
def test_every_verb_works_on_any_async_client(server: Server, kind: str) -> None:
    """AsyncMeter says the same as Meter, on any client."""

    async def verbs() -> list[LedgerEntry]:
        async with ASYNC[kind](server) as client, AsyncMeter(client, POLICY) as meter:
            return await one_of_each_async(meter)

    entries = asyncio.run(verbs())

    assert KINDS == [(entry.reservation_id, entry.kind) for entry in entries]


def test_an_async_meter_reaches_a_cluster(cluster: Server) -> None:
    """The async face works through redis.asyncio's cluster client too."""

    async def reserve() -> int:
        options = StoreOptions(prefix="async")
        url = f"redis+cluster://127.0.0.1:{cluster.port}"
        async with AsyncMeter.connect(url, POLICY, options=options) as meter:
            entry = await (await meter.reserve("acme", CALL)).settle(Usage(input_tokens=1))
            return entry.n

    assert 1 == asyncio.run(reserve())


def test_a_meter_closes_though_its_client_swallows_a_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
    """As redis-py does on Python 3.11 if an answer comes in the very moment."""

    async def main() -> bool:
        meter = AsyncMeter.connect("memory://", POLICY, sweep_interval_ms=16)
        begun = asyncio.Event()

        async def swallowing() -> None:
            monkeypatch.undo()
            begun.set()
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)

        monkeypatch.setattr(meter._driver, "follow", swallowing)
        await meter.reserve("acme", CALL)
        await begun.wait()
        closed, _ = await asyncio.wait([asyncio.create_task(meter.aclose())], timeout=10)
        return bool(closed)

    assert asyncio.run(main())


def test_two_thousand_waiting_tasks_share_a_bounded_pool(server: Server) -> None:
    """A burst waits for connections, and no task is told that there are too many."""

    async def burst() -> int:
        policy = Policy(limits=())
        async with AsyncMeter.connect(
            server.url, policy, options=StoreOptions(connections_max=8, deadline_ms=60_000)
        ) as m:
            return len(await asyncio.gather(*(m.reserve("acme", CALL) for _ in range(2_000))))

    assert 2_000 == asyncio.run(burst())


@pytest.mark.parametrize("url", ["redis+cluster://127.0.0.1:{port}", "redis+sentinel://127.0.0.1:{port}/main"])
def test_the_bound_on_connections_holds_for_every_kind_of_url(cluster: Server, url: str) -> None:
    """Operator: `connections_max` bounds what a meter opens at each server, however that is found."""

    async def of_async() -> Any:
        async with AsyncMeter.connect(url.format(port=cluster.port), POLICY, options=options) as meter:
            client = meter._driver.client
            return client.connection_kwargs if "+cluster" in url else vars(client.connection_pool)

    options = StoreOptions(connections_max=7)
    with Meter.connect(url.format(port=cluster.port), POLICY, options=options) as meter:
        client = client_of(meter._driver)
        node = client.get_default_node().redis_connection if "+cluster" in url else client

        assert 7 == node.connection_pool.max_connections

    assert 7 == asyncio.run(of_async())["max_connections"]


def test_another_number_of_shards_is_refused(server: Server) -> None:
    """The number of shards is chosen once: who comes with another would find nobody's state."""
    with Meter.connect(server.url, POLICY) as meter:
        meter.reserve("acme", CALL)
    with (
        Meter.connect(server.url, POLICY, options=StoreOptions(shards=15)) as other,
        pytest.raises(StoreCorrupt, match="shards"),
    ):
        other.reserve("somebody else", CALL)


def test_a_store_of_another_version_is_refused_and_the_number_of_shards_is_not_blamed(server: Server) -> None:
    """What an older meterlib wrote is not read wrongly, and the advice is one that helps."""
    with server.client() as client:
        client.set(layout_key("meterlib"), "2/16")
        with (
            Meter.connect(server.url, POLICY) as meter,
            pytest.raises(StoreCorrupt, match="another version") as refused,
        ):
            meter.reserve("acme", CALL)

        assert "set [store] shards" not in str(refused.value)
        assert 1 == client.dbsize()


def test_two_meters_with_their_own_prefixes_do_not_meet(server: Server, tmp_path: Path) -> None:
    """One server can hold several stores."""
    with (
        Meter.connect(server.url, POLICY, options=StoreOptions(prefix="a")) as first,
        Meter.connect(server.url, POLICY, options=StoreOptions(prefix="b")) as second,
    ):
        first.reserve("acme", CALL)

        assert [0, 0] == [limit.used for limit in second.peek("acme", CALL)]
