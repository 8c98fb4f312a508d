"""What the gateway needs of a server: one request, and the means to answer it. Each server's face provides it."""

from __future__ import annotations

from typing import Protocol

from meterlib.gateway.headers import Headers


class ClientGone(Exception):
    """The client left before it had its answer."""


class BodyTooLarge(Exception):
    """The request has more bytes than are allowed; no more than that were read."""


class BodyLate(Exception):
    """The request was not there in time."""


class Exchange(Protocol):
    """One request and its answer.

    Attributes:
        method: upper-case.
        path: as it came, not unquoted, without the query.
        query: as it came, without the question mark.
        headers: pairs of a lower-case name and a value, in order.
        request_id: made for this request: its answer's id, should the provider give none.
        started: the head of the answer is sent.
    """

    method: str
    path: str
    query: str
    headers: Headers
    request_id: str
    started: bool

    @property
    def gone(self) -> bool:
        """Whether the client has left."""

    async def body(self, bytes_max: int, timeout_ms: int) -> bytes:
        """The request's body, in full, as it came.

        Raises:
            BodyTooLarge, BodyLate, ClientGone.
        """

    async def start(self, status: int, headers: Headers, *, more: bool = False) -> None:
        """Send the head of the answer, with `request_id` if the headers name none. Raises ClientGone.

        With `more`, a piece is written right behind it, which it may go along with.
        """

    async def write(self, data: bytes) -> None:
        """Send a piece of the answer, as soon as the client takes it. Raises ClientGone."""

    async def finish(self) -> None:
        """End the answer. Raises ClientGone."""

    def close(self) -> None:
        """End the connection without ending the answer, so that the client sees that something is missing."""

    def abort(self) -> None:
        """Drop the connection with all that waits to be sent: the client does not read."""
