"""Operations that arrive while others are on their way go out together: one script call per shard and verb.

A lone operation leaves at once. Beyond CALLS_IN_FLIGHT calls on their way, operations wait in lanes, one for each verb
and shard; when a call lands, the next lane goes, with as many as BATCH_MAX of its operations, tenants taking turns. So
ten thousand waiting tasks need two connections, and the busier the store, the larger the batches, and the cheaper each
operation: its windows are loaded and written once per call.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from copy import copy
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from meterlib.core.operations import Operation, Reply
from meterlib.errors import MeterError, StoreCorrupt, StoreOverloaded, StoreUnavailable
from meterlib.store.commands import Call

CALLS_IN_FLIGHT = 2
"""One that the server works on, and one that is being packed or read: more only make batches smaller."""

BATCH_MAX = 64
WAITING_MAX = 20_000

W = TypeVar("W")


class Waiting(NamedTuple, Generic[W]):
    """An operation, since when it waits, and what its caller waits on."""

    operation: Operation
    since_s: float
    caller: W


class Batch(NamedTuple, Generic[W]):
    """What goes out in one script call."""

    script: str
    shard: int
    sweep_max: int | None
    waiting: list[Waiting[W]]


class Lanes(Generic[W]):
    """Operations that wait, and whose turn it is. No I/O; whoever uses it from several threads locks it."""

    def __init__(self, waiting_max: int = WAITING_MAX) -> None:
        self._lanes: OrderedDict[tuple[str, int, int | None], OrderedDict[str, deque[Waiting[W]]]] = OrderedDict()
        self._waiting_max = waiting_max
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, call: Call, caller: W) -> None:
        """The operation waits for its turn.

        Raises:
            StoreOverloaded: too many wait already; this one was not sent.
        """
        if self._size >= self._waiting_max:
            raise StoreOverloaded(call.script, self._size)
        lane = self._lanes.setdefault((call.script, call.shard, call.sweep_max), OrderedDict())
        queue = lane.setdefault(_tenant_of(call.operation), deque())
        queue.append(Waiting(call.operation, time.monotonic(), caller))
        self._size += 1

    def take(self) -> Batch[W]:
        """The next lane's operations, at most BATCH_MAX; one of each tenant in turn. There must be some."""
        key, lane = self._lanes.popitem(last=False)
        taken: list[Waiting[W]] = []
        while lane and len(taken) < BATCH_MAX:
            tenant, queue = lane.popitem(last=False)
            taken.append(queue.popleft())
            if queue:
                lane[tenant] = queue
        if lane:
            self._lanes[key] = lane
        self._size -= len(taken)
        return Batch(*key, taken)


def _tenant_of(operation: Any) -> str:
    """The tenant's name as it stands in the operation's field, so that tenants can take turns."""
    field = str(getattr(operation, "field", None) or getattr(operation, "reservation", ""))
    return field.split("/", 2)[1] if field.startswith("r/") else ""


def late(waiting: Waiting[Any], deadline_ms: int) -> bool:
    """Whether an operation has waited for its turn as long as a call may take altogether."""
    return time.monotonic() - waiting.since_s >= deadline_ms / 1000


def waited_in_vain(script: str) -> StoreUnavailable:
    """The error of such an operation."""
    return StoreUnavailable(script, "others before it took too long; it was not sent")


# ── For asyncio ───────────────────────────────────────────────────────────────────────────────────────────────────────


class AsyncCaller(Protocol):
    """What makes a script call: a driver."""

    async def call(
        self, name: str, shard: int, operations: Sequence[Any], sweep_max: int | None = None
    ) -> list[Reply]: ...


class AsyncBatching:
    """Operations of one event loop, batched."""

    def __init__(self, driver: AsyncCaller, deadline_ms: int) -> None:
        self._driver = driver
        self._deadline_ms = deadline_ms
        self._lanes: Lanes[asyncio.Future[Reply]] = Lanes()
        self._in_flight = 0
        self._workers: set[asyncio.Task[None]] = set()

    async def run(self, call: Call) -> Reply:
        """The reply to one operation.

        A caller that is cancelled while its operation waits takes it back; once it is on its way, it happens.
        """
        if self._in_flight < CALLS_IN_FLIGHT:
            self._in_flight += 1
            try:
                return (await self._driver.call(call.script, call.shard, (call.operation,), call.sweep_max))[0]
            finally:
                self._landed()
        caller: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._lanes.add(call, caller)
        return await caller

    def _landed(self) -> None:
        if not self._lanes:
            self._in_flight -= 1
            return
        worker = asyncio.ensure_future(self._work())
        self._workers.add(worker)
        worker.add_done_callback(self._workers.discard)

    async def _work(self) -> None:
        """Send what waits until nothing does."""
        try:
            while self._lanes:
                await self._send(self._lanes.take())
        finally:
            self._in_flight -= 1

    async def _send(self, batch: Batch[asyncio.Future[Reply]]) -> None:
        due = []
        for waiting in batch.waiting:
            if late(waiting, self._deadline_ms) and not waiting.caller.done():
                waiting.caller.set_exception(waited_in_vain(batch.script))
            elif not waiting.caller.done():
                due.append(waiting)
        if due:
            await self._call(batch, due)

    async def _call(self, batch: Batch[asyncio.Future[Reply]], due: Sequence[Waiting[asyncio.Future[Reply]]]) -> None:
        operations = [waiting.operation for waiting in due]
        try:
            replies = await self._driver.call(batch.script, batch.shard, operations, batch.sweep_max)
        except StoreCorrupt as error:
            if len(due) > 1:
                # One operation met something odd in the store; the others must not suffer. Nothing was written, and
                # each is idempotent anyway.
                for waiting in due:
                    await self._call(batch, [waiting])
                return
            _fail(due, error)
        except MeterError as error:
            _fail(due, error)
        except BaseException as error:
            _fail(due, StoreUnavailable(batch.script, f"{type(error).__name__}: {error}"))
            raise
        else:
            for waiting, reply in zip(due, replies, strict=True):
                if not waiting.caller.done():
                    waiting.caller.set_result(reply)


def _fail(due: Sequence[Waiting[asyncio.Future[Reply]]], error: MeterError) -> None:
    for waiting in due:
        if not waiting.caller.done():
            waiting.caller.set_exception(copy(error))  # each caller adds its own traceback


# ── For threads ───────────────────────────────────────────────────────────────────────────────────────────────────────


class SyncCaller(Protocol):
    """What makes a script call: a driver."""

    def call(self, name: str, shard: int, operations: Sequence[Any], sweep_max: int | None = None) -> list[Reply]: ...


class _Parked:
    """A thread that waits: for its reply, or for being told to send a batch, its own operation among it.

    Attributes:
        batch: what it is to send.
        outcome: the reply to its operation, or the error.
        gone: it was interrupted, and waits no more.
    """

    __slots__ = ("batch", "gone", "outcome", "wake")

    def __init__(self) -> None:
        self.wake = threading.Event()
        self.batch: Batch[_Parked] | None = None
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
        self._lanes: Lanes[_Parked] = Lanes()
        self._lock = threading.Lock()
        self._in_flight = 0

    def run(self, call: Call) -> Reply:
        """The reply to one operation."""
        with self._lock:
            alone = self._in_flight < CALLS_IN_FLIGHT
            if alone:
                self._in_flight += 1
            else:
                parked = _Parked()
                self._lanes.add(call, parked)
        if not alone:
            return self._reply_to(parked)
        try:
            return self._driver.call(call.script, call.shard, (call.operation,), call.sweep_max)[0]
        finally:
            self._landed()

    def _reply_to(self, parked: _Parked) -> Reply:
        try:
            parked.wake.wait()
        except BaseException:
            with self._lock:
                parked.gone = True
            if parked.batch:
                self._hand_over(parked.batch)
            raise
        if parked.batch:
            self._send(parked.batch)
        outcome = parked.outcome
        if isinstance(outcome, MeterError):
            raise outcome
        assert outcome is not None
        return outcome

    def _landed(self) -> None:
        """A call is over: the next batch may go."""
        with self._lock:
            batch = self._lanes.take() if self._lanes else None
            if batch is None:
                self._in_flight -= 1
        if batch:
            self._hand_over(batch)

    def _hand_over(self, batch: Batch[_Parked]) -> None:
        """One of the threads that wait for the batch sends it; those that were interrupted meanwhile do not."""
        with self._lock:
            there = [waiting for waiting in batch.waiting if not waiting.caller.gone]
            if there:
                there[0].caller.batch = batch._replace(waiting=there)
                there[0].caller.wake.set()
        if not there:
            self._landed()

    def _send(self, batch: Batch[_Parked]) -> None:
        due = []
        for waiting in batch.waiting:
            if late(waiting, self._deadline_ms):
                waiting.caller.end(waited_in_vain(batch.script))
            else:
                due.append(waiting)
        try:
            if due:
                self._call(batch, due)
        finally:
            self._landed()

    def _call(self, batch: Batch[_Parked], due: Sequence[Waiting[_Parked]]) -> None:
        operations = [waiting.operation for waiting in due]
        try:
            replies = self._driver.call(batch.script, batch.shard, operations, batch.sweep_max)
        except StoreCorrupt as error:
            if len(due) == 1:
                return due[0].caller.end(error)
            for waiting in due:  # see AsyncBatching
                self._call(batch, [waiting])
        except MeterError as error:
            for waiting in due:
                waiting.caller.end(copy(error))
        except BaseException as error:
            for waiting in due:
                waiting.caller.end(StoreUnavailable(batch.script, f"{type(error).__name__}: {error}"))
            raise
        else:
            for waiting, reply in zip(due, replies, strict=True):
                waiting.caller.end(reply)
        return None
