"""A local file of settlements that could not reach the store: each is on disk before its caller goes on.

One JSON object a line, synced. Replaying is safe at any time and from any process: a settlement is idempotent under its
reservation's id, so one that did reach the store is answered again and not booked twice.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from meterlib.core.ledger import Settlement


class Journal:
    """The file at `path`; several threads and processes may share it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def append(self, settlement: Settlement) -> None:
        """Becomes true: the settlement is on disk. Raises OSError where that cannot be had."""
        line = msgspec.json.encode(settlement) + b"\n"
        with self._locked() as descriptor:
            os.write(descriptor, line)
            os.fsync(descriptor)

    def pending(self) -> list[Settlement]:
        """What is to be replayed; a line that was cut short by a crash was never acknowledged, and is passed over."""
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        return [msgspec.json.decode(line, type=Settlement) for line in lines[:-1] if line]

    def drop(self, count: int) -> None:
        """Becomes true: the first `count` settlements are gone; those appended meanwhile stay."""
        with self._locked() as descriptor:
            data = self.path.read_bytes()
            rest = data.split(b"\n", count)[count] if count else data
            aside = self.path.with_suffix(self.path.suffix + ".new")
            with aside.open("wb") as file:
                file.write(rest)
                file.flush()
                os.fsync(file.fileno())
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, rest, 0)
            os.fsync(descriptor)
            aside.unlink()

    @contextmanager
    def _locked(self) -> Iterator[int]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)
