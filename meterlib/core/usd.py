"""Amounts of US dollars, which limits count in whole nanodollars: the unit's name, and how people read them. Pure."""

from __future__ import annotations

from decimal import Decimal

from meterlib.core.money import EXACT, ROUNDING

COST = "cost_nanousd"
"""The unit of budgets in US dollars: 1e-9 of a dollar, so that 9 million dollars fit into what a store can count."""

_CENT = 10_000_000
_FOUR_DECIMALS = 100_000


def usd(nanodollars: int) -> str:
    """An amount as people read it: `$1,250.00`, `$0.0312`; with all its digits where four decimals would hide it."""
    if nanodollars % _CENT == 0:
        decimals = 2
    elif abs(nanodollars) >= _FOUR_DECIMALS:
        decimals = 4
    else:
        decimals = 9
    dollars = ROUNDING.quantize(EXACT.scaleb(Decimal(nanodollars), -9), Decimal(1).scaleb(-decimals))
    return f"{'-' if dollars < 0 else ''}${abs(dollars):,f}"
