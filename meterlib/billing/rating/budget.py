"""What a call costs in whole nanodollars, in a few microseconds: amounts of the unit `cost_nanousd` for USD budgets.

The numbers are those of rating: the cost of all lines of the call, rounded up to the next nanodollar once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from msgspec.structs import replace

from meterlib.billing.prices.prices import PriceBooks, Rate, Unpriced
from meterlib.billing.prices.terms import LIST, Terms
from meterlib.billing.rating.compiled import BILLED_PRICE, FEE_PRICE, LIST_PRICE, cases, pico_prices
from meterlib.billing.rating.measures import PROVIDER, Amounts, Pass, geo_of, passes_of_usage, variant_of
from meterlib.core.ledger import counts_of
from meterlib.core.policy import Funding
from meterlib.core.usage import Usage

Basis = Literal["list", "billed"]
Key: TypeAlias = tuple[str, str, str | None, str | None, str | None]
PicoPrices: TypeAlias = tuple[int | None, ...] | None
PicoCase: TypeAlias = tuple[int, int, int, int, PicoPrices]
_TABLES_MAX = 10_000


class CostTable:
    """The price books, compiled for one customer's terms.

    Args:
        books: where prices are looked up.
        basis: `list`: what the call costs by the price book; `billed`: what the customer owes for it.
        terms: the customer's; they matter only to what is billed.
        funding: who pays the provider; a customer with its own key owes the platform fee alone.
    """

    def __init__(
        self, books: PriceBooks, basis: Basis = "list", terms: Terms = LIST, funding: Funding = "hosted"
    ) -> None:
        self._books = books
        self._terms = terms
        self._funding = funding
        self._which = LIST_PRICE if basis == "list" else BILLED_PRICE if funding == "hosted" else FEE_PRICE
        self._tables: dict[Key, tuple[PicoCase, ...]] = {}

    def cost_nanousd(self, model: str, usage: Usage, *, at_ms: int, provider: str = PROVIDER) -> int | None:
        """What a call cost, in nanodollars, rounded up; None if some of it has no price in USD or is not known.

        Args:
            model: that served it.
            usage: what it used.
            at_ms: when it was made, in ms since 1970 UTC.
            provider: who served it.
        """
        fresh, output = usage.input_tokens, usage.output_tokens
        if fresh is None or output is None or usage.iterations or (usage.requests or 0) > 1:
            return self._of_passes(passes_of_usage(counts_of(usage), provider, model), at_ms)
        split, five, hour = usage.cache_creation, 0, 0
        if split is not None:
            five, hour = split.ephemeral_5m_input_tokens or 0, split.ephemeral_1h_input_tokens or 0
        rest = max((usage.cache_creation_input_tokens or 0) - five - hour, 0)
        read = usage.cache_read_input_tokens or 0
        tools = usage.server_tool_use
        called = (0, 0, 0)
        if tools is not None:
            counts = (tools.web_search_requests, tools.web_fetch_requests, tools.code_execution_requests)
            called = (counts[0] or 0, counts[1] or 0, counts[2] or 0)
        key = (provider, model, usage.service_tier, usage.speed, usage.inference_geo)
        prices = self._prices(key, at_ms, fresh + five + hour + rest + read)
        return _nanos(_picos((fresh, output, five, hour, rest, read, *called), prices))

    def estimate_nanousd(self, model: str, usage: Usage, *, at_ms: int, provider: str = PROVIDER) -> int | None:
        """The same of what is known before a call: numbers that are not known yet count as nothing."""
        known = replace(usage, input_tokens=usage.input_tokens or 0, output_tokens=usage.output_tokens or 0)
        return self.cost_nanousd(model, known, at_ms=at_ms, provider=provider)

    def _of_passes(self, passes: Sequence[Pass], at_ms: int) -> int | None:
        total = 0
        for one in passes:
            prices = self._prices((one.provider, one.model, one.variant, None, one.geo), at_ms, one.prompt)
            cost = _picos(one.amounts, prices)
            if cost is None:
                return None
            total += cost
        return _nanos(total)

    def _prices(self, key: Key, at_ms: int, prompt: int) -> PicoPrices:
        """What one of each slot costs, for a call of this time and with a prompt of this length."""
        table = self._tables.get(key)
        if table is None:
            if len(self._tables) >= _TABLES_MAX:
                self._tables.clear()  # callers may invent names without end
            table = self._tables[key] = self._compiled(*key)
        for from_ms, until_ms, above, upto, prices in table:
            if from_ms <= at_ms < until_ms and above < prompt <= upto:
                return prices
        return None

    def _compiled(
        self, provider: str, model: str, tier: str | None, speed: str | None, geo: str | None
    ) -> tuple[PicoCase, ...]:
        found = cases(self._books, provider, model, variant_of(tier, speed), geo_of(geo))
        return tuple((one.from_ms, one.until_ms, one.above, one.upto, self._in_picos(one.found)) for one in found)

    def _in_picos(self, found: Rate | Unpriced) -> PicoPrices:
        if isinstance(found, Unpriced) or found.currency != "USD":
            return None
        return pico_prices(found, self._terms, self._funding, self._which)


class CostTables:
    """The tables of all tenants; those of the same terms share one.

    Args:
        books: where prices are looked up.
        terms_of: the terms of each tenant.
        basis: as of `CostTable`; None for what a call costs the tenant: what is billed for hosted ones, and the list
            price for those with its own key, which the provider bills.
    """

    def __init__(self, books: PriceBooks, terms_of: Callable[[str], Terms], basis: Basis | None = None) -> None:
        self._books = books
        self._terms_of = terms_of
        self._basis = basis
        self._tables: dict[tuple[Terms, Funding], CostTable] = {}

    def of(self, tenant: str, funding: Funding) -> CostTable:
        """The table of a tenant."""
        key = (self._terms_of(tenant), funding)
        table = self._tables.get(key)
        if table is None:
            basis: Basis = self._basis or ("billed" if funding == "hosted" else "list")
            table = self._tables[key] = CostTable(self._books, basis, *key)
        return table


def _picos(amounts: Amounts, prices: PicoPrices) -> int | None:
    """The sum of amounts times prices; None if an amount is not known or has no price."""
    total = 0
    for slot, amount in enumerate(amounts):
        if amount == 0:
            continue
        price = None if prices is None else prices[slot]
        if amount is None or price is None:
            return None
        total += amount * price
    return total


def _nanos(picos: int | None) -> int | None:
    return None if picos is None else -(-picos // 1000)
