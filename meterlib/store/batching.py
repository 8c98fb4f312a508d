"""Operations that arrive while others are on their way go out together: one script call per shard and verb.

Each verb of each shard has a lane. An operation that finds its lane free leaves at once; what arrives while its call is
on the way waits, and goes with the next one, as many as BATCH_MAX, tenants taking turns. So ten thousand waiting tasks
need as many connections as there are busy lanes, a shard that is away keeps no other waiting, and the busier the store,
the larger the batches, and the cheaper each operation: its windows are loaded and written once per call.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from copy import copy
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from meterlib.core.operations import Operation, Reply
from meterlib.errors import MeterError, StoreCorrupt, StoreOverloaded, StoreUnavailable
from meterlib.store.commands import Call
from meterlib.store.faults import LONGEST_WAIT_S

BATCH_MAX = 64
WAITING_MAX = 20_000

W = TypeVar("W")


class Waiting(NamedTuple, Generic[W]):
    """An operation, since when it waits, and what its caller waits on."""

    operation: Operation
    since_s: float
    caller: W


class Lane(Generic[W]):
    """The operations of one verb on one shard that wait for the call that is on its way.

    Attributes:
        busy_since_s: when that call, or the one before it, was begun; None while the lane is free.
        failing: the store did not answer the last call.
    """

    def __init__(self, call: Call) -> None:
        self.script, self.shard, self.sweep_max = call.script, call.shard, call.sweep_max
        self.busy_since_s: float | None = None
        self.failing = False
        self._tenants: OrderedDict[str, deque[Waiting[W]]] = OrderedDict()

    def add(self, waiting: Waiting[W]) -> None:
        """It waits behind its tenant's others."""
        self._tenants.setdefault(_tenant_of(waiting.operation), deque()).append(waiting)

    def take(self) -> list[Waiting[W]]:
        """The next ones, at most BATCH_MAX: one of each tenant in turn."""
        taken: list[Waiting[W]] = []
        while self._tenants and len(taken) < BATCH_MAX:
            tenant, queue = self._tenants.popitem(last=False)
            taken.append(queue.popleft())
            if queue:
                self._tenants[tenant] = queue
        return taken

    def waited_in_vain(self) -> StoreUnavailable:
        """The error of an operation whose turn came too late: for its store, or for too many others."""
        if self.failing:
            return StoreUnavailable(self.script, "nor those before it")
        return StoreOverloaded(self.script, sum(map(len, self._tenants.values())))


class Lanes(Generic[W]):
    """All lanes. No I/O; whoever uses it from several threads locks it.

    A lane is taken for free again when a call seems to have been on its way for longer than any can be: an interrupt
    can strike between any two steps, and must not close a lane for ever.
    """

    def __init__(self, deadline_ms: int, waiting_max: int = WAITING_MAX) -> None:
        self.deadline_s = deadline_ms / 1000
        self._stuck_s = 3 * self.deadline_s + 10
        self._waiting_max = waiting_max
        self._lanes: dict[tuple[str, int, int | None], Lane[W]] = {}
        self.waiting = 0

    def enter(self, call: Call) -> Lane[W] | None:
        """The lane, which is busy from now on; None if it was already."""
        key = call.script, call.shard, call.sweep_max
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(call)
        now_s = time.monotonic()
        if lane.busy_since_s is not None and now_s - lane.busy_since_s < self._stuck_s:
            return None
        lane.busy_since_s = now_s
        return lane

    def add(self, call: Call, caller: W) -> None:
        """The operation waits for its turn in its lane, which is busy.

        Raises:
            StoreOverloaded: too many wait already; this one was not sent.
        """
        if self.waiting >= self._waiting_max:
            raise StoreOverloaded(call.script, self.waiting)
        self._lanes[call.script, call.shard, call.sweep_max].add(Waiting(call.operation, time.monotonic(), caller))
        self.waiting += 1

    def next(self, lane: Lane[W]) -> list[Waiting[W]]:
        """A call of this lane is over: what goes next. If nothing does, the lane is free."""
        taken = lane.take()
        self.waiting -= len(taken)
        lane.busy_since_s = time.monotonic() if taken else None
        return taken

    def put_back(self, lane: Lane[W], waiting: Waiting[W]) -> None:
        """It is tried once more, since it has time left."""
        lane.add(waiting)
        self.waiting += 1

    def left_s(self, waiting: Waiting[W]) -> float:
        """How much time an operation has left."""
        return waiting.since_s + self.deadline_s - time.monotonic()


def _tenant_of(operation: Any) -> str:
    """The tenant's name as it stands in the operation's field, so that tenants can take turns."""
    field = str(getattr(operation, "field", ""))
    return field.split("/", 2)[1] if field.startswith("r/") else ""


# ── For asyncio ───────────────────────────────────────────────────────────────────────────────────────────────────────


class AsyncCaller(Protocol):
    """What makes a script call: a driver."""

    async def call(
        self,
        name: str,
        shard: int,
        operations: Sequence[Any],
        sweep_max: int | None = None,
        deadline_s: float | None = None,
    ) -> list[Reply]: ...


_Future = asyncio.Future[Reply]


class AsyncBatching:
    """Operations of one event loop, batched."""

    def __init__(self, driver: AsyncCaller, deadline_ms: int) -> None:
        self._driver = driver
        self._lanes: Lanes[_Future] = Lanes(deadline_ms)
        self._workers: set[asyncio.Task[None]] = set()

    async def run(self, call: Call) -> Reply:
        """The reply to one operation.

        A caller that is cancelled while its operation waits takes it back; once it is on its way, it happens.
        """
        lane = self._lanes.enter(call)
        if lane is None:
            caller: _Future = asyncio.get_running_loop().create_future()
            self._lanes.add(call, caller)
            return await caller
        try:
            reply = (await self._driver.call(call.script, call.shard, (call.operation,), call.sweep_max))[0]
            lane.failing = False
            return reply
        except StoreUnavailable:
            lane.failing = True
            raise
        finally:
            self._landed(lane)

    def _landed(self, lane: Lane[_Future]) -> None:
        due = self._lanes.next(lane)
        if due:
            worker = asyncio.ensure_future(self._work(lane, due))
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)

    async def _work(self, lane: Lane[_Future], due: list[Waiting[_Future]]) -> None:
        """Send what waits until nothing does."""
        while due:
            await self._send(lane, due)
            due = self._lanes.next(lane)

    async def _send(self, lane: Lane[_Future], taken: Sequence[Waiting[_Future]]) -> None:
        due = [waiting for waiting in taken if not waiting.caller.done()]
        for waiting in due:
            if self._lanes.left_s(waiting) <= 0:
                waiting.caller.set_exception(lane.waited_in_vain())
        due = [waiting for waiting in due if not waiting.caller.done()]
        if due:
            await self._call(lane, due)

    async def _call(self, lane: Lane[_Future], due: Sequence[Waiting[_Future]]) -> None:
        operations = [waiting.operation for waiting in due]
        left_s = min([self._lanes.left_s(waiting) for waiting in due])
        try:
            replies = await self._driver.call(lane.script, lane.shard, operations, lane.sweep_max, left_s)
        except StoreCorrupt as error:
            if len(due) == 1:
                return _fail(due, error)
            # One operation met something odd in the store; the others must not suffer. Nothing was written, and each is
            # idempotent anyway.
            for waiting in due:
                await self._call(lane, [waiting])
        except StoreUnavailable as error:
            lane.failing = True
            self._try_again(lane, due, error)
        except MeterError as error:
            _fail(due, error)
        except BaseException as error:
            _fail(due, StoreUnavailable(lane.script, f"{type(error).__name__}: {error}"))
            if not isinstance(error, Exception):
                raise
        else:
            lane.failing = False
            for waiting, reply in zip(due, replies, strict=True):
                if not waiting.caller.done():
                    waiting.caller.set_result(reply)
        return None

    def _try_again(self, lane: Lane[_Future], due: Sequence[Waiting[_Future]], error: StoreUnavailable) -> None:
        """The call's time was that of its oldest operation: if it ran out, the younger ones have some left."""
        timed_out = min([self._lanes.left_s(waiting) for waiting in due]) <= LONGEST_WAIT_S
        for waiting in due:
            if timed_out and not waiting.caller.done() and self._lanes.left_s(waiting) > LONGEST_WAIT_S:
                self._lanes.put_back(lane, waiting)
            else:
                _fail([waiting], error)


def _fail(due: Sequence[Waiting[_Future]], error: MeterError) -> None:
    for waiting in due:
        if not waiting.caller.done():
            waiting.caller.set_exception(copy(error))  # each caller adds its own traceback


# ── For threads ───────────────────────────────────────────────────────────────────────────────────────────────────────


class SyncCaller(Protocol):
    """What makes a script call: a driver."""

    def call(
        self,
        name: str,
        shard: int,
        operations: Sequence[Any],
        sweep_max: int | None = None,
        deadline_s: float | None = None,
    ) -> list[Reply]: ...


class _Parked:
    """A thread that waits: for its reply, or for being told to send a batch, its own operation among it.

    Attributes:
        lane: where it waits.
        batch: what it is to send.
        outcome: the reply to its operation, or the error.
        gone: it was interrupted, or has waited long enough, and waits no more.
    """

    __slots__ = ("batch", "gone", "lane", "outcome", "wake")

    def __init__(self) -> None:
        self.wake = threading.Event()
        self.lane: Lane[_Parked] | None = None
        self.batch: list[Waiting[_Parked]] | None = None
        self.outcome: Reply | MeterError | None = None
        self.gone = False

    def end(self, outcome: Reply | MeterError) -> None:
        self.outcome = outcome
        self.wake.set()


class SyncBatching:
    """Operations of many threads, batched. One of those whose operations a batch holds sends it."""

    def __init__(self, driver: SyncCaller, deadline_ms: int) -> None:
        self._driver = driver
        self._deadline_ms = deadline_ms
        self._begin()

    def _begin(self) -> None:
        """Nothing is on its way: so it is at first, and in a process that was forked from this one."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._lanes: Lanes[_Parked] = Lanes(self._deadline_ms)

    def run(self, call: Call) -> Reply:
        """The reply to one operation."""
        if os.getpid() != self._pid:
            self._begin()
        with self._lock:
            lane = self._lanes.enter(call)
            if lane is None:
                parked = _Parked()
                self._lanes.add(call, parked)
        if lane is None:
            return self._reply_to(parked, call)
        try:
            reply = self._driver.call(call.script, call.shard, (call.operation,), call.sweep_max)[0]
            lane.failing = False
            return reply
        except StoreUnavailable:
            lane.failing = True
            raise
        finally:
            self._landed(lane)

    def _reply_to(self, parked: _Parked, call: Call) -> Reply:
        try:
            # A little more than a call may take: whoever sends the batch has told the outcome by then.
            woken = parked.wake.wait(self._deadline_ms / 1000 + 1)
        except BaseException:
            self._leave(parked)
            raise
        if not woken:
            self._leave(parked)
            raise StoreUnavailable(call.script, "those before it never came back")
        if parked.batch and parked.lane:
            self._send(parked.lane, parked.batch)
        outcome = parked.outcome
        if isinstance(outcome, MeterError):
            raise outcome
        assert outcome is not None
        return outcome

    def _leave(self, parked: _Parked) -> None:
        """It waits no more; what it was to send, another sends."""
        with self._lock:
            parked.gone = True
        if parked.batch and parked.lane:
            self._hand_over(parked.lane, parked.batch)

    def _landed(self, lane: Lane[_Parked]) -> None:
        """A call is over: the next batch may go."""
        with self._lock:
            batch = self._lanes.next(lane)
        if batch:
            self._hand_over(lane, batch)

    def _hand_over(self, lane: Lane[_Parked], batch: Sequence[Waiting[_Parked]]) -> None:
        """One of the threads that wait for the batch sends it; those that were interrupted meanwhile do not."""
        with self._lock:
            there = [waiting for waiting in batch if not waiting.caller.gone]
            if there:
                sender = there[0].caller
                sender.lane, sender.batch = lane, there
                sender.wake.set()
        if not there:
            self._landed(lane)

    def _send(self, lane: Lane[_Parked], batch: Sequence[Waiting[_Parked]]) -> None:
        due = []
        for waiting in batch:
            if self._lanes.left_s(waiting) <= 0:
                waiting.caller.end(lane.waited_in_vain())
            else:
                due.append(waiting)
        try:
            if due:
                self._call(lane, due)
        finally:
            self._landed(lane)

    def _call(self, lane: Lane[_Parked], due: Sequence[Waiting[_Parked]]) -> None:
        operations = [waiting.operation for waiting in due]
        oldest_s = min([self._lanes.left_s(waiting) for waiting in due])
        left_s = max(oldest_s, self._lanes.deadline_s / 2)  # who came late shall not fail for who came first
        try:
            replies = self._driver.call(lane.script, lane.shard, operations, lane.sweep_max, left_s)
        except StoreCorrupt as error:
            if len(due) == 1:
                return due[0].caller.end(error)
            for waiting in due:  # see AsyncBatching
                self._call(lane, [waiting])
        except MeterError as error:
            lane.failing = isinstance(error, StoreUnavailable)
            for waiting in due:
                waiting.caller.end(copy(error))
        except BaseException as error:
            for waiting in due:
                waiting.caller.end(StoreUnavailable(lane.script, f"{type(error).__name__}: {error}"))
            raise
        else:
            lane.failing = False
            for waiting, reply in zip(due, replies, strict=True):
                waiting.caller.end(reply)
        return None
