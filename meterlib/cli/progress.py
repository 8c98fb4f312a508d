"""How far a long read is, shown on a terminal's standard error after a moment, and wiped out when it is done."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

PATIENCE_S = 0.5


class Progress:
    """Counts entries up to `total`; nothing is shown where nobody watches, or when it is over at once."""

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._done = 0
        self._since_s = time.monotonic()
        self._shown: Any = None
        self._watched = sys.stderr.isatty()

    def __enter__(self) -> Self:
        return self

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        before, self._done = self._done, self._done + count
        often = before // 500 != self._done // 500
        if self._watched and often and time.monotonic() - self._since_s > PATIENCE_S:
            self._show()

    def _show(self) -> None:
        total = max(self._total, self._done)  # the ledger may be growing
        if self._shown is None:
            self._shown = _bar(self._what, total) or _Line(self._what)
        rate = self._done / (time.monotonic() - self._since_s)
        self._shown.update(0, completed=self._done, total=total, rate=rate)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown is not None:
            self._shown.stop()


def _bar(what: str, total: int) -> Any:
    """A bar, if rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
    except ImportError:
        return None
    counted = TextColumn("{task.completed:,.0f} of {task.total:,.0f}, {task.fields[rate]:,.0f}/s")
    columns = (TextColumn("{task.description}"), BarColumn(), counted, TimeRemainingColumn())
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    bar.add_task(what, total=total, rate=0)
    bar.start()
    return bar


class _Line:
    """One line that is written over and over."""

    def __init__(self, what: str) -> None:
        self._what = what

    def update(self, task: int, *, completed: int, total: int, rate: float) -> None:
        """Show how far it is, and how long it will take."""
        left_s = (total - completed) / rate
        text = f"{self._what}: {completed:,} of {total:,}, {rate:,.0f}/s, {left_s:,.0f} s left"
        print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Wipe the line out."""
        print("\r\033[K", end="", file=sys.stderr, flush=True)
