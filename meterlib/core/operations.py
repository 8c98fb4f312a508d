"""What each script takes, one record per verb, field by field as the header of `lua/<verb>.lua` has it.

A script gets an operation as one argument: text ends with a zero byte, a number takes the eight bytes of a double. No
text has a zero byte: names are printable, and JSON escapes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from struct import Struct
from typing import NamedTuple

Value = str | int | bytes
Reply = list[int | str | bytes]
"""A script's answer to one operation: a status word, the shard's time in ms, then what the script's header says."""

_double = Struct(">d").pack
_two_doubles = Struct(">dd").pack


def packed(values: Iterable[Value]) -> bytes:
    """The bytes of an argument, as the scripts' `from_bytes` reads them."""
    return b"".join([_double(value) if isinstance(value, int) else _text(value) for value in values])


def _text(value: str | bytes) -> bytes:
    return (value if isinstance(value, bytes) else value.encode()) + b"\0"


def unpacked(answer: bytes) -> Reply:
    """The values of an answer, which begins with their format: `s` a text, `d` a number, `d*` numbers to the end.

    Raises:
        ValueError: the bytes are no answer.
    """
    form, _, rest = answer.partition(b"\0")
    if form == b"sd*":  # as most are
        status, _, rest = rest.partition(b"\0")
        return [status, *map(int, _doubles(len(rest) // 8)(rest))]
    values: Reply = []
    for texts, numbers in _runs(form):
        found = rest.split(b"\0", texts)
        rest = found.pop()
        count = len(rest) // 8 if numbers < 0 else numbers
        if len(found) < texts or len(rest) < 8 * count:
            raise ValueError(f"{answer!r:.80} is no answer")
        values += found
        if count:
            values += map(int, _doubles(count)(rest))
            rest = rest[8 * count :]
    return values


@lru_cache(maxsize=1024)
def _runs(form: bytes) -> list[tuple[int, int]]:
    """How many texts, then how many numbers (-1: all that are left), and so on."""
    if not re.fullmatch(rb"[sd]+\*?", form):
        raise ValueError(f"{form!r:.80} is no format")
    runs = [(len(texts), len(numbers)) for texts, numbers in re.findall(rb"(s*)(d*)", form) if texts or numbers]
    return [*runs[:-1], (runs[-1][0], -1)] if form.endswith(b"*") else runs


@lru_cache(maxsize=1024)
def _doubles(count: int) -> Callable[[bytes], tuple[float, ...]]:
    return Struct(f">{count}d").unpack_from


@lru_cache(maxsize=20_000)
def _around_amount(window_field: str, unit: str, rest: tuple[Value, ...]) -> tuple[bytes, bytes]:
    """What stands before and behind the amount in the bytes of a limit; only the amount is another one each time."""
    before, after = packed((window_field, unit)), packed(rest)
    return _double(16 + len(before) + len(after)) + before, after


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

    def packed(self) -> bytes:
        """Led by its size."""
        before, after = _around_amount(self.window_field, self.unit, self[3:])
        return before + _double(self.amount) + after


class PeekLimit(NamedTuple):
    """What it takes to look at one limit."""

    window_field: str
    span_ms: int
    period_start_ms: int
    period_end_ms: int


class Reserve(NamedTuple):
    """Hold an estimate on every limit, or on none."""

    field: str
    lease_ms: int
    limits: tuple[LimitArguments, ...]
    digest: str
    call_facts: bytes
    estimate: bytes

    def packed(self) -> bytes:
        limits = [limit.packed() for limit in self.limits]
        head = self.field.encode() + b"\0" + _two_doubles(self.lease_ms, len(limits))
        return b"".join([head, *limits, b"\0".join([self.digest.encode(), self.call_facts, self.estimate, b""])])


class Settle(NamedTuple):
    """Replace a hold by what was used, and book it."""

    field: str
    digest: str
    outcome: bytes
    call_facts: bytes
    if_unknown: str
    used: tuple[tuple[str, int], ...]
    limits: tuple[LimitArguments, ...]

    def packed(self) -> bytes:
        field, digest, outcome, call_facts, if_unknown, used, limits = self
        texts = [field.encode(), digest.encode(), outcome, call_facts, if_unknown.encode(), b""]
        units = [unit.encode() + b"\0" + _double(amount) for unit, amount in used]
        head = b"\0".join(texts) + _two_doubles(len(used), len(limits))
        return b"".join([head, *units, *[limit.packed() for limit in limits]])


class Record(NamedTuple):
    """Book usage that had no reservation, or a correction."""

    field: str
    kind: str
    digest: str
    call_facts: bytes
    outcome: bytes
    limits: tuple[LimitArguments, ...]

    def packed(self) -> bytes:
        return b"".join([packed((*self[:-1], len(self.limits))), *[limit.packed() for limit in self.limits]])


class Cancel(NamedTuple):
    """Free the whole hold."""

    field: str

    def packed(self) -> bytes:
        return packed(self)


class Revise(NamedTuple):
    """Hold a better estimate, or prolong the lease."""

    field: str
    revision: int
    lease_ms: int
    longest_ms: int
    estimate: bytes
    amounts: tuple[tuple[str, int], ...]

    def packed(self) -> bytes:
        return packed((*self[:-1], len(self.amounts))) + b"".join([packed(unit) for unit in self.amounts])


class Peek(NamedTuple):
    """How limits stand."""

    limits: tuple[PeekLimit, ...]

    def packed(self) -> bytes:
        return packed((len(self.limits),)) + b"".join([packed(limit) for limit in self.limits])


class Find(NamedTuple):
    """Where a reservation stands."""

    field: str

    def packed(self) -> bytes:
        return packed(self)


class Sweep(NamedTuple):
    """Expire, forget and drop a bounded piece."""

    window_count: int

    def packed(self) -> bytes:
        return packed(self)


class Renumbered(NamedTuple):
    """Entries in a row that are exported under other numbers than they have: the first, the last, the first's there."""

    first_n: int
    last_n: int
    exported_n: int


class Fork(NamedTuple):
    """Begin another epoch of a ledger that lost what was exported from it."""

    seen_id: str
    seen_n: int
    seen_booked_ms: int
    seen_at_ms: int
    found_epoch: int
    follows_epoch: int
    follows_n: int
    kept_n: int
    renumbered: tuple[Renumbered, ...] = ()

    def packed(self) -> bytes:
        return packed((*self[:-1], len(self.renumbered))) + b"".join([packed(run) for run in self.renumbered])


Operation = Reserve | Settle | Record | Cancel | Revise | Peek | Find | Sweep | Fork
