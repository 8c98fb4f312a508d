"""A provider that answers as a test tells it, over HTTP/1.1 on 127.0.0.1, with every byte and moment under control.

    async with Provider() as provider:
        provider.answers(error(529), Answer(events=STREAMS["cached"].events, cut_every=7))
        …
        assert provider.requests[0].header("x-api-key") == "sk-hosted"

It parses and writes HTTP itself: a library would hide what went over the wire, and could not be made to misbehave.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias
from urllib.parse import parse_qs

from tests.gateway.answers import MODEL, PATIENCE_S, Answer, error, message, rate_limit_headers, stream

COUNT_TOKENS = "/v1/messages/count_tokens"
MESSAGES = "/v1/messages"
MODELS = "/v1/models"

Script: TypeAlias = "Answer | Callable[[Request], Answer]"


@dataclass(eq=False)
class Request:
    """What arrived, and what became of it.

    Attributes:
        number: how many came before it.
        connection: how many connections were opened before the one it came on.
        target, headers: exactly as sent, headers in their order.
        whole: its body has come to its end.
        sent: bytes of the answer's body that were handed to the network.
        hung_up: how the client went away before the answer was over.
        arrived_at, hung_up_at: the event loop's time in seconds.
        hung_up_after: what `sent` was then.

    """

    number: int
    connection: int
    method: str
    target: str
    headers: list[tuple[str, str]]
    arrived_at: float
    body: bytes = b""
    whole: bool = False
    sent: int = 0
    hung_up: Literal["fin", "rst"] | None = None
    hung_up_at: float | None = None
    hung_up_after: int | None = None
    _over: asyncio.Event = field(default_factory=asyncio.Event)

    async def over(self) -> None:
        """Wait until nothing more is sent: the answer is complete, it broke off, or the client went away."""
        await asyncio.wait_for(self._over.wait(), PATIENCE_S)

    @property
    def path(self) -> str:
        """The path below whatever prefix it came with."""
        path = self.target.partition("?")[0]
        return path[path.index("/v1/") :] if "/v1/" in path else path

    @property
    def query(self) -> dict[str, str]:
        return {name: values[-1] for name, values in parse_qs(self.target.partition("?")[2]).items()}

    def header(self, name: str) -> str | None:
        """Its value if it came once, None if it did not come."""
        values = [value for known, value in self.headers if known.lower() == name.lower()]
        if len(values) > 1:
            raise AssertionError(f"{name} came {len(values)} times: {values}")
        return values[0] if values else None

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def usage(self) -> dict[str, Any]:
        """What the default answer to it says was used: numbers that depend on its body, each another."""
        size = len(self.body)
        return {
            "input_tokens": size // 4 + 1,
            "cache_creation_input_tokens": size % 89 + 7,
            "cache_read_input_tokens": size % 97 + 1000,
            "cache_creation": {"ephemeral_5m_input_tokens": size % 89, "ephemeral_1h_input_tokens": 7},
            "output_tokens": size % 83 + 5,
            "service_tier": "standard",
        }


class Provider:
    """Listens while the context lasts, and answers what comes by the scripts it was given.

    Scripts are for `POST /v1/messages`, or for another path that is named; each answers one request, in the order of
    arrival. When none is left, the answer is as the API would give it, and uses what `Request.usage` says.

    Attributes:
        url: where it listens. Anything may come between this and `/v1/…`.
        requests: what arrived, in the order of arrival.
        key: if there is one, requests must bring it, as x-api-key or Bearer.
        models: the ids it lists.
        connections: how many were opened.

    """

    def __init__(self, *, key: str | None = None) -> None:
        self.url = ""
        self.requests: list[Request] = []
        self.key = key
        self.models = ["claude-opus-5", MODEL, "claude-haiku-4-5"]
        self.connections = 0
        self._scripts: dict[str, deque[Script]] = {}
        self._always: dict[str, Script] = {}
        self._changed = asyncio.Condition()
        self._serving: set[asyncio.Task[None]] = set()
        self._broken: list[BaseException] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()
        for task in list(self._serving):
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await self._server.wait_closed()
        if self._broken and error is None:
            raise self._broken[0]

    def answers(self, *scripts: Script, path: str = MESSAGES) -> None:
        """The next requests of this path are answered so, one each."""
        self._scripts.setdefault(path, deque()).extend(scripts)

    def answers_always(self, script: Script, path: str = MESSAGES) -> None:
        """All requests of this path that nothing else was said of are answered so."""
        self._always[path] = script

    @property
    def unused(self) -> int:
        """How many of the answers nobody asked for yet."""
        return sum(len(scripts) for scripts in self._scripts.values())

    @property
    def open_connections(self) -> int:
        return len(self._serving)

    async def begun(self, count: int = 1) -> Request:
        """Wait until so many requests have begun to arrive; return the last of them."""
        return await self._wait_for(lambda: len(self.requests) >= count, count)

    async def arrived(self, count: int = 1) -> Request:
        """Wait until so many requests have arrived, the last of them whole; return that one."""
        return await self._wait_for(lambda: len(self.requests) >= count and self.requests[count - 1].whole, count)

    async def _wait_for(self, there: Callable[[], bool], count: int) -> Request:
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(there), PATIENCE_S)
        return self.requests[count - 1]

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # ── Connections ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self.connections, reader, writer)
        self.connections += 1
        task = asyncio.get_running_loop().create_task(self._serve(connection))
        self._serving.add(task)
        task.add_done_callback(self._served)
        task.add_done_callback(lambda _: writer.transport.abort())  # one that is cancelled before it begins leaves it

    def _served(self, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        failure = None if task.cancelled() else task.exception()
        if failure is not None:
            self._broken.append(failure)

    async def _serve(self, connection: _Connection) -> None:
        try:
            while (request := await self._next_request(connection)) and await self._handle(connection, request):
                pass
        except _Gone:
            pass
        finally:
            await connection.close()

    async def _next_request(self, connection: _Connection) -> Request | None:
        head = await connection.head()
        if head is None:
            return None
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        now = asyncio.get_running_loop().time()
        request = Request(len(self.requests), connection.number, method, target, headers, now)
        self.requests.append(request)
        await self._notify()
        return request

    async def _handle(self, connection: _Connection, request: Request) -> bool:
        """Answer one request; false if the connection does not live on."""
        try:
            lives_on = await self._answer(connection, request)
        except _Gone as gone:
            request.hung_up, request.hung_up_after = gone.how, request.sent
            request.hung_up_at = asyncio.get_running_loop().time()
            return False
        finally:
            request._over.set()
        if not request.whole:
            if not lives_on:
                # Unread bytes would turn the close into a reset, which could overtake the answer.
                connection.end()
            await self._read_body(connection, request)
        return lives_on

    async def _answer(self, connection: _Connection, request: Request) -> bool:
        script = self._next_script(request)
        if not (isinstance(script, Answer) and script.before_body):
            if (request.header("expect") or "").lower() == "100-continue":
                await connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            await self._read_body(connection, request)
        answer = script if isinstance(script, Answer) else script(request)
        if not self._authenticated(request):
            answer = error(401, "invalid x-api-key")
        return await self._play(connection, request, answer)

    async def _read_body(self, connection: _Connection, request: Request) -> None:
        if "chunked" in (request.header("transfer-encoding") or ""):
            while size := int((await connection.line()).partition(b";")[0], 16):
                request.body += await connection.take(size)
                await connection.line()
            while await connection.line():
                pass
        else:
            request.body = await connection.take(int(request.header("content-length") or 0))
        request.whole = True
        await self._notify()

    async def _play(self, connection: _Connection, request: Request, answer: Answer) -> bool:
        """Send the answer, and look out for the client's going away meanwhile."""
        sending = asyncio.create_task(_send(connection, request, answer))
        # What comes before the body is read must leave it unread.
        watching = asyncio.create_task(connection.watch()) if request.whole else None
        both = {sending, watching} if watching else {sending}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            sent = sending.done() and sending.exception() is None
            if watching and watching.done() and not sent:
                raise _Gone(watching.result())
            return await sending
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    # ── What is answered when nothing else was said ───────────────────────────────────────────────────────────────────

    def _next_script(self, request: Request) -> Script:
        scripts = self._scripts.get(request.path)
        if scripts and request.method != "HEAD":
            return scripts.popleft()
        return self._always.get(request.path, self._usual)

    def _authenticated(self, request: Request) -> bool:
        if self.key is None or request.method == "HEAD":
            return True
        return self.key == request.header("x-api-key") or f"Bearer {self.key}" == request.header("authorization")

    def _usual(self, request: Request) -> Answer:
        match request.method, request.path:
            case "HEAD", _:
                return Answer()
            case "POST", "/v1/messages":
                return usual(request)
            case "POST", "/v1/messages/count_tokens":
                return Answer(json={"input_tokens": len(request.body) // 4 + 1})
            case "GET", "/v1/models":
                return Answer(json=self._page(**request.query))
            case "GET", path if path.removeprefix("/v1/models/") in self.models:
                return Answer(json=_model(path.removeprefix("/v1/models/")))
        return error(404, f"{request.method} {request.path}")

    def _page(
        self, *, limit: str = "20", after_id: str | None = None, before_id: str | None = None, **_: str
    ) -> dict[str, Any]:
        first = self.models.index(after_id) + 1 if after_id else 0
        last = self.models.index(before_id) if before_id else len(self.models)
        page = self.models[first:last][: int(limit)]
        return {
            "data": [_model(model) for model in page],
            "has_more": first + len(page) < last,
            "first_id": page[0] if page else None,
            "last_id": page[-1] if page else None,
        }


def usual(request: Request) -> Answer:
    """What the API answers to a message, streamed if asked so."""
    asked, usage = request.json(), request.usage
    model = str(asked.get("model", MODEL))
    if asked.get("stream") is True:
        end = {name: usage[name] for name in usage if name.endswith("_tokens")}
        return Answer(events=stream(usage_start=usage | {"output_tokens": 1}, usage_end=end, model=model))
    return Answer(json=message(usage=usage, model=model))


def _model(model: str) -> dict[str, Any]:
    name = model.replace("-", " ").title()
    return {"type": "model", "id": model, "display_name": name, "created_at": "2026-02-19T00:00:00Z"}


# ── Sending ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_REASONS = {200: "OK", 307: "Temporary Redirect", 404: "Not Found", 429: "Too Many Requests"}


async def _send(connection: _Connection, request: Request, answer: Answer) -> bool:
    """Send the answer as it says; false if the connection does not live on."""
    if answer.negotiated and answer.encoding not in (request.header("accept-encoding") or "").replace(",", " ").split():
        answer = replace(answer, encoding=None)
    for wait in answer.before_head:
        await wait()
    if answer.instead == "silence":
        await asyncio.Event().wait()
    elif answer.instead:
        connection.breaks(answer.instead)
        return False
    framing = answer.framing or ("chunked" if answer.events is not None else "length")
    headers = _headers(request, answer, framing)
    lines = [f"HTTP/1.1 {answer.status} {_REASONS.get(answer.status, 'Whatever')}"]
    lines += [f"{name}: {value}" for name, value in headers]
    await connection.send("\r\n".join([*lines, "", ""]).encode("latin-1"))
    if request.method != "HEAD":
        await _send_body(connection, request, answer, chunked=framing == "chunked")
    if answer.breaks_after is not None:
        connection.breaks(answer.breaks)
        return False
    return not answer.then_closes and ("connection", "close") not in headers and request.header("connection") != "close"


async def _send_body(connection: _Connection, request: Request, answer: Answer, *, chunked: bool) -> None:
    for piece in answer.pieces():
        if isinstance(piece, bytes):
            # Counted first: whoever has these bytes must find them counted.
            request.sent += len(piece)
            await connection.send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        else:
            await piece()
    if chunked and answer.breaks_after is None:
        await connection.send(b"0\r\n\r\n")


def _headers(request: Request, answer: Answer, framing: str) -> list[tuple[str, str]]:
    usual = {
        "content-type": "application/json" if answer.events is None else "text/event-stream; charset=utf-8",
        "request-id": f"req_test_{request.number:06}",
        "anthropic-organization-id": "org-test",
        **rate_limit_headers(),
    }
    if answer.encoding:
        usual["content-encoding"] = answer.encoding
    match framing:
        case "chunked":
            usual["transfer-encoding"] = "chunked"
        case "length":
            usual["content-length"] = str(len(answer.body()))
        case "close":
            usual["connection"] = "close"
    own = list(answer.headers.items() if isinstance(answer.headers, Mapping) else answer.headers)
    left_out = {name.lower() for name in (*(name for name, _ in own), *answer.without)}
    return [(name, value) for name, value in usual.items() if name not in left_out] + own


# ── Bytes ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Gone(Exception):
    """The client went away."""

    def __init__(self, how: Literal["fin", "rst"]) -> None:
        super().__init__(how)
        self.how = how


class _Connection:
    """Bytes from and to one client. All reads go through one buffer, so that looking for the end loses nothing."""

    def __init__(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.number = number
        self._reader = reader
        self._writer = writer
        self._read = bytearray()
        # To send is to hand over to the kernel, or else holds and breaks would not be where the script has them.
        writer.transport.set_write_buffer_limits(high=0)

    async def head(self) -> bytes | None:
        """The next request up to its empty line; None if the client has no more."""
        try:
            return await self._until(b"\r\n\r\n")
        except _Gone:
            if self._read:
                raise
            return None

    async def line(self) -> bytes:
        return await self._until(b"\r\n")

    async def take(self, size: int) -> bytes:
        while len(self._read) < size:
            await self._fill()
        taken = bytes(self._read[:size])
        del self._read[:size]
        return taken

    async def watch(self) -> Literal["fin", "rst"]:
        """Wait until the client goes away, and tell how."""
        try:
            while True:
                await self._fill()
        except _Gone as gone:
            return gone.how

    async def send(self, data: bytes) -> None:
        """Hand the bytes over to the network, and let a reader in this event loop have them before any others."""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except ConnectionError:
            raise _Gone("rst") from None
        await asyncio.sleep(0)

    def end(self) -> None:
        """Nothing more is sent; what comes is still read."""
        with suppress(OSError):
            self._writer.write_eof()

    def breaks(self, how: Literal["fin", "rst"]) -> None:
        if how == "rst":
            never_linger = struct.pack("ii", 1, 0)
            self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, never_linger)
        self._writer.transport.abort()

    async def close(self) -> None:
        self._writer.transport.abort()
        with suppress(OSError):
            await self._writer.wait_closed()

    async def _until(self, end: bytes) -> bytes:
        while (at := self._read.find(end)) < 0:
            await self._fill()
        return (await self.take(at + len(end)))[:at]

    async def _fill(self) -> None:
        try:
            data = await self._reader.read(1 << 16)
        except ConnectionError:
            raise _Gone("rst") from None
        if not data:
            raise _Gone("fin")
        self._read += data
