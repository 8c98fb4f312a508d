"""The rows of a bundle once more: whose they are, what they cost, by which price, and what they add up to. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

import msgspec

from meterlib.billing.bundle.bundle import StatedPrice, StatedTerms
from meterlib.billing.months import month_at, month_named
from meterlib.billing.prices.prices import PriceBooks
from meterlib.billing.rating.measures import passes_of
from meterlib.billing.rating.rated import RatedRow, RatedRows
from meterlib.billing.rating.rating import (
    FEE_LINES,
    LINES_PER_PASS,
    REVERSED_LINES,
    add_usage,
    as_corrected,
    doubt_of_prompt,
    rate,
)
from meterlib.billing.rating.rerating import RERATED_LINES, TAKEN_BACK
from meterlib.billing.rating.rounding import rounded_lines
from meterlib.billing.reports.invoice import Invoice, Line, SectionName
from meterlib.core.ledger import LedgerEntry
from meterlib.core.money import EXACT, ZERO, plus

_NO_BOOKS = PriceBooks()
_ENTRY_FIELDS = ("kind", "tenant", "funding", "quality")
_SAME = ("quantity", "provider", "model", "pass_kind", "token_type", "variant", "geo", "at_ms")
_PAIRS = (("list_price", "list_cost"), ("contracted_price", "contracted_cost"), ("billed_price", "billed_cost"))

_AS_POSTED = (
    *_SAME[1:],
    "charge",
    "above",
    "per",
    "price_digest",
    "currency",
    "list_price",
    "billed_price",
    "unpriced",
)
_OF_FEE = (*_SAME, "posting", "above", "per", "price_digest", "currency")
_OF_PRICE = ("currency", "price_source", "price_model", "price_digest", "price_from")

Row = Mapping[str, Any]
Place = tuple[str, int, int]


class RowCheck:
    """Checks rows, entry by entry, in their order.

    Args:
        tenant: whose they are.
        period: to which they belong.
        tz: the zone that it is a month of.
        prices: by digest.
        terms: of the tenant.
        problem: is told what is wrong.
    """

    def __init__(
        self,
        tenant: str,
        period: str,
        tz: str,
        prices: Mapping[str, StatedPrice],
        terms: Sequence[StatedTerms],
        problem: Callable[[str], None],
    ) -> None:
        self._tenant, self._period, self._prices = tenant, period, prices
        self._tz, self._month = tz, month_named(period, tz)
        self._terms = [one for one in terms if not one.corrects]
        self._kept = {(one.epoch, one.shard, one.first): one for one in terms if one.corrects}
        self._problem = problem
        self._calls: dict[Place, LedgerEntry] = {}
        self._epochs: list[str] = []
        self._stated: dict[tuple[str, str], Decimal] = {}

    def passed(self, entry: LedgerEntry) -> None:
        """An entry is there without rows of its own: a correction is about it, or follows it."""
        if entry.tenant != self._tenant:
            self._problem(f"entry {entry.shard}:{entry.n} is of somebody else")
        self._remember(entry)

    def rows(self, place: Place, rows: Sequence[Row], entry: LedgerEntry | None) -> None:
        """Check the rows of an entry."""
        where = f"{place[1]}:{place[2]}"
        for row in rows:
            for problem in self._of_row(row):
                self._problem(f"entry {where}, line {row['line']}: {problem}")
        if entry is None:
            self._problem(f"entry {where} is not in the bundle, but rows are of it")
            return
        if any(row[name] != getattr(entry, name) for row in rows for name in _ENTRY_FIELDS):
            self._problem(f"rows of entry {where} say another tenant, kind, funding or quality than the entry")
        for problem in self._of_entry(entry, rows):
            self._problem(f"entry {where}: {problem}")
        self._remember(entry)

    # ── One row ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _of_row(self, row: Row) -> Iterator[str]:
        if row["tenant"] != self._tenant or row["period"] != self._period:
            yield "it is of another tenant or period"
        if row["unpriced"]:
            priced = any(row[name] is not None for pair in _PAIRS for name in pair) or row["above"]
            if priced or any(row[name] for name in _OF_PRICE):
                yield "it has no price, and yet an amount or the name of a price"
            return
        if any(row[name] is None for pair in _PAIRS for name in pair) or row["per"] not in (1, 1_000, 1_000_000):
            yield "a price or a cost is missing"
            return
        for price, cost in _PAIRS:
            if EXACT.multiply(row[cost], Decimal(row["per"])) != EXACT.multiply(row[price], Decimal(row["quantity"])):
                yield f"{cost} is not {row['quantity']} times {price} / {row['per']}"
        yield from self._of_terms(row)
        yield from self._of_price(row)

    def _of_terms(self, row: Row) -> Iterator[str]:
        """The customer's price follows from the list price by the terms of that time."""
        known = self._terms_of(row)
        if not known:
            yield "no terms are stated for it"
        elif row["charge"] == "usage" and not any(_holds(row, one) for one in known):
            yield "the customer's price does not follow from the list price by the terms"
        elif row["charge"] == "platform_fee" and not any(self._fee_holds(row, one) for one in known):
            yield "the fee does not follow from the list price by the terms"

    def _terms_of(self, row: Row) -> list[StatedTerms]:
        if row["rating"] and not row["line"] & TAKEN_BACK:
            return [one for one in self._terms if one.rating == row["rating"]]
        if row["rating"]:
            return list(self._terms)  # it takes back what was posted by any of those before
        kept = self._kept.get((row["epoch"], row["shard"], row["n"]))
        return [kept] if kept is not None else self._terms_at(row["epoch"], row["shard"], row["n"])

    def _terms_at(self, epoch: str, shard: int, n: int) -> list[StatedTerms]:
        """Those that held for an entry when it was rated first."""
        return [
            one
            for one in self._terms
            if not one.rating and (one.epoch, one.shard) == (epoch, shard) and one.first <= n <= one.last
        ]

    def _fee_holds(self, row: Row, stated: StatedTerms) -> bool:
        price = self._listed(row)
        prices = (row["list_price"], row["contracted_price"], row["billed_price"])
        if price is None:
            return bool(row["list_price"] == 0 and row["contracted_price"] == row["billed_price"])
        fee = stated.terms.fee(price)
        return prices == (ZERO, fee, fee)

    def _listed(self, row: Row) -> Decimal | None:
        """The list price of what a fee is on."""
        known = self._prices.get(row["price_digest"])
        return known.prices.get(row["token_type"]) if known is not None and known.found else None

    def _of_price(self, row: Row) -> Iterator[str]:
        """The list price is the one of that digest; a fee is on one, and has none of its own."""
        digest, kind = row["price_digest"], row["token_type"]
        fee = row["charge"] == "platform_fee"
        known = self._prices.get(digest)
        if known is None:
            yield f"its price {digest[:16]} is not in the bundle"
        elif known.found:
            listed = ZERO if fee and kind in known.prices else known.prices.get(kind)
            told = (listed, known.currency, known.above, known.geo, known.variant, known.model)
            mine = ("list_price", "currency", "above", "geo", "variant", "price_model")
            if told != tuple(row[name] for name in mine):
                yield f"its list price, tier, place or model is not that of price {digest[:16]}"
            if not any(one.from_ms <= row["at_ms"] < one.until_ms for one in known.held):
                yield f"price {digest[:16]} did not hold when the call was made"
        elif not fee and self._stated.setdefault((digest, kind), row["list_price"]) != row["list_price"]:
            yield f"price {digest[:16]} has two list prices for {kind}"

    # ── Rows beside their entry ───────────────────────────────────────────────────────────────────────────────────────

    def _of_entry(self, entry: LedgerEntry, rows: Sequence[Row]) -> Iterator[str]:
        """The quantities are what the entry says that was used."""
        first = [row for row in rows if not row["rating"] and row["charge"] == "usage"]
        if not first and any(row["rating"] for row in rows):
            pass  # its first rating is on an earlier invoice
        elif entry.kind == "adjusted":
            yield from self._of_correction(entry, first)
        else:
            made = {row.line: row for row in rate(entry, _NO_BOOKS)}
            if made.keys() != {row["line"] for row in first}:
                yield "its rows are of other kinds of tokens than it used"
            for row in first:
                if (one := made.get(row["line"])) is not None:
                    yield from self._of_line(entry, one, row)
        yield from _of_fees(entry, rows)
        for row in rows:
            yield from self._of_month(entry, row)
        yield from self._of_reratings(entry, rows)
        if entry.kind != "adjusted":
            yield from self._of_tiers(entry, rows)

    def _of_month(self, entry: LedgerEntry, row: Row) -> Iterator[str]:
        """A row is of the month that its entry was booked in, or says which closed month it corrects."""
        where, month, booked_ms, corrects = f"line {row['line']}", self._month, row["booked_at_ms"], row["corrects"]
        late_ms = month_at(self._tz, booked_ms).start_ms  # where what is rated after its month was closed is booked
        if booked_ms != entry.booked_at and not (entry.booked_at < booked_ms == late_ms):
            yield f"{where} was booked at another time than the entry"
        if not month.start_ms <= booked_ms < month.end_ms and not (row["rating"] and corrects):
            yield f"{where} was booked in another month"
        if corrects >= self._period and corrects:
            yield f"{where} corrects {corrects}, which was not closed by then"
        elif entry.kind not in ("adjusted", "late") and corrects:
            told = month_at(self._tz, booked_ms if row["rating"] and booked_ms < month.start_ms else entry.booked_at)
            if corrects != told.label:
                yield f"{where} corrects {corrects}, and the entry is not of that month"

    def _of_line(self, entry: LedgerEntry, one: RatedRow, row: Row) -> Iterator[str]:
        """A row says of a line what the entry says of it."""
        where = f"line {row['line']}, {one.token_type}:"
        for name in _SAME:
            if getattr(one, name) != row[name]:
                yield f"{where} it says {name} {row[name]!r:.80}, the entry {getattr(one, name)!r:.80}"
        doubt = doubt_of_prompt(entry, one.line // LINES_PER_PASS)
        doubtful = ",".join(flag for flag in (one.flags, doubt) if flag)
        told = {doubtful if tiers else one.flags for tiers in self._has_tiers(row)}
        if row["flags"] not in told:
            yield f"{where} it says flags {row['flags']!r:.80}, the entry {' or '.join(sorted(map(repr, told)))}"

    def _has_tiers(self, row: Row) -> set[bool]:
        """Whether the price of a row depended on the length of the prompt; both, where a bundle does not tell that."""
        known = self._prices.get(row["price_digest"])
        held = known.held if known is not None and known.found else ()
        return {len(one.tiers) > 1 for one in held if one.from_ms <= row["at_ms"] < one.until_ms} or {False, True}

    def _of_tiers(self, entry: LedgerEntry, rows: Sequence[Row]) -> Iterator[str]:
        """The prices are those for prompts of that length; a correction's are those for its call's, before or after."""
        prompts = {one.number: one.prompt for one in passes_of(entry)}
        for row in rows:
            known, prompt = (
                self._prices.get(row["price_digest"]),
                prompts.get(row["line"] % TAKEN_BACK // LINES_PER_PASS),
            )
            if known is None or not known.found or prompt is None:
                continue
            tiers = [one.tier(prompt) for one in known.held if one.from_ms <= row["at_ms"] < one.until_ms]
            if tiers and known.above not in tiers:
                yield f"line {row['line']} has the price above {known.above} tokens, for a prompt of {prompt}"

    def _of_correction(self, entry: LedgerEntry, rows: Sequence[Row]) -> Iterator[str]:
        """What a correction posts, less what it takes back, is the difference that it says."""
        call = self._root(entry)
        made = rate(entry, _NO_BOOKS)
        if call is not None:
            yield from self._of_kept_terms(entry, call)
            known = as_corrected(call)
            before = rate(known, _NO_BOOKS)
            changed = msgspec.structs.replace(known, usage=add_usage(known.usage, entry.usage))
            after = rate(changed, _NO_BOOKS)
        else:
            before, after = RatedRows(), made
            if (entry.epoch, entry.shard, entry.n) in self._kept:
                yield "it is stated to have the terms of a call that is not in the bundle"
        old, new = {one.line: one for one in before}, {one.line: one for one in after}
        posted = {row["line"]: row for row in rows}
        for line in sorted(old.keys() | new.keys() | {at % REVERSED_LINES for at in posted}):
            yield from _of_change(
                old.get(line), new.get(line), posted.get(line + REVERSED_LINES), posted.get(line), f"line {line}"
            )

    def _of_kept_terms(self, entry: LedgerEntry, call: LedgerEntry) -> Iterator[str]:
        """The terms that are stated of a correction are those that its call has."""
        kept = self._kept.get((entry.epoch, entry.shard, entry.n))
        if kept is None or kept.corrects != f"{call.shard}:{call.n}":
            yield f"it is not stated that it has the terms of {call.shard}:{call.n}, which it corrects"
        elif kept.rerated:
            if kept.terms not in [one.terms for one in self._terms if one.rating == kept.rerated]:
                yield f"its terms are not those of re-rating {kept.rerated}, by which its call was rated"
        elif kept.terms not in [one.terms for one in self._terms_at(call.epoch, call.shard, call.n)]:
            yield f"its terms are not those of {kept.corrects}, which it corrects"

    def _of_reratings(self, entry: LedgerEntry, rows: Sequence[Row]) -> Iterator[str]:
        """A re-rating has the quantities of the entry, once taken back, as they stood, and once posted."""
        made = {row.line: row.quantity for row in rate(entry, _NO_BOOKS)}
        sums: dict[tuple[int, int], int] = {}
        for row in rows:
            if not row["rating"]:
                continue
            line = row["line"] % RERATED_LINES - (0 if row["charge"] == "usage" else FEE_LINES)
            sign = -1 if line & TAKEN_BACK else 1
            amount = sign * row["quantity"]
            if entry.kind != "adjusted" and (made.get(line % TAKEN_BACK) != amount or row["posting"] != sign):
                yield f"line {row['line']} of a re-rating has another quantity than the entry"
            if row["charge"] == "usage":
                key = (row["rating"], line % REVERSED_LINES)
                sums[key] = sums.get(key, 0) + row["quantity"]
        for (rating, line), left in sums.items():
            if left:
                yield f"re-rating {rating} takes back as much of line {line} as it posts, but for {left}"
        yield from _of_standing(rows)

    def _remember(self, entry: LedgerEntry) -> None:
        """Keep what a later correction may be about, its usage as corrected so far."""
        if entry.epoch not in self._epochs:
            self._epochs.append(entry.epoch)
        call = self._root(entry)
        if call is None:
            return
        self._calls[_place_of(entry)] = entry
        if call is not entry:
            self._calls[_place_of(call)] = msgspec.structs.replace(call, usage=add_usage(call.usage, entry.usage))

    def _root(self, entry: LedgerEntry) -> LedgerEntry | None:
        """The call at the end of a chain of corrections."""
        one: LedgerEntry | None = entry
        while one is not None and one.kind == "adjusted":
            one = self._target(one)
        return one

    def _target(self, entry: LedgerEntry) -> LedgerEntry | None:
        """The entry that a correction names: of its own epoch, or of the last one before it that has the number."""
        shard, _, n = entry.adjusts.partition(":")
        if shard != str(entry.shard) or not n.isdigit():
            return None
        for epoch in reversed(self._epochs):
            known = self._calls.get((epoch, entry.shard, int(n)))
            if known is None or _place_of(known) >= _place_of(entry):
                continue
            if entry.adjusts_id in ("", known.reservation_id):
                return known
        return None


def _place_of(entry: LedgerEntry) -> Place:
    return entry.epoch, entry.shard, entry.n


def _holds(row: Row, stated: StatedTerms) -> bool:
    """Whether the prices of a row are those of the terms."""
    told = (row["contracted_price"], row["billed_price"])
    if row["funding"] == "own":
        return told == (row["list_price"], ZERO)
    contracted = stated.terms.contracted(row["list_price"])
    return told == (contracted, contracted)


def _of_standing(rows: Sequence[Row]) -> Iterator[str]:
    """What a re-rating takes back is what was posted, once, as far as that is on the same invoice."""
    posted = {row["line"]: row for row in rows if not row["line"] & TAKEN_BACK}
    gone: set[int] = set()
    for row in rows:
        if not row["line"] & TAKEN_BACK:
            continue
        stood = posted.get(row["reverses"])
        if row["reverses"] in gone:
            yield f"line {row['line']} takes back {row['reverses']}, which was taken back before"
        elif stood is not None and (
            any(stood[name] != row[name] for name in _AS_POSTED)
            or (-stood["quantity"], -stood["posting"]) != (row["quantity"], row["posting"])
        ):
            yield f"line {row['line']} is not what it takes back"
        gone.add(row["reverses"])


def _of_fees(entry: LedgerEntry, rows: Sequence[Row]) -> Iterator[str]:
    """A platform fee is on what an own key paid, as much of it and of the same price; re-ratings may post it alone."""
    usage = {row["line"]: row for row in rows if row["charge"] == "usage"}
    for row in rows:
        if row["charge"] != "platform_fee":
            continue
        beside = usage.get(row["line"] - FEE_LINES)
        if entry.funding != "own":
            yield f"line {row['line']} is a platform fee, and the key was not the customer's own"
        elif beside is None and not row["rating"]:
            yield f"line {row['line']} is a platform fee on nothing"
        elif beside is not None and any(row[name] != beside[name] for name in _OF_FEE):
            yield f"line {row['line']} is a platform fee on other usage than it is beside"


def _of_change(
    old: RatedRow | None, new: RatedRow | None, back: Row | None, posted: Row | None, where: str
) -> Iterator[str]:
    """What a correction posts of a line leads from what it was to what it is: by the difference, or all of it anew."""
    was, now = old.quantity if old else 0, new.quantity if new else 0
    expected = (-was, now) if back is not None else (0, now - was)
    told = tuple(row["quantity"] if row is not None else 0 for row in (back, posted))
    signs = [row["posting"] == sign for row, sign in ((back, -1), (posted, 1)) if row is not None]
    if told != expected or not all(signs):
        yield f"{where}: its rows do not add up to the difference that it says"
    for one, row in ((old, back), (new, posted)):
        named = _SAME[1:]
        if row is not None and (one is None or any(getattr(one, name) != row[name] for name in named)):
            yield f"{where}: it is of another model or kind of token than the call"


# ── The invoice ───────────────────────────────────────────────────────────────────────────────────────────────────────

_IDENTITY = (
    *("section", "corrects", "charge", "funding", "model", "token_type", "variant", "geo", "above"),
    *("per", "currency", "list_price", "unit_price", "unpriced"),
)


class Adding:
    """Adds rows up to the lines of an invoice."""

    def __init__(self) -> None:
        self._lines: dict[tuple[Any, ...], list[Any]] = {}

    def add(self, row: Row) -> None:
        """Count a row."""
        told = {**row, "section": _section(row), "unit_price": row["billed_price"]}
        line = self._lines.setdefault(tuple(told[name] for name in _IDENTITY), [0, ZERO, ZERO, 0])
        line[0] += row["quantity"]
        if not row["unpriced"] and row["list_cost"] is not None and row["billed_cost"] is not None:
            line[1], line[2] = plus(line[1], row["list_cost"]), plus(line[2], row["billed_cost"])
        line[3] += row["posting"]

    def differences(self, invoice: Invoice) -> Iterator[str]:
        """Where the invoice is not what the rows add up to."""
        lines = {key: line for key, line in self._lines.items() if line[0] or line[2] or (key[-1] and line[3])}
        told = {tuple(getattr(line, name) for name in _IDENTITY): line for line in invoice.lines}
        if len(told) != len(invoice.lines):
            yield "invoice.json: a line is there twice"
        for key in lines.keys() | told.keys():
            name = f"invoice.json, {key[4] or 'unknown model'} {key[5]}"
            if key not in told:
                yield f"{name}: rows have it, the invoice has no such line"
            elif key not in lines:
                yield f"{name}: the invoice has it, no rows do"
            elif not _same_line(told[key], lines[key]):
                yield f"{name}: quantity, cost or number of rows is not what the rows add up to"
        yield from _totals(invoice)


def _same_line(told: Line, line: Sequence[Any]) -> bool:
    quantity, listed, exact, rows = line
    costs = (None, None) if told.unpriced else (listed, exact)
    return (told.quantity, told.rows) == (quantity, rows) and (told.list_cost, told.exact) == costs


def _totals(invoice: Invoice) -> Iterator[str]:
    """Amounts are rounded as they should be, and add up."""
    currencies = {line.currency for line in invoice.lines if line.exact is not None}
    if currencies != {total.currency for total in invoice.totals} or len(currencies) != len(invoice.totals):
        yield "invoice.json: its totals are of other currencies than its lines"
    for total in invoice.totals:
        mine = [line for line in invoice.lines if line.exact is not None and line.currency == total.currency]
        result = rounded_lines([line.exact or ZERO for line in mine], total.currency)
        if result.lines != tuple(line.amount for line in mine):
            yield f"invoice.json: an amount in {total.currency} is not its exact cost, rounded"
        if (result.rounding, result.total, result.exact) != (total.rounding, total.total, total.exact):
            yield f"invoice.json: the total in {total.currency} is not what the lines add up to"
        own = ZERO
        for line in mine:
            own = plus(own, line.list_cost or ZERO) if line.section == "own_key" else own
        if own != total.own_key_list_cost:
            yield f"invoice.json: what own keys cost in {total.currency} is not what the lines add up to"
    unpriced = sum(max(0, sum(line.rows for line in invoice.lines if line.unpriced and bool(line.corrects) is late))
                   for late in (False, True))  # fmt: skip
    if unpriced != invoice.unpriced:
        yield "invoice.json: another number of rows has no price"
    if any(line.amount is not None for line in invoice.lines if line.exact is None):
        yield "invoice.json: a line without a price has an amount"


def _section(row: Row) -> SectionName:
    if row["funding"] == "own" and row["charge"] == "usage":
        return "own_key"
    if row["corrects"]:
        return "corrections"
    return "platform_fee" if row["charge"] == "platform_fee" else "usage"
