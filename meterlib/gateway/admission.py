"""Before a call: what it is expected to use is held, or it is refused. Shared by the gateway and the middleware."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from msgspec.structs import replace

from meterlib.core.decisions import LimitState
from meterlib.core.policy import Funding, Limit, Policy
from meterlib.core.usage import Usage
from meterlib.core.usd import COST
from meterlib.errors import MeterError, PolicyError, QuotaExceeded, StoreError
from meterlib.gateway.answers import Refusal, denied, store_down, unpriced
from meterlib.gateway.background import Background
from meterlib.gateway.denials import Denials
from meterlib.gateway.estimate import Estimator
from meterlib.gateway.headers import of_limits
from meterlib.gateway.metering import Metering
from meterlib.gateway.prompt import Prompt
from meterlib.gateway.spending import Cost, Spending
from meterlib.meter import AsyncMeter
from meterlib.store.telling import Log

log = Log("meterlib.gateway")


class Admission:
    """Lets calls in.

    Args:
        meter: decides.
        estimator: guesses what a call will use.
        background: does what nobody waits for.
        spending: works out what calls cost; needed where a limit counts that.
        now_s: a clock that never goes back, in seconds.

    Attributes:
        denials: how often limits denied, until that is booked.

    Raises:
        PolicyError: a limit counts what calls cost, and nobody tells that.
    """

    def __init__(
        self,
        meter: AsyncMeter,
        estimator: Estimator,
        background: Background,
        spending: Spending | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        check_spending(meter.policy, spending)
        self.meter = meter
        self.denials = Denials(meter, now_s)
        self.spending = spending
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
        quotas = self.meter.quotas_of(tenant, attributes)
        cost = self._cost(tenant, attributes, prompt, funding) if COST in quotas else None
        usage = capped(estimate.usage, quotas)
        if cost:
            usage = self._with_cost(usage, cost.before(estimate.usage), quotas[COST], tenant, attributes)
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
            raise self.denied(error, attributes) from None
        except StoreError as error:
            log.error("call.not_decided", tenant=tenant, error=str(error))
            self._background.spawn(self._cancel(tenant, reservation_id))
            raise store_down(self._budget_of(attributes)) from None
        return Metering(reservation, self._estimator, estimate, prompt, self._background, cost)

    def _cost(self, tenant: str, attributes: Mapping[str, str], prompt: Prompt, funding: Funding | None) -> Cost:
        if self.spending is None:  # the policy was set by somebody who did not say so here
            raise PolicyError("limit", f"the gateway was made without prices, and a limit counts {COST}")
        funding = funding or self.meter.funding_of(tenant)
        return self.spending.of_call(tenant, funding, attributes, prompt.max_tokens, prompt.speed)

    def _with_cost(
        self, usage: Usage, cost: int | None, quota: int, tenant: str, attributes: Mapping[str, str]
    ) -> Usage:
        """A guess is not why a call never passes, so no more than the quota is held; without a price, nothing is."""
        if cost is not None:
            return replace(usage, amounts={**usage.amounts, COST: min(cost, quota or cost)})
        if self.spending and self.spending.unpriced == "allow":
            return usage
        limit = next(one for one in self.meter.policy.limits if one.unit == COST and one.applies_to(attributes))
        log.info("call.denied", tenant=tenant, limit=limit.name, unpriced=attributes.get("model", ""))
        self.denials.count(tenant, attributes.get("provider", ""), limit.name)
        raise unpriced(limit.name, attributes.get("model", ""))

    def _budget_of(self, attributes: Mapping[str, str]) -> str | None:
        """The name of the first budget that such a call touches."""
        budgets = [limit.name for limit in self.meter.policy.limits if limit.period and limit.applies_to(attributes)]
        return budgets[0] if budgets else None

    def denied(self, error: QuotaExceeded, attributes: Mapping[str, str]) -> Refusal:
        """What a caller is told whom a limit denied."""
        refusal = denied(error, self._limits)
        self.denials.count(error.tenant, attributes.get("provider", ""), refusal.limit)
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


def check_spending(policy: Policy, spending: Spending | None) -> None:
    """Pass if what the limits count can be told.

    Raises:
        PolicyError: a limit counts what calls cost, and there are no prices.
    """
    for at, limit in enumerate(policy.limits):
        if limit.unit == COST and spending is None:
            problem = "counts what calls cost, and there are no prices: make spending with assembly.spending_for"
            raise PolicyError(f"limit[{at}].unit", problem)


def capped(estimate: Usage, quotas: Mapping[str, int]) -> Usage:
    """The estimate, held down to the smallest quota of input tokens: a guess must not be why a call never passes.

    A quota of nothing is why: held down to it, every call would pass.
    """
    quota = quotas.get("input_tokens")
    fresh, written = estimate.input_tokens or 0, estimate.cache_creation_input_tokens or 0
    if not quota or fresh + written <= quota:
        return estimate
    written = min(written, quota)
    return replace(estimate, input_tokens=quota - written, cache_creation_input_tokens=written)
