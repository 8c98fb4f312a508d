"""What goes on beside the calls: tasks that nobody has to wait for, and steps that are taken a little later."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

TICK_S = 0.01
"""How much later than asked for a step may be taken, so that a timer serves many."""


class Later:
    """A step that is going to be taken, unless it is cancelled before."""

    __slots__ = ("due_s", "step")

    def __init__(self, due_s: float, step: Callable[[], object]) -> None:
        self.due_s = due_s
        self.step: Callable[[], object] | None = step

    def cancel(self) -> None:
        """It is not taken any more."""
        self.step = None


class Background:
    """What need not be waited for, but must not be lost either."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()
        self._delays: dict[float, _Delay] = {}

    def spawn(self, step: Coroutine[Any, Any, object]) -> asyncio.Task[object]:
        """Run it some time soon; whoever waits for it may be interrupted, and it is not."""
        task = asyncio.get_running_loop().create_task(step)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def later(self, delay_s: float, step: Callable[[], object]) -> Later:
        """Take a step in so many seconds, or up to TICK_S later. There are to be few different delays."""
        delay = self._delays.get(delay_s)
        if delay is None:
            delay = self._delays[delay_s] = _Delay(delay_s)
        return delay.add(step)

    async def wait_briefly(self, task: asyncio.Task[object], seconds: float) -> None:
        """Wait for a task to end, but no longer than this. It goes on, whatever interrupts the wait."""
        if task.done():
            return
        waiter = asyncio.get_running_loop().create_future()

        def wake(*_: object) -> None:
            if not waiter.done():
                waiter.set_result(None)

        over = self.later(seconds, wake)
        task.add_done_callback(wake)
        try:
            await waiter
        finally:
            over.cancel()
            task.remove_done_callback(wake)

    async def idle(self) -> None:
        """Wait until nothing is left."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)


class _Delay:
    """Steps that are taken the same time after they came, so in the order in which they came: one timer does for all.

    A timer for each would be among the dearest things of a short call, of which most are over before it strikes.
    """

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._waiting: deque[Later] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, step: Callable[[], object]) -> Later:
        loop = asyncio.get_running_loop()
        later = Later(loop.time() + self._delay_s, step)
        self._waiting.append(later)
        if self._timer is None:
            self._timer = loop.call_at(later.due_s, self._take)
        return later

    def _take(self) -> None:
        loop, waiting = asyncio.get_running_loop(), self._waiting
        now_s = loop.time()
        try:
            while waiting and (waiting[0].step is None or waiting[0].due_s <= now_s):
                step = waiting.popleft().step
                if step:
                    step()
        finally:
            self._timer = loop.call_at(max(waiting[0].due_s, now_s + TICK_S), self._take) if waiting else None
