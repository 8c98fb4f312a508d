"""Operations that arrive together leave together, and none of them notices the others."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import threading
from collections import Counter
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterlib import AsyncMeter, Limit, Meter, Policy, QuotaExceeded, StoreOptions, StoreOverloaded, StoreUnavailable
from meterlib import Usage as Used
from meterlib.core.operations import Cancel, Reply
from meterlib.errors import MeterError, StoreCorrupt
from meterlib.store.batching import (
    BATCH_MAX,
    TOGETHER_MAX,
    UNDER_WAY_MAX,
    AsyncBatching,
    Lanes,
    SyncBatching,
    batches_of,
)
from meterlib.store.commands import Batch, Call
from meterlib.store.keys import shard_keys
from meterlib.testing import Clock
from tests.faults.world import check_books
from tests.support.servers import Server, start_server

ONE_SHARD = StoreOptions(shards=1)
POLICY = Policy(limits=[Limit(name="requests", quota=100, window="7d"), Limit(name="open", quota=90, open=True)])


def a_call(tenant: str, number: int, shard: int = 0) -> Call:
    return Call("cancel", shard, Cancel(f"r/{tenant}/{number}"))


def one_lane(call: Call) -> Hashable:
    """As one server has it."""
    return None


def fields_of(batch: Batch) -> list[str]:
    return [str(getattr(operation, "field", "")) for operation in batch.operations]


def answer_to(operation: Any) -> Reply:
    return [operation.field]


def waiting(lanes: Lanes[Any]) -> int:
    return sum(lane.waiting for lane in lanes._lanes.values())


# ── Whose turn it is ──────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.sampled_from("abc"), max_size=300))
def test_tenants_take_turns_and_nobody_is_forgotten(tenants: list[str]) -> None:
    """A tenant with a thousand calls keeps one with a single call waiting for a single turn."""
    lanes: Lanes[int] = Lanes(one_lane, 5000)
    alone = lanes.enter(a_call("z", 0))
    assert alone is not None
    trips = [trip for number, tenant in enumerate(tenants) if (trip := lanes.add(a_call(tenant, number), number))]
    assert len(trips) == min(UNDER_WAY_MAX - 1, len(tenants) // TOGETHER_MAX), "only a full one leaves besides"
    first = lanes.next(alone)
    trips += [first] if first else []
    left, taken = Counter(tenants), []
    for trip in trips:
        assert 1 <= len(trip.due) <= TOGETHER_MAX
        served = Counter(tenants[entry.caller] for entry in trip.due)
        for mine in served:
            ahead = max(served.values()) - served[mine]
            assert ahead <= 1 or served[mine] == left[mine], "it had more, and another was served first"
        left -= served
        taken += [entry.caller for entry in trip.due]
        following = lanes.next(trip)
        trips += [following] if following else []
    assert sorted(taken) == list(range(len(tenants)))
    for key in set(tenants):
        theirs = [number for number in taken if tenants[number] == key]
        assert theirs == sorted(theirs), "a tenant's own calls keep their order"
    assert 0 == waiting(lanes)
    assert lanes.enter(a_call("z", 1)), "it is free again"


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([0, 1]), st.sampled_from([None, 3])), max_size=300))
def test_operations_of_one_verb_and_shard_share_a_script_call(asked: list[tuple[str, int, int | None]]) -> None:
    """Each operation is in one call, among its kind and in order, and no call keeps the server for long."""
    lanes: Lanes[int] = Lanes(one_lane, 5000)
    alone = lanes.enter(a_call("z", 0))
    assert alone is not None
    trips = []
    for number, (tenant, shard, sweep_max) in enumerate(asked):
        trips.append(lanes.add(a_call(tenant, number, shard)._replace(sweep_max=sweep_max), number))
    trips.append(lanes.next(alone))
    for trip in filter(None, trips):
        made = batches_of(trip.due)

        assert sorted(w.caller for _, part in made for w in part) == sorted(w.caller for w in trip.due)
        for batch, part in made:
            assert 1 <= len(batch.operations) <= BATCH_MAX
            assert [w.call.operation for w in part] == batch.operations
            assert {batch[:3]} == {(w.call.script, w.call.shard, w.call.sweep_max) for w in part}
        calls = Counter(batch[1:3] for batch, _ in made)
        held = Counter((w.call.shard, w.call.sweep_max) for w in trip.due)
        assert all(calls[kind] == -(-held[kind] // BATCH_MAX) for kind in held)


@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["reserve", "settle", "peek"])), max_size=60),
)
def test_no_tenant_takes_more_room_than_it_leaves_free(room: int, asked: list[tuple[str, str]]) -> None:
    """And calls that begin leave a quarter of it to those that end; whoever is refused was not sent."""
    lanes: Lanes[int] = Lanes(one_lane, 5000, waiting_max=room)
    alone = lanes.enter(a_call("z", 0))
    assert alone is not None
    there: Counter[str] = Counter()
    for number, (tenant, verb) in enumerate(asked):
        free = (room * 3 // 4 if verb == "reserve" else room) - there.total()
        call = a_call(tenant, number)._replace(script=verb)
        if there[tenant] < free:
            assert lanes.add(call, number) is None
            there[tenant] += 1
        else:
            with pytest.raises(StoreOverloaded, match=f"{verb}: {there.total()} operations wait"):
                lanes.add(call, number)
        assert there.total() == waiting(lanes) <= room
    due = trip.due if (trip := lanes.next(alone)) else []
    assert there == Counter(asked[one.caller][0] for one in due)


def test_a_flood_of_one_tenant_is_refused_to_nobody_else() -> None:
    """Others begin calls and end them all the while; so do those of another lane, whose server is another one."""
    lanes: Lanes[int] = Lanes(lambda call: call.shard, 5000)
    for shard in (0, 1):
        assert lanes.enter(a_call("z", 0, shard))
    refused: Counter[str] = Counter()
    for number in range(100_000):
        for tenant, verb, shard, every in (
            ("greedy", "reserve", 0, 1),
            ("modest", "reserve", 0, 1000),
            ("greedy", "settle", 0, 1000),
            ("modest", "settle", 0, 1000),
            ("greedy", "reserve", 1, 10),
        ):
            if number % every == 0:
                try:
                    lanes.add(a_call(tenant, number, shard)._replace(script=verb), number)
                except StoreOverloaded:
                    refused[f"{tenant} {verb} {shard}"] += 1
    assert refused.keys() == {"greedy reserve 0"}


# ── A driver that a test holds back ───────────────────────────────────────────────────────────────────────────────────


class SlowDriver:
    """Answers calls when told; remembers what went out together."""

    def __init__(self) -> None:
        self.sent: list[list[str]] = []
        self.free = asyncio.Event()
        self.free_shards: set[int] = set()
        self.broken: set[str] = set()
        self.failure: MeterError | None = None
        self.fails_at_deadline = 0

    def lane_of(self, call: Call) -> Hashable:
        return call.shard

    async def call(self, batch: Batch, deadline_s: float | None = None) -> list[Reply]:
        self.sent.append(fields_of(batch))
        if batch.shard not in self.free_shards:
            await self.free.wait()
        if self.failure:
            raise self.failure
        if deadline_s is not None and self.fails_at_deadline:
            self.fails_at_deadline -= 1
            raise StoreUnavailable(batch.script, "made up by a test")
        if self.broken & set(fields_of(batch)):
            raise StoreCorrupt("made up by a test")
        return [answer_to(operation) for operation in batch.operations]

    async def calls(self, batches: Sequence[Batch], deadline_s: float) -> list[list[Reply] | MeterError]:
        outcomes: list[list[Reply] | MeterError] = []
        for batch in batches:
            try:
                outcomes.append(await self.call(batch, deadline_s))
            except MeterError as error:
                outcomes.append(error)
        return outcomes


async def all_at_once(driver: SlowDriver, count: int, deadline_ms: int = 5000) -> list[Any]:
    """What becomes of so many calls, of which all but the first wait."""
    batching = AsyncBatching(driver, deadline_ms)
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
        assert 1 == len(driver.sent)
        driver.free.set()

        replies = await asyncio.gather(*tasks)

        assert [[f"r/a/{number}"] for number in range(40)] == replies
        assert 2 == len(driver.sent)

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
        sent = [field for call in driver.sent for field in call]
        waited = {f"r/{'abc'[number % 3]}/{number}" for number in left if number}
        assert not waited & set(sent)
        assert 0 == waiting(batching._lanes)
        assert ["r/z/1"] == await batching.run(a_call("z", 1))

    asyncio.run(main())


def test_one_operations_trouble_is_not_its_neighbours() -> None:
    """What one tenant's damaged record makes fail, fails for that tenant alone."""

    async def main() -> None:
        driver = SlowDriver()
        driver.broken = {"r/a/7"}

        replies = await all_at_once(driver, 20)

        assert 19 == len(driver.sent[1])

        for number, reply in enumerate(replies):
            assert isinstance(reply, StoreCorrupt) if number == 7 else [f"r/a/{number}"] == reply

    asyncio.run(main())


def test_a_store_that_is_away_is_told_to_all_who_wait() -> None:
    """Nobody hangs, and each gets an error of its own when its own time is up."""

    async def main() -> None:
        driver = SlowDriver()
        driver.failure = StoreUnavailable("cancel", "made up by a test")

        errors = await all_at_once(driver, 20, deadline_ms=60)

        assert {StoreUnavailable} == {type(error) for error in errors}
        assert 20 == len({id(error) for error in errors})

    asyncio.run(main())


@pytest.mark.parametrize("shard", [0, 1], ids=["in its script call", "in its round trip"])
def test_who_came_late_is_not_failed_for_who_came_first(shard: int) -> None:
    """A round trip's time is that of its oldest operation; the younger ones are sent again."""

    async def main() -> None:
        driver = SlowDriver()
        driver.lane_of = one_lane  # type: ignore[method-assign]
        batching = AsyncBatching(driver, 5000)
        under_way = asyncio.create_task(batching.run(a_call("a", 0)))
        old, young = [asyncio.create_task(batching.run(a_call("a", *which))) for which in ((1,), (2, shard))]
        await asyncio.sleep(0)
        queue = batching._lanes._lanes[None]._tenants["r/a"]
        queue[0] = queue[0]._replace(since_s=queue[0].since_s - 4.9)
        driver.fails_at_deadline = 1 + shard
        driver.free.set()

        assert ["r/a/0"] == await under_way
        with pytest.raises(StoreUnavailable):
            await old
        assert ["r/a/2"] == await young

    asyncio.run(main())


def test_a_shard_that_is_away_keeps_no_other_waiting() -> None:
    """One node of a cluster that is down is the trouble of its own tenants."""

    async def main() -> None:
        driver = SlowDriver()
        driver.free_shards = {1}
        batching = AsyncBatching(driver, 5000)
        stuck = [asyncio.create_task(batching.run(a_call("a", number, shard=0))) for number in range(50)]
        await asyncio.sleep(0)

        for number in range(5):
            assert [f"r/b/{number}"] == await batching.run(a_call("b", number, shard=1))

        driver.free.set()
        await asyncio.gather(*stuck)

    asyncio.run(main())


@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("damaged", [False, True])
def test_who_waits_does_not_hang_when_whoever_sends_for_them_is_cancelled(steps: int, damaged: bool) -> None:
    """A framework that cancels all tasks that it finds does not keep other callers waiting for ever."""

    async def main() -> None:
        driver = SlowDriver()
        driver.broken = {"r/a/3"} if damaged else set()
        batching = AsyncBatching(driver, 5000)
        tasks = [asyncio.create_task(batching.run(a_call("a", number))) for number in range(2 * TOGETHER_MAX + 9)]
        await asyncio.sleep(0)
        (worker,) = batching._workers
        for step in range(6):
            if step == steps:
                worker.cancel()
            if step == 3:
                driver.free.set()
            await asyncio.sleep(0)

        _, hanging = await asyncio.wait(tasks, timeout=5)

        assert not hanging
        for number, task in enumerate(tasks):
            error = task.exception()
            assert isinstance(error, StoreUnavailable | StoreCorrupt) or [f"r/a/{number}"] == task.result()
        await asyncio.sleep(0.01)
        assert 0 == waiting(batching._lanes)
        assert ["r/z/1"] == await asyncio.wait_for(batching.run(a_call("z", 1)), 5)

    asyncio.run(main())


@pytest.mark.parametrize("failing", [False, True])
def test_who_has_waited_too_long_is_not_sent_any_more(failing: bool) -> None:
    """A deadline counts from the call, not from its turn; too much to do is told apart from a store that is away."""

    async def main() -> None:
        driver = SlowDriver()
        batching = AsyncBatching(driver, 0)
        tasks = [asyncio.create_task(batching.run(a_call("a", number))) for number in range(4)]
        await asyncio.sleep(0)
        driver.failure = StoreUnavailable("cancel", "made up by a test") if failing else None
        driver.free.set()

        replies = await asyncio.gather(*tasks, return_exceptions=True)

        assert {StoreUnavailable if failing else StoreOverloaded} == {type(reply) for reply in replies[1:]}
        assert 1 == len(driver.sent)

    asyncio.run(main())


@pytest.mark.parametrize("step", ["add", "next"])
def test_an_interrupt_between_any_two_steps_keeps_no_later_call_waiting(step: str) -> None:
    """Engineer: Ctrl-C may cost the call that it strikes; others are neither forgotten nor sent for ever."""

    def begun() -> tuple[Lanes[str], Any]:
        lanes: Lanes[str] = Lanes(one_lane, 5000)
        trip = lanes.enter(a_call("acme", 0))
        if step == "next":
            lanes.add(a_call("acme", 1), "struck")
        return lanes, trip

    moment, struck = 0, True
    while struck:
        moment += 1
        lanes, trip = begun()
        if step == "add":
            struck = interrupted_at(moment, lambda lanes=lanes: lanes.add(a_call("acme", 1), "struck"))
        else:
            struck = interrupted_at(moment, lambda lanes=lanes, trip=trip: lanes.next(trip))
            trip.lane.begun_s.clear()  # as the next call finds it, once no round trip can take that long
            trip = lanes.enter(a_call("acme", 9))
        for number, caller in enumerate(("later", "last")):
            lanes.add(a_call("zoe" if number else "acme", number + 2), caller)
        trips: list[list[str]] = []
        while trip and len(trips) < 5:
            trip = lanes.next(trip)
            trips += [[waiting.caller for waiting in trip.due]] if trip else []

        sent = [caller for callers in trips for caller in callers]
        assert {"later", "last"} <= set(sent) <= {"struck", "later", "last"}
        assert len(sent) == len(set(sent))
        assert [] not in trips
        assert moment < 1000
    assert moment > 10


def interrupted_at(moment: int, act: Any) -> bool:
    """Ctrl-C before the so-manieth instruction of `batching.py` in it; False if it is over before."""
    passed = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal passed
        if not frame.f_code.co_filename.endswith("batching.py") or "test" in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            passed += 1
            if passed == moment:
                raise KeyboardInterrupt
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(previous)
    return False


def test_a_lane_that_an_interrupt_left_busy_opens_again() -> None:
    """An interrupt can strike between any two steps, and must not stop a process for ever."""
    lanes: Lanes[int] = Lanes(one_lane, 0)
    lost = lanes.enter(a_call("a", 1))
    assert lost is not None
    assert lanes.enter(a_call("a", 2)) is None
    lost.lane.begun_s[0] -= 11

    assert lanes.enter(a_call("a", 3))


class SlowSyncDriver:
    """The same for threads."""

    def __init__(self) -> None:
        self.sent: list[list[str]] = []
        self.free = threading.Event()
        self.broken: set[str] = set()
        self.interrupted: set[str] = set()
        self.fails_at_deadline = 0
        self.deadlines_s: list[float] = []

    def lane_of(self, call: Call) -> Hashable:
        return call.shard

    def call(self, batch: Batch, deadline_s: float | None = None) -> list[Reply]:
        self.sent.append(fields_of(batch))
        self.free.wait(30)
        if deadline_s is not None and self.fails_at_deadline:
            self.fails_at_deadline -= 1
            self.deadlines_s.append(deadline_s)
            raise StoreUnavailable(batch.script, "made up by a test")
        if self.interrupted >= set(fields_of(batch)):
            raise KeyboardInterrupt
        if self.broken & set(fields_of(batch)):
            raise StoreCorrupt("made up by a test")
        return [answer_to(operation) for operation in batch.operations]

    def calls(self, batches: Sequence[Batch], deadline_s: float) -> list[list[Reply] | MeterError]:
        outcomes: list[list[Reply] | MeterError] = []
        for batch in batches:
            try:
                outcomes.append(self.call(batch, deadline_s))
            except MeterError as error:
                outcomes.append(error)
        return outcomes


def test_threads_send_for_each_other() -> None:
    """A thread's call is another's too, and each gets its own reply."""
    driver = SlowSyncDriver()
    driver.broken = {"r/a/11"}
    batching = SyncBatching(driver, 60_000)
    with ThreadPoolExecutor(40) as pool:
        futures = [pool.submit(batching.run, a_call("a", number)) for number in range(40)]
        while waiting(batching._lanes) < 39:
            threading.Event().wait(0.001)
        driver.free.set()
        for number, future in enumerate(futures):
            if number == 11:
                assert isinstance(future.exception(30), StoreCorrupt)
            else:
                assert [f"r/a/{number}"] == future.result(30)
    assert 2 <= len(driver.sent) <= 2 + 40
    assert 0 == waiting(batching._lanes)


def test_a_thread_that_is_interrupted_while_it_sends_for_others_tells_them() -> None:
    """Control-C strikes one thread; those whose operations it was just trying one by one learn it at once."""
    driver = SlowSyncDriver()
    driver.broken = {"r/a/11"}
    driver.interrupted = {"r/a/20"}
    batching = SyncBatching(driver, 60_000)
    with ThreadPoolExecutor(40) as pool:
        futures = [pool.submit(batching.run, a_call("a", number)) for number in range(40)]
        while waiting(batching._lanes) < 39:
            threading.Event().wait(0.001)
        driver.free.set()
        errors = [future.exception(10) for future in futures]
    assert 1 == sum(isinstance(error, KeyboardInterrupt) for error in errors)
    assert {KeyboardInterrupt, StoreCorrupt, StoreUnavailable, type(None)} >= {type(error) for error in errors}
    assert 0 == waiting(batching._lanes)
    assert ["r/z/1"] == batching.run(a_call("z", 1))


@pytest.mark.parametrize("aged", [0, 1])
def test_a_thread_that_came_late_is_not_failed_for_who_came_first(aged: int) -> None:
    """Nor does anybody's call take longer than its own time: a round trip's is that of its oldest operation."""
    driver = SlowSyncDriver()
    batching = SyncBatching(driver, 5000)
    with ThreadPoolExecutor(3) as pool:
        under_way = pool.submit(batching.run, a_call("a", 0))
        while not driver.sent:
            threading.Event().wait(0.001)
        others = []
        for number in (1, 2):
            others.append(pool.submit(batching.run, a_call("a", number)))
            while waiting(batching._lanes) < number:
                threading.Event().wait(0.001)
        (queue,) = batching._lanes._lanes[0]._tenants.values()
        queue[aged] = queue[aged]._replace(since_s=queue[aged].since_s - 4.9)
        driver.fails_at_deadline = 1
        driver.free.set()

        assert ["r/a/0"] == under_way.result(30)
        assert isinstance(others[aged].exception(30), StoreUnavailable)
        assert [f"r/a/{2 - aged}"] == others[1 - aged].result(30)
        assert max(driver.deadlines_s) <= 0.2
    assert 0 == waiting(batching._lanes)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_forked_while_calls_are_on_their_way_is_not_kept_waiting_by_them() -> None:
    """A worker that is forked from a busy process begins afresh."""
    driver = SlowSyncDriver()
    batching = SyncBatching(driver, 60_000)
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(batching.run, a_call("a", 0))
        while not driver.sent:
            threading.Event().wait(0.001)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            driver.free.set()
            os.write(writing, str(batching.run(a_call("a", 1))[0]).encode())
            os._exit(0)
        os.close(writing)
        assert b"r/a/1" == os.read(reading, 100)
        os.waitpid(child, 0)
        driver.free.set()
        assert ["r/a/0"] == under_way.result(30)


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
    assert opened <= 4
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


def test_a_meter_that_is_closed_dials_no_more_though_calls_are_on_their_way(emptied: Server) -> None:
    """Whoever waits is told at once, and no connection is left that nobody would close."""

    async def main() -> None:
        meter = AsyncMeter.connect(emptied.url, POLICY, options=ONE_SHARD, sweep_interval_ms=0)
        await meter.reserve("acme", {}, Used())
        emptied.pause()
        try:
            calls = [
                asyncio.create_task(meter.reserve("acme", {}, Used(), reservation_id=f"r{number}"))
                for number in range(2 * TOGETHER_MAX + 9)
            ]
            for _ in range(5):
                await asyncio.sleep(0)
            assert meter._driver._batching._workers, "one call is on its way alone, and many together"

            await meter.aclose()

            assert asyncio.all_tasks() <= {*calls, asyncio.current_task()}
            async with asyncio.timeout(1):
                told = await asyncio.gather(*calls, return_exceptions=True)
        finally:
            emptied.resume()
        assert {StoreUnavailable} == {type(error) for error in told}

    with emptied.client() as client:
        asyncio.run(main())
        assert [str(client.client_id())] == [other["id"] for other in client.client_list()]


@pytest.mark.parametrize("face", ["sync", "async"])
def test_who_tries_in_vain_is_told_so_when_the_meter_is_closed(face: str, tmp_path: Path) -> None:
    """Closing waits neither for a caller nor for the background sweep, however long they may try."""
    patient = StoreOptions(shards=1, deadline_ms=600_000)

    async def awaited(server: Server) -> None:
        meter = AsyncMeter.connect(server.url, POLICY, options=patient, sweep_interval_ms=1)
        await meter.reserve("acme", {}, Used())
        server.kill()
        trying = asyncio.create_task(meter.reserve("acme", {}, Used()))
        await asyncio.sleep(0.05)
        await meter.aclose()
        await trying

    def called(server: Server) -> None:
        meter = Meter.connect(server.url, POLICY, options=patient, sweep_interval_ms=1)
        meter.reserve("acme", {}, Used())
        server.kill()
        with ThreadPoolExecutor() as pool:
            trying = pool.submit(meter.reserve, "acme", {}, Used())
            with suppress(TimeoutError):
                trying.result(0.05)
            meter.close()
            trying.result()

    with start_server(tmp_path, "valkey") as server, pytest.raises(StoreUnavailable, match="closed meanwhile"):
        called(server) if face == "sync" else asyncio.run(awaited(server))


def test_sweeps_at_the_same_time_do_not_disturb_each_other(emptied: Server) -> None:
    """Operator: a sweep by hand while the one in the background runs; both tell what they did."""
    clock = Clock()

    async def main() -> None:
        async with AsyncMeter.connect(emptied.url, POLICY, options=ONE_SHARD, clock=clock) as meter:
            await asyncio.gather(*(meter.reserve("acme", lease_ms=1000) for _ in range(40)))
            clock.advance(ms=2000)

            swept = await asyncio.gather(*(meter.sweep() for _ in range(5)))

            assert 40 == sum(one.expired for one in swept) == (await meter.head(0)).last_number

    asyncio.run(main())


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


@pytest.mark.parametrize("store", ["memory", "server"])
def test_ended_reservations_are_forgotten_as_fast_as_others_end(store: str, emptied: Server) -> None:
    """Operator: memory follows the time for which ids are remembered, however much goes out together."""
    options = StoreOptions(shards=1, retention_ms=1000)
    clock = Clock()
    url = "memory://" if store == "memory" else emptied.url

    async def main() -> int:
        async with AsyncMeter.connect(url, Policy(), options=options, clock=clock, sweep_interval_ms=0) as meter:
            for _ in range(12):
                held = await asyncio.gather(*(meter.reserve("acme") for _ in range(200)))
                await asyncio.gather(*(reservation.settle(Used(input_tokens=1)) for reservation in held))
                clock.advance(ms=600)
            if store == "memory":
                return len(meter._driver.store.shards[0].ended)
            with emptied.client() as client:
                return int(client.llen(shard_keys(options.prefix, 0)[2]))

    assert 200 <= asyncio.run(main()) <= 3 * 200
