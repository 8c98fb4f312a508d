"""Decimal arithmetic that is exact, or rounds where it says so, whatever the caller's own decimal context is."""

from __future__ import annotations

import re
from decimal import (
    ROUND_HALF_EVEN,
    Context,
    Decimal,
    DivisionByZero,
    FloatOperation,
    Inexact,
    InvalidOperation,
    Overflow,
)

_ERRORS = [InvalidOperation, DivisionByZero, Overflow, FloatOperation]

EXACT = Context(prec=38, rounding=ROUND_HALF_EVEN, traps=[*_ERRORS, Inexact])
"""Arithmetic that raises `decimal.Inexact` rather than lose a digit."""

ROUNDING = Context(prec=76, rounding=ROUND_HALF_EVEN, traps=_ERRORS)
"""Arithmetic for the few places that round on purpose, half to even."""

ZERO = Decimal(0)
ONE = Decimal(1)
PRICE_STEP = Decimal("0.000001")
"""Prices are whole millionths of a million tokens' price, so a token costs whole 1e-12 of the currency unit."""
COST_STEP = Decimal("0.000000000001")
"""Costs are whole multiples of this; a product of a price and a number of tokens always is."""

_PERCENT = re.compile(r"([0-9]{1,4})(?:\.([0-9]{1,4}))?%")


def plus(one: Decimal, other: Decimal) -> Decimal:
    """The exact sum."""
    return EXACT.add(one, other)


def minus(one: Decimal, other: Decimal) -> Decimal:
    """The exact difference."""
    return EXACT.subtract(one, other)


def rounded_price(price: Decimal) -> Decimal:
    """A price with six decimals, half to even."""
    return ROUNDING.quantize(price, PRICE_STEP)


def plain(number: Decimal) -> str:
    """The digits of a number without exponent or needless zeros: equal numbers have the same text."""
    if not number:
        return "0"
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def fraction_of(percent: str) -> Decimal:
    """`"12.5%"` as 0.125. Raises ValueError on anything else; up to four decimals are allowed."""
    found = _PERCENT.fullmatch(percent) if isinstance(percent, str) else None
    if not found:
        raise ValueError(f"{percent!r:.40} is no percentage such as '10%' or '12.5%'")
    return EXACT.scaleb(Decimal(percent[:-1]), -2)
