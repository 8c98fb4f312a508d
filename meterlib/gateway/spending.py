"""What calls cost while they run, for budgets in US dollars: a guess before, what is known on the way, the sum at last.

Prices come from `meterlib.billing`, which is loaded only where a limit counts `cost_nanousd`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol

from msgspec.structs import replace

from meterlib.core.checks import AMOUNT_MAX
from meterlib.core.policy import Funding
from meterlib.core.usage import Usage
from meterlib.core.usd import COST
from meterlib.gateway.memory import Latest

OUTPUT_TOKENS = 4_096
"""So much output is expected of a call as long as nothing is known of the tenant and the model."""
LENGTHS_MAX = 10_000
PROVIDER = "anthropic"
"""Whose prices hold for a call that does not say who serves it, as in rating."""


class Costs(Protocol):
    """Tells what calls cost; `meterlib.billing.rating.budget.CostTable` does."""

    def cost_nanousd(self, model: str, usage: Usage, *, at_ms: int, provider: str) -> int | None:
        """What a call cost, in nanodollars; None if that is not known."""


class CostsOfTenants(Protocol):
    """Tells whose costs are which; `meterlib.billing.rating.budget.CostTables` does."""

    def of(self, tenant: str, funding: Funding) -> Costs:
        """The costs of a tenant's calls."""


class Spending:
    """Works out what calls cost.

    Of a call that is still to be made nobody knows how long its answer will be. `max_tokens` is no guess: agents ask
    for the most there is. So what is held is the input, and as much output as calls of this tenant and model have had:
    their mean, and twice their mean deviation. A stream that turns out to be longer has its hold doubled on the way.
    What open calls may still use beyond that is all that a budget can be exceeded by. Each process learns on its own.

    Args:
        costs: by tenant.
        unpriced: what becomes of calls whose model has no price: `deny`, or `allow` them beside the budget.
        now_ms: ms since 1970 UTC, as far as a price list needs it.
    """

    def __init__(
        self,
        costs: CostsOfTenants,
        unpriced: Literal["deny", "allow"] = "deny",
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self.unpriced = unpriced
        self._costs = costs
        self._now_ms = now_ms
        self._lengths: Latest[tuple[str, str], _Length] = Latest(LENGTHS_MAX)

    def of_call(
        self, tenant: str, funding: Funding, attributes: Mapping[str, str], max_tokens: int | None, speed: str | None
    ) -> Cost:
        """The cost of a call that is about to be made."""
        model, provider = attributes.get("model", ""), attributes.get("provider", "")
        length = self._lengths.get((tenant, model))
        output_tokens = length.expected if length else OUTPUT_TOKENS
        return Cost(self, self._costs.of(tenant, funding), (tenant, model, provider), output_tokens, max_tokens, speed)

    def after(self, before: Spending | None) -> Spending:
        """Go on with what another one has learnt: prices change, and answers stay as long as they are."""
        if before:
            self._lengths = before._lengths
        return self

    def learn(self, tenant: str, model: str, output_tokens: int) -> None:
        """A call of this tenant and model had so much output."""
        length = self._lengths.get((tenant, model))
        found = length.towards(output_tokens) if length else _Length(output_tokens, output_tokens / 2)
        self._lengths.put((tenant, model), found)

    def now_ms(self) -> int:
        """About the time at which a call is made."""
        return self._now_ms()


class Cost:
    """What one call costs; nobody else's business while it runs."""

    def __init__(
        self,
        spending: Spending,
        costs: Costs,
        call: tuple[str, str, str],
        output_tokens: int,
        max_tokens: int | None,
        speed: str | None,
    ) -> None:
        self._spending = spending
        self._costs = costs
        self._tenant, self._model, self._provider = call
        self._most = max_tokens
        self._speed = speed if speed == "fast" else None
        self._held = output_tokens if max_tokens is None else min(output_tokens, max_tokens)

    def before(self, usage: Usage) -> int | None:
        """What is to be held for a call with this input, in nanodollars; None if its model has no price."""
        known = replace(usage, speed=self._speed) if usage.speed is None else usage
        return self._of(self._with_output(known), self._model, self._spending.now_ms())

    def meanwhile(self, usage: Usage, model: str | None, at_ms: int) -> Usage:
        """What is known of a call on its way, with the cost to be held for it."""
        cost = self._of(self._with_output(usage), model or self._model, at_ms)
        return _with_cost(replace(usage, output_tokens=None), cost)

    def outgrown(self, output_tokens: int) -> bool:
        """Whether an answer is longer than what is held for it; if so, twice as much is held from now on."""
        if output_tokens <= self._held or self._held == self._most:
            return False
        self._held = 2 * output_tokens if self._most is None else min(2 * output_tokens, self._most)
        return True

    def at_last(self, usage: Usage, model: str | None, at_ms: int, *, whole: bool) -> Usage:
        """What a call used, with its cost; without one that is not known, so that what was held goes on counting."""
        if whole and usage.output_tokens is not None:
            self._spending.learn(self._tenant, self._model, usage.output_tokens)
        return _with_cost(usage, self._of(usage, model or self._model, at_ms))

    def _with_output(self, usage: Usage) -> Usage:
        """An estimator of one's own may tell more of the output than is known here."""
        return replace(usage, output_tokens=max(usage.output_tokens or 0, self._held))

    def _of(self, usage: Usage, model: str, at_ms: int) -> int | None:
        cost = self._costs.cost_nanousd(model, usage, at_ms=at_ms, provider=self._provider or PROVIDER)
        return None if cost is None else min(cost, AMOUNT_MAX)


def _with_cost(usage: Usage, cost: int | None) -> Usage:
    return usage if cost is None else replace(usage, amounts={**usage.amounts, COST: cost})


class _Length(NamedTuple):
    """How long answers are, in tokens: the mean, and how far they are off it."""

    mean: float
    deviation: float

    @property
    def expected(self) -> int:
        return round(self.mean + 2 * self.deviation)

    def towards(self, found: int) -> _Length:
        off = abs(found - self.mean)
        return _Length(self.mean + (found - self.mean) / 8, self.deviation + (off - self.deviation) / 4)
