"""A TCP proxy before a Redis server that spoils chosen requests: replies get lost, requests are cut or come late."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

_PATIENCE_SECONDS = 10.0


class RespFrames:
    """Cuts a stream of RESP2 or RESP3 into whole values, however its bytes arrive."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scanned = 0
        self._missing = 1

    def feed(self, data: bytes) -> list[bytes]:
        """Take more of the stream; return the values that are whole with it."""
        self._buffer += data
        frames = []
        while self._scan_one():
            if self._missing == 0:
                frames.append(bytes(self._buffer[: self._scanned]))
                del self._buffer[: self._scanned]
                self._scanned, self._missing = 0, 1
        return frames

    def _scan_one(self) -> bool:
        """Pass over one line and, of a string, its bytes; False if they are not here yet."""
        line_end = self._buffer.find(b"\r\n", self._scanned)
        if line_end < 0:
            return False
        kind, end, inner = self._buffer[self._scanned], line_end + 2, 0
        if kind in b"$=!*~>%|":
            size = int(self._buffer[self._scanned + 1 : line_end])
            if kind in b"$=!":
                end += size + 2 if size >= 0 else 0
            else:
                inner = max(size, 0) * (2 if kind in b"%|" else 1) + (kind in b"|")  # an attribute precedes its value
        if end > len(self._buffer):
            return False
        self._scanned = end
        self._missing += inner - 1
        return True


def _words(request: bytes) -> bytes:
    """The command and its arguments with spaces between, as one would type them."""
    if not request.startswith(b"*"):
        return request.strip()
    arguments = RespFrames().feed(request[request.index(b"\r\n") + 2 :])
    return b" ".join(argument[argument.index(b"\r\n") + 2 : -2] for argument in arguments)


@dataclass
class _Fault:
    play: Literal["drop", "swallow", "delay", "cut", "garble"]
    count: int
    matching: bytes
    seconds: float = 0.0
    payload: bytes = b""


class _Peer:
    """One end of a proxied connection; a lost one reads as ended and takes writes silently."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @property
    def closing(self) -> bool:
        return self._writer.is_closing()

    async def read(self) -> bytes:
        try:
            return await self._reader.read(65536)
        except OSError:
            return b""

    async def write(self, data: bytes) -> None:
        if not self.closing:
            with contextlib.suppress(OSError):
                self._writer.write(data)
                await self._writer.drain()

    def end_writing(self) -> None:
        if not self.closing:
            with contextlib.suppress(OSError):
                self._writer.write_eof()

    def close(self) -> None:
        self._writer.close()

    async def abort(self) -> None:
        self._writer.transport.abort()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


class FaultProxy:
    """Listens on a loopback port, forwards to the server's, and plays the faults it is told to.

    A fault is meant for the next `count` requests that contain `matching`, looked for in the command and its arguments
    with single spaces between (as in `executed`). Of several faults, the one ordered first is played. Whatever reached
    the proxy reaches the server, even when its client has gone away. Publish/subscribe is not supported.
    """

    def __init__(self, server_port: int) -> None:
        self.executed: list[bytes] = []
        self.faults = 0
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._lock = threading.Lock()
        self._ordered: list[_Fault] = []
        self._refusing = False
        self._latency = 0.0
        self._clients: dict[asyncio.Task[None], _Peer] = {}
        self._broken: list[BaseException] = []
        self._listening = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="fault-proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._listening.wait(_PATIENCE_SECONDS):
            raise TimeoutError("the proxy does not listen")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._leaving.set)
        self._thread.join(_PATIENCE_SECONDS)
        if self._thread.is_alive():
            raise TimeoutError("the proxy does not end")
        if self._broken:
            raise self._broken[0]

    def drop_replies(self, count: int, *, matching: bytes = b"EVALSHA") -> None:
        """Let the server execute the request, then close the client's connection instead of handing over the reply."""
        self._order(_Fault("drop", count, matching))

    def swallow_replies(self, count: int, *, matching: bytes = b"EVALSHA") -> None:
        """Let the server execute the request, but hand over neither its reply nor any later one of this connection."""
        self._order(_Fault("swallow", count, matching))

    def delay_requests(self, count: int, seconds: float, *, matching: bytes = b"EVALSHA") -> None:
        """Hold the request, and what follows it on its connection, before it reaches the server."""
        self._order(_Fault("delay", count, matching, seconds=seconds))

    def cut_requests(self, count: int, *, matching: bytes = b"EVALSHA") -> None:
        """Let only half of the request's bytes reach the server, then close both sides: it is not executed."""
        self._order(_Fault("cut", count, matching))

    def garble_replies(self, count: int, payload: bytes, *, matching: bytes = b"EVALSHA") -> None:
        """Let the server execute the request, and hand over the payload instead of the reply."""
        self._order(_Fault("garble", count, matching, payload=payload))

    def delay_all(self, seconds: float) -> None:
        """Hold everything that arrives from now on for so long; pipelined requests are held together."""
        self._latency = seconds

    def refuse(self, refusing: bool) -> None:
        """Close the present connections, and new ones as they come; False lets new ones through again."""
        asyncio.run_coroutine_threadsafe(self._refuse(refusing), self._loop).result(_PATIENCE_SECONDS)

    async def _refuse(self, refusing: bool) -> None:
        self._refusing = refusing
        if refusing:
            await self._abort_clients()

    async def _abort_clients(self) -> None:
        for client in list(self._clients.values()):
            await client.abort()

    def _order(self, fault: _Fault) -> None:
        with self._lock:
            self._ordered.append(fault)

    def _fault_for(self, words: bytes) -> _Fault | None:
        with self._lock:
            for fault in self._ordered:
                if fault.count > 0 and fault.matching in words:
                    fault.count -= 1
                    return fault
        return None

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._leaving = asyncio.Event()
        listening = await asyncio.start_server(self._accept, sock=self._listener)
        self._listening.set()
        await self._leaving.wait()
        listening.close()
        await self._abort_clients()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        client = _Peer(reader, writer)
        task = self._loop.create_task(self._serve(client))
        self._clients[task] = client
        task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        del self._clients[task]
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._broken.append(error)

    async def _serve(self, client: _Peer) -> None:
        try:
            server = _Peer(*await asyncio.open_connection("127.0.0.1", self._server_port))
        except OSError:
            await client.abort()
            return
        awaited: deque[_Fault | None] = deque()
        replies = asyncio.create_task(self._hand_over(server, client, awaited))
        try:
            await self._forward(client, server, awaited)
            # The server executes what it got before it notices the end; closed fully, it might be reset before that.
            server.end_writing()
            await replies
        finally:
            replies.cancel()
            await client.abort()
            await server.abort()

    async def _forward(self, client: _Peer, server: _Peer, awaited: deque[_Fault | None]) -> None:
        frames = RespFrames()
        while data := await client.read():
            await asyncio.sleep(self._latency)
            for request in frames.feed(data):
                words = _words(request)
                fault = self._fault_for(words)
                if fault and fault.play == "delay":
                    self.faults += 1
                    await asyncio.sleep(fault.seconds)
                if fault and fault.play == "cut":
                    await server.write(request[: len(request) // 2])
                    self.faults += 1
                    await client.abort()
                    return
                if not server.closing:
                    # Noted before it is sent, so that whoever has the reply finds it noted.
                    self.executed.append(words)
                    awaited.append(fault)
                    await server.write(request)

    async def _hand_over(self, server: _Peer, client: _Peer, awaited: deque[_Fault | None]) -> None:
        frames = RespFrames()
        muted = False
        while data := await server.read():
            for reply in frames.feed(data):
                pushed = reply.startswith(b">")
                fault = awaited.popleft() if awaited and not pushed else None
                play = fault.play if fault else None
                self.faults += play in ("drop", "swallow", "garble")
                if play == "drop":
                    await client.abort()
                muted = muted or play == "swallow"
                if not muted:
                    await client.write(fault.payload if fault and play == "garble" else reply)
        client.close()
