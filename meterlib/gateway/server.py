"""The gateway's own HTTP server: aiohttp's, without its router, and with bounds on what clients may do to it."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
import struct
from collections import Counter
from contextlib import suppress
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Any, Self

from aiohttp import HttpVersion10, HttpVersion11, web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler

from meterlib.gateway.answers import Refusal, new_request_id
from meterlib.gateway.app import Gateway
from meterlib.gateway.exchange import BodyLate, BodyTooLarge, ClientGone
from meterlib.gateway.headers import Headers, value_of
from meterlib.store.telling import Log

log = Log("meterlib.gateway")
_HEAD_FIELD_BYTES_MAX = 16 << 10
REFUSALS_TOLD_S = 1.0


class Server:
    """Serves a gateway at the address of its settings, while the context lasts.

    Leaving the context lets open answers go on for `shutdown_ms`, and settles what is left as it stands.

    Attributes:
        url: where it listens; port 0 in the settings finds a free one.
    """

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.url = ""
        settings = gateway.settings
        self._connections = _Connections(
            self._handle,
            connections_max=settings.connections_max,
            per_address_max=settings.connections_per_address_max,
            keepalive_timeout=settings.keepalive_ms / 1000,
            access_log=None,
            logger=_quiet_logger(),
            auto_decompress=False,
            lingering_time=1.0,
            max_line_size=_HEAD_FIELD_BYTES_MAX,
            max_field_size=_HEAD_FIELD_BYTES_MAX,
        )
        self._runner = web.ServerRunner(self._connections, shutdown_timeout=0.1)
        self._sites: list[web.BaseSite] = []
        self._tending: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        host, port = self.gateway.settings.address
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, backlog=1024)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            await self.gateway.aclose()
            number = error.errno or 0  # those of name look-ups are negative, and have words of their own
            reason = os.strerror(number).lower() if number > 0 else str(error.strerror or error)
            advice = "another address is told by --listen or [gateway] listen"
            raise OSError(f"cannot listen at {self.gateway.settings.listen}: {reason}; {advice}") from None
        self._sites.append(site)
        bound = self._runner.addresses[0]
        shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        self.url = f"http://{shown}:{bound[1]}{self.gateway.settings.base_path}"
        self._tending = asyncio.create_task(self.gateway.tend_for_ever(), name="meterlib-gateway")
        return self

    async def __aexit__(self, *_: object) -> None:
        for site in self._sites:
            await site.stop()
        await self.gateway.aclose()
        if self._tending:
            self._tending.cancel()
            with suppress(asyncio.CancelledError):
                await self._tending
        await self._runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        exchange = _Exchange(request, self.gateway.settings.write_timeout_ms / 1000)
        problem = _problem_of(request)
        if problem:
            exchange.response = _refused(400, problem)
        else:
            await self.gateway.handle(exchange)
        return exchange.response


class _Connections(web.Server):
    """Refuses connections beyond a number, in all and from one address, before anything is read from them."""

    def __init__(self, handler: Any, *, connections_max: int, per_address_max: int, **settings: Any) -> None:
        super().__init__(handler, **settings)
        self._connections_max = connections_max
        self._per_address_max = per_address_max
        self._from: Counter[str] = Counter()
        self._addresses: dict[Any, str] = {}
        self._refused, self._told_s = 0, -math.inf
        self._settings = settings

    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._settings)

    def connection_made(self, handler: Any, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        address = self._addresses[handler] = _address_of(transport)
        self._from[address] += 1
        if self._from[address] > self._per_address_max:
            self._refuse(transport, address, "connections_per_address_max")
        elif len(self._addresses) > self._connections_max:
            self._refuse(transport, address, "connections_max")

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        address = self._addresses.pop(handler, None)
        if address is not None:
            self._from[address] -= 1
            if not self._from[address]:
                del self._from[address]

    def _refuse(self, transport: asyncio.Transport, address: str, setting: str) -> None:
        """Told once a second at most: whoever opens connections all the time must not fill the disk."""
        transport.abort()
        self._refused += 1
        now_s = asyncio.get_running_loop().time()
        if now_s - self._told_s >= REFUSALS_TOLD_S:
            log.warning("connections.refused", setting=f"gateway.{setting}", address=address, count=self._refused)
            self._refused, self._told_s = 0, now_s


def _address_of(transport: asyncio.Transport) -> str:
    """Where a client is; of IPv6, its network, since any host has a whole one to itself."""
    told = transport.get_extra_info("peername")
    host = told[0] if isinstance(told, tuple) and told else ""
    with suppress(ValueError):
        address = ip_address(host.partition("%")[0])
        if isinstance(address, IPv6Address) and address.ipv4_mapped is None:
            return str(IPv6Network((int(address) >> 64 << 64, 64)))
        return str(getattr(address, "ipv4_mapped", None) or address)
    return host


class _Connection(RequestHandler):
    """One client's. What is no HTTP gets the API's kind of answer too, which repeats nothing of it."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("half an answer is sent already")
        if isinstance(exc, LineTooLong):
            return _refused(431, "a line of the request's head is too long")
        return _refused(status, "this is no valid HTTP" if status < 500 else "internal error of the gateway")


def _problem_of(request: web.BaseRequest) -> str:
    """What aiohttp's parser lets pass, and could be read in two ways by those in front of the gateway."""
    if request.version not in (HttpVersion10, HttpVersion11):
        return "the gateway speaks HTTP/1.1"
    codings = request.headers.getall("transfer-encoding", ())
    if codings and [coding.lower() for coding in codings] != ["chunked"]:
        return "transfer-encoding: only chunked is known"
    return ""


def _refused(status: int, problem: str) -> web.Response:
    """An answer to what is no request, and the last one on its connection."""
    request_id = new_request_id()
    body = Refusal(status, "invalid_request_error" if status < 500 else "api_error", problem).body(request_id)
    headers = {"content-type": "application/json", "request-id": request_id, "server": "meterlib"}
    response = web.Response(status=status, body=body, headers=headers)
    response.force_close()
    return response


class _Exchange:
    """A request of aiohttp's server, as the gateway wants it."""

    def __init__(self, request: web.BaseRequest, write_timeout_s: float) -> None:
        self.method = request.method
        path, _, self.query = request.raw_path.partition("#")[0].partition("?")
        # Only paths are known here; the absolute form, for proxies, would name a host.
        self.path = path if path.startswith("/") else ""
        self.headers: Headers = [(name.lower(), value) for name, value in request.headers.items()]
        self.request_id = new_request_id()
        self.started = False
        self.response: web.StreamResponse = web.StreamResponse()
        self._request = request
        self._write_timeout_s = write_timeout_s

    @property
    def gone(self) -> bool:
        transport = self._request.transport
        return transport is None or transport.is_closing()

    async def body(self, bytes_max: int, timeout_ms: int) -> bytes:
        told = value_of(self.headers, "content-length")
        if told is not None and int(told) > bytes_max:
            raise BodyTooLarge
        expected = (value_of(self.headers, "expect") or "").lower()
        if expected == "100-continue" and self._request.version >= HttpVersion11:
            await self._request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._request.writer.output_size = 0
        content, pieces, size = self._request.content, [], 0
        try:
            async with asyncio.timeout(None if content.is_eof() else timeout_ms / 1000):  # most bodies are there by now
                while piece := await content.readany():
                    size += len(piece)
                    if size > bytes_max:
                        raise BodyTooLarge
                    pieces.append(piece)
        except TimeoutError:
            self.response.force_close()
            raise BodyLate from None
        except web.RequestPayloadError:
            raise Refusal(400, "invalid_request_error", "the request's body is no valid HTTP") from None
        except ConnectionError:
            raise ClientGone from None
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def start(self, status: int, headers: Headers, *, more: bool = False) -> None:
        response = self.response
        # As aiohttp does with answers whose body it knows; a version that does not know this sends the head at once.
        response._send_headers_immediately = not more
        response.set_status(status)
        for name, value in headers:
            response.headers.add(name, value)
        response.headers["server"] = "meterlib"
        if value_of(headers, "request-id") is None:
            response.headers["request-id"] = self.request_id
        if not self._request.content.is_eof():
            response.force_close()  # what the client goes on to send is nobody's
        self.started = True
        try:
            await response.prepare(self._request)
        except ConnectionError:
            raise ClientGone from None

    async def write(self, data: bytes) -> None:
        try:
            await self.response.write(data)
        except ConnectionError:
            raise ClientGone from None

    async def finish(self) -> None:
        try:
            await self.response.write_eof()
        except ConnectionError:
            raise ClientGone from None

    def close(self) -> None:
        transport = self._request.transport
        if transport is None:
            return
        if self.started and self._request.version < HttpVersion11:
            # To HTTP/1.0, such as some proxies speak, the end of a connection is the end of an answer: only a reset
            # tells the one from the other.
            _reset(transport)
        else:
            transport.close()
            # It closes when all is sent that waits, which a client that does not read could put off for ever.
            asyncio.get_running_loop().call_later(self._write_timeout_s, transport.abort)

    def abort(self) -> None:
        transport = self._request.transport
        if transport:
            transport.abort()


def _reset(transport: asyncio.Transport) -> None:
    connection = transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _quiet_logger() -> logging.Logger:
    """What clients do wrong is no trouble of ours: aiohttp's own log of it would let them write into our logs."""
    logger = logging.getLogger("meterlib.gateway.http")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
    return logger
