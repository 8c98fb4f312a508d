"""A service's end: Ctrl-C and SIGTERM are heard wherever it is, and heeded where nothing is half done."""

from __future__ import annotations

import os
import select
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class Stopping:
    """Remembers whether somebody wants the command to end; a context manager, behind which signals do what they did.

    Python raises KeyboardInterrupt wherever it happens to be. In a finalizer that is printed, and forgotten: the
    command would go on for ever. So nothing is raised but by `check`; and at once if a second signal comes.
    """

    def __init__(self) -> None:
        self._told = False
        self._hears, self._bell = os.pipe()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # which alone may say what a signal does
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._told:
            raise KeyboardInterrupt
        self._told = True
        os.write(self._bell, b"!")

    def check(self) -> None:
        """Raises KeyboardInterrupt if there was a signal."""
        if self._told:
            raise KeyboardInterrupt

    def sleep(self, seconds: float) -> None:
        """Return after so long; raises KeyboardInterrupt as soon as there is a signal."""
        select.select([self._hears], [], [], seconds)
        self.check()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        os.close(self._hears)
        os.close(self._bell)
