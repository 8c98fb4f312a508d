"""Why the provider's money differs from ours: what its other tokens cost, and what remains at the same tokens. Pure.

All amounts are in cents, as the provider tells them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import NamedTuple

import msgspec

from meterlib.billing.reconcile.cells import MEASURES, Cost, CostCell, Group
from meterlib.billing.reconcile.reconcile import Call, Cause, Difference, Evidence
from meterlib.core.money import EXACT, ZERO, minus, plus

TINY = Decimal("0.000001")
"""Cents that are no difference: reports may round their last digit."""
TIMES_MAX = 4
"""Prices depend on the prompt: a call that nobody here saw may have cost so many times more than an average one."""


class Ours(NamedTuple):
    """The money of a cell: what the provider is owed, the same at list price, and how many lines have no price."""

    amount: Decimal
    listed: Decimal
    unpriced: int


class PriceSpan(NamedTuple):
    """What one of a kind costs, in cents: the least and the most, since prices depend on prompts."""

    low: Decimal
    high: Decimal


class MoneyDifference(msgspec.Struct, frozen=True, kw_only=True):
    """A part of what the provider charges more than we reckon, in cents; negative where it charges less.

    Attributes:
        cell: where.
        cause: why.
        amount: how much.
        evidence: the entries that show it.
        how: in words, what it was reckoned from.
    """

    cell: CostCell
    cause: Cause
    amount: Decimal
    evidence: tuple[Evidence, ...] = ()
    how: str = ""


class MoneySide(msgspec.Struct, frozen=True, kw_only=True):
    """What is known besides the two sums of a cell.

    Attributes:
        tokens: the differences of tokens, explained.
        prices: what one of a kind costs us, by group.
        unpriced: entries without a price.
        covered: from when to when tokens were compared, too.
    """

    tokens: Sequence[Difference] = ()
    prices: Mapping[tuple[Group, str], PriceSpan] = {}
    unpriced: Sequence[Call] = ()
    covered: Sequence[tuple[int, int]] = ()


_NO_COST = Cost(ZERO, None)
_NO_OURS = Ours(ZERO, ZERO, 0)


def explain_money(
    told: Mapping[CostCell, Cost], ours: Mapping[CostCell, Ours], side: MoneySide
) -> list[MoneyDifference]:
    """Why they differ, cell by cell; parts of a cell add up to its difference."""
    found: list[MoneyDifference] = []
    for cell in sorted(told.keys() | ours.keys()):
        cost, own = told.get(cell, _NO_COST), ours.get(cell, _NO_OURS)
        left = minus(cost.amount, own.amount)
        if abs(left) > TINY or own.unpriced:
            found += _Cell(cell, cost, own, side).parts(left)
    return found


class _Cell:
    def __init__(self, cell: CostCell, cost: Cost, own: Ours, side: MoneySide) -> None:
        self._cell, self._cost, self._own, self._side = cell, cost, own, side

    def parts(self, left: Decimal) -> Iterator[MoneyDifference]:
        """The difference, in parts."""
        cell = self._cell
        if cell.kind == "code_execution":
            yield self._part("code_execution", left, (), "charged by time, which usage reports do not tell")
            return
        if cell.kind == "session_usage":
            yield self._part("outside_gateway", left, (), "time of managed sessions, which no gateway sees")
            return
        if cell.group.tier.startswith("priority") and not self._cost.amount:
            yield self._part("priority_tier", left, (), "cost reports leave out what the priority tier costs")
            return
        vague: list[tuple[Difference, Decimal | None]] = []
        for difference in self._tokens():
            amount, exact = self._value(difference)
            if not exact:
                vague.append((difference, amount))
            if amount:
                left = minus(left, amount)
                yield self._part(difference.cause, amount, difference.evidence, f"tokens: {difference.how}")
        if abs(left) > TINY or self._own.unpriced:
            yield from self._rest(left, vague)

    def _rest(self, left: Decimal, vague: Sequence[tuple[Difference, Decimal | None]]) -> Iterator[MoneyDifference]:
        """What is left when the tokens are accounted for."""
        if self._own.unpriced:
            calls = [Evidence(call, None) for call in self._side.unpriced if self._holds(call.group, call.bucket)]
            yield self._part("unpriced", left, calls, f"{self._own.unpriced:,} lines of ours have no price")
            return
        for difference, amount in vague:
            if amount is None or abs(left) <= TIMES_MAX * abs(amount):
                how = f"tokens: {difference.how}; what they cost depends on prompts that nobody here saw"
                yield self._part(difference.cause, left, difference.evidence, how)
                return
        if not self._covered():
            yield self._part("unknown", left, (), "there is no usage report of this time to tell tokens from prices")
            return
        listed = self._cost.listed
        how = "the same tokens at another price"
        if listed is not None:
            alike = abs(minus(listed, self._own.listed)) <= TINY
            how += "; list prices agree, so it is the discount" if alike else "; list prices differ, too"
        yield self._part("price", left, (), how)

    def _part(self, cause: Cause, amount: Decimal, evidence: Iterable[Evidence], how: str) -> MoneyDifference:
        return MoneyDifference(cell=self._cell, cause=cause, amount=amount, evidence=tuple(evidence), how=how)

    # ── Tokens of the cell ────────────────────────────────────────────────────────────────────────────────────────────

    def _tokens(self) -> Iterator[Difference]:
        for difference in self._side.tokens:
            bucket = (difference.cell.start_ms, difference.cell.end_ms)
            if self._holds(difference.cell.group, bucket) and any(self._mine(difference.counts)):
                yield difference

    def _holds(self, group: Group, bucket: tuple[int, int] | None) -> bool:
        """Whether a finer cell is part of this one."""
        if bucket is None or not self._cell.start_ms <= bucket[0] < self._cell.end_ms:
            return False
        return all(mine in ("", theirs) for mine, theirs in zip(self._cell.group, group, strict=True))

    def _mine(self, counts: Iterable[int]) -> list[int]:
        """The counts that this cell's money is of."""
        kind = self._cell.kind
        of = MEASURES if not kind else MEASURES[:5] if kind == "tokens" else (kind,)
        return [count if name in of else 0 for name, count in zip(MEASURES, counts, strict=True)]

    def _value(self, difference: Difference) -> tuple[Decimal | None, bool]:
        """What a difference of tokens is worth, and whether that is certain: by its entries, else by others' prices."""
        exact = self._exactly(difference)
        if exact is not None:
            return exact, True
        total, one_price = ZERO, True
        for name, count in zip(MEASURES, self._mine(difference.counts), strict=True):
            if not count:
                continue
            price = self._price(difference.cell.group, name)
            if price is None:
                return None, False
            total = plus(total, EXACT.multiply(price.low, Decimal(count)))
            one_price = one_price and price.low == price.high
        return total, one_price

    def _exactly(self, difference: Difference) -> Decimal | None:
        """The cost of whole calls, where a difference is made of such."""
        total = ZERO
        for call, counts in difference.evidence:
            if counts is None or not call.costs:
                return None
            for mine, theirs, cost in zip(self._mine(counts), call.counts, call.costs, strict=True):
                if mine and abs(mine) != abs(theirs):
                    return None
                total = plus(total, cost if mine * theirs > 0 else -cost if mine else ZERO)
        return total if difference.evidence else None

    def _price(self, group: Group, kind: str) -> PriceSpan | None:
        """What one of a kind costs in a group; else in any of the same model."""
        known = self._side.prices
        found = known.get((group, kind))
        if found is not None:
            return found
        alike = [price for (other, name), price in known.items() if name == kind and other.model == group.model]
        return PriceSpan(min(p.low for p in alike), max(p.high for p in alike)) if alike else None

    def _covered(self) -> bool:
        """Whether tokens were compared for all of this time."""
        at = self._cell.start_ms
        for start, end in sorted(self._side.covered):
            if start <= at < end:
                at = end
        return at >= self._cell.end_ms
