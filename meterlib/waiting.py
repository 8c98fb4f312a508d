"""Callers that would rather wait than be denied: first come, first served, each as long as it has patience.

Who waits for the same limits waits in one queue, per process. Only the first of a queue asks the store, at the time
when the store has said that its call will pass, or when a reservation of this process has ended meanwhile.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from typing import Protocol, TypeVar

from meterlib.errors import QuotaExceeded

T = TypeVar("T")
POLL_S = 0.001
"""How often a test's clock is looked at."""


class Clock(Protocol):
    """A test's clock."""

    @property
    def now_ms(self) -> int:
        """Ms since 1970 UTC."""


def _now_ms(clock: Clock | None) -> float:
    return clock.now_ms if clock else time.monotonic() * 1000


def _worth_waiting_ms(denied: QuotaExceeded, asked_ms: float, until_ms: float) -> float:
    """How long to wait before asking again; raises the denial if that is too long, or in vain."""
    if denied.retry_after_ms is None or asked_ms + denied.retry_after_ms > until_ms:
        raise denied
    return denied.retry_after_ms


class AsyncQueues:
    """The queues of one event loop."""

    def __init__(self, clock: Clock | None) -> None:
        self._clock = clock
        self._queues: dict[Hashable, deque[asyncio.Event]] = {}

    async def take(self, key: Hashable, attempt: Callable[[], Awaitable[T]], max_wait_ms: int) -> T:
        """What `attempt` gives, as soon as it is not denied any more.

        Raises:
            QuotaExceeded: it would not pass in time; nothing is left behind.
        """
        until_ms = _now_ms(self._clock) + max_wait_ms
        queue = self._queues.setdefault(key, deque())
        me = asyncio.Event()
        queue.append(me)
        try:
            while queue[0] is not me and _now_ms(self._clock) < until_ms:
                await self._sleep(me, until_ms)
            while True:
                me.clear()
                asked_ms = _now_ms(self._clock)
                try:
                    return await attempt()
                except QuotaExceeded as denied:
                    wait_ms = _worth_waiting_ms(denied, asked_ms, until_ms)
                await self._sleep(me, _now_ms(self._clock) + wait_ms)
        finally:
            queue.remove(me)
            self.freed(key)
            if not queue:
                self._queues.pop(key, None)

    def freed(self, key: Hashable) -> None:
        """Something may have been given back: the first in the queue asks at once."""
        queue = self._queues.get(key)
        if queue:
            queue[0].set()

    async def _sleep(self, woken: asyncio.Event, until_ms: float) -> None:
        """Until then, or until woken."""
        while not woken.is_set() and (left_ms := until_ms - _now_ms(self._clock)) > 0:
            try:
                async with asyncio.timeout(POLL_S if self._clock else left_ms / 1000):
                    await woken.wait()
            except TimeoutError:
                continue

    def __bool__(self) -> bool:
        return bool(self._queues)


class SyncQueues:
    """The queues of a process's threads."""

    def __init__(self, clock: Clock | None) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._queues: dict[Hashable, deque[threading.Event]] = {}

    def take(self, key: Hashable, attempt: Callable[[], T], max_wait_ms: int) -> T:
        """See AsyncQueues."""
        until_ms = _now_ms(self._clock) + max_wait_ms
        me = threading.Event()
        with self._lock:
            queue = self._queues.setdefault(key, deque())
            queue.append(me)
        try:
            while queue[0] is not me and _now_ms(self._clock) < until_ms:
                self._sleep(me, until_ms)
            while True:
                me.clear()
                asked_ms = _now_ms(self._clock)
                try:
                    return attempt()
                except QuotaExceeded as denied:
                    wait_ms = _worth_waiting_ms(denied, asked_ms, until_ms)
                self._sleep(me, _now_ms(self._clock) + wait_ms)
        finally:
            with self._lock:
                queue.remove(me)
                if not queue:
                    self._queues.pop(key, None)
            self.freed(key)

    def freed(self, key: Hashable) -> None:
        """See AsyncQueues."""
        with self._lock:
            queue = self._queues.get(key)
            if queue:
                queue[0].set()

    def _sleep(self, woken: threading.Event, until_ms: float) -> None:
        while not woken.is_set() and (left_ms := until_ms - _now_ms(self._clock)) > 0:
            woken.wait(POLL_S if self._clock else left_ms / 1000)

    def __bool__(self) -> bool:
        return bool(self._queues)
