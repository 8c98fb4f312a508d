"""An invoice as a page for people, which prints on A4. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from decimal import Decimal

from meterlib.billing.page.html import Content, Html, document, name_of, table, tag
from meterlib.billing.page.style import INVOICE_STYLE, STYLE
from meterlib.billing.reports.invoice import SECTIONS, Invoice, Line, SectionName, Total
from meterlib.core.money import plain
from meterlib.core.periods import zone

_PER = {1_000_000: "1M tokens", 1_000: "1,000 requests"}
_NO_PRICE = "no price"


def invoice_page(invoice: Invoice, issuer: str = "", footer: Sequence[str] = ()) -> str:
    """The page, as HTML.

    Args:
        invoice: of one tenant and period.
        issuer: who issues it; may be empty.
        footer: what to say about completeness, line by line.
    """
    title = f"{_kind(invoice)} {invoice.period} for {invoice.tenant}"
    sections = (_section(invoice, name) for name in SECTIONS)
    body = tag("main", _header(invoice, issuer), *sections, *(_total(invoice, total) for total in invoice.totals))
    if not invoice.totals:
        body = tag("main", _header(invoice, issuer), tag("p", "Nothing was used in this period; nothing is owed."))
    said = (
        "Amounts are exact products of quantity and price, each rounded half to even to what can be paid; the line"
        " 'rounding' makes them add up to the rounded sum of the exact amounts."
    )
    foot = tag("footer", *(tag("p", line) for line in (*footer, said)))
    return document(title, STYLE + INVOICE_STYLE, body, foot)


def _kind(invoice: Invoice) -> str:
    return "Invoice" if invoice.closed else "Draft of an invoice"


def _header(invoice: Invoice, issuer: str) -> Html:
    warnings = []
    if not invoice.closed:
        warnings.append("The period is not closed: what is booked or corrected until then will change this draft.")
    if invoice.unpriced > 0:
        lines = "1 use has" if invoice.unpriced == 1 else f"{invoice.unpriced:,} uses have"
        warnings.append(f"{lines} no price yet, so what is owed is at least the total below.")
    first = datetime.fromtimestamp(invoice.from_ms // 1000, zone(invoice.tz))
    last = datetime.fromtimestamp(invoice.until_ms // 1000, zone(invoice.tz)) - timedelta(days=1)
    return tag(
        "header",
        tag("p", issuer, class_="issuer") if issuer else None,
        tag("h1", f"{_kind(invoice)} {invoice.period}"),
        *(tag("p", text, class_="warn", role="note") for text in warnings),
        tag(
            "div",
            tag("div", tag("p", "For", class_="meta"), tag("p", name_of(invoice.tenant), class_="due")),
            tag(
                "dl",
                *_told("Period", f"{first:%Y-%m-%d} to {last:%Y-%m-%d} ({invoice.tz})"),
                *_told("Status", "closed" if invoice.closed else "open"),
                *(
                    part
                    for total in invoice.totals
                    for part in _told("Due, at least" if invoice.unpriced > 0 else "Due", _owed(total), class_="due")
                ),
            ),
            class_="letter",
        ),
    )


def _told(term: str, text: str, class_: str | None = None) -> tuple[Html, Html]:
    return tag("dt", term), tag("dd", text, class_=class_)


def _section(invoice: Invoice, name: SectionName) -> Html | None:
    lines = invoice.section(name)
    if not lines:
        return None
    what = "at list price" if name == "own_key" else "amount"
    head = ["model", "what", "quantity", "unit price", "for each", what]
    rows = [_row(line, own=name == "own_key") for line in lines]
    caption = {
        "own_key": "For information: the provider bills this usage, and nothing of it is owed here",
        "corrections": "Differences to what was invoiced for earlier periods",
    }.get(name, "Each call is priced on its own; a line is the sum of what has the same price")
    return tag("section", tag("h2", SECTIONS[name]), table(caption, head, rows, texts=(1,)))


def _row(line: Line, *, own: bool) -> list[Content]:
    price, cost = (line.list_price, line.list_cost) if own else (line.unit_price, line.amount)
    quantity = f"{line.quantity:,}" if line.quantity or not line.unpriced else "not known"
    if price is None or cost is None:
        return [name_of(line.model or "unknown"), _what(line), quantity, _NO_PRICE, None, tag("i", line.unpriced)]
    shown = _exact(cost) if own else f"{cost:,f}"
    return [
        name_of(line.model or "unknown"),
        _what(line),
        quantity,
        _exact(price),
        _PER.get(line.per, f"{line.per:,}"),
        f"{shown} {line.currency}",
    ]


def _what(line: Line) -> str:
    """The kind of a line and whatever else makes its price, in words."""
    told = [
        line.token_type.replace("_", " "),
        "" if line.variant == "standard" else line.variant,
        "" if line.geo == "global" else f"in {line.geo}",
        f"prompts over {line.above:,} tokens" if line.above else "",
        f"of {line.corrects}" if line.corrects else "",
    ]
    return ", ".join(part for part in told if part)


def _total(invoice: Invoice, total: Total) -> Html:
    lines: list[list[Content]] = [
        ["sum of exact amounts", f"{_exact(total.exact)} {total.currency}"],
        ["rounding", f"{total.rounding:,f} {total.currency}"],
    ]
    if total.own_key_list_cost:
        lines.append(["own keys, at list price (not owed)", f"{_exact(total.own_key_list_cost)} {total.currency}"])
    due = "Due, at least" if invoice.unpriced > 0 else "Due"
    return tag(
        "section",
        tag("h2", "Total" if len(invoice.totals) == 1 else f"Total in {total.currency}"),
        table("Without taxes", ["", "amount"], lines, [due, _owed(total)]),
        class_="total",
    )


def _owed(total: Total) -> str:
    return f"{total.total:,f} {total.currency}"


def _exact(amount: Decimal) -> str:
    whole, dot, rest = plain(amount).partition(".")
    sign = "-" if whole.startswith("-") else ""
    return f"{sign}{int(whole.lstrip('-')):,}{dot}{rest}"
