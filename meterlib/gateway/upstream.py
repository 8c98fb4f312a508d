"""The way to the provider: one pool of connections, requests passed on byte for byte, answers as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from io import BytesIO
from typing import Any, Self

import aiohttp
from yarl import URL

from meterlib.core.frames import without_frames
from meterlib.settings import GatewaySettings

KEEPALIVE_S = 15
"""Shorter than providers' own, so that a request hardly ever meets a connection that is just being closed."""

HEAD_BYTES_MAX = 64 << 10
WHOLE_BYTES_MAX = 1 << 20
"""What is written in one go; aiohttp warns of more."""


class NotSent(Exception):
    """No connection to the provider could be made: it knows nothing of the call."""


class NoAnswer(Exception):
    """The call was sent, and there was no answer, or it broke off.

    Attributes:
        timed_out: the provider took too long.
    """

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause) or type(cause).__name__)
        self.timed_out = isinstance(cause, TimeoutError)


class Answer:
    """An answer whose head is there, and whose body comes piece by piece.

    Attributes:
        status: of the answer.
        headers: pairs of a lower-case name and a value, in order.
        ends_with_connection: nothing but the connection's end says where the body ends.
    """

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers = [(name.lower(), value) for name, value in response.headers.items()]
        framed = "content-length" in response.headers or "transfer-encoding" in response.headers
        self.ends_with_connection = not framed

    def chunks(self) -> Self:
        """The body's bytes as they come, not decompressed; to be iterated over.

        Raises (while iterating):
            NoAnswer: the connection broke, or the provider was silent for too long.
        """
        return self

    def __aiter__(self) -> Self:
        return self

    @property
    def has_begun(self) -> bool:
        """Whether some of the body has come."""
        return self._response.content.total_bytes > 0

    async def __anext__(self) -> bytes:
        # No generator: one that is left in the middle would be closed only later, in a task that nobody waits for.
        try:
            chunk = await self._response.content.readany()
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            without_frames(error)
            raise NoAnswer(error) from None
        if not chunk:
            raise StopAsyncIteration
        return chunk

    def close(self) -> None:
        """The answer is given up, with its connection; nothing happens to one that was read to its end."""
        self._response.close()


def _nobody() -> None:
    """There is nobody to tell."""


class _Sending:
    """Whom to tell that a request is being sent.

    Timers and connections that are made meanwhile keep the context for minutes; with it they keep this, but not the
    caller and its prompt, which are taken out of it.
    """

    __slots__ = ("tell",)

    def __init__(self, tell: Callable[[], None]) -> None:
        self.tell = tell


_sending: ContextVar[_Sending] = ContextVar("sending")


class _Request(aiohttp.ClientRequest):
    """Tells its caller when a connection is there, and its first byte is about to leave."""

    async def send(self, conn: Any) -> aiohttp.ClientResponse:
        _sending.get().tell()
        return await super().send(conn)


class Upstream:
    """The provider.

    It never follows a redirect, keeps no cookies, and reaches no other host than the configured one. No call is asked
    twice: that a connection broke before its answer began does not prove that nobody worked on the call.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self._base = settings.upstream.rstrip("/")
        self._settings = settings
        self._session: aiohttp.ClientSession | None = None

    async def send(
        self,
        method: str,
        path: str,
        query: str,
        headers: Sequence[tuple[str, str]],
        body: bytes | None,
        sending: Callable[[], None] = _nobody,
    ) -> Answer:
        """Send a request; returns as soon as the head of its answer is there.

        Args:
            method: of the request.
            path: as it comes behind that of the provider's base URL.
            query: without the question mark.
            headers: all but the host and the length.
            body: as it is sent.
            sending: called before the first byte is sent; whatever happens before, the provider knows nothing.

        Raises:
            NotSent: the provider cannot be reached.
            NoAnswer: it was reached, and did not answer.
        """
        url = URL(f"{self._base}{path}{'?' if query else ''}{query}", encoded=True)
        session = self._session or self._open()
        request = _Sending(sending)
        _sending.set(request)
        try:
            response = await session.request(method, url, headers=headers, data=_in_pieces(body), allow_redirects=False)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            without_frames(error)
            raise NotSent(str(error) or type(error).__name__) from None
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            without_frames(error)
            raise NoAnswer(error) from None
        finally:
            request.tell = _nobody
        if response.status < 200:
            response.close()
            raise NoAnswer(ConnectionError("it wants to speak another protocol"))
        return Answer(response)

    def _open(self) -> aiohttp.ClientSession:
        settings = self._settings
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            request_class=_Request,
            auto_decompress=False,
            skip_auto_headers=("accept", "accept-encoding", "user-agent", "content-type"),
            max_line_size=HEAD_BYTES_MAX,
            max_field_size=HEAD_BYTES_MAX,
            timeout=aiohttp.ClientTimeout(
                total=settings.upstream_timeout_ms / 1000,
                sock_connect=settings.upstream_connect_timeout_ms / 1000,
                sock_read=settings.upstream_idle_timeout_ms / 1000,
            ),
        )
        return self._session

    async def aclose(self) -> None:
        """Close all connections."""
        if self._session:
            await self._session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def _in_pieces(body: bytes | None) -> BytesIO | bytes | None:
    """A large body is written piece by piece, so that other calls get their turn in between."""
    return BytesIO(body) if body is not None and len(body) > WHOLE_BYTES_MAX else body
