"""Calls that leave in one round trip succeed or fail each for itself, whatever the server does in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio

from meterlib import AsyncMeter, Limit, Meter, Policy, QuotaExceeded, StoreOptions, Usage
from meterlib.core.operations import Cancel, Find, Reserve, packed
from meterlib.errors import EmbeddedError, MeterError, StoreCorrupt, StoreRefused, StoreUnavailable
from meterlib.store.commands import Batch
from meterlib.store.connect import driver_for_url
from meterlib.store.drivers import AsyncDriver, SyncDriver, _Calls
from meterlib.store.keys import layout_key, shard_keys
from meterlib.store.pipelines import Pipeline
from tests.faults.world import check_books
from tests.support.proxy import FaultProxy
from tests.support.servers import Server

OPTIONS = StoreOptions(shards=4, deadline_ms=3000)
Outcomes = list[Any]
Together = Callable[[Sequence[Batch]], Outcomes]


def client_driver(url: str) -> SyncDriver:
    return SyncDriver(redis.Redis.from_url(url, protocol=2), OPTIONS)


def async_client_driver(url: str) -> AsyncDriver:
    return AsyncDriver(redis.asyncio.Redis.from_url(url, protocol=2), OPTIONS)


@contextmanager
def sync_driver(url: str, make: Callable[[str], SyncDriver] = client_driver) -> Iterator[Together]:
    driver = make(url)
    try:
        yield lambda batches: driver.calls(batches, 3.0)
    finally:
        driver.close()


@contextmanager
def async_driver(url: str, make: Callable[[str], AsyncDriver] = async_client_driver) -> Iterator[Together]:
    with asyncio.Runner() as runner:
        driver = make(url)
        try:
            yield lambda batches: runner.run(driver.calls(batches, 3.0))
        finally:
            runner.run(driver.aclose())


def sync_direct(url: str) -> Any:
    return sync_driver(url, lambda url: driver_for_url(url, OPTIONS, None, "sync"))


def async_direct(url: str) -> Any:
    return async_driver(url, lambda url: driver_for_url(url, OPTIONS, None, "async"))


@pytest.fixture(params=[sync_driver, async_driver, sync_direct, async_direct])
def driver(request: pytest.FixtureRequest) -> Any:
    return request.param


PATIENT = StoreOptions(shards=4, deadline_ms=60_000)


def patient_sync(url: str) -> Outcomes:
    driver = driver_for_url(url, PATIENT, None, "sync")
    try:
        return list(driver.calls([reserving("one", 0), finding("two", 1)], 0.05))
    finally:
        driver.close()


def patient_async(url: str) -> Outcomes:
    async def call() -> Outcomes:
        driver = driver_for_url(url, PATIENT, None, "async")
        try:
            return list(await driver.calls([reserving("one", 0), finding("two", 1)], 0.05))
        finally:
            await driver.aclose()

    return asyncio.run(call())


@pytest.mark.parametrize("outcomes_of", [patient_sync, patient_async])
def test_what_a_meter_finds_out_first_takes_of_the_calls_own_time(
    tmp_path: Path, outcomes_of: Callable[[str], Outcomes]
) -> None:
    """Calls that have waited already do not wait for another whole deadline, because nobody has seen the store yet."""
    began_s = time.monotonic()
    outcomes = outcomes_of(f"unix://{tmp_path}/none.sock")

    assert ["reserve", "find"] == [outcome.operation for outcome in outcomes]
    assert time.monotonic() - began_s < PATIENT.deadline_ms / 2_000


def reserving(name: str, shard: int) -> Batch:
    return Batch("reserve", shard, None, [Reserve(f"r/t/{name}", 60_000, (), "d", b"{}", b"{}")])


def finding(name: str, shard: int) -> Batch:
    return Batch("find", shard, None, [Find(f"r/t/{name}")])


def cancelling(name: str, shard: int) -> Batch:
    return Batch("cancel", shard, None, [Cancel(f"r/t/{name}")])


def statuses(outcomes: Outcomes) -> list[Any]:
    return [type(one) if isinstance(one, MeterError) else [bytes(reply[0]) for reply in one] for one in outcomes]


def test_calls_of_several_shards_and_verbs_share_a_round_trip(emptied: Server, driver: Any) -> None:
    """Each shard's books are its own, and the answers are in the order of the questions."""
    with driver(emptied.url) as together, emptied.client() as client:
        first = together([reserving(f"{shard}", shard) for shard in range(4)])
        together([cancelling("none", 0), finding("none", 0)])  # now the server knows all scripts
        before = client.info("stats")["total_reads_processed"]
        second = together([cancelling("2", 2), finding("1", 1), reserving("3", 3), finding("0", 3), reserving("x", 0)])
        reads = client.info("stats")["total_reads_processed"] - before

    assert [[b"reserved"]] * 4 == statuses(first)
    assert [[b"cancelled"], [b"open"], [b"open"], [b"absent"], [b"reserved"]] == statuses(second)
    assert reads <= 3, "the five were read at once"


def test_scripts_that_the_server_forgot_are_sent_again(emptied: Server, driver: Any) -> None:
    """SCRIPT FLUSH, a restart, a failover: nobody notices."""
    with driver(emptied.url) as together, emptied.client() as client:
        together([reserving("1", 1), reserving("2", 2)])
        client.script_flush()

        made = together([reserving("1", 1), cancelling("2", 2), reserving("3", 3)])

    assert [[b"open"], [b"cancelled"], [b"reserved"]] == statuses(made)


def test_a_damaged_shard_fails_alone(emptied: Server, driver: Any) -> None:
    """What is wrong with one tenant's shard is not the others' trouble."""
    with driver(emptied.url) as together, emptied.client() as client:
        together([reserving("1", 1), reserving("2", 2)])
        client.delete(shard_keys(OPTIONS.prefix, 2)[0])
        client.set(shard_keys(OPTIONS.prefix, 2)[0], "foreign")

        made = together([cancelling("1", 1), reserving("b", 2), reserving("c", 3)])

    assert [[b"cancelled"], StoreCorrupt, [b"reserved"]] == statuses(made)


def test_a_full_server_refuses_reserves_and_takes_what_ends_calls(emptied: Server, driver: Any) -> None:
    """Out of memory, nothing is let in, and what is open ends all the same, in the same round trip."""
    with driver(emptied.url) as together, emptied.client() as client:
        together([reserving("1", 1), reserving("2", 2)])
        client.config_set("maxmemory", 1000)
        try:
            made = together([reserving("3", 3), cancelling("1", 1), reserving("4", 0), cancelling("2", 2)])
        finally:
            client.config_set("maxmemory", 0)

    assert [StoreRefused, [b"cancelled"], StoreRefused, [b"cancelled"]] == statuses(made)


def test_a_store_with_another_layout_is_refused_for_all(emptied: Server, driver: Any) -> None:
    """Nothing is written to a store whose shards are others."""
    with emptied.client() as client:
        client.set(layout_key(OPTIONS.prefix), "2/64")
        with driver(emptied.url) as together:
            made = together([reserving("1", 1), reserving("2", 2)])
        assert 1 == client.dbsize()

    assert [StoreCorrupt] * 2 == statuses(made)


def test_a_connection_that_breaks_in_the_middle_is_tried_again(emptied: Server, driver: Any) -> None:
    """Some of the calls were made and some not, nobody knows which: all are idempotent, so all are made again."""
    batches = [reserving(f"{number}", number % 4) for number in range(8)]
    with FaultProxy(emptied.port) as proxy, driver(proxy.url) as together:
        together(batches)
        for spoil in (proxy.drop_replies, proxy.cut_requests):
            for wanted in (b"r/t/0", b"r/t/4", b"r/t/7"):
                spoil(1, matching=wanted)
                assert [[b"open"]] * 8 == statuses(together(batches))
        assert 6 == proxy.faults


def test_nobody_there_is_told_to_each(driver: Any) -> None:
    """Each call has an error of its own verb."""
    with driver("redis://127.0.0.1:1/0") as together:
        made = together([reserving("1", 1), cancelling("2", 2)])

    assert [StoreUnavailable] * 2 == statuses(made)


def test_a_connection_that_stays_broken_is_told_to_each_by_its_own_verb() -> None:
    """An error names the call that it is about, not another one that left together with it."""
    pipeline = Pipeline(_Calls(OPTIONS, None, plain=False), [reserving("1", 1), cancelling("2", 2)], 0.0)

    pipeline.take([redis.ConnectionError("gone"), redis.TimeoutError("slow")])

    assert [("reserve", "ConnectionError: gone"), ("cancel", "TimeoutError: slow")] == [
        (error.operation, error.cause) for error in pipeline.outcomes if isinstance(error, StoreUnavailable)
    ]


class NeverThere:
    """An embedded server that cannot be started."""

    def rest(self) -> tuple[float, EmbeddedError]:
        return 60.0, EmbeddedError("the server of this folder does not start")


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_what_an_embedded_server_did_before_it_was_gone_is_told(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that has its answer does not fail for another one, and whose fails learns what is the matter."""
    made = packed(["cancelled", 1, 0, 0, 1])
    driver: Any = (SyncDriver if kind == "sync" else AsyncDriver)(redis.Redis(port=1), OPTIONS)
    driver._ready, driver.server = True, NeverThere()

    def answers(words: Any) -> list[Any]:
        return [b"sd*\0" + made, redis.ConnectionError("gone")]

    async def answers_awaited(words: Any) -> list[Any]:
        return answers(words)

    monkeypatch.setattr(driver._wire, "ask_all", answers if kind == "sync" else answers_awaited)
    batches = [cancelling("1", 1), cancelling("2", 2)]

    outcomes = driver.calls(batches, 3.0)
    outcomes = outcomes if kind == "sync" else asyncio.run(outcomes)

    assert [[b"cancelled"], EmbeddedError] == statuses(outcomes)


@pytest.mark.parametrize("tasks", [3, 300])
def test_many_tenants_on_all_shards_are_decided_exactly(emptied: Server, tasks: int) -> None:
    """Engineer: a busy gateway with customers everywhere; no quota is passed, and no entry is missing."""
    policy = Policy(limits=[Limit(name="requests", quota=7, window="7d")])

    async def main() -> None:
        async with AsyncMeter.connect(emptied.url, policy, sweep_interval_ms=0) as meter:

            async def one(number: int) -> int:
                try:
                    reservation = await meter.reserve(f"tenant-{number % 60}", {}, Usage(input_tokens=1))
                except QuotaExceeded:
                    return 0
                await reservation.settle(Usage(input_tokens=1, output_tokens=number))
                return 1

            admitted = 0
            for start in range(0, 600, tasks):
                admitted += sum(
                    await asyncio.gather(*(one(number) for number in range(start, min(start + tasks, 600))))
                )
            heads = [await meter.head(shard) for shard in range(16)]
            assert 60 * 7 == admitted == sum(head.last_number for head in heads)

    asyncio.run(main())
    with Meter.connect(emptied.url, policy) as meter:
        check_books(meter)
