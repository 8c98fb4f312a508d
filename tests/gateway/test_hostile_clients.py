"""What clients may do to the gateway: nothing that costs others anything, and nothing that is an error of its own."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import struct
import zlib
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

pytest.importorskip("aiohttp", reason="needs meterlib[gateway]")

from meterlib.gateway.app import Gateway
from meterlib.gateway.encodings import MEMBER_BYTES, TooLarge, Unreadable, decoder_for
from meterlib.gateway.server import _address_of
from tests.gateway.answers import Answer, Hold
from tests.gateway.provider import COUNT_TOKENS, MODELS
from tests.gateway.test_admission import shape
from tests.gateway.test_forwarding import DONE, brotlied, gzipped, zstandard
from tests.gateway.wire import BODY, MESSAGES, Play, Wire, chunked, connected, exchanged, lasting, request
from tests.gateway.world import BASE, HOSTED, LIMITS, TOKEN, Got, World, message, run, with_settings

BAD_REQUEST = (400, "invalid_request_error")
TOO_LARGE = (413, "request_too_large")
LEAKS = (b"Traceback", b"aiohttp", b"\\x", str(Path(__file__).parents[2]).encode(), b".py", b"127.0.0.1")
"""What an error must tell nobody: how and where the gateway runs."""


async def refused(world: World, data: bytes, method: str = "POST") -> tuple[int, str]:
    """How a request is refused, which must not have reached the provider, nor cost anything."""
    sent, entries = len(world.provider.requests), len(await world.entries())
    got = await exchanged(world, data, method)
    assert sent == len(world.provider.requests)
    assert entries == len(await world.entries())
    assert not any(word in got.body for word in LEAKS)
    return shape(got)


# ── HTTP ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

SIZE = len(BODY)
CHUNKED = "transfer-encoding: chunked"
NO_HTTP: dict[str, bytes] = {
    "a length and chunks": request("POST", MESSAGES, CHUNKED),
    "a length and chunks, indeed": request("POST", MESSAGES, CHUNKED, body=chunked(BODY)),
    "two lengths": request("POST", MESSAGES, "content-length: 5"),
    "twice the same length": request("POST", MESSAGES, f"content-length: {SIZE}"),
    "a list of lengths": request("POST", MESSAGES, f"content-length: {SIZE}, {SIZE}", length=False),
    "a length with a sign": request("POST", MESSAGES, f"content-length: +{SIZE}", length=False),
    "a negative length": request("POST", MESSAGES, "content-length: -1", length=False),
    "a length in hexadecimal": request("POST", MESSAGES, "content-length: 0x10", length=False),
    "no length at all": request("POST", MESSAGES, "content-length:", length=False),
    "a length beyond all numbers": request("POST", MESSAGES, f"content-length: {'9' * 30}", length=False),
    "chunks that are no numbers": request("POST", MESSAGES, CHUNKED, body=b"zz\r\nabc\r\n0\r\n\r\n", length=False),
    "chunks that are longer": request("POST", MESSAGES, CHUNKED, body=b"3\r\nabcdef\r\n0\r\n\r\n", length=False),
    "chunks without CR": request("POST", MESSAGES, CHUNKED, body=b"3\nabc\n0\n\n", length=False),
    "a chunk beyond all numbers": request("POST", MESSAGES, CHUNKED, body=b"f" * 17 + b"\r\n", length=False),
    "chunks that are not the last coding": request("POST", MESSAGES, "transfer-encoding: chunked, gzip", length=False),
    "compressed chunks": request(
        "POST", MESSAGES, "transfer-encoding: gzip, chunked", body=chunked(BODY), length=False
    ),
    "chunks in chunks": request("POST", MESSAGES, CHUNKED, CHUNKED, body=chunked(BODY), length=False),
    "chunks with a tab": request("POST", MESSAGES, "transfer-encoding: \x0bchunked", body=chunked(BODY), length=False),
    "identity": request("POST", MESSAGES, "transfer-encoding: identity", length=False),
    "lines that end in LF": request(line_end=b"\n"),
    "a folded header": request("POST", MESSAGES, "x-a: b\r\n c"),
    "a space before the colon": request("POST", MESSAGES, "x-a : b"),
    "a space in a name": request("POST", MESSAGES, "x a: b"),
    "NUL in a value": request("POST", MESSAGES, "x-a: b\0c"),
    "CR in a value": request("POST", MESSAGES, "x-a: b\rc"),
    "NUL in a name": request("POST", MESSAGES, "x\0a: b"),
    "a header without a name": request("POST", MESSAGES, ": b"),
    "a header without a colon": request("POST", MESSAGES, "nonsense"),
    "two hosts": request("POST", MESSAGES, "host: evil.example"),
    "no host": request().replace(b"host: gateway\r\n", b""),
    "a control in the method": request("PO\x01ST"),
    "a method in small letters": request("post"),
    "an unknown method": request("BREW"),
    "a target that is none": request("POST", "v1/messages"),
    "a target with a space": request("POST", f"{MESSAGES} x"),
    "a target beyond ASCII": request("POST", f"{MESSAGES}?a=\xff"),
    "no version": b"GET /\r\n\r\n",
    "version 0.9": request(version="HTTP/0.9"),
    "version 1.2": request(version="HTTP/1.2"),
    "version 2.0": request(version="HTTP/2.0"),
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a handshake of TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "another protocol": b"SSH-2.0-OpenSSH_9.9\r\n",
}


def test_what_is_no_http_is_refused_in_the_apis_words() -> None:
    """JSON, an id, nothing of what was sent; and the end: nobody knows where a next request would begin."""

    async def use(world: World) -> None:
        for what, data in NO_HTTP.items():
            async with connected(world.url) as wire:
                await wire.send(data + request())
                got = await wire.answer()
                assert shape(got) == BAD_REQUEST, what
                assert b"" == await wire.rest(), what
            assert len(got.body) < 300
        assert ([], []) == (world.provider.requests, await world.entries())

    run(use, HOSTED, limits=LIMITS)


@pytest.mark.parametrize(
    "headers",
    [
        [f"x-{at}: 1" for at in range(63)],
        [f"x-{at}: 1" for at in range(500)],
        ["x-a: " + "b" * 16_384],
        [f"x-{at}: {'b' * 1000}" for at in range(17)],
    ],
    ids=["65 headers", "500 headers", "a long one", "all together"],
)
def test_heads_have_an_end(headers: list[str]) -> None:
    """64 headers and 16 KiB are enough for every client there is."""

    async def use(world: World) -> None:
        assert await refused(world, request("POST", MESSAGES, *headers)) in (
            (431, "invalid_request_error"),
            BAD_REQUEST,
        )
        fits = [f"x-{at}: {'b' * 200}" for at in range(61)]
        assert 200 == (await exchanged(world, request("POST", MESSAGES, *fits))).status

    run(use, HOSTED)


def test_a_target_has_an_end() -> None:
    async def use(world: World) -> None:
        for size in (16_384, 100_000, 1_000_000):
            assert (431, "invalid_request_error") == await refused(world, request("POST", f"{MESSAGES}?{'a' * size}"))

    run(use, HOSTED)


def test_pipelined_requests_are_answered_in_order() -> None:
    async def use(world: World) -> None:
        async with connected(world.url) as wire:
            await wire.send(request() + request(body=b"{") + request("GET", f"{BASE}{MODELS}", body=b"") + request())
            assert [200, 400, 200, 200] == [(await wire.answer()).status for _ in range(4)]

    run(use, HOSTED)


def test_what_follows_a_refusal_is_no_request() -> None:
    """A body that was not read must not be taken for what comes next."""

    async def use(world: World) -> None:
        smuggled = request()
        async with connected(world.url) as wire:
            await wire.send(request(body=smuggled, key=None))
            assert 401 == (await wire.answer()).status
            await wire.send(request("POST", MESSAGES, "connection: close"))
            assert 1 == (await wire.rest()).count(b"HTTP/1.1 ")
        assert 1 == len(world.provider.requests)

    run(use, HOSTED)


@pytest.mark.parametrize("upgrade", ["h2c", "websocket", "TLS/1.3", "tcp"])
def test_an_upgrade_is_passed_over(upgrade: str) -> None:
    """The request is answered as it is, and the next one too."""

    async def use(world: World) -> None:
        lines = ("connection: Upgrade, HTTP2-Settings", f"upgrade: {upgrade}", "http2-settings: AAMAAABkAAQAAP__")
        async with connected(world.url) as wire:
            await wire.send(request("POST", MESSAGES, *lines))
            assert 200 == (await wire.answer()).status
            await wire.send(request())
            assert 200 == (await wire.answer()).status
        assert [BODY, BODY] == [each.body for each in world.provider.requests]
        assert None is world.provider.requests[0].header("upgrade")

    run(use, HOSTED)


def test_http_1_0_is_spoken_too() -> None:
    """Whole answers, and the end of the connection."""

    async def use(world: World) -> None:
        for stream in (False, True):
            body = json.dumps(message(stream=stream)).encode()
            async with connected(world.url) as wire:
                await wire.send(request("POST", MESSAGES, "expect: 100-continue", body=body, version="HTTP/1.0"))
                got = await wire.answer()
                assert (200, b"") == (got.status, await wire.rest())
                assert stream == (b"message_stop" in got.body)

    run(use, HOSTED)


# ── Bodies ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_large_body_is_asked_for_at_once() -> None:
    """curl waits for that, for a second, with more than 1 MiB."""

    async def use(world: World) -> None:
        body = json.dumps(message("x" * 1_500_000)).encode()
        data = request("POST", MESSAGES, "expect: 100-continue", body=body)
        async with connected(world.url) as wire:
            await wire.send(data[: -len(body)])
            assert ("HTTP/1.1 100 Continue", []) == await wire.head()
            await wire.send(body)
            assert 200 == (await wire.answer()).status
        assert body == world.provider.requests[0].body
        assert None is world.provider.requests[0].header("expect")

    run(use, HOSTED)


def test_a_refusal_does_not_ask_for_the_body() -> None:
    """Who is not let in, or sends too much, need not send it."""

    async def use(world: World) -> None:
        expecting = ("POST", MESSAGES, "expect: 100-continue")
        large = request(*expecting, f"content-length: {1 << 40}", length=False, body=b"")
        for data, status in [(request(*expecting, key="ml_x", body=b""), 401), (large, 413)]:
            assert status == (await exchanged(world, data.replace(b"content-length: 0", b"content-length: 99"))).status

    run(use, HOSTED)


@pytest.mark.parametrize("expectation", ["200-ok", "", "100-continue, x", "meaning=of-life"])
def test_other_expectations_are_nobodys(expectation: str) -> None:
    async def use(world: World) -> None:
        assert 200 == (await exchanged(world, request("POST", MESSAGES, f"expect: {expectation}"))).status
        assert None is world.provider.requests[0].header("expect")

    run(use, HOSTED)


LIMIT = 100_000


async def in_one_piece(wire: Wire, size: int) -> None:
    await wire.send(request(body=b"x" * size))


async def declared_only(wire: Wire, size: int) -> None:
    await wire.send(request("POST", MESSAGES, f"content-length: {size}", length=False, body=b"{"))


async def in_chunks(wire: Wire, size: int) -> None:
    await wire.send(
        request("POST", MESSAGES, CHUNKED, length=False, body=chunked(*[b"x" * 10_000] * (size // 10_000 + 1)))
    )


async def in_one_chunk(wire: Wire, size: int) -> None:
    await wire.send(request("POST", MESSAGES, CHUNKED, length=False, body=chunked(b"x" * size)))


@pytest.mark.parametrize("send", [in_one_piece, declared_only, in_chunks, in_one_chunk])
def test_a_body_has_an_end(send: Callable[[Wire, int], Awaitable[None]]) -> None:
    """However its length is told, or not."""

    async def use(world: World) -> None:
        async with connected(world.url) as wire:
            sending = asyncio.ensure_future(send(wire, LIMIT + 1))
            assert TOO_LARGE == shape(await wire.answer())
            sending.cancel()
        assert ([], []) == (world.provider.requests, await world.entries())
        world.provider.answers(DONE)
        fits = b'{"model": "m"}'.ljust(LIMIT)
        assert 200 == (await exchanged(world, request(body=fits))).status

    run(use, HOSTED, body_bytes_max=LIMIT)


def test_no_more_than_the_limit_is_ever_held() -> None:
    """32 MiB by default; who sends a gigabyte is refused with that much of it read."""

    async def use(world: World) -> None:
        async with connected(world.url) as wire:
            await wire.send(request("POST", MESSAGES, CHUNKED, length=False, body=b""))
            piece = b"%x\r\n%b\r\n" % (1 << 20, b"x" * (1 << 20))
            answering = asyncio.ensure_future(wire.answer())
            count = 0
            while not answering.done() and count < 1000:
                await wire.send(piece)
                await asyncio.sleep(0)
                count += 1
            assert TOO_LARGE == shape(await answering)
            assert 32 <= count < 100
        assert [] == world.provider.requests

    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(use, HOSTED)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 200 << 10


BOMBS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzipped,
    "deflate": zlib.compress,
    "br": brotlied,
    "zstd": zstandard,
}


@pytest.mark.parametrize("encoding", BOMBS)
@pytest.mark.parametrize("path", ["/v1/messages", COUNT_TOKENS])
def test_a_bomb_does_not_go_off(encoding: str, path: str) -> None:
    """What a body becomes when decompressed has the same end."""

    async def use(world: World) -> None:
        bomb = BOMBS[encoding](b'{"model": "m", "x": "' + bytes(5 << 20))
        assert len(bomb) < LIMIT
        got = await world.post(bomb, path=path, headers={"content-encoding": encoding})
        assert TOO_LARGE == shape(got)
        assert {"error_code": "request_body_too_large_after_decoding"} == got.json["error"]["details"]
        assert [] == world.provider.requests

    tenant = HOSTED if path == "/v1/messages" else with_settings(HOSTED, models=["m"])
    run(use, tenant, body_bytes_max=LIMIT)


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_a_million_empty_members_are_no_body(encoding: str) -> None:
    """Each is little work; all together they would stop everybody else for minutes."""
    empty = BOMBS[encoding](b"")
    bytes_max = 32 << 20

    with pytest.raises(TooLarge):
        decoder_for(encoding, bytes_max).feed(empty * 1_000_000)
    few = decoder_for(encoding, bytes_max).feed(BOMBS[encoding](b"ab") * 100)
    assert b"ab" * 100 == few
    assert bytes_max // MEMBER_BYTES < 10_000


@pytest.mark.parametrize("encoding", BOMBS)
@pytest.mark.parametrize("size", [0, 1, 65_536, 131_072, 200_001])
def test_what_fits_exactly_fits(encoding: str, size: int) -> None:
    """And one byte more does not."""
    data = bytes(size)

    assert data == decoder_for(encoding, size).feed(BOMBS[encoding](data))
    with pytest.raises(TooLarge):
        decoder_for(encoding, size).feed(BOMBS[encoding](data + b"x"))


@pytest.mark.parametrize("encoding", ["rot13", "gzip, gzip", "compress", "identity, br", "GZIP,", "*", "g" * 500])
def test_encodings_that_are_not_known_are_said_to_be_so(encoding: str) -> None:
    async def use(world: World) -> None:
        got = await world.post(headers={"content-encoding": encoding})
        assert BAD_REQUEST == shape(got)
        assert {"error_code": "request_body_encoding_unsupported"} == got.json["error"]["details"]
        assert [] == world.provider.requests

    run(use, HOSTED)


@settings(max_examples=60)
@given(
    encoding=st.sampled_from(sorted(BOMBS)), data=st.binary(max_size=60), cut=st.integers(0, 60), valid=st.booleans()
)
def test_whatever_claims_to_be_compressed(encoding: str, data: bytes, cut: int, valid: bool) -> None:
    """It decompresses or it is unreadable; nothing else happens."""
    told = BOMBS[encoding](data)[:cut] + data if valid else data
    decoder = decoder_for(encoding, 1000)
    with suppress(TooLarge, Unreadable):
        assert len(decoder.feed(told)) <= 1000


# ── JSON ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

NO_JSON: dict[str, bytes] = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "a number": b"1",
    "no model": b"{}",
    "model is null": b'{"model": null}',
    "model is a number": b'{"model": 1}',
    "model is empty": b'{"model": ""}',
    "model has a control": b'{"model": "m\\u0000"}',
    "model has half a character": b'{"model": "\\ud800"}',
    "model looks like a key": b'{"model": "sk-ant-api03-x"}',
    "model looks like a credential": b'{"model": "Bearer x"}',
    "model is long": b'{"model": "%b"}' % (b"m" * 257),
    "model is not normalised": '{"model": "\ufb01"}'.encode(),
    "stream is text": b'{"model": "m", "stream": "true"}',
    "stream is a number": b'{"model": "m", "stream": 1}',
    "NaN": b'{"model": "m", "temperature": NaN}',
    "Infinity": b'{"model": "m", "temperature": -Infinity}',
    "a comment": b'{"model": "m" /* x */}',
    "a comma too many": b'{"model": "m",}',
    "single quotes": b"{'model': 'm'}",
    "leading zeros": b'{"model": "m", "x": 01}',
    "two documents": b'{"model": "m"}{"model": "m"}',
    "a byte order mark": b'\xef\xbb\xbf{"model": "m"}',
    "UTF-16": '{"model": "m"}'.encode("utf-16"),
    "UTF-32": '{"model": "m"}'.encode("utf-32"),
    "not UTF-8": b'{"model": "m", "x": "\xff"}',
    "overlong UTF-8": b'{"model": "m", "x": "\xc0\xaf"}',
    "a surrogate in UTF-8": b'{"model": "m", "x": "\xed\xa0\x80"}',
    "a control in a text": b'{"model": "m", "x": "\x01"}',
    "deep lists": b'{"model": "m", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "no end": b'{"model": "m", "messages": [',
}


def test_what_is_no_request_is_refused() -> None:
    """With an error in the API's shape that says why, and nothing goes on."""

    async def use(world: World) -> None:
        for what, body in NO_JSON.items():
            assert BAD_REQUEST == await refused(world, request(body=body)), what

    run(use, HOSTED, limits=LIMITS, count_invalid_requests=False)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "m", "temperature": 1e400}',
        b'{"model": "m", "max_tokens": %b}' % (b"9" * 5000),
        b'{"model": "m", "max_tokens": -1, "messages": {"a": [1]}, "system": 7, "tools": "x"}',
        b'{"model": "m", "messages": "x", "messages": [{"role": 5}], "speed": {}}',
        b'{"model": "m", "api_base": "http://evil.example", "metadata": {"base_url": "http://169.254.169.254/"}}',
        b'{"model": "m", "messages": [{"role": "user", "content": [{"type": "image", "source": {"data": "!"}}]}]}',
        b'{"model": "m", "max_tokens": 0, "messages": []}',
        '{"model": "m", "messages": "<script>\' OR 1=1 --</script> {{7*7}} ../../etc/passwd \u2028"}'.encode(),
    ],
)
def test_what_only_the_provider_can_judge_goes_on(body: bytes) -> None:
    """No inspection of what is said: it would break prompts, and the provider refuses what makes no sense."""

    async def use(world: World) -> None:
        world.provider.answers(DONE)
        assert 200 == (await exchanged(world, request(body=body))).status
        assert body == world.provider.requests[0].body

    run(use, HOSTED, limits=LIMITS)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from(
    [
        "model",
        "stream",
        "max_tokens",
        "messages",
        "system",
        "tools",
        "thinking",
        "speed",
        "tool_choice",
        "cache_control",
    ]
)
inner = st.sampled_from(["role", "content", "type", "text", "source", "data", "cache_control", "ttl", "input_schema"])
shaped = st.recursive(
    json_values | st.sampled_from(["user", "image", "base64", "document", "1h", "tool"]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(inner, values, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def world_in_play() -> Any:
    with lasting(HOSTED, count_invalid_requests=False) as both:
        both[0].provider.answers_always(DONE)
        both[0].provider.answers_always(DONE, path=COUNT_TOKENS)
        yield both


def never_an_error_of_ours(got: Got) -> None:
    assert got.status == 200 or 400 <= got.status < 500, (got.status, got.body)
    if got.status != 200:
        shape(got)


@settings(max_examples=100)
@given(told=st.dictionaries(fields, shaped, max_size=5), model=st.booleans())
@example(told={"messages": [{"role": "user", "content": [{"cache_control": {"ttl": 5}}]}]}, model=True)
def test_no_json_is_an_error_of_ours(world_in_play: tuple[World, Play[Any]], told: dict[str, Any], model: bool) -> None:
    """Whatever its shape."""
    world, play = world_in_play
    body = json.dumps(told | ({"model": "m"} if model else {})).encode("utf-8", "surrogatepass")

    never_an_error_of_ours(play(exchanged(world, request(body=body))))


@settings(max_examples=100)
@given(body=st.binary(max_size=200), at=st.integers(0, len(BODY)), replaced=st.integers(0, 20))
def test_no_bytes_in_a_body_are_an_error_of_ours(
    world_in_play: tuple[World, Play[Any]], body: bytes, at: int, replaced: int
) -> None:
    """Neither alone nor in the midst of a request."""
    world, play = world_in_play
    never_an_error_of_ours(play(exchanged(world, request(body=body))))
    never_an_error_of_ours(play(exchanged(world, request(body=BODY[:at] + body + BODY[at + replaced :]))))


HEAD = request(body=b"")


@settings(max_examples=200)
@given(noise=st.binary(min_size=1, max_size=60), at=st.integers(0, len(HEAD)), replaced=st.integers(0, 20))
def test_no_bytes_on_the_wire_are_an_error_of_ours(
    world_in_play: tuple[World, Play[Any]], noise: bytes, at: int, replaced: int
) -> None:
    """Whatever is sent: an answer in the API's shape, or none; and whoever comes next is served."""
    world, play = world_in_play

    async def use() -> None:
        async with connected(world.url) as wire:
            await wire.send(HEAD[:at] + noise + HEAD[at + replaced :])
            wire.writer.write_eof()
            rest = await wire.rest()
        while rest:
            head, _, rest = rest.partition(b"\r\n\r\n")
            status = int(head.split(b" ")[1])
            assert status == 200 or 400 <= status < 500, head
            told = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
            size = int(told.get(b"content-length", b"0"))
            if size and status != 200:
                assert rest[:size].startswith(b'{"type":"error"')
            rest = rest[size:]
        await world.settled()

    play(use())


# ── Time and numbers ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_body_has_its_time() -> None:
    """Trickling does not prolong it."""

    async def use(world: World) -> None:
        async with connected(world.url) as wire:
            await wire.send(request("POST", MESSAGES, "content-length: 1000", length=False, body=b"{"))

            async def trickle() -> None:
                while True:
                    await wire.send(b" ")
                    await asyncio.sleep(0.005)

            trickling = asyncio.ensure_future(trickle())
            assert (408, "timeout_error") == shape(await wire.answer())
            trickling.cancel()
        assert ([], []) == (world.provider.requests, await world.entries())

    run(use, HOSTED, body_timeout_ms=60)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("begun", [b"", b"P", b"POST / HTTP/1.1\r\nhost: x\r\nx-"])
def test_a_head_has_its_time(before: bool, begun: bytes) -> None:
    """From the connection or the last answer on, whether or not a byte comes now and then."""

    async def use(world: World) -> None:
        async with connected(world.url) as wire:
            if before:
                await wire.send(request())
                assert 200 == (await wire.answer()).status
            await wire.send(begun)

            async def trickle() -> None:
                while len(begun) > 1:
                    await wire.send(b"x")
                    await asyncio.sleep(0.005)

            trickling = asyncio.ensure_future(trickle())
            assert b"" == await wire.rest()
            trickling.cancel()

    run(use, HOSTED, keepalive_ms=80)


def test_a_slow_answer_does_not_end_the_connection() -> None:
    """The time without a head counts only where one is waited for."""
    hold = Hold()

    async def use(world: World) -> None:
        world.provider.answers(Answer(json={}, before_head=[hold]))
        async with connected(world.url) as wire:
            await wire.send(request())
            await hold.reached()
            await asyncio.sleep(0.1)  # real time: it is the server's own clock that is looked at
            hold.release()
            assert 200 == (await wire.answer()).status
            await wire.send(request())
            assert 200 == (await wire.answer()).status

    run(use, HOSTED, keepalive_ms=50)


def test_connections_are_counted() -> None:
    """Those beyond the number are dropped at once; a place that becomes free is given to the next."""

    async def use(world: World) -> None:
        async with connected(world.url) as first, connected(world.url) as second:
            for wire in (first, second):
                await wire.send(request())
                assert 200 == (await wire.answer()).status
            async with connected(world.url) as third:
                await third.send(request())
                assert b"" == await third.rest()
        while len(world.server._connections.connections):
            await asyncio.sleep(0)
        assert 200 == (await exchanged(world, request())).status

    run(use, HOSTED, connections_max=2)


def test_no_address_takes_all_places() -> None:
    """Who opens many connections has fewer, and those elsewhere have theirs; what was closed is free again."""

    async def use(world: World) -> None:
        async with AsyncExitStack() as open_ones:
            for _ in range(3):
                wire = await open_ones.enter_async_context(connected(world.url))
                await wire.send(request())
                assert 200 == (await wire.answer()).status
            async with connected(world.url) as fourth:
                await fourth.send(request())
                assert b"" == await fourth.rest()
            async with connected(world.url, local="127.0.0.2") as elsewhere:
                await elsewhere.send(request())
                assert 200 == (await elsewhere.answer()).status
        counted = world.server._connections
        while counted._addresses:
            await asyncio.sleep(0)
        assert {} == counted._from
        assert 200 == (await exchanged(world, request())).status

    with capture_logs() as logs:
        run(use, HOSTED, connections_per_address_max=3)
    assert [("connections.refused", "gateway.connections_per_address_max", "127.0.0.1")] == [
        (each["event"], each["setting"], each["address"]) for each in logs
    ]


@given(st.ip_addresses(), st.ip_addresses(v=6), st.integers(0, 2**64 - 1))
def test_a_client_is_its_address_or_its_network(address: Any, other: Any, host: int) -> None:
    """Whoever has one address of IPv6 has 2**64 of them; an IPv4 one is the same however it is written."""

    def known_as(told: object) -> str:
        return _address_of(Transport(told))  # type: ignore[arg-type]

    same_network = other.__class__(int(other) >> 64 << 64 | host)
    if other.ipv4_mapped is None and same_network.ipv4_mapped is None:
        assert known_as((str(other), 1, 0, 0)) == known_as((f"{same_network}%eth0", 2, 0, 3))
        assert known_as((str(other), 1)) != known_as((str(other.__class__((int(other) ^ 1 << 64))), 1))
    if address.version == 4:
        assert str(address) == known_as((str(address), 1)) == known_as((f"::ffff:{address}", 1, 0, 0))


@pytest.mark.parametrize("told", [None, "", "/run/socket", (), ("no address", 1)])
def test_a_client_without_address_is_counted_too(told: object) -> None:
    assert isinstance(_address_of(Transport(told)), str)  # type: ignore[arg-type]


class Transport:
    """What knows where a client is."""

    def __init__(self, peer: object) -> None:
        self._peer = peer

    def get_extra_info(self, name: str) -> object:
        return {"peername": self._peer}[name]


def test_two_hundred_slow_ones_do_not_keep_others_waiting() -> None:
    async def use(world: World) -> None:
        wires = [connected(world.url) for _ in range(200)]
        opened = await asyncio.gather(*[wire.__aenter__() for wire in wires])
        await asyncio.gather(*[wire.send(b"POST / HTTP/1.1\r\nx") for wire in opened])
        for _ in range(5):
            async with asyncio.timeout(5):
                assert 200 == (await exchanged(world, request())).status
        await asyncio.gather(*[wire.__aexit__(None, None, None) for wire in wires])

    run(use, HOSTED)


def test_who_does_not_read_loses_the_connection() -> None:
    """Answers that are not taken hold nobody up; here, more of them than the network stores."""

    async def use(world: World) -> None:
        world.provider.models = [f"claude-{at:04}-{'x' * 2000}" for at in range(1000)]
        async with connected(world.url) as wire:
            wire.reader._transport.pause_reading()  # type: ignore[attr-defined]
            await wire.send(request("GET", f"{BASE}{MODELS}?limit=1000", body=b"") * 20)
            await world.provider.begun()
            async with asyncio.timeout(10):
                while world.server._connections.connections:
                    await asyncio.sleep(0.01)
            assert len(world.provider.requests) < 20
        assert 200 == (await world.post()).status

    run(use, with_settings(HOSTED, models=["claude-*"]), write_timeout_ms=50)


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("part", [10, len(HEAD) - 2, len(HEAD) + 5])
def test_who_leaves_while_sending_costs_nothing(how: str, part: int) -> None:
    async def use(world: World) -> None:
        async with connected(world.url) as wire:
            await wire.send(request()[:part])
            if how == "rst":
                linger = struct.pack("ii", 1, 0)
                sock = wire.writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        while len(world.server._connections.connections):
            await asyncio.sleep(0.001)
        await world.settled()
        assert ([], [], 0) == (world.provider.requests, await world.entries(), await world.open_reservations())

    run(use, HOSTED, limits=LIMITS)


# ── The end ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("what", ["a body that does not come", "a list of models that does not come"])
def test_a_stop_waits_for_nobody_who_has_no_answer_yet(what: str) -> None:
    """Calls have `shutdown_ms` to end; so has everything else."""
    hold = Hold()

    async def use(world: World) -> None:
        world.provider.answers(Answer(json={}, before_head=[hold]), path=MODELS)
        async with connected(world.url) as wire:
            if what.startswith("a body"):
                await wire.send(request("POST", MESSAGES, "content-length: 1000", length=False, body=b"{"))
                while not world.gateway._handling:
                    await asyncio.sleep(0)
            else:
                await wire.send(request("GET", BASE + MODELS, body=b""))
                await hold.reached()
            gateway: Gateway = world.gateway
            async with asyncio.timeout(5):
                await gateway.aclose()
            assert b"" == await wire.rest()

    run(use, with_settings(HOSTED, models=["m"]))


def test_a_token_in_the_query_is_no_credential() -> None:
    async def use(world: World) -> None:
        target = f"{MESSAGES}?x-api-key={TOKEN}&api_key={TOKEN}"
        assert (401, "authentication_error") == await refused(world, request("POST", target, key=None))

    run(use, HOSTED)
