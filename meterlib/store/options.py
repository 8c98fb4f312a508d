"""How a store is used, and by which clock."""

from __future__ import annotations

import re
from typing import Protocol

import msgspec

from meterlib.errors import PolicyError

_PREFIX = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


class StoreOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a store is used; the same for everybody who shares it.

    Attributes:
        shards: how many ledgers and groups of keys; chosen once for a store.
        prefix: what all keys begin with.
        retention_ms: how long the ids of ended reservations are remembered.
        sweep_max: how many overdue or forgettable reservations each operation clears in passing.
        timeout_ms: how long one try waits for the server.
        deadline_ms: how long a call tries altogether.
        connections_max: how many connections a meter opens at most, beside the one or two that verbs share where there
            is one server; whoever needs a further one waits.
    """

    shards: int = 16
    prefix: str = "meterlib"
    retention_ms: int = 24 * 3_600_000
    sweep_max: int = 2
    timeout_ms: int = 1000
    deadline_ms: int = 5000
    connections_max: int = 64

    def __post_init__(self) -> None:
        bounds = {
            "shards": (1, 4096),
            "retention_ms": (1000, 31 * 86_400_000),
            "sweep_max": (1, 100),
            "timeout_ms": (1, 600_000),
            "deadline_ms": (1, 600_000),
            "connections_max": (1, 65_536),
        }
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise PolicyError(f"store.{name}", f"{least} to {most} are allowed, not {value!r:.40}")
        if not isinstance(self.prefix, str) or not _PREFIX.fullmatch(self.prefix):
            raise PolicyError("store.prefix", f"{self.prefix!r:.80} is none: 1 to 64 of A-Z a-z 0-9 _ . : -")


SWEPT_MAX = 200
"""What a script can clear in one call without anybody's noticing."""


def swept_by(options: StoreOptions, operations: int) -> int:
    """How many overdue or forgettable reservations a call clears: more than it adds, whatever it does at once."""
    return min(SWEPT_MAX, options.sweep_max * operations)


class Clock(Protocol):
    """A test's clock: the time is what it says, and not the server's."""

    @property
    def now_ms(self) -> int: ...
