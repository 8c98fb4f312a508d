"""A slice of the quotas in this process: calls are admitted out of it without asking the store, in half a microsecond.

A slice is an ordinary reservation of many calls at once. It is used up by local admissions, and settled with what was
admitted: the limits then count just that, and the rest is free again. So nothing is ever admitted beyond a quota.

What is admitted must count as long as the window says, and the slice's hold stands in one sub-window. Therefore a
slice is good only until that sub-window is over (a 60th of the window; for calendar periods, a minute at most). What a
process holds and does not use is denied to others for so long, which is all that may be under-admitted: when less than
a slice is left of a quota, calls are asked for one by one.

Who finds a slice used up waits for the next one, in the order of coming; one task asks the store for all who wait.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from copy import copy
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from meterlib.core.checks import check_amount
from meterlib.core.periods import period_at
from meterlib.core.policy import BoundLimit
from meterlib.core.usage import Usage
from meterlib.errors import InvalidInput, MeterError, QuotaExceeded, StoreUnavailable, UsageError
from meterlib.store.telling import log

if TYPE_CHECKING:
    from meterlib.meter import AsyncMeter, AsyncReservation
    from meterlib.store.options import Clock

SLICE_MS_MAX = 60_000
"""A process that dies with a slice keeps it from others until its lease ends, so even a month's slice is short."""

LEASE_MS = 3 * SLICE_MS_MAX
SUB_WINDOW_MS_MIN = 100
LATE_MAX = 10
"""So many slices in a row may be over before they come; then the store is too far away for slices as short as these."""

UNITS = ("requests", "input_tokens", "output_tokens", "total_tokens")


class _Waiting(NamedTuple):
    """A call that waits for a slice, and what its caller waits on: the reservation that it was admitted out of."""

    input_tokens: int
    output_tokens: int
    admitted: asyncio.Future[AsyncReservation]


class LocalLease:
    """Admits calls of one tenant with the same attributes, out of slices of at most `slice_of`.

    For one event loop. An async context manager: leaving it gives back what was not used, and books what was.

    Attributes:
        slice_of: how much is taken from the limits at a time; its `requests` are how many calls.
    """

    def __init__(
        self,
        meter: AsyncMeter,
        tenant: str,
        attributes: Mapping[str, str],
        slice_of: Usage,
        limits: Callable[[], Sequence[BoundLimit]],
        clock: Clock | None,
    ) -> None:
        if not isinstance(slice_of, Usage):
            raise InvalidInput("slice_of", f"a Usage is needed, not {type(slice_of).__name__}")
        if not slice_of.requests:
            raise InvalidInput("slice_of", "must say of how many calls a slice is: Usage(requests=1000, …)")
        self.slice_of = slice_of
        self._meter = meter
        self._tenant = tenant
        self._attributes = dict(attributes)
        self._limits = limits
        self._clock = clock
        self._closed = False
        self._good_for_ms(0)
        self._held: AsyncReservation | None = None
        self._size = slice_of
        self._requests = self._input_tokens = self._output_tokens = 0
        self._until = 0.0
        self._waiting: deque[_Waiting] = deque()
        self._working: asyncio.Task[None] | None = None

    def take(self, input_tokens: int = 0, output_tokens: int = 0) -> bool:
        """Admit one call that uses so much, if the slice has room for it; asks nobody.

        Raises:
            InvalidInput: a number is negative or no integer.
        """
        if type(input_tokens) is not int or type(output_tokens) is not int or input_tokens < 0 or output_tokens < 0:
            check_amount(input_tokens, "input_tokens")
            check_amount(output_tokens, "output_tokens")
        requests = self._requests
        left_in, left_out = self._input_tokens - input_tokens, self._output_tokens - output_tokens
        if requests < 1 or left_in < 0 or left_out < 0 or self._now() >= self._until:
            return False
        self._requests, self._input_tokens, self._output_tokens = requests - 1, left_in, left_out
        return True

    async def admit(self, input_tokens: int = 0, output_tokens: int = 0) -> None:
        """Admit one call, out of the next slice if this one has no room for it, in turn with others who wait.

        Raises:
            QuotaExceeded: the store has no slice left to give; see `Meter.reserve`.
            StoreUnavailable: the store is away, or so slow that slices are over before they come.
            InvalidInput: a number is negative or no integer, or the call asks for more than a whole slice.
            UsageError: the lease is closed.
        """
        check_amount(input_tokens, "input_tokens")
        check_amount(output_tokens, "output_tokens")
        if input_tokens > (self.slice_of.input_tokens or 0) or output_tokens > (self.slice_of.output_tokens or 0):
            raise InvalidInput("input_tokens", "the call uses more than a slice has; make slices larger")
        if not self.take(input_tokens, output_tokens):
            await self._wait(input_tokens, output_tokens)

    async def aclose(self) -> None:
        """Give back what was not used; what was is booked.

        Raises:
            StoreError: it could not be booked; closing again tries again.
        """
        self._closed = True
        if self._working:
            await asyncio.wait([self._working])
        await self._give_back()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # ── Whoever waits ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _wait(self, input_tokens: int, output_tokens: int) -> None:
        if self._closed:
            raise UsageError("this lease is closed")
        admitted: asyncio.Future[AsyncReservation] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(input_tokens, output_tokens, admitted))
        self._begin(self._serve)
        try:
            await admitted
        except asyncio.CancelledError:
            over = admitted.done() and not admitted.cancelled()
            if over and not admitted.exception() and admitted.result() is self._held:
                self._requests += 1  # it was admitted in this very moment, and is not made
                self._input_tokens += input_tokens
                self._output_tokens += output_tokens
            raise

    def _begin(self, work: Callable[[], Coroutine[None, None, None]]) -> None:
        """One task at a time asks the store; when it is over, another one serves those who came too late for it."""
        if self._working is None:
            self._working = asyncio.ensure_future(work())
            self._working.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._working = None
        error = None if task.cancelled() else task.exception()
        if error:
            log.warning("slice.failed", tenant=self._tenant, error=str(error))  # and whoever waited for it was told
        if self._first():
            self._begin(self._serve)

    async def _serve(self) -> None:
        """Slices, until nobody waits any more."""
        late = 0
        try:
            while (first := self._first()) and not self._closed:
                try:
                    await self._next_slice(first)
                except QuotaExceeded as denied:
                    self._tell(denied, first)
                else:
                    late = 0 if self._hand_out() else late + 1
                if late > LATE_MAX:
                    raise StoreUnavailable("local", "it takes longer to answer than a slice lasts")
            self._tell(UsageError("this lease is closed"))
        except MeterError as error:
            self._tell(error)
            raise
        except BaseException as error:
            self._tell(StoreUnavailable("local", f"{type(error).__name__}: {error}"))
            raise

    def _first(self) -> _Waiting | None:
        while self._waiting and self._waiting[0].admitted.done():
            self._waiting.popleft()  # it was cancelled, or told an error
        return self._waiting[0] if self._waiting else None

    async def _next_slice(self, first: _Waiting) -> None:
        """A whole slice; where that is denied, as much as the first call needs."""
        await self._give_back()
        try:
            await self._take_slice(self.slice_of)
        except QuotaExceeded:
            alone = Usage(requests=1, input_tokens=first.input_tokens, output_tokens=first.output_tokens)
            await self._take_slice(alone)

    def _hand_out(self) -> bool:
        """Admit those who wait, as far as the slice goes; whether anybody was."""
        served = False
        while (first := self._first()) and self._held and self.take(first.input_tokens, first.output_tokens):
            first.admitted.set_result(self._held)
            served = True
        return served

    def _tell(self, error: MeterError, denied: _Waiting | None = None) -> None:
        """An error is that of all who wait; a denial, of those who ask for no less than who was denied."""
        for waiting in self._waiting:
            smaller = denied and (waiting.input_tokens, waiting.output_tokens) != (
                max(waiting.input_tokens, denied.input_tokens),
                max(waiting.output_tokens, denied.output_tokens),
            )
            if not (smaller or waiting.admitted.done()):
                waiting.admitted.set_exception(copy(error))  # each caller adds its own traceback

    # ── The slice ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _take_slice(self, size: Usage) -> None:
        asked = self._now()
        self._held = await self._meter.reserve(self._tenant, self._attributes, size, lease_ms=LEASE_MS)
        # When we asked, the store's time was no later than `reserved_at_ms`; so the slice is over no earlier than this.
        good_for_ms = self._good_for_ms(self._held.reserved_at_ms)
        self._until = asked + good_for_ms
        if not self._clock:
            asyncio.get_running_loop().call_later(good_for_ms / 1000, self._over, self._held)
        self._size = size
        self._requests, self._input_tokens = size.requests or 0, size.input_tokens or 0
        self._output_tokens = size.output_tokens or 0

    def _good_for_ms(self, reserved_at_ms: int) -> int:
        """How long the hold stands where a call made now would be counted."""
        ends = [reserved_at_ms + SLICE_MS_MAX]
        for bound in self._limits():
            if bound.limit.open or bound.unit not in UNITS:
                problem = f"the limit {bound.name!r} counts {'concurrency' if bound.limit.open else bound.unit}"
                raise InvalidInput("attributes", f"{problem}, which cannot be handed out in advance")
            if bound.limit.period:
                ends.append(period_at(bound.limit.period, bound.limit.tz, reserved_at_ms).end_ms)
            elif bound.sub_window_ms < SUB_WINDOW_MS_MIN:
                problem = (
                    f"the limit {bound.name!r} forgets every {bound.sub_window_ms} ms, and a slice lasts no longer"
                )
                raise InvalidInput("attributes", f"{problem}; give it fewer sub_windows, or ask the store each time")
            else:
                ends.append((reserved_at_ms // bound.sub_window_ms + 1) * bound.sub_window_ms)
        return min(ends) - reserved_at_ms

    async def _give_back(self) -> None:
        """The slice is over: its hold gives way to what was admitted out of it."""
        held, self._until = self._held, 0.0
        if held is None:
            return
        used = Usage(
            requests=(self._size.requests or 0) - self._requests,
            input_tokens=(self._size.input_tokens or 0) - self._input_tokens,
            output_tokens=(self._size.output_tokens or 0) - self._output_tokens,
        )
        # Only when that is done there is another slice: what cannot be booked now must not be forgotten.
        if used.requests:
            await held.settle(used)
        else:
            await held.cancel()
        self._held, self._requests = None, 0

    def _over(self, held: AsyncReservation) -> None:
        """Nobody needed the next slice yet: what is left of this one is kept from others no longer."""
        if self._held is held:
            self._begin(self._give_back)

    def _now(self) -> float:
        return self._clock.now_ms if self._clock else time.monotonic() * 1000
