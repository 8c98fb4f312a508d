"""Rating: what a ledger entry costs, line by line, with the price it was rated at. Pure, exact, one request at a time.

Rows are rated once and kept: they carry quantity, price and cost, so that nobody has to look a price up again. Sums of
rows are right; the cost of sums is not, since prices depend on the length of each prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any

import msgspec

from meterlib.billing.prices.prices import PER, PriceBooks, Rate, Unpriced
from meterlib.billing.prices.terms import LIST, Terms
from meterlib.billing.rating.measures import (
    KINDS,
    OTHER,
    SPLIT_CONTRADICTS,
    SPLIT_UNKNOWN,
    TIER_OF_AVERAGE,
    TIER_OF_DIFFERENCE,
    WRITE_1H,
    WRITE_5M,
    WRITE_UNSPLIT,
    Pass,
    passes_of,
)
from meterlib.billing.rating.rated import RatedRow, RatedRows, cost_of, reversal, with_quantity
from meterlib.billing.rating.standing import StandingPrices
from meterlib.core.ledger import LedgerEntry
from meterlib.core.money import ZERO
from meterlib.core.policy import Funding

LINES_PER_PASS = 32
FEE_LINES = 16
"""Line numbers are fixed: pass times 32, plus the slot of the kind, plus 16 for the fee on it."""

NO_STANDING = StandingPrices()


def rate(
    entry: LedgerEntry,
    books: PriceBooks,
    terms: Terms = LIST,
    *,
    corrects: LedgerEntry | None = None,
    posted: Iterable[RatedRow] = (),
) -> RatedRows:
    """What an entry costs.

    The price is that of the time when the call was made (`reserved_at`; `booked_at` where there was no reservation).
    An `adjusted` entry costs the difference between the corrected call and the call as it was, at that call's time and
    in the tiers of its prompts; that takes `corrects`. Without it, it is priced as booked, and its rows are flagged
    where the model's price depends on the length of the prompt.

    Args:
        entry: of any kind.
        books: where prices are looked up; of an `adjusted` entry, those that its call was rated by.
        terms: of the entry's tenant; of an `adjusted` entry, those that its call was rated by.
        corrects: of an `adjusted` entry: the one it corrects, its usage with all earlier corrections included.
        posted: the rows that stand of it and of its earlier corrections, in the order in which they were posted. Their
            list prices hold for the correction as well: what is taken back is taken back at the price it had.
    """
    if entry.kind == "adjusted" and corrects is not None:
        return RatedRows(_difference(entry, books, terms, corrects, StandingPrices(posted)))
    at_ms = entry.reserved_at or entry.booked_at
    return RatedRows(tuple(_rows(entry, passes_of(entry), books, terms, at_ms)))


def _rows(
    entry: LedgerEntry,
    passes: Iterable[Pass],
    books: PriceBooks,
    terms: Terms,
    at_ms: int,
    standing: StandingPrices = NO_STANDING,
) -> Iterator[RatedRow]:
    for one in passes:
        found = books.rate(one.provider, one.model, at_ms=at_ms, variant=one.variant, geo=one.geo, prompt=one.prompt)
        if (doubt := doubt_of_prompt(entry, one.number)) and _has_tiers(books, one, at_ms):
            one = one._replace(flags=f"{one.flags},{doubt}".lstrip(","))
        for slot, quantity in enumerate(one.amounts):
            if quantity == 0:
                continue
            line = _line(entry, one, slot, quantity, at_ms)
            known = standing.of(line, found) if quantity is not None else None
            price, origin = _looked_up(found, line["token_type"]) if known is None else _as_posted(known)
            if quantity is None or price is None:
                reason = known.unpriced if known is not None else reason_of(found, slot, quantity, one.unknown)
                yield RatedRow(**line, unpriced=reason)
                continue
            row = _priced(line, origin, price, terms)
            yield row
            if entry.funding == "own" and terms.platform_fee:
                yield _fee(row, price, terms)


def _looked_up(found: Rate | Unpriced, kind: str) -> tuple[Decimal | None, dict[str, Any]]:
    """The list price of a kind of token, and where it is from."""
    if isinstance(found, Unpriced):
        return None, {}
    return found.prices.get(kind), {
        "currency": found.currency,
        "price_source": found.source,
        "price_model": found.model,
        "price_digest": found.digest,
        "price_from": found.valid_from,
        "above": found.above,
    }


def _as_posted(row: RatedRow) -> tuple[Decimal | None, dict[str, Any]]:
    """The same, as a row has it."""
    return row.list_price, {name: getattr(row, name) for name in _ORIGIN}


_ORIGIN = ("currency", "price_source", "price_model", "price_digest", "price_from", "above")


def _line(entry: LedgerEntry, one: Pass, slot: int, quantity: int | None, at_ms: int) -> dict[str, Any]:
    """What a row says whether or not it has a price."""
    kind = KINDS[slot]
    return {
        "epoch": entry.epoch,
        "shard": entry.shard,
        "n": entry.n,
        "line": one.number * LINES_PER_PASS + slot,
        "kind": entry.kind,
        "at_ms": at_ms,
        "tenant": entry.tenant,
        "funding": entry.funding,
        "charge": "usage",
        "provider": one.provider,
        "model": one.model,
        "pass_kind": one.kind,
        "token_type": kind,
        "quantity": quantity or 0,
        "per": PER.get(kind, 1),
        "variant": one.variant,
        "geo": one.geo,
        "quality": entry.quality,
        "flags": flags_of(one.flags, slot),
    }


def _priced(line: Mapping[str, Any], origin: Mapping[str, Any], price: Decimal, terms: Terms) -> RatedRow:
    prices = customer_prices(price, terms, line["funding"])
    costs = [cost_of(one, line["per"], line["quantity"]) for one in prices]
    return RatedRow(
        **line,
        **origin,
        list_price=prices[0],
        contracted_price=prices[1],
        billed_price=prices[2],
        upstream_price=prices[3],
        list_cost=costs[0],
        contracted_cost=costs[1],
        billed_cost=costs[2],
        upstream_cost=costs[3],
    )


def _fee(row: RatedRow, price: Decimal, terms: Terms) -> RatedRow:
    """The operator's fee on a row; it is in no price book, so its list cost is 0."""
    fee = terms.fee(price)
    cost, nothing = cost_of(fee, row.per, row.quantity), cost_of(ZERO, row.per, row.quantity)
    return msgspec.structs.replace(
        row,
        line=row.line + FEE_LINES,
        charge="platform_fee",
        list_price=ZERO,
        contracted_price=fee,
        billed_price=fee,
        upstream_price=ZERO,
        list_cost=nothing,
        contracted_cost=cost,
        billed_cost=cost,
        upstream_cost=nothing,
    )


Prices = tuple[Decimal, Decimal, Decimal, Decimal]


@lru_cache(maxsize=65_536)
def customer_prices(price: Decimal, terms: Terms, funding: Funding) -> Prices:
    """List, contracted, billed and upstream price, of usage that has this list price."""
    if funding == "own":
        return price, price, ZERO, ZERO
    contracted = terms.contracted(price)
    return price, contracted, contracted, terms.upstream(price)


def reason_of(found: Rate | Unpriced, slot: int, quantity: int | None, unknown: str) -> str:
    """Why a line has no price."""
    if quantity is None:
        return f"how many {KINDS[slot]} tokens were used is not known"
    if slot == OTHER:
        return f"nobody here knows what {unknown:.200} is"
    if isinstance(found, Unpriced):
        return found.reason
    return f"{found.source} has no price for {KINDS[slot]} of {found.model!r}"


def flags_of(flags: str, slot: int) -> str:
    """The flags of a pass that matter to a line: those of the cache split only to cache writes."""
    if not flags:
        return ""
    writes = {SPLIT_UNKNOWN: (WRITE_UNSPLIT,), SPLIT_CONTRADICTS: (WRITE_5M, WRITE_1H)}
    return ",".join(flag for flag in flags.split(",") if slot in writes.get(flag, (slot,)))


def doubt_of_prompt(entry: LedgerEntry, number: int) -> str:
    """Why it is not known how long the prompt of a pass was, as a flag; it matters where prices depend on that."""
    if entry.kind == "adjusted":
        return TIER_OF_DIFFERENCE
    requests = entry.usage.get("requests")
    return TIER_OF_AVERAGE if number == 0 and type(requests) is int and requests > 1 else ""


def _has_tiers(books: PriceBooks, one: Pass, at_ms: int) -> bool:
    rates = books.rates(one.provider, one.model, at_ms=at_ms, variant=one.variant, geo=one.geo)
    return not isinstance(rates, Unpriced) and len(rates) > 1


# ── Corrections of usage ──────────────────────────────────────────────────────────────────────────────────────────────


def _difference(
    entry: LedgerEntry, books: PriceBooks, terms: Terms, corrects: LedgerEntry, standing: StandingPrices
) -> tuple[RatedRow, ...]:
    """The corrected call at its price less the call as it was at its own: the two may be in different tiers.

    A line that has another price now is taken back in full and posted anew, so that each row still has one price.
    """
    at_ms = corrects.reserved_at or corrects.booked_at
    before = msgspec.structs.replace(as_corrected(corrects), quality=entry.quality)
    after = msgspec.structs.replace(before, usage=add_usage(before.usage, entry.usage))
    old = {row.line: row for row in _rows(before, passes_of(before), books, terms, at_ms, standing)}
    new = {row.line: row for row in _rows(after, passes_of(after), books, terms, at_ms, standing)}
    rows = [row for line in sorted(old.keys() | new.keys()) for row in _changed(old.get(line), new.get(line))]
    mine = {"epoch": entry.epoch, "shard": entry.shard, "n": entry.n, "kind": entry.kind}
    return tuple(msgspec.structs.replace(row, **mine) for row in rows)


def as_corrected(call: LedgerEntry) -> LedgerEntry:
    """A call as its corrections find it: one that ended without a usage has used nothing but what they say."""
    if call.kind not in ("cancelled", "expired"):
        return call
    nothing = {"input_tokens": 0, "output_tokens": 0}
    return msgspec.structs.replace(call, kind="settled", usage=add_usage(nothing, call.usage))


def _changed(old: RatedRow | None, new: RatedRow | None) -> Iterator[RatedRow]:
    """The rows that lead from one state of a line to another."""
    if old and new and (old.price_digest, old.unpriced) == (new.price_digest, new.unpriced):
        if new.quantity != old.quantity:
            yield with_quantity(new, new.quantity - old.quantity)
        return
    if old:
        yield reversal(old, old.line + REVERSED_LINES)
    if new:
        yield new


REVERSED_LINES = 1 << 20
"""Added to the line of what a correction takes back: the same line may be posted anew."""


def add_usage(usage: Mapping[str, object], difference: Mapping[str, object]) -> dict[str, object]:
    """A usage with a difference applied: numbers are added at every depth, lists appended, texts replaced."""
    total = dict(usage)
    for name, change in difference.items():
        known = total.get(name)
        if type(known) is int and type(change) is int:
            total[name] = known + change
        elif isinstance(known, Mapping) and isinstance(change, Mapping):
            total[name] = add_usage(known, change)
        elif isinstance(known, list | tuple) and isinstance(change, list | tuple):
            total[name] = [*known, *change]
        else:
            total[name] = change
    return total
