"""What flows ask of a store, and how a flow is typed."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

from meterlib.core.operations import Operation

T = TypeVar("T")


class Call(NamedTuple):
    """Run one operation of a script on one shard; answered by a Reply. `sweep_max` takes the place of the store's."""

    script: str
    shard: int
    operation: Operation
    sweep_max: int | None = None


class Batch(NamedTuple):
    """A script call: operations of one verb on one shard."""

    script: str
    shard: int
    sweep_max: int | None
    operations: Sequence[Operation]


ALONE = ("sweep", "fork")
"""Scripts that take one operation a call: each looks after the whole shard."""


class ReadLedger(NamedTuple):
    """Entries of a shard behind number `after`, at most `limit`; answered by a list of (n, fields)."""

    shard: int
    after: int
    limit: int


class ReadPage(NamedTuple):
    """The same entries for who reads millions of them; answered by a StoredPage."""

    shard: int
    after: int
    limit: int


StoredPage: TypeAlias = Sequence[tuple[bytes, Sequence[bytes]]]
"""Entries as the server sends them: the stream's id, then names and values in turn."""


class TrimLedger(NamedTuple):
    """Remove a shard's entries below number `below`; answered by how many there were."""

    shard: int
    below: int


class ReadHead(NamedTuple):
    """How a shard stands as a whole; answered by a ShardHead."""

    shard: int


class ReadOwners(NamedTuple):
    """Whose open reservations of a shard have this id; answered by a list of record fields."""

    shard: int
    reservation_id: str


class ReadWindows(NamedTuple):
    """Which windows of a tenant a shard has; answered by a list of window fields.

    The tenant as it stands in those fields: encoded, or `*` for the windows that all tenants share.
    """

    shard: int
    tenant: str


class KnownSinks(NamedTuple):
    """Which sinks the store's ledgers are exported to, once `add` has become one and `drop` is none any more."""

    add: str = ""
    drop: str = ""


class Seen(NamedTuple):
    """The end of a ledger when somebody looked: its last entry, if there was one, and the shard's time before that."""

    id: str
    n: int
    booked_ms: int
    at_ms: int


class Forked(NamedTuple):
    """Where a ledger was forked: epoch and number of the entry that its epoch follows, and the first number in that."""

    follows_epoch: str
    follows_n: int
    first: int


class ShardHead(NamedTuple):
    """A shard's own numbers.

    `last_number` is the state's word for the last ledger entry and `ledger_last` the ledger's own; they differ if one
    of them was tampered with or lost its tail.
    """

    epoch: str
    clock_ms: int
    last_number: int
    ledger_first: int
    ledger_last: int
    ledger_length: int
    open_reservations: int
    forked: Forked | None = None


Command: TypeAlias = Call | ReadLedger | ReadPage | TrimLedger | ReadHead | ReadOwners | ReadWindows | KnownSinks
Flow: TypeAlias = Generator[Command, Any, T]
"""A verb written once: yields commands, is sent their answers (or has StoreErrors thrown in), returns its result."""
