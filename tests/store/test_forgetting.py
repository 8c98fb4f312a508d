"""Whatever a caller held is free as soon as its call has failed: the collector, which would find it, comes late."""

from __future__ import annotations

import asyncio
import gc
import socket
import weakref
from collections.abc import Awaitable, Callable, Iterator

import pytest

from meterlib import AsyncMeter, Limit, Meter, MeterError, Policy, QuotaExceeded, StoreOptions, StoreUnavailable
from meterlib.testing import Clock

ONCE = Policy(limits=[Limit(name="requests", quota=1, window="1m")])
CALLERS = 10


class Prompt:
    """What a caller holds."""


@pytest.fixture(autouse=True)
def without_collector() -> Iterator[None]:
    """Until the test is over, nothing is freed that holds itself."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def failing(ask: Callable[[], Awaitable[object]], expected: type[MeterError]) -> weakref.ref[Prompt]:
    """A caller whose call fails; returns what leads to its prompt, if that is still there."""
    prompt = Prompt()
    with pytest.raises(expected):
        await ask()
    return weakref.ref(prompt)


def test_who_waited_in_vain_is_forgotten() -> None:
    """Many may wait at once, all with their prompts."""

    async def main() -> None:
        async with AsyncMeter.connect("memory://", ONCE, clock=(clock := Clock())) as meter:
            await meter.reserve("acme")
            waiting = [failing(lambda: meter.reserve("acme", max_wait_ms=5), QuotaExceeded) for _ in range(CALLERS)]
            asked = asyncio.gather(*waiting)
            await asyncio.sleep(0)
            clock.advance(ms=5)
            left = await asked

            assert [None] * CALLERS == [prompt() for prompt in left]

    asyncio.run(main())


def test_threads_that_waited_in_vain_are_forgotten() -> None:
    """The same without asyncio."""
    with Meter.connect("memory://", ONCE, clock=Clock()) as meter:
        meter.reserve("acme")

        def ask() -> weakref.ref[Prompt]:
            prompt = Prompt()
            with pytest.raises(QuotaExceeded):
                meter.reserve("acme", max_wait_ms=1)
            return weakref.ref(prompt)

        assert ask()() is None


def test_whoever_asked_a_store_that_is_away_is_forgotten() -> None:
    """On a bad night callers try again and again."""

    async def main() -> None:
        options = StoreOptions(deadline_ms=100)
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            away = f"redis://127.0.0.1:{nobody.getsockname()[1]}"
            async with AsyncMeter.connect(away, ONCE, options=options) as meter:
                asking = [failing(lambda: meter.reserve("acme"), StoreUnavailable) for _ in range(CALLERS)]
                left = await asyncio.gather(*asking)

                assert [None] * CALLERS == [prompt() for prompt in left]

    asyncio.run(main())
