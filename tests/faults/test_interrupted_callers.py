"""Callers that are torn away while they wait: the next one gets its own answer, and no hold outlives its lease."""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from types import FrameType
from typing import Any, Generic, TypeVar

import pytest
from msgspec.structs import replace

from meterlib import AsyncMeter, Meter, ReservationNotFound
from meterlib.testing import Clock
from tests.faults.world import ATTRIBUTES, ESTIMATE, OPTIONS, POLICY, TENANT, USED, check_books, hold, standing
from tests.support.proxy import FaultProxy
from tests.support.servers import Server

T = TypeVar("T")
ALONE = replace(OPTIONS, connections_max=1)


class CancelledAt(Generic[T]):
    """Awaits a coroutine and cancels the task when that waits for the `step`th time.

    At once; or, if `late`, when what it waits for is there already but it has not seen it yet.
    """

    def __init__(self, awaited: Coroutine[Any, Any, T], step: int, late: bool) -> None:
        self._awaited = awaited
        self._step = step
        self._late = late
        self.reached = False

    def __await__(self) -> Generator[Any, Any, T]:
        task = asyncio.current_task()
        assert task is not None
        inner = self._awaited.__await__()
        resume: Callable[[], Any] = lambda: inner.send(None)  # noqa: E731
        steps = 0
        while True:
            try:
                waits_for = resume()
            except StopIteration as done:
                result: T = done.value
                return result
            steps += 1
            if steps == self._step:
                self.reached = True
                if self._late and asyncio.isfuture(waits_for):
                    waits_for.add_done_callback(lambda _: task.cancel())
                else:
                    asyncio.get_running_loop().call_soon(task.cancel)
            try:
                answer = yield waits_for
            except BaseException as error:
                resume = lambda error=error: inner.throw(error)  # type: ignore[misc]  # noqa: E731
            else:
                resume = lambda answer=answer: inner.send(answer)  # type: ignore[misc]  # noqa: E731


async def cancelled_at(step: int, late: bool, verb: Callable[[], Coroutine[Any, Any, T]]) -> tuple[bool, bool]:
    """Whether the call got to that step, and whether it was cancelled there."""

    async def run() -> bool:
        awaiting = CancelledAt(verb(), step, late)
        try:
            await awaiting
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
            return awaiting.reached
        return awaiting.reached

    task = asyncio.create_task(run())
    try:
        reached = await task
    except asyncio.CancelledError:
        return True, True
    return reached, reached


nonces = itertools.count()


async def own_answer(meter: AsyncMeter) -> None:
    """The next two calls, of different verbs, are answered as themselves."""
    limits = await meter.peek("somebody-else", ATTRIBUTES)
    assert [limit.name for limit in limits] == [limit.name for limit in POLICY.limits]
    assert {limit.used for limit in limits} == {0}
    nonce = next(nonces)
    other = await meter.reserve("another", {}, ESTIMATE, reservation_id=f"other-{nonce}", lease_ms=10_000 + nonce)
    assert other.expires_at_ms - other.reserved_at_ms == 10_000 + nonce
    await other.cancel()


@pytest.mark.parametrize("late", [False, True], ids=["at once", "when the answer is there"])
@pytest.mark.parametrize("warm", [True, False], ids=["connected", "connecting"])
def test_a_task_cancelled_at_any_await_leaves_the_only_connection_usable(
    warm: bool, late: bool, server: Server, meter: Meter, clock: Clock
) -> None:
    """Operator: with one connection and calls cancelled at every point, each next call gets its own answer."""

    async def run() -> int:
        step = 0
        while True:
            step += 1
            async with AsyncMeter.connect(server.url, POLICY, options=ALONE, clock=clock) as alone:
                if warm:
                    await alone.peek(TENANT)
                reached, _ = await cancelled_at(
                    step,
                    late,
                    partial(
                        alone.reserve,
                        TENANT,
                        ATTRIBUTES,
                        ESTIMATE,
                        reservation_id=f"torn-{step}",
                        lease_ms=60_000,
                    ),
                )
                await own_answer(alone)
            if not reached:
                return step - 1

    points = asyncio.run(run())
    assert points >= (1 if warm else 4)
    opened = meter.head(0).open_reservations
    assert 1 <= opened <= points + 1
    clock.advance(ms=60_000)
    meter.sweep()
    assert meter.head(0).open_reservations == 0
    assert standing(meter)["open"] == (0, 0)
    assert {kind for _, kind in check_books(meter)} <= {"expired", "cancelled"}
    assert sum(kind == "expired" for _, kind in check_books(meter)) == opened


@pytest.mark.parametrize("late", [False, True], ids=["at once", "when the answer is there"])
def test_every_verb_cancelled_at_any_await_can_be_repeated(
    late: bool, server: Server, meter: Meter, clock: Clock
) -> None:
    """Finance: a call that was torn away and made again has its effect once."""

    async def run() -> None:
        async with AsyncMeter.connect(server.url, POLICY, options=ALONE, clock=clock) as alone:
            await alone.peek(TENANT)
            for step in range(1, 4):
                name = f"torn-{step}"
                verbs: list[Callable[[], Coroutine[Any, Any, object]]] = [
                    lambda name=name: alone.reserve(TENANT, ATTRIBUTES, ESTIMATE, reservation_id=name),  # type: ignore[misc]
                    lambda name=name: alone.revise(TENANT, name, USED, revision=1),  # type: ignore[misc]
                    lambda name=name: alone.settle(TENANT, name, USED),  # type: ignore[misc]
                    lambda name=name: alone.record(TENANT, ATTRIBUTES, USED, record_id=f"record-{name}"),  # type: ignore[misc]
                ]
                for verb in verbs:
                    await cancelled_at(step, late, verb)
                    await own_answer(alone)
                    await verb()

    asyncio.run(run())
    kinds = [(entry_id, kind) for entry_id, kind in check_books(meter) if not entry_id.startswith("other")]
    assert kinds == [
        pair for step in (1, 2, 3) for pair in ((f"torn-{step}", "settled"), (f"record-torn-{step}", "recorded"))
    ]
    assert standing(meter)["hour"] == (6 * 130, 0)


def test_a_block_cancelled_before_the_call_went_out_frees_its_hold(server: Server, meter: Meter, clock: Clock) -> None:
    """Operator: a client that goes away while its request is being prepared costs nothing."""

    async def run() -> None:
        async with AsyncMeter.connect(server.url, POLICY, options=ALONE, clock=clock) as alone:
            inside = asyncio.Event()

            async def work() -> None:
                async with alone.reservation(TENANT, ATTRIBUTES, ESTIMATE, reservation_id="torn"):
                    inside.set()
                    await asyncio.Event().wait()

            task = asyncio.create_task(work())
            await inside.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await own_answer(alone)

    asyncio.run(run())
    assert meter.find(TENANT, "torn").status == "cancelled"
    assert standing(meter)["hour"] == (0, 0)


class TornAwayError(Exception):
    """What a signal handler of the user's raises."""


@pytest.mark.parametrize("raised", [KeyboardInterrupt, TornAwayError])
def test_a_sync_read_torn_away_by_a_signal_leaves_the_only_connection_usable(
    raised: type[BaseException], proxy: FaultProxy, meter: Meter, clock: Clock
) -> None:
    """Operator: Ctrl-C, or a handler that raises, in the middle of a call does not mix up the calls after it."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise raised

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        with Meter.connect(proxy.url, POLICY, options=ALONE, clock=clock) as alone:
            alone.peek(TENANT)
            for number in range(5):
                proxy.delay_requests(1, 0.1, matching=b"torn")
                signal.setitimer(signal.ITIMER_REAL, 0.03)
                with pytest.raises(raised):
                    hold(alone, f"torn-{number}", lease_ms=60_000)
                own = alone.reserve("another", {}, ESTIMATE, lease_ms=12_345 + number)
                assert own.expires_at_ms - own.reserved_at_ms == 12_345 + number
                own.cancel()
                assert {limit.used for limit in alone.peek("somebody-else", ATTRIBUTES)} == {0}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    for number in range(5):  # whatever of it has arrived by now is a hold, or comes to nothing
        try:
            meter.cancel(TENANT, f"torn-{number}")
        except ReservationNotFound:
            raise AssertionError("a cancel is never refused for want of a reservation") from None
    assert standing(meter)["open"] == (0, 0)


def interrupted_at_line(number: int, call: Callable[[], object]) -> bool:
    """Raise KeyboardInterrupt in the `number`th line that redis-py runs between sending and having read an answer."""
    left = number

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if frame.f_code.co_name not in BETWEEN or "redis" not in frame.f_code.co_filename:
            return trace if event == "call" else None
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(previous)
    return False


BETWEEN = ("_send_command_parse_response", "parse_response", "read_response")


def test_an_interrupt_between_sending_and_reading_mixes_up_nothing(
    proxy: FaultProxy, meter: Meter, clock: Clock
) -> None:
    """Operator: wherever Ctrl-C strikes between a request and its answer, no later call gets that answer."""
    number = 0
    struck = True
    while struck:
        number += 1
        with Meter.connect(proxy.url, POLICY, options=replace(OPTIONS, connections_max=8), clock=clock) as alone:
            alone.peek(TENANT)
            proxy.delay_requests(1, 0.02, matching=b"torn")
            struck = interrupted_at_line(number, partial(alone.reserve, f"torn-{number}", {}, ESTIMATE))
            own = alone.reserve("another", {}, ESTIMATE, lease_ms=12_345 + number)
            assert own.expires_at_ms - own.reserved_at_ms == 12_345 + number
            own.cancel()
            assert {limit.used for limit in alone.peek("somebody-else", ATTRIBUTES)} == {0}
    assert number > 10
