"""Before a call: what it is expected to use is held, or it is refused. Shared by the gateway and the middleware."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any

import structlog
from msgspec.structs import replace

from meterlib.core.decisions import LimitState
from meterlib.core.policy import Funding, Limit
from meterlib.core.usage import Usage
from meterlib.errors import MeterError, QuotaExceeded, StoreError
from meterlib.gateway.answers import Refusal, denied, store_down
from meterlib.gateway.estimate import Estimator
from meterlib.gateway.headers import of_limits
from meterlib.gateway.metering import Metering
from meterlib.gateway.prompt import Prompt
from meterlib.meter import AsyncMeter

log = structlog.get_logger("meterlib.gateway")


class Background:
    """What need not be waited for, but must not be lost either."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()

    def spawn(self, step: Coroutine[Any, Any, object]) -> asyncio.Task[object]:
        """Run it some time soon; whoever waits for it may be interrupted, and it is not."""
        task = asyncio.ensure_future(step)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def idle(self) -> None:
        """Wait until nothing is left."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)


class Admission:
    """Lets calls in.

    Args:
        meter: decides.
        estimator: guesses what a call will use.
        background: does what nobody waits for.
    """

    def __init__(self, meter: AsyncMeter, estimator: Estimator, background: Background) -> None:
        self.meter = meter
        self._estimator = estimator
        self._background = background

    async def admit(
        self, tenant: str, attributes: Mapping[str, str], prompt: Prompt, *, funding: Funding | None, lease_ms: int
    ) -> Metering:
        """Hold what the call is expected to use.

        Raises:
            Refusal: a limit denied it, or nothing can be decided.
        """
        estimate = self._estimator.estimate(tenant, prompt)
        usage = capped(estimate.usage, self.meter.quotas_of(tenant, attributes))
        reservation_id = secrets.token_hex(16)
        try:
            reservation = await self.meter.reserve(
                tenant, attributes, usage, reservation_id=reservation_id, lease_ms=lease_ms, funding=funding
            )
        except asyncio.CancelledError:
            self._background.spawn(self._cancel(tenant, reservation_id))
            raise
        except QuotaExceeded as error:
            log.info("call.denied", tenant=tenant, limit=error.denials[0].name, wait_ms=error.retry_after_ms)
            raise self.denied(error) from None
        except StoreError as error:
            log.error("call.not_decided", tenant=tenant, error=str(error))
            self._background.spawn(self._cancel(tenant, reservation_id))
            raise store_down() from None
        return Metering(reservation, self._estimator, estimate, prompt.model, self._background.spawn)

    def denied(self, error: QuotaExceeded) -> Refusal:
        """What a caller is told whom a limit denied."""
        refusal = denied(error, self._limits)
        refusal.headers += self.limit_headers(error.limits)
        return refusal

    def limit_headers(self, states: Sequence[LimitState]) -> list[tuple[str, str]]:
        """What a caller is told of how its limits stand."""
        return of_limits(states, self._limits)

    @property
    def _limits(self) -> dict[str, Limit]:
        return {limit.name: limit for limit in self.meter.policy.limits}

    async def _cancel(self, tenant: str, reservation_id: str) -> None:
        """Nobody knows whether this was reserved; it is not to be, even if it arrives only later."""
        with suppress(MeterError):
            await self.meter.cancel(tenant, reservation_id)


def capped(estimate: Usage, quotas: Mapping[str, int]) -> Usage:
    """The estimate, held down to the smallest quota of input tokens: a guess must not be why a call never passes."""
    quota = quotas.get("input_tokens")
    fresh, written = estimate.input_tokens or 0, estimate.cache_creation_input_tokens or 0
    if quota is None or fresh + written <= quota:
        return estimate
    written = min(written, quota)
    return replace(estimate, input_tokens=quota - written, cache_creation_input_tokens=written)
