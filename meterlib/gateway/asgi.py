"""The gateway as an ASGI app, to run or to mount anywhere, and a middleware that meters an app of one's own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

from meterlib.core.checks import check_attributes
from meterlib.core.policy import Funding
from meterlib.errors import InvalidInput
from meterlib.gateway.admission import Admission
from meterlib.gateway.answers import Refusal, new_request_id
from meterlib.gateway.app import TEND_S, Gateway
from meterlib.gateway.background import Background
from meterlib.gateway.denials import FLUSH_S
from meterlib.gateway.estimate import CacheAwareEstimator, Estimator
from meterlib.gateway.exchange import BodyLate, BodyTooLarge, ClientGone
from meterlib.gateway.headers import Headers, value_of
from meterlib.gateway.metering import STOP, End, Metering
from meterlib.gateway.prompt import prompt_of
from meterlib.gateway.spending import Spending
from meterlib.meter import AsyncMeter

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY_BYTES_MAX = 32 << 20


class AnswerCutShort(Exception):
    """Raised out of the app on purpose: a server then breaks the connection, and the client sees what is missing."""


class GatewayApp:
    """A gateway for any ASGI server, on its own or mounted below a path.

    Mounted, it does not hear of the server's start and end: give its `lifespan` to the app that it is mounted in.
    Time-outs of connections and limits on heads are the server's; see its documentation.
    """

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self._tending: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or see to the server's start and end."""
        if scope["type"] == "lifespan":
            return await self._serve_lifespan(receive, send)
        if scope["type"] != "http":
            raise ValueError(f"the gateway speaks HTTP, not {scope['type']}")
        self._start()
        exchange = _Exchange(scope, receive, send)
        handling = asyncio.ensure_future(self.gateway.handle(exchange))
        try:
            # A server that cancels its tasks when the client leaves must not cancel what is to be settled.
            await asyncio.shield(handling)
        finally:
            exchange.leave()
        if exchange.broken:
            raise AnswerCutShort
        return None

    @asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        """What a host app enters when it starts: at the end, open answers go on for a while and all is settled."""
        self._start()
        try:
            yield
        finally:
            await self.gateway.aclose()
            if self._tending:
                self._tending.cancel()
                with suppress(asyncio.CancelledError):
                    await self._tending
                self._tending = None

    def _start(self) -> None:
        if self._tending is None:
            self._tending = asyncio.create_task(self.gateway.tend_for_ever(), name="meterlib-gateway")

    async def _serve_lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        async with self.lifespan():
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})


class _Exchange:
    """A request of an ASGI server, as the gateway wants it.

    Attributes:
        broken: the answer is not complete, and must not look so.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path = _path_of(scope)
        self.query = scope.get("query_string", b"").decode("latin-1")
        self.headers: Headers = _headers_of(scope["headers"])
        self.request_id = new_request_id()
        self.started = False
        self.broken = False
        self._receive = receive
        self._send = send
        self._gone = False
        self._watching: asyncio.Task[None] | None = None
        self._sending: asyncio.Future[None] | None = None

    @property
    def gone(self) -> bool:
        return self._gone

    async def body(self, bytes_max: int, timeout_ms: int) -> bytes:
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                body = await _read_body(self._receive, bytes_max)
        except TimeoutError:
            raise BodyLate from None
        if not self._gone:
            self._watching = asyncio.ensure_future(self._watch())
        return body

    async def start(self, status: int, headers: Headers, *, more: bool = False) -> None:
        self.started = True
        if value_of(headers, "request-id") is None:
            headers = [*headers, ("request-id", self.request_id)]
        await self._pass({"type": "http.response.start", "status": status, "headers": _encoded(headers)})

    async def write(self, data: bytes) -> None:
        await self._pass({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self) -> None:
        await self._pass({"type": "http.response.body", "body": b"", "more_body": False})

    def close(self) -> None:
        self.broken = True

    def abort(self) -> None:
        self.broken = True
        if self._sending:
            self._sending.cancel()

    def leave(self) -> None:
        """The server waits for nothing more."""
        self._gone = True
        if self._watching:
            self._watching.cancel()

    async def _pass(self, message: Message) -> None:
        if self._gone or self.broken:
            raise ClientGone
        self._sending = asyncio.ensure_future(self._send(message))
        try:
            await asyncio.wait([self._sending])
            if self._sending.cancelled():
                raise ClientGone
            self._sending.result()
        except OSError:
            raise ClientGone from None
        finally:
            self._sending = None

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True


class Who(NamedTuple):
    """Whom a request is charged to."""

    tenant: str
    attributes: Mapping[str, str]
    funding: Funding | None = None


class MeteringMiddleware:
    """Meters an ASGI app that answers like the Claude API: reserves before it is called, settles when it has answered.

    What the limits deny never reaches the app. The app's answer passes unchanged, but for headers that tell the limits.

    Args:
        app: the app.
        meter: decides and books.
        who: whom a request is charged to; None for those that are not metered. Authenticating them is its affair.
        paths: ends of the paths that are metered; only POST is.
        estimator: guesses what a call will use; by default from its length and from what is cached.
        body_bytes_max: the largest request.
        lease_ms: how long a call may stay unsettled if the process dies.
        spending: works out what calls cost, for limits over `cost_nanousd`; see `meterlib.gateway.assembly`.

    Raises:
        PolicyError: a limit counts what calls cost, and nobody tells that.
    """

    def __init__(
        self,
        app: App,
        meter: AsyncMeter,
        who: Callable[[Scope], Who | None],
        *,
        paths: Sequence[str] = ("/v1/messages",),
        estimator: Estimator | None = None,
        body_bytes_max: int = BODY_BYTES_MAX,
        lease_ms: int = 600_000,
        spending: Spending | None = None,
    ) -> None:
        self._app = app
        self._who = who
        self._paths = tuple(paths)
        self._body_bytes_max = body_bytes_max
        self._lease_ms = lease_ms
        self._background = Background()
        estimator = estimator or CacheAwareEstimator(time.monotonic)
        self._admission = Admission(meter, estimator, self._background, spending)
        self._booking_denials: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the app, metered if this is a call to be metered."""
        if scope["type"] == "lifespan":
            return await self._app(scope, self._booked_before_the_end(receive), send)
        metered = scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith(self._paths)
        who = self._who(scope) if metered else None
        if who is None:
            return await self._app(scope, receive, send)
        try:
            body, metering = await self._admit(who, receive)
        except ClientGone:
            return None
        except Refusal as refusal:
            self._book_denials()
            return await _refuse(send, refusal)
        answer = _Metered(metering, send, self._admission.limit_headers(metering.reservation.limits), self._lease_ms)
        try:
            await self._app(scope, _replayed(body, receive), answer.send)
        except BaseException:
            # Whatever it was, a cancelled task too: what was used until then is booked.
            await self._settle(metering, answer.end(failed=True))
            raise
        return await self._settle(metering, answer.end(failed=False))

    async def _settle(self, metering: Metering, end: End) -> None:
        await asyncio.wait([self._background.spawn(metering.settle(end))])

    def _book_denials(self) -> None:
        """Once a minute from now on, until all are booked, if that is not on its way already."""

        async def book() -> None:
            try:
                while self._admission.denials.pending:
                    await asyncio.sleep(FLUSH_S)
                    await self._admission.denials.flush()
            finally:
                self._booking_denials = None

        if self._booking_denials is None:
            self._booking_denials = asyncio.create_task(book(), name="meterlib-denials")

    def _booked_before_the_end(self, receive: Receive) -> Receive:
        """A `receive` that books denials before it tells the app to end, and perhaps to close the meter."""

        async def received() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                if self._booking_denials:
                    self._booking_denials.cancel()
                await self._admission.denials.flush()
            return message

        return received

    async def _admit(self, who: Who, receive: Receive) -> tuple[bytes, Metering]:
        try:
            body = await _read_body(receive, self._body_bytes_max)
            prompt = prompt_of(body)
            check_attributes({"model": prompt.model}, "body")
        except BodyTooLarge:
            message = f"a request may have at most {self._body_bytes_max:,} bytes"
            raise Refusal(413, "request_too_large", message) from None
        except InvalidInput as error:
            raise Refusal(400, "invalid_request_error", str(error)) from None
        attributes = {"model": prompt.model} | dict(who.attributes)
        metering = await self._admission.admit(
            who.tenant, attributes, prompt, funding=who.funding, lease_ms=self._lease_ms
        )
        return body, metering


class _Metered:
    """The app's answer on its way to the server, read in passing."""

    def __init__(self, metering: Metering, send: Send, limit_headers: Headers, lease_ms: int) -> None:
        self._metering = metering
        self._send = send
        self._limit_headers = limit_headers
        self._lease_s = lease_ms / 1000
        self._renewed_s = self._tended_s = time.monotonic()
        self._status = 0
        self._complete = False

    async def send(self, message: Message) -> None:
        """Pass on a piece of the answer, and only then look at it."""
        if message["type"] == "http.response.start":
            headers = _headers_of(message["headers"])
            self._status = message["status"]
            self._metering.answered(self._status, headers)
            own = {name for name, _ in self._limit_headers}
            kept = [(name, value) for name, value in headers if name not in own]
            message = {**message, "headers": _encoded([*kept, *self._limit_headers])}
        await self._send(message)
        if message["type"] == "http.response.body":
            self._metering.take(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            await self._tend()

    def end(self, *, failed: bool) -> End:
        """How the call has ended."""
        if not self._status:
            return "no_answer"
        if failed or not self._complete:
            return "cut"
        if self._status >= 300:
            return "refused"
        if self._metering.streams:
            if self._metering.lacks_only_its_stop:
                self._metering.take(STOP)  # all is known, though the app's answer passes as it is
            self._metering.end()
            return "complete" if self._metering.finished else "error_event" if self._metering.error else "cut"
        return "complete"

    async def _tend(self) -> None:
        now_s = time.monotonic()
        if now_s - self._tended_s >= TEND_S:
            self._tended_s = now_s
            self._metering.tend()
        if now_s - self._renewed_s >= self._lease_s / 2:
            self._renewed_s = now_s
            await self._metering.renew(round(self._lease_s * 1000))


async def _read_body(receive: Receive, bytes_max: int) -> bytes:
    pieces, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > bytes_max:
            raise BodyTooLarge
        more = message.get("more_body", False)
    return b"".join(pieces)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once more, and then what else comes."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def _refuse(send: Send, refusal: Refusal) -> None:
    request_id = new_request_id()
    body = refusal.body(request_id)
    told = [("content-type", "application/json"), ("content-length", str(len(body))), ("request-id", request_id)]
    headers = _encoded([*told, *refusal.headers])
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _path_of(scope: Scope) -> str:
    """The path as it came, below the one that the app is mounted at."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    path = raw.decode("latin-1").partition("?")[0]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root) else path


def _headers_of(raw: Sequence[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    return [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in raw]


def _encoded(headers: Headers) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
