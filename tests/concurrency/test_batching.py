"""Operations that arrive together leave together, and none of them notices the others."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterlib import AsyncMeter, Limit, Meter, Policy, QuotaExceeded, StoreOptions, StoreOverloaded, StoreUnavailable
from meterlib import Usage as Used
from meterlib.core.operations import Cancel, Reply
from meterlib.errors import MeterError, StoreCorrupt
from meterlib.store.batching import BATCH_MAX, CALLS_IN_FLIGHT, AsyncBatching, Lanes, SyncBatching
from meterlib.store.commands import Call
from tests.faults.world import check_books
from tests.support.servers import Server

ONE_SHARD = StoreOptions(shards=1)
POLICY = Policy(limits=[Limit(name="requests", quota=100, window="7d"), Limit(name="open", quota=90, open=True)])


def a_call(tenant: str, number: int, shard: int = 0) -> Call:
    return Call("cancel", shard, Cancel(f"r/{tenant}/{number}"))


def answer_to(operation: Any) -> Reply:
    return [operation.field]


# ── Whose turn it is ──────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2)), max_size=300))
def test_tenants_take_turns_and_nobody_is_forgotten(waiting: list[tuple[str, int]]) -> None:
    """A tenant with a thousand calls keeps one with a single call waiting for a single turn."""
    lanes: Lanes[int] = Lanes()
    for number, (tenant, shard) in enumerate(waiting):
        lanes.add(a_call(tenant, number, shard), number)
    left = Counter(waiting)
    taken: list[int] = []
    while lanes:
        batch = lanes.take()
        own = [waiting[entry.caller] for entry in batch.waiting]
        assert 1 <= len(own) <= BATCH_MAX
        assert {batch.shard} == {shard for _, shard in own}
        served = Counter(own)
        for mine in served:
            ahead = max(served.values()) - served[mine]
            assert ahead <= 1 or served[mine] == left[mine], "it had more, and another was served first"
        left -= served
        taken += [entry.caller for entry in batch.waiting]
    assert sorted(taken) == list(range(len(waiting)))
    for key in set(waiting):
        theirs = [number for number in taken if waiting[number] == key]
        assert theirs == sorted(theirs), "a tenant's own calls keep their order"


def test_too_many_waiting_calls_are_refused_at_once() -> None:
    """Overload is told to whoever comes last, and nothing is sent for it."""
    lanes: Lanes[int] = Lanes(waiting_max=3)
    for number in range(3):
        lanes.add(a_call("a", number), number)

    with pytest.raises(StoreOverloaded, match="3 operations wait"):
        lanes.add(a_call("b", 3), 3)

    assert 3 == len(lanes)


# ── A driver that a test holds back ───────────────────────────────────────────────────────────────────────────────────


class SlowDriver:
    """Answers calls when told; remembers what went out together."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.free = asyncio.Event()
        self.broken: set[str] = set()
        self.failure: MeterError | None = None

    async def call(self, name: str, shard: int, operations: Sequence[Any], sweep_max: int | None = None) -> list[Reply]:
        self.calls.append([operation.field for operation in operations])
        await self.free.wait()
        if self.failure:
            raise self.failure
        if any(operation.field in self.broken for operation in operations):
            raise StoreCorrupt("made up by a test")
        return [answer_to(operation) for operation in operations]


async def all_at_once(driver: SlowDriver, count: int) -> list[Any]:
    """What becomes of so many calls, of which but the first few wait."""
    batching = AsyncBatching(driver, 5000)
    tasks = [asyncio.create_task(batching.run(a_call("a", number))) for number in range(count)]
    await asyncio.sleep(0)
    driver.free.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_a_lone_call_leaves_at_once_and_others_leave_together() -> None:
    """No wait is added where nobody else is, and what waits needs one call, not one each."""

    async def main() -> None:
        driver = SlowDriver()
        batching = AsyncBatching(driver, 5000)
        tasks = [asyncio.create_task(batching.run(a_call("a", number))) for number in range(40)]
        await asyncio.sleep(0)
        assert CALLS_IN_FLIGHT == len(driver.calls)
        driver.free.set()

        replies = await asyncio.gather(*tasks)

        assert [[f"r/a/{number}"] for number in range(40)] == replies
        assert CALLS_IN_FLIGHT + 1 == len(driver.calls)

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(5))
def test_cancelled_callers_take_back_what_was_not_sent_and_harm_nobody(seed: int) -> None:
    """One caller's change of mind is its own affair."""

    async def main() -> None:
        rng = random.Random(seed)
        driver = SlowDriver()
        batching = AsyncBatching(driver, 5000)
        tasks = [asyncio.create_task(batching.run(a_call("abc"[number % 3], number))) for number in range(60)]
        await asyncio.sleep(0)
        left = set(rng.sample(range(60), 25))
        for number in left:
            tasks[number].cancel()
        await asyncio.sleep(0)
        driver.free.set()

        replies = await asyncio.gather(*tasks, return_exceptions=True)

        for number, reply in enumerate(replies):
            if number in left:
                assert isinstance(reply, asyncio.CancelledError)
            else:
                assert [f"r/{'abc'[number % 3]}/{number}"] == reply
        sent = [field for call in driver.calls for field in call]
        waited = {f"r/{'abc'[number % 3]}/{number}" for number in left if number >= CALLS_IN_FLIGHT}
        assert not waited & set(sent)
        assert 0 == len(batching._lanes) == batching._in_flight
        assert ["r/z/1"] == await batching.run(a_call("z", 1))

    asyncio.run(main())


def test_one_operations_trouble_is_not_its_neighbours() -> None:
    """What one tenant's damaged record makes fail, fails for that tenant alone."""

    async def main() -> None:
        driver = SlowDriver()
        driver.broken = {"r/a/7"}

        replies = await all_at_once(driver, 20)

        assert 20 - CALLS_IN_FLIGHT == len(driver.calls[CALLS_IN_FLIGHT])

        for number, reply in enumerate(replies):
            assert isinstance(reply, StoreCorrupt) if number == 7 else [f"r/a/{number}"] == reply

    asyncio.run(main())


def test_a_store_that_is_away_is_told_to_all_who_wait() -> None:
    """Nobody hangs, and each gets an error of its own."""

    async def main() -> None:
        driver = SlowDriver()
        driver.failure = StoreUnavailable("cancel", "made up by a test")

        errors = await all_at_once(driver, 20)

        assert {StoreUnavailable} == {type(error) for error in errors}
        assert 20 - CALLS_IN_FLIGHT == len({id(error) for error in errors[CALLS_IN_FLIGHT:]})

    asyncio.run(main())


def test_who_has_waited_too_long_is_not_sent_any_more() -> None:
    """A deadline counts from the call, not from its turn."""

    async def main() -> None:
        driver = SlowDriver()
        batching = AsyncBatching(driver, 0)
        tasks = [asyncio.create_task(batching.run(a_call("a", number))) for number in range(CALLS_IN_FLIGHT + 3)]
        await asyncio.sleep(0)
        driver.free.set()

        replies = await asyncio.gather(*tasks, return_exceptions=True)

        assert 3 == sum(isinstance(reply, StoreUnavailable) and "was not sent" in str(reply) for reply in replies)
        assert CALLS_IN_FLIGHT == len(driver.calls)

    asyncio.run(main())


class SlowSyncDriver:
    """The same for threads."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.free = threading.Event()
        self.broken: set[str] = set()

    def call(self, name: str, shard: int, operations: Sequence[Any], sweep_max: int | None = None) -> list[Reply]:
        self.calls.append([operation.field for operation in operations])
        self.free.wait(30)
        if any(operation.field in self.broken for operation in operations):
            raise StoreCorrupt("made up by a test")
        return [answer_to(operation) for operation in operations]


def test_threads_send_for_each_other() -> None:
    """A thread's call is another's too, and each gets its own reply."""
    driver = SlowSyncDriver()
    driver.broken = {"r/a/11"}
    batching = SyncBatching(driver, 60_000)
    with ThreadPoolExecutor(40) as pool:
        futures = [pool.submit(batching.run, a_call("a", number)) for number in range(40)]
        while len(batching._lanes) < 40 - CALLS_IN_FLIGHT:
            threading.Event().wait(0.001)
        driver.free.set()
        for number, future in enumerate(futures):
            if number == 11:
                assert isinstance(future.exception(30), StoreCorrupt)
            else:
                assert [f"r/a/{number}"] == future.result(30)
    assert CALLS_IN_FLIGHT < len(driver.calls) <= CALLS_IN_FLIGHT + 1 + 40
    assert 0 == batching._in_flight


# ── On real servers ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_thousand_tasks_share_a_quota_over_a_few_connections(emptied: Server) -> None:
    """Engineer: thousands of waiting calls are no trouble, and the quota holds to the last unit."""

    async def main() -> None:
        async with AsyncMeter.connect(emptied.url, POLICY, options=ONE_SHARD, sweep_interval_ms=0) as meter:

            async def one(number: int) -> Any:
                try:
                    return await meter.reserve(f"tenant-{number % 2}", {}, Used(input_tokens=1))
                except QuotaExceeded as denied:
                    return denied

            results = await asyncio.gather(*(one(number) for number in range(1000)))

            admitted = [held for held in results if not isinstance(held, QuotaExceeded)]
            assert {"tenant-0": 90, "tenant-1": 90} == Counter(held.tenant for held in admitted)
            await asyncio.gather(*(held.settle(Used(input_tokens=1)) for held in admitted))
            assert 180 == (await meter.head(0)).last_number

    with emptied.client() as client:
        before = client.info("stats")["total_connections_received"]
        asyncio.run(main())
        calls = client.info("commandstats")
        opened = client.info("stats")["total_connections_received"] - before
    assert opened <= CALLS_IN_FLIGHT + 1
    assert calls["cmdstat_evalsha"]["calls"] < 200


@pytest.mark.parametrize("seed", range(4))
def test_cancelled_reserves_leave_no_hold(emptied: Server, seed: int) -> None:
    """Operator: callers that give up at any moment leave nothing behind that counts."""

    async def main() -> None:
        rng = random.Random(seed)
        policy = Policy(limits=[Limit(name="open", quota=1000, open=True)])
        async with AsyncMeter.connect(emptied.url, policy, options=ONE_SHARD, sweep_interval_ms=0) as meter:
            tasks = [asyncio.create_task(meter.reserve("acme", {}, Used())) for _ in range(300)]
            given_up = rng.sample(tasks, 150)
            for task in given_up:
                for _ in range(rng.randrange(4)):
                    await asyncio.sleep(0)
                task.cancel()
            ended: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)
            held = [done for done in ended if not _failed(done)]
            while meter._taking_back:
                await asyncio.sleep(0.001)

            (open_limit,) = await meter.peek("acme")

            assert len(held) == open_limit.used == open_limit.held
            await asyncio.gather(*(reservation.cancel() for reservation in held))
            assert 0 == (await meter.peek("acme"))[0].used

    asyncio.run(main())
    with Meter.connect(emptied.url, POLICY, options=ONE_SHARD) as meter:
        check_books(meter)


def _failed(outcome: Any) -> bool:
    if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
        raise outcome
    return isinstance(outcome, BaseException)


def test_many_threads_share_a_quota(emptied: Server) -> None:
    """Engineer: one Meter serves all threads of a process."""
    with Meter.connect(emptied.url, POLICY, options=ONE_SHARD, sweep_interval_ms=0) as meter:

        def one(number: int) -> bool:
            try:
                meter.reserve("acme", {}, Used(input_tokens=1)).settle(Used(input_tokens=1))
            except QuotaExceeded:
                return False
            return True

        with ThreadPoolExecutor(32) as pool:
            admitted = sum(pool.map(one, range(400)))

        assert 100 == admitted == meter.head(0).last_number
