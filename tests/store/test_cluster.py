"""A cluster of several nodes: every verb, batches by shard, slots that move and nodes that die while calls are made."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
from redis.cluster import RedisCluster

from meterlib import AsyncMeter, Meter, StoreOptions
from meterlib.billing.archive.archive import Archive
from meterlib.billing.export.export import Export
from meterlib.billing.export.trim import trim
from tests.store.test_clients import KINDS, one_of_each, one_of_each_async
from tests.store.test_clients import POLICY as PRESET
from tests.store.topologies import Cluster, ask, slot_of_shard
from tests.store.traffic import CALL, HELD, POLICY, TENANTS, USED, Traffic
from tests.support.servers import Server, available

KIND = ["valkey", "redis"]
OPTIONS = StoreOptions(prefix="c")
PATIENT = StoreOptions(prefix="c", deadline_ms=60_000)


def needs(kind: str) -> None:
    reason = available(kind)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module", params=KIND)
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes, a module's own."""
    needs(request.param)
    with Cluster(tmp_path_factory.mktemp("cluster"), request.param) as running:
        yield running


@pytest.fixture
def emptied(cluster: Cluster) -> Cluster:
    """The three nodes without anything in them, and with their statistics at zero."""
    for node in cluster.nodes:
        ask(node, "FLUSHALL")
        ask(node, "CONFIG", "RESETSTAT")
    return cluster


def script_calls(cluster: Cluster) -> list[int]:
    """How many script calls each node has served."""
    return [ask(node, "INFO", "commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"] for node in cluster.nodes]


def refusals(cluster: Cluster) -> set[str]:
    """The kinds of errors that the nodes have answered with."""
    found = [ask(node, "INFO", "errorstats") for node in cluster.nodes]
    return {name.removeprefix("errorstat_") for facts in found for name in facts}


# ── Every verb ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("by", ["url", "client"])
def test_every_verb_works_on_several_nodes(emptied: Cluster, by: str) -> None:
    """Whichever node a tenant's shard is on."""
    if by == "url":
        with Meter.connect(emptied.url, PRESET) as meter:
            entries = one_of_each(meter)
    else:
        with RedisCluster(host="127.0.0.1", port=emptied.nodes[2].port) as client, Meter(client, PRESET) as meter:
            entries = one_of_each(meter)

    assert KINDS == [(entry.reservation_id, entry.kind) for entry in entries]


@pytest.mark.parametrize("by", ["url", "client"])
def test_every_verb_works_on_several_nodes_awaited(emptied: Cluster, by: str) -> None:
    """AsyncMeter finds its way among them as well."""

    async def verbs() -> list[Any]:
        if by == "url":
            async with AsyncMeter.connect(emptied.url, PRESET) as meter:
                return await one_of_each_async(meter)
        port = emptied.nodes[1].port
        async with redis.asyncio.RedisCluster(host="127.0.0.1", port=port) as client, AsyncMeter(client, PRESET) as own:
            return await one_of_each_async(own)

    entries = asyncio.run(verbs())

    assert KINDS == [(entry.reservation_id, entry.kind) for entry in entries]


# ── Connections that are gone ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("by", ["url", "client"])
@pytest.mark.parametrize("hang_up", ["close", "abort"])
def test_connections_that_are_gone_are_made_anew(emptied: Cluster, by: str, loop: str, hang_up: str) -> None:
    """The cluster's client writes to them all the same, to which each loop and each Python says something else."""
    use = pytest.importorskip("uvloop").run if loop == "uvloop" else asyncio.run

    async def main() -> None:
        port = emptied.nodes[1].port
        async with redis.asyncio.RedisCluster(host="127.0.0.1", port=port) as client:
            meter = AsyncMeter(client, PRESET) if by == "client" else AsyncMeter.connect(emptied.url, PRESET)
            async with meter:
                for at in range(5):
                    held = await meter.reserve("acme", CALL)
                    for connection in connections_of(meter):
                        getattr(connection._writer.transport, hang_up)()
                    await asyncio.sleep(0.01 * at)
                    await held.settle(USED)

                assert 5 == sum([(await meter.head(shard)).last_number for shard in range(meter.shards)])

    use(main())


def connections_of(meter: AsyncMeter) -> list[Any]:
    nodes = meter._driver.client.nodes_manager.nodes_cache.values()
    return [one for node in nodes for one in node._connections if one._writer]


# ── Batches ───────────────────────────────────────────────────────────────────────────────────────────────────────────

MANY = [f"customer-{at}" for at in range(300)]
ROUNDS = 5


def check_batches(cluster: Cluster) -> None:
    """All was counted and booked, in fewer script calls than there were operations, on every node."""
    calls = script_calls(cluster)

    assert all(calls)
    assert sum(calls) < 0.8 * 2 * ROUNDS * len(MANY)
    with Meter.connect(cluster.url, POLICY, options=PATIENT) as meter:
        for tenant in MANY:
            assert [ROUNDS, 7 * ROUNDS, 0] == [state.used for state in meter.peek(tenant, CALL)]
        assert ROUNDS * len(MANY) == sum(meter.head(shard).last_number for shard in range(meter.shards))
        assert 0 == sum(meter.head(shard).open_reservations for shard in range(meter.shards))


@pytest.mark.parametrize("by", ["url", "client"])
def test_tasks_of_many_tenants_go_out_in_batches_by_shard(emptied: Cluster, by: str) -> None:
    """Each script call stays within one slot, however many tenants call at once."""

    async def call(meter: AsyncMeter, tenant: str) -> None:
        held = await meter.reserve(tenant, CALL, HELD)
        await held.settle(USED)

    async def burst(meter: AsyncMeter) -> None:
        await asyncio.gather(*(call(meter, tenant) for tenant in MANY for _ in range(ROUNDS)))

    async def main() -> None:
        if by == "url":
            async with AsyncMeter.connect(emptied.url, POLICY, options=PATIENT) as meter:
                await burst(meter)
        else:
            port = emptied.nodes[0].port
            client = redis.asyncio.RedisCluster(host="127.0.0.1", port=port)
            async with client, AsyncMeter(client, POLICY, options=PATIENT) as meter:
                await burst(meter)

    asyncio.run(main())

    check_batches(emptied)


@pytest.mark.parametrize("by", ["url", "client"])
def test_threads_of_many_tenants_go_out_in_batches_by_shard(emptied: Cluster, by: str) -> None:
    """One Meter serves all threads, whichever nodes their tenants are on."""
    threads = 96
    begin = threading.Barrier(threads)

    def calls(meter: Meter, own: list[str]) -> None:
        begin.wait()
        for tenant in own:
            meter.reserve(tenant, CALL, HELD).settle(USED)

    def burst(meter: Meter) -> None:
        everything = [tenant for tenant in MANY for _ in range(ROUNDS)]
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(calls, meter, everything[at::threads]) for at in range(threads)]:
                done.result()

    if by == "url":
        with Meter.connect(emptied.url, POLICY, options=PATIENT) as meter:
            burst(meter)
    else:
        client = RedisCluster(host="127.0.0.1", port=emptied.nodes[0].port)
        with client, Meter(client, POLICY, options=PATIENT) as meter:
            burst(meter)

    check_batches(emptied)


# ── Slots that move ───────────────────────────────────────────────────────────────────────────────────────────────────


def move_shards(cluster: Cluster, traffic: Traffic, shards: range) -> None:
    """These shards move to the next node, key by key, while calls go on in between."""
    for shard in shards:
        slot = slot_of_shard(OPTIONS.prefix, shard)
        source = cluster.owner_of(slot)
        target = cluster.nodes[(cluster.nodes.index(source) + 1) % len(cluster.nodes)]
        cluster.begin_move(slot, target)
        traffic.more(20)
        while cluster.move_keys(slot, source, target):
            traffic.more(10)
        cluster.end_move(slot, source, target)
        traffic.more(20)


def through(face: str, cluster: Cluster, traffic: Traffic, meanwhile: Callable[[], None]) -> None:
    if face == "async":
        traffic.through_async(lambda: AsyncMeter.connect(cluster.url, POLICY, options=OPTIONS), meanwhile)
    else:
        with Meter.connect(cluster.url, POLICY, options=OPTIONS) as meter:
            traffic.through(meter, meanwhile)


@pytest.mark.parametrize("face", ["sync", "async"])
def test_slots_move_while_calls_are_made(emptied: Cluster, face: str) -> None:
    """Whether a call meets MOVED, ASK or TRYAGAIN: it is made exactly once, and nothing stays held."""
    move_under_calls(face, emptied, range(0, OPTIONS.shards, 4))


@pytest.mark.soak
@pytest.mark.parametrize("face", ["sync", "async"])
def test_all_slots_move_while_calls_are_made(emptied: Cluster, face: str) -> None:
    """Every shard goes once around the cluster."""
    move_under_calls(face, emptied, range(OPTIONS.shards))


def move_under_calls(face: str, cluster: Cluster, shards: range) -> None:
    traffic = Traffic()
    through(face, cluster, traffic, lambda: move_shards(cluster, traffic, shards))

    assert {"MOVED", "ASK", "TRYAGAIN"} <= refusals(cluster)
    with Meter.connect(cluster.url, POLICY, options=OPTIONS) as meter:
        traffic.check(meter)


class Exporting:
    """Exports all shards and trims what is exported, again and again, until it is told to stop."""

    def __init__(self, cluster: Cluster, path: Path) -> None:
        self._url, self._path = cluster.url, path
        self._over = threading.Event()
        self.rounds = 0

    def run(self) -> None:
        """The loop; and one more round at the end."""
        with Meter.connect(self._url, POLICY, options=OPTIONS, sweep_interval_ms=0) as meter, Archive(self._path) as to:
            run, last = meter._driver.run, False
            while not last:
                last = self._over.is_set()
                with Export([to], run) as export:
                    results = [one for shard in range(meter.shards) for one in export.export(shard)]
                assert not [one for one in results if one.problem or one.failure]
                for shard in range(meter.shards):
                    trim([to], run, shard, below=2**53 - 1, keep=1)
                self.rounds += 1

    def stop(self) -> None:
        """Let it come to its end."""
        self._over.set()


def test_exports_go_on_while_slots_move(emptied: Cluster, tmp_path: Path) -> None:
    """Finance: each entry is archived once, in order, though shards change nodes between two pages or under a trim."""
    traffic, exporting = Traffic(), Exporting(emptied, tmp_path / "archive")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(exporting.run)
        try:
            through("sync", emptied, traffic, lambda: move_shards(emptied, traffic, range(0, OPTIONS.shards, 4)))
        finally:
            exporting.stop()
        running.result()

    assert {"MOVED", "ASK"} <= refusals(emptied)
    assert exporting.rounds >= 2, "one while they moved, and one behind"
    with Archive(tmp_path / "archive") as archive:
        entries = [list(archive.entries(shard)) for shard in archive.shards()]
    assert [[*range(1, len(each) + 1)] for each in entries] == [[one.n for one in each] for each in entries]
    assert Counter(traffic.done) == Counter((one.tenant, one.reservation_id) for each in entries for one in each)


# ── Nodes that die ────────────────────────────────────────────────────────────────────────────────────────────────────


def lose_a_node(cluster: Cluster, traffic: Traffic) -> None:
    """A node dies; its replica takes over, and calls of all tenants go on."""
    traffic.more(200)
    cluster.nodes[0].kill()
    cluster.take_over(0)
    traffic.more(len(TENANTS) * 3)


def survive(face: str, kind: str, folder: Path) -> None:
    needs(kind)
    traffic = Traffic()
    with Cluster(folder, kind, replicas=True) as cluster:
        through(face, cluster, traffic, lambda: lose_a_node(cluster, traffic))
        with Meter.connect(cluster.url, POLICY, options=OPTIONS) as meter:
            traffic.settle_again(meter)
            traffic.check(meter, lost=True)


@pytest.mark.parametrize("face", ["sync", "async"])
def test_a_node_dies_and_its_replica_takes_over(tmp_path: Path, face: str) -> None:
    """Calls fail or wait meanwhile, go on by themselves, and no usage is booked twice.

    What the dead node had not yet told its replica is lost; whoever settles once more has it booked, late.
    """
    survive(face, "valkey", tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("face", ["sync", "async"])
def test_a_redis_node_dies_and_its_replica_takes_over(tmp_path: Path, face: str) -> None:
    """The same on Redis 7."""
    survive(face, "redis", tmp_path)


def test_a_shard_whose_node_is_away_keeps_no_other_waiting(tmp_path: Path) -> None:
    """Tenants of the nodes that are left notice nothing."""
    needs("valkey")
    with Cluster(tmp_path, "valkey") as cluster:
        gone: Server = cluster.nodes[2]
        lost = [at for at in range(16) if cluster.owner_of(slot_of_shard("c", at)) is gone]
        # No background sweep, which would try the lost node for as long as it may, and close() waits for it.
        with closing(Meter.connect(cluster.url, POLICY, options=PATIENT, sweep_interval_ms=0)) as meter:
            there = [tenant for tenant in TENANTS if meter._context.shard_of(tenant) not in lost]
            assert 0 < len(there) < len(TENANTS)
            for tenant in there:
                meter.reserve(tenant, CALL, HELD).settle(USED)
            gone.kill()
            for tenant in there:
                meter.reserve(tenant, CALL, HELD).settle(USED)
                assert 14 == meter.peek(tenant, CALL)[1].used
