"""How reports are written down: cells that no spreadsheet runs, numbers that lose nothing, files that are whole."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from tempfile import mkstemp
from typing import Any, TextIO

from meterlib.billing.reports.answers import Answer, Column, Row, Value
from meterlib.core.money import plain
from meterlib.errors import InvalidInput

JSON_SAFE = 2**53
"""Integers from here on lose digits where JSON's numbers are read as doubles, so they are written as text."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def safe_cell(value: str | None) -> str:
    """A text cell that no spreadsheet takes for a formula."""
    if value is None:
        return ""
    return f"'{value}" if value.startswith(_FORMULA) or value.lstrip().startswith(_FORMULA) else value


def hint(name: str, known: Sequence[str]) -> str:
    """Which known name may have been meant."""
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def json_value(value: Value) -> str | int | None:
    """A value as JSON has it: decimals as text, and integers that a double cannot hold."""
    if isinstance(value, Decimal):
        return plain(value)
    if isinstance(value, int) and abs(value) >= JSON_SAFE:
        return str(value)
    return value


def json_object(names: Iterable[str], values: Iterable[Value]) -> dict[str, str | int | None]:
    """An object of these values."""
    return {name: json_value(value) for name, value in zip(names, values, strict=True)}


def dumped(document: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON with text as it is."""
    return json.dumps(document, indent=indent, ensure_ascii=False)


def csv_cell(column: Column, value: Value) -> str:
    """A cell of CSV: text is made safe, numbers have all their digits, and what is not known is empty."""
    if value is None:
        return ""
    return safe_cell(str(value)) if column.kind in ("key", "text") else _digits(value)


def _digits(value: Value) -> str:
    return plain(value) if isinstance(value, Decimal) else str(value)


def write_csv(out: TextIO, columns: Sequence[Column], rows: Iterable[Row]) -> None:
    """Write rows with a line of headings; nothing else, so that programs can read it."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([column.name for column in columns])
    for row in rows:
        writer.writerow([csv_cell(column, value) for column, value in zip(columns, row, strict=True)])


def write_jsonl(out: TextIO, answer: Answer, last: Iterable[Mapping[str, Any]]) -> None:
    """Write each row as an object on a line of its own, and then these objects."""
    names = [column.name for column in answer.columns]
    for row in answer.rows():
        print(dumped(json_object(names, row)), file=out)
    for one in last:
        print(dumped(one), file=out)


@contextmanager
def output(file: str | None) -> Iterator[TextIO]:
    """Where a report is written to: standard output, or a file that is there as a whole or not at all."""
    if file is None:
        yield sys.stdout
        return
    with whole_file(Path(file)) as scratch, scratch.open("w", encoding="utf-8", newline="") as stream:
        yield stream


def put(made: Path, file: str | None) -> None:
    """Bring a file that is made to where the report is to go."""
    if file is None:
        sys.stdout.flush()
        with made.open("rb") as stream:
            shutil.copyfileobj(stream, sys.stdout.buffer)
        return
    # Not `copyfile`, which refuses pipes.
    with whole_file(Path(file)) as place, made.open("rb") as stream, place.open("wb") as out:
        shutil.copyfileobj(stream, out)


def check_place(option: str, file: Path) -> None:
    """Raises InvalidInput unless a file can be written there; before anything is worked out that would go there."""
    if file.is_dir():
        raise InvalidInput(option, f"{file} is a folder; name a file in it")
    if not file.parent.is_dir():
        raise InvalidInput(option, f"there is no folder {file.parent}")
    new = file.parent if not file.exists() or file.is_file() else file
    if not os.access(new, os.W_OK):
        raise InvalidInput(option, f"nothing can be written to {new}: permission denied")


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A file to be written, which gets its name when it is done, and is removed if that fails; errors name the file.

    What is no file, such as `/dev/stdout` or a named pipe, is written to as it is: it must not become one.
    """
    check_place("--output", file)
    place = file.resolve()  # behind a link, since it is the file that is asked for
    try:
        if file.exists() and not file.is_file():
            yield file
            return
        with _scratch_for(place) as scratch:
            yield scratch
            scratch.replace(place)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error


@contextmanager
def _scratch_for(file: Path) -> Iterator[Path]:
    """An empty file beside the one to be, with a new file's rights; gone afterwards, unless it was renamed."""
    descriptor, name = mkstemp(prefix=f".{file.name[:100]}.", dir=file.parent)
    os.close(descriptor)
    scratch = Path(name)
    try:
        umask = os.umask(0)
        os.umask(umask)
        scratch.chmod(0o666 & ~umask)
        yield scratch
    finally:
        scratch.unlink(missing_ok=True)
