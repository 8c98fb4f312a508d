"""What a call held is free as soon as it is over: a prompt may be of megabytes, and the collector comes late."""

from __future__ import annotations

import gc
import socket
from collections import Counter
from collections.abc import Iterator

import pytest

pytest.importorskip("aiohttp", reason="needs meterlib[gateway]")

from meterlib import MeterError, StoreOptions
from meterlib.gateway.answers import Refusal
from meterlib.gateway.call import Call, Outgoing
from meterlib.gateway.metering import Metering
from meterlib.gateway.prompt import Prompt
from tests.gateway.answers import Answer, Hold, error, failing, html, redirect, stream
from tests.gateway.books import WIDE, leave, noticed
from tests.gateway.world import HOSTED, LIMITS, World, run

OF_A_CALL = (Call, Metering, Outgoing, Prompt, Refusal, MeterError)
EVENTS = stream(usage_start={"input_tokens": 30}, usage_end={"output_tokens": 21})
ANSWERS = {
    "whole": Answer(events=EVENTS),
    "broken off": Answer(events=EVENTS, breaks_after=300, breaks="fin"),
    "reset": Answer(events=EVENTS, breaks_after=300, breaks="rst"),
    "without its end": Answer(events=EVENTS[:-2]),
    "without message_stop": Answer(events=EVENTS[:-1]),
    "ended by an error": Answer(events=failing(EVENTS, 3)),
    "compressed": Answer(events=EVENTS, encoding="gzip"),
    "unreadable": Answer(events=EVENTS, headers={"content-encoding": "gzip"}),
    "refused": error(529),
    "redirected": redirect("http://127.0.0.1/"),
    "no API's": html(),
    "none": Answer(instead="rst"),
}
CALLS = 3


def there() -> list[object]:
    """All objects that calls are made of, whoever made them."""
    return [one for one in gc.get_objects() if isinstance(one, OF_A_CALL)]


@pytest.fixture(autouse=True)
def left_by_others() -> Iterator[list[object]]:
    """What earlier tests left; until this one is over, nothing is freed that holds itself."""
    gc.collect()
    gc.disable()
    yield there()
    gc.enable()


async def nothing_left(world: World, left_by_others: list[object]) -> None:
    """No object of any call is there any more."""
    await world.settled()
    known = {id(one) for one in left_by_others}
    assert {} == Counter(type(one).__name__ for one in there() if id(one) not in known)


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "plain"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_calls_are_forgotten_however_they_are_answered(
    left_by_others: list[object], answer: str, streamed: bool
) -> None:
    """Connections are kept and timers wait, and both remember where they were made."""

    async def use(world: World) -> None:
        for _ in range(CALLS):
            world.provider.answers(ANSWERS[answer])
            await world.post(stream=streamed)

        await nothing_left(world, left_by_others)

    run(use, HOSTED, limits=WIDE)


def test_calls_are_forgotten_whose_clients_left(left_by_others: list[object]) -> None:
    """Whether they are cancelled or drained."""

    async def use(world: World) -> None:
        for _ in range(CALLS):
            hold = Hold()
            world.provider.answers(Answer(events=[*EVENTS[:3], hold, *EVENTS[3:]]))
            async with world.asked(stream=True) as response:
                await hold.reached()
                leave(response)
            await noticed(world)
            hold.release()
            world.advance(ms=3_600_000)

        await nothing_left(world, left_by_others)

    run(use, HOSTED, limits=WIDE)


def test_calls_are_forgotten_that_were_refused(left_by_others: list[object]) -> None:
    """By a limit, for what they say, and for what they count as."""

    async def use(world: World) -> None:
        statuses = [(await world.post()).status for _ in range(LIMITS[0].quota + CALLS)]
        statuses += [(await world.post(b"{}")).status for _ in range(CALLS)]
        world.advance(ms=60_000)
        statuses += [(await world.post(b"{}")).status for _ in range(CALLS)]

        assert {200: LIMITS[0].quota, 429: 2 * CALLS, 400: CALLS} == Counter(statuses)
        await nothing_left(world, left_by_others)

    run(use, HOSTED, limits=LIMITS)


def test_calls_are_forgotten_when_the_store_is_away(left_by_others: list[object]) -> None:
    """On a bad night clients try again and again, and the gateway's memory must not grow with their prompts."""

    async def use(world: World) -> None:
        statuses = {(await world.post()).status for _ in range(CALLS)}

        assert {503} == statuses
        await nothing_left(world, left_by_others)

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        away = f"redis://127.0.0.1:{nobody.getsockname()[1]}"
        run(use, HOSTED, limits=WIDE, store=away, clock=None, options=StoreOptions(deadline_ms=100))


def test_calls_are_forgotten_that_never_reached_a_provider(left_by_others: list[object]) -> None:
    """Nobody listens there."""

    async def use(world: World) -> None:
        statuses = {(await world.post()).status for _ in range(CALLS)}

        assert {502} == statuses
        await nothing_left(world, left_by_others)

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        run(use, HOSTED, limits=WIDE, upstream=f"http://127.0.0.1:{nobody.getsockname()[1]}")
