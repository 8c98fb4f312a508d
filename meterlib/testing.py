"""For tests, ours and users': a settable clock, and a meter in memory that behaves as the real ones do."""

from __future__ import annotations

from meterlib.core.policy import Policy
from meterlib.meter import AsyncMeter, Meter


class Clock:
    """A clock that stands still until it is told otherwise: `Meter.connect(any_url, policy, clock=clock)`."""

    def __init__(self, now_ms: int = 1_790_000_000_000) -> None:
        self._now_ms = now_ms

    @property
    def now_ms(self) -> int:
        """Ms since 1970 UTC."""
        return self._now_ms

    def set(self, now_ms: int) -> None:
        """Be at this moment, be it earlier or later."""
        if type(now_ms) is not int or now_ms <= 0:
            raise ValueError("a clock is set to a positive number of ms since 1970 UTC")
        self._now_ms = now_ms

    def advance(self, *, ms: int) -> None:
        """Go on, or back with a negative number."""
        self.set(self._now_ms + ms)


class MemoryMeter(Meter):
    """A meter in this process alone, on the pure twin of the scripts; for unit tests that need no server.

    Held to the scripts by tests that give both the same random histories.
    """

    def __init__(self, policy: Policy, *, clock: Clock | None = None) -> None:
        super().__init__("memory://", policy, clock=clock)


class AsyncMemoryMeter(AsyncMeter):
    """The `MemoryMeter` for asyncio."""

    def __init__(self, policy: Policy, *, clock: Clock | None = None) -> None:
        super().__init__("memory://", policy, clock=clock)
