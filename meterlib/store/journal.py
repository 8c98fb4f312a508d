"""A local file of settlements that the store could not take: each is on disk before its caller goes on.

One JSON object a line, synced. Replaying is safe at any time and from any process: a settlement is idempotent under its
reservation's id, so one that did reach the store is answered again and not booked twice.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from meterlib.core.ledger import Settlement

_decode = msgspec.json.Decoder(Settlement).decode


class Waiting(NamedTuple):
    """A settlement that waits, and the line it stands in."""

    line: bytes
    settlement: Settlement


class Journal:
    """The file at `path`; several threads and processes may share it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def append(self, settlement: Settlement) -> None:
        """Becomes true: the settlement is on disk. Raises OSError where that cannot be had."""
        with self._locked():
            _append(self.path, [msgspec.json.encode(settlement)])

    def waiting(self) -> list[Waiting]:
        """What is to be replayed. A line that was cut short by a crash was never acknowledged, and is passed over."""
        found = []
        for line in _lines(self.path):
            try:
                found.append(Waiting(line, _decode(line)))
            except msgspec.DecodeError:
                continue
        return found

    def done(self, made: Sequence[Waiting], refused: Sequence[Waiting] = ()) -> None:
        """Becomes true: these are gone, and those appended meanwhile stay.

        What the store refused for good stands in a file beside this one, named `.refused`, for a person to look at.
        """
        if not made and not refused:
            return
        with self._locked():
            if refused:
                _append(self.path.with_name(self.path.name + ".refused"), [item.line for item in refused])
            over = {item.line for item in (*made, *refused)}
            _replace(self.path, [line for line in _lines(self.path) if line not in over])

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The lock is a file of its own, since the journal itself is replaced."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = self.path.with_name(self.path.name + ".lock")
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _lines(path: Path) -> list[bytes]:
    try:
        return [line for line in path.read_bytes().split(b"\n") if line]
    except FileNotFoundError:
        return []


def _append(path: Path, lines: Iterable[bytes]) -> None:
    """Each line begins anew, so that one cut short by a crash spoils no other."""
    data = b"".join(b"\n" + line + b"\n" for line in lines)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(path: Path, lines: Iterable[bytes]) -> None:
    aside = path.with_name(path.name + ".new")
    aside.unlink(missing_ok=True)
    _append(aside, lines)
    aside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
