"""A provider and a client that cost next to nothing, so that what is measured is what stands between them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

DELTAS = 27
"""With what surrounds them, a stream of 33 events."""

_USAGE = b'{"input_tokens":12,"cache_creation_input_tokens":800,"cache_read_input_tokens":20000,"output_tokens":%d}'


def _event(kind: str, data: bytes) -> bytes:
    event = b'event: %s\ndata: {"type":"%s"%s}\n\n' % (kind.encode(), kind.encode(), data)
    return b"%x\r\n%b\r\n" % (len(event), event)


def _stream() -> list[bytes]:
    start = b',"message":{"id":"msg_1","type":"message","role":"assistant","model":"claude-sonnet-4-5","content":[],'
    start += b'"stop_reason":null,"stop_sequence":null,"usage":' + _USAGE % 1 + b"}"
    text = b',"index":0,"delta":{"type":"text_delta","text":"some twenty characters"}'
    end = b',"delta":{"stop_reason":"end_turn","stop_sequence":null},"usage":' + _USAGE % 150
    return [
        _event("message_start", start),
        _event("content_block_start", b',"index":0,"content_block":{"type":"text","text":""}'),
        _event("ping", b""),
        *[_event("content_block_delta", text)] * DELTAS,
        _event("content_block_stop", b',"index":0'),
        _event("message_delta", end),
        _event("message_stop", b""),
    ]


_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nrequest-id: req_1\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_EVENTS = _stream()
_PLAIN = (
    b'{"id":"msg_1","type":"message","role":"assistant","model":"claude-sonnet-4-5","content":[{"type":"text","text":"'
    + b"some twenty characters" * DELTAS
    + b'"}],"stop_reason":"end_turn","stop_sequence":null,"usage":'
    + _USAGE % 150
    + b"}"
)
_PLAIN_ANSWER = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nrequest-id: req_1\r\ncontent-length: %d\r\n\r\n%b"
    % (len(_PLAIN), _PLAIN)
)


class _Answering(asyncio.Protocol):
    """Answers each request as soon as it is there: a stream, a plain answer, or a stream that never goes on."""

    _transport: asyncio.Transport

    def __init__(self) -> None:
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._received += data
        while True:
            head, blank, body = self._received.partition(b"\r\n\r\n")
            if not blank:
                return
            size = int(head.lower().partition(b"content-length:")[2].partition(b"\r")[0])
            if len(body) < size:
                return
            self._received = body[size:]
            self._answer(body[:size])

    def _answer(self, body: bytes) -> None:
        if b'"hold"' in body:
            self._transport.write(_STREAM_HEAD + b"".join(_EVENTS[:4]))
        elif b'"stream"' in body:
            self._transport.write(_STREAM_HEAD)
            for event in _EVENTS:
                self._transport.write(event)
            self._transport.write(b"0\r\n\r\n")
        else:
            self._transport.write(_PLAIN_ANSWER)


class Provider:
    """Listens on loopback while the context lasts."""

    url = ""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.get_running_loop().create_server(_Answering, "127.0.0.1", 0, backlog=2048)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()


def _request(options: bytes) -> bytes:
    prompt = b"What a developer asks for, and the context of it. " * 40
    body = b'{"model":"claude-sonnet-4-5","max_tokens":1024,%b"messages":[{"role":"user","content":"%b"}]}' % (
        options,
        prompt,
    )
    head = (
        b"POST /v1/messages HTTP/1.1\r\nhost: benchmark\r\nx-api-key: sk-benchmark\r\n"
        b"content-type: application/json\r\nanthropic-version: 2023-06-01\r\ncontent-length: %d\r\n\r\n"
    )
    return head % len(body) + body


_STREAMED, _NOT_STREAMED, _HELD = _request(b'"stream":true,'), _request(b""), _request(b'"stream":true,"hold":1,')


@asynccontextmanager
async def exchange(url: str, streamed: bool) -> AsyncIterator[Callable[[], Awaitable[float]]]:
    """One connection; what is given makes a request and reads its answer, and returns the seconds to the first byte."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 20)
    request = _STREAMED if streamed else _NOT_STREAMED

    async def ask() -> float:
        began_s = time.perf_counter()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        first_s = time.perf_counter() - began_s
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(head.decode())
        if streamed:
            await reader.readuntil(b"\r\n0\r\n\r\n")
        else:
            size = int(head.lower().partition(b"content-length:")[2].partition(b"\r")[0])
            await reader.readexactly(size)
        return first_s

    try:
        yield ask
    finally:
        writer.close()


async def open_stream(url: str) -> asyncio.StreamWriter:
    """A stream that has begun, and stays open until the writer is closed."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(_HELD)
    await reader.readuntil(b"message_start")
    return writer
