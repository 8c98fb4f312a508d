"""Prices as they were looked up, in full: what is rated later about the same calls finds them, whatever books say.

A scale is what the books said of one model, way of service and place: the rates of all lengths of prompts, or that
there were none, and from when to when that held. Whoever rates writes down the scales of what was rated; a correction
of a call is rated by the scale of the call, though the price that it needs may be of another length of prompt or kind
of token.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import msgspec

from meterlib.billing.prices.prices import BEGINNING_MS, END_MS, PriceBooks, Rate, Unpriced

Key = tuple[str, str, str, str]
"""Provider and model as calls name it, way of service and place."""


class Scale(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The rates of one model, way of service and place, for each length of prompt, the shortest first.

    That no book had a price is written down as well: of calls that were rated by other books, it may be contradicted.

    Attributes:
        model: by the name that the call or its answer says; a rate has the book's name.
        from_ms: the rates are of calls from this moment on, in ms since 1970 UTC.
        until_ms: and before this one.
        rates: empty if there was no price.
        unpriced: and why not.
    """

    provider: str
    model: str
    variant: str
    geo: str
    from_ms: int
    until_ms: int
    rates: tuple[Rate, ...]
    unpriced: str = ""

    @property
    def found(self) -> tuple[Rate, ...] | Unpriced:
        """What the books said."""
        return self.rates or Unpriced(self.unpriced)

    @property
    def key(self) -> Key:
        """What it is of."""
        return self.provider, self.model, self.variant, self.geo


def scales_of(books: PriceBooks, key: Key, first_ms: int, last_ms: int) -> list[Scale]:
    """What books say of calls between two moments, both included."""
    provider, model, variant, geo = key
    return [
        _scale(key, from_ms, until_ms, books.rates(provider, model, at_ms=from_ms, variant=variant, geo=geo))
        for from_ms, until_ms in pairwise(books.changes(provider, model))
        if from_ms <= last_ms and first_ms < until_ms
    ]


def _scale(key: Key, from_ms: int, until_ms: int, found: tuple[Rate, ...] | Unpriced) -> Scale:
    provider, model, variant, geo = key
    rates, unpriced = ((), found.reason) if isinstance(found, Unpriced) else (found, "")
    return Scale(
        provider=provider,
        model=model,
        variant=variant,
        geo=geo,
        from_ms=from_ms,
        until_ms=until_ms,
        rates=rates,
        unpriced=unpriced,
    )


def united(one: Iterable[Scale], other: Iterable[Scale]) -> list[Scale] | None:
    """The scales of both, in order; None if they say different things of the same calls."""
    found = sorted({*map(_place, one), *map(_place, other)})
    for before, after in pairwise(found):
        if before[:4] == after[:4] and after[4] < before[5]:
            return None
    of = {_place(scale): scale for several in (one, other) for scale in several}
    return [of[place] for place in found]


def _place(scale: Scale) -> tuple[str, str, str, str, int, int, tuple[tuple[str, str, str], ...]]:
    """What tells a scale from others; a digest has the prices in it."""
    told = tuple((rate.digest, rate.source, rate.valid_from) for rate in scale.rates)
    return (*scale.key, scale.from_ms, scale.until_ms, told)


class PinnedBooks(PriceBooks):
    """Books that say what some scales say, and of all else what other books do.

    Args:
        scales: where two are of the same calls, the first one holds.
        otherwise: the other books.
    """

    def __init__(self, scales: Iterable[Scale], otherwise: PriceBooks) -> None:
        super().__init__(*otherwise.sources)
        self._otherwise = otherwise
        self._scales: dict[Key, list[Scale]] = {}
        for scale in scales:
            self._scales.setdefault(scale.key, []).append(scale)

    def rates(self, provider: str, model: str, *, at_ms: int, variant: str, geo: str) -> tuple[Rate, ...] | Unpriced:
        """The rates of each length of prompt, the shortest first."""
        for scale in self._scales.get((provider, model, variant, geo), ()):
            if scale.from_ms <= at_ms < scale.until_ms:
                return scale.found
        return self._otherwise.rates(provider, model, at_ms=at_ms, variant=variant, geo=geo)

    def changes(self, provider: str, model: str) -> list[int]:
        """The moments at which the model's price may change, from the beginning of time to its end."""
        moments = {BEGINNING_MS, END_MS, *self._otherwise.changes(provider, model)}
        for key, scales in self._scales.items():
            if key[:2] == (provider, model):
                moments |= {moment for scale in scales for moment in (scale.from_ms, scale.until_ms)}
        return sorted(moments)
