"""Prices that a call was rated at: its corrections keep them, whatever the price books say by now. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from meterlib.billing.prices.prices import Rate, Unpriced
from meterlib.billing.rating.rated import RatedRow

_WHAT = ("provider", "model", "pass_kind", "token_type", "variant", "geo")


class StandingPrices:
    """The prices in some rows; of one thing that has several, the last holds.

    Args:
        posted: the rows that stand of one call and its corrections, in the order in which they were posted.
    """

    def __init__(self, posted: Iterable[RatedRow] = ()) -> None:
        self._of: dict[tuple[Any, ...], RatedRow] = {}
        for row in posted:
            # A row without a quantity has no price because nobody knows how many there are, which a correction tells.
            if row.charge == "usage" and row.posting > 0 and row.quantity:
                what = tuple(getattr(row, name) for name in _WHAT)
                self._of[what] = row
                self._of[*what, row.above] = row

    def of(self, line: Mapping[str, Any], found: Rate | Unpriced) -> RatedRow | None:
        """The row with the price of such a line; None if there is none, or if what is found is another tier's."""
        what = tuple(line[name] for name in _WHAT)
        last = self._of.get(what)
        if last is None or last.unpriced or isinstance(found, Unpriced):
            return last
        return self._of.get((*what, found.above))
