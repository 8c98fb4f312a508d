"""Tables of text: drawn by rich on a terminal, if it is installed; else aligned with spaces, as programs like them."""

from __future__ import annotations

import shutil
import sys
import unicodedata
from collections.abc import Sequence
from typing import Literal, NamedTuple

GAP = 2
_GAP_DRAWN = 3


class Column(NamedTuple):
    """A heading, over numbers or text. Key columns stand at the left of each piece of a table that is too wide."""

    heading: str
    number: bool = False
    key: bool = False


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], total: Sequence[str] | None = None) -> None:
    """Print a table; on a terminal that is too narrow for it, in pieces that fit, below each other."""
    lines = [*rows, *([total] if total else [])]
    widths = [
        max(len_of(text) for text in (*_words(column), *(row[at] for row in lines)))
        for at, column in enumerate(columns)
    ]
    terminal = sys.stdout.isatty()
    pieces = _pieces(columns, widths, shutil.get_terminal_size().columns if terminal else None)
    for piece in pieces:
        if piece != pieces[0]:
            print()
        shown = [columns[at] for at in piece]
        cells = [[row[at] for at in piece] for row in lines]
        if not (terminal and _draw(shown, cells, bool(total))):
            _print_plain(shown, cells, [widths[at] for at in piece], bool(total))


def len_of(text: str) -> int:
    """How many cells of a terminal a text takes."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)


def _words(column: Column) -> list[str]:
    """Headings of numbers take a line for each word, so that the column is as narrow as its numbers."""
    return column.heading.split() if column.number else [column.heading]


def _pieces(columns: Sequence[Column], widths: Sequence[int], width: int | None) -> list[list[int]]:
    keys = [at for at, column in enumerate(columns) if column.key]
    rest = [at for at, column in enumerate(columns) if not column.key]
    if width is None:
        return [[*keys, *rest]]
    taken_by_keys = min(sum(widths[at] + _GAP_DRAWN for at in keys), width // 2)  # rich folds longer names
    pieces: list[list[int]] = []
    taken = width + 1
    for at in rest:
        if taken + widths[at] > width:
            pieces.append([*keys])
            taken = taken_by_keys
        pieces[-1].append(at)
        taken += widths[at] + _GAP_DRAWN
    return pieces or [keys]


def _print_plain(columns: Sequence[Column], rows: Sequence[Sequence[str]], widths: Sequence[int], total: bool) -> None:
    height = max(len(_words(column)) for column in columns)
    headings = [[""] * (height - len(_words(column))) + _words(column) for column in columns]
    for line in range(height):
        print(_line(columns, [heading[line] for heading in headings], widths))
    print(" ".join("-" * width + " " for width in widths).rstrip())
    for at, row in enumerate(rows):
        if total and at == len(rows) - 1:
            print(" ".join("-" * width + " " for width in widths).rstrip())
        print(_line(columns, row, widths))


def _line(columns: Sequence[Column], row: Sequence[str], widths: Sequence[int]) -> str:
    cells = []
    for column, text, width in zip(columns, row, widths, strict=True):
        padding = " " * (width - len_of(text))
        cells.append(padding + text if column.number else text + padding)
    return (" " * GAP).join(cells).rstrip()


def _draw(columns: Sequence[Column], rows: Sequence[Sequence[str]], total: bool) -> bool:
    """Draw with rich; False if it is not installed."""
    try:
        from rich.box import SIMPLE
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table(box=SIMPLE, pad_edge=False, show_edge=False)
    for column in columns:
        side: Literal["left", "right"] = "right" if column.number else "left"
        style = "bold" if column.key else ""
        heading = Text("\n".join(_words(column)), justify=side)
        table.add_column(heading, justify=side, vertical="top", overflow="fold", no_wrap=column.number, style=style)
    for at, row in enumerate(rows):
        last = total and at == len(rows) - 1
        if last:
            table.add_section()
        # As Text, since names may hold what rich would take for markup.
        table.add_row(*(Text(text) for text in row), style="bold" if last else "")
    Console().print(table)
    return True
