"""The verbs, each written once: a flow yields commands, reads the answers and returns a record or raises."""

from __future__ import annotations

import os
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

import msgspec

from meterlib.core.checks import (
    AMOUNT_MAX,
    LEASE_MS_MAX,
    check_attributes,
    check_choice,
    check_count,
    check_id,
    check_lease_ms,
    check_tenant,
    check_text,
    shown,
)
from meterlib.core.decisions import LimitState, quota_exceeded, states_of
from meterlib.core.ledger import (
    CallFacts,
    LedgerEntry,
    Outcome,
    Quality,
    Settlement,
    counts_of,
    decode_call_facts,
    decode_counts,
    digest_of,
    encode,
    entry_of,
)
from meterlib.core.operations import (
    Cancel,
    Find,
    Fork,
    LimitArguments,
    Peek,
    PeekLimit,
    Record,
    Renumbered,
    Reply,
    Reserve,
    Revise,
    Settle,
    Sweep,
)
from meterlib.core.policy import (
    SUB_WINDOWS,
    BoundLimit,
    CompiledPolicy,
    Funding,
    Limit,
    Policy,
    encoded,
    nearest,
    reservation_field,
)
from meterlib.core.usage import Usage, amount_of, amounts_of
from meterlib.errors import (
    InvalidInput,
    PolicyError,
    ReservationConflict,
    ReservationEnded,
    ReservationNotFound,
    StoreOverloaded,
    StoreRefused,
    StoreUnavailable,
)
from meterlib.store.commands import (
    Call,
    Flow,
    KnownSinks,
    ReadHead,
    ReadLedger,
    ReadOwners,
    ReadPage,
    ReadWindows,
    Seen,
    ShardHead,
    StoredPage,
    TrimLedger,
)
from meterlib.store.keys import shard_of
from meterlib.store.options import Clock, StoreOptions

LEASE_MS = 600_000
CALLERS_MAX = 20_000
"""Callers may invent attributes without end; to make one ready again costs little, to keep them all does not."""

SWEEP_PIECE = 100
"""How many overdue reservations one script call of a sweep ends; small enough that no reserve waits long behind it."""

WINDOWS_PIECE = 200
"""How many windows it looks at."""

PIECES_MAX = 200
"""How many such calls the background sweep makes on a shard before it turns to the next one."""

TRIM_PIECE = 5_000
_STALE_TRIES = 4
FUNDINGS = ("hosted", "own")
QUALITIES = ("final", "partial", "estimated", "split_unknown")


class Granted(msgspec.Struct, kw_only=True):
    """What a reservation remembers on the caller's side.

    Attributes:
        tenant: whose it is.
        id: its id.
        attributes: other facts of the call.
        funding: who pays the provider.
        estimate: what is held.
        reserved_at_ms: when it was made, by the store's clock.
        expires_at_ms: when its lease ends unless renewed.
        limits: every limit it touches, as it stood right after the hold was taken.
        metered: False when the store was down and the policy lets calls pass: no limit was asked.
        revision: how often it was revised or renewed when this was made of a reservation that was open already.
    """

    tenant: str
    id: str
    attributes: Mapping[str, str]
    funding: Funding
    estimate: Usage
    reserved_at_ms: int
    expires_at_ms: int
    limits: tuple[LimitState, ...]
    metered: bool = True
    revision: int = 0


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """Where a reservation stands: `open`, or how it ended; times in ms since 1970 UTC."""

    id: str
    status: str
    reserved_at_ms: int
    expires_at_ms: int | None = None
    n: int | None = None
    booked_at_ms: int | None = None


class Swept(msgspec.Struct, kw_only=True):
    """What a sweep did."""

    expired: int = 0
    windows_dropped: int = 0
    overdue: int = 0


class NewEpoch(msgspec.Struct, frozen=True, kw_only=True):
    """What a ledger goes on with: the epoch, the first number in it, and how many entries were moved there."""

    epoch: str
    first: int
    moved: int


class Partition(msgspec.Struct, frozen=True, kw_only=True):
    """How a limit stands for one set of the attributes that partition it; an attribute the calls lacked is left out."""

    attributes: Mapping[str, str]
    state: LimitState


class Caller(NamedTuple):
    """Who makes a call, with all that does not change from call to call."""

    funding: Funding
    limits: tuple[BoundLimit, ...]
    call_facts: bytes
    field_prefix: str
    shard: int


class Context:
    """What all flows of a meter share: policy, layout, and how far the caller's clock is off the store's."""

    def __init__(
        self, policy: Policy, options: StoreOptions, clock: Clock | None, when_down: Literal["deny", "allow"]
    ) -> None:
        check_choice(when_down, "when_down", ("deny", "allow"))
        if clock is not None and type(getattr(clock, "now_ms", None)) is not int:
            raise InvalidInput("clock", f"something with now_ms, whole ms since 1970, is needed, not {shown(clock)}")
        self.options = options
        self.clock = clock
        self.when_down = when_down
        self._offset_ms = 0
        self.policy = policy

    @property
    def policy(self) -> Policy:
        """The limits in force; set it to change them for all calls from then on."""
        return self.compiled.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        if not isinstance(policy, Policy):
            raise InvalidInput("policy", f"a Policy is needed, not {type(policy).__name__}")
        for at, limit in enumerate(policy.limits):
            if limit.shared and self.options.shards != 1:
                problem = "a limit that all tenants share needs a store with one shard ([store] shards = 1)"
                raise PolicyError(f"limit[{at}].shared", problem)
        self.compiled = CompiledPolicy(policy)
        self._callers: dict[Hashable, Caller] = {}

    def caller(self, tenant: str, attributes: Mapping[str, str], funding: Funding | None) -> Caller:
        """Check who makes a call, and make ready what all its calls have in common; both once."""
        callers = self._callers  # of the policy at this moment, should another one be set meanwhile
        try:
            key = (tenant, funding, *attributes.items())
            known = callers.get(key)
        except (AttributeError, TypeError):
            key, known = None, None  # the checks say what is wrong
        if known is not None:
            return known
        check_tenant(tenant)
        check_attributes(attributes)
        if funding is not None:
            check_choice(funding, "funding", FUNDINGS)
        compiled = self.compiled
        funding = funding or compiled.funding_of(tenant)
        call_facts = encode(CallFacts(tenant=tenant, attributes=attributes, funding=funding))
        limits, prefix = compiled.limits_of(tenant, attributes), reservation_field(tenant, "")
        if len(callers) >= CALLERS_MAX:
            callers.clear()
        made = callers[key] = Caller(funding, limits, call_facts, prefix, self.shard_of(tenant))
        return made

    def now_ms(self) -> int:
        """About the store's time; only used to tell which calendar period it is."""
        own_ms = self.clock.now_ms if self.clock else time.time_ns() // 1_000_000
        return own_ms + self._offset_ms

    def learn(self, store_now_ms: int) -> None:
        """The store said what time it is, since ours was wrong about a period."""
        self._offset_ms += store_now_ms - self.now_ms()

    def shard_of(self, tenant: str) -> int:
        return shard_of(tenant, self.options.shards)


def new_id() -> str:
    """128 random bits: nobody else's, and not to be guessed."""
    return os.urandom(16).hex()


def reserve(
    context: Context,
    tenant: str,
    attributes: Mapping[str, str],
    usage: Usage,
    reservation_id: str | None = None,
    lease_ms: int = LEASE_MS,
    funding: Funding | None = None,
) -> Flow[Granted]:
    """Hold an estimate on every limit that the call touches, or on none; see `Meter.reserve`."""
    caller = context.caller(tenant, attributes, funding)
    _check_usage(usage)
    check_lease_ms(lease_ms)
    taken_id = new_id() if reservation_id is None else check_id(reservation_id)
    bound, call_facts, estimate = caller.limits, caller.call_facts, encode(usage)
    field, digest = caller.field_prefix + taken_id, digest_of(call_facts, estimate)
    made: Reserve | None = None
    try:
        for _ in range(_STALE_TRIES):
            made = Reserve(field, lease_ms, _arguments(context, bound, usage), digest, call_facts, estimate)
            reply: Reply = yield Call("reserve", caller.shard, made)
            if not _stale(context, reply):
                break
        else:
            raise StoreUnavailable("reserve", "its clock runs away")
    except StoreUnavailable as error:
        # Too much to do here is no reason to let calls pass: the store is there.
        if context.when_down == "deny" or isinstance(error, StoreOverloaded):
            raise
        return _unmetered(tenant, taken_id, attributes, caller.funding, usage, lease_ms)
    status = _status(reply)
    if status == "denied":
        raise quota_exceeded(tenant, bound, made.limits, reply)
    if status == "ended":
        raise ReservationEnded(taken_id, _text(reply[2]))
    if status == "conflict":
        stored = f"{_text(reply[2])} {_text(reply[3])}"
        given = f"{call_facts.decode()} {estimate.decode()}"
        raise ReservationConflict(f"reservation {taken_id!r} is open with another payload", taken_id, stored, given)
    return Granted(
        tenant=tenant,
        id=taken_id,
        attributes=attributes,
        funding=caller.funding,
        estimate=usage,
        reserved_at_ms=int(reply[2]),
        expires_at_ms=int(reply[3]),
        limits=states_of(bound, reply, 5),
        revision=int(reply[4]),
    )


def _unmetered(
    tenant: str, taken_id: str, attributes: Mapping[str, str], funding: Funding, usage: Usage, lease_ms: int
) -> Granted:
    """The policy lets calls pass while the store is down; their usage is booked when it is settled."""
    now_ms = time.time_ns() // 1_000_000
    return Granted(
        tenant=tenant,
        id=taken_id,
        attributes=attributes,
        funding=funding,
        estimate=usage,
        reserved_at_ms=now_ms,
        expires_at_ms=now_ms + lease_ms,
        limits=(),
        metered=False,
    )


def revise(context: Context, tenant: str, reservation_id: str, usage: Usage, revision: int = 0) -> Flow[int]:
    """Hold a better estimate; see `Meter.revise`."""
    _check_usage(usage)
    amounts = amounts_of(usage)
    return (yield from _change(context, tenant, reservation_id, revision, 0, encode(usage), amounts))


def renew(context: Context, tenant: str, reservation_id: str, lease_ms: int, revision: int = 0) -> Flow[int]:
    """Prolong the lease; returns when it ends, in ms since 1970 UTC. See `Meter.renew`."""
    check_lease_ms(lease_ms)
    return (yield from _change(context, tenant, reservation_id, revision, lease_ms, b"", ()))


def _change(
    context: Context,
    tenant: str,
    reservation_id: str,
    revision: int,
    lease_ms: int,
    estimate: bytes,
    amounts: tuple[tuple[str, int], ...],
) -> Flow[int]:
    check_tenant(tenant)
    check_id(reservation_id)
    check_count(revision, "revision", AMOUNT_MAX, least=0)
    field = reservation_field(tenant, reservation_id)
    operation = Revise(field, revision, lease_ms, LEASE_MS_MAX, estimate, amounts)
    reply: Reply = yield Call("revise", context.shard_of(tenant), operation)
    status = _status(reply)
    if status == "absent":
        raise ReservationNotFound(reservation_id)
    if status == "ended":
        raise ReservationEnded(reservation_id, _text(reply[2]))
    return int(reply[3])


def settle(context: Context, settlement: Settlement) -> Flow[LedgerEntry]:
    """Replace the hold by what was used and book it; see `Meter.settle`."""
    tenant, reservation_id, usage = settlement.tenant, settlement.reservation_id, settlement.usage
    check_tenant(tenant)
    check_id(reservation_id)
    outcome = _outcome_of(settlement)
    call_facts = settlement.call_facts
    if call_facts is not None:
        check_attributes(call_facts.attributes)
    shard = context.shard_of(tenant)
    blob = encode(outcome)
    operation = Settle(
        reservation_field(tenant, reservation_id),
        digest_of(blob),
        blob,
        b"",
        "ask",
        amounts_of(usage),
        (),
    )
    reply: Reply = yield Call("settle", shard, operation)
    if _status(reply) == "unknown":
        yield from _refuse_foreign(context, tenant, reservation_id)
        made_by = call_facts or CallFacts(tenant=tenant, funding=context.compiled.funding_of(tenant))
        bound = context.compiled.limits_of(tenant, made_by.attributes) if call_facts else ()
        for _ in range(_STALE_TRIES):
            limits = _coarse(_arguments(context, bound, usage))
            charged = operation._replace(call_facts=encode(made_by), if_unknown="write", limits=limits)
            reply = yield Call("settle", shard, charged)
            if not _stale(context, reply):
                break
        else:
            raise StoreUnavailable("settle", "its clock runs away")
    if _status(reply) == "conflict":
        stored = _text(reply[3]) or "an entry that is no longer in the ledger"
        kind = _text(reply[2])
        message = f"reservation {reservation_id!r} was {kind} with another usage"
        if kind in ("recorded", "adjusted"):
            message = f"{reservation_id!r} is the id of {kind} usage, and not of a reservation; nothing was written"
        raise ReservationConflict(message, reservation_id, stored, blob.decode())
    return _booked(shard, settlement, outcome, reply)


def unbooked(context: Context, settlement: Settlement) -> LedgerEntry:
    """The entry of a settlement that waits in the journal; it has no number yet."""
    reply: Reply = ["settled", 0, "settled", 0, 0, 0, "", b"", b""]
    return _booked(context.shard_of(settlement.tenant), settlement, _outcome_of(settlement), reply)


def _outcome_of(settlement: Settlement) -> Outcome:
    _check_usage(settlement.usage)
    return _outcome(settlement.usage, settlement.quality, settlement.facts)


def _refuse_foreign(context: Context, tenant: str, reservation_id: str) -> Flow[None]:
    """Usage of a reservation nobody knows is booked; but not where the id is open for another tenant, by mistake.

    Tenants live in different shards, so this asks each of them: only ever for a settle whose reservation is not found.
    Only what is open is looked through. What has ended stays known for a day, by tenant and then id: to find an id of
    any tenant there, millions of records would have to be read, in the tenant's own shard as in the others.
    """
    for shard in range(context.options.shards):
        owners: Sequence[str] = yield ReadOwners(shard, reservation_id)
        if owners:
            raise ReservationConflict(
                f"reservation {reservation_id!r} is not {tenant!r}'s; nothing was written"
                " (if the usage is this tenant's all the same, book it with record())",
                reservation_id,
            )


def _booked(shard: int, settlement: Settlement, outcome: Outcome, reply: Reply) -> LedgerEntry:
    _, _, kind, n, reserved_at, booked_at, after, call_facts, estimate = reply
    made_by = decode_call_facts(_bytes(call_facts)) if call_facts else settlement.call_facts
    made_by = made_by or CallFacts(tenant=settlement.tenant)
    return LedgerEntry(
        shard=shard,
        n=int(n),
        kind=_text(kind),  # type: ignore[arg-type]
        after=_text(after),
        reservation_id=settlement.reservation_id,
        tenant=settlement.tenant,
        attributes=made_by.attributes,
        funding=made_by.funding,
        usage=outcome.usage,
        estimate=decode_counts(_bytes(estimate)),
        quality=outcome.quality,
        facts=outcome.facts,
        reserved_at=int(reserved_at),
        booked_at=int(booked_at),
    )


def cancel(context: Context, tenant: str, reservation_id: str) -> Flow[None]:
    """Free the whole hold; see `Meter.cancel`."""
    check_tenant(tenant)
    check_id(reservation_id)
    reply: Reply = yield Call("cancel", context.shard_of(tenant), Cancel(reservation_field(tenant, reservation_id)))
    if _status(reply) == "ended":
        raise ReservationEnded(reservation_id, _text(reply[2]))


def find(context: Context, tenant: str, reservation_id: str) -> Flow[Found]:
    """Where a reservation stands; see `Meter.find`."""
    check_tenant(tenant)
    check_id(reservation_id)
    reply: Reply = yield Call("find", context.shard_of(tenant), Find(reservation_field(tenant, reservation_id)))
    status = _status(reply)
    if status == "absent":
        raise ReservationNotFound(reservation_id)
    if status == "open" or len(reply) == 6:
        return Found(id=reservation_id, status=status, reserved_at_ms=int(reply[2]), expires_at_ms=int(reply[3]))
    return Found(
        id=reservation_id,
        status=status,
        reserved_at_ms=int(reply[3]),
        n=int(reply[2]) or None,
        booked_at_ms=int(reply[4]),
    )


def record(
    context: Context,
    tenant: str,
    attributes: Mapping[str, str],
    usage: Usage,
    record_id: str | None = None,
    quality: Quality = "final",
    facts: Mapping[str, str] | None = None,
    funding: Funding | None = None,
) -> Flow[LedgerEntry]:
    """Book usage that had no reservation; see `Meter.record`."""
    check_tenant(tenant)
    check_attributes(attributes)
    _check_usage(usage)
    if funding is not None:
        check_choice(funding, "funding", FUNDINGS)
    taken_id = new_id() if record_id is None else check_id(record_id, "record_id")
    call_facts = CallFacts(tenant=tenant, attributes=attributes, funding=funding or context.compiled.funding_of(tenant))
    bound = context.compiled.limits_of(tenant, attributes)
    outcome = _outcome(usage, quality, facts)
    entry: LedgerEntry = yield from _write(context, "recorded", taken_id, call_facts, outcome, bound, usage)
    return entry


def adjust(
    context: Context,
    entry: LedgerEntry,
    difference: Mapping[str, object],
    reason: str,
    actor: str,
    adjust_id: str | None,
) -> Flow[LedgerEntry]:
    """Book a signed correction of an entry; see `Meter.adjust`."""
    if not isinstance(entry, LedgerEntry):
        raise InvalidInput("entry", f"a LedgerEntry is needed, not {type(entry).__name__}")
    check_text(reason, "reason", 256)
    if actor:
        check_text(actor, "actor", 128)
    _check_difference(difference, "difference", _DIFFERENCE)
    difference = _own_difference(difference)
    taken_id = new_id() if adjust_id is None else check_id(adjust_id, "adjust_id")
    outcome = Outcome(
        usage=difference,
        quality=entry.quality,
        adjusts=f"{entry.shard}:{entry.n}",
        adjusts_id=entry.reservation_id,
        reason=reason,
        actor=actor,
    )
    call_facts = CallFacts(tenant=entry.tenant, attributes=entry.attributes, funding=entry.funding)
    written: LedgerEntry = yield from _write(context, "adjusted", taken_id, call_facts, outcome, (), None)
    return written


def _write(
    context: Context,
    kind: Literal["recorded", "adjusted"],
    taken_id: str,
    call_facts: CallFacts,
    outcome: Outcome,
    bound: Sequence[BoundLimit],
    usage: Usage | None,
) -> Flow[LedgerEntry]:
    shard = context.shard_of(call_facts.tenant)
    field = reservation_field(call_facts.tenant, taken_id)
    call_blob, blob = encode(call_facts), encode(outcome)
    for _ in range(_STALE_TRIES):
        limits = () if usage is None else _coarse(_arguments(context, bound, usage))
        operation = Record(field, kind, digest_of(call_blob, blob), call_blob, blob, limits)
        reply: Reply = yield Call("record", shard, operation)
        if not _stale(context, reply):
            break
    else:
        raise StoreUnavailable("record", "its clock runs away")
    status = _status(reply)
    if status == "open":
        raise ReservationConflict(f"{taken_id!r} is the id of an open reservation: settle it", taken_id)
    if status == "conflict":
        raise ReservationConflict(
            f"the id {taken_id!r} was {_text(reply[2])} with another payload", taken_id, _text(reply[3]), blob.decode()
        )
    return LedgerEntry(
        shard=shard,
        n=int(reply[3]),
        kind=kind,
        reservation_id=taken_id,
        tenant=call_facts.tenant,
        attributes=call_facts.attributes,
        funding=call_facts.funding,
        usage=outcome.usage,
        quality=outcome.quality,
        facts=outcome.facts,
        reserved_at=0,
        booked_at=int(reply[5]),
        adjusts=outcome.adjusts,
        adjusts_id=outcome.adjusts_id,
        reason=outcome.reason,
        actor=outcome.actor,
    )


def peek(context: Context, tenant: str, attributes: Mapping[str, str]) -> Flow[tuple[LimitState, ...]]:
    """How every limit of such a call stands; see `Meter.peek`."""
    check_tenant(tenant)
    check_attributes(attributes)
    bound = context.compiled.limits_of(tenant, attributes)
    for _ in range(_STALE_TRIES):
        now_ms = context.now_ms()
        limits = tuple(
            PeekLimit(made.window_field, made.span_ms, made.period_start_ms, made.period_end_ms)
            for made in (limit.arguments(0, now_ms) for limit in bound)
        )
        reply: Reply = yield Call("peek", context.shard_of(tenant), Peek(limits))
        if not _stale(context, reply):
            return states_of(bound, reply, 2)
    raise StoreUnavailable("peek", "its clock runs away")


def partitions(context: Context, tenant: str) -> Flow[list[Partition]]:
    """How every limit stands for each partition of the tenant that the store knows; changes nothing.

    A partition is known from its first call until its window has slid out and was swept.
    """
    check_tenant(tenant)
    fields: list[str] = []
    for owner in (encoded(tenant), "*"):
        fields += yield ReadWindows(context.shard_of(tenant), owner)
    limits = {limit.name: limit for limit in context.policy.limits}
    known: dict[tuple[tuple[str, str], ...], set[str]] = {}
    for field in fields:
        _, _, name, *values = field.split("/")
        attributes = _partition_attributes(limits.get(name), values)
        if attributes is not None:
            known.setdefault(attributes, set()).add(name)
    # A window says which attributes partition it, and no longer which calls it matched: that is settled.
    unmatched = tuple(msgspec.structs.replace(limit, match={}) for limit in context.policy.limits)
    policy = Policy(limits=unmatched, tenants=context.policy.tenants)
    everything = Context(policy, context.options, context.clock, context.when_down)
    found: list[Partition] = []
    for attributes, names in sorted(known.items()):
        states = yield from peek(everything, tenant, dict(attributes))
        found += [Partition(attributes=dict(attributes), state=state) for state in states if state.name in names]
    return found


def _partition_attributes(limit: Limit | None, values: Sequence[str]) -> tuple[tuple[str, str], ...] | None:
    """The attributes that a window's name tells; None if it is of a limit that the policy does not have any more."""
    if limit is None:
        return None
    if limit.period is not None:
        values = values[:-1]
    if len(values) != len(limit.per):
        return None
    return tuple((name, unquote(value)) for name, value in zip(limit.per, values, strict=True) if value)


def sweep(context: Context) -> Flow[Swept]:
    """Expire all that is overdue, forget what ended long ago, drop windows that have slid out, in every shard."""
    swept = Swept()
    for shard in range(context.options.shards):
        there = yield from sweep_shard(shard)
        swept.expired += there.expired
        swept.windows_dropped += there.windows_dropped
    return swept


def sweep_shard(shard: int, pieces_max: int | None = None) -> Flow[Swept]:
    """The sweep of one shard, a piece at a time, until nothing is due or so many pieces are done."""
    swept, pieces, due = Swept(), 0, 1
    while due and pieces != pieces_max:
        reply: Reply = yield Call("sweep", shard, Sweep(WINDOWS_PIECE), SWEEP_PIECE)
        swept.expired += int(reply[2])
        swept.overdue = int(reply[3])
        swept.windows_dropped += int(reply[4])
        due, pieces = swept.overdue + int(reply[5]), pieces + 1
    return swept


def read_ledger(shard: int, after: int, count: int) -> Flow[list[LedgerEntry]]:
    """The entries of a shard behind number `after`, at most `count`."""
    check_count(count, "count", 10_000)
    check_count(after, "after", AMOUNT_MAX, least=0)
    page = yield ReadLedger(shard, after, count)
    return [entry_of(shard, n, fields) for n, fields in page]


def read_stored(shard: int, after: int, count: int) -> Flow[list[tuple[int, dict[bytes, bytes]]]]:
    """The entries of a shard behind number `after`, at most `count`, with their fields as they stand in the store."""
    page: list[tuple[int, dict[bytes, bytes]]] = yield ReadLedger(shard, after, count)
    return page


def read_page(shard: int, after: int, count: int) -> Flow[StoredPage]:
    """The entries of a shard behind number `after`, at most `count`, as the server sends them."""
    page: StoredPage = yield ReadPage(shard, after, count)
    return page


def trim_ledger(shard: int, below: int) -> Flow[int]:
    """Remove the entries of a shard below number `below`, a piece at a time; returns how many there were.

    The pieces are small, so that no reserve waits for long behind one.
    """
    check_count(below, "below", AMOUNT_MAX)
    head: ShardHead = yield ReadHead(shard)
    removed = 0
    for end in range(head.ledger_first + TRIM_PIECE, below + TRIM_PIECE, TRIM_PIECE):
        removed += yield TrimLedger(shard, min(end, below))
    return removed


def known_sinks(add: str = "", drop: str = "") -> Flow[list[str]]:
    """The names of the sinks that the ledgers are exported to, once one was added, or dropped."""
    names: list[str] = yield KnownSinks(add, drop)
    return names


def clock_ms(shard: int) -> Flow[int]:
    """A shard's own time, in ms since 1970 UTC."""
    reply: Reply = yield Call("peek", shard, Peek(()))
    return int(reply[1])


def fork(
    shard: int,
    found_epoch: str,
    follows_epoch: str,
    follows_n: int,
    kept_n: int,
    seen: Seen,
    renumbered: tuple[Renumbered, ...] = (),
) -> Flow[NewEpoch]:
    """Begin another epoch of a ledger that lost what was exported from it; see `lua/fork.lua`.

    Raises:
        StoreRefused: the ledger is of another epoch than was found, or is not the one that was seen; nothing was
            written.
    """
    check_count(follows_n, "follows_n", AMOUNT_MAX)
    check_count(kept_n, "kept_n", AMOUNT_MAX, least=0)
    operation = Fork(*seen, int(found_epoch or 0), int(follows_epoch), follows_n, kept_n, renumbered)
    reply: Reply = yield Call("fork", shard, operation)
    if _status(reply) == "changed":
        cause = "the ledger is not what it was when it was looked at (it lost some, got some back, or was forked)"
        raise StoreRefused("fork", f"{cause}; look again")
    return NewEpoch(epoch=f"{int(reply[2]):013d}", first=int(reply[3]), moved=int(reply[4]))


def read_head(shard: int) -> Flow[ShardHead]:
    """A shard's own numbers."""
    head: ShardHead = yield ReadHead(shard)
    return head


def _arguments(context: Context, bound: Sequence[BoundLimit], usage: Usage) -> tuple[LimitArguments, ...]:
    now_ms = context.now_ms()
    return tuple([limit.arguments(amount_of(usage, limit.unit) or 0, now_ms) for limit in bound])


def _coarse(limits: Sequence[LimitArguments]) -> tuple[LimitArguments, ...]:
    """The same limits for usage that nobody reserved: in sub-windows, however few requests their quota is.

    A window that is exact to the ms is small because its quota is; usage that is never denied would make it grow.
    """
    return tuple(
        [
            limit._replace(sub_window_ms=max(limit.sub_window_ms, limit.span_ms // SUB_WINDOWS))
            if limit.sub_window_ms
            else limit
            for limit in limits
        ]
    )


def _outcome(usage: Usage, quality: Quality, facts: Mapping[str, str] | None) -> Outcome:
    check_choice(quality, "quality", QUALITIES)
    facts = {} if facts is None else check_attributes(facts, "facts")
    return Outcome(usage=counts_of(usage), quality=quality, facts=facts)


def _check_usage(usage: object) -> None:
    if not isinstance(usage, Usage):
        raise InvalidInput("usage", f"a Usage is needed, not {type(usage).__name__}")


_DIFFERENCE: Mapping[str, object] = {
    "input_tokens": int,
    "cache_creation_input_tokens": int,
    "cache_read_input_tokens": int,
    "output_tokens": int,
    "cache_creation": {"ephemeral_5m_input_tokens": int, "ephemeral_1h_input_tokens": int},
    "output_tokens_details": {"thinking_tokens": int},
    "server_tool_use": {"web_search_requests": int, "web_fetch_requests": int, "code_execution_requests": int},
    "amounts": None,
}
"""What a correction may name: a usage's counts, in its nesting, and units of the caller's own."""


def _check_difference(difference: object, field: str, allowed: object) -> None:
    if not isinstance(difference, Mapping) or not difference:
        raise InvalidInput(field, "a mapping of a usage's fields to whole numbers is needed, and not an empty one")
    for name, value in difference.items():
        if not isinstance(name, str) or not name.isascii():
            raise InvalidInput(field, f"{shown(name)} is no field of a usage")
        if isinstance(allowed, Mapping) and name not in allowed:
            raise InvalidInput(f"{field}.{name}", f"a usage has no such field{nearest(name, tuple(allowed))}")
        inner = allowed.get(name) if isinstance(allowed, Mapping) else int
        if inner is not int:
            _check_difference(value, f"{field}.{name}", inner)
        elif type(value) is not int or abs(value) > AMOUNT_MAX:
            raise InvalidInput(f"{field}.{name}", f"a whole number within 2^53 is needed, not {shown(value)}")


def _own_difference(difference: Mapping[str, object]) -> dict[str, object]:
    """A copy, to the innermost number: what the caller does to its own later changes no entry in hand."""
    return {name: _own_difference(value) if isinstance(value, Mapping) else value for name, value in difference.items()}


def _stale(context: Context, reply: Reply) -> bool:
    if reply[0] not in (b"stale_period", "stale_period"):
        return False
    context.learn(int(reply[1]))
    return True


def _status(reply: Reply) -> str:
    return _text(reply[0])


def _text(word: Any) -> str:
    return word if isinstance(word, str) else bytes(word).decode()


def _bytes(word: Any) -> bytes:
    return word.encode() if isinstance(word, str) else bytes(word)
