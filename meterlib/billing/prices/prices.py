"""Price books: what tokens cost, from when to when, by kind of token, length of the prompt and way of service.

A price is looked up for each request and never derived from another one. What no book states is unpriced, which is not
the same as free.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from decimal import Decimal
from functools import cached_property
from hashlib import sha256
from typing import Protocol

import msgspec

from meterlib.core.money import EXACT, PRICE_STEP, plain

TOKEN_TYPES = ("input", "output", "cache_write_5m", "cache_write_1h", "cache_read")
"""Kinds of tokens; their prices are per 1,000,000. `input` is the uncached part of the prompt."""
REQUEST_TYPES = ("web_search", "web_fetch", "code_execution")
"""Requests that the provider's own tools make; their prices are per 1,000."""
PER = dict.fromkeys(TOKEN_TYPES, 1_000_000) | dict.fromkeys(REQUEST_TYPES, 1_000)
"""How many of a kind its price is for."""

STANDARD = "standard"
GLOBAL = "global"
"""Where a call was served if nothing else is said; costs what the book says, without a multiplier."""

DAY_MS = 86_400_000
BEGINNING_MS = -(1 << 62)
END_MS = 1 << 62
_KNOWN_MAX = 10_000


class Tier(msgspec.Struct, frozen=True, kw_only=True):
    """Prices of requests whose whole prompt is longer than `above` tokens; they hold for all of such a request."""

    above: int
    prices: Mapping[str, Decimal]


class Unpriced(msgspec.Struct, frozen=True):
    """There is no price, and why."""

    reason: str


class Rate(msgspec.Struct, frozen=True, dict=True, kw_only=True):
    """What one request is priced by: the one price for each kind of token and request.

    Attributes:
        source: the book, such as `book:claude` or `genai-prices/0.2.3`.
        provider: whose price it is.
        model: the book's name for the model.
        variant: `standard`, `batch`, `fast`, …
        geo: where inference ran; its multiplier is in the prices.
        above: the prompt is longer than this many tokens; 0 in the first tier.
        currency: ISO 4217.
        valid_from: the day from which the price holds, in ISO 8601; empty if it always has.
        prices: per `PER` of each kind; a kind that is not here has no price.
    """

    source: str
    provider: str
    model: str
    variant: str
    geo: str
    above: int
    currency: str
    valid_from: str
    prices: Mapping[str, Decimal]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the prices and what they are for: another digest means another price.

        Neither the book's name nor the days are in it, so that closing a price or copying a book changes nothing.
        """
        content = {
            "above": self.above,
            "currency": self.currency,
            "geo": self.geo,
            "model": self.model,
            "prices": {kind: plain(price) for kind, price in self.prices.items()},
            "provider": self.provider,
            "variant": self.variant,
        }
        return sha256(msgspec.json.encode(content, order="sorted")).hexdigest()


class Price(msgspec.Struct, frozen=True, dict=True, kw_only=True):
    """All prices of a model from one day to another, in UTC.

    Attributes:
        valid_from: the first day; None from ever.
        valid_until: the day on which it holds no more; None until further notice.
        variants: for each way of service its tiers, the shortest prompts first.
        requests: prices of tool requests; the same for all variants.
        geo: by what token prices are multiplied where inference was confined to a place.
        source: where the figures are from.
    """

    currency: str
    variants: Mapping[str, Sequence[Tier]]
    requests: Mapping[str, Decimal] = {}
    geo: Mapping[str, Decimal] = {}
    valid_from: date | None = None
    valid_until: date | None = None
    source: str = ""

    @cached_property
    def from_ms(self) -> int:
        """When it begins, in ms since 1970 UTC."""
        return BEGINNING_MS if self.valid_from is None else midnight_ms(self.valid_from)

    @cached_property
    def until_ms(self) -> int:
        """When it has ended, in ms since 1970 UTC."""
        return END_MS if self.valid_until is None else midnight_ms(self.valid_until)

    def rates(self, book: str, provider: str, model: str, variant: str, geo: str) -> tuple[Rate, ...] | Unpriced:
        """The rate of each tier."""
        tiers = self.variants.get(variant)
        if tiers is None:
            return Unpriced(f"{book} has no price for {variant!r:.80} service of {model!r:.80}")
        times = None if geo == GLOBAL else self.geo.get(geo)
        if times is None and geo != GLOBAL:
            return Unpriced(f"{book} has no price for inference in {geo!r:.80} by {model!r:.80}")
        return tuple(
            Rate(
                source=book,
                provider=provider,
                model=model,
                variant=variant,
                geo=geo,
                above=tier.above,
                currency=self.currency,
                valid_from="" if self.valid_from is None else self.valid_from.isoformat(),
                prices={**_multiplied(tier.prices, times), **self.requests},
            )
            for tier in tiers
        )


class PricedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model with its prices in order of time, which never overlap."""

    provider: str
    name: str
    prices: Sequence[Price]
    match: Sequence[str] = ()

    def at(self, ms: int) -> int | None:
        """Which of the prices is in force at a moment, in ms since 1970 UTC."""
        for position, price in enumerate(self.prices):
            if price.from_ms <= ms < price.until_ms:
                return position
        return None


class Source(Protocol):
    """Anything that knows models and their prices."""

    @property
    def label(self) -> str:
        """What rated rows say of where their price is from."""

    def find(self, provider: str, model: str) -> PricedModel | None:
        """The model that a call names, if it is known."""


class PriceBook:
    """The models of one book.

    Args:
        name: what rows priced by it say, after `book:`.
        models: each with patterns of the names that calls use: as they are, with `*` for anything or `{date}` for
            eight digits. A name itself goes before patterns, and of these the one with the most letters.
        edition: which state of the book this is; for people.
    """

    def __init__(self, name: str, models: Iterable[PricedModel], edition: str = "") -> None:
        self.name = name
        self.edition = edition
        self.models = tuple(models)
        self._exact: dict[tuple[str, str], PricedModel] = {}
        self._patterns: list[tuple[str, re.Pattern[str], int, PricedModel]] = []
        for model in self.models:
            for pattern in (model.name, *model.match):
                if is_pattern(pattern):
                    self._patterns.append((model.provider, _compiled(pattern), len(pattern), model))
                else:
                    self._exact[model.provider, pattern] = model
        self._patterns.sort(key=lambda known: -known[2])

    @property
    def label(self) -> str:
        """What rated rows say of where their price is from."""
        return f"book:{self.name}"

    def find(self, provider: str, model: str) -> PricedModel | None:
        """The model that a call names, if the book has it."""
        found = self._exact.get((provider, model))
        if found is not None:
            return found
        for whose, pattern, _, known in self._patterns:
            if whose == provider and pattern.fullmatch(model):
                return known
        return None


class PriceBooks:
    """Sources of prices in order: the first that has a price of the model at the time decides, for all of the call."""

    def __init__(self, *sources: Source) -> None:
        self.sources = sources
        self._found: dict[tuple[str, str], tuple[tuple[str, PricedModel], ...]] = {}
        self._rates: dict[tuple[str, str, str, str, int, int], tuple[Rate, ...] | Unpriced] = {}

    def rate(self, provider: str, model: str, *, at_ms: int, variant: str, geo: str, prompt: int) -> Rate | Unpriced:
        """What a request is priced by.

        Args:
            provider: who served it.
            model: by the name that the call or its answer says.
            at_ms: when, in ms since 1970 UTC.
            variant: how: `standard`, `batch`, `fast`, … or several joined by `+`.
            geo: where, if that was confined to a place; else `global`.
            prompt: tokens of the whole prompt: uncached, written to the cache and read from it.
        """
        rates = self.rates(provider, model, at_ms=at_ms, variant=variant, geo=geo)
        if isinstance(rates, Unpriced):
            return rates
        chosen = rates[0]
        for rate in rates[1:]:
            if prompt > rate.above:
                chosen = rate
        return chosen

    def rates(self, provider: str, model: str, *, at_ms: int, variant: str, geo: str) -> tuple[Rate, ...] | Unpriced:
        """The same for each length of prompt, the shortest first."""
        if not model:
            return Unpriced("the model is not known")
        known = self.known(provider, model)
        for source, (label, priced) in enumerate(known):
            position = priced.at(at_ms)
            if position is None:
                continue
            key = (provider, model, variant, geo, source, position)
            rates = self._rates.get(key)
            if rates is None:
                if len(self._rates) >= _KNOWN_MAX:
                    self._rates.clear()  # callers may invent names without end
                price = priced.prices[position]
                rates = self._rates[key] = price.rates(label, priced.provider, priced.name, variant, geo)
            return rates
        when = " at the time of the call" if known else ""
        return Unpriced(f"no book has a price for model {model!r:.80} of {provider!r:.80}{when}")

    def known(self, provider: str, model: str) -> tuple[tuple[str, PricedModel], ...]:
        """What each source that knows the model calls itself, and what it has of it."""
        found = self._found.get((provider, model))
        if found is None:
            if len(self._found) >= _KNOWN_MAX:
                self._found.clear()
            pairs = ((source.label, source.find(provider, model)) for source in self.sources)
            found = self._found[provider, model] = tuple((label, priced) for label, priced in pairs if priced)
        return found

    def changes(self, provider: str, model: str) -> list[int]:
        """The moments at which the model's price may change, from the beginning of time to its end."""
        moments = {BEGINNING_MS, END_MS}
        for _, priced in self.known(provider, model):
            for price in priced.prices:
                moments |= {price.from_ms, price.until_ms}
        return sorted(moments)


def midnight_ms(day: date) -> int:
    """When a day begins in UTC, in ms since 1970."""
    return (day.toordinal() - date(1970, 1, 1).toordinal()) * DAY_MS


def _multiplied(prices: Mapping[str, Decimal], times: Decimal | None) -> Mapping[str, Decimal]:
    if times is None:
        return prices
    return {kind: EXACT.quantize(EXACT.multiply(price, times), PRICE_STEP) for kind, price in prices.items()}


def is_pattern(name: str) -> bool:
    """Whether a name stands for several."""
    return "*" in name or "{date}" in name


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", ".*").replace(r"\{date\}", "[0-9]{8}"), re.DOTALL)
