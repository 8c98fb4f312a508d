"""How often limits denied: counted in memory, and booked once a minute, since a denied call itself writes nothing."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from meterlib.core.usage import Usage
from meterlib.errors import MeterError, StoreError
from meterlib.meter import AsyncMeter
from meterlib.store.telling import Log

FLUSH_S = 60
TALLIES_MAX = 10_000
"""So many counts, by tenant and limit, are kept at most; they are booked early when there are that many."""

END = "denied"
"""What entries of denials have as the fact `end`."""
_UNIT_BYTES_MAX = 64

log = Log("meterlib.gateway")


def unit_of(limit: str) -> str:
    """The unit that counts a limit's denials: `denied_` and its name, as far as a unit can have that name."""
    return f"denied_{re.sub('[^a-z0-9_]', '_', limit.lower())}"[:_UNIT_BYTES_MAX]


class _Booking(NamedTuple):
    """What is to be booked, under an id, so that it is booked once however often that is tried."""

    id: str
    tenant: str
    provider: str
    counts: dict[str, int]


class Denials:
    """Denials of all tenants since they were last booked.

    Each tenant that had some gets one `recorded` entry a minute, with the fact `end = "denied"` and the usage
    `{"requests": 0, "amounts": {"denied_<limit>": count, …}}`. So it is no call, charges no limit, and has nothing to
    be priced. A denied call counts once, for the limit that it was told of. A process that is killed loses the counts
    of at most a minute, and while the store is away no more than `TALLIES_MAX` are kept.

    Args:
        meter: books them.
        now_s: a clock that never goes back, in seconds.
    """

    def __init__(self, meter: AsyncMeter, now_s: Callable[[], float]) -> None:
        self._meter = meter
        self._now_s = now_s
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._waiting: list[_Booking] = []
        self._flushing = asyncio.Lock()
        self._flushed_s = now_s()

    def count(self, tenant: str, provider: str, limit: str) -> None:
        """A call was denied by this limit."""
        key = (tenant, provider, unit_of(limit))
        if key in self._counts or len(self._counts) < 2 * TALLIES_MAX:
            self._counts[key] += 1

    @property
    def pending(self) -> bool:
        """Whether there are any to be booked."""
        return bool(self._counts or self._waiting)

    @property
    def due(self) -> bool:
        """Whether it is time to book them."""
        waited = self._now_s() - self._flushed_s >= FLUSH_S
        return len(self._counts) >= TALLIES_MAX or (waited and self.pending)

    async def flush(self) -> None:
        """Book them; what the store does not take now waits for the next time.

        When it returns, all that was counted before has been tried, by whichever flush; one that is given up half-way
        leaves the rest, and what it may have booked, to the next.
        """
        self._flushed_s = self._now_s()
        async with self._flushing:
            self._waiting += self._bookings()
            waiting = self._waiting
            done = await asyncio.gather(*[self._book(at, booking) for at, booking in enumerate(waiting)])
            self._waiting = [booking for booking, is_done in zip(waiting, done, strict=True) if not is_done]

    def _bookings(self) -> list[_Booking]:
        counts, self._counts = self._counts, Counter()
        made: dict[tuple[str, str], _Booking] = {}
        for (tenant, provider, unit), count in counts.items():
            new = _Booking(secrets.token_hex(16), tenant, provider, {})
            made.setdefault((tenant, provider), new).counts[unit] = count
        return list(made.values())

    async def _book(self, at: int, booking: _Booking) -> bool:
        """Whether it is done with, booked or given up: what the store does not take waits, but only so many of it."""
        attributes = {"provider": booking.provider} if booking.provider else {}
        usage = Usage(requests=0, amounts=booking.counts)
        try:
            await self._meter.record(booking.tenant, attributes, usage, record_id=booking.id, facts={"end": END})
        except MeterError as error:
            kept = isinstance(error, StoreError) and at < TALLIES_MAX
            log.warning("denials.not_booked", tenant=booking.tenant, kept=kept, error=str(error), **booking.counts)
            return not kept
        return True
