"""Callers that go on while servers change places: each repeats what failed, under the same id, until it is done."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from typing import Any

from meterlib import AsyncMeter, Limit, Meter, Policy, StoreUnavailable, Usage

CALL = {"provider": "anthropic", "model": "claude-sonnet-4-5"}
POLICY = Policy(
    limits=(
        Limit(name="requests", quota=10**9, window="1m", per=("provider",)),
        Limit(name="month", unit="output_tokens", quota=10**12, period="month"),
        Limit(name="open", quota=10**6, open=True),
    )
)
HELD, USED = Usage(output_tokens=50), Usage(input_tokens=10, output_tokens=7)
TENANTS = tuple(f"tenant-{at}" for at in range(48))
LEASE_MS = 120_000
PATIENCE_SECONDS = 60.0


class Traffic:
    """What callers did, as they know it themselves.

    Attributes:
        done: tenant and id of each call that was reserved and settled, as the store said.
        unavailable: how often a caller was told that the store does not answer, and asked again.
    """

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []
        self.unavailable = 0
        self._numbers = itertools.count()
        self._over = threading.Event()

    def more(self, count: int) -> None:
        """Return when so many more calls were made; whatever is wrong, it is not wrong for all."""
        wanted, until_s = len(self.done) + count, time.monotonic() + PATIENCE_SECONDS
        while len(self.done) < wanted:
            assert time.monotonic() < until_s, f"nothing goes on: {len(self.done)} calls"
            time.sleep(0.002)

    def through(self, meter: Meter, meanwhile: Callable[[], None]) -> None:
        """Threads call while something happens, and end when that is over."""
        with ThreadPoolExecutor(len(TENANTS)) as pool:
            running = [pool.submit(self._call_on, meter, tenant) for tenant in TENANTS]
            try:
                meanwhile()
            finally:
                self._over.set()
            for caller in running:
                caller.result()

    def through_async(
        self, make: Callable[[], AbstractAsyncContextManager[AsyncMeter]], meanwhile: Callable[[], None]
    ) -> None:
        """Tasks call while something happens, and end when that is over."""

        async def main() -> None:
            async with make() as meter:
                running = [asyncio.ensure_future(self._call_on_async(meter, tenant)) for tenant in TENANTS]
                try:
                    await asyncio.to_thread(meanwhile)
                finally:
                    self._over.set()
                await asyncio.gather(*running)

        asyncio.run(main())

    def _call_on(self, meter: Meter, tenant: str) -> None:
        while not self._over.is_set():
            taken_id = f"call-{next(self._numbers)}"
            self._until_done(
                lambda: meter.reserve(tenant, CALL, HELD, reservation_id=taken_id, lease_ms=LEASE_MS)  # noqa: B023
            )
            self._until_done(lambda: meter.settle(tenant, taken_id, USED, attributes=CALL))  # noqa: B023
            self.done.append((tenant, taken_id))

    async def _call_on_async(self, meter: AsyncMeter, tenant: str) -> None:
        while not self._over.is_set():
            taken_id = f"call-{next(self._numbers)}"
            await self._until_done_async(
                lambda: meter.reserve(tenant, CALL, HELD, reservation_id=taken_id, lease_ms=LEASE_MS)  # noqa: B023
            )
            await self._until_done_async(lambda: meter.settle(tenant, taken_id, USED, attributes=CALL))  # noqa: B023
            self.done.append((tenant, taken_id))

    def _until_done(self, act: Callable[[], object]) -> None:
        until_s = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                act()
                return
            except StoreUnavailable:
                self.unavailable += 1
                if time.monotonic() > until_s:
                    raise

    async def _until_done_async(self, act: Callable[[], Coroutine[Any, Any, object]]) -> None:
        until_s = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                await act()
                return
            except StoreUnavailable:
                self.unavailable += 1
                if time.monotonic() > until_s:
                    raise

    def settle_again(self, meter: Meter) -> None:
        """Say once more what each call used, as whoever is not sure that a failover kept it may do at any time."""
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda call: meter.settle(call[0], call[1], USED, attributes=CALL), self.done))

    def check(self, meter: Meter, *, lost: bool = False) -> None:
        """Each call is booked exactly once and counted exactly once, and nothing is held.

        Args:
            meter: sees the store.
            lost: whether a failover may have lost reservations, whose usage was booked late then.
        """
        entries = [entry for shard in range(meter.shards) for entry in meter.ledger(shard)]
        booked = Counter((entry.tenant, entry.reservation_id) for entry in entries if entry.usage)

        assert Counter(self.done) == booked
        assert {"settled"} | ({"late"} if lost else set()) >= {entry.kind for entry in entries}
        assert 0 == sum(meter.head(shard).open_reservations for shard in range(meter.shards))
        made = Counter(tenant for tenant, _ in self.done)
        for tenant in TENANTS:
            states = {state.name: state for state in meter.peek(tenant, CALL)}

            assert (7 * made[tenant], 0) == (states["month"].used, states["month"].held)
            assert 0 == states["open"].used
