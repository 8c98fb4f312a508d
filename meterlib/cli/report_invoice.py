"""An invoice as text, as JSON, as CSV and as Parquet."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from decimal import Decimal
from pathlib import Path
from typing import Any, TextIO

import msgspec

from meterlib.billing import duck
from meterlib.billing.reports.invoice import SECTIONS, Invoice, Line, SectionName
from meterlib.cli.report_formats import dumped, safe_cell
from meterlib.cli.report_tables import AT_LEAST, money_text
from meterlib.cli.tables import Column, print_table
from meterlib.cli.times import at_text
from meterlib.core.money import plain

COLUMNS = {
    **dict.fromkeys(("section", "corrects", "charge", "model", "token_type", "variant", "geo"), "VARCHAR"),
    **dict.fromkeys(("above", "quantity", "per"), "DECIMAL(38,0)"),
    "currency": "VARCHAR",
    **dict.fromkeys(("list_price", "unit_price", "list_cost", "exact", "amount"), "DECIMAL(38,12)"),
    "unpriced": "VARCHAR",
}
"""Of CSV and Parquet, and their types in the latter."""
_HEADINGS = ("model", "type", "served", "quantity", "per", "unit price", "amount")


def print_invoice(out: TextIO, invoice: Invoice) -> None:
    """Print the lines of each section, and the totals."""
    with redirect_stdout(out):
        since, until = at_text(invoice.from_ms, invoice.tz), at_text(invoice.until_ms, invoice.tz)
        print(f"invoice of {invoice.tenant} for {invoice.period}, from {since} until {until} ({invoice.tz})")
        print("the period is closed" if invoice.closed else "OPEN: the period is not closed; amounts may still change")
        for name, heading in SECTIONS.items():
            _print_section(invoice, name, heading)
        if not invoice.lines:
            print("\nno rated usage")
        for total in invoice.totals:
            least = AT_LEAST if invoice.unpriced else ""
            print()
            print(f"rounding {plain_money(total.rounding)} {total.currency} (exact sum {money_text(total.exact)})")
            print(f"total {least}{plain_money(total.total)} {total.currency}")


def _print_section(invoice: Invoice, name: SectionName, heading: str) -> None:
    lines = invoice.section(name)
    if not lines:
        return
    print(f"\n{heading}\n")
    own = name == "own_key"
    headings = [Column(text, key=at < 3, number=at > 2) for at, text in enumerate(_HEADINGS)]
    if own:
        headings[-2:] = [Column("list price", number=True), Column("list cost", number=True), headings[-1]]
    if name == "corrections":
        headings = [Column("corrects", key=True), Column("charge", key=True), *headings]
    print_table(headings, [_cells(name, line) for line in lines])


def _cells(name: SectionName, line: Line) -> list[str]:
    price = line.list_price if name == "own_key" else line.unit_price
    cells = [line.model or "-", line.token_type, _served(line), f"{line.quantity:,}", f"{line.per:,}"]
    cells.append("unpriced" if price is None else money_text(price))
    if name == "own_key":
        cells.append("-" if line.list_cost is None else money_text(line.list_cost))
    cells.append("-" if line.amount is None else plain_money(line.amount))
    return [line.corrects, line.charge, *cells] if name == "corrections" else cells


def _served(line: Line) -> str:
    """What besides model and type makes the price."""
    told = [word for word, plain in ((line.variant, "standard"), (line.geo, "global")) if word != plain]
    if line.above:
        told.append(f"prompt above {line.above:,}")
    return ", ".join(told) or "-"


def plain_money(amount: Decimal) -> str:
    """A rounded amount with all its decimals."""
    return f"{amount:,f}"


def invoice_document(invoice: Invoice) -> dict[str, Any]:
    """An invoice as JSON has it: all decimals as text."""
    return {
        "report": "invoice",
        **{name: getattr(invoice, name) for name in ("tenant", "period", "tz")},
        "since": at_text(invoice.from_ms, invoice.tz),
        "until": at_text(invoice.until_ms, invoice.tz),
        "closed": invoice.closed,
        "unpriced": invoice.unpriced,
        "lines": [_object(line) for line in invoice.lines],
        "totals": [{**_object(total), "at_least": bool(invoice.unpriced)} for total in invoice.totals],
    }


def _object(record: msgspec.Struct) -> dict[str, Any]:
    return {
        name: _text(name, value) if isinstance(value, Decimal) else value
        for name, value in msgspec.structs.asdict(record).items()
    }


def _text(name: str, value: Decimal) -> str:
    """What is rounded keeps the decimals that it was rounded to."""
    return f"{value:f}" if name in ("amount", "rounding", "total") else plain(value)


def invoice_jsonl(out: TextIO, document: Mapping[str, Any]) -> None:
    """Write an object for each line, one with what the invoice is of, and one for each other part of the document."""
    for line in document["lines"]:
        print(dumped(line), file=out)
    parts = ("totals", "completeness")
    print(dumped({"invoice": {name: document[name] for name in document if name not in ("lines", *parts)}}), file=out)
    for part in parts:
        print(dumped({part: document[part]}), file=out)


def invoice_csv(out: TextIO, invoice: Invoice) -> None:
    """Write a row for each line, and for each currency one for the rounding and one for the total."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in _rows(invoice):
        writer.writerow([_cell(name, row.get(name)) for name in COLUMNS])


def invoice_parquet(file: Path, connection: Any, invoice: Invoice, metadata: str) -> None:
    """Write the same rows to a file, and a text into its metadata, under the key `meterlib`.

    Args:
        file: where to.
        connection: of DuckDB; a table is left in it.
        invoice: what.
        metadata: the text.
    """
    columns = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
    connection.execute(f"CREATE OR REPLACE TABLE invoice (place INTEGER, {columns})")
    marks = ", ".join("?" * (len(COLUMNS) + 1))
    for place, row in enumerate(_rows(invoice)):
        connection.execute(f"INSERT INTO invoice VALUES ({marks})", [place, *(row.get(name) for name in COLUMNS)])
    duck.write_parquet(connection, "SELECT * EXCLUDE place FROM invoice ORDER BY place", file, metadata)


def _rows(invoice: Invoice) -> Iterator[Mapping[str, Any]]:
    for line in invoice.lines:
        yield msgspec.structs.asdict(line)
    for total in invoice.totals:
        yield {"section": "rounding", "currency": total.currency, "amount": total.rounding}
        yield {"section": "total", "currency": total.currency, "amount": total.total, "exact": total.exact}


def _cell(name: str, value: object) -> str:
    if isinstance(value, Decimal):
        return _text(name, value)
    return "" if value is None else safe_cell(value) if isinstance(value, str) else str(value)
