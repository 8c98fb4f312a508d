"""Callers that would rather wait than be denied: first come, first served, each as long as it has patience.

Each window that denied somebody has a line of those who wait for it, in the order in which they came to this process.
Whoever touches it goes behind them, whatever else it touches; and nobody stands in the way of calls that only share a
window with it which has room. The first in line asks the store, at the time when the store has said that its call will
pass, or when a reservation of this process has ended meanwhile that held something of the window. Whose patience ends
behind others asks once, and is denied with its own denial.
"""

from __future__ import annotations

import asyncio
import threading
import time
from bisect import bisect_left, insort
from collections.abc import Awaitable, Callable, Iterable, Mapping, Set
from operator import attrgetter
from typing import TYPE_CHECKING, Protocol, TypeVar

from meterlib.errors import QuotaExceeded

if TYPE_CHECKING:
    from meterlib.store.options import Clock

T = TypeVar("T")
_NUMBER = attrgetter("number")

POLL_S = 0.001
"""How often a test's clock is looked at."""


def _now_ms(clock: Clock | None) -> float:
    return clock.now_ms if clock else time.monotonic() * 1000


def _worth_waiting_ms(denied: QuotaExceeded, asked_ms: float, until_ms: float) -> float | None:
    """How long to wait before asking again; None if that is too long, or in vain.

    Nobody knows when a slot of a concurrency limit frees: its hint says how often to ask, and not when it passes.
    """
    left_ms = until_ms - asked_ms
    if denied.hint and denied.retry_after_ms is not None and left_ms > 0:
        return min(denied.retry_after_ms, left_ms)
    if denied.retry_after_ms is None or denied.retry_after_ms > left_ms:
        return None
    return denied.retry_after_ms


class Woken(Protocol):
    """What a caller sleeps on."""

    def set(self) -> object:
        """It may be the caller's turn."""


class Waiter:
    """A caller that waits.

    Attributes:
        number: of those who came to this process.
        tenant: whose call it is.
        windows: of the limits that it touches, by their names.
        woken: set when it may be its turn.
        denied_by: the windows that denied it; None as long as it has not asked.
        lines: of which windows it is in line.
    """

    def __init__(self, number: int, tenant: str, windows: Mapping[str, str], woken: Woken) -> None:
        self.number = number
        self.tenant = tenant
        self.windows = windows
        self.woken = woken
        self.denied_by: Set[str] | None = None
        self.lines: Set[str] = frozenset()


class Lines:
    """Who waits for which windows, in the order in which they came."""

    def __init__(self) -> None:
        self._lines: dict[str, list[Waiter]] = {}
        self._came = 0

    def come(self, tenant: str, windows: Mapping[str, str], woken: Woken) -> Waiter:
        """The last of all."""
        self._came += 1
        return Waiter(self._came, tenant, windows, woken)

    def is_first(self, waiter: Waiter) -> bool:
        """Whether nobody who came before waits for anything that it touches; if so, it may ask the store.

        While it asks for the first time it is in line for all: nobody knows yet which of them will deny it.
        """
        touched = set(waiter.windows.values())
        before = {at for at in touched if (line := self._lines.get(at)) and line[0].number < waiter.number}
        if waiter.denied_by is None:
            self.wait_for(waiter, before or touched)
        else:
            self.wait_for(waiter, before | waiter.denied_by)
        return not before

    def denied(self, waiter: Waiter, limits: Iterable[str]) -> None:
        """These limits denied it; it does not stand in the way to others any more."""
        waiter.denied_by = {waiter.windows[name] for name in limits if name in waiter.windows}
        self.wait_for(waiter, waiter.denied_by)

    def wait_for(self, waiter: Waiter, windows: Set[str]) -> None:
        """It is in line for these windows, and for no others; whoever is first where it was is woken."""
        entered, left = windows - waiter.lines, waiter.lines - windows
        waiter.lines = windows
        for window in entered:
            insort(self._lines.setdefault(window, []), waiter, key=_NUMBER)
        for window in left:
            line = self._lines[window]
            del line[bisect_left(line, waiter.number, key=_NUMBER)]
            if line:
                line[0].woken.set()
            else:
                del self._lines[window]

    def freed(self, tenant: str, windows: Iterable[str] | None) -> None:
        """Something was given back of these windows, or of any that a tenant may use: their first may ask."""
        for window in self._lines if windows is None else windows:
            line = self._lines.get(window)
            if line and (windows is not None or line[0].tenant == tenant or window.startswith("w/*/")):
                line[0].woken.set()

    def __bool__(self) -> bool:
        return bool(self._lines)


class AsyncQueues:
    """Those who wait in one event loop."""

    def __init__(self, clock: Clock | None) -> None:
        self._clock = clock
        self._lines = Lines()

    async def take(
        self, tenant: str, windows: Mapping[str, str], attempt: Callable[[], Awaitable[T]], max_wait_ms: int
    ) -> T:
        """What `attempt` gives, as soon as it is not denied any more.

        Raises:
            QuotaExceeded: it would not pass in time; nothing is left behind.
        """
        until_ms = _now_ms(self._clock) + max_wait_ms
        woken = asyncio.Event()
        me = self._lines.come(tenant, windows, woken)
        try:
            while True:
                woken.clear()
                if not self._lines.is_first(me) and _now_ms(self._clock) < until_ms:
                    await self._sleep(woken, until_ms)
                    continue
                asked_ms = _now_ms(self._clock)
                try:
                    return await attempt()
                except QuotaExceeded as denied:
                    self._lines.denied(me, [one.name for one in denied.denials])
                    wait_ms = _worth_waiting_ms(denied, asked_ms, until_ms)
                    if wait_ms is None:
                        raise
                await self._sleep(woken, _now_ms(self._clock) + wait_ms)
        finally:
            self._lines.wait_for(me, frozenset())

    def freed(self, tenant: str, windows: Iterable[str] | None = None) -> None:
        """Something may have been given back: whoever is first in line for it asks at once."""
        self._lines.freed(tenant, windows)

    async def _sleep(self, woken: asyncio.Event, until_ms: float) -> None:
        """Until then, or until woken."""
        while not woken.is_set() and (left_ms := until_ms - _now_ms(self._clock)) > 0:
            try:
                async with asyncio.timeout(POLL_S if self._clock else left_ms / 1000):
                    await woken.wait()
            except TimeoutError:
                continue

    def __bool__(self) -> bool:
        return bool(self._lines)


class SyncQueues:
    """Those who wait in a process's threads."""

    def __init__(self, clock: Clock | None) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._lines = Lines()

    def take(self, tenant: str, windows: Mapping[str, str], attempt: Callable[[], T], max_wait_ms: int) -> T:
        """See AsyncQueues."""
        until_ms = _now_ms(self._clock) + max_wait_ms
        woken = threading.Event()
        with self._lock:
            me = self._lines.come(tenant, windows, woken)
        try:
            while True:
                woken.clear()
                with self._lock:
                    first = self._lines.is_first(me)
                if not first and _now_ms(self._clock) < until_ms:
                    self._sleep(woken, until_ms)
                    continue
                asked_ms = _now_ms(self._clock)
                try:
                    return attempt()
                except QuotaExceeded as denied:
                    with self._lock:
                        self._lines.denied(me, [one.name for one in denied.denials])
                    wait_ms = _worth_waiting_ms(denied, asked_ms, until_ms)
                    if wait_ms is None:
                        raise
                self._sleep(woken, _now_ms(self._clock) + wait_ms)
        finally:
            with self._lock:
                self._lines.wait_for(me, frozenset())

    def freed(self, tenant: str, windows: Iterable[str] | None = None) -> None:
        """See AsyncQueues."""
        with self._lock:
            self._lines.freed(tenant, windows)

    def _sleep(self, woken: threading.Event, until_ms: float) -> None:
        while not woken.is_set() and (left_ms := until_ms - _now_ms(self._clock)) > 0:
            woken.wait(POLL_S if self._clock else left_ms / 1000)

    def __bool__(self) -> bool:
        return bool(self._lines)
