"""What a client sends and gets, byte by byte, with no library in between; and a world that outlasts a run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeAlias, TypeVar

from meterlib.settings import TenantSettings
from tests.gateway.answers import PATIENCE_S
from tests.gateway.world import BASE, TOKEN, Got, World, a_world, message

T = TypeVar("T")
Play: TypeAlias = Callable[[Coroutine[Any, Any, T]], T]

BODY = json.dumps(message()).encode()
MESSAGES = f"{BASE}/v1/messages"


def request(
    method: str = "POST",
    target: str | bytes = MESSAGES,
    *headers: str | bytes,
    body: bytes = BODY,
    key: str | None = TOKEN,
    version: str = "HTTP/1.1",
    length: bool = True,
    line_end: bytes = b"\r\n",
) -> bytes:
    """A request as it goes over the wire."""
    raw = [each if isinstance(each, bytes) else each.encode("latin-1") for each in ("host: gateway", *headers)]
    if key is not None:
        raw.append(f"x-api-key: {key}".encode())
    if length:
        raw.append(b"content-length: %d" % len(body))
    path = target if isinstance(target, bytes) else target.encode("latin-1")
    first = b"%b %b %b" % (method.encode("latin-1"), path, version.encode())
    return line_end.join([first, *raw, b"", b""]) + body


def chunked(*chunks: bytes) -> bytes:
    """A body in chunks, with its end."""
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))


class Wire:
    """One connection to the gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        """Send as much of it as the other side takes."""
        try:
            self.writer.write(data)
            await self.writer.drain()
        except ConnectionError:
            pass

    async def head(self) -> tuple[str, list[tuple[str, str]]]:
        """The next status line and headers."""
        async with asyncio.timeout(PATIENCE_S):
            head = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = head[:-4].decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines)
        return first, [(name.lower(), value.strip()) for name, _, value in pairs]

    async def answer(self, method: str = "POST") -> Got:
        """The next answer, to its end."""
        first, headers = await self.head()
        told = dict(headers)
        assert len(told) == len(headers), "a header came twice"
        status = int(first.split(" ")[1])
        body = b""
        async with asyncio.timeout(PATIENCE_S):
            if method == "HEAD" or status == 100:
                pass
            elif "content-length" in told:
                body = await self.reader.readexactly(int(told["content-length"]))
            elif "chunked" in told.get("transfer-encoding", ""):
                while size := int(await self.reader.readline(), 16):
                    body += (await self.reader.readexactly(size + 2))[:-2]
                await self.reader.readline()
            else:
                body = await self.reader.read()
        return Got(status, told, body)

    async def rest(self) -> bytes:
        """What else comes until the gateway ends the connection."""
        pieces = []
        async with asyncio.timeout(PATIENCE_S):
            try:
                while piece := await self.reader.read(1 << 16):
                    pieces.append(piece)
            except ConnectionError:
                pass
        return b"".join(pieces)


@asynccontextmanager
async def connected(url: str, local: str | None = None) -> AsyncIterator[Wire]:
    """A connection to the gateway, from an address of this machine, while the context lasts."""
    host, _, port = url.removeprefix("http://").split("/")[0].rpartition(":")
    reader, writer = await asyncio.open_connection(
        host, int(port), limit=1 << 22, local_addr=(local, 0) if local else None
    )
    try:
        yield Wire(reader, writer)
    finally:
        writer.transport.abort()


async def exchanged(world: World, data: bytes, method: str = "POST") -> Got:
    """What one request on a connection of its own is answered."""
    async with connected(world.url) as wire:
        await wire.send(data)
        return await wire.answer(method)


@contextmanager
def lasting(*tenants: TenantSettings, **settings: Any) -> Iterator[tuple[World, Play[Any]]]:
    """A world, and the means to play in it again and again, for tests that try many examples."""
    with asyncio.Runner() as runner:
        manager = a_world(*tenants, **settings)
        world = runner.run(manager.__aenter__())
        try:
            yield world, runner.run
        finally:
            runner.run(manager.__aexit__(None, None, None))


def names(headers: Sequence[tuple[str, str]]) -> set[str]:
    """The names of headers."""
    return {name.lower() for name, _ in headers}
