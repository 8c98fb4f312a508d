"""A command at a terminal of its own: what a person would see there, and the keys that they would press."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import meterlib

ROOT = Path(meterlib.__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
"""In which a process of its own finds this checkout's meterlib, wherever it runs."""
PATIENCE_S = 30.0
CTRL_C = b"\x03"
_PIECE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


class Screen:
    """The lines that a terminal shows once it got this; only what progress displays are made of is known.

    Attributes:
        lines: what is seen in the end.
        ever: every line that was ever seen, in order.
    """

    def __init__(self, text: str) -> None:
        self.lines, self.ever = [""], list[str]()
        self._row = self._column = 0
        for piece in _PIECE.finditer(text):
            argument, command, control, written = piece.groups()
            if written:
                self._write(written)
            elif control:
                self._move(control)
            else:
                self._command(argument, command)

    def _write(self, text: str) -> None:
        line = self.lines[self._row].ljust(self._column)
        self.lines[self._row] = line[: self._column] + text + line[self._column + len(text) :]
        self._column += len(text)

    def _move(self, control: str) -> None:
        self.ever.append(self.lines[self._row])
        self._column = 0
        if control == "\n":
            self._row += 1
            self.lines += [""] * (self._row + 1 - len(self.lines))

    def _command(self, argument: str, command: str) -> None:
        if command == "K":
            self.lines[self._row] = "" if argument == "2" else self.lines[self._row][: self._column]
        elif command == "A":
            self._row = max(0, self._row - int(argument or 1))
        elif command not in "mhl":  # colours, and whether the cursor is shown
            raise NotImplementedError(f"ESC[{argument}{command}")


class AtTerminal:
    """A Python program whose standard error, and input, is a terminal; its output goes to a file, or to the terminal.

    Args:
        code: the program.
        words: its arguments.
        columns: how wide the terminal is.
        out: where its standard output goes; None for the terminal.
        environment: variables besides.
    """

    def __init__(
        self, code: str, words: Sequence[str], *, columns: int = 100, out: IO[bytes] | None = None, **environment: str
    ) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        variables = ENVIRONMENT | {"TERM": "xterm", **environment}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _IN_FRONT + code, *words],
            stdin=slave, stdout=slave if out is None else out, stderr=slave, env=variables, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self._seen = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._master)

    def press(self, keys: bytes) -> None:
        """Type something."""
        os.write(self._master, keys)

    def wait_for(self, pattern: str, times: int = 1) -> None:
        """Return once so many texts were shown that match this, each another one."""
        self._read(lambda: len(set(re.findall(pattern, self._seen.decode(errors="replace")))) >= times)

    def ended(self) -> tuple[int, Screen]:
        """Its exit code, and what it has shown."""
        self._read(lambda: False)
        return self._process.wait(PATIENCE_S), Screen(self._seen.decode())

    def _read(self, enough: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not enough():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([self._master], [], [], left_s)[0]:
                raise TimeoutError(self._seen.decode(errors="replace"))
            try:
                piece = os.read(self._master, 65536)
            except OSError:  # nobody has the other end any more
                return
            if not piece:
                return
            self._seen += piece


# The terminal is the new session's own, so that Ctrl-C reaches the program.
_IN_FRONT = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
"""
