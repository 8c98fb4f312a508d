"""Operations that arrive while others are on their way go out together: in one round trip, in few script calls.

A server has one lane; in a cluster, whose slots may lie anywhere, each verb of each shard has its own, so that a node
which is away keeps no other's operations waiting. An operation that finds its lane free leaves at once; what arrives
while others are on their way waits, and goes with the next round trip, tenants taking turns: those of one verb and one
shard in one script call, which loads and writes each window once. So ten thousand waiting tasks need two connections,
and the busier the store, the larger the batches, and the cheaper each operation.

A lane has room for so many and no more; whoever comes then is told at once, and nothing is sent. No tenant takes more
of the room than it leaves free, so that a flood of one tenant's calls is refused to that tenant, and who begins
something takes three quarters of it at most, so that calls which run already can end.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from copy import copy
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from meterlib.core.operations import Reply
from meterlib.errors import MeterError, StoreCorrupt, StoreOverloaded, StoreUnavailable
from meterlib.store.commands import ALONE, Batch, Call
from meterlib.store.faults import LONGEST_WAIT_S

BATCH_MAX = 64
"""Operations of one script call: as long as the server serves nobody else."""

TOGETHER_MAX = 128
"""Operations of one round trip."""

UNDER_WAY_MAX = 2
"""Round trips of a lane at once. A second one leaves only if it is full: while the store works on one, the next is made
ready; with less to do, one at a time has more in it."""

WAITING_MAX = 60_000
"""Operations that wait in a lane, of all tenants: more than the fastest server answers before a call gives up."""

_BEGINS = ("reserve",)
STOPPED = "the meter was closed meanwhile"

W = TypeVar("W")


class Waiting(NamedTuple, Generic[W]):
    """An operation, since when it waits, and what its caller waits on."""

    call: Call
    since_s: float
    caller: W


class Lane(Generic[W]):
    """The operations that wait for those on their way.

    Attributes:
        begun_s: when the round trips that are under way were begun.
        failing: the store did not answer the last one.
        waiting: how many operations wait.

    Args:
        room: how many may.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self.begun_s: list[float] = []
        self.failing = False
        self.waiting = 0
        self._tenants: OrderedDict[str, deque[Waiting[W]]] = OrderedDict()

    def has_room(self, call: Call) -> bool:
        """Whether one more may wait: what is free is more than its tenant takes already."""
        room = self._room * 3 // 4 if call.script in _BEGINS else self._room
        return len(self._tenants.get(_tenant_of(call.operation), ())) < room - self.waiting

    def add(self, waiting: Waiting[W]) -> None:
        """It waits behind its tenant's others."""
        tenant = _tenant_of(waiting.call.operation)
        queue = self._tenants.get(tenant)
        if queue is None:
            self._tenants[tenant] = deque((waiting,))
        else:
            queue.append(waiting)
        self.waiting += 1

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits; unlike the number, this is right whatever an interrupt came between."""
        return not self._tenants

    def take(self) -> list[Waiting[W]]:
        """The next ones, at most TOGETHER_MAX: one of each tenant in turn."""
        taken: list[Waiting[W]] = []
        tenants, room = self._tenants, TOGETHER_MAX
        while tenants and room:
            tenant, queue = tenants.popitem(last=False)
            if tenants:
                taken.append(queue.popleft())
                room -= 1
            else:  # nobody else waits: all turns are this one's
                taken += [queue.popleft() for _ in range(min(room, len(queue)))]
                room = TOGETHER_MAX - len(taken)
            if queue:
                tenants[tenant] = queue
        self.waiting = max(0, self.waiting - len(taken)) if tenants else 0
        return taken

    def waited_in_vain(self, call: Call) -> StoreUnavailable:
        """The error of an operation whose turn came too late: for its store, or for too many others."""
        if self.failing:
            return StoreUnavailable(call.script, "nor those before it")
        return StoreOverloaded(call.script, self.waiting)


class RoundTrip(NamedTuple, Generic[W]):
    """Operations that leave together."""

    lane: Lane[W]
    begun_s: float
    due: list[Waiting[W]]


class Lanes(Generic[W]):
    """All lanes. No I/O; whoever uses it from several threads locks it.

    A lane is taken for free again when a round trip seems to have taken longer than any can: an interrupt can strike
    between any two steps, and must not close a lane for ever.

    Args:
        lane_of: tells calls of different lanes apart.
        deadline_ms: how long an operation has, its wait included.
        waiting_max: how many may wait in each.
    """

    def __init__(self, lane_of: Callable[[Call], Hashable], deadline_ms: int, waiting_max: int = WAITING_MAX) -> None:
        self.deadline_s = deadline_ms / 1000
        self._lane_of = lane_of
        self._stuck_s = 3 * self.deadline_s + 10
        self._waiting_max = waiting_max
        self._lanes: dict[Hashable, Lane[W]] = {}

    def enter(self, call: Call) -> RoundTrip[W] | None:
        """A free lane's round trip, for this operation alone, is under way from now on; None if the lane is busy."""
        lane = self._lane(call)
        if lane.begun_s and lane.begun_s[0] + self._stuck_s <= time.monotonic():
            lane.begun_s.clear()
        return None if lane.begun_s else self._begun(lane, [])

    def add(self, call: Call, caller: W) -> RoundTrip[W] | None:
        """The operation waits for its turn in its lane, which is busy; or a second round trip is full, and leaves.

        Raises:
            StoreOverloaded: too many wait already; this one was not sent.
        """
        lane = self._lane(call)
        if not lane.has_room(call):
            raise StoreOverloaded(call.script, lane.waiting)
        lane.add(Waiting(call, time.monotonic(), caller))
        full = lane.waiting >= TOGETHER_MAX and len(lane.begun_s) < UNDER_WAY_MAX
        return self._leave(lane) if full else None

    def next(self, over: RoundTrip[W]) -> RoundTrip[W] | None:
        """A round trip is over: what goes next, if anything waits that is not left to another one under way."""
        lane = over.lane
        if over.begun_s in lane.begun_s:
            lane.begun_s.remove(over.begun_s)
        if lane.is_empty or (lane.begun_s and lane.waiting < TOGETHER_MAX):
            return None
        return self._leave(lane)

    def left_s(self, since_s: float) -> float:
        """How much time who waits since then has left."""
        return since_s + self.deadline_s - time.monotonic()

    def _lane(self, call: Call) -> Lane[W]:
        key = self._lane_of(call)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(self._waiting_max)
        return lane

    def _leave(self, lane: Lane[W]) -> RoundTrip[W]:
        return self._begun(lane, lane.take())

    def _begun(self, lane: Lane[W], due: list[Waiting[W]]) -> RoundTrip[W]:
        begun_s = time.monotonic()
        lane.begun_s.append(begun_s)
        return RoundTrip(lane, begun_s, due)


def batches_of(due: Sequence[Waiting[W]]) -> list[tuple[Batch, list[Waiting[W]]]]:
    """The script calls that carry these operations, and whose they are."""
    groups: dict[tuple[str, int, int | None], list[Waiting[W]]] = {}
    for waiting in due:
        script, shard, _, sweep_max = waiting.call
        groups.setdefault((script, shard, sweep_max), []).append(waiting)
    return [
        (Batch(script, shard, sweep_max, [waiting.call.operation for waiting in part]), part)
        for (script, shard, sweep_max), group in groups.items()
        for most in (1 if script in ALONE else BATCH_MAX,)
        for part in (group[at : at + most] for at in range(0, len(group), most))
    ]


def _tenant_of(operation: Any) -> str:
    """What the fields of the tenant's reservations begin with, so that tenants can take turns."""
    field: str = getattr(operation, "field", "")
    return field[: field.rfind("/")]


# ── For asyncio ───────────────────────────────────────────────────────────────────────────────────────────────────────


class AsyncCaller(Protocol):
    """What makes script calls: a driver."""

    def lane_of(self, call: Call) -> Hashable: ...

    async def call(self, batch: Batch, deadline_s: float | None = None) -> list[Reply]: ...

    async def calls(self, batches: Sequence[Batch], deadline_s: float) -> list[list[Reply] | MeterError]: ...


_Future = asyncio.Future[Reply]


class AsyncBatching:
    """Operations of one event loop, batched."""

    def __init__(self, driver: AsyncCaller, deadline_ms: int) -> None:
        self._driver = driver
        self._lanes: Lanes[_Future] = Lanes(driver.lane_of, deadline_ms)
        self._workers: set[asyncio.Task[None]] = set()
        self._stopped = False

    async def run(self, call: Call) -> Reply:
        """The reply to one operation.

        A caller that is cancelled while its operation waits takes it back; once it is on its way, it happens.
        """
        alone = self._lanes.enter(call)
        if alone is None:
            caller: _Future = asyncio.get_running_loop().create_future()
            try:
                self._start(self._lanes.add(call, caller))
                return await caller
            finally:
                del caller  # a failure knows where it was raised: here, where it would keep itself and all above alive
        script, shard, operation, sweep_max = call
        try:
            reply = (await self._driver.call(Batch(script, shard, sweep_max, (operation,))))[0]
            alone.lane.failing = False
            return reply
        except StoreUnavailable:
            alone.lane.failing = True
            raise
        finally:
            self._start(self._lanes.next(alone))

    async def stop(self) -> None:
        """Nothing is sent any more; whoever waits is told that nobody knows what became of it."""
        self._stopped = True
        workers = set(self._workers)
        for worker in workers:
            worker.cancel()
        if workers:
            await asyncio.wait(workers)

    def _start(self, trip: RoundTrip[_Future] | None) -> None:
        trip = self._unless_stopped(trip)
        if trip:
            under_way = [trip]
            worker = asyncio.ensure_future(self._work(under_way))
            self._workers.add(worker)
            worker.add_done_callback(lambda worker: self._gone(worker, under_way))

    async def _work(self, under_way: list[RoundTrip[_Future]]) -> None:
        """Send what waits until nothing does."""
        while under_way:
            await self._send(under_way[0])
            following = self._unless_stopped(self._lanes.next(under_way.pop()))
            if following:
                under_way.append(following)

    def _unless_stopped(self, trip: RoundTrip[_Future] | None) -> RoundTrip[_Future] | None:
        while trip and self._stopped:
            trip = self._given_up(trip, STOPPED)
        return trip

    def _given_up(self, trip: RoundTrip[_Future], cause: str) -> RoundTrip[_Future] | None:
        """Tell those whose operations are in it; what is next."""
        for waiting in trip.due:
            _fail(waiting, StoreUnavailable(waiting.call.script, cause))
        return self._lanes.next(trip)

    def _gone(self, worker: asyncio.Task[None], under_way: Sequence[RoundTrip[_Future]]) -> None:
        """If it was cancelled, nobody knows what became of what it sent; another one sends what waits."""
        self._workers.discard(worker)
        for trip in under_way:
            self._start(self._given_up(trip, STOPPED if self._stopped else "whoever sent it was cancelled"))

    async def _send(self, trip: RoundTrip[_Future]) -> None:
        due = []
        too_late_s = time.monotonic() - self._lanes.deadline_s
        for waiting in trip.due:
            if waiting.caller.done():
                continue
            if waiting.since_s <= too_late_s:
                waiting.caller.set_exception(trip.lane.waited_in_vain(waiting.call))
            else:
                due.append(waiting)
        if due:
            await self._call(trip.lane, due)

    async def _call(self, lane: Lane[_Future], due: Sequence[Waiting[_Future]]) -> None:
        batches = batches_of(due)
        oldest_s = min([waiting.since_s for waiting in due])
        try:
            outcomes = await self._driver.calls([batch for batch, _ in batches], self._lanes.left_s(oldest_s))
        except Exception as error:
            for waiting in due:
                _fail(waiting, StoreUnavailable(waiting.call.script, f"{type(error).__name__}: {error}"))
            return
        timed_out = self._lanes.left_s(oldest_s) <= LONGEST_WAIT_S
        for (_, part), outcome in zip(batches, outcomes, strict=True):
            await self._take(lane, part, outcome, timed_out)

    async def _take(
        self, lane: Lane[_Future], part: Sequence[Waiting[_Future]], outcome: list[Reply] | MeterError, timed_out: bool
    ) -> None:
        lane.failing = isinstance(outcome, StoreUnavailable)
        if isinstance(outcome, list):
            for waiting, reply in zip(part, outcome, strict=True):
                if not waiting.caller.done():
                    waiting.caller.set_result(reply)
        elif isinstance(outcome, StoreCorrupt) and len(part) > 1:
            # One operation met something odd in the store; the others must not suffer. Nothing was written, and each is
            # idempotent anyway.
            for waiting in part:
                await self._call(lane, [waiting])
        elif isinstance(outcome, StoreUnavailable):
            self._try_again(lane, part, outcome, timed_out)
        else:
            for waiting in part:
                _fail(waiting, outcome)

    def _try_again(
        self, lane: Lane[_Future], part: Sequence[Waiting[_Future]], error: StoreUnavailable, timed_out: bool
    ) -> None:
        """The time of a round trip was that of its oldest operation: if it ran out, the younger ones have some left."""
        for waiting in part:
            if timed_out and not waiting.caller.done() and self._lanes.left_s(waiting.since_s) > LONGEST_WAIT_S:
                lane.add(waiting)
            else:
                _fail(waiting, error)


def _fail(waiting: Waiting[_Future], error: MeterError) -> None:
    if not waiting.caller.done():
        waiting.caller.set_exception(copy(error))  # each caller adds its own traceback


# ── For threads ───────────────────────────────────────────────────────────────────────────────────────────────────────


class SyncCaller(Protocol):
    """What makes script calls: a driver."""

    def lane_of(self, call: Call) -> Hashable: ...

    def call(self, batch: Batch, deadline_s: float | None = None) -> list[Reply]: ...

    def calls(self, batches: Sequence[Batch], deadline_s: float) -> list[list[Reply] | MeterError]: ...


class _Parked:
    """A thread that waits: for its reply, or for being told to send others' operations with its own.

    Attributes:
        trip: what it is to send.
        outcome: the reply to its operation, or the error.
        gone: it was interrupted, or has waited long enough, and waits no more.
    """

    __slots__ = ("gone", "outcome", "trip", "wake")

    def __init__(self) -> None:
        self.wake = threading.Event()
        self.trip: RoundTrip[_Parked] | None = None
        self.outcome: Reply | MeterError | None = None
        self.gone = False

    def waits(self) -> bool:
        return not self.gone and self.outcome is None

    def end(self, outcome: Reply | MeterError) -> None:
        self.outcome = outcome
        self.wake.set()


class SyncBatching:
    """Operations of many threads, batched. One of those whose operations leave together sends them."""

    def __init__(self, driver: SyncCaller, deadline_ms: int) -> None:
        self._driver = driver
        self._deadline_ms = deadline_ms
        self._begin()

    def _begin(self) -> None:
        """Nothing is on its way: so it is at first, and in a process that was forked from this one."""
        self._lock = threading.Lock()
        self._lanes: Lanes[_Parked] = Lanes(self._driver.lane_of, self._deadline_ms)
        self._pid = os.getpid()  # last: whoever sees it takes the new lock, not one that nobody opens

    def run(self, call: Call) -> Reply:
        """The reply to one operation."""
        if os.getpid() != self._pid:
            self._begin()
        full = None
        with self._lock:
            alone = self._lanes.enter(call)
            if alone is None:
                parked = _Parked()
                full = self._lanes.add(call, parked)
        if alone is None:
            self._hand_over(full)
            return self._reply_to(parked, call)
        script, shard, operation, sweep_max = call
        try:
            reply = self._driver.call(Batch(script, shard, sweep_max, (operation,)))[0]
            alone.lane.failing = False
            return reply
        except StoreUnavailable:
            alone.lane.failing = True
            raise
        finally:
            self._landed(alone)

    def _reply_to(self, parked: _Parked, call: Call) -> Reply:
        # A little more than a call may take: whoever sends this operation has told the outcome by then.
        until_s = time.monotonic() + self._deadline_ms / 1000 + 1
        while parked.outcome is None:
            try:
                woken = parked.wake.wait(max(0.0, until_s - time.monotonic()))
            except BaseException:
                self._leave(parked)
                raise
            if not woken:
                self._leave(parked)
                raise StoreUnavailable(call.script, "those before it never came back")
            parked.wake.clear()
            trip, parked.trip = parked.trip, None
            if trip:
                self._send(trip)
        if isinstance(parked.outcome, MeterError):
            raise parked.outcome
        return parked.outcome

    def _leave(self, parked: _Parked) -> None:
        """It waits no more; what it was to send, another sends."""
        with self._lock:
            parked.gone = True
        self._hand_over(parked.trip)

    def _landed(self, trip: RoundTrip[_Parked]) -> None:
        """A round trip is over: the next one may go."""
        with self._lock:
            following = self._lanes.next(trip)
        self._hand_over(following)

    def _hand_over(self, trip: RoundTrip[_Parked] | None) -> None:
        """One of the threads that wait for these operations sends them; those that have gone meanwhile do not."""
        if trip is None:
            return
        with self._lock:
            there = [waiting for waiting in trip.due if waiting.caller.waits()]
            if there:
                sender = there[0].caller
                sender.trip = trip._replace(due=there)
                sender.wake.set()
        if not there:
            self._landed(trip)

    def _send(self, trip: RoundTrip[_Parked]) -> None:
        due = []
        for waiting in trip.due:
            if self._lanes.left_s(waiting.since_s) <= 0:
                waiting.caller.end(trip.lane.waited_in_vain(waiting.call))
            else:
                due.append(waiting)
        try:
            if due:
                self._call(trip.lane, due)
        except BaseException as error:
            for waiting in due:
                if waiting.caller.outcome is None:
                    waiting.caller.end(StoreUnavailable(waiting.call.script, f"{type(error).__name__}: {error}"))
            raise
        finally:
            self._landed(trip)

    def _call(self, lane: Lane[_Parked], due: Sequence[Waiting[_Parked]]) -> None:
        batches = batches_of(due)
        oldest_s = min([waiting.since_s for waiting in due])
        try:
            outcomes = self._driver.calls([batch for batch, _ in batches], self._lanes.left_s(oldest_s))
        except Exception as error:
            for waiting in due:
                waiting.caller.end(StoreUnavailable(waiting.call.script, f"{type(error).__name__}: {error}"))
            return
        timed_out = self._lanes.left_s(oldest_s) <= LONGEST_WAIT_S
        for (_, part), outcome in zip(batches, outcomes, strict=True):
            self._take(lane, part, outcome, timed_out)

    def _take(
        self, lane: Lane[_Parked], part: Sequence[Waiting[_Parked]], outcome: list[Reply] | MeterError, timed_out: bool
    ) -> None:
        lane.failing = isinstance(outcome, StoreUnavailable)
        if isinstance(outcome, list):
            for waiting, reply in zip(part, outcome, strict=True):
                waiting.caller.end(reply)
        elif isinstance(outcome, StoreCorrupt) and len(part) > 1:
            for waiting in part:  # see AsyncBatching
                self._call(lane, [waiting])
        else:
            again = timed_out and isinstance(outcome, StoreUnavailable)
            for waiting in part:
                if again and self._lanes.left_s(waiting.since_s) > LONGEST_WAIT_S:
                    with self._lock:
                        lane.add(waiting)
                else:
                    waiting.caller.end(copy(outcome))
