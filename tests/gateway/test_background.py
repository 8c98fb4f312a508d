"""What goes on beside the calls is neither lost nor early, however much of it there is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any

import pytest

from meterlib.gateway.background import TICK_S, Background


class Loop(asyncio.SelectorEventLoop):
    """A loop whose time is set: nothing is waited for."""

    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.timers = 0
        super().__init__()

    def time(self) -> float:
        return self.now_s

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        self.timers += 1
        return super().call_at(when, callback, *args, context=context)


def with_a_loop(use: Callable[[Loop, Background], Coroutine[Any, Any, None]]) -> None:
    loop = Loop()
    try:
        loop.run_until_complete(use(loop, Background()))
    finally:
        loop.close()


async def pass_time(loop: Loop, seconds: float) -> None:
    """Time goes on in small steps, and what is due happens."""
    until_s = loop.now_s + seconds
    while loop.now_s < until_s:
        loop.now_s = min(until_s, loop.now_s + TICK_S / 4)
        for _ in range(3):
            await asyncio.sleep(0)


def test_steps_are_taken_in_time_and_in_order() -> None:
    """Never early, at most a tick late, and those that were cancelled not at all."""

    async def use(loop: Loop, background: Background) -> None:
        began_s, taken = loop.now_s, dict[int, float]()
        laters = []
        for at in range(40):
            laters.append(background.later(0.05, lambda at=at: taken.setdefault(at, loop.now_s)))  # type: ignore[misc]
            await pass_time(loop, TICK_S / 4)
        for at in (30, 31, 39):
            laters[at].cancel()
        await pass_time(loop, 1)

        assert list(taken) == [at for at in range(39) if at not in (30, 31)]
        for at, at_s in taken.items():
            assert 0.05 <= at_s - began_s - at * TICK_S / 4 + 1e-9 <= 0.05 + TICK_S * 1.5

    with_a_loop(use)


def test_a_timer_serves_many() -> None:
    """A thousand steps that are due within ten ticks take a timer for each tick."""

    async def use(loop: Loop, background: Background) -> None:
        taken: list[int] = []
        for at in range(1000):
            loop.now_s += TICK_S / 100
            background.later(0.05, lambda at=at: taken.append(at))  # type: ignore[misc]
        await pass_time(loop, 1)

        assert list(range(1000)) == taken
        assert loop.timers <= 12

    with_a_loop(use)


def test_a_step_that_fails_keeps_no_other_from_being_taken() -> None:
    """It is told like any failure in a loop."""

    async def use(loop: Loop, background: Background) -> None:
        taken, told = [], []
        loop.set_exception_handler(lambda _, context: told.append(context["exception"]))
        background.later(0.05, lambda: 1 // 0)
        background.later(0.05, lambda: taken.append(1))
        await pass_time(loop, 1)

        assert ([1], [ZeroDivisionError]) == (taken, [type(error) for error in told])

    with_a_loop(use)


@pytest.mark.parametrize("ends", ["in time", "late", "at once"])
def test_a_wait_is_brief_and_what_was_waited_for_goes_on(ends: str) -> None:
    """Whether it ends, is interrupted, or takes too long."""

    async def use(loop: Loop, background: Background) -> None:
        over = asyncio.Event()
        task = background.spawn(over.wait())
        if ends == "at once":
            over.set()
            await task
        waiting = asyncio.create_task(background.wait_briefly(task, 0.25))
        await pass_time(loop, 0.2)
        if ends == "in time":
            over.set()
            await asyncio.sleep(0)
        await pass_time(loop, 0.02)
        assert (ends != "late") is waiting.done()
        await pass_time(loop, 0.1)
        assert waiting.done()
        assert (ends == "late") is not task.done()
        over.set()
        await background.idle()
        assert task.done()

    with_a_loop(use)


def test_an_interrupted_wait_interrupts_nothing() -> None:
    """What books a call goes on when the call's own task is cancelled."""

    async def use(loop: Loop, background: Background) -> None:
        over = asyncio.Event()
        task = background.spawn(over.wait())
        waiting = asyncio.create_task(background.wait_briefly(task, 0.25))
        await asyncio.sleep(0)
        waiting.cancel()
        await pass_time(loop, 1)

        assert waiting.cancelled()
        assert not task.done()
        over.set()
        assert await task

    with_a_loop(use)
