"""The gateway: which request goes where, who may make it, and what it is refused with. Any server's."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Self

import structlog
from msgspec.structs import replace

from meterlib.core.checks import ATTRIBUTE_BYTES_MAX, check_attributes
from meterlib.core.policy import Policy
from meterlib.errors import InvalidInput, MeterError, QuotaExceeded, StoreError
from meterlib.gateway.answers import Refusal, denied, filtered_models, new_request_id, store_down
from meterlib.gateway.call import Call, Outgoing
from meterlib.gateway.callers import Caller, Callers
from meterlib.gateway.encodings import TooLarge, Unreadable, decoder_for
from meterlib.gateway.estimate import CacheAwareEstimator, Estimator
from meterlib.gateway.exchange import BodyLate, BodyTooLarge, ClientGone, Exchange
from meterlib.gateway.headers import Headers, for_client, for_upstream, of_limits, value_of, without
from meterlib.gateway.metering import NOTHING, Metering, capped
from meterlib.gateway.prompt import Prompt, prompt_of
from meterlib.gateway.upstream import NoAnswer, NotSent, Upstream
from meterlib.meter import AsyncMeter
from meterlib.settings import GatewaySettings

NEEDS_RESTART = (
    "listen",
    "base_path",
    "upstream",
    "upstream_connect_timeout_ms",
    "upstream_idle_timeout_ms",
    "upstream_timeout_ms",
    "connections_max",
    "keepalive_ms",
)
"""Settings that are looked at when the gateway starts, and not again."""

TEND_S = 1.0
MODELS_BYTES_MAX = 4 << 20
_MODEL_PATH = re.compile(r"/v1/models/([A-Za-z0-9._:@-]{1,256})")
_PACED_TENANTS_MAX = 10_000

log = structlog.get_logger("meterlib.gateway")


class Gateway:
    """Answers requests of the Claude API by passing them on, within limits, and metered.

    A server's face gives it exchanges, calls `tend` every second, and `aclose` at the end; see
    `meterlib.gateway.server` and `meterlib.gateway.asgi`.

    Args:
        settings: what the file says in `[gateway]`.
        callers: who may call.
        meter: what decides and books.
        closes_meter: whether the meter is closed with the gateway.
        estimator: guesses what a call will use; by default from its length and from what is cached.
        now_s: a clock that never goes back, in seconds.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        callers: Callers,
        meter: AsyncMeter,
        *,
        closes_meter: bool = False,
        estimator: Estimator | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.callers = callers
        self.meter = meter
        self._estimator = estimator or CacheAwareEstimator(now_s)
        self._closes_meter = closes_meter
        self._now_s = now_s
        self._upstream = Upstream(settings)
        self._calls: set[Call] = set()
        self._background: set[asyncio.Task[object]] = set()
        self._paces: OrderedDict[str, deque[float]] = OrderedDict()
        self._handling = 0
        self._closing = False

    @property
    def open_calls(self) -> int:
        """How many calls are under way."""
        return len(self._calls)

    # ── One request ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def handle(self, exchange: Exchange) -> None:
        """Answer a request; never raises but when its task is cancelled."""
        self._handling += 1
        try:
            await self._route(exchange)
        except Refusal as refusal:
            await self._refuse(exchange, refusal)
        except ClientGone:
            pass
        except Exception:
            log.exception("request.failed", method=exchange.method, path=exchange.path)
            await self._refuse(exchange, Refusal(500, "api_error", "internal error of the gateway"))
        finally:
            self._handling -= 1

    async def _route(self, exchange: Exchange) -> None:
        method, path = exchange.method, exchange.path
        if path in ("/healthz", "/readyz") and method in ("GET", "HEAD"):
            return await self._tell_health(exchange, ready=path == "/readyz")
        base = self.settings.base_path
        inside = path[len(base) :] if path.startswith(base) else ""
        if method == "HEAD" and inside in ("", "/", "/api/hello") and path.startswith(base):
            return await _answer(exchange, 200, b"")
        model = _MODEL_PATH.fullmatch(inside)
        routes = {"/v1/messages": "POST", "/v1/messages/count_tokens": "POST", "/v1/models": "GET"}
        expected = "GET" if model else routes.get(inside)
        if expected is None:
            raise Refusal(404, "not_found_error", "there is no such path here")
        if method != expected:
            raise Refusal(405, "invalid_request_error", f"this path takes {expected}", [("allow", expected)])
        if self._closing:
            raise Refusal(503, "api_error", "the gateway is about to stop; try again", [("retry-after", "1")])
        caller = self.callers.caller_of(exchange.headers)
        if model:
            return await self._one_model(exchange, caller, inside, model[1])
        if inside == "/v1/models":
            return await self._models(exchange, caller, inside)
        body = await self._body_of(exchange)
        if inside == "/v1/messages":
            return await self._message(exchange, caller, inside, body)
        return await self._count_tokens(exchange, caller, inside, body)

    async def _message(self, exchange: Exchange, caller: Caller, path: str, body: bytes) -> None:
        try:
            prompt = prompt_of(self._readable(exchange, body))
        except InvalidInput as error:
            await self._count_invalid(exchange, caller)
            raise Refusal(400, "invalid_request_error", str(error)) from None
        if not caller.may_use(prompt.model):
            raise Refusal(404, "not_found_error", f"model: {prompt.model}")
        request, dropped = self._outgoing(exchange, caller, path, body)
        metering = await self._admit(exchange, caller, prompt)
        if dropped:
            metering.facts["betas_dropped"] = ",".join(dropped)[:ATTRIBUTE_BYTES_MAX]
        if exchange.gone:
            return await metering.cancel()
        limits = of_limits(metering.reservation.limits, self._limits())
        return await self._run(exchange, caller, request, metering, limits)

    async def _admit(self, exchange: Exchange, caller: Caller, prompt: Prompt) -> Metering:
        """Hold what the call is expected to use.

        Raises:
            Refusal: a limit denied it, or nothing can be decided.
        """
        attributes = self._attributes(exchange, caller, prompt.model)
        estimate = self._estimator.estimate(caller.tenant, prompt)
        usage = capped(estimate.usage, self.meter.quotas_of(caller.tenant, attributes))
        reservation_id = secrets.token_hex(16)
        try:
            reservation = await self.meter.reserve(
                caller.tenant,
                attributes,
                usage,
                reservation_id=reservation_id,
                lease_ms=self.settings.lease_ms,
                funding=caller.funding,
            )
        except asyncio.CancelledError:
            self._spawn(self._cancel(caller.tenant, reservation_id))
            raise
        except QuotaExceeded as error:
            log.info("call.denied", tenant=caller.tenant, limit=error.denials[0].name, wait_ms=error.retry_after_ms)
            refusal = denied(error)
            refusal.headers += of_limits(error.limits, self._limits())
            raise refusal from None
        except StoreError as error:
            log.error("call.not_decided", tenant=caller.tenant, error=str(error))
            self._spawn(self._cancel(caller.tenant, reservation_id))
            raise store_down() from None
        return Metering(reservation, self._estimator, estimate, prompt.model, self._spawn)

    async def _run(
        self, exchange: Exchange, caller: Caller, request: Outgoing, metering: Metering | None, limits: Headers = ()
    ) -> None:
        hosted = caller.funding == "hosted"
        on_disconnect = self.settings.on_disconnect or ("drain" if hosted else "cancel")
        call = Call(
            exchange,
            request,
            metering,
            self.settings,
            limit_headers=limits,
            drains=on_disconnect == "drain",
            keeps_limits=not hosted and self.settings.ratelimit_headers == "upstream",
            spawn=self._spawn,
            now_s=self._now_s,
        )
        self._calls.add(call)
        try:
            await call.run(self._upstream)
        finally:
            self._calls.discard(call)

    # ── What costs nothing ────────────────────────────────────────────────────────────────────────────────────────────

    async def _count_tokens(self, exchange: Exchange, caller: Caller, path: str, body: bytes) -> None:
        """Counting is free, and has a pace of its own: Claude Code counts 25 times at once."""
        if caller.models:
            try:
                model = prompt_of(self._readable(exchange, body)).model
            except InvalidInput as error:
                raise Refusal(400, "invalid_request_error", str(error)) from None
            if not caller.may_use(model):
                raise Refusal(404, "not_found_error", f"model: {model}")
        self._pace(caller.tenant)
        request, _ = self._outgoing(exchange, caller, path, body)
        await self._run(exchange, caller, request, None)

    def _pace(self, tenant: str) -> None:
        quota = self.settings.count_tokens_per_minute
        now_s = self._now_s()
        pace = self._paces.setdefault(tenant, deque())
        self._paces.move_to_end(tenant)
        if len(self._paces) > _PACED_TENANTS_MAX:
            self._paces.popitem(last=False)
        while pace and pace[0] <= now_s - 60:
            pace.popleft()
        if len(pace) >= quota:
            wait_s = str(int(pace[0] + 60 - now_s) + 1) if pace else "60"
            message = f"this call would exceed {quota:,} calls of count_tokens per minute"
            raise Refusal(429, "rate_limit_error", message, [("retry-after", wait_s)])
        pace.append(now_s)

    async def _one_model(self, exchange: Exchange, caller: Caller, path: str, model: str) -> None:
        if not caller.may_use(model):
            raise Refusal(404, "not_found_error", f"model: {model}")
        request, _ = self._outgoing(exchange, caller, path, None)
        await self._run(exchange, caller, request, None)

    async def _models(self, exchange: Exchange, caller: Caller, path: str) -> None:
        request, _ = self._outgoing(exchange, caller, path, None)
        if not caller.models:
            return await self._run(exchange, caller, request, None)
        try:
            answer = await self._upstream.send(*request)
            try:
                pieces = [chunk async for chunk in answer.chunks()]
            finally:
                answer.close()
        except (NotSent, NoAnswer):
            raise Refusal(502, "api_error", "the provider cannot be reached") from None
        headers = without(for_client(answer.headers, keep_limits=False), "content-length")
        body = b"".join(pieces)
        if answer.status == 200:
            body = filtered_models(body, caller.may_use)
        return await _answer(exchange, answer.status, body, headers)

    async def _tell_health(self, exchange: Exchange, *, ready: bool) -> None:
        """`/healthz`: the process answers. `/readyz`: it also takes calls, and its store answers."""
        if ready and self._closing:
            raise Refusal(503, "api_error", "stopping")
        if ready:
            try:
                async with asyncio.timeout(2):
                    await self.meter.head(0)
            except (MeterError, TimeoutError):
                raise Refusal(503, "api_error", "the store does not answer") from None
        await _answer(exchange, 200, b'{"status":"ok"}', [("content-type", "application/json")])

    # ── Parts of a request ────────────────────────────────────────────────────────────────────────────────────────────

    async def _body_of(self, exchange: Exchange) -> bytes:
        settings = self.settings
        try:
            return await exchange.body(settings.body_bytes_max, settings.body_timeout_ms)
        except BodyTooLarge:
            message = f"a request may have at most {settings.body_bytes_max:,} bytes"
            raise Refusal(413, "request_too_large", message) from None
        except BodyLate:
            raise Refusal(408, "timeout_error", "the request took too long to arrive") from None

    def _readable(self, exchange: Exchange, body: bytes) -> bytes:
        encoding = value_of(exchange.headers, "content-encoding")
        if encoding is None:
            return body
        try:
            return decoder_for(encoding, self.settings.body_bytes_max).feed(body)
        except TooLarge:
            message = f"a request may have at most {self.settings.body_bytes_max:,} bytes when decompressed"
            code = "request_body_too_large_after_decoding"
            raise Refusal(413, "request_too_large", message, error_code=code) from None
        except Unreadable as error:
            code = "request_body_encoding_unsupported"
            raise Refusal(400, "invalid_request_error", f"content-encoding: {error}", error_code=code) from None

    def _outgoing(
        self, exchange: Exchange, caller: Caller, path: str, body: bytes | None
    ) -> tuple[Outgoing, list[str]]:
        headers, dropped = for_upstream(exchange.headers, caller.credential, self.settings.betas)
        return Outgoing(exchange.method, path, exchange.query, headers, body), dropped

    def _attributes(self, exchange: Exchange, caller: Caller, model: str | None) -> dict[str, str]:
        """The facts of a call; a header that cannot be one is passed over, since it must not fail a call."""
        attributes = {"provider": self.settings.provider, "key": caller.key}
        if model is not None:
            attributes["model"] = model
        for name, header in self.settings.attributes.items():
            value = value_of(exchange.headers, header.lower())
            if value is not None:
                try:
                    check_attributes({name: value})
                except InvalidInput:
                    continue
                attributes[name] = value
        return attributes

    def _limits(self) -> dict[str, Any]:
        return {limit.name: limit for limit in self.meter.policy.limits}

    async def _count_invalid(self, exchange: Exchange, caller: Caller) -> None:
        """A request that makes no sense counts as one, or else nothing would limit those who send nothing else."""
        if not self.settings.count_invalid_requests:
            return
        attributes = self._attributes(exchange, caller, None)
        try:
            held = await self.meter.reserve(caller.tenant, attributes, NOTHING, funding=caller.funding)
            await held.settle(NOTHING, facts={"status": "400", "end": "invalid"})
        except QuotaExceeded as error:
            raise denied(error) from None
        except StoreError as error:
            log.warning("store.failed", tenant=caller.tenant, error=str(error))

    async def _refuse(self, exchange: Exchange, refusal: Refusal) -> None:
        if exchange.started:
            return exchange.close()
        request_id = new_request_id()
        headers = [("content-type", "application/json"), ("request-id", request_id), *refusal.headers]
        with suppress(ClientGone):
            await _answer(exchange, refusal.status, refusal.body(request_id), headers)
        return None

    # ── All requests ──────────────────────────────────────────────────────────────────────────────────────────────────

    def reload(self, settings: GatewaySettings, callers: Callers, policy: Policy) -> None:
        """Other settings from the next request on; calls under way keep theirs. Some need a restart, and say so."""
        for name in NEEDS_RESTART:
            if getattr(settings, name) != getattr(self.settings, name):
                log.warning("setting.needs_restart", setting=f"gateway.{name}")
        kept = {name: getattr(self.settings, name) for name in NEEDS_RESTART}
        self.settings, self.callers = replace(settings, **kept), callers
        self.meter.policy = policy
        log.info("configuration.reloaded", tenants=len(policy.tenants), limits=len(policy.limits))

    def tend(self) -> None:
        """Look after all calls that are under way."""
        for call in list(self._calls):
            call.tend()

    async def tend_for_ever(self) -> None:
        """Look after them every second."""
        while True:
            await asyncio.sleep(TEND_S)
            self.tend()

    async def aclose(self) -> None:
        """Take no more calls; let those under way go on for `shutdown_ms`; settle what is left as it stands."""
        self._closing = True
        until_s = time.monotonic() + self.settings.shutdown_ms / 1000
        while self._handling and time.monotonic() < until_s:
            await asyncio.sleep(0.02)
        self.stop_now()
        while self._handling or self._background:
            await asyncio.sleep(0.01)
        await self._upstream.aclose()
        if self._closes_meter:
            await self.meter.aclose()

    def stop_now(self) -> None:
        """What is open is given up at once."""
        for call in list(self._calls):
            call.stop("shutdown")

    def _spawn(self, step: Coroutine[Any, Any, object]) -> None:
        task = asyncio.ensure_future(step)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _cancel(self, tenant: str, reservation_id: str) -> None:
        """Nobody knows whether this was reserved; it is not to be, even if it arrives only later."""
        with suppress(MeterError):
            await self.meter.cancel(tenant, reservation_id)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


async def _answer(exchange: Exchange, status: int, body: bytes, headers: Headers = ()) -> None:
    """Send an answer in one piece."""
    told = list(headers)
    if value_of(told, "request-id") is None:
        told.append(("request-id", new_request_id()))
    told.append(("content-length", str(len(body))))
    await exchange.start(status, told)
    if body and exchange.method != "HEAD":
        await exchange.write(body)
    await exchange.finish()
