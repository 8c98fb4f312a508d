"""Invoices: what one tenant owes for one billing period, line by line. Here, and nowhere else, amounts are rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal

import msgspec

from meterlib.billing.months import month_named
from meterlib.billing.rating.rounding import rounded_lines
from meterlib.billing.reports.answers import Reader
from meterlib.billing.reports.query import Query
from meterlib.core.money import ZERO
from meterlib.core.periods import Period

SectionName = Literal["usage", "platform_fee", "corrections", "own_key"]
SECTIONS: Mapping[SectionName, str] = {
    "usage": "Usage",
    "platform_fee": "Platform fees",
    "corrections": "Corrections of closed periods",
    "own_key": "Usage with your own key, billed by the provider",
}
"""The parts of an invoice, in their order, and their headings."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """What was used of one kind at one price.

    Attributes:
        section: the part of the invoice.
        corrects: the closed period that it corrects; empty for the invoice's own.
        charge: `usage` or `platform_fee`.
        funding: `hosted`, or `own` where the customer's own key paid the provider.
        model: that did it; empty if nobody knows.
        token_type: `input`, `output`, …
        variant: how it was served: `standard`, `batch`, `fast`, …
        geo: where.
        above: the price is that of prompts longer than this many tokens.
        quantity: how many; less than 0 where something was taken back.
        per: how many the price is for.
        currency: of the price; empty if there is none.
        list_price: the book's; None if there is none.
        unit_price: what is billed for `per` of them; None if there is no price.
        list_cost: quantity times list price, exact.
        exact: quantity times unit price, exact; None if there is no price.
        amount: the same, rounded to what can be paid.
        rows: how many rated rows it stands for.
        unpriced: why there is no price; empty if there is one.
    """

    section: SectionName
    corrects: str
    charge: str
    funding: str
    model: str
    token_type: str
    variant: str
    geo: str
    above: int
    quantity: int
    per: int
    currency: str
    list_price: Decimal | None
    unit_price: Decimal | None
    list_cost: Decimal | None
    exact: Decimal | None
    amount: Decimal | None
    rows: int
    unpriced: str


class Total(msgspec.Struct, frozen=True, kw_only=True):
    """What is owed in one currency: the lines' amounts and `rounding` add up to `total`, to the last digit.

    Attributes:
        currency: ISO 4217.
        exact: the sum before it was rounded.
        rounding: what the rounded lines lack, or have too much.
        total: what is owed; a floor if anything has no price.
        own_key_list_cost: what usage with the customer's own key costs by the list, exact; not owed.
    """

    currency: str
    exact: Decimal
    rounding: Decimal
    total: Decimal
    own_key_list_cost: Decimal


class Invoice(msgspec.Struct, frozen=True, kw_only=True):
    """What a tenant owes for a billing period.

    Attributes:
        tenant: who.
        period: the month.
        tz: the zone that it is a month of.
        from_ms: its first moment, in ms since 1970 UTC.
        until_ms: the first moment behind it.
        closed: nothing of it can change any more.
        lines: in order of sections, models and types.
        totals: one for each currency; none if nothing was used.
        unpriced: how many rated rows have no price: the totals are a floor then.
    """

    tenant: str
    period: str
    tz: str
    from_ms: int
    until_ms: int
    closed: bool
    lines: tuple[Line, ...]
    totals: tuple[Total, ...]
    unpriced: int

    def section(self, name: SectionName) -> list[Line]:
        """The lines of a part."""
        return [line for line in self.lines if line.section == name]


_SECTION = """CASE WHEN funding = 'own' AND charge = 'usage' THEN 'own_key' WHEN corrects <> '' THEN 'corrections'
    WHEN charge = 'platform_fee' THEN 'platform_fee' ELSE 'usage' END"""
_PRICED_BY = (
    *("corrects", "charge", "funding", "model", "token_type", "variant", "geo", "above"),
    *("per", "currency", "list_price", "billed_price", "unpriced"),
)


def invoice(reader: Reader, tenant: str, period: str, closed: bool) -> Invoice:
    """The invoice of a tenant for a period.

    Args:
        reader: of the archive.
        tenant: who.
        period: such as `2026-10`.
        closed: whether the period is.

    Raises:
        InvalidInput: that is no month.
    """
    month = month_named(period, reader.billing_tz)
    rows = reader.rows_of(Query(tenant=tenant, period=period), ", ".join((*_PRICED_BY, "quantity", "posting", *_COSTS)))
    by = ", ".join(("section", *_PRICED_BY))
    found = reader.connection.execute(
        f"SELECT {_SECTION} AS section, {', '.join(_PRICED_BY)}, sum(quantity), sum(list_cost), sum(billed_cost),"
        f" sum(posting) FROM ({rows}) GROUP BY {by}"
        " HAVING sum(quantity) <> 0 OR sum(billed_cost) <> 0 OR (unpriced <> '' AND sum(posting) <> 0)"
    ).fetchall()
    return _invoice(tenant, period, month, reader.billing_tz, closed, [_line(row) for row in found])


_COSTS = ("list_cost", "billed_cost")


def _line(row: Sequence[Any]) -> Line:
    section, *told, quantity, list_cost, exact, rows = row
    names = (*_PRICED_BY[:-3], "list_price", "unit_price", "unpriced")
    return Line(
        section=section,
        **dict(zip(names, told, strict=True)),
        quantity=int(quantity),
        list_cost=list_cost,
        exact=exact,
        amount=None,
        rows=int(rows),
    )


def _invoice(tenant: str, period: str, month: Period, tz: str, closed: bool, lines: Sequence[Line]) -> Invoice:
    """The lines in their order, rounded and added up."""
    places = list(SECTIONS)
    ordered = sorted(
        lines,
        key=lambda line: (
            *(places.index(line.section), line.corrects, line.model, line.token_type, line.variant, line.geo),
            *(line.above, line.funding, line.charge, line.currency, line.unpriced, line.per),
            *(line.unit_price or ZERO, line.list_price or ZERO),
        ),
    )
    rounded: list[Line | None] = [None if line.exact is not None else line for line in ordered]
    totals = []
    for currency in sorted({line.currency for line in ordered if line.exact is not None}):
        mine = [at for at, line in enumerate(ordered) if line.exact is not None and line.currency == currency]
        result = rounded_lines([ordered[at].exact or ZERO for at in mine], currency)
        for at, amount in zip(mine, result.lines, strict=True):
            rounded[at] = msgspec.structs.replace(ordered[at], amount=amount)
        own = [line.list_cost or ZERO for line in ordered if line.section == "own_key" and line.currency == currency]
        totals.append(
            Total(
                currency=currency,
                exact=result.exact,
                rounding=result.rounding,
                total=result.total,
                own_key_list_cost=rounded_lines(own, currency).exact,
            )
        )
    return Invoice(
        tenant=tenant,
        period=period,
        tz=tz,
        from_ms=month.start_ms,
        until_ms=month.end_ms,
        closed=closed,
        lines=tuple(line for line in rounded if line is not None),
        totals=tuple(totals),
        unpriced=_unpriced(ordered),
    )


def _unpriced(lines: Sequence[Line]) -> int:
    """How many rows have no price; those that a correction took back are not set off against the period's own."""
    own = sum(line.rows for line in lines if line.unpriced and not line.corrects)
    corrected = sum(line.rows for line in lines if line.unpriced and line.corrects)
    return max(0, own) + max(0, corrected)
