"""What a customer pays: discount and mark-up on the list price, and a fee for calls with a provider key of its own."""

from __future__ import annotations

from decimal import Decimal

import msgspec

from meterlib.core.money import EXACT, ONE, ROUNDING, ZERO, fraction_of, minus, plus, rounded_price


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """The terms of one customer, as fractions of the list price.

    They make prices, and prices are rounded once, to six decimals per million tokens, half to even; so every amount is
    an exact product of a quantity and a price that can be shown, and a bill can be checked line by line.

    Attributes:
        discount: off the list price of hosted calls.
        markup: on what the discount left.
        platform_fee: on the list price of calls with the customer's own key, which the provider bills.
        upstream_discount: off the list price, of what the provider takes from the operator.
    """

    discount: Decimal = ZERO
    markup: Decimal = ZERO
    platform_fee: Decimal = ZERO
    upstream_discount: Decimal = ZERO

    @classmethod
    def of(
        cls, discount: str = "0%", markup: str = "0%", platform_fee: str = "0%", upstream_discount: str = "0%"
    ) -> Terms:
        """Terms as settings have them: `"12.5%"`.

        Raises:
            ValueError: one of them is no percentage, or a discount is more than everything.
        """
        terms = cls(
            discount=fraction_of(discount),
            markup=fraction_of(markup),
            platform_fee=fraction_of(platform_fee),
            upstream_discount=fraction_of(upstream_discount),
        )
        if terms.discount > 1 or terms.upstream_discount > 1:
            raise ValueError("a discount is at most 100%")
        return terms

    def contracted(self, price: Decimal) -> Decimal:
        """What a hosted customer pays for what has this list price."""
        left = EXACT.multiply(minus(ONE, self.discount), plus(ONE, self.markup))
        return rounded_price(ROUNDING.multiply(price, left))

    def fee(self, price: Decimal) -> Decimal:
        """What a customer with its own key pays for what has this list price."""
        return rounded_price(ROUNDING.multiply(price, self.platform_fee))

    def upstream(self, price: Decimal) -> Decimal:
        """What the operator pays for what has this list price."""
        return rounded_price(ROUNDING.multiply(price, minus(ONE, self.upstream_discount)))


LIST = Terms()
"""Everything at list price, and nothing for calls with the customer's own key."""
