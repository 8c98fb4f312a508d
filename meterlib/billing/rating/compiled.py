"""Prices as whole numbers: a table of what one token costs in picodollars, for all times and all lengths of prompts.

Prices have six decimals per million tokens and per thousand requests, so a token or a request costs whole 1e-12 of the
currency unit, and integers say exactly what decimals do. The table has one row for every case, those without a price
included: whoever looks up or joins finds exactly one.
"""

from __future__ import annotations

from decimal import Decimal
from itertools import pairwise

import msgspec

from meterlib.billing.prices.prices import PER, PriceBooks, Rate, Unpriced
from meterlib.billing.prices.terms import Terms
from meterlib.billing.rating.measures import KINDS
from meterlib.billing.rating.rating import customer_prices
from meterlib.core.money import EXACT
from meterlib.core.policy import Funding

SHORTEST = -(1 << 62)
LONGEST = 1 << 62
"""Bounds of prompts, in tokens; those of differences may be negative."""


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """What holds from `from_ms` up to, but not at, `until_ms`, for prompts of more than `above` up to `upto` tokens."""

    from_ms: int
    until_ms: int
    above: int
    upto: int
    found: Rate | Unpriced


def cases(books: PriceBooks, provider: str, model: str, variant: str, geo: str) -> tuple[Case, ...]:
    """All cases of a model, in order of time and then of length; together they leave nothing out."""
    moments = books.changes(provider, model)
    table: list[Case] = []
    for from_ms, until_ms in pairwise(moments):
        rates = books.rates(provider, model, at_ms=from_ms, variant=variant, geo=geo)
        if isinstance(rates, Unpriced):
            table.append(_case(from_ms, until_ms, SHORTEST, LONGEST, rates))
            continue
        bounds = [SHORTEST, *(rate.above for rate in rates[1:]), LONGEST]
        for rate, (above, upto) in zip(rates, pairwise(bounds), strict=True):
            table.append(_case(from_ms, until_ms, above, upto, rate))
    return tuple(table)


def _case(from_ms: int, until_ms: int, above: int, upto: int, found: Rate | Unpriced) -> Case:
    return Case(from_ms=from_ms, until_ms=until_ms, above=above, upto=upto, found=found)


def picos(price: Decimal, per: int) -> int:
    """What one costs, in 1e-12 of the currency unit.

    Raises:
        decimal.Inexact: the price has more than six decimals.
    """
    return int(EXACT.quantize(EXACT.scaleb(price, 6 if per == 1_000_000 else 9), Decimal(1)))


LIST_PRICE, CONTRACTED_PRICE, BILLED_PRICE, UPSTREAM_PRICE, FEE_PRICE = range(5)


def pico_prices(rate: Rate, terms: Terms, funding: Funding, which: int) -> tuple[int | None, ...]:
    """What one of each slot of `measures.KINDS` costs by these terms; None where there is no price."""
    found: list[int | None] = []
    for kind in KINDS:
        price = rate.prices.get(kind)
        if price is None:
            found.append(None)
            continue
        fee = terms.fee(price) if funding == "own" else price
        prices = (*customer_prices(price, terms, funding), fee)
        found.append(picos(prices[which], PER[kind]))
    return tuple(found)
