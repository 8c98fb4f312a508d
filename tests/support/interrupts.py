"""Ctrl-C at each moment at which a program writes to a folder, one moment a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_EVENTS = ("open", "os.rename", "os.link", "os.mkdir", "os.chmod", "tempfile.mkstemp", "tempfile.mkdtemp")
"""Not `os.remove`: a Ctrl-C between that decision and its deed is one in a million, and none can be told from it."""


class Moments:
    """How often something was written below some folders, and which of these moments comes with a Ctrl-C."""

    def __init__(self, folders: tuple[str, ...], at: int) -> None:
        self.folders, self.at = folders, at
        self.passed = 0
        self.events: list[str] = []

    def see(self, event: str, path: object) -> None:
        """An event that is about to happen."""
        if isinstance(path, str) and path.startswith(self.folders):
            self.passed += 1
            self.events.append(f"{event} {path}")
            if self.passed == self.at:
                raise KeyboardInterrupt


_armed: list[Moments] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _armed and event in _EVENTS and (event != "open" or _writes(arguments)):
        path = arguments[0]
        _armed[-1].see(event, path.decode() if isinstance(path, bytes) else str(path))


def _writes(arguments: tuple[object, ...]) -> bool:
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


sys.addaudithook(_hook)


@contextmanager
def interrupted(at: int, *folders: object) -> Iterator[Moments]:
    """Within it, the `at`-th write below these folders is a Ctrl-C before it is done."""
    moments = Moments(tuple(map(str, folders)), at)
    _armed.append(moments)
    try:
        yield moments
    finally:
        _armed.remove(moments)
