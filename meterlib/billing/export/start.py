"""Where an export goes on: whether what the store has now continues what was archived, and what to say if not."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Protocol, TypeVar

from meterlib.billing.archive.lines import Lines, OddEntryError
from meterlib.billing.archive.rows import fields_of
from meterlib.billing.archive.segments import Position
from meterlib.errors import IntegrityError
from meterlib.store import flows
from meterlib.store.commands import Flow, ShardHead

T = TypeVar("T")


class Run(Protocol):
    """Runs a flow against the store: a meter's or a driver's."""

    def __call__(self, flow: Flow[T]) -> T:
        """The flow's result."""
        ...


class Start:
    """Holds the end of a shard's archive against the store.

    Args:
        shard: which.
        position: how far it is archived.
        known: the line of the last archived entry; empty if there is none.
        head: the shard's own word on its ledger, from before any of it is read.
        run: runs the store's flows.
    """

    def __init__(self, shard: int, position: Position, known: bytes, head: ShardHead, run: Run) -> None:
        self._shard = shard
        self._position = position
        self._known = known
        self._head = head
        self._run = run

    def found(self, accepted_epoch: str | None) -> tuple[str, int]:
        """The epoch to go on with, and the number to read behind.

        Raises:
            IntegrityError: the store does not continue what was archived, or something else was begun.
        """
        n = self._position.n
        if not n:
            return "", 0
        stored = self._line(n)
        if stored == self._known:
            return self._position.epoch, n
        epoch = self._head.epoch or self._epoch_at(self._head.ledger_last)
        last = max(self._head.last_number, self._head.ledger_last)
        if epoch == self._position.epoch or not epoch:
            if last < n:
                raise self._regress(last)
            if stored:
                raise self._conflict()
            return epoch, n  # it was removed; that the numbers go on without a gap is for the reader to see
        forked = self._head.forked
        if forked is not None and (forked.follows_epoch, forked.follows_n) == (self._position.epoch, n):
            return epoch, forked.first - 1
        if epoch != accepted_epoch:
            raise begun_anew(self._shard, self._position.epoch, n, epoch, self._first_of(epoch))
        return epoch, self._first_of(epoch) - 1

    def _line(self, n: int) -> bytes:
        """The line of entry `n` as the store has it; empty if it has none."""
        page = self._run(flows.read_stored(self._shard, n - 1, 1))
        try:
            return Lines().of(page)[0] if page and page[0][0] == n else b""
        except OddEntryError as error:
            return error.reason.encode()

    def _epoch_at(self, n: int) -> str:
        page = self._run(flows.read_stored(self._shard, n - 1, 1)) if n else []
        return page[0][1].get(b"epoch", b"").decode(errors="replace") if page else ""

    def _first_of(self, epoch: str) -> int:
        """The number of the first entry of an epoch that the ledger ends with; 1 if there is none yet."""
        low, high = max(1, self._head.ledger_first), self._head.ledger_last + 1
        while low < high:
            middle = (low + high) // 2
            if self._epoch_at(middle) == epoch:
                high = middle
            else:
                low = middle + 1
        return low if self._head.ledger_length else 1

    def _regress(self, last: int) -> IntegrityError:
        lost = _range(self._shard, last + 1, self._position.n)
        there = f"ends at {self._shard}:{last}" if last else "has no entries"
        return IntegrityError(
            "regress",
            f"the store's ledger {there}, but {lost} were exported from it: it lost them."
            " What was exported stays true; what is booked from here on has their numbers again, until somebody has"
            f" looked: meterlib ledger fork --shard {self._shard}",
            (lost,),
        )

    def _conflict(self) -> IntegrityError:
        entry = f"{self._shard}:{self._position.n}"
        archived = fields_of(self._known)[1]
        return IntegrityError(
            "conflict",
            f"the store has another entry {entry} than the one that was exported (reservation"
            f" {archived[b'id'].decode()!r}, booked at {_moment(int(archived[b'booked_at']))}): it lost its tail, and"
            f" went on. To look, and go on: meterlib ledger fork --shard {self._shard}",
            (entry,),
        )


def begun_anew(shard: int, epoch: str, n: int, other: str, first: int) -> IntegrityError:
    """What to say of a ledger that goes on under another epoch."""
    return IntegrityError(
        "epoch",
        f"shard {shard}: the ledger was begun anew: from entry {shard}:{first} on it is of epoch {other}, and the last"
        f" one to be exported was {shard}:{n} of epoch {epoch}. To look, and go on with numbers behind that:"
        f" meterlib ledger fork --shard {shard}; to go on with the numbers as they are: --accept-epoch {shard}:{other}",
        (f"{shard}:{first}",),
    )


def gap(shard: int, first: int, last: int, why: str) -> IntegrityError:
    """What to say of numbers that no entry has."""
    missing = _range(shard, first, last)
    return IntegrityError(
        "gap",
        f"entries {missing} are missing from the ledger; {why}. If they are lost for good, go on with"
        f" --accept-gap {missing}",
        (missing,),
    )


def _moment(ms: int) -> str:
    return (datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=ms)).isoformat(" ", "milliseconds")


def _range(shard: int, first: int, last: int) -> str:
    return f"{shard}:{first}" if first == last else f"{shard}:{first}-{last}"
