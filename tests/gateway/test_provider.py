"""The provider that the gateway is tested against does as it is told: another HTTP library sees what a script says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="needs meterlib[demo]")

from aiohttp import ClientConnectionError, ClientResponse, ClientSession

from meterlib.gateway.sse import UsageStream, usage_of
from tests.gateway.answers import (
    PING,
    STREAMS,
    Answer,
    Encoding,
    Hold,
    Item,
    encodings,
    error,
    failing,
    html,
    message,
    mixed,
    redirect,
    said,
    stream,
)
from tests.gateway.provider import COUNT_TOKENS, Provider, Request, Script

EVENTS = STREAMS["cached"].events
PLAIN: dict[str, Any] = {"input_tokens": 3, "output_tokens": 2}


@asynccontextmanager
async def world(*scripts: Script, key: str | None = None) -> AsyncIterator[tuple[Provider, ClientSession]]:
    async with Provider(key=key) as provider, ClientSession(provider.url, auto_decompress=False) as session:
        provider.answers(*scripts)
        yield provider, session


def run(play: Callable[[Provider, ClientSession], Awaitable[None]], *scripts: Script, key: str | None = None) -> None:
    async def main() -> None:
        async with world(*scripts, key=key) as (provider, session):
            await play(provider, session)

    asyncio.run(main())


def asked(**more: Any) -> dict[str, Any]:
    return {"model": "claude-x", "max_tokens": 9, "messages": [{"role": "user", "content": "Grüße"}], **more}


async def post(session: ClientSession, **more: Any) -> ClientResponse:
    return await session.post("/v1/messages", json=asked(**more), allow_redirects=False)


async def chunks(response: ClientResponse) -> list[bytes]:
    """The pieces of a chunked body, as they were sent."""
    found, piece = [], b""
    async for data, ends in response.content.iter_chunks():
        piece += data
        if ends:
            found.append(piece)
            piece = b""
    return [piece for piece in (*found, piece) if piece]


async def knock(provider: Provider) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A bare connection, which sees what an HTTP library would hide."""
    host, port = provider.url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def until_the_end(reader: asyncio.StreamReader) -> tuple[bytes, bool]:
    """All that comes, and whether a reset ended it."""
    got = b""
    try:
        while data := await reader.read(1 << 16):
            got += data
    except ConnectionResetError:
        return got, True
    return got, False


# ── What arrives ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_arrives_is_kept_as_it_was_sent() -> None:
    """Target, order and case of the headers, and the body, be it chunked."""

    async def play(provider: Provider, session: ClientSession) -> None:
        async def parts() -> AsyncIterator[bytes]:
            yield b'{"stream": false,'
            yield b' "model": "m"}'

        headers = [("X-Zoo", "1"), ("x-Ape", "2"), ("X-Zoo", "3")]
        async with session.post("/v3/ai/anthropic/v1/messages?beta=true", data=parts(), headers=headers) as response:
            answer = await response.json()
        request = provider.requests[0]

        assert ("POST", "/v3/ai/anthropic/v1/messages?beta=true") == (request.method, request.target)
        assert [pair for pair in request.headers if pair[0].lower() in ("x-zoo", "x-ape")] == headers
        assert b'{"stream": false, "model": "m"}' == request.body
        assert request.whole
        assert {"beta": "true"} == request.query
        assert request.usage == answer["usage"]
        assert "req_test_000000" == response.headers["request-id"]

    run(play)


@pytest.mark.parametrize("streamed", [True, False])
def test_the_usual_answer_uses_what_its_request_says(streamed: bool) -> None:
    """A test that says nothing of the answer can still tell what must be in the ledger, each number another."""

    async def play(provider: Provider, session: ClientSession) -> None:
        body = await (await post(session, stream=streamed)).read()
        usage = UsageStream()
        usage.feed(body)
        told = usage.usage if streamed else usage_of(body)
        expected = usage_of(json.dumps({"usage": provider.requests[0].usage}).encode())

        assert expected == told
        assert 4 == len(
            {
                told.input_tokens,
                told.output_tokens,
                told.cache_creation_input_tokens,
                told.cache_read_input_tokens,
            }
        )

    run(play)


def test_scripts_are_used_up_in_order_and_may_look_at_the_request() -> None:
    """Each answers one message; other paths have their own."""

    def by_model(request: Request) -> Answer:
        return Answer(json=message(usage=PLAIN, model=request.json()["model"] + "!"))

    async def play(provider: Provider, session: ClientSession) -> None:
        provider.answers(error(429), path=COUNT_TOKENS)
        refused = await session.post(COUNT_TOKENS, json=asked())
        first, second, third = [await post(session) for _ in range(3)]

        assert [429, 529, 200, 200] == [refused.status, first.status, second.status, third.status]
        assert "claude-x!" == (await second.json())["model"]
        assert "claude-x" == (await third.json())["model"]
        assert 0 == provider.unused

    run(play, error(529), by_model)


def test_models_tokens_and_probes() -> None:
    """The small endpoints answer like the API, page by page."""

    async def play(provider: Provider, session: ClientSession) -> None:
        first = await (await session.get("/v1/models", params={"limit": "2"})).json()
        rest = await (await session.get("/v1/models", params={"after_id": first["last_id"]})).json()
        one = await (await session.get("/v1/models/claude-opus-5")).json()
        counted = await (await session.post(COUNT_TOKENS + "?beta=true", json=asked())).json()
        unknown = await session.get("/v1/models/gpt")
        probe = await session.head("/api/hello")

        assert ([True, False], 1) == ([first["has_more"], rest["has_more"]], len(rest["data"]))
        assert provider.models == [item["id"] for item in first["data"] + rest["data"]]
        assert first["data"][0] == one
        assert {"input_tokens": len(provider.requests[3].body) // 4 + 1} == counted
        assert (404, "not_found_error") == (unknown.status, (await unknown.json())["error"]["type"])
        assert 200 == probe.status

    run(play)


def test_a_wrong_key_is_refused() -> None:
    """With a key of its own, the provider tells whether the gateway brought it."""

    async def play(provider: Provider, session: ClientSession) -> None:
        for headers, status in [({}, 401), ({"x-api-key": "k"}, 200), ({"authorization": "Bearer k"}, 200)]:
            response = await session.post("/v1/messages", json=asked(), headers=headers)

            assert status == response.status

    run(play, key="k")


# ── Bytes ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"cut_every": 1},
        {"cut_every": 7, "line_end": "\r\n"},
        {"cut_at": [1, 100, 101, 5000], "line_end": "\r", "space": False},
        {"many_lines": True, "framing": "close"},
        {"open_end": True, "framing": "length"},
    ],
    ids=str,
)
def test_however_it_is_sent_a_stream_tells_the_same(name: str, form: dict[str, Any]) -> None:
    """All bytes arrive, in the pieces asked for, and they tell the usage that the stream is said to tell."""
    told = STREAMS[name]
    answer = Answer(events=told.events, **form)

    async def play(provider: Provider, session: ClientSession) -> None:
        response = await post(session, stream=True)
        pieces = await chunks(response)
        usage = UsageStream()
        for piece in pieces:
            usage.feed(piece)
        usage.end()

        assert answer.body() == b"".join(pieces)
        assert usage_of(json.dumps({"usage": told.usage}).encode()) == usage.usage
        assert usage.finished
        if "framing" not in form:
            assert [piece for piece in answer.pieces() if isinstance(piece, bytes)] == pieces

    run(play, answer)


def test_pieces() -> None:
    """Cuts are where they are asked for, and a wait or a break ends a piece."""
    hold = Hold()
    items: list[Item] = [b"abc", b"defg", hold, b"hi"]

    assert [b"abc", b"defg", hold, b"hi"] == list(Answer(events=items).pieces())
    assert [b"ab", b"cd", b"ef", b"g", hold, b"hi"] == list(Answer(events=items, cut_every=2).pieces())
    assert [b"a", b"bcdefg", hold, b"h", b"i"] == list(Answer(events=items, cut_at=[1, 7, 8]).pieces())
    assert [b"abc", b"de"] == list(Answer(events=items, breaks_after=5).pieces())
    assert [b"abc", b"defg", hold] == list(Answer(events=items, breaks_after=7).pieces())
    assert [] == list(Answer(events=items, breaks_after=0).pieces())


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd"])
def test_encodings_are_flushed_with_each_event(encoding: Encoding) -> None:
    """Whoever decodes gets an event when it was sent, not when the stream is over."""
    if encoding not in encodings():
        pytest.skip(f"no library for {encoding}")
    hold = Hold()
    begun, rest = EVENTS[:1], EVENTS[1:]

    async def main() -> None:
        async with Provider() as provider, ClientSession(provider.url) as session:
            provider.answers(Answer(events=[*begun, hold, *rest], encoding=encoding))
            response = await post(session, stream=True)
            await hold.reached()

            assert Answer(events=begun).plain() == await response.content.readany()

            hold.release()

            assert Answer(events=rest).plain() == await response.read()
            assert encoding == response.headers["content-encoding"]

    asyncio.run(main())


def test_a_negotiated_encoding_is_used_if_it_is_accepted() -> None:
    """As a real server does; without it, a client that asks for no encoding gets one all the same."""
    answer = Answer(events=EVENTS, encoding="gzip", negotiated=True)

    async def play(provider: Provider, session: ClientSession) -> None:
        for accepted, encoding in [("identity", None), ("br, gzip", "gzip")]:
            response = await session.post("/v1/messages", json=asked(), headers={"accept-encoding": accepted})

            assert encoding == response.headers.get("content-encoding")
            assert (answer.body() if encoding else answer.plain()) == await response.read()

    run(play, answer, answer)


def test_comments_pings_and_own_headers() -> None:
    """What is between events stays there, and a header of one's own replaces the usual one."""
    events = mixed(EVENTS, "still here", PING)
    headers = [("Set-Cookie", "a=1"), ("Set-Cookie", "b=2"), ("Request-Id", "req_mine")]

    async def play(provider: Provider, session: ClientSession) -> None:
        response = await post(session)
        body = await response.text()

        assert len(EVENTS) - 1 == body.count(": still here\n\n")
        assert body.endswith('{"type": "message_stop"}\n\n')
        assert ["a=1", "b=2"] == response.headers.getall("set-cookie")
        assert ["req_mine"] == response.headers.getall("request-id")
        assert "anthropic-organization-id" not in response.headers

    run(play, Answer(events=events, headers=headers, without=["anthropic-organization-id"]))


# ── Moments ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_answer_stands_still_where_it_is_told_to() -> None:
    """Before the head, and between events: the client has all up to there, and nothing more."""
    early, midway = Hold(), Hold()
    answer = Answer(events=[*EVENTS[:3], midway, *EVENTS[3:]], before_head=[early])

    async def play(provider: Provider, session: ClientSession) -> None:
        posting = asyncio.create_task(post(session))
        await early.reached()

        assert not posting.done()

        early.release()
        response = await posting
        await midway.reached()
        first = Answer(events=EVENTS[:3]).body()

        assert first == await response.content.readexactly(len(first))
        assert len(first) == provider.requests[0].sent

        midway.release()

        assert Answer(events=EVENTS).body() == first + await response.read()
        assert provider.requests[0].hung_up is None

    run(play, answer)


@pytest.mark.parametrize("early", [True, False])
def test_a_client_that_goes_away_is_noticed(early: bool) -> None:
    """At the moment it goes, whether or not the answer has begun."""
    hold = Hold()
    answer = Answer(before_head=[hold]) if early else Answer(events=[*EVENTS[:3], hold, *EVENTS[3:]])

    async def play(provider: Provider, session: ClientSession) -> None:
        posting = asyncio.create_task(post(session))
        await hold.reached()
        if early:
            posting.cancel()
        else:
            (await posting).close()
        request = await provider.arrived()
        await request.over()

        assert request.hung_up in ("fin", "rst")
        assert (0 if early else len(Answer(events=EVENTS[:3]).body())) == request.hung_up_after
        assert request.hung_up_at is not None
        assert request.hung_up_at >= request.arrived_at

    run(play, answer)


def test_a_client_that_goes_away_within_its_own_request_is_noticed() -> None:
    """Its body is not whole."""

    async def main() -> None:
        async with Provider() as provider:
            _, writer = await knock(provider)
            writer.write(b"POST /v1/messages HTTP/1.1\r\nContent-Length: 10\r\n\r\n12345")
            writer.close()
            await writer.wait_closed()
            await (await provider.begun()).over()

            assert ("fin", 0, False) == (
                provider.requests[0].hung_up,
                provider.requests[0].hung_up_after,
                provider.requests[0].whole,
            )

    asyncio.run(main())


# ── Failures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("breaks", ["rst", "fin"])
@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
@pytest.mark.parametrize("after", [0, 1, 500])
def test_a_connection_breaks_after_so_many_bytes(breaks: Any, framing: Any, after: int) -> None:
    """Only a body that ends with its connection can be cut off in silence, and only in order."""
    answer = Answer(events=EVENTS, breaks_after=after, breaks=breaks, framing=framing)

    async def main() -> None:
        async with Provider() as provider:
            provider.answers(answer)
            reader, writer = await knock(provider)
            writer.write(b"POST /v1/messages HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}")
            got, reset = await until_the_end(reader)
            writer.close()
            pieces = [piece for piece in answer.pieces() if isinstance(piece, bytes)]
            frames = [b"%x\r\n%b\r\n" % (len(piece), piece) if framing == "chunked" else piece for piece in pieces]

            assert (breaks == "rst") == reset
            assert b"".join(frames) == got.partition(b"\r\n\r\n")[2]
            assert answer.body()[:after] == b"".join(pieces)
            assert (after, None) == (provider.requests[0].sent, provider.requests[0].hung_up)

    asyncio.run(main())


def test_nothing_is_answered() -> None:
    """The connection breaks before any byte, or there is only silence."""

    async def play(provider: Provider, session: ClientSession) -> None:
        for _ in range(2):
            with pytest.raises(ClientConnectionError):
                await post(session)
        posting = asyncio.create_task(post(session))
        request = await provider.arrived(3)
        posting.cancel()
        await request.over()

        assert [None, None] == [request.hung_up for request in provider.requests[:2]]
        assert 0 == request.hung_up_after

    run(play, Answer(instead="rst"), Answer(instead="fin"), Answer(instead="silence"))


def test_refusals() -> None:
    """Status, headers and body as the API has them; and what is not the API's at all."""
    scripts = [error(status, retry_after=2) for status in (400, 401, 404, 413, 429, 529)]

    async def play(provider: Provider, session: ClientSession) -> None:
        for status, kind in [
            (400, "invalid_request_error"),
            (401, "authentication_error"),
            (404, "not_found_error"),
            (413, "request_too_large"),
            (429, "rate_limit_error"),
            (529, "overloaded_error"),
        ]:
            response = await post(session)
            body = await response.json()

            assert (status, "error", kind) == (response.status, body["type"], body["error"]["type"])
            assert response.headers["request-id"] == body["request_id"]
            assert "2" == response.headers["retry-after"]
            assert "50000" == response.headers["anthropic-ratelimit-input-tokens-limit"]

        page, moved = await post(session), await post(session)

        assert (200, "text/html") == (page.status, page.content_type)
        assert (307, "http://127.0.0.1:9/v1/messages") == (moved.status, moved.headers["location"])

    run(play, *scripts, html(), redirect("http://127.0.0.1:9/v1/messages"))


def test_a_stream_that_fails_midway_ends_with_an_error() -> None:
    """HTTP knows nothing of it."""

    async def play(provider: Provider, session: ClientSession) -> None:
        usage = UsageStream()
        usage.feed(await (await post(session)).read())

        assert ("overloaded_error", False) == (usage.error, usage.finished)

    run(play, Answer(events=failing(EVENTS, 4)))


@pytest.mark.parametrize("size", [10, 30 << 20])
def test_an_answer_before_the_body_has_come(size: int) -> None:
    """It arrives, however much of the request is left unread."""

    async def play(provider: Provider, session: ClientSession) -> None:
        async def slow() -> AsyncIterator[bytes]:
            yield b"1"
            await answered.wait()
            yield b"2" * size

        answered = asyncio.Event()
        async with session.post("/v1/messages", data=slow()) as response:
            assert 413 == response.status
            assert b"" == provider.requests[0].body
            answered.set()
        assert 200 == (await post(session)).status

    run(play, Answer(status=413, json={}, before_body=True))


def test_connections_live_on_unless_they_are_closed() -> None:
    """A gateway's pool can be seen at work, and be surprised: this answer did not say that it is the last."""

    async def main() -> None:
        async with Provider() as provider:
            provider.answers(Answer(json={}), Answer(json={}, then_closes=True))
            reader, writer = await knock(provider)
            writer.write(2 * b"POST /v1/messages HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}")
            got, reset = await until_the_end(reader)
            writer.close()

            assert (2, False) == (got.count(b"HTTP/1.1 200 OK"), reset)
            assert b"connection:" not in got
            assert [0, 0] == [request.connection for request in provider.requests]

    asyncio.run(main())


def test_a_script_that_fails_fails_the_test() -> None:
    """An assertion in a script is not lost in a task."""

    def wrong(request: Request) -> Answer:
        raise AssertionError(request.target)

    async def play(provider: Provider, session: ClientSession) -> None:
        with pytest.raises(ClientConnectionError):
            await post(session)

    with pytest.raises(AssertionError, match="/v1/messages"):
        run(play, wrong)


def test_text_is_cut_only_into_whole_characters_by_events() -> None:
    """Pieces of text are characters; only pieces of the body are bytes."""
    events = stream(usage_start=PLAIN, usage_end=PLAIN, text="日本語のテキスト🙂")
    shown = "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")

    assert "日本語のテキスト🙂" == shown
    assert 9 == len(said("日本語のテキスト🙂", characters=1)) - 2
