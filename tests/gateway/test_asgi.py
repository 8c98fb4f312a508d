"""The gateway mounted in somebody's app, and somebody's app metered: over real HTTP, by a real ASGI server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from meterlib import AsyncMeter, LedgerEntry, Policy, StoreOptions
from meterlib.gateway.app import Gateway
from meterlib.gateway.asgi import AnswerCutShort, App, GatewayApp, MeteringMiddleware, Receive, Scope, Send, Who
from meterlib.gateway.callers import Callers
from meterlib.settings import GatewaySettings
from meterlib.testing import Clock
from tests.gateway.answers import STREAMS, Answer, Hold, error
from tests.gateway.provider import Provider
from tests.gateway.world import HOSTED, LIMITS, PROVIDER_KEY, TOKEN, message

uvicorn = pytest.importorskip("uvicorn")
applications = pytest.importorskip("starlette.applications")
routing = pytest.importorskip("starlette.routing")

Use = Callable[..., Awaitable[Any]]


@asynccontextmanager
async def served(app: App) -> AsyncIterator[str]:
    """The app on a server of its own; yields the URL."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, timeout_graceful_shutdown=5))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await serving


async def entries_of(meter: AsyncMeter) -> list[LedgerEntry]:
    return [entry for shard in range(meter.shards) async for entry in meter.ledger(shard)]


async def until_entries(meter: AsyncMeter, count: int) -> list[LedgerEntry]:
    """The ledger as soon as it has so many entries."""
    async with asyncio.timeout(20):
        while len(entries := await entries_of(meter)) < count:
            await asyncio.sleep(0.005)
    return entries


async def post(url: str, *, key: str = TOKEN, **fields: Any) -> tuple[int, Any, bytes, bool]:
    """Status, headers, body, and whether it came to its end."""
    async with (
        aiohttp.ClientSession() as http,
        http.post(url, json=message(**fields), headers={"x-api-key": key}) as response,
    ):
        got = b""
        try:
            async for piece in response.content.iter_any():
                got += piece
        except aiohttp.ClientPayloadError:
            return response.status, response.headers, got, False
        return response.status, response.headers, got, True


# ── The gateway, mounted ──────────────────────────────────────────────────────────────────────────────────────────────


def mounted(use: Use, **settings: Any) -> Any:
    """What `use` makes of a gateway mounted below /claude, its provider, and its meter."""

    async def main() -> Any:
        policy = Policy(limits=LIMITS)
        async with (
            Provider() as provider,
            AsyncMeter.connect("memory://", policy, options=StoreOptions(shards=2)) as meter,
        ):
            told = GatewaySettings(upstream=provider.url, shutdown_ms=0, **settings)
            callers = Callers(told, [HOSTED], {"ANTHROPIC_API_KEY": PROVIDER_KEY}, bytes(32))
            app = GatewayApp(Gateway(told, callers, meter))
            host = applications.Starlette(routes=[routing.Mount("/claude", app)], lifespan=app.lifespan)
            async with asyncio.timeout(30), served(host) as url:
                return await use(f"{url}/claude", provider, meter)

    return asyncio.run(main())


@pytest.mark.parametrize("name", STREAMS)
def test_a_mounted_gateway_passes_streams_and_books_them(name: str) -> None:
    """Whoever has an app already adds the gateway to it."""

    async def use(url: str, provider: Provider, meter: AsyncMeter) -> None:
        told = STREAMS[name]
        provider.answers(Answer(events=told.events))

        status, headers, body, whole = await post(f"{url}/v1/messages", stream=True)

        assert (200, True) == (status, whole)
        assert "49" == headers["anthropic-ratelimit-requests-remaining"]
        assert b"".join(part for part in Answer(events=told.events).pieces() if isinstance(part, bytes)) == body
        assert "/v1/messages" == provider.requests[0].target
        (entry,) = await until_entries(meter, 1)
        assert ("settled", "complete") == (entry.kind, entry.facts["end"])
        assert told.usage["output_tokens"] == entry.usage["output_tokens"]

    mounted(use)


def test_a_stream_without_its_end_is_broken_for_the_client_too() -> None:
    """Nobody may take half an answer for a whole one."""

    async def use(url: str, provider: Provider, meter: AsyncMeter) -> None:
        provider.answers(Answer(events=STREAMS["cached"].events[:-2]))

        *_, whole = await post(f"{url}/v1/messages", stream=True)

        assert not whole
        (entry,) = await until_entries(meter, 1)
        assert ("partial", "cut") == (entry.quality, entry.facts["end"])

    mounted(use)


@pytest.mark.parametrize(("on_disconnect", "quality"), [("drain", "final"), ("cancel", "partial")])
def test_a_client_that_leaves_pays_for_what_was_used(on_disconnect: str, quality: str) -> None:
    """The call goes on without its client, or ends; either way it is booked once."""

    async def use(url: str, provider: Provider, meter: AsyncMeter) -> None:
        hold = Hold()
        told = STREAMS["cached"]
        provider.answers(Answer(events=[*told.events[:4], hold, *told.events[4:]]))
        async with aiohttp.ClientSession() as http:
            asking = http.post(f"{url}/v1/messages", json=message(stream=True), headers={"x-api-key": TOKEN})
            async with asking as response:
                await response.content.readuntil(b"content_block_start")
                assert response.connection is not None
                assert response.connection.transport is not None
                response.connection.transport.abort()
        if on_disconnect == "drain":
            hold.release()

        (entry,) = await until_entries(meter, 1)

        assert ("settled", quality) == (entry.kind, entry.quality)
        assert 11 == entry.usage["input_tokens"]
        assert 0 == sum([(await meter.head(shard)).open_reservations for shard in range(2)])

    mounted(use, on_disconnect=on_disconnect)


def test_a_server_that_cancels_its_tasks_does_not_cut_an_answer_short() -> None:
    """Some do when the client leaves: a hosted call is read to its end all the same, for the provider's numbers."""
    hold, told = Hold(), STREAMS["cached"]
    asked: list[Any] = [{"type": "http.request", "body": json.dumps(message(stream=True)).encode()}]

    async def receive() -> Any:
        return asked.pop() if asked else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        await asyncio.sleep(0)

    async def main() -> None:
        async with (
            Provider() as provider,
            AsyncMeter.connect("memory://", Policy(), options=StoreOptions(shards=1)) as meter,
        ):
            provider.answers(Answer(events=[*told.events[:4], hold, *told.events[4:]]))
            settings = GatewaySettings(upstream=provider.url, shutdown_ms=0)
            callers = Callers(settings, [HOSTED], {"ANTHROPIC_API_KEY": PROVIDER_KEY}, bytes(32))
            app = GatewayApp(Gateway(settings, callers, meter))
            async with app.lifespan():
                serving = asyncio.ensure_future(app(scope(), receive, send))
                await hold.reached()
                serving.cancel()
                await asyncio.wait([serving])
                assert (True, 1) == (serving.cancelled(), app.gateway.open_calls)
                hold.release()
                (entry,) = await until_entries(meter, 1)
                assert ("final", "complete", told.usage) == (entry.quality, entry.facts["end"], entry.usage)

    asyncio.run(main())


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_server_that_fails_to_send_leaves_nothing_open(at: int) -> None:
    """Not every server says in the same way that nobody is there any more; whatever it raises, the call is booked."""

    async def main() -> None:
        async with (
            Provider() as provider,
            AsyncMeter.connect("memory://", Policy(limits=LIMITS), options=StoreOptions(shards=1)) as meter,
        ):
            settings = GatewaySettings(upstream=provider.url, shutdown_ms=0)
            callers = Callers(settings, [HOSTED], {"ANTHROPIC_API_KEY": PROVIDER_KEY}, bytes(32))
            app = GatewayApp(Gateway(settings, callers, meter))
            asked = [{"type": "http.request", "body": json.dumps(message(stream=True)).encode()}]
            sent: list[Any] = []

            async def receive() -> Any:
                return asked.pop() if asked else await asyncio.Event().wait()

            async def send(told: Any) -> None:
                if len(sent) == at:
                    raise RuntimeError("made up by a test")
                sent.append(told)

            provider.answers(Answer(events=STREAMS["cached"].events, cut_every=200))
            async with app.lifespan():
                with pytest.raises(AnswerCutShort):
                    await app(scope(), receive, send)
            (entry,) = await entries_of(meter)
            assert ("settled", "cut") == (entry.kind, entry.facts["end"])
            assert 0 == (await meter.head(0)).open_reservations

    asyncio.run(main())


@pytest.mark.parametrize("how", ["client leaves", "server cancels", "gateway stops"])
def test_wherever_it_is_interrupted_a_call_is_booked_once(how: str) -> None:
    """At each turn of the loop, from the first to the last: what reached the provider has one entry, and no hold."""

    async def main() -> None:
        turns = 0
        while await interrupted(how, turns):
            turns += 1
        assert turns > 20

    asyncio.run(main())


async def interrupted(how: str, turns: int) -> bool:
    """Make a call, and interrupt it after so many turns; whether it was still under way."""
    gone = asyncio.Event()
    asked = [{"type": "http.request", "body": json.dumps(message(stream=True)).encode()}]

    async def receive() -> Any:
        if not asked:
            await gone.wait()
        return asked.pop() if asked else {"type": "http.disconnect"}

    async def send(told: Any) -> None:
        await asyncio.sleep(0)
        if gone.is_set():
            raise OSError("nobody is there")

    async with (
        Provider() as provider,
        AsyncMeter.connect("memory://", Policy(limits=LIMITS), options=StoreOptions(shards=1)) as meter,
    ):
        settings = GatewaySettings(upstream=provider.url, shutdown_ms=0)
        gateway = Gateway(settings, Callers(settings, [HOSTED], {"ANTHROPIC_API_KEY": PROVIDER_KEY}, bytes(32)), meter)
        app = GatewayApp(gateway)
        async with app.lifespan():
            call = asyncio.ensure_future(app(scope(), receive, send))
            for _ in range(turns):
                await asyncio.sleep(0)
            under_way = not call.done()
            if how == "client leaves":
                gone.set()
            elif how == "server cancels":
                call.cancel()
            else:
                gateway.stop_now()
            await asyncio.wait([call])
            while gateway._handling or gateway._background:
                await asyncio.sleep(0.001)
            call.cancelled() or call.exception()
            entries = await entries_of(meter)
            assert len(provider.requests) <= len(entries) <= 1, turns
            assert 0 == (await meter.head(0)).open_reservations, turns
    return under_way


def scope() -> Scope:
    """The head of a call, as a server tells it."""
    headers = [(b"x-api-key", TOKEN.encode())]
    told = {"method": "POST", "path": "/v1/messages", "query_string": b"", "headers": headers}
    return {"type": "http", **told}


def test_a_mounted_gateway_refuses_as_the_api_does() -> None:
    """Its errors can be told by any client of the API, and reach no provider."""

    async def use(url: str, provider: Provider, meter: AsyncMeter) -> None:
        status, headers, body, _ = await post(f"{url}/v1/messages", key="wrong")

        assert (401, "authentication_error") == (status, json.loads(body)["error"]["type"])
        assert json.loads(body)["request_id"] == headers["request-id"]
        assert 404 == (await post(f"{url}/v1/nothing"))[0]
        assert [] == provider.requests

    mounted(use)


# ── An app, metered ───────────────────────────────────────────────────────────────────────────────────────────────────


def metered(app: App, use: Use, limits: Any = LIMITS) -> Any:
    """What `use` makes of an app with the middleware around it, and its meter."""

    async def main() -> Any:
        async with AsyncMeter.connect("memory://", Policy(limits=limits), options=StoreOptions(shards=1)) as meter:
            wrapped = MeteringMiddleware(app, meter, lambda scope: Who("acme", {"provider": "anthropic"}))
            async with asyncio.timeout(30), served(wrapped) as url:
                return await use(url, meter)

    return asyncio.run(main())


def answering(*pieces: bytes, status: int = 200, content_type: bytes = b"text/event-stream") -> App:
    """An app that answers so."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            assert b"Hello" in (await receive())["body"]
            headers = [(b"content-type", content_type), (b"anthropic-ratelimit-requests-limit", b"1")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    return app


def wire(name: str) -> bytes:
    return b"".join(part for part in Answer(events=STREAMS[name].events).pieces() if isinstance(part, bytes))


@pytest.mark.parametrize("name", STREAMS)
def test_the_middleware_books_what_an_app_streams(name: str) -> None:
    """An app of one's own is metered without a line changed in it."""

    async def use(url: str, meter: AsyncMeter) -> None:
        _, headers, body, _ = await post(f"{url}/any/v1/messages", stream=True)

        assert wire(name) == body
        assert ["50"] == headers.getall("anthropic-ratelimit-requests-limit")
        (entry,) = await until_entries(meter, 1)
        assert ("settled", "acme") == (entry.kind, entry.tenant)
        assert STREAMS[name].usage["input_tokens"] == entry.usage["input_tokens"]

    data = wire(name)
    metered(answering(data[:100], data[100:101], data[101:]), use)


def test_the_middleware_adds_nothing_to_what_an_app_streams() -> None:
    """All is known of a stream that lacks only its last event, and it passes as the app sent it."""

    async def use(url: str, meter: AsyncMeter) -> None:
        _, _, body, _ = await post(f"{url}/v1/messages", stream=True)

        assert data == body
        (entry,) = await until_entries(meter, 1)
        assert ("final", "complete") == (entry.quality, entry.facts["end"])
        assert "added" not in entry.facts

    data = wire("cached")[: wire("cached").index(b"event: message_stop")]
    metered(answering(data), use)


def test_the_middleware_denies_before_the_app_is_called() -> None:
    """What the limits deny costs the app nothing."""
    called = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal called
        called += scope["type"] == "http"
        await answering(b"{}", content_type=b"application/json")(scope, receive, send)

    async def use(url: str, meter: AsyncMeter) -> None:
        for _ in range(50):
            await post(f"{url}/v1/messages")
        status, headers, body, _ = await post(f"{url}/v1/messages")

        assert (429, "rate_limit_error") == (status, json.loads(body)["error"]["type"])
        assert 1 <= int(headers["retry-after"]) <= 60
        assert "0" == headers["anthropic-ratelimit-requests-remaining"]
        assert 50 == called

    metered(app, use)


@pytest.mark.parametrize("status", [400, 429, 529])
def test_an_error_of_the_app_costs_no_tokens(status: int) -> None:
    """The request counts, its tokens are given back."""

    async def use(url: str, meter: AsyncMeter) -> None:
        assert status == (await post(f"{url}/v1/messages"))[0]

        (entry,) = await until_entries(meter, 1)
        assert ({"status": str(status), "end": "refused"}.items()) <= entry.facts.items()
        used = {state.name: state.used for state in await meter.peek("acme", {"provider": "anthropic"})}
        assert {"requests": 1, "input_tokens": 0} == used

    metered(answering(b'{"type":"error"}', status=status, content_type=b"application/json"), use)


def test_an_app_that_fails_midway_has_used_what_it_told() -> None:
    """An exception passes through, and the call is settled all the same."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": wire("cached")[:700], "more_body": True})
        raise RuntimeError("made up by a test")

    async def use(url: str, meter: AsyncMeter) -> None:
        *_, whole = await post(f"{url}/v1/messages", stream=True)

        assert not whole
        (entry,) = await until_entries(meter, 1)
        assert ("partial", "cut", 11) == (entry.quality, entry.facts["end"], entry.usage["input_tokens"])

    metered(app, use)


@pytest.mark.parametrize("model", ["sk-ant-api03-secret", "", "a\nb", 7])
def test_a_model_that_is_none_is_refused_before_the_app_is_called(model: Any) -> None:
    """Whatever a client writes there, it gets an answer in the API's shape."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] != "http"

    async def use(url: str, meter: AsyncMeter) -> None:
        status, _, body, _ = await post(f"{url}/v1/messages", model=model)

        assert (400, "invalid_request_error") == (status, json.loads(body)["error"]["type"])

    metered(app, use)


def test_other_requests_are_none_of_the_middlewares_business() -> None:
    """Only the calls that cost something are metered."""

    async def use(url: str, meter: AsyncMeter) -> None:
        for _ in range(60):
            assert 200 == (await post(f"{url}/v1/messages/count_tokens"))[0]
        async with aiohttp.ClientSession() as http:
            for method in ("GET", "DELETE", "OPTIONS"):
                async with http.request(method, f"{url}/v1/messages", data=b"Hello") as response:
                    assert (200, b"{}") == (response.status, await response.read())

        assert [] == await entries_of(meter)

    metered(answering(b"{}", content_type=b"application/json"), use)


def through(app: App, meter: AsyncMeter, **settings: Any) -> Any:
    """A call of an app with the middleware around it, by no server at all."""
    asked: list[Any] = [{"type": "http.request", "body": json.dumps(message(stream=True)).encode()}]

    async def receive() -> Any:
        return asked.pop() if asked else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await asyncio.sleep(0)

    wrapped = MeteringMiddleware(app, meter, lambda scope: Who("acme", {"provider": "anthropic"}), **settings)
    return wrapped(scope(), receive, send)


@pytest.mark.parametrize("content_type", [b"text/event-stream", b"application/json"])
def test_an_app_that_ends_without_an_end_has_cut_its_answer(content_type: bytes) -> None:
    """It returns as if all were well; the server then breaks the connection."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", content_type)]})
        await send({"type": "http.response.body", "body": wire("cached"), "more_body": True})

    async def main() -> None:
        async with AsyncMeter.connect("memory://", Policy(), options=StoreOptions(shards=1)) as meter:
            await through(app, meter)
            (entry,) = await entries_of(meter)
            assert ("settled", "cut") == (entry.kind, entry.facts["end"])

    asyncio.run(main())


def test_the_lease_of_a_long_answer_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the app sends something now and then its call does not expire; else it is late, and charged anyway."""
    clock = Clock()
    monkeypatch.setattr("meterlib.gateway.asgi.time", SimpleNamespace(monotonic=lambda: clock.now_ms / 1000))

    def app(minutes: int) -> App:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            for at in range(0, 2000, 500):
                clock.advance(ms=minutes * 60_000)
                await send({"type": "http.response.body", "body": wire("cached")[at : at + 500], "more_body": True})
                await meter_of_all[0].sweep()
            await send({"type": "http.response.body", "body": wire("cached")[2000:]})

        return app

    meter_of_all: list[AsyncMeter] = []

    async def main() -> None:
        options = StoreOptions(shards=1)
        async with AsyncMeter.connect("memory://", Policy(), options=options, clock=clock) as meter:
            meter_of_all.append(meter)
            await through(app(6), meter, lease_ms=600_000)
            await through(app(11), meter, lease_ms=600_000)
            kinds = [entry.kind for entry in await entries_of(meter)]
            assert ["settled", "expired", "late"] == kinds

    asyncio.run(main())


def test_the_providers_errors_pass_through_a_mounted_gateway() -> None:
    """As they came, word for word."""

    async def use(url: str, provider: Provider, meter: AsyncMeter) -> None:
        provider.answers(error(529, "Overloaded"))

        status, _, body, _ = await post(f"{url}/v1/messages")

        assert (529, "Overloaded") == (status, json.loads(body)["error"]["message"])
        await until_entries(meter, 1)

    mounted(use)
