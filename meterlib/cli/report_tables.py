"""Reports from the archive as tables of text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stdout
from decimal import Decimal
from typing import TextIO

from meterlib.billing.page.answer import Shown
from meterlib.billing.reports.answers import Answer, Totals, Value
from meterlib.billing.reports.answers import Column as Told
from meterlib.billing.reports.denied import Denied
from meterlib.billing.reports.query import COSTS
from meterlib.billing.reports.retries import TOKENS
from meterlib.cli.report_live import ALWAYS_SHOWN, HEADINGS
from meterlib.cli.tables import Column, print_table
from meterlib.cli.times import at_text

AT_LEAST = "at least "
_ALWAYS = {
    "usage": ("quantity", *ALWAYS_SHOWN),
    "cost": ("quantity", *COSTS, "margin"),
    "limits": ("calls", "over", "overrun_percent", "median", "p95", "expired", "tokens_at_risk"),
    "retries": ("calls", "retried", "tries", "gave_up_streaming", "unanswered", "extra_input_tokens"),
}
_HEADINGS = {
    **HEADINGS,
    "unsplit_cache_creation_input_tokens": "write unsplit",
    **{cost: cost.removesuffix("_cost") for cost in COSTS},
    "overrun_percent": "overrun %",
    "tokens_at_risk": "tokens at risk",
    "gave_up_streaming": "gave up streaming",
    **{f"extra_{name}": f"extra {HEADINGS[name]}" for name in TOKENS},
}
_NOTES = {
    "limits": "Input tokens that calls were charged, beside what was estimated before them; and what was reserved and"
    " never settled",
    "retries": "Calls that were made again because their answer did not come, and what all tries but the last used",
}
_MONEY_DIGITS = 2


def print_answer(out: TextIO, report: str, answer: Answer) -> None:
    """Print a title and a table; columns that are 0 everywhere are left out, but for those that are always there."""
    with redirect_stdout(out):
        print(title_of(report, answer))
        print()
        columns, lines, totals = _texts(report, answer)
        if not lines:
            print("no rated rows" if report == "cost" else "no entries")
            return
        headings = [
            Column(_HEADINGS.get(name, name), number=kind not in ("key", "text"), key=kind in ("key", "text"))
            for name, kind in columns
        ]
        *others, last = totals
        print_table(headings, [*lines, *others], last)


def shown(report: str, answer: Answer, denials: Sequence[Denied], footer: Sequence[str]) -> Shown:
    """The same for a page."""
    columns, lines, (total,) = _texts(report, answer)
    return Shown(
        title=title_of(report, answer),
        keys=len(answer.by),
        head=[_HEADINGS.get(column.name, column.name) for column in columns],
        rows=lines,
        total=total,
        tiles=[
            (_HEADINGS.get(column.name, column.name), cell)
            for column, cell in zip(columns, total, strict=True)
            if column.name in _ALWAYS[report]
        ],
        note=_NOTES[report],
        denied=denials,
        footer=footer,
    )


def _texts(report: str, answer: Answer) -> tuple[list[Told], list[list[str]], list[list[str]]]:
    """The columns that are shown, the cells of each row, and those of each total."""
    shown = [at for at, column in enumerate(answer.columns) if _is_shown(report, answer, at, column)]
    columns = [answer.columns[at] for at in shown]
    floor = next((at for at, column in enumerate(answer.columns) if column.name == "unpriced"), None)
    lines = [
        [_cell(answer.columns[at], row[at], floor is not None and bool(row[floor])) for at in shown]
        for row in answer.rows()
    ]
    return columns, lines, [_total_line(columns, totals, is_floor(answer)) for totals in answer.totals]


def is_floor(answer: Answer) -> bool:
    """Whether what was used came to more than any total says, since something of it has no price: in no currency."""
    return any(totals.get("unpriced") for totals in answer.totals)


def print_denials(out: TextIO, denials: Sequence[Denied]) -> None:
    """Print how often limits denied, as far as gateways counted it; nothing where they counted none."""
    if not denials:
        return
    with redirect_stdout(out):
        print("\ndenied calls, by tenant and limit\n")
        headings = [Column("tenant", key=True), Column("limit", key=True), Column("denied", number=True)]
        rows = [[one.tenant, one.limit, f"{one.count:,}"] for one in denials]
        print_table(headings, rows, ["total", "", f"{sum(one.count for one in denials):,}"])


def title_of(report: str, answer: Answer) -> str:
    """What the table is of."""
    query = answer.query
    whose = report if query.tenant is None else f"{report} of {query.tenant}"
    period = "" if query.period is None else f" in {query.period}"
    since = "" if query.since_ms is None else f" from {at_text(query.since_ms, query.tz)}"
    until = "" if query.until_ms is None else f" until {at_text(query.until_ms, query.tz)}"
    basis = "" if query.time_basis == "booked" else ", by when calls were made"
    currencies = {str(totals["currency"]) for totals in answer.totals if totals.get("currency")}
    currency = f" in {currencies.pop()}" if len(currencies) == 1 else ""
    return f"{whose}{currency}{period}{since}{until}, by {', '.join(answer.by)} ({query.tz}{basis})"


def _is_shown(report: str, answer: Answer, at: int, column: Told) -> bool:
    if column.kind == "key" or column.name in _ALWAYS[report]:
        return True
    if column.kind == "text":
        return len(answer.totals) > 1
    return any(totals.get(column.name) for totals in answer.totals)


def _total_line(columns: list[Told], totals: Totals, floor: bool) -> list[str]:
    cells = [_cell(column, totals.get(column.name), floor) if column.kind not in ("key",) else "" for column in columns]
    return ["total", *cells[1:]] if columns and columns[0].kind == "key" else cells


def _cell(column: Told, value: Value, floor: bool) -> str:
    """A cell; of costs, a floor is marked, and what is not known is none."""
    if value is None:
        return "-"
    if isinstance(value, Decimal):
        least = AT_LEAST if floor and column.name in COSTS else ""
        return f"{least}{money_text(value)}" if column.kind == "cost" else f"{value:,.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def money_text(amount: Decimal) -> str:
    """All digits of an amount that say something, and at least two behind the point."""
    whole, _, decimals = f"{amount:,f}".partition(".")
    return f"{whole}.{decimals.rstrip('0').ljust(_MONEY_DIGITS, '0')}"
