"""Rated rows: what one line of an entry costs, with the prices it was rated at, and exact sums of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from decimal import Decimal
from functools import lru_cache
from typing import Any, Literal

import msgspec

from meterlib.core.ledger import EntryKind, Quality
from meterlib.core.money import COST_STEP, EXACT, ZERO, plus
from meterlib.core.policy import Funding

Charge = Literal["usage", "platform_fee"]


class RatedRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of what an entry costs. `(epoch, shard, n, line)` is its key, and it is never edited.

    A row without a price (`unpriced` says why) has no costs, which is not the same as costs of 0.

    Attributes:
        epoch: with `shard` and `n`: the entry.
        line: fixed by the pass, the kind and the charge; what is taken back has lines of its own.
        kind: the entry's.
        at_ms: the moment that the price is of, in ms since 1970 UTC.
        charge: `usage`, or `platform_fee` for the operator's fee on usage that the customer's own key paid for.
        pass_kind: `call`, or the kind of pass within it.
        model: that did it, by the name that the call or its answer says; `price_model` is the book's name for it.
        token_type: `input`, `output`, `cache_write_5m`, `cache_write_1h`, `cache_read`, `web_search`, …
        quantity: how many; of a correction the difference, which may be negative.
        per: how many the prices are for.
        list_price: the book's, for the tier, way of service and place.
        contracted_price: by the customer's terms; the list price where the customer pays the provider.
        billed_price: what the customer owes the operator for it; 0 where its own key paid.
        upstream_price: what the operator owes the provider; 0 where the customer's own key paid.
        list_cost: quantity times `list_price`, exact; so the other costs with theirs.
        price_source: `book:NAME` or `genai-prices/VERSION`.
        price_digest: SHA-256 of the rate; see `Rate.digest`.
        price_from: the day from which that price holds; empty if it always has.
        above: the tier: prompts longer than this many tokens.
        quality: the entry's: how far the quantity is to be trusted.
        flags: what else is doubtful, such as `split_unknown`: a cache write of unknown time to live.
        reverses: the line that this one takes back, with all amounts negated; -1 for none.
        posting: 1, and -1 of a row that takes back one with 1: what is counted by rows is the sum of these.
    """

    epoch: str
    shard: int
    n: int
    line: int
    kind: EntryKind
    at_ms: int
    tenant: str
    funding: Funding
    charge: Charge
    provider: str
    model: str
    pass_kind: str
    token_type: str
    quantity: int
    per: int
    currency: str = ""
    list_price: Decimal | None = None
    contracted_price: Decimal | None = None
    billed_price: Decimal | None = None
    upstream_price: Decimal | None = None
    list_cost: Decimal | None = None
    contracted_cost: Decimal | None = None
    billed_cost: Decimal | None = None
    upstream_cost: Decimal | None = None
    price_source: str = ""
    price_model: str = ""
    price_digest: str = ""
    price_from: str = ""
    variant: str = "standard"
    geo: str = "global"
    above: int = 0
    quality: Quality = "final"
    flags: str = ""
    unpriced: str = ""
    reverses: int = -1
    posting: int = 1


COSTS = ("list_cost", "contracted_cost", "billed_cost", "upstream_cost")


class Totals:
    """Sums of rated rows in one currency, exact. Rows without a price make them a floor: `complete` is False then."""

    def __init__(self, rows: Iterable[RatedRow] = ()) -> None:
        self.list_cost = self.contracted_cost = self.billed_cost = self.upstream_cost = ZERO
        self.currency = ""
        self.rows = 0
        self.unpriced = 0
        for row in rows:
            self.add(row)

    @property
    def complete(self) -> bool:
        """Whether every row had a price."""
        return self.unpriced == 0

    def add(self, row: RatedRow) -> None:
        """Count a row. Raises ValueError if it is in another currency than those before."""
        self.rows += row.posting
        if row.unpriced:
            self.unpriced += row.posting
            return
        if row.currency != self.currency:
            if self.currency:
                raise ValueError(f"a row in {row.currency} does not add up with {self.currency}")
            self.currency = row.currency
        for name in COSTS:
            setattr(self, name, plus(getattr(self, name), getattr(row, name)))


class RatedRows(msgspec.Struct, frozen=True):
    """The rows of one entry, in order of their lines; none of one that used nothing."""

    rows: tuple[RatedRow, ...] = ()

    def __iter__(self) -> Iterator[RatedRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def totals(self) -> Totals:
        """Their sums."""
        return Totals(self.rows)


def cost_of(price: Decimal, per: int, quantity: int) -> Decimal:
    """What a quantity costs, exact, with twelve decimals."""
    return EXACT.multiply(each_of(price, per), Decimal(quantity))


@lru_cache(maxsize=65_536)
def each_of(price: Decimal, per: int) -> Decimal:
    """What one of them costs, with twelve decimals.

    Raises:
        decimal.Inexact: the price has more than six decimals.
    """
    return EXACT.quantize(EXACT.scaleb(price, -6 if per == 1_000_000 else -3), COST_STEP)


def reversal(row: RatedRow, line: int) -> RatedRow:
    """A row that takes another one back, whatever it says."""
    taken = with_quantity(row, -row.quantity)
    return msgspec.structs.replace(taken, line=line, reverses=row.line, posting=-row.posting)


def with_quantity(row: RatedRow, quantity: int) -> RatedRow:
    """The row with another quantity at the same prices."""
    changed: dict[str, Any] = {"quantity": quantity}
    if not row.unpriced:
        for cost in COSTS:
            changed[cost] = cost_of(getattr(row, cost.replace("cost", "price")), row.per, quantity)
    return msgspec.structs.replace(row, **changed)
