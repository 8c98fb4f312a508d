"""Meter and AsyncMeter: the verbs, one line each, and the reservations they hand out."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import cached_property
from os import PathLike
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from meterlib.core.checks import LEASE_MS_MAX, check_attributes, check_count, check_tenant
from meterlib.core.decisions import LimitState
from meterlib.core.ledger import CallFacts, LedgerEntry, Quality, Settlement
from meterlib.core.policy import Funding, Policy
from meterlib.core.usage import Usage
from meterlib.errors import InvalidInput, MeterError, StoreError, StoreUnavailable, UsageError
from meterlib.local import LocalLease
from meterlib.store import flows
from meterlib.store.commands import Flow, ShardHead
from meterlib.store.flows import LEASE_MS, Context, Found, Granted, Swept
from meterlib.store.journal import Journal, Waiting
from meterlib.store.options import Clock, StoreOptions
from meterlib.store.telling import log
from meterlib.waiting import AsyncQueues, SyncQueues

T = TypeVar("T")
LEDGER_PAGE = 1000
NO_USAGE = Usage()


class _Meter:
    """What both meters are made of."""

    _face: Literal["sync", "async"]

    def __init__(
        self,
        client: Any,
        policy: Policy,
        *,
        options: StoreOptions | None = None,
        clock: Clock | None = None,
        when_down: Literal["deny", "allow"] = "deny",
        journal: str | PathLike[str] | None = None,
        sweep_interval_ms: int = 10_000,
    ) -> None:
        options = StoreOptions() if options is None else options
        if not isinstance(options, StoreOptions):
            raise InvalidInput("options", f"StoreOptions are needed, not {type(options).__name__}")
        check_count(sweep_interval_ms, "sweep_interval_ms", 86_400_000, least=0)
        self._context = Context(policy, options, clock, when_down)
        # Here, since redis-py takes longer to load than all that is our own.
        from meterlib.store.connect import driver_for_client, driver_for_url

        make = driver_for_url if isinstance(client, str) else driver_for_client
        self._driver: Any = make(client, options, clock, self._face)
        self._owns_client = isinstance(client, str)
        self._server = getattr(self._driver, "server", None)
        self._journal = Journal(journal) if journal is not None else None
        self._sweep_interval_ms = 0 if clock else sweep_interval_ms
        self._queues: Any = SyncQueues(clock) if self._face == "sync" else AsyncQueues(clock)
        self._clock = clock
        self._closed = False

    @classmethod
    def connect(
        cls,
        url: str,
        policy: Policy,
        *,
        options: StoreOptions | None = None,
        clock: Clock | None = None,
        when_down: Literal["deny", "allow"] = "deny",
        journal: str | PathLike[str] | None = None,
        sweep_interval_ms: int = 10_000,
    ) -> Self:
        """A meter for the store at `url`; opens nothing before the first call.

        Its calls to a single server do not go by a redis-py client's methods, which take longer than the call. Where
        calls are to be seen there, as by a client that traces them, make the meter of that client: `Meter(client, …)`.

        Args:
            url: `redis://`, `rediss://`, `unix://`, `redis+cluster://`, `redis+sentinel://host:port/service`,
                `embedded:///path` (the bundled Valkey with an append-only file, shared by all who name the folder), or
                `memory://` (this meter alone, gone with it).
            policy: the limits.
            options: shards, time-outs and the like; the same for all who share the store.
            clock: a test's clock in place of the server's; with one, nothing runs in the background.
            when_down: what `reserve` does while the store is down: `deny` raises StoreUnavailable, `allow` lets calls
                pass without asking any limit (`reservation.metered` is False).
            journal: a local file for settlements that the store cannot take; they are replayed when it can again.
            sweep_interval_ms: within which time the background sweep has looked at every shard; 0 for never.
        """
        return cls(
            url,
            policy,
            options=options,
            clock=clock,
            when_down=when_down,
            journal=journal,
            sweep_interval_ms=sweep_interval_ms,
        )

    @property
    def policy(self) -> Policy:
        """The limits in force; set it to change them for all calls from then on."""
        return self._context.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._context.policy = policy

    def quotas_of(self, tenant: str, attributes: Mapping[str, str] | None = None) -> dict[str, int]:
        """The smallest quota of each unit among the limits that such a call touches; asks no store.

        Raises:
            InvalidInput: a call could not be of this tenant, or have these attributes.
        """
        quotas: dict[str, int] = {}
        check_tenant(tenant)
        for bound in self._context.compiled.limits_of(tenant, check_attributes(_given(attributes, {}))):
            quotas[bound.unit] = min(bound.quota, quotas.get(bound.unit, bound.quota))
        return quotas

    def funding_of(self, tenant: str) -> Funding:
        """Who pays the provider for a tenant's calls, as the policy says; asks no store.

        Raises:
            InvalidInput: there can be no such tenant.
        """
        return self._context.compiled.funding_of(check_tenant(tenant))

    @property
    def shards(self) -> int:
        """How many ledgers the store has."""
        return self._context.options.shards

    def __repr__(self) -> str:
        return f"<{type(self).__name__} prefix={self._context.options.prefix!r} shards={self.shards}>"

    def _check_shard(self, shard: int) -> None:
        check_count(shard, "shard", self.shards - 1, least=0)

    def _windows_of(self, tenant: str, attributes: Mapping[str, str]) -> dict[str, str]:
        """The window of each limit that such a call touches, by the limit's name."""
        check_tenant(tenant)
        check_attributes(attributes)
        return {bound.name: bound.window_field for bound in self._context.compiled.limits_of(tenant, attributes)}

    def _ended(self, tenant: str, attributes: Mapping[str, str] | None) -> None:
        """Whoever waits in this process for what a reservation held asks at once."""
        if self._queues:
            windows = None if attributes is None else self._windows_of(tenant, attributes).values()
            self._queues.freed(tenant, windows)

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this meter is closed")

    def _journalled(self, error: StoreError, settlement: Settlement) -> LedgerEntry:
        """The store cannot take a settlement now: it goes to the journal, or the caller hears of it."""
        if self._journal is None:
            raise error
        self._journal.append(settlement)
        fields = {"tenant": settlement.tenant, "reservation_id": settlement.reservation_id}
        log.warning("settlement.journalled", error=str(error), **fields)
        return flows.unbooked(self._context, settlement)

    def _settlement(
        self,
        tenant: str,
        reservation_id: str,
        usage: Usage,
        quality: Quality,
        facts: Mapping[str, str] | None,
        attributes: Mapping[str, str] | None,
    ) -> Settlement:
        call_facts = None
        if attributes is not None:
            funding = self._context.compiled.funding_of(tenant)
            call_facts = CallFacts(tenant=tenant, attributes=_own(attributes), funding=funding)
        return Settlement(
            tenant=tenant,
            reservation_id=reservation_id,
            usage=usage,
            quality=quality,
            facts=_own(_given(facts, {})),
            call_facts=call_facts,
        )


class _Replay:
    """What became of the settlements that waited in a journal."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._stuck: set[int] = set()
        self.over = False
        self.made: list[Waiting] = []
        self.refused: list[Waiting] = []

    def is_due(self, item: Waiting) -> bool:
        """Whether its shard has refused none of those before it."""
        return self._context.shard_of(item.settlement.tenant) not in self._stuck

    def failed(self, item: Waiting, error: MeterError) -> None:
        """The store did not take it: it waits on, unless the trouble is its own."""
        settlement = item.settlement
        if isinstance(error, UsageError):  # the meter was closed meanwhile
            raise error
        if isinstance(error, StoreUnavailable):
            self.over = True
        elif isinstance(error, StoreError):
            self._stuck.add(self._context.shard_of(settlement.tenant))
        else:
            self.refused.append(item)
            fields = {"tenant": settlement.tenant, "reservation_id": settlement.reservation_id}
            log.error("settlement.replay_refused", error=str(error), **fields)


def _given(value: T | None, default: T) -> T:
    """What the caller gave, be it empty or wrong; checks come later, and None alone means nothing."""
    return default if value is None else value


def _own(mapping: T) -> T:
    """A copy of a caller's mapping, which it may change later; what is none is left to the checks."""
    given: Any = mapping
    return dict(given) if type(given) is dict or isinstance(given, Mapping) else given  # type: ignore[return-value]


class _Held:
    """What sync and async reservations have in common: the facts of the grant."""

    def __init__(self, meter: Any, granted: Granted) -> None:
        self._meter = meter
        self._granted = granted
        self._revision = granted.revision
        self._sent = False
        self.ended = False

    @property
    def id(self) -> str:
        """The reservation's id."""
        return self._granted.id

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return self._granted.tenant

    @property
    def attributes(self) -> Mapping[str, str]:
        """Other facts of the call."""
        return self._granted.attributes

    @property
    def limits(self) -> tuple[LimitState, ...]:
        """Every limit the call touches, as it stood right after the hold was taken."""
        return self._granted.limits

    @property
    def reserved_at_ms(self) -> int:
        """When it was made, by the store's clock, in ms since 1970 UTC."""
        return self._granted.reserved_at_ms

    @property
    def expires_at_ms(self) -> int:
        """When its lease ends unless it is renewed, in ms since 1970 UTC."""
        return self._granted.expires_at_ms

    @property
    def metered(self) -> bool:
        """False when the store was down and calls are let pass: no limit was asked."""
        return self._granted.metered

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} of {self.tenant!r}>"

    def dispatched(self) -> None:
        """Say that the call is going out: from now on only a settlement tells what it used."""
        self._sent = True

    def _left_open(self) -> None:
        log.warning("reservation.left_open", tenant=self.tenant, reservation_id=self.id)

    def _next_revision(self) -> int:
        self._revision += 1
        return self._revision

    def _settlement(self, usage: Usage, quality: Quality, facts: Mapping[str, str] | None) -> Settlement:
        granted = self._granted
        return Settlement(
            tenant=granted.tenant,
            reservation_id=granted.id,
            usage=usage,
            quality=quality,
            facts=_own(_given(facts, {})),
            call_facts=CallFacts(tenant=granted.tenant, attributes=granted.attributes, funding=granted.funding),
        )


class Reservation(_Held):
    """A hold on every limit a call touches. Settle it exactly once, or cancel it if nothing was sent.

    Each method may be repeated after an error: nothing is counted or booked twice.
    """

    _meter: Meter

    def revise(self, usage: Usage) -> None:
        """Hold `usage` in place of the estimate; see `Meter.revise`."""
        self._granted.estimate = usage
        self._meter.revise(self.tenant, self.id, usage, revision=self._next_revision())

    def renew(self, lease_ms: int = LEASE_MS) -> None:
        """Prolong the lease to `lease_ms` from now; see `Meter.renew`."""
        self._granted.expires_at_ms = self._meter.renew(self.tenant, self.id, lease_ms, revision=self._next_revision())

    def settle(
        self, usage: Usage, *, quality: Quality = "final", facts: Mapping[str, str] | None = None
    ) -> LedgerEntry:
        """Replace the hold by what was really used, and book it; see `Meter.settle`."""
        entry = self._meter._settle(self._settlement(usage, quality, facts))
        self.ended = True
        self._meter._ended(self.tenant, self.attributes)
        return entry

    def cancel(self) -> None:
        """Free the whole hold: nothing was sent to the provider; see `Meter.cancel`."""
        self._meter.cancel(self.tenant, self.id)
        self.ended = True


class Meter(_Meter):
    """Decides before a call whether it may be made, and books afterwards what it used.

    Thread-safe. A context manager; otherwise call `close()`.

    Raises (every verb):
        InvalidInput: an argument is not acceptable; nothing was sent to the store.
        StoreUnavailable: the store did not answer in time; repeating the same call is safe.
        StoreRefused, StoreCorrupt: the store said no; nothing was written.

    A settlement that the store cannot take for any of these three goes to the journal instead, if there is one.
    """

    _face = "sync"

    def reserve(
        self,
        tenant: str,
        attributes: Mapping[str, str] | None = None,
        usage: Usage | None = None,
        *,
        reservation_id: str | None = None,
        lease_ms: int = LEASE_MS,
        funding: Funding | None = None,
        max_wait_ms: int = 0,
    ) -> Reservation:
        """Hold an estimate on every limit that the call touches, or on none.

        Args:
            tenant: the customer the call is charged to.
            attributes: other facts of the call: provider, model, …; they choose the limits and their partitions.
            usage: the estimate; what is not told counts 0, and every call counts as one request.
            reservation_id: an id of the caller's, unique within the tenant; by default 128 random bits. Repeating the
                call with the same id and payload gives the same reservation.
            lease_ms: how long it may stay unsettled before it expires; `renew` prolongs it.
            funding: who pays the provider; by default as the policy says of the tenant.
            max_wait_ms: how long to wait rather than be denied. Those of this process that wait for the same limits are
                served in the order in which they came; a denial that cannot pass in time is raised at once. A call that
                is not to wait asks the store whoever waits, so where all are to take turns, all have to wait.

        Raises:
            QuotaExceeded: at least one limit denied; no counter was changed.
            ReservationConflict: the id is open with another payload.
            ReservationEnded: the id was settled or cancelled, or has expired.
        """
        check_count(max_wait_ms, "max_wait_ms", LEASE_MS_MAX, least=0)
        attributes, usage = _own(_given(attributes, {})), _given(usage, NO_USAGE)

        def attempt() -> Reservation:
            flow = flows.reserve(self._context, tenant, attributes, usage, reservation_id, lease_ms, funding)
            return Reservation(self, self._run(flow))

        if not max_wait_ms:
            return attempt()
        windows = self._windows_of(tenant, attributes)
        waited: Reservation = self._queues.take(tenant, windows, attempt, max_wait_ms)
        return waited

    def revise(self, tenant: str, reservation_id: str, usage: Usage, *, revision: int = 0) -> None:
        """Hold `usage` in place of the estimate, as when the provider says how large the input really is.

        It may exceed a quota: what is known of a running call is never refused. Units that `usage` does not know stay.

        Args:
            tenant: whose reservation it is.
            reservation_id: its id.
            usage: the better estimate.
            revision: the caller's number of this revision, from 1 up: one that is late changes nothing. 0: the next.

        Raises:
            ReservationNotFound, ReservationEnded: there is nothing to revise.
        """
        self._run(flows.revise(self._context, tenant, reservation_id, usage, revision))

    def renew(self, tenant: str, reservation_id: str, lease_ms: int = LEASE_MS, *, revision: int = 0) -> int:
        """Prolong a lease to `lease_ms` from now, but never shorten it, nor beyond 24 hours since the reservation.

        Returns:
            When the lease ends, in ms since 1970 UTC.

        Raises:
            ReservationNotFound, ReservationEnded: there is nothing to renew.
        """
        return self._run(flows.renew(self._context, tenant, reservation_id, lease_ms, revision))

    def settle(
        self,
        tenant: str,
        reservation_id: str,
        usage: Usage,
        *,
        quality: Quality = "final",
        facts: Mapping[str, str] | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> LedgerEntry:
        """Replace a hold by what was really used and book it, in one step, exactly once; from any process.

        Usage is a fact, and never refused: what exceeds the estimate is charged in full; after the reservation expired
        or was cancelled, or if nobody knows it, the entry is `late` and says so. That is also what becomes of an id
        that was another tenant's and has ended: ids belong to their tenants, and nobody looks through all that ended.

        Args:
            tenant: whose reservation it is.
            reservation_id: its id.
            usage: what was used; a number that is not known (None) leaves what was held for it counted as used.
            quality: how far the numbers are to be trusted.
            facts: what else to keep in the entry, such as the provider's request id.
            attributes: the call's; only needed to charge a reservation that the store no longer knows.

        Returns:
            The ledger entry; its `n` is 0 if the store cannot take it now and the settlement waits in the journal.

        Raises:
            ReservationConflict: it was settled before with another usage, or the id is open for another tenant.
        """
        entry = self._settle(self._settlement(tenant, reservation_id, usage, quality, facts, attributes))
        self._ended(tenant, attributes)
        return entry

    def _settle(self, settlement: Settlement) -> LedgerEntry:
        try:
            return self._run(flows.settle(self._context, settlement))
        except StoreError as error:
            return self._journalled(error, settlement)

    def cancel(self, tenant: str, reservation_id: str) -> None:
        """Free a whole hold, the request included: nothing was sent to the provider.

        An id that is not known is remembered, so that a reserve which was delayed on its way opens nothing.

        Raises:
            ReservationEnded: it was settled or has expired.
        """
        self._run(flows.cancel(self._context, tenant, reservation_id))
        self._ended(tenant, None)

    def record(
        self,
        tenant: str,
        attributes: Mapping[str, str],
        usage: Usage,
        *,
        record_id: str | None = None,
        quality: Quality = "final",
        facts: Mapping[str, str] | None = None,
        funding: Funding | None = None,
    ) -> LedgerEntry:
        """Book usage that had no reservation, and charge it to its limits as of now.

        Raises:
            ReservationConflict: the id was used before with another payload, or is open.
        """
        attributes, facts = _own(attributes), _own(facts)
        return self._run(flows.record(self._context, tenant, attributes, usage, record_id, quality, facts, funding))

    def adjust(
        self,
        entry: LedgerEntry,
        difference: Mapping[str, object],
        reason: str,
        *,
        actor: str = "",
        adjust_id: str | None = None,
    ) -> LedgerEntry:
        """Book a signed correction of an entry. The entry stays as it is, and limits are not touched.

        Args:
            entry: what is corrected.
            difference: by a usage's field names, what to add to the entry's numbers; negative to take away.
            reason: why; 1 to 256 bytes.
            actor: who says so.
            adjust_id: an id under which repeating the call books once; by default 128 random bits.

        Raises:
            ReservationConflict: the id was used before with another payload.
        """
        return self._run(flows.adjust(self._context, entry, difference, reason, actor, adjust_id))

    def peek(self, tenant: str, attributes: Mapping[str, str] | None = None) -> tuple[LimitState, ...]:
        """How every limit that such a call touches stands now; changes nothing."""
        return self._run(flows.peek(self._context, tenant, _given(attributes, {})))

    def find(self, tenant: str, reservation_id: str) -> Found:
        """Where a reservation stands: open, or how it ended.

        Raises:
            ReservationNotFound: the tenant has none of this id, or it ended so long ago that it is forgotten.
        """
        return self._run(flows.find(self._context, tenant, reservation_id))

    def sweep(self) -> Swept:
        """Expire every reservation whose lease is over, in all shards, and drop windows that have slid out."""
        return self._run(flows.sweep(self._context))

    def ledger(self, shard: int, after: int = 0) -> Iterator[LedgerEntry]:
        """The entries of a shard behind number `after`, in order, as far as they go now."""
        self._check_shard(shard)
        while True:
            page = self._run(flows.read_ledger(shard, after, LEDGER_PAGE))
            yield from page
            if len(page) < LEDGER_PAGE:
                return
            after = page[-1].n

    def head(self, shard: int) -> ShardHead:
        """A shard's own numbers: last entry, open reservations, epoch."""
        self._check_shard(shard)
        return self._run(flows.read_head(shard))

    @contextmanager
    def reservation(
        self,
        tenant: str,
        attributes: Mapping[str, str] | None = None,
        usage: Usage | None = None,
        *,
        reservation_id: str | None = None,
        lease_ms: int = LEASE_MS,
    ) -> Iterator[Reservation]:
        """A reservation for the length of a block.

        Call `r.dispatched()` when the call goes out, and `r.settle(…)` when its usage is known. A block that is left
        before `dispatched()`, by an exception or otherwise, cancels the reservation: nothing was sent. Left after it
        and unsettled, the reservation stays open until its lease ends, since an abort never makes used tokens free.
        """
        held = self.reserve(tenant, attributes, usage, reservation_id=reservation_id, lease_ms=lease_ms)
        try:
            yield held
        finally:
            if not held.ended and not held._sent:
                held.cancel()
            elif not held.ended:
                held._left_open()

    def replay(self) -> int:
        """Make the settlements that wait in the journal; returns how many.

        Those that the store still refuses go on waiting, with all others of their shard; out of its reach, all do. One
        that contradicts what is booked already is put aside, in a file named `.refused` beside the journal.
        """
        if self._journal is None:
            return 0
        replay = _Replay(self._context)
        for item in self._journal.waiting():
            if not replay.over and replay.is_due(item):
                try:
                    self._run(flows.settle(self._context, item.settlement))
                    replay.made.append(item)
                except MeterError as error:
                    replay.failed(item, error)
        self._journal.done(replay.made, replay.refused)
        return len(replay.made)

    def _run(self, flow: Flow[T]) -> T:
        self._check_open()
        if self._sweep_interval_ms and not self._background:
            self._start_background()
        result: T = self._driver.run(flow)
        return result

    _background: threading.Thread | None = None

    def _start_background(self) -> None:
        self._stop = threading.Event()
        self._background = threading.Thread(target=self._sweep_for_ever, name="meterlib-sweep", daemon=True)
        self._background.start()

    def _sweep_for_ever(self) -> None:
        shard, failed = 0, False
        while not self._stop.wait(self._sweep_interval_ms / 1000 / self.shards):
            try:
                self._driver.follow()
                self._driver.run(flows.sweep_shard(shard, flows.PIECES_MAX))
                self.replay()
                failed = False
            except Exception as error:
                if not failed and not self._closed:
                    log.warning("sweep.failed", shard=shard, error=str(error))
                failed = True
            shard = (shard + 1) % self.shards

    def close(self) -> None:
        """Stop the background sweep, close what `connect` opened, and stop an embedded server that this meter owns."""
        if self._closed:
            return
        self._closed = True
        self._driver.stop()
        if self._background:
            self._stop.set()
            self._background.join()
        if self._owns_client:
            self._driver.close()
            if self._server:
                self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncReservation(_Held):
    """A `Reservation` whose methods are awaited."""

    _meter: AsyncMeter

    async def revise(self, usage: Usage) -> None:
        """Hold `usage` in place of the estimate; see `Meter.revise`."""
        self._granted.estimate = usage
        await self._meter.revise(self.tenant, self.id, usage, revision=self._next_revision())

    async def renew(self, lease_ms: int = LEASE_MS) -> None:
        """Prolong the lease to `lease_ms` from now; see `Meter.renew`."""
        self._granted.expires_at_ms = await self._meter.renew(
            self.tenant, self.id, lease_ms, revision=self._next_revision()
        )

    async def settle(
        self, usage: Usage, *, quality: Quality = "final", facts: Mapping[str, str] | None = None
    ) -> LedgerEntry:
        """Replace the hold by what was really used, and book it; see `Meter.settle`."""
        entry = await self._meter._settle(self._settlement(usage, quality, facts))
        self.ended = True
        self._meter._ended(self.tenant, self.attributes)
        return entry

    async def cancel(self) -> None:
        """Free the whole hold: nothing was sent to the provider; see `Meter.cancel`."""
        await self._meter.cancel(self.tenant, self.id)
        self.ended = True


class AsyncMeter(_Meter):
    """The `Meter` for asyncio: the same verbs, awaited.

    A cancelled `await` harms nobody else. Whether it still happened is unknown: repeat the verb under the same id. A
    `reserve` whose id nobody chose is taken back by itself. An async context manager; otherwise await `aclose()`.
    """

    _face = "async"

    async def reserve(
        self,
        tenant: str,
        attributes: Mapping[str, str] | None = None,
        usage: Usage | None = None,
        *,
        reservation_id: str | None = None,
        lease_ms: int = LEASE_MS,
        funding: Funding | None = None,
        max_wait_ms: int = 0,
    ) -> AsyncReservation:
        """Hold an estimate on every limit that the call touches, or on none; see `Meter.reserve`."""
        check_count(max_wait_ms, "max_wait_ms", LEASE_MS_MAX, least=0)
        attributes, usage = _own(_given(attributes, {})), _given(usage, NO_USAGE)
        taken_id = flows.new_id() if reservation_id is None else reservation_id

        async def attempt() -> AsyncReservation:
            flow = flows.reserve(self._context, tenant, attributes, usage, taken_id, lease_ms, funding)
            try:
                return AsyncReservation(self, await self._run(flow))
            except asyncio.CancelledError:
                if reservation_id is None:
                    self._take_back(tenant, taken_id)
                raise

        if not max_wait_ms:
            return await attempt()
        windows = self._windows_of(tenant, attributes)
        waited: AsyncReservation = await self._queues.take(tenant, windows, attempt, max_wait_ms)
        return waited

    def _take_back(self, tenant: str, reservation_id: str) -> None:
        """Nobody knows the id but us, so a hold that was made under it after all would stay until its lease ends."""
        taking_back = asyncio.ensure_future(self.cancel(tenant, reservation_id))
        self._taking_back.add(taking_back)
        taking_back.add_done_callback(self._taken_back)

    def _taken_back(self, task: asyncio.Task[None]) -> None:
        self._taking_back.discard(task)
        if not task.cancelled() and task.exception():
            log.warning("reservation.not_taken_back", error=str(task.exception()))

    async def revise(self, tenant: str, reservation_id: str, usage: Usage, *, revision: int = 0) -> None:
        """Hold `usage` in place of the estimate; see `Meter.revise`."""
        await self._run(flows.revise(self._context, tenant, reservation_id, usage, revision))

    def local(self, tenant: str, attributes: Mapping[str, str] | None, slice_of: Usage) -> LocalLease:
        """Admit calls in this process, out of slices of the quotas, without asking the store each time.

        For extreme rates: half a microsecond a call. Never beyond a quota, but what this process holds and does not
        use is denied to others for as long as a slice lasts; see `meterlib.local`.

        Args:
            tenant: whose calls they are.
            attributes: other facts of the calls, the same for all.
            slice_of: how much to take at a time, such as `Usage(requests=1000, input_tokens=200_000)`.

        Raises:
            InvalidInput: a limit applies that cannot be handed out in advance, such as one of concurrency.
        """
        given = dict(_given(attributes, {}))
        check_tenant(tenant)
        check_attributes(given)
        return LocalLease(
            self, tenant, given, slice_of, lambda: self._context.compiled.limits_of(tenant, given), self._clock
        )

    async def renew(self, tenant: str, reservation_id: str, lease_ms: int = LEASE_MS, *, revision: int = 0) -> int:
        """Prolong a lease to `lease_ms` from now; see `Meter.renew`."""
        return await self._run(flows.renew(self._context, tenant, reservation_id, lease_ms, revision))

    async def settle(
        self,
        tenant: str,
        reservation_id: str,
        usage: Usage,
        *,
        quality: Quality = "final",
        facts: Mapping[str, str] | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> LedgerEntry:
        """Replace a hold by what was really used and book it; see `Meter.settle`."""
        entry = await self._settle(self._settlement(tenant, reservation_id, usage, quality, facts, attributes))
        self._ended(tenant, attributes)
        return entry

    async def _settle(self, settlement: Settlement) -> LedgerEntry:
        try:
            return await self._run(flows.settle(self._context, settlement))
        except StoreError as error:
            return await asyncio.to_thread(self._journalled, error, settlement)

    async def cancel(self, tenant: str, reservation_id: str) -> None:
        """Free a whole hold: nothing was sent to the provider; see `Meter.cancel`."""
        await self._run(flows.cancel(self._context, tenant, reservation_id))
        self._ended(tenant, None)

    async def record(
        self,
        tenant: str,
        attributes: Mapping[str, str],
        usage: Usage,
        *,
        record_id: str | None = None,
        quality: Quality = "final",
        facts: Mapping[str, str] | None = None,
        funding: Funding | None = None,
    ) -> LedgerEntry:
        """Book usage that had no reservation; see `Meter.record`."""
        attributes, facts = _own(attributes), _own(facts)
        return await self._run(
            flows.record(self._context, tenant, attributes, usage, record_id, quality, facts, funding)
        )

    async def adjust(
        self,
        entry: LedgerEntry,
        difference: Mapping[str, object],
        reason: str,
        *,
        actor: str = "",
        adjust_id: str | None = None,
    ) -> LedgerEntry:
        """Book a signed correction of an entry; see `Meter.adjust`."""
        return await self._run(flows.adjust(self._context, entry, difference, reason, actor, adjust_id))

    async def peek(self, tenant: str, attributes: Mapping[str, str] | None = None) -> tuple[LimitState, ...]:
        """How every limit that such a call touches stands now; see `Meter.peek`."""
        return await self._run(flows.peek(self._context, tenant, _given(attributes, {})))

    async def find(self, tenant: str, reservation_id: str) -> Found:
        """Where a reservation stands; see `Meter.find`."""
        return await self._run(flows.find(self._context, tenant, reservation_id))

    async def sweep(self) -> Swept:
        """Expire every reservation whose lease is over; see `Meter.sweep`."""
        return await self._run(flows.sweep(self._context))

    async def ledger(self, shard: int, after: int = 0) -> AsyncIterator[LedgerEntry]:
        """The entries of a shard behind number `after`, in order, as far as they go now."""
        self._check_shard(shard)
        while True:
            page = await self._run(flows.read_ledger(shard, after, LEDGER_PAGE))
            for entry in page:
                yield entry
            if len(page) < LEDGER_PAGE:
                return
            after = page[-1].n

    async def head(self, shard: int) -> ShardHead:
        """A shard's own numbers: last entry, open reservations, epoch."""
        self._check_shard(shard)
        return await self._run(flows.read_head(shard))

    @asynccontextmanager
    async def reservation(
        self,
        tenant: str,
        attributes: Mapping[str, str] | None = None,
        usage: Usage | None = None,
        *,
        reservation_id: str | None = None,
        lease_ms: int = LEASE_MS,
    ) -> AsyncIterator[AsyncReservation]:
        """A reservation for the length of a block; see `Meter.reservation`."""
        held = await self.reserve(tenant, attributes, usage, reservation_id=reservation_id, lease_ms=lease_ms)
        try:
            yield held
        finally:
            if not held.ended and not held._sent:
                await asyncio.shield(held.cancel())
            elif not held.ended:
                held._left_open()

    async def replay(self) -> int:
        """Make the settlements that wait in the journal; see `Meter.replay`."""
        if self._journal is None:
            return 0
        replay = _Replay(self._context)
        for item in await asyncio.to_thread(self._journal.waiting):
            if not replay.over and replay.is_due(item):
                try:
                    await self._run(flows.settle(self._context, item.settlement))
                    replay.made.append(item)
                except MeterError as error:
                    replay.failed(item, error)
        await asyncio.to_thread(self._journal.done, replay.made, replay.refused)
        return len(replay.made)

    async def _run(self, flow: Flow[T]) -> T:
        self._check_open()
        if self._sweep_interval_ms and not self._background:
            self._background = asyncio.create_task(self._sweep_for_ever(), name="meterlib-sweep")
        result: T = await self._driver.run(flow)
        return result

    _background: asyncio.Task[None] | None = None

    @cached_property
    def _taking_back(self) -> set[asyncio.Task[None]]:
        return set()

    async def _sweep_for_ever(self) -> None:
        shard, failed = 0, False
        while not self._closed:  # a cancellation may be swallowed on its way: asyncio.wait_for does, before 3.12
            await asyncio.sleep(self._sweep_interval_ms / 1000 / self.shards)
            try:
                await self._driver.follow()
                await self._driver.run(flows.sweep_shard(shard, flows.PIECES_MAX))
                await self.replay()
                failed = False
            except Exception as error:
                if not failed and not self._closed:
                    log.warning("sweep.failed", shard=shard, error=str(error))
                failed = True
            shard = (shard + 1) % self.shards

    async def aclose(self) -> None:
        """Stop the background sweep and close what `connect` opened; see `Meter.close`."""
        if self._closed:
            return
        if self._taking_back:
            await asyncio.wait(self._taking_back)
        self._closed = True
        await self._driver.stop()
        if self._background:
            self._background.cancel()
            with suppress(asyncio.CancelledError):
                await self._background
        if self._owns_client:
            await self._driver.aclose()
            if self._server:
                await asyncio.to_thread(self._server.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
