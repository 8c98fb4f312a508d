"""Whoever leaves, or is stopped, while the store still decides leaves nothing held, and nothing is sent for them."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="needs meterlib[gateway]")

from meterlib import Usage
from meterlib.config import Config, StoreSettings
from meterlib.errors import StoreError, StoreUnavailable
from meterlib.gateway.assembly import gateway_for
from meterlib.store.journal import Journal
from tests.gateway.books import until
from tests.gateway.wire import connected, request
from tests.gateway.world import HOSTED, LIMITS, World, run


@pytest.mark.parametrize("named", [True, False])
def test_a_gateway_keeps_a_journal_unless_told_otherwise(
    named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A settlement that the store does not take is in a file by then, wherever nobody has named one."""
    monkeypatch.chdir(tmp_path)
    journal = tmp_path / ("named" if named else "meterlib-settlements.journal")
    store = StoreSettings(
        url=f"unix://{tmp_path}/none.sock", timeout_ms=20, deadline_ms=40, journal=str(journal) if named else None
    )

    async def main() -> None:
        async with gateway_for(Config(store=store), {}) as gateway:
            with suppress(StoreError):
                await gateway.meter.settle("acme", "r1", Usage(input_tokens=7, output_tokens=1))

    asyncio.run(main())
    ((_, waiting),) = Journal(journal).waiting()
    assert ("acme", "r1", 7) == (waiting.tenant, waiting.reservation_id, waiting.usage.input_tokens)


class SlowStore:
    """A store that has decided, and whose answer takes its time."""

    def __init__(self, world: World) -> None:
        self.decided = asyncio.Event()
        self.answers = asyncio.Event()
        self._reserve = world.meter.reserve
        world.meter.reserve = self.reserve  # type: ignore[method-assign]

    async def reserve(self, *told: Any, **named: Any) -> Any:
        held = await self._reserve(*told, **named)
        self.decided.set()
        await self.answers.wait()
        return held


def test_nothing_is_sent_for_a_client_that_has_left_meanwhile() -> None:
    """It would be paid for, and read by nobody."""

    async def use(world: World) -> None:
        store = SlowStore(world)
        async with connected(world.url) as wire:
            await wire.send(request())
            await store.decided.wait()
            assert 1 == await world.open_reservations()
        await until(lambda: not world.server._connections._addresses)
        store.answers.set()
        await world.settled()
        assert [] == world.provider.requests
        assert ["cancelled"] == [entry.kind for entry in await world.entries()]
        assert 0 == await world.open_reservations()

    run(use, HOSTED, limits=LIMITS)


@pytest.mark.parametrize("took_effect", [True, False])
def test_a_decision_whose_answer_is_lost_holds_nothing(took_effect: bool) -> None:
    """Nobody knows whether the store has reserved; the client is sent away, so it is not to be, whatever came first."""

    async def use(world: World) -> None:
        reserve = world.meter.reserve

        async def loses_the_answer(*told: Any, **named: Any) -> Any:
            if took_effect:
                await reserve(*told, **named)
            raise StoreUnavailable("reserve", "the answer was lost")

        world.meter.reserve = loses_the_answer  # type: ignore[method-assign]
        assert (503, "api_error") == (await world.post()).error
        await world.settled()
        assert 0 == await world.open_reservations()
        assert ["cancelled"] * took_effect == [entry.kind for entry in await world.entries()]
        assert [] == world.provider.requests

    run(use, HOSTED, limits=LIMITS)


@pytest.mark.parametrize("body", [b"{", None], ids=["without sense", "with sense"])
def test_a_stop_while_the_store_decides_leaves_nothing_held(body: bytes | None) -> None:
    """The request may make sense or just be counted: the one is cancelled, the other booked."""

    async def use(world: World) -> None:
        store = SlowStore(world)
        async with connected(world.url) as wire:
            await wire.send(request() if body is None else request(body=body))
            await store.decided.wait()
            world.gateway._closes_meter = False
            stopping = asyncio.create_task(world.gateway.aclose())
            await until(lambda: not world.gateway._handling)
            store.answers.set()
            await wire.rest()
            await until(lambda: not world.gateway._background)
            assert [] == world.provider.requests
            assert 0 == await world.open_reservations()
            assert ["cancelled" if body is None else "settled"] == [entry.kind for entry in await world.entries()]
            await stopping

    run(use, HOSTED, limits=LIMITS)
