"""Rating again, at other prices: what changes, as rows to be added. Rows that were posted are never edited."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from decimal import Decimal
from itertools import groupby

import msgspec

from meterlib.billing.rating.rated import COSTS, RatedRow, reversal
from meterlib.core.money import ZERO, minus, plus

RERATED_LINES = 1 << 24
"""Rows of the first re-rating have lines from here on, those of the second from twice that, and so on."""
TAKEN_BACK = 1 << 23
"""In the line of a row by which a re-rating takes back another."""

MONEY = ("quantity", "currency", *COSTS, *(cost.replace("cost", "price") for cost in COSTS))
WHAT = ("kind", "charge", "provider", "model", "pass_kind", "token_type", "flags")


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What changes of one line: `old` stands and is taken back by `reversed`; `new` is posted in its place."""

    old: RatedRow | None
    reversed: RatedRow | None
    new: RatedRow | None

    @property
    def rows(self) -> tuple[RatedRow, ...]:
        """The rows to add."""
        return tuple(row for row in (self.reversed, self.new) if row is not None)


class Change(msgspec.Struct, kw_only=True):
    """The sum of deltas of one model; costs of lines without a price count as nothing, and are counted.

    Attributes:
        lines: how many change.
        unpriced: how many more of them have no price now; fewer, if negative.
        list_cost: by how much it grows; so the others.
    """

    lines: int = 0
    unpriced: int = 0
    list_cost: Decimal = ZERO
    contracted_cost: Decimal = ZERO
    billed_cost: Decimal = ZERO
    upstream_cost: Decimal = ZERO


def compare(rows_old: Iterable[RatedRow], rows_new: Iterable[RatedRow], number: int = 0) -> Iterator[Delta]:
    """What a re-rating changes, entry by entry; it holds the rows of one entry at a time.

    Args:
        rows_old: all that was posted of the entries, re-ratings included, in order of epoch, shard and n.
        rows_new: the same entries as `rate` rates them now, in the same order.
        number: which re-rating it is, which lines tell; by default the next one of each entry.
    """
    old, new = groupby(rows_old, _entry), groupby(rows_new, _entry)
    one, other = next(old, None), next(new, None)
    while one or other:
        key = min(pair[0] for pair in (one, other) if pair)
        posted: list[RatedRow] = []
        rated: list[RatedRow] = []
        if one and one[0] == key:
            posted, one = list(one[1]), next(old, None)
        if other and other[0] == key:
            rated, other = list(other[1]), next(new, None)
        yield from _deltas(posted, rated, number)


def summary(deltas: Iterable[Delta]) -> dict[str, Change]:
    """What changes by model, in order of names."""
    changes: dict[str, Change] = {}
    for delta in deltas:
        for row, of in ((delta.old, minus), (delta.new, plus)):
            if row is None:
                continue
            change = changes.setdefault(row.model, Change())
            if row.unpriced:
                change.unpriced += row.posting if row is delta.new else -row.posting
                continue
            for cost in COSTS:
                setattr(change, cost, of(getattr(change, cost), getattr(row, cost)))
        for model in {row.model for row in (delta.old, delta.new) if row}:
            changes[model].lines += 1
    return dict(sorted(changes.items()))


def standing(rows: Iterable[RatedRow]) -> list[RatedRow]:
    """The rows of one entry that no re-rating took back."""
    rows = list(rows)
    gone = {row.reverses for row in rows if row.line & TAKEN_BACK}
    return [row for row in rows if not row.line & TAKEN_BACK and row.line not in gone]


def _deltas(posted: list[RatedRow], rated: list[RatedRow], number: int) -> Iterator[Delta]:
    """Lines are matched by what their numbers were at the first rating."""
    old = {row.line & (TAKEN_BACK - 1): row for row in standing(posted)}
    new = {row.line: row for row in rated}
    start = RERATED_LINES * (number or 1 + max((row.line // RERATED_LINES for row in posted), default=0))
    for line in sorted(old.keys() | new.keys()):
        one, other = old.get(line), new.get(line)
        if not (one and other and _alike(one, other)):
            yield Delta(
                old=one,
                reversed=reversal(one, start + TAKEN_BACK + line) if one else None,
                new=msgspec.structs.replace(other, line=start + line) if other else None,
            )


def _alike(one: RatedRow, other: RatedRow) -> bool:
    """Whether both say the same; for what reason a line has no price is no matter of a bill."""
    same = bool(one.unpriced) == bool(other.unpriced)
    return same and all(getattr(one, name) == getattr(other, name) for name in (*MONEY, *WHAT))


def _entry(row: RatedRow) -> tuple[str, int, int]:
    return row.epoch, row.shard, row.n
