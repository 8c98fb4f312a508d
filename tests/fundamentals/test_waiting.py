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

POLICY = Policy(
    limits=[
        Limit(name="requests", quota=2, window="1m", match={"kind": "window"}),
        Limit(name="open", quota=1, open=True, match={"kind": "open"}, retry_hint_ms=60_000),
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


async def until_waiting(meter: AsyncMeter, count: int) -> None:
    while sum(len(queue) for queue in meter._queues._queues.values()) < count:
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
            while sum(len(queue) for queue in meter._queues._queues.values()) <= number:
                time.sleep(0.001)
        held.settle(Usage())
        for thread in threads:
            thread.join(20)

    assert served == list(range(8))
