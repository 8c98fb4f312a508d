"""Prices from the package genai-prices, which knows many models of many providers: for what no other book states.

Only its data are used, never its own arithmetic: that takes cached tokens for a part of the input, passes over what it
does not know, and obeys the caller's decimal context. Nothing is fetched: they are the prices of the installed version.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from decimal import Decimal
from functools import cached_property
from importlib import import_module
from importlib.metadata import version
from typing import Any

from meterlib.billing.prices.prices import STANDARD, Price, PricedModel, Tier
from meterlib.core.money import rounded_price

_TOKENS = {
    "input": "input_mtok",
    "output": "output_mtok",
    "cache_write_5m": "cache_write_mtok",
    "cache_write_1h": "cache_write_1h_mtok",
    "cache_read": "cache_read_mtok",
}
_REQUESTS = {"web_search": "web_searches_kcount"}
_VARIANTS = {("processing", "batch"): "batch", ("speed", "fast"): "fast", ("service_tier", "priority"): "priority"}
"""Conditions of its variants that mean something here; a variant with any other is left out, so it is unpriced."""
_BESIDES = ("requests_kcount", "output_reasoning_mtok", "output_citation_mtok")
"""Prices of what calls here do not tell: with them a model costs more than its tokens, so it is left out."""


class GenaiPrices:
    """The prices of the installed genai-prices.

    Prices that are no millionths (binary fractions were written down in some) are rounded to six decimals. A model
    whose price depends on the hour of the day is left out: a day is the finest that a book here knows.

    Raises:
        ImportError: it is not installed.
    """

    def __init__(self) -> None:
        self.label = f"genai-prices/{version('genai-prices')}"

    @cached_property
    def _providers(self) -> dict[str, Any]:
        # Half a second and 16 MB: only for who comes upon a model that no book has.
        return {provider.id: provider for provider in import_module("genai_prices.data").providers}

    def find(self, provider: str, model: str) -> PricedModel | None:
        """The model that a call names, if the package knows it."""
        whose = self._providers.get(provider)
        found = whose.find_model(model) if whose else None
        if found is None:
            return None
        prices = _prices_of(found)
        return PricedModel(provider=provider, name=found.id, prices=prices) if prices else None


def _prices_of(model: Any) -> tuple[Price, ...]:
    """Its history, in order of time; empty if it cannot be told by days."""
    variants = [(_variant_of(told), told) for told in getattr(model, "price_variants", None) or []]
    try:
        standard = _dated(model.prices if isinstance(model.prices, list) else [model])
        others = {name: _dated([one for called, one in variants if called == name]) for name, _ in variants if name}
    except _ByTheHour:
        return ()
    if any(getattr(prices, name, None) is not None for _, prices in standard for name in _BESIDES):
        return ()
    days = sorted({day for dated in (standard, *others.values()) for day, _ in dated if day is not None})
    edges: list[date | None] = [None, *days, None]
    prices = []
    for position, first in enumerate(edges[:-1]):
        base = _in_force(standard, first)
        if base is None:
            continue
        tiers = {
            STANDARD: base,
            **{name: found for name, dated in others.items() if (found := _in_force(dated, first))},
        }
        prices.append(
            Price(
                currency="USD",
                variants={name: _tiers(found) for name, found in tiers.items()},
                requests=_requests(base),
                valid_from=first,
                valid_until=edges[position + 1],
                source="genai-prices",
            )
        )
    return tuple(price for price in prices if price.variants[STANDARD])


class _ByTheHour(Exception):
    pass


Dated = Sequence[tuple[date | None, Any]]


def _dated(told: Iterable[Any]) -> Dated:
    """Prices with the day each begins."""
    return [(_start(getattr(one, "constraint", None)), one.prices) for one in told]


def _start(constraint: Any) -> date | None:
    if constraint is None:
        return None
    start = getattr(constraint, "start_date", None)
    if not isinstance(start, date):
        raise _ByTheHour
    return start


def _in_force(dated: Dated, day: date | None) -> Any:
    """The last one that has begun on a day; None is the day before all others."""
    begun = [
        (start or date.min, prices) for start, prices in dated if start is None or (day is not None and start <= day)
    ]
    return max(begun, key=lambda one: one[0])[1] if begun else None


def _variant_of(told: Any) -> str:
    """What a variant is called here; empty if it holds under conditions that are not known here."""
    conditions: Mapping[str, str] = told.when
    return _VARIANTS.get(next(iter(conditions.items())), "") if len(conditions) == 1 else ""


def _tiers(told: Any) -> tuple[Tier, ...]:
    """Its tiers; a kind of token that has a price only for some lengths of prompt is priced as it says for each."""
    known = {kind: getattr(told, name, None) for kind, name in _TOKENS.items()}
    starts = {0} | {tier.start for price in known.values() for tier in getattr(price, "tiers", ())}
    return tuple(
        Tier(above=start, prices={kind: _at(price, start) for kind, price in known.items() if price is not None})
        for start in sorted(starts)
    )


def _at(price: Any, start: int) -> Decimal:
    """The price of prompts just above `start` tokens."""
    if isinstance(price, Decimal):
        return rounded_price(price)
    chosen = price.base
    for tier in price.tiers:
        if start >= tier.start:
            chosen = tier.price
    return rounded_price(chosen)


def _requests(told: Any) -> dict[str, Decimal]:
    known = {kind: getattr(told, name, None) for kind, name in _REQUESTS.items()}
    return {kind: rounded_price(price) for kind, price in known.items() if isinstance(price, Decimal)}
