"""What differs between two price books: which price of which model, from which day to which. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from decimal import Decimal
from itertools import pairwise

import msgspec

from meterlib.billing.prices.prices import BEGINNING_MS, DAY_MS, END_MS, Price, PriceBook, PricedModel
from meterlib.core.money import plain

What = tuple[str, int, str]
"""A way of service, a tier and a kind of token; or no way and tier, and a kind of request or `times in PLACE`."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One price that two books do not agree on.

    Attributes:
        variant: way of service; empty for prices that hold for all.
        above: the tier: prompts longer than this many tokens.
        kind: of token or request, or `times in us`.
        old: None where the first book has none.
        new: None where the second book has none.
        valid_from: the first day (UTC) on which they differ; None from ever.
        valid_until: the day on which they differ no more; None until further notice.
    """

    provider: str
    model: str
    variant: str
    above: int
    kind: str
    old: Decimal | None
    new: Decimal | None
    valid_from: date | None
    valid_until: date | None


def changes(old: PriceBook | None, new: PriceBook | None) -> list[Change]:
    """Where the books differ, by model, kind and time; names that calls may use for a model are not compared."""
    before, after = _models(old), _models(new)
    return [
        change
        for key in sorted(before.keys() | after.keys())
        for change in _merged(_differences(*key, before.get(key), after.get(key)))
    ]


def _models(book: PriceBook | None) -> dict[tuple[str, str], PricedModel]:
    return {(model.provider, model.name): model for model in (book.models if book else ())}


def _differences(provider: str, name: str, before: PricedModel | None, after: PricedModel | None) -> Iterator[Change]:
    known = [price for model in (before, after) if model for price in model.prices]
    moments = sorted({BEGINNING_MS, END_MS} | {ms for price in known for ms in (price.from_ms, price.until_ms)})
    for from_ms, until_ms in pairwise(moments):
        old, new = _prices_at(before, from_ms), _prices_at(after, from_ms)
        for what in sorted(old.keys() | new.keys()):
            if old.get(what) != new.get(what):
                variant, above, kind = what
                yield Change(
                    provider=provider,
                    model=name,
                    variant=variant,
                    above=above,
                    kind=kind,
                    old=old.get(what),
                    new=new.get(what),
                    valid_from=_day(from_ms),
                    valid_until=_day(until_ms),
                )


def _merged(found: Iterable[Change]) -> list[Change]:
    """The same difference on both sides of a day is one difference."""
    merged: dict[tuple[object, ...], list[Change]] = {}
    for change in found:
        runs = merged.setdefault((change.variant, change.above, change.kind), [])
        last = runs[-1] if runs else None
        if last and last.valid_until == change.valid_from and (last.old, last.new) == (change.old, change.new):
            runs[-1] = msgspec.structs.replace(last, valid_until=change.valid_until)
        else:
            runs.append(change)
    return [change for _, runs in sorted(merged.items(), key=lambda item: str(item[0])) for change in runs]


def _prices_at(model: PricedModel | None, ms: int) -> Mapping[What, Decimal]:
    position = model.at(ms) if model else None
    return {} if model is None or position is None else flat(model.prices[position])


def flat(price: Price) -> dict[What, Decimal]:
    """All numbers of a price."""
    return {
        **{
            (variant, tier.above, kind): number
            for variant, tiers in price.variants.items()
            for tier in tiers
            for kind, number in tier.prices.items()
        },
        **{("", 0, kind): number for kind, number in price.requests.items()},
        **{("", 0, f"times in {place}"): times for place, times in price.geo.items()},
    }


def text_of(change: Change) -> str:
    """What changes, in words: `0.2 -> 0.1`."""
    return " -> ".join("none" if number is None else plain(number) for number in (change.old, change.new))


def _day(ms: int) -> date | None:
    return None if ms in (BEGINNING_MS, END_MS) else date.fromordinal(date(1970, 1, 1).toordinal() + ms // DAY_MS)
