"""Lines that wait to be written to a sink, and the work folder in which those of an archive do."""

from __future__ import annotations

import fcntl
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp

import msgspec

from meterlib.billing.archive.rows import chained
from meterlib.billing.archive.segments import Position, Range
from meterlib.errors import IntegrityError

_PREFIX = ".work-"


class Work:
    """A folder for temporary files, locked for as long as its owner lives.

    The lock goes with the process, however that ends; so whoever comes next can tell a killed exporter's folder from
    that of one at work, and removes it.
    """

    def __init__(self, parent: Path) -> None:
        for left in parent.glob(f"{_PREFIX}*"):
            _remove_if_left(left)
        while True:
            self.folder = Path(mkdtemp(prefix=_PREFIX, dir=parent))
            self._lock = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if self.folder.exists():  # else somebody took it for left behind, before it was locked
                return
            os.close(self._lock)

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def _remove_if_left(folder: Path) -> None:
    with suppress(OSError):
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(lock)


def _is_text(data: bytes) -> bool:
    if data.isascii():
        return True
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def odd(shard: int, n: int, reason: str) -> IntegrityError:
    """What to say of an entry that cannot be told in columns."""
    return IntegrityError(
        "unreadable",
        f"entry {shard}:{n} cannot be exported: {reason}; a later version of meterlib may have written it. To let the"
        f" others pass, go on with --set-aside {shard}:{n}, which keeps it apart",
        (f"{shard}:{n}",),
    )


def aside_document(shard: int, epoch: str, n: int, fields: Mapping[bytes, bytes]) -> bytes:
    """An entry that is set aside, as JSON; values may be anything, and stand as base64."""
    values = {name.decode(errors="backslashreplace"): value for name, value in fields.items()}
    return msgspec.json.encode({"shard": shard, "epoch": epoch, "n": n, "fields": values})


class Draft(ABC):
    """Lines that go into a sink in one piece, and where they stand there.

    Attributes:
        follows: the position that they follow.
        first, last: their numbers.
        link: the link behind the last one.
        size: bytes of all lines, without their ends.
        longest: bytes of the longest one.
    """

    def __init__(self, shard: int, epoch: str, first: int, position: Position) -> None:
        self.shard = shard
        self.epoch = epoch
        self.follows = position
        self.first = first
        self.last = first - 1
        self.link = position.link
        self.size = 0
        self.longest = 0

    def add(self, lines: Sequence[bytes], unknown: Iterable[str] = ()) -> None:
        """Take up the next lines, and names in them that no column is made of."""
        if not lines:
            return
        text = b"\n".join(lines)
        if b"\n" in b"".join(lines) or not _is_text(text):
            at = next(at for at, line in enumerate(lines) if b"\n" in line or not _is_text(line))
            if at:
                self.add(lines[:at], unknown)
            raise odd(self.shard, self.last + 1, "it has what is no printable text")
        self.keep(text, unknown)
        self.size += len(text) - len(lines) + 1
        self.longest = max(self.longest, *map(len, lines))
        self.link = chained(self.link, lines)
        self.last += len(lines)

    @abstractmethod
    def keep(self, text: bytes, unknown: Iterable[str]) -> None:
        """Hold the lines of this text, which has no line's end behind it."""

    @abstractmethod
    def discard(self) -> None:
        """Let go of the lines."""


class FileDraft(Draft):
    """Lines of a segment that is not written yet, in a file of their own, so that memory does not grow with them."""

    def __init__(self, work: Work, shard: int, epoch: str, first: int, position: Position) -> None:
        super().__init__(shard, epoch, first, position)
        self._unknown: set[str] = set()
        self.file = work.folder / f"{shard}-{epoch}-{first}.csv"
        self._stream = self.file.open("wb")

    def keep(self, text: bytes, unknown: Iterable[str]) -> None:
        """Append the lines to the file."""
        self._unknown.update(unknown)
        self._stream.write(text)
        self._stream.write(b"\n")

    def told(self) -> Range:
        """What they are; no more are taken up."""
        self._stream.close()
        return Range(
            shard=self.shard,
            epoch=self.epoch,
            first=self.first,
            last=self.last,
            follows_epoch=self.follows.epoch,
            follows_n=self.follows.n,
            before=self.follows.link,
            link=self.link,
            unknown=sorted(self._unknown),
            size=self.size,
            longest=self.longest,
        )

    def discard(self) -> None:
        """Remove the file."""
        with suppress(OSError):
            self._stream.close()
        self.file.unlink(missing_ok=True)


class MemoryDraft(Draft):
    """Lines that wait in memory; for sinks that take few at a time."""

    def __init__(self, shard: int, epoch: str, first: int, position: Position) -> None:
        super().__init__(shard, epoch, first, position)
        self.texts: list[bytes] = []

    def keep(self, text: bytes, unknown: Iterable[str]) -> None:
        """Hold the text."""
        self.texts.append(text)

    def discard(self) -> None:
        """Let go of it."""
        self.texts.clear()

    def until(self, n: int) -> MemoryDraft:
        """Only the lines before number `n`."""
        before = MemoryDraft(self.shard, self.epoch, self.first, self.follows)
        before.add(b"\n".join(self.texts).split(b"\n")[: n - self.first])
        return before
