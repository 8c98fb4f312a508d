"""Waiting instead of being denied: in turn, no longer than one has patience, and without a trace when giving up."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterlib import AsyncMeter, InvalidInput, Limit, Meter, Policy, QuotaExceeded, Usage
from meterlib.testing import Clock
from meterlib.waiting import Lines, Waiter

POLICY = Policy(
    limits=[
        Limit(name="requests", quota=2, window="1m", match={"kind": "window"}),
        Limit(name="open", quota=1, open=True, match={"kind": "open"}, retry_hint_ms=60_000),
        Limit(name="shared", quota=1, window="1s", match={"kind": "model"}),
        Limit(name="model", quota=1, window="1m", per=["model"], match={"kind": "model"}),
        Limit(name="small", quota=5, unit="input_tokens", window="1m", oversize="reject", match={"kind": "small"}),
    ]
)


def run(use: Any) -> Any:
    """What `use` makes of an async meter in memory and its clock."""

    async def main() -> Any:
        clock = Clock()
        async with AsyncMeter.connect("memory://", POLICY, clock=clock) as meter, asyncio.timeout(20):
            return await use(meter, clock)

    return asyncio.run(main())


def window(meter: AsyncMeter, **options: Any) -> asyncio.Task[Any]:
    return asyncio.ensure_future(meter.reserve("acme", {"kind": "window"}, Usage(), **options))


def waiting(meter: AsyncMeter | Meter) -> int:
    return len({one.number for line in meter._queues._lines._lines.values() for one in line})


async def until_waiting(meter: AsyncMeter, count: int) -> None:
    while waiting(meter) < count:
        await asyncio.sleep(0)
    await asyncio.sleep(0.005)


def test_a_call_waits_until_the_window_lets_it_pass(meter: Meter, clock: Clock) -> None:
    """It is made at the very moment at which the store said it would pass."""
    for _ in range(2):
        meter.reserve("acme", {"kind": "window"})
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(meter.reserve, "acme", {"kind": "window"}, max_wait_ms=600_000)
        while not waiting.done():
            clock.advance(ms=7_500)
            time.sleep(0.01)

        assert waiting.result().reserved_at_ms >= 1_790_000_060_000


def test_a_denial_that_cannot_pass_in_time_is_raised_at_once(meter: Meter) -> None:
    """Nobody waits in vain."""
    for _ in range(2):
        meter.reserve("acme", {"kind": "window"})

    with pytest.raises(QuotaExceeded) as denied:
        meter.reserve("acme", {"kind": "window"}, max_wait_ms=59_000)

    assert 60_000 == denied.value.retry_after_ms
    with pytest.raises(QuotaExceeded, match="does not help"):
        meter.reserve("acme", {"kind": "small"}, Usage(input_tokens=6), max_wait_ms=59_000)


@pytest.mark.parametrize("max_wait_ms", [-1, 1.5, True, "1", 86_400_001])
def test_a_patience_that_is_none_is_refused(meter: Meter, max_wait_ms: Any) -> None:
    """Nothing is sent for it."""
    with pytest.raises(InvalidInput, match="max_wait_ms"):
        meter.reserve("acme", {"kind": "window"}, max_wait_ms=max_wait_ms)


@given(st.integers(1, 12))
def test_who_came_first_is_served_first(count: int) -> None:
    """However many wait, and however time goes on."""

    async def use(meter: AsyncMeter, clock: Clock) -> None:
        await asyncio.gather(window(meter), window(meter))
        served: list[int] = []
        tasks: list[asyncio.Task[Any]] = []
        for number in range(count):
            task = window(meter, max_wait_ms=86_400_000)
            tasks.append(task)
            task.add_done_callback(lambda task: served.append(tasks.index(task)))
            await until_waiting(meter, number + 1)
        while not all(task.done() for task in tasks):
            clock.advance(ms=30_000)
            await asyncio.sleep(0.002)
        await asyncio.gather(*tasks)
        assert served == list(range(count))
        assert not meter._queues

    run(use)


def model(meter: AsyncMeter, name: str, **options: Any) -> asyncio.Task[Any]:
    return asyncio.ensure_future(meter.reserve("acme", {"kind": "model", "model": name}, Usage(), **options))


@given(st.permutations("abcdef"))
def test_calls_of_any_kind_are_served_in_turn_where_they_wait_for_the_same(names: list[str]) -> None:
    """Each has a window of its own, with room; all wait for the one that they share."""

    async def use(meter: AsyncMeter, clock: Clock) -> None:
        await model(meter, "first")
        served: list[str] = []
        for number, name in enumerate(names, 1):
            task = model(meter, name, max_wait_ms=86_400_000)
            task.set_name(name)
            task.add_done_callback(lambda task: served.append(task.get_name()))
            await until_waiting(meter, number)
        while len(served) < len(names):
            clock.advance(ms=500)
            await asyncio.sleep(0.002)
        assert served == names
        assert not meter._queues

    run(use)


def test_who_waits_for_something_else_stands_in_nobodys_way() -> None:
    """The shared window has room again; of those who wait, the first is waiting for its model."""

    async def use(meter: AsyncMeter, clock: Clock) -> None:
        await model(meter, "a")
        clock.advance(ms=2_000)
        same = model(meter, "a", max_wait_ms=86_400_000)
        await until_waiting(meter, 1)

        await asyncio.wait_for(model(meter, "b", max_wait_ms=86_400_000), 5)

        assert not same.done()
        clock.advance(ms=70_000)
        await same

    run(use)


def come(lines: Lines, *windows: str) -> Waiter:
    return lines.come("acme", {window: window for window in windows}, threading.Event())


def test_who_asks_for_the_first_time_stands_before_all_who_touch_the_same() -> None:
    """Until the store has said what denies it: a smaller call must not pass it meanwhile."""
    lines = Lines()
    first, second, third = come(lines, "shared", "a"), come(lines, "shared", "b"), come(lines, "c")

    assert [True, False, True] == [lines.is_first(one) for one in (first, second, third)]
    lines.denied(first, ["a"])

    assert second.woken.is_set()  # type: ignore[attr-defined]
    assert lines.is_first(second)


def test_who_was_denied_before_is_woken_by_whoever_it_stands_behind_now() -> None:
    """The first waits for another window than it did, which the second touches as well."""
    lines = Lines()
    first, second = come(lines, "shared", "a"), come(lines, "shared", "b")
    for one, window in ((first, "a"), (second, "b"), (first, "shared")):
        assert lines.is_first(one)
        lines.denied(one, [window])
    assert not lines.is_first(second)
    second.woken.clear()  # type: ignore[attr-defined]

    lines.wait_for(first, frozenset())

    assert second.woken.is_set()  # type: ignore[attr-defined]
    assert lines.is_first(second)
    lines.wait_for(second, frozenset())
    assert not lines


def test_a_slot_that_frees_goes_to_the_first_in_the_queue_at_once() -> None:
    """Within a process nobody waits for the next hint when a call has just ended."""

    async def use(meter: AsyncMeter, clock: Clock) -> None:
        held = await meter.reserve("acme", {"kind": "open"})
        first = asyncio.ensure_future(meter.reserve("acme", {"kind": "open"}, max_wait_ms=3_600_000))
        await until_waiting(meter, 1)
        second = asyncio.ensure_future(meter.reserve("acme", {"kind": "open"}, max_wait_ms=3_600_000))
        await until_waiting(meter, 2)

        await held.settle(Usage())
        await (await first).cancel()

        assert (await second).tenant == "acme"

    run(use)


@pytest.mark.parametrize("by", ["the reservation", "its id"])
def test_a_slot_freed_by_another_kind_of_call_wakes_the_queue_too(by: str) -> None:
    """Calls of another model share the slots, and whoever ends them."""

    async def use(meter: AsyncMeter, clock: Clock) -> None:
        held = await meter.reserve("acme", {"kind": "open", "model": "opus"})
        waiting = asyncio.ensure_future(meter.reserve("acme", {"kind": "open"}, max_wait_ms=3_600_000))
        await until_waiting(meter, 1)
        if by == "its id":
            await meter.settle("acme", held.id, Usage())
        else:
            await held.cancel()

        await waiting

    run(use)


def test_a_hint_is_not_taken_for_a_promise() -> None:
    """A slot may free at any time, so whoever has less patience than the hint waits all the same."""

    async def use(meter: AsyncMeter, clock: Clock) -> None:
        held = await meter.reserve("acme", {"kind": "open"})
        waiting = asyncio.ensure_future(meter.reserve("acme", {"kind": "open"}, max_wait_ms=900))
        hopeless = asyncio.ensure_future(meter.reserve("globex", {"kind": "open"}, max_wait_ms=900))
        await until_waiting(meter, 1)
        assert not waiting.done()
        clock.advance(ms=500)
        await held.cancel()
        slot = await waiting
        second = asyncio.ensure_future(meter.reserve("acme", {"kind": "open"}, max_wait_ms=900))
        await until_waiting(meter, 1)
        clock.advance(ms=900)
        with pytest.raises(QuotaExceeded):
            await second
        await slot.cancel()
        await (await hopeless).cancel()

    run(use)


def test_giving_up_leaves_no_trace_and_lets_the_next_one_pass() -> None:
    """A cancelled wait neither holds anything nor blocks the queue."""

    async def use(meter: AsyncMeter, clock: Clock) -> None:
        held = await meter.reserve("acme", {"kind": "open"})
        first = asyncio.ensure_future(meter.reserve("acme", {"kind": "open"}, max_wait_ms=3_600_000))
        await until_waiting(meter, 1)
        second = asyncio.ensure_future(meter.reserve("acme", {"kind": "open"}, max_wait_ms=3_600_000))
        await until_waiting(meter, 2)
        first.cancel()
        await asyncio.sleep(0.005)
        await held.cancel()

        reservation = await second
        assert [1] == [state.used for state in await meter.peek("acme", {"kind": "open"})]
        await reservation.cancel()
        assert [0] == [state.used for state in await meter.peek("acme", {"kind": "open"})]
        assert not meter._queues

    run(use)


def test_who_waits_too_long_behind_others_is_denied_with_its_own_denial() -> None:
    """Patience counts from the call, not from one's turn."""

    async def use(meter: AsyncMeter, clock: Clock) -> None:
        await asyncio.gather(window(meter), window(meter))
        patient = window(meter, max_wait_ms=120_000)
        await until_waiting(meter, 1)
        impatient = window(meter, max_wait_ms=10_000)
        await until_waiting(meter, 2)
        clock.advance(ms=10_000)

        with pytest.raises(QuotaExceeded):
            await impatient
        assert not patient.done()
        clock.advance(ms=50_000)
        await patient

    run(use)


def test_threads_wait_in_turn_too() -> None:
    """One Meter serves all threads of a process, in order."""
    clock = Clock()
    with Meter.connect("memory://", POLICY, clock=clock) as meter:
        held = meter.reserve("acme", {"kind": "open"})
        served: list[int] = []

        def one(number: int) -> None:
            reservation = meter.reserve("acme", {"kind": "open"}, max_wait_ms=3_600_000)
            served.append(number)
            reservation.cancel()

        threads = []
        for number in range(8):
            threads.append(threading.Thread(target=one, args=(number,)))
            threads[-1].start()
            while waiting(meter) <= number:
                time.sleep(0.001)
        held.settle(Usage())
        for thread in threads:
            thread.join(20)

    assert served == list(range(8))
