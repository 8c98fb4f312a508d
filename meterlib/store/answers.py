"""What a store answers to the commands of flows, in the shape that flows want."""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Any, TypeVar

from meterlib.errors import MeterError, StoreUnavailable
from meterlib.store.commands import Call, Command, Flow, Forked, ShardHead, StoredPage

T = TypeVar("T")
_HEAD = Struct(">4d").unpack_from
_FORK = Struct(">5d").unpack_from


def answered(flow: Flow[T], command: Command, answer: Any) -> Command:
    """The flow's next command. An answer that it cannot read came from no script: its outcome is unknown."""
    try:
        return flow.send(answer)
    except MeterError:
        raise
    except (IndexError, TypeError, ValueError) as error:
        name = command.script if isinstance(command, Call) else type(command).__name__
        raise StoreUnavailable(name, f"an answer that is none: {answer!r:.80}") from error


def entries_of(page: Any) -> list[tuple[int, dict[bytes, bytes]]]:
    """The entries of an XRANGE answer, as redis-py hands them over."""
    return [(int(stream_id.partition(b"-")[0]), fields) for stream_id, fields in page or ()]


def page_of(page: Any) -> StoredPage:
    """An XRANGE answer as the server sent it, whether redis-py has made dicts of it or not."""
    if page and isinstance(page[0][1], dict):
        return [(stream_id, [part for pair in fields.items() for part in pair]) for stream_id, fields in page]
    return page or ()


def names_of(members: Any) -> list[str]:
    """The names of a set, in order."""
    return sorted(bytes(member).decode() for member in members or ())


def head_of(state: Sequence[bytes | None], first: Any, last: Any, length: int, open_reservations: int) -> ShardHead:
    """A shard's own numbers, from the answers to `head_commands`."""
    head, fork = state
    epoch, clock_ms, number, forked = "", 0, 0, None
    if head:
        clock_ms, _, number, epoch_ms = (int(value) for value in _HEAD(head))
        epoch = f"{epoch_ms:013d}"
    first_n, last_n = (int(page[0][0].partition(b"-")[0]) if page else 0 for page in (first, last))
    if fork:
        forked = forked_of(*[int(value) for value in _FORK(fork)])
    return ShardHead(epoch, clock_ms, number, first_n, last_n, length, open_reservations, forked)


def forked_of(follows_epoch: int, follows_n: int, epoch: int, first: int, moved: int) -> Forked:
    """Where a ledger was forked, from what its shard remembers of it."""
    return Forked(f"{follows_epoch:013d}", follows_n, first)
