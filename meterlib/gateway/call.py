"""One call's way through the gateway: sent to the provider, passed back as it comes, and always brought to an end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple

from meterlib.gateway.answers import Refusal
from meterlib.gateway.background import Background
from meterlib.gateway.exchange import ClientGone, Exchange
from meterlib.gateway.headers import Headers, for_client, value_of, without
from meterlib.gateway.metering import End, Metering
from meterlib.gateway.upstream import Answer, NoAnswer, NotSent, Upstream
from meterlib.settings import GatewaySettings
from meterlib.store.telling import Log

log = Log("meterlib.gateway")
PING = b'event: ping\ndata: {"type": "ping"}\n\n'
BOOKING_WAIT_S = 0.25
"""How long the end of an answer waits for the store, so that whoever has read it finds it booked."""


class Outgoing(NamedTuple):
    """A request as it goes to the provider."""

    method: str
    path: str
    query: str
    headers: Headers
    body: bytes | None

    def __repr__(self) -> str:
        return f"<Outgoing {self.method} {self.path}>"  # neither the key nor the prompt


class Call:
    """A request that is on its way, in the task that made this.

    That task ends only with the call, whether or not the client is still there: `tend`, called every second or so,
    sees to those that left, do not read, or would otherwise be taken for dead.

    Args:
        exchange: the client's side.
        request: the provider's side.
        metering: what the call was admitted with; None for what costs nothing.
        limit_headers: what the client is told of its limits.
        drains: whether an answer is read to its end when the client has left.
        keeps_limits: whether the client sees what the provider says of its limits.
        keeps_account: whether the client sees whose account at the provider it is.
        background: does what need not be waited for.
        now_s: a clock that never goes back, in seconds.
    """

    def __init__(
        self,
        exchange: Exchange,
        request: Outgoing,
        metering: Metering | None,
        settings: GatewaySettings,
        *,
        limit_headers: Headers = (),
        drains: bool = False,
        keeps_limits: bool = True,
        keeps_account: bool = True,
        background: Background,
        now_s: Callable[[], float],
    ) -> None:
        self._exchange = exchange
        self._request = request
        self._metering = metering
        self._settings = settings
        self._limit_headers = limit_headers
        self._drains = drains
        self._keeps_limits = keeps_limits
        self._keeps_account = keeps_account
        self._background = background
        self._now_s = now_s
        self._task = asyncio.current_task()
        self._stopped: End | None = None
        self._sent = False
        self._booking: asyncio.Task[object] | None = None
        self._pinging: asyncio.Task[object] | None = None
        self._started_s = self._renewed_s = self._heard_s = now_s()
        self._writing_s: float | None = None
        self._give_up_s: float | None = None

    # ── From the request to its settlement ────────────────────────────────────────────────────────────────────────────

    async def run(self, upstream: Upstream) -> None:
        """Becomes true: the client has the provider's answer, as far as there was one, and it is settled.

        Raises:
            Refusal: there is no answer, and the client is to be told so.
        """
        try:
            await self._pass_on(upstream)
        except asyncio.CancelledError:
            await self._end_early()
        finally:
            if self._pinging:
                self._pinging.cancel()

    def stop(self, end: End) -> None:
        """The call is given up: it is settled with what is known, and ends."""
        if self._stopped is None and self._task:
            self._stopped = end
            self._task.cancel()

    async def _pass_on(self, upstream: Upstream) -> None:
        try:
            end = await self._converse(upstream)
        except NotSent as error:
            log.warning("provider.unreachable", error=str(error))
            await self._cancel()
            raise Refusal(502, "api_error", "the provider cannot be reached") from None
        except NoAnswer as error:
            log.warning("provider.gave_no_answer", error=str(error))
            await self._resolve("no_answer")
            if error.timed_out:
                raise Refusal(504, "timeout_error", "the provider took too long to answer") from None
            raise Refusal(502, "api_error", "the provider gave no answer") from None
        except Exception:
            # A fault of ours, or a server's way to say that it cannot send: what was used until then is booked.
            await self._resolve("cut")
            raise
        await self._settle(end)
        if end in ("complete", "refused", "error_event"):
            await self._to_client(self._exchange.finish)
        else:
            self._exchange.close()

    async def _converse(self, upstream: Upstream) -> End:
        answer = await upstream.send(*self._request, sending=self._sending)
        try:
            if self._metering:
                self._metering.answered(answer.status, answer.headers)
            if 300 <= answer.status < 400:
                await self._settle("refused")
                raise Refusal(502, "api_error", "the provider answered with a redirect, which is never followed")
            return await self._relay(answer)
        finally:
            answer.close()

    def _sending(self) -> None:
        self._sent = True

    async def _end_early(self) -> None:
        """Stopped by `stop`, or by a server that ends its tasks, at any point: also when all is settled already."""
        end = self._stopped or ("client_gone" if self._exchange.gone else "shutdown")
        self._exchange.close()
        await self._resolve(end)
        if self._stopped is None or self._task is None or self._task.uncancel():
            raise asyncio.CancelledError  # somebody else wants this task to end

    async def _resolve(self, end: End) -> None:
        """However far it got: of what was never sent, nothing is booked."""
        await (self._settle(end) if self._sent else self._cancel())

    async def _settle(self, end: End) -> None:
        if self._metering and self._booking is None:
            if self._client_left:
                self._metering.facts["client"] = "gone"
            self._booking = self._background.spawn(self._metering.settle(end))
        await self._booked()

    async def _cancel(self) -> None:
        if self._metering and self._booking is None:
            self._booking = self._background.spawn(self._metering.cancel())
        await self._booked()

    async def _booked(self) -> None:
        """Wait for the store, but not for long. It is a task of its own, so nothing that happens here interrupts it."""
        if self._booking:
            await self._background.wait_briefly(self._booking, BOOKING_WAIT_S)

    # ── The answer ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _relay(self, answer: Answer) -> End:
        """Pass the answer on; every piece goes to the client first."""
        metering, write = self._metering, self._exchange.write
        start = partial(self._exchange.start, more=answer.has_begun)
        await self._to_client(start, answer.status, self._headers_of(answer))
        try:
            async for chunk in answer.chunks():
                await self._to_client(write, chunk)
                if metering:
                    metering.take(chunk)
                self._heard_s = self._now_s()
                if self._give_up_s is not None and self._heard_s >= self._give_up_s:
                    return "client_gone"
        except NoAnswer:
            return self._end_of(answer, broken=True)
        if metering and metering.lacks_only_its_stop:
            # The client has all there is. Broken off, it would ask for all of it again, and pay for it twice.
            await self._to_client(write, metering.add_stop())
        return self._end_of(answer, broken=False)

    def _end_of(self, answer: Answer, *, broken: bool) -> End:
        """A stream says itself when it is over: whether its connection was closed in order says nothing."""
        metering = self._metering
        if metering and metering.streams:
            metering.end()
            return "complete" if metering.finished else "error_event" if metering.error else "cut"
        if broken:
            return "cut"
        if answer.status >= 400:
            return "refused"
        if metering and answer.ends_with_connection:
            metering.end()
            return "complete" if metering.finished else "cut"  # whether all has come, only the JSON can tell
        return "complete"

    def _headers_of(self, answer: Answer) -> list[tuple[str, str]]:
        keep_limits = self._keeps_limits and not self._limit_headers
        headers = for_client(answer.headers, keep_limits=keep_limits, keep_account=self._keeps_account)
        if (value_of(headers, "content-type") or "").lower().startswith("text/event-stream"):
            # A stream may get pings of ours, and nothing on its way may hold it back.
            headers = without(headers, "content-length", "cache-control")
            headers += [("cache-control", "no-cache"), ("x-accel-buffering", "no")]
        return [*headers, *self._limit_headers]

    async def _to_client(self, step: Callable[..., Awaitable[None]], *parts: Any) -> None:
        """Send something after what is just being sent, and nothing any more once the client has left."""
        if self._pinging and self._pinging is not asyncio.current_task():
            await asyncio.wait([self._pinging])
        if self._client_left:
            return
        self._writing_s = self._now_s()
        try:
            await step(*parts)
        except ClientGone:
            self._leave()
        finally:
            self._writing_s = None

    # ── What happens besides ──────────────────────────────────────────────────────────────────────────────────────────

    def tend(self) -> None:
        """Look after the call, every second or so."""
        now_s, settings = self._now_s(), self._settings
        if self._exchange.gone:
            self._leave()
        if self._give_up_s is not None and now_s >= self._give_up_s:
            self.stop("client_gone")
        if self._writing_s is not None and now_s - self._writing_s >= settings.write_timeout_ms / 1000:
            self._exchange.abort()
        metering = self._metering
        if metering:
            metering.tend()
        if metering and now_s - self._renewed_s >= settings.lease_ms / 2000:
            self._renewed_s = now_s
            self._background.spawn(metering.renew(settings.lease_ms))
        silent_s = now_s - max(self._heard_s, self._started_s)
        if metering and settings.ping_after_ms and silent_s >= settings.ping_after_ms / 1000:
            self._ping(metering)

    @property
    def _client_left(self) -> bool:
        return self._give_up_s is not None

    def _leave(self) -> None:
        """The client has left: from now on nothing is written, and the answer is read on for a while, or not at all."""
        if self._give_up_s is None:
            self._give_up_s = self._now_s() + (self._settings.drain_ms / 1000 if self._drains else 0)

    def _ping(self, metering: Metering) -> None:
        """Keep a silent stream alive: between events only, and never before its head or behind its end."""
        over = metering.finished or metering.error or self._booking
        fits = self._exchange.started and metering.between_events and not over
        if fits and self._writing_s is None and not self._client_left and not self._pinging:
            self._heard_s = self._now_s()
            self._pinging = self._background.spawn(self._send_ping())

    async def _send_ping(self) -> None:
        try:
            await self._to_client(self._exchange.write, PING)
        finally:
            self._pinging = None
