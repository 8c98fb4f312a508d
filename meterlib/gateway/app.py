"""The gateway: which request goes where, who may make it, and what it is refused with. Any server's."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Self

from msgspec.structs import replace

from meterlib.core.checks import ATTRIBUTE_BYTES_MAX
from meterlib.core.policy import Policy
from meterlib.errors import MeterError, PolicyError, QuotaExceeded, StoreError
from meterlib.gateway.admission import Admission, check_spending
from meterlib.gateway.answers import Refusal, filtered_models
from meterlib.gateway.background import Background
from meterlib.gateway.call import Call, Outgoing
from meterlib.gateway.callers import Caller, Callers
from meterlib.gateway.estimate import CacheAwareEstimator, Estimator
from meterlib.gateway.exchange import ClientGone, Exchange
from meterlib.gateway.free import MODELS_PAGES_MAX, Pace, query_behind, whole_answer
from meterlib.gateway.headers import Headers, for_client, without
from meterlib.gateway.metering import NOTHING, Metering
from meterlib.gateway.reading import (
    MESSAGES,
    Invalid,
    attributes_of,
    body_of,
    check_head,
    check_model,
    check_route,
    facts_of,
    model_in,
    outgoing,
    prompt_in,
)
from meterlib.gateway.spending import Spending
from meterlib.gateway.upstream import Upstream
from meterlib.meter import AsyncMeter
from meterlib.settings import GatewaySettings
from meterlib.store.telling import Log

NEEDS_RESTART = (
    "listen",
    "base_path",
    "upstream",
    "upstream_connect_timeout_ms",
    "upstream_idle_timeout_ms",
    "upstream_timeout_ms",
    "connections_max",
    "connections_per_address_max",
    "keepalive_ms",
)
"""Settings that are looked at when the gateway starts, and not again."""

TEND_S = 1.0
log = Log("meterlib.gateway")


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
        spending: works out what calls cost; needed where a limit counts that.
        now_s: a clock that never goes back, in seconds.

    Raises:
        PolicyError: a limit counts what calls cost, and nobody tells that.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        callers: Callers,
        meter: AsyncMeter,
        *,
        closes_meter: bool = False,
        estimator: Estimator | None = None,
        spending: Spending | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.callers = callers
        self.meter = meter
        self._closes_meter = closes_meter
        self._now_s = now_s
        self._upstream = Upstream(settings)
        self._calls: set[Call] = set()
        self._background = Background()
        self._admission = Admission(meter, estimator or CacheAwareEstimator(now_s), self._background, spending, now_s)
        self._pace = Pace(now_s)
        self._handling: set[asyncio.Task[Any] | None] = set()
        self._in_calls: set[asyncio.Task[Any] | None] = set()
        self._closing = False
        self._stopping = False

    @property
    def open_calls(self) -> int:
        """How many calls are under way."""
        return len(self._calls)

    # ── One request ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def handle(self, exchange: Exchange) -> None:
        """Answer a request; never raises but when its task is cancelled by others than the gateway."""
        task = asyncio.current_task()
        self._handling.add(task)
        try:
            try:
                await self._route(exchange)
            except Refusal as refusal:
                await self._refuse(exchange, refusal)
            except ClientGone:
                pass
            except Exception:
                # As text, since some loggers would show the values of all variables: keys, tokens, prompts.
                log.error("request.failed", method=exchange.method, exception=traceback.format_exc())
                await self._refuse(exchange, Refusal(500, "api_error", "internal error of the gateway"))
        except asyncio.CancelledError:
            if not self._stopping or task is None:
                raise
            task.uncancel()
            exchange.close()
        finally:
            self._handling.discard(task)

    async def _route(self, exchange: Exchange) -> None:
        method, path = exchange.method, exchange.path
        check_head(exchange)
        if path in ("/healthz", "/readyz") and method in ("GET", "HEAD"):
            return await self._tell_health(exchange, ready=path == "/readyz")
        base = self.settings.base_path
        inside = path[len(base) :] if path.startswith(base) else ""
        if method == "HEAD" and inside in ("", "/", "/api/hello") and path.startswith(base):
            return await self._answer(exchange, 200, b"")
        check_route(method, inside)
        if self._closing:
            raise Refusal(503, "api_error", "the gateway is about to stop; try again", [("retry-after", "1")])
        caller = self.callers.caller_of(exchange.headers)
        if method == "GET":
            return await self._models(exchange, caller, inside)
        body = await body_of(exchange, self.settings)
        if inside == MESSAGES:
            return await self._message(exchange, caller, inside, body)
        return await self._count_tokens(exchange, caller, inside, body)

    async def _message(self, exchange: Exchange, caller: Caller, path: str, body: bytes) -> None:
        try:
            prompt = prompt_in(exchange, caller, body, self.settings.body_bytes_max)
        except Invalid as refusal:
            await self._count_invalid(exchange, caller, refusal)
            raise
        request, dropped = outgoing(exchange, caller, path, body, self.settings)
        metering = await self._admission.admit(
            caller.tenant,
            attributes_of(exchange, caller, prompt.model, self.settings),
            prompt,
            funding=caller.funding,
            lease_ms=self.settings.lease_ms,
        )
        metering.facts |= facts_of(caller, prompt)
        metering.facts["request_id"] = exchange.request_id
        if dropped:
            metering.facts["betas_dropped"] = ",".join(dropped)[:ATTRIBUTE_BYTES_MAX]
        if exchange.gone:
            self._background.spawn(metering.cancel())
            return None
        limits = self._admission.limit_headers(metering.reservation.limits)
        return await self._run(exchange, caller, request, metering, limits)

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
            keeps_account=not hosted,
            background=self._background,
            now_s=self._now_s,
        )
        task = asyncio.current_task()
        self._calls.add(call)
        self._in_calls.add(task)
        try:
            await call.run(self._upstream)
        finally:
            self._calls.discard(call)
            self._in_calls.discard(task)

    # ── What costs nothing ────────────────────────────────────────────────────────────────────────────────────────────

    async def _count_tokens(self, exchange: Exchange, caller: Caller, path: str, body: bytes) -> None:
        """Counting is free, and has a pace of its own: Claude Code counts 25 times at once."""
        if caller.models:
            prompt_in(exchange, caller, body, self.settings.body_bytes_max)
        self._pace.check(caller.tenant, self.settings.count_tokens_per_minute)
        request, _ = outgoing(exchange, caller, path, body, self.settings)
        await self._run(exchange, caller, request, None)

    async def _models(self, exchange: Exchange, caller: Caller, path: str) -> None:
        request, _ = outgoing(exchange, caller, path, None, self.settings)
        model = model_in(path)
        if model is not None:
            check_model(caller, model)
        if model is not None or not caller.models:
            return await self._run(exchange, caller, request, None)
        for _ in range(MODELS_PAGES_MAX):
            answer, body = await whole_answer(self._upstream, request)
            if answer.status != 200:
                break
            body = filtered_models(body, caller.may_use)
            query = query_behind(request.query, body)
            if query is None:
                break
            request = request._replace(query=query)
        headers = for_client(answer.headers, keep_limits=False, keep_account=caller.funding == "own")
        headers = without(headers, "content-length")
        return await self._answer(exchange, answer.status, body, headers)

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
        await self._answer(exchange, 200, b'{"status":"ok"}', [("content-type", "application/json")])

    # ── What is refused ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _count_invalid(self, exchange: Exchange, caller: Caller, refusal: Refusal) -> None:
        """A request that makes no sense counts as one, or else nothing would limit those who send nothing else."""
        if not self.settings.count_invalid_requests:
            return
        facts = {"status": str(refusal.status), "end": "invalid", "request_id": exchange.request_id}
        attributes = attributes_of(exchange, caller, None, self.settings)
        try:
            # Interrupted half-way it would leave a hold.
            await asyncio.shield(self._background.spawn(self._count(caller, attributes, facts)))
        except QuotaExceeded as error:
            raise self._admission.denied(error, attributes) from None
        except StoreError as error:
            log.warning("store.failed", tenant=caller.tenant, error=str(error))

    async def _count(self, caller: Caller, attributes: Mapping[str, str], facts: Mapping[str, str]) -> None:
        held = await self.meter.reserve(caller.tenant, attributes, NOTHING, funding=caller.funding)
        await held.settle(NOTHING, facts=facts)

    async def _refuse(self, exchange: Exchange, refusal: Refusal) -> None:
        if exchange.started:
            return exchange.close()
        headers = [("content-type", "application/json"), *refusal.headers]
        with suppress(ClientGone):
            await self._answer(exchange, refusal.status, refusal.body(exchange.request_id), headers)
        return None

    async def _answer(self, exchange: Exchange, status: int, body: bytes, headers: Headers = ()) -> None:
        """Send an answer in one piece; who does not take it in time loses the connection."""
        try:
            async with asyncio.timeout(self.settings.write_timeout_ms / 1000):
                await exchange.start(status, [*headers, ("content-length", str(len(body)))])
                if body and exchange.method != "HEAD":
                    await exchange.write(body)
                await exchange.finish()
        except TimeoutError:
            exchange.abort()

    # ── All requests ──────────────────────────────────────────────────────────────────────────────────────────────────

    def reload(
        self, settings: GatewaySettings, callers: Callers, policy: Policy, spending: Spending | None = None
    ) -> None:
        """Other settings from the next request on; calls under way keep theirs. Some need a restart, and say so.

        Raises:
            PolicyError: anyone could call from now on, only because no tenant has a token any more. A file that is
                just being written must not open the gateway. Or a limit counts what calls cost, and nobody tells it,
                or the store cannot have it. Then nothing is changed.
        """
        check_spending(policy, spending)
        if callers.anyone and not self.callers.anyone and settings.callers is None:
            problem = "no tenant has a token any more; say 'anyone' here if everybody may bring a key of their own"
            raise PolicyError("gateway.callers", problem)
        for name in NEEDS_RESTART:
            if getattr(settings, name) != getattr(self.settings, name):
                log.warning("setting.needs_restart", setting=f"gateway.{name}")
        kept = {name: getattr(self.settings, name) for name in NEEDS_RESTART}
        self.meter.policy = policy  # first of all, since it may yet be refused
        self.settings, self.callers = replace(settings, **kept), callers
        self._admission.spending = spending and spending.after(self._admission.spending)
        log.info("configuration.reloaded", tenants=len(policy.tenants), limits=len(policy.limits))

    def tend(self) -> None:
        """Look after all calls that are under way, and book denials once a minute."""
        for call in list(self._calls):
            call.tend()
        if self._admission.denials.due:
            self._background.spawn(self._admission.denials.flush())

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
        while self._handling:
            await asyncio.sleep(0.01)
        self._background.spawn(self._admission.denials.flush())
        await self._background.idle()
        await self._upstream.aclose()
        if self._closes_meter:
            await self.meter.aclose()

    def stop_now(self) -> None:
        """What is open is given up at once."""
        self._stopping = True
        for call in list(self._calls):
            call.stop("shutdown")
        for task in self._handling - self._in_calls:
            if task:
                task.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
