"""Invoice lines: exact costs rounded to what can be paid, and the line that makes them add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal

import msgspec

from meterlib.core.money import ROUNDING, ZERO, minus, plus

EXPONENTS: Mapping[str, int] = {
    **dict.fromkeys(("BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG", "RWF", "UGX", "VND", "VUV"), 0),
    **dict.fromkeys(("XAF", "XOF", "XPF"), 0),
    **dict.fromkeys(("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"), 3),
}
"""Decimals of currencies that have not two (ISO 4217)."""


class RoundedLines(msgspec.Struct, frozen=True, kw_only=True):
    """Amounts of an invoice: `lines` and `rounding` add up to `total`, to the last digit.

    Attributes:
        lines: each exact amount rounded half to even.
        rounding: what the lines lack, or have too much; a line of its own.
        total: the sum of the exact amounts, rounded half to even.
        exact: that sum.
    """

    lines: tuple[Decimal, ...]
    rounding: Decimal
    total: Decimal
    exact: Decimal


def rounded_lines(amounts: Sequence[Decimal], currency: str) -> RoundedLines:
    """The amounts as an invoice in this currency shows them."""
    step = Decimal(1).scaleb(-EXPONENTS.get(currency, 2), ROUNDING)
    exact = rounded = ZERO
    lines = []
    for amount in amounts:
        lines.append(_quantized(amount, step))
        exact, rounded = plus(exact, amount), plus(rounded, lines[-1])
    total = _quantized(exact, step)
    return RoundedLines(lines=tuple(lines), rounding=minus(total, rounded), total=total, exact=exact)


def _quantized(amount: Decimal, step: Decimal) -> Decimal:
    """Half to even; what is next to nothing is 0, and not -0."""
    return ROUNDING.plus(ROUNDING.quantize(amount, step))
