"""The pure twin of every script in `lua/`: the same name, the same operations, the same replies, bit for bit.

To be read as the specification, to be compared with the scripts by tests, and to be the store of `memory://`. It
favours the plainest way to say a thing; the scripts favour the fewest commands.
"""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from meterlib.core.checks import AMOUNT_MAX
from meterlib.core.operations import (
    Cancel,
    Find,
    Fork,
    LimitArguments,
    Peek,
    Record,
    Reply,
    Reserve,
    Revise,
    Settle,
    Sweep,
)


@dataclass(slots=True)
class Entry:
    """An amount in a window: settled or held, at a time."""

    time_ms: int
    settled: int
    held: int


@dataclass(slots=True)
class Window:
    """A log of amounts, oldest first; each counts until `span_ms` after its own time."""

    span_ms: int
    entries: list[Entry] = field(default_factory=list)

    @property
    def settled(self) -> int:
        return sum(entry.settled for entry in self.entries)

    @property
    def held(self) -> int:
        return sum(entry.held for entry in self.entries)

    def at(self, now_ms: int, span_ms: int) -> Window:
        """A copy without what has slid out."""
        alive = [replace(entry) for entry in self.entries]
        while alive and alive[0].time_ms + span_ms <= now_ms:
            del alive[0]
        return Window(span_ms, alive)

    @property
    def ends_ms(self) -> int:
        """When nothing counts any more if nobody adds to it."""
        return self.span_ms + (self.entries[-1].time_ms if self.entries else 0)

    def describe(self) -> list[int]:
        """Settled, held, when something goes, when all is gone."""
        if not self.entries:
            return [0, 0, 0, 0]
        first, last = self.entries[0].time_ms, self.entries[-1].time_ms
        return [self.settled, self.held, first + self.span_ms, last + self.span_ms]

    def falls_to(self, level: int) -> int:
        """When the window is down to `level` if nobody adds to it."""
        used, leaves_ms = self.settled + self.held, 0
        for entry in self.entries:
            if used <= level:
                break
            used -= entry.settled + entry.held
            leaves_ms = entry.time_ms + self.span_ms
        return leaves_ms


@dataclass(slots=True)
class Hold:
    """What a reservation holds, or what it left, in one window."""

    window_field: str
    unit: str
    amount: int
    hold_ms: int
    settle_ms: int
    span_ms: int


@dataclass(slots=True)
class Reservation:
    """An open reservation."""

    reserved_at_ms: int
    expires_at_ms: int
    revision: int
    digest: str
    call_facts: bytes
    estimate: bytes
    holds: list[Hold]

    def copy(self) -> Reservation:
        return replace(self, holds=[replace(hold) for hold in self.holds])


@dataclass(slots=True, frozen=True)
class Ended:
    """How a reservation ended; `reservation` is what it left, unless it was settled."""

    kind: str
    number: int
    reserved_at_ms: int
    booked_at_ms: int
    digest: str
    reservation: Reservation | None = None


@dataclass(slots=True)
class Shard:
    """All state of one shard: what the store's keys of it hold."""

    layout: str | None = None
    clock_ms: int = 0
    server_ms: int = 0
    number: int = 0
    epoch: int = 0
    windows: dict[str, Window] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    records: dict[str, Reservation | Ended] = field(default_factory=dict)
    leases: list[tuple[int, str]] = field(default_factory=list)
    ended: list[tuple[int, str]] = field(default_factory=list)
    ledger: list[dict[str, Any]] = field(default_factory=list)
    fork: tuple[int, ...] = ()


class LayoutMismatch(Exception):
    """The store is of another layout."""


class Work:
    """One script call: reads the shard, keeps what changes, and writes it at the end."""

    def __init__(self, shard: Shard, server_ms: int, layout: str, sweep_max: int, retention_ms: int) -> None:
        if shard.layout not in (None, layout):
            raise LayoutMismatch(f"{shard.layout} is the layout of the store, not {layout}")
        self.shard, self.layout, self.sweep_max, self.retention_ms = shard, layout, sweep_max, retention_ms
        self.now_ms = self.server_ms = server_ms
        self.set_back = bool(shard.layout) and server_ms < min(shard.clock_ms, shard.server_ms)
        if shard.layout and server_ms < shard.clock_ms:  # set back: time goes on at half speed
            step_ms = max(0, (server_ms - shard.server_ms) // 2)
            self.now_ms = shard.clock_ms + step_ms
            self.server_ms = min(server_ms, shard.server_ms + 2 * step_ms)
        self.number = shard.number
        self.epoch = shard.epoch if shard.layout else self.now_ms
        self.windows: dict[str, Window] = {}
        self.changed_windows: set[str] = set()
        self.records: dict[str, Reservation | Ended] = {}
        self.entries: list[dict[str, Any]] = []
        self.leases: list[tuple[int, str]] = []
        self.ended: list[tuple[int, str]] = []
        self.released: list[str] = []

    def window(self, window_field: str, span_ms: int) -> Window:
        if window_field not in self.windows:
            stored = self.shard.windows.get(window_field, Window(span_ms))
            self.windows[window_field] = stored.at(self.now_ms, span_ms)
        return self.windows[window_field]

    def charge(self, window_field: str, span_ms: int, time_ms: int, settled: int, held: int) -> None:
        """Add to what is settled and held at a time; what has slid out is left alone."""
        window = self.window(window_field, span_ms)
        if time_ms + window.span_ms <= self.now_ms:
            return
        at = bisect_left(window.entries, time_ms, key=lambda entry: entry.time_ms)
        if at == len(window.entries) or window.entries[at].time_ms != time_ms:
            window.entries.insert(at, Entry(time_ms, 0, 0))
        entry = window.entries[at]
        room = AMOUNT_MAX - window.settled - window.held
        held = min(max(held, -entry.held), room)
        settled = min(max(settled, -entry.settled), room - held)
        entry.settled += settled
        entry.held += held
        if entry.settled <= 0 and entry.held <= 0:
            del window.entries[at]
        self.changed_windows.add(window_field)

    def record(self, record_field: str) -> Reservation | Ended | None:
        return self.records.get(record_field) or self.shard.records.get(record_field)

    def reservation(self, record_field: str) -> Reservation | Ended | None:
        """An open reservation or how it ended; one whose lease is over ends here, swept or not."""
        record = self.record(record_field)
        if isinstance(record, Reservation) and record.expires_at_ms <= self.now_ms:
            self.expire(record_field, record.copy())
            return self.record(record_field)
        return record.copy() if isinstance(record, Reservation) else record

    def expire(self, record_field: str, reservation: Reservation) -> None:
        for hold in reservation.holds:
            kept = hold.amount if hold.hold_ms == hold.settle_ms else 0
            self.charge(hold.window_field, hold.span_ms, hold.hold_ms, kept, -hold.amount)
            hold.amount = kept
        self.finish("expired", "", record_field, reservation, b"", "", left=reservation)

    def sweep(self, most: int) -> int:
        expired = 0
        for _, record_field in [lease for lease in self.shard.leases if lease[0] <= self.now_ms][:most]:
            record = self.reservation(record_field)
            if isinstance(record, Reservation):
                self.leases.append((record.expires_at_ms, record_field))
            elif record is not None and record.kind == "expired":
                expired += 1
            else:
                self.released.append(record_field)
        return expired

    def append(
        self,
        kind: str,
        after: str,
        record_field: str,
        reserved_at_ms: int,
        call_facts: bytes,
        estimate: bytes,
        outcome: bytes,
        digest: str,
    ) -> None:
        self.number += 1
        self.entries.append(
            {
                "n": self.number, "kind": kind, "after": after, "id": record_field.rpartition("/")[2],
                "reserved_at": reserved_at_ms, "booked_at": self.now_ms, "call": call_facts, "estimate": estimate,
                "outcome": outcome, "digest": digest, "epoch": self.epoch,
            }
        )  # fmt: skip

    def end(self, record_field: str, ended: Ended) -> None:
        self.records[record_field] = ended
        self.ended.append((self.now_ms, record_field))
        self.released.append(record_field)

    def finish(
        self,
        kind: str,
        after: str,
        record_field: str,
        reservation: Reservation,
        outcome: bytes,
        digest: str,
        left: Reservation | None = None,
    ) -> None:
        self.append(
            kind, after, record_field, reservation.reserved_at_ms, reservation.call_facts, reservation.estimate,
            outcome, digest,
        )  # fmt: skip
        self.end(record_field, Ended(kind, self.number, reservation.reserved_at_ms, self.now_ms, digest, left))

    def entry(self, number: int) -> dict[str, Any]:
        found = [entry for entry in (*self.shard.ledger, *self.entries) if entry["n"] == number]
        return found[0] if found else {}

    def stale(self, limits: Sequence[LimitArguments]) -> bool:
        """Whether the caller's clock disagrees about a calendar period."""
        return any(
            limit.period_start_ms > 0 and not limit.period_start_ms <= self.now_ms < limit.period_end_ms
            for limit in limits
        )

    def charge_now(self, limits: Sequence[LimitArguments]) -> None:
        """Charge usage that nobody reserved."""
        for limit in limits:
            _, settle_ms = times_of(limit, self.now_ms, 0)
            if settle_ms:
                self.charge(limit.window_field, limit.span_ms, settle_ms, limit.amount, 0)

    def forget(self) -> None:
        shard = self.shard
        for ended_at_ms, record_field in shard.ended[: self.sweep_max]:
            if ended_at_ms + self.retention_ms > self.now_ms:
                return
            record = self.record(record_field)
            if isinstance(record, Ended) and record.booked_at_ms == ended_at_ms:
                self.records.pop(record_field, None)
                shard.records.pop(record_field, None)
            shard.ended.remove((ended_at_ms, record_field))

    def commit(self, *, books: bool, dropped: bool = False, forked: bool = False) -> None:
        """Write all that changed; `books`: this script ends reservations, `dropped`: it has dropped windows."""
        shard = self.shard
        if self.entries and shard.ledger and shard.ledger[-1]["n"] >= self.entries[0]["n"]:
            raise RuntimeError("the ledger has entries of which the state knows nothing")
        before = len(shard.ended)
        if books or self.entries or self.ended or self.released:
            self.forget()
        forgot = len(shard.ended) != before
        written = (self.changed_windows, self.records, self.entries, self.ended, self.released, self.leases)
        if not (self.set_back or forgot or dropped or forked or any(written)):
            return
        shard.layout, shard.clock_ms, shard.server_ms = self.layout, self.now_ms, self.server_ms
        shard.number, shard.epoch = self.number, self.epoch
        for window_field in self.changed_windows:
            if window_field not in shard.windows:
                shard.ends[window_field] = self.windows[window_field].ends_ms
            shard.windows[window_field] = self.windows[window_field]
        shard.records.update(self.records)
        shard.ledger += self.entries
        shard.ended += self.ended
        for expires_at_ms, record_field in self.leases:
            self.release(record_field)
            insort(shard.leases, (expires_at_ms, record_field))
        for record_field in self.released:
            self.release(record_field)

    def release(self, record_field: str) -> None:
        self.shard.leases = [lease for lease in self.shard.leases if lease[1] != record_field]


def times_of(limit: LimitArguments, now_ms: int, expires_at_ms: int) -> tuple[int, int]:
    """When a hold, and later what was settled, stand in the limit's window; 0: nothing is settled there."""
    if limit.sub_window_ms > 0:
        last_ms = (now_ms // limit.sub_window_ms + 1) * limit.sub_window_ms - 1
        return last_ms, last_ms
    if limit.period_end_ms == 0:
        return expires_at_ms, 0
    if limit.on_expiry == "free":
        return min(expires_at_ms, limit.period_end_ms), limit.period_end_ms
    return limit.period_end_ms, limit.period_end_ms


def verdict_of(window: Window, limit: LimitArguments) -> str:
    """Whether a limit lets an amount pass, or why not: used up for now, or never to fit."""
    if limit.quota == 0:  # also of what takes nothing: such a limit is there to deny
        return "oversize"
    used = window.settled + window.held
    if used + limit.amount <= limit.quota:
        return "passes"
    if limit.amount <= limit.quota:
        return "quota"
    if limit.oversize == "reject":
        return "oversize"
    return "passes" if used == 0 else "quota"


def reserve(work: Work, operation: Reserve) -> Reply:
    """Twin of `lua/reserve.lua`."""
    limits = operation.limits
    windows = [work.window(limit.window_field, limit.span_ms) for limit in limits]
    record = work.record(operation.field)
    if isinstance(record, Ended):
        return ["ended", work.now_ms, record.kind]
    if isinstance(record, Reservation):
        if record.expires_at_ms <= work.now_ms:
            return ["ended", work.now_ms, "expired"]
        if record.digest != operation.digest:
            return ["conflict", work.now_ms, record.call_facts, record.estimate]
    if work.stale(limits):
        return ["stale_period", work.now_ms]
    if isinstance(record, Reservation):
        reply: Reply = ["open", work.now_ms, record.reserved_at_ms, record.expires_at_ms, record.revision]
        return reply + [number for window in windows for number in window.describe()]
    verdicts = [verdict_of(window, limit) for window, limit in zip(windows, limits, strict=True)]
    if any(verdict != "passes" for verdict in verdicts):
        reply = ["denied", work.now_ms]
        for window, limit, verdict in zip(windows, limits, verdicts, strict=True):
            level = 0 if limit.amount > limit.quota else limit.quota - limit.amount
            reply += [verdict, window.falls_to(level) if verdict == "quota" else 0, *window.describe()]
        return reply
    expires_at_ms = work.now_ms + operation.lease_ms
    holds = [
        Hold(limit.window_field, limit.unit, limit.amount, *times_of(limit, work.now_ms, expires_at_ms), limit.span_ms)
        for limit in limits
    ]
    for hold in holds:
        work.charge(hold.window_field, hold.span_ms, hold.hold_ms, 0, hold.amount)
    work.records[operation.field] = Reservation(
        work.now_ms, expires_at_ms, 0, operation.digest, operation.call_facts, operation.estimate, holds
    )
    work.leases.append((expires_at_ms, operation.field))
    reply = ["reserved", work.now_ms, work.now_ms, expires_at_ms, 0]
    return reply + [number for window in windows for number in window.describe()]


def settle(work: Work, operation: Settle) -> Reply:
    """Twin of `lua/settle.lua`."""
    used = dict(operation.used)
    record = work.reservation(operation.field)
    if isinstance(record, Reservation):
        for hold in record.holds:
            amount = used.get(hold.unit, hold.amount)
            if hold.hold_ms == hold.settle_ms:
                work.charge(hold.window_field, hold.span_ms, hold.settle_ms, amount, -hold.amount)
            else:
                work.charge(hold.window_field, hold.span_ms, hold.hold_ms, 0, -hold.amount)
                if hold.settle_ms:
                    work.charge(hold.window_field, hold.span_ms, hold.settle_ms, amount, 0)
        return book(work, operation, "settled", "", record)
    if record is not None and record.digest:
        entry = work.entry(record.number)
        if record.digest != operation.digest:
            return ["conflict", work.now_ms, record.kind, entry.get("outcome", b"")]
        return [
            "repeated", work.now_ms, record.kind, record.number, record.reserved_at_ms, record.booked_at_ms,
            entry.get("after", ""), entry.get("call", b""), entry.get("estimate", b""),
        ]  # fmt: skip
    if record is not None and record.reservation:
        for hold in record.reservation.holds:
            if hold.settle_ms:
                more = used.get(hold.unit, hold.amount) - hold.amount
                work.charge(hold.window_field, hold.span_ms, hold.settle_ms, more, 0)
        return book(work, operation, "late", record.kind, record.reservation)
    if operation.if_unknown == "ask":
        return ["unknown", work.now_ms]
    if work.stale(operation.limits):
        return ["stale_period", work.now_ms]
    work.charge_now(operation.limits)
    unknown = Reservation(0, 0, 0, "", operation.call_facts, b"", [])
    return book(work, operation, "late", record.kind if record else "unknown", unknown)


def book(work: Work, operation: Settle, kind: str, after: str, reservation: Reservation) -> Reply:
    """Append the entry of a settlement."""
    work.finish(kind, after, operation.field, reservation, operation.outcome, operation.digest)
    reply: Reply = ["settled", work.now_ms, kind, work.number, reservation.reserved_at_ms, work.now_ms, after]
    return [*reply, reservation.call_facts, reservation.estimate]


def record(work: Work, operation: Record) -> Reply:
    """Twin of `lua/record.lua`."""
    past = work.reservation(operation.field)
    if isinstance(past, Reservation):
        return ["open", work.now_ms]
    if past is not None:
        if past.digest != operation.digest:
            return ["conflict", work.now_ms, past.kind, work.entry(past.number).get("outcome", b"")]
        return ["repeated", work.now_ms, past.kind, past.number, 0, past.booked_at_ms]
    if work.stale(operation.limits):
        return ["stale_period", work.now_ms]
    work.charge_now(operation.limits)
    made = Reservation(0, 0, 0, "", operation.call_facts, b"", [])
    work.finish(operation.kind, "", operation.field, made, operation.outcome, operation.digest)
    return ["recorded", work.now_ms, operation.kind, work.number, 0, work.now_ms]


def cancel(work: Work, operation: Cancel) -> Reply:
    """Twin of `lua/cancel.lua`."""
    record = work.reservation(operation.field)
    if isinstance(record, Ended):
        if record.kind != "cancelled":
            return ["ended", work.now_ms, record.kind]
        return ["repeated", work.now_ms, record.number, record.reserved_at_ms, record.booked_at_ms]
    if record is None:
        work.end(operation.field, Ended("cancelled", 0, 0, work.now_ms, ""))
        return ["cancelled", work.now_ms, 0, 0, work.now_ms]
    for hold in record.holds:
        work.charge(hold.window_field, hold.span_ms, hold.hold_ms, 0, -hold.amount)
        hold.amount = 0
    work.finish("cancelled", "", operation.field, record, b"", "", left=record)
    return ["cancelled", work.now_ms, work.number, record.reserved_at_ms, work.now_ms]


def revise(work: Work, operation: Revise) -> Reply:
    """Twin of `lua/revise.lua`."""
    record = work.reservation(operation.field)
    if record is None:
        return ["absent", work.now_ms]
    if isinstance(record, Ended):
        return ["ended", work.now_ms, record.kind]
    status = "repeated"
    if operation.revision == 0 or operation.revision > record.revision:
        status = "revised"
        record.revision = operation.revision or record.revision + 1
        amounts = dict(operation.amounts)
        for hold in record.holds:
            if hold.unit in amounts:
                more = amounts[hold.unit] - hold.amount
                work.charge(hold.window_field, hold.span_ms, hold.hold_ms, 0, more)
                hold.amount = amounts[hold.unit]
        record.estimate = operation.estimate or record.estimate
        expires_at_ms = min(work.now_ms + operation.lease_ms, record.reserved_at_ms + operation.longest_ms)
        if operation.lease_ms > 0 and expires_at_ms > record.expires_at_ms:
            prolong(work, record, expires_at_ms)
            work.leases.append((expires_at_ms, operation.field))
        work.records[operation.field] = record
    return [status, work.now_ms, record.reserved_at_ms, record.expires_at_ms, record.revision]


def prolong(work: Work, reservation: Reservation, expires_at_ms: int) -> None:
    """Make the lease longer; holds that stand at its end move along."""
    for hold in reservation.holds:
        if hold.hold_ms != hold.settle_ms:
            work.charge(hold.window_field, hold.span_ms, hold.hold_ms, 0, -hold.amount)
            hold.hold_ms = min(expires_at_ms, hold.settle_ms) if hold.settle_ms else expires_at_ms
            work.charge(hold.window_field, hold.span_ms, hold.hold_ms, 0, hold.amount)
    reservation.expires_at_ms = expires_at_ms


def peek(work: Work, operation: Peek) -> Reply:
    """Twin of `lua/peek.lua`."""
    reply: Reply = ["peeked", work.now_ms]
    for limit in operation.limits:
        if limit.period_end_ms > 0 and not limit.period_start_ms <= work.now_ms < limit.period_end_ms:
            return ["stale_period", work.now_ms]
        reply += work.window(limit.window_field, limit.span_ms).describe()
    return reply


def find(work: Work, operation: Find) -> Reply:
    """Twin of `lua/find.lua`."""
    record = work.record(operation.field)
    if record is None:
        return ["absent", work.now_ms]
    if isinstance(record, Ended):
        return [record.kind, work.now_ms, record.number, record.reserved_at_ms, record.booked_at_ms]
    status = "open" if record.expires_at_ms > work.now_ms else "expired"
    return [status, work.now_ms, record.reserved_at_ms, record.expires_at_ms, record.call_facts, record.estimate]


def sweep(work: Work, operation: Sweep) -> Reply:
    """Twin of `lua/sweep.lua`."""
    expired = work.sweep(work.sweep_max)
    shard, dropped = work.shard, []
    due = sorted((ends_ms, name) for name, ends_ms in shard.ends.items() if ends_ms <= work.now_ms)
    for _, name in due[: operation.window_count]:
        if shard.windows[name].ends_ms > work.now_ms:
            shard.ends[name] = shard.windows[name].ends_ms
        elif name not in work.windows:
            dropped.append(name)
    for name in dropped:
        del shard.windows[name], shard.ends[name]
    work.commit(books=True, dropped=bool(dropped))
    overdue = sum(1 for lease in shard.leases if lease[0] <= work.now_ms)
    still_due = sum(1 for ends_ms in shard.ends.values() if ends_ms <= work.now_ms)
    return ["swept", work.now_ms, expired, overdue, len(dropped), still_due]


def fork(work: Work, operation: Fork) -> Reply:
    """Twin of `lua/fork.lua`."""
    shard = work.shard
    if shard.fork and shard.fork[:3] == (operation.follows_epoch, operation.follows_n, work.epoch):
        work.commit(books=True)
        return ["repeated", work.now_ms, *shard.fork[2:]]
    if operation.found_epoch != (work.epoch if shard.layout else 0) or not _is_as_seen(shard, operation):
        work.commit(books=True)
        return ["changed", work.now_ms]
    work.number = max(work.number, operation.follows_n, shard.ledger[-1]["n"] if shard.ledger else 0)
    work.epoch = max(work.now_ms, work.epoch + 1, operation.follows_epoch + 1)
    first = work.number + 1
    known = {
        n: n - run.first_n + run.exported_n for run in operation.renumbered for n in range(run.first_n, run.last_n + 1)
    }
    moved: dict[int, int] = {}
    calls: dict[int, tuple[bytes, str]] = {}
    for entry in shard.ledger:
        if entry["n"] > operation.kept_n:
            outcome = entry["outcome"]
            if entry["kind"] == "adjusted":
                outcome = _renamed(outcome, entry["call"], moved, calls)
            calls[entry["n"]] = entry["call"], entry["id"]
            if entry["n"] in known:
                moved[entry["n"]] = known[entry["n"]]
                continue
            work.number += 1
            moved[entry["n"]] = work.number
            work.entries.append(entry | {"n": work.number, "outcome": outcome, "epoch": work.epoch})
    shard.fork = (operation.follows_epoch, operation.follows_n, work.epoch, first, len(work.entries))
    work.commit(books=True, forked=True)
    shard.ledger[:] = [entry for entry in shard.ledger if entry["n"] not in moved]
    for record_field, record in shard.records.items():
        if isinstance(record, Ended) and record.number in moved:
            shard.records[record_field] = replace(record, number=moved[record.number])
    return ["forked", work.now_ms, *shard.fork[2:]]


def _is_as_seen(shard: Shard, operation: Fork) -> bool:
    """Whether the ledger still is what was seen, and what came since."""
    seen_id, seen_n, seen_booked_ms, seen_at_ms, *_ = operation
    last = next(((entry["id"], entry["booked_at"]) for entry in shard.ledger if entry["n"] == seen_n), ("", 0))
    following = next((entry["booked_at"] for entry in shard.ledger if entry["n"] > seen_n), seen_at_ms)
    return last == (seen_id, seen_booked_ms) and following >= seen_at_ms


def _renamed(outcome: bytes, call: bytes, moved: Mapping[int, int], calls: Mapping[int, tuple[bytes, str]]) -> bytes:
    """A correction names its entry by the new number, if that is of the same call: else it means one that was lost."""
    found, named = _ADJUSTS.search(outcome), _ADJUSTS_ID.search(outcome)
    n = int(found[2]) if found else 0
    facts, reservation_id = calls.get(n, (b"", ""))
    if found is None or facts != call or (named and named[1].decode() != reservation_id):
        return outcome
    return outcome[: found.start(2)] + b"%d" % moved[n] + outcome[found.end(2) :]


_ADJUSTS = re.compile(rb'"adjusts":"(\d+):(\d+)"')
_ADJUSTS_ID = re.compile(rb'"adjusts_id":"([\w-]+)"')

_READ_ONLY: dict[str, Callable[[Work, Any], Reply]] = {"peek": peek, "find": find}
_ALONE: dict[str, Callable[[Work, Any], Reply]] = {"sweep": sweep, "fork": fork}
_WRITING: dict[str, Callable[[Work, Any], Reply]] = {
    "reserve": reserve,
    "settle": settle,
    "record": record,
    "cancel": cancel,
    "revise": revise,
}


def run(name: str, work: Work, operations: Sequence[Any]) -> list[Reply]:
    """Run the script of this name on a batch of operations, as the server would."""
    if name in _READ_ONLY:
        return [_READ_ONLY[name](work, operation) for operation in operations]
    if name in _ALONE:
        return [_ALONE[name](work, operation) for operation in operations]
    swept = name != "reserve" or any(lease[0] <= work.now_ms for lease in work.shard.leases)
    if swept:
        work.sweep(work.sweep_max)
    replies = [_WRITING[name](work, operation) for operation in operations]
    work.commit(books=swept)
    return replies
