"""Callers that would rather wait than be denied: first come, first served, each as long as it has patience.

Who waits for the same limits waits in one queue, per process. Only the first of a queue asks the store, at the time
when the store has said that its call will pass, or when a reservation of this process has ended meanwhile that held
something of the same limits. Whose patience ends behind others asks once, and is denied with its own denial.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from meterlib.errors import QuotaExceeded

if TYPE_CHECKING:
    from meterlib.store.drivers import Clock

T = TypeVar("T")
Key = tuple[str, ...]
"""The tenant, and the windows that a call touches."""

POLL_S = 0.001
"""How often a test's clock is looked at."""


def _now_ms(clock: Clock | None) -> float:
    return clock.now_ms if clock else time.monotonic() * 1000


def _worth_waiting_ms(denied: QuotaExceeded, asked_ms: float, until_ms: float) -> float:
    """How long to wait before asking again; raises the denial if that is too long, or in vain.

    Nobody knows when a slot of a concurrency limit frees: its hint says how often to ask, and not when it passes.
    """
    left_ms = until_ms - asked_ms
    if denied.hint and denied.retry_after_ms is not None and left_ms > 0:
        return min(denied.retry_after_ms, left_ms)
    if denied.retry_after_ms is None or denied.retry_after_ms > left_ms:
        raise denied
    return denied.retry_after_ms


def _touches(key: Key, tenant: str, windows: Sequence[str] | None) -> bool:
    """Whether those in a queue wait for something that a tenant's reservation held, whose windows may not be known."""
    if windows is None:
        return key[0] == tenant or any(window.startswith("w/*/") for window in key[1:])
    return not set(windows).isdisjoint(key[1:])


class AsyncQueues:
    """The queues of one event loop."""

    def __init__(self, clock: Clock | None) -> None:
        self._clock = clock
        self._queues: dict[Key, deque[asyncio.Event]] = {}

    async def take(self, key: Key, attempt: Callable[[], Awaitable[T]], max_wait_ms: int) -> T:
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
            if queue:
                queue[0].set()
            else:
                self._queues.pop(key, None)

    def freed(self, tenant: str, windows: Sequence[str] | None = None) -> None:
        """Something may have been given back: whoever is first in a queue for it asks at once."""
        for key, queue in self._queues.items():
            if queue and _touches(key, tenant, windows):
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
        self._queues: dict[Key, deque[threading.Event]] = {}

    def take(self, key: Key, attempt: Callable[[], T], max_wait_ms: int) -> T:
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
                if queue:
                    queue[0].set()
                else:
                    self._queues.pop(key, None)

    def freed(self, tenant: str, windows: Sequence[str] | None = None) -> None:
        """See AsyncQueues."""
        with self._lock:
            for key, queue in self._queues.items():
                if queue and _touches(key, tenant, windows):
                    queue[0].set()

    def _sleep(self, woken: threading.Event, until_ms: float) -> None:
        while not woken.is_set() and (left_ms := until_ms - _now_ms(self._clock)) > 0:
            woken.wait(POLL_S if self._clock else left_ms / 1000)

    def __bool__(self) -> bool:
        return bool(self._queues)
