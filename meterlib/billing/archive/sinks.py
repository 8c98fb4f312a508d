"""What an export writes into: a sink keeps every entry of a shard once, in order, and knows how far that is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

from meterlib.billing.archive.drafts import Draft
from meterlib.billing.archive.lines import Fields
from meterlib.billing.archive.segments import Position

D = TypeVar("D", bound=Draft)


class MovedError(Exception):
    """A sink's shard is not where it was when its export began: somebody else is at it. Begin anew from where it is."""


class Sink(Protocol[D]):
    """Where entries go. Each has a checkpoint of its own, which is wherever its entries end.

    Raises (whatever reads or writes):
        IntegrityError: what it holds does not fit together.
        SinkError: it is out of reach or refuses; the next export goes on from where it is.
        OSError: the same, for files.
    """

    @property
    def place(self) -> str:
        """Where it is, as messages tell it; no secret."""
        ...

    @property
    def name(self) -> str:
        """What the store remembers it by."""
        ...

    def prepare(self) -> None:
        """Make it ready to be written to."""
        ...

    def end(self, shard: int) -> tuple[Position, bytes]:
        """How far a shard is exported, and the line of its last entry, empty if there is none; both of one look."""
        ...

    def block_end(self, n: int) -> int:
        """The last number that goes with entry `n` in one piece."""
        ...

    def draft(self, shard: int, epoch: str, first: int, position: Position) -> D:
        """A piece that is to follow a position, still without entries."""
        ...

    def seal(self, draft: D) -> Any:
        """Take up a draft: it is there for good when this returns, and whole or not at all if it does not.

        Raises:
            MovedError: the sink is not where the draft begins; nothing was written.
        """
        ...

    def finish(self, shard: int) -> Any:
        """Called when an export of a shard is complete."""
        ...

    def set_aside(self, shard: int, epoch: str, n: int, fields: Fields) -> None:
        """Keep an entry that no bill is to be made of, by somebody's decision; it is there when this returns."""
        ...

    def behind(self, shard: int, epoch: str, n: int) -> Iterator[list[bytes]]:
        """The lines of a shard behind an entry, in order, in portions."""
        ...

    def between(self, shard: int, first: int, last: int) -> Iterator[list[bytes]]:
        """The lines of a shard with numbers from first to last, of whichever epoch, in portions."""
        ...

    def close(self) -> None:
        """Let go of what it holds open."""
        ...


def furthest(sinks: Sequence[Sink[Any]], shard: int) -> Sink[Any]:
    """The sink that has most of a shard; the first of several."""
    return max(sinks, key=lambda sink: sink.end(shard)[0][:2])
