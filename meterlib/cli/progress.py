"""How far a long read is, shown on a terminal's standard error after a moment, and wiped out when it is done."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

PATIENCE_S = 0.5
TICK_S = 0.5


class Progress:
    """Counts entries up to `total`; nothing is shown where nobody watches, or when it is over at once.

    Args:
        what: is done to them.
        total: how many there are.
        check: is called as it goes; what it raises ends the work.
    """

    def __init__(self, what: str, total: int = 0, check: Callable[[], None] = lambda: None) -> None:
        self._what = what
        self._total = total
        self._check = check
        self._done = 0
        self._since_s = time.monotonic()
        self._shown: Any = None
        self._watched = is_watched()

    def __enter__(self) -> Self:
        return self

    def expect(self, total: int) -> None:
        """So many there are."""
        self._total = total

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self._check()
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
        _overwrite(f"{self._what}: {completed:,} of {total:,}, {rate:,.0f}/s, {left_s:,.0f} s left")

    def stop(self) -> None:
        """Wipe the line out."""
        _overwrite("")


class Phases:
    """Tells what a command is at, and for how long, where nothing counts how far that is; a context manager.

    A thread keeps the time, since what takes long is a query of which nobody hears before it is done.
    """

    def __init__(self) -> None:
        self._phase = ""
        self._began_s = time.monotonic()
        self._over = threading.Event()
        self._writing = threading.Lock()
        self._shown = False
        self._clock = threading.Thread(target=self._tick, daemon=True) if is_watched() else None

    def __enter__(self) -> Self:
        if self._clock is not None:
            self._clock.start()
        return self

    def __call__(self, phase: str) -> None:
        """From now on it is at this."""
        self._phase = phase
        self._show()

    def _tick(self) -> None:
        while not self._over.wait(TICK_S):
            self._show()

    def _show(self) -> None:
        took_s = time.monotonic() - self._began_s
        if self._clock is None or took_s < PATIENCE_S:
            return
        with self._writing:
            if self._phase and not self._over.is_set():
                self._shown = True
                _overwrite(f"{self._phase}, {took_s:,.0f} s")

    def done(self) -> None:
        """Nothing is shown any more: what is printed now has the terminal for itself."""
        self._over.set()
        with self._writing:
            if self._shown:
                self._shown = False
                _overwrite("")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.done()
        if self._clock is not None:
            self._clock.join()


def is_watched() -> bool:
    """Whether somebody looks at standard error, on a terminal where a line can be wiped out."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _overwrite(text: str) -> None:
    """Put a text in the place of the line before; cut where the terminal ends, since only one is wiped out."""
    with suppress(OSError, ValueError):  # whoever looked has gone: no reason to stop
        width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        print(f"\r{text[: width - 1]}\033[K", end="", file=sys.stderr, flush=True)
