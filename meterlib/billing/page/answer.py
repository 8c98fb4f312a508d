"""One page with the table of a report, for people: what it adds up to, and whatever limits denied. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from meterlib.billing.page.html import Content, document, name_of, table, tag
from meterlib.billing.page.page import denials
from meterlib.billing.page.style import STYLE
from meterlib.billing.reports.denied import Denied

ROWS_MAX = 2_000
"""A page that browsers still scroll through; files of other formats have all rows."""


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """A report as texts.

    Attributes:
        title: what it is of.
        keys: how many columns, the first ones, say what a row is of.
        head: the headings.
        rows: a cell for each heading.
        total: the same of all rows.
        tiles: the numbers that matter most, each with its name.
        note: what the numbers mean.
        denied: how often limits denied meanwhile.
        footer: what to say about completeness, line by line.
    """

    title: str
    keys: int
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    total: Sequence[str]
    tiles: Sequence[tuple[str, str]]
    note: str
    denied: Sequence[Denied] = ()
    footer: Sequence[str] = ()


def answer_page(shown: Shown) -> str:
    """The page, as HTML."""
    title = shown.title[:1].upper() + shown.title[1:]
    tiles = [tag("li", tag("b", value), tag("span", name)) for name, value in shown.tiles]
    if shown.denied:
        count = sum(denied.count for denied in shown.denied)
        tiles.append(tag("li", tag("b", f"{count:,}"), tag("span", "denied calls")))
    header = tag("header", tag("h1", name_of(title)), tag("ul", *tiles, class_="tiles"))
    body = tag("main", header, tag("section", *_told(shown)), denials(shown.denied))
    return document(title, STYLE, body, tag("footer", *(tag("p", line) for line in shown.footer)))


def _told(shown: Shown) -> Iterable[Content]:
    if not shown.rows:
        return [tag("p", "No calls in this time.", class_="note")]
    rows: list[list[Content]] = [_row(row, shown.keys) for row in shown.rows[:ROWS_MAX]]
    numbers = table(shown.note, shown.head, rows, shown.total, texts=range(1, shown.keys))
    left = len(shown.rows) - ROWS_MAX
    more = f"{left:,} rows more are in the other formats, such as CSV; the last line counts them, too."
    return [numbers, tag("p", more, class_="note") if left > 0 else None]


def _row(cells: Sequence[str], keys: int) -> list[Content]:
    return [name_of(cell) if at < keys else cell for at, cell in enumerate(cells)]
