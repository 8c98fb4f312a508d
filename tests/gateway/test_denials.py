"""How often limits denied: counted by tenant and limit, booked once a minute, and never taken for a call."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from structlog.testing import capture_logs

pytest.importorskip("aiohttp", reason="needs meterlib[gateway]")

from meterlib import AsyncMeter, LedgerEntry, Limit, Policy, StoreOptions
from meterlib.billing.rating.measures import passes_of
from meterlib.billing.reports.report import contributions
from meterlib.errors import StoreError
from meterlib.gateway import denials
from meterlib.gateway.asgi import MeteringMiddleware, Who
from meterlib.gateway.tokens import hash_of
from meterlib.settings import TenantSettings
from meterlib.store import flows
from meterlib.testing import Clock
from tests.gateway.test_spending import asked
from tests.gateway.world import HOSTED, World, a_world, run
from tests.support.servers import Server

GLOBEX = TenantSettings(name="globex", tokens=[hash_of("ml_globex")])
LIMITS = (
    Limit(name="rpm", quota=2, window="1m", per=["provider"]),
    Limit(name="Per-Day.calls", quota=3, period="day"),
)


async def booked(world: World) -> list[LedgerEntry]:
    """The entries of denials."""
    await world.settled()
    return [entry for entry in await world.entries() if entry.facts.get("end") == "denied"]


def counts(entries: list[LedgerEntry]) -> list[tuple[str, object]]:
    return sorted((entry.tenant, entry.usage["amounts"]) for entry in entries)


def test_denials_are_booked_once_a_minute_by_tenant_and_limit() -> None:
    """Each denied call counts once, for the limit that it was told of; what makes no sense and is denied does too."""

    async def use(world: World) -> None:
        for _ in range(5):
            await world.post()
        for _ in range(3):
            await world.post(key="ml_globex")
        await world.post(b"{")
        world.advance(ms=59_000)
        assert [] == await booked(world)
        world.advance(ms=1_000)
        first = await booked(world)
        assert [("acme", {"denied_rpm": 4}), ("globex", {"denied_rpm": 1})] == counts(first)

        world.advance(ms=1_000)
        for _ in range(3):
            await world.post()
        world.advance(ms=120_000)
        second = [entry for entry in await booked(world) if entry not in first]
        assert [("acme", {"denied_per_day_calls": 2})] == counts(second)
        world.advance(ms=120_000)
        assert len(first + second) == len(await booked(world))

    run(use, HOSTED, GLOBEX, limits=LIMITS)


def test_an_entry_of_denials_is_no_call() -> None:
    """It charges no limit, has nothing to be priced, and adds to no count of calls."""

    async def use(world: World) -> None:
        for _ in range(5):
            await world.post()
        world.clock.advance(ms=60_000)
        before = await world.meter.peek("acme", {"provider": "anthropic"})
        world.gateway.tend()
        (entry,) = await booked(world)

        assert before == await world.meter.peek("acme", {"provider": "anthropic"})
        assert ("recorded", {"requests": 0, "amounts": {"denied_rpm": 3}}) == (entry.kind, entry.usage)
        assert () == passes_of(entry)
        assert [(None, {"calls": 0, "amounts.denied_rpm": 3})] == list(contributions(entry))
        assert {"provider": "anthropic"} == entry.attributes
        known = await world.meter._run(flows.partitions(world.meter._context, "acme"))
        assert {"rpm", "Per-Day.calls"} == {each.state.name for each in known}
        assert 2 == len(known), "a partition that no call has"

    run(use, HOSTED, limits=LIMITS)


def test_a_stop_books_what_was_counted(tmp_path: Any, valkey: Server) -> None:
    """At the latest."""
    with valkey.client() as client:
        client.flushall()

    async def play() -> None:
        async with a_world(HOSTED, limits=LIMITS, store=valkey.url) as world:
            for _ in range(4):
                await world.post()
        async with AsyncMeter.connect(valkey.url, Policy(), options=StoreOptions(shards=2), clock=Clock()) as meter:
            entries = [entry for shard in range(2) async for entry in meter.ledger(shard)]
        assert [("acme", {"denied_rpm": 2})] == counts([e for e in entries if e.facts.get("end") == "denied"])

    asyncio.run(play())


def test_while_the_store_is_away_denials_wait(valkey: Server) -> None:
    """They are booked once, however often that is tried, and whether or not the first time took effect."""
    with valkey.client() as client:
        client.flushall()

    async def use(world: World) -> None:
        for _ in range(4):
            await world.post()
        run_flow, lost = world.meter._run, []

        async def loses_the_answer(flow: Any) -> Any:
            await run_flow(flow)
            lost.append(flow)
            raise StoreError("the answer was lost")

        world.meter._run = loses_the_answer  # type: ignore[method-assign]
        world.advance(ms=60_000)
        await world.settled()
        world.meter._run = run_flow  # type: ignore[method-assign]
        assert 1 == len(lost)
        world.advance(ms=60_000)
        assert [("acme", {"denied_rpm": 2})] == counts(await booked(world))

    run(use, HOSTED, limits=LIMITS, store=valkey.url)


def test_a_flush_is_over_when_all_that_was_counted_before_it_has_been_tried() -> None:
    """Whoever stops waits for it, and may close the meter then; also if another flush is on its way, or given up."""

    async def main(given_up: bool) -> None:
        async with AsyncMeter.connect("memory://", Policy(), options=StoreOptions(shards=1), clock=Clock()) as meter:
            kept = denials.Denials(meter, lambda: 0.0)
            run_flow, goes_on, begun = meter._run, asyncio.Event(), asyncio.Event()

            async def slow(flow: Any) -> Any:
                begun.set()
                await goes_on.wait()
                return await run_flow(flow)

            meter._run = slow  # type: ignore[method-assign]
            kept.count("acme", "", "rpm")
            first = asyncio.create_task(kept.flush())
            await begun.wait()
            kept.count("globex", "", "rpm")
            second = asyncio.create_task(kept.flush())
            await asyncio.sleep(0)
            if given_up:
                first.cancel()
            goes_on.set()
            await second
            assert not kept.pending
            entries = [(entry.tenant, entry.usage["amounts"]) async for entry in meter.ledger(0)]
            assert [("acme", {"denied_rpm": 1}), ("globex", {"denied_rpm": 1})] == sorted(entries)
            await asyncio.wait([first])
            assert given_up == first.cancelled()
            assert given_up or first.exception() is None

    asyncio.run(main(given_up=False))
    asyncio.run(main(given_up=True))


def test_no_more_wait_than_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that stays away does not fill the memory either; what is given up is logged with its counts."""
    monkeypatch.setattr(denials, "TALLIES_MAX", 10)

    async def main() -> None:
        async with AsyncMeter.connect("memory://", Policy(), options=StoreOptions(shards=1), clock=Clock()) as meter:
            kept = denials.Denials(meter, lambda: 0.0)

            async def away(flow: Any) -> Any:
                flow.close()
                raise StoreError("away")

            run_flow, meter._run = meter._run, away  # type: ignore[method-assign]
            with capture_logs() as logs:
                for number in range(25):
                    kept.count(f"tenant{number}", "", "rpm")
                    await kept.flush()
            dropped = {each["tenant"] for each in logs if not each["kept"]}
            assert {f"tenant{number}" for number in range(10, 25)} == dropped
            meter._run = run_flow  # type: ignore[method-assign]
            await kept.flush()
            assert 10 == (await meter.head(0)).ledger_last

    asyncio.run(main())


def test_many_counts_are_booked_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever invents tenants does not fill the memory."""
    monkeypatch.setattr(denials, "TALLIES_MAX", 10)
    clock = Clock()

    async def main() -> None:
        async with AsyncMeter.connect("memory://", Policy(), options=StoreOptions(shards=1), clock=clock) as meter:
            kept = denials.Denials(meter, lambda: clock.now_ms / 1000)
            for number in range(10):
                assert not kept.due
                kept.count(f"tenant{number}", "", "rpm")
            assert kept.due
            for number in range(100):
                kept.count(f"tenant{number}", "", "rpm")
            await kept.flush()
            assert not kept.due
            assert 20 == (await meter.head(0)).ledger_last

    asyncio.run(main())


def test_the_middleware_books_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some time after the first one, and before the app is told to end."""
    monkeypatch.setattr("meterlib.gateway.asgi.FLUSH_S", 0.01)
    told: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        told.append((await receive())["type"])

    async def main() -> None:
        options = StoreOptions(shards=1)
        policy = Policy(limits=[Limit(name="none", quota=0, window="1m")])
        async with AsyncMeter.connect("memory://", policy, options=options) as meter:
            wrapped = MeteringMiddleware(app, meter, lambda scope: Who("acme", {}))
            assert [429, 429] == [await asked(wrapped), await asked(wrapped)]
            async with asyncio.timeout(10):
                while not (await meter.head(0)).ledger_last:
                    await asyncio.sleep(0.005)
            monkeypatch.setattr("meterlib.gateway.asgi.FLUSH_S", 3600)
            assert 429 == await asked(wrapped)

            async def receive() -> Any:
                return {"type": "lifespan.shutdown"}

            await wrapped({"type": "lifespan"}, receive, nothing)
            entries = [entry async for entry in meter.ledger(0)]
        assert ["lifespan.shutdown"] == told
        assert [{"denied_none": 2}, {"denied_none": 1}] == [entry.usage["amounts"] for entry in entries]

    asyncio.run(main())


def test_the_middleware_tries_again_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the store did not take the first time does not wait for the next denial, which may never come."""
    monkeypatch.setattr("meterlib.gateway.asgi.FLUSH_S", 0.01)

    async def main() -> None:
        policy = Policy(limits=[Limit(name="none", quota=0, window="1m")])
        async with AsyncMeter.connect("memory://", policy, options=StoreOptions(shards=1)) as meter:
            wrapped = MeteringMiddleware(nothing, meter, lambda scope: Who("acme", {}))  # type: ignore[arg-type]
            assert 429 == await asked(wrapped)
            run_flow, failed = meter._run, asyncio.Event()

            async def fails_once(flow: Any) -> Any:
                meter._run = run_flow  # type: ignore[method-assign]
                failed.set()
                flow.close()
                raise StoreError("away")

            meter._run = fails_once  # type: ignore[method-assign]
            async with asyncio.timeout(10):
                await failed.wait()
                while not (await meter.head(0)).ledger_last:
                    await asyncio.sleep(0.005)
                while wrapped._booking_denials:
                    await asyncio.sleep(0.005)
            assert [{"denied_none": 1}] == [entry.usage["amounts"] async for entry in meter.ledger(0)]

    asyncio.run(main())


def test_a_stop_waits_for_what_is_just_being_booked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The app closes the meter as soon as it is told to end."""
    monkeypatch.setattr("meterlib.gateway.asgi.FLUSH_S", 0.0)

    async def main() -> None:
        policy = Policy(limits=[Limit(name="none", quota=0, window="1m")])
        async with AsyncMeter.connect("memory://", policy, options=StoreOptions(shards=1)) as meter:

            async def app(scope: Any, receive: Any, send: Any) -> None:
                await receive()
                meter._run = run_flow  # type: ignore[method-assign]
                assert [{"denied_none": 1}] == [entry.usage["amounts"] async for entry in meter.ledger(0)]

            wrapped = MeteringMiddleware(app, meter, lambda scope: Who("acme", {}))
            assert 429 == await asked(wrapped)
            run_flow, begun = meter._run, asyncio.Event()

            async def slow(flow: Any) -> Any:
                begun.set()
                await asyncio.sleep(0.01)
                return await run_flow(flow)

            meter._run = slow  # type: ignore[method-assign]
            async with asyncio.timeout(10):
                await begun.wait()

            async def receive() -> Any:
                return {"type": "lifespan.shutdown"}

            await wrapped({"type": "lifespan"}, receive, nothing)

    asyncio.run(main())


async def nothing(message: Any) -> None:
    """Nobody listens."""


@pytest.mark.parametrize(
    ("limit", "unit"),
    [("rpm", "denied_rpm"), ("Per-Day.calls", "denied_per_day_calls"), ("x" * 64, "denied_" + "x" * 57)],
)
def test_a_unit_is_named_after_its_limit(limit: str, unit: str) -> None:
    """As far as a unit can have such a name."""
    assert unit == denials.unit_of(limit)
