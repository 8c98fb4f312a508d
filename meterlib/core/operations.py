"""What each script takes, one record per verb, field by field as the header of `lua/<verb>.lua` has it."""

from __future__ import annotations

from typing import NamedTuple

Argument = str | int | bytes
Reply = list[int | str | bytes]
"""A script's answer to one operation: a status word, the shard's time in ms, then what the script's header says."""


class LimitArguments(NamedTuple):
    """What an operation says of one limit."""

    window_field: str
    unit: str
    amount: int
    quota: int
    oversize: str
    span_ms: int
    sub_window_ms: int
    period_start_ms: int
    period_end_ms: int
    on_expiry: str


class PeekLimit(NamedTuple):
    """What it takes to look at one limit."""

    window_field: str
    span_ms: int
    period_start_ms: int
    period_end_ms: int


class Reserve(NamedTuple):
    """Hold an estimate on every limit, or on none."""

    reservation: str
    digest: str
    call_facts: bytes
    estimate: bytes
    lease_ms: int
    limits: tuple[LimitArguments, ...]

    def arguments(self) -> list[Argument]:
        flat: list[Argument] = [*self[:5], len(self.limits)]
        for limit in self.limits:
            flat += limit
        return flat


class Settle(NamedTuple):
    """Replace a hold by what was used, and book it."""

    field: str
    digest: str
    outcome: bytes
    call_facts: bytes
    if_unknown: str
    echo: str
    used: tuple[tuple[str, int], ...]
    limits: tuple[LimitArguments, ...]

    def arguments(self) -> list[Argument]:
        flat: list[Argument] = [*self[:6], len(self.used), len(self.limits)]
        for unit in self.used:
            flat += unit
        for limit in self.limits:
            flat += limit
        return flat


class Record(NamedTuple):
    """Book usage that had no reservation, or a correction."""

    field: str
    kind: str
    digest: str
    call_facts: bytes
    outcome: bytes
    limits: tuple[LimitArguments, ...]

    def arguments(self) -> list[Argument]:
        flat: list[Argument] = [*self[:5], len(self.limits)]
        for limit in self.limits:
            flat += limit
        return flat


class Cancel(NamedTuple):
    """Free the whole hold."""

    field: str

    def arguments(self) -> list[Argument]:
        return [self.field]


class Revise(NamedTuple):
    """Hold a better estimate, or prolong the lease."""

    field: str
    revision: int
    lease_ms: int
    longest_ms: int
    estimate: bytes
    amounts: tuple[tuple[str, int], ...]

    def arguments(self) -> list[Argument]:
        flat: list[Argument] = [*self[:5], len(self.amounts)]
        for unit in self.amounts:
            flat += unit
        return flat


class Peek(NamedTuple):
    """How limits stand."""

    limits: tuple[PeekLimit, ...]

    def arguments(self) -> list[Argument]:
        flat: list[Argument] = [len(self.limits)]
        for limit in self.limits:
            flat += limit
        return flat


class Find(NamedTuple):
    """Where a reservation stands."""

    field: str

    def arguments(self) -> list[Argument]:
        return [self.field]


class Sweep(NamedTuple):
    """Expire, forget and drop a bounded piece."""

    cursor: int
    scan_count: int

    def arguments(self) -> list[Argument]:
        return [*self]


Operation = Reserve | Settle | Record | Cancel | Revise | Peek | Find | Sweep
