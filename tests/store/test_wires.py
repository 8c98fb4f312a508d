"""Meters that made their own client reach one server by connections that nobody else uses, and never mix up answers."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
import redis.asyncio

from meterlib import AsyncMeter, Limit, Meter, Policy, StoreOptions, StoreUnavailable, Usage
from tests.support.proxy import FaultProxy
from tests.support.servers import Server

POLICY = Policy(limits=[Limit(name="tokens", unit="input_tokens", quota=1_000_000, window="7d")])
OPTIONS = StoreOptions(shards=1, timeout_ms=300, deadline_ms=5000)


@pytest.fixture
def emptied(valkey: Server) -> Server:
    with valkey.client() as client:
        client.flushall()
    return valkey


@pytest.fixture
def proxy(emptied: Server) -> Iterator[FaultProxy]:
    with FaultProxy(emptied.port) as proxy:
        yield proxy


def connections(server: Server) -> int:
    """How many are open, this question's own left out."""
    with server.client() as client:
        return len(client.client_list()) - 1


def opened(server: Server) -> int:
    """How many connections were ever made."""
    with server.client() as client:
        return int(client.info("stats")["total_connections_received"])


def used(states: Any) -> int:
    return int(states[0].used)


def test_a_url_s_verbs_do_not_go_by_the_client(emptied: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engineer: the client's own way takes longer than the call."""
    with Meter.connect(emptied.url, POLICY, options=OPTIONS, sweep_interval_ms=0) as meter:
        meter.reserve("acme", usage=Usage(input_tokens=1))
        monkeypatch.setattr(redis.Redis, "execute_command", None)
        entry = meter.reserve("acme", usage=Usage(input_tokens=5)).settle(Usage(input_tokens=3))
    assert 1 == entry.n


def test_verbs_awaited_do_not_go_by_the_client(emptied: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> int:
        async with AsyncMeter.connect(emptied.url, POLICY, options=OPTIONS, sweep_interval_ms=0) as meter:
            await meter.reserve("acme", usage=Usage(input_tokens=1))
            monkeypatch.setattr(redis.asyncio.Redis, "execute_command", None)
            return (await (await meter.reserve("acme", usage=Usage(input_tokens=5))).settle(Usage(input_tokens=3))).n

    assert 1 == asyncio.run(main())


@pytest.mark.parametrize("face", ["sync", "async"])
def test_a_client_that_was_given_sees_every_call(face: str, emptied: Server) -> None:
    """Operator: whoever traces or routes calls in a client of his own finds them all there."""
    seen: list[str] = []

    class Traced(redis.Redis):
        def execute_command(self, *words: Any, **options: Any) -> Any:
            seen.append(words[0])
            return super().execute_command(*words, **options)  # type: ignore[no-untyped-call]

    class AsyncTraced(redis.asyncio.Redis):
        async def execute_command(self, *words: Any, **options: Any) -> Any:
            seen.append(words[0])
            return await super().execute_command(*words, **options)  # type: ignore[no-untyped-call]

    async def main() -> None:
        client = AsyncTraced(port=emptied.port)
        async with AsyncMeter(client, POLICY, options=OPTIONS, sweep_interval_ms=0) as meter:
            await (await meter.reserve("acme")).cancel()
        await client.aclose()

    if face == "async":
        asyncio.run(main())
    else:
        with Traced(port=emptied.port) as client, Meter(client, POLICY, options=OPTIONS, sweep_interval_ms=0) as meter:
            meter.reserve("acme").cancel()

    assert 2 <= seen.count("EVALSHA")


def test_hundreds_of_tasks_share_one_connection(emptied: Server) -> None:
    async def main() -> int:
        async with AsyncMeter.connect(emptied.url, POLICY, options=OPTIONS, sweep_interval_ms=0) as meter:
            await meter.peek("acme")  # the client's own connection is opened for the questions before the first verb
            await meter.reserve("acme", usage=Usage(input_tokens=1))
            before = connections(emptied)
            await asyncio.gather(*[meter.reserve("acme", usage=Usage(input_tokens=1)) for _ in range(500)])
            return connections(emptied) - before

    assert 0 == asyncio.run(main())
    assert 0 == connections(emptied)


def test_who_is_cancelled_leaves_his_answer_to_nobody(emptied: Server, proxy: FaultProxy) -> None:
    async def main() -> list[int]:
        async with AsyncMeter.connect(proxy.url, POLICY, options=OPTIONS, sweep_interval_ms=0) as meter:
            await meter.reserve("acme", usage=Usage(input_tokens=1), reservation_id="first")
            before = opened(emptied)
            proxy.delay_requests(1, 0.1)
            leaving = asyncio.create_task(meter.reserve("acme", usage=Usage(input_tokens=10), reservation_id="second"))
            await asyncio.sleep(0.02)
            leaving.cancel()
            states = [await meter.peek("acme"), (await meter.reserve("zoe", usage=Usage(input_tokens=100))).limits]
            return [*[used(state) for state in states], opened(emptied) - before - 1]

    assert [11, 100, 0] == asyncio.run(main())


def used_at_last(face: str, url: str, happen: Callable[[], object], told: tuple[type[Exception], ...] = ()) -> int:
    """Reserve 1 token, let something happen, reserve 10, and how many are used; who is told an error asks once more."""
    ten: dict[str, Any] = {"usage": Usage(input_tokens=10), "reservation_id": "ten"}

    async def awaited() -> int:
        async with AsyncMeter.connect(url, POLICY, options=OPTIONS, sweep_interval_ms=0) as meter:
            await meter.reserve("acme", usage=Usage(input_tokens=1))
            happen()
            try:
                await meter.reserve("acme", **ten)
            except told:
                await meter.reserve("acme", **ten)
            return used(await meter.peek("acme"))

    if face == "async":
        return asyncio.run(awaited())
    with Meter.connect(url, POLICY, options=OPTIONS, sweep_interval_ms=0) as meter:
        meter.reserve("acme", usage=Usage(input_tokens=1))
        happen()
        try:
            meter.reserve("acme", **ten)
        except told:
            meter.reserve("acme", **ten)
        return used(meter.peek("acme"))


@pytest.mark.parametrize("face", ["sync", "async"])
@pytest.mark.parametrize("fault", ["drop_replies", "swallow_replies", "cut_requests"])
def test_a_call_whose_connection_fails_is_made_again_by_another(face: str, fault: str, proxy: FaultProxy) -> None:
    assert 11 == used_at_last(face, proxy.url, lambda: getattr(proxy, fault)(1))


@pytest.mark.parametrize("face", ["sync", "async"])
@pytest.mark.parametrize("payload", [b"+one\r\n+two\r\n", b"\x00\x01 garbage\r\n", b":1\r\n$5\r\nab"])
def test_answers_that_nobody_asked_for_are_nobody_s(face: str, payload: bytes, proxy: FaultProxy) -> None:
    """Operator: what answers in the server's place is told, and what is left of it reaches no later call."""
    assert 11 == used_at_last(face, proxy.url, lambda: proxy.garble_replies(1, payload), (StoreUnavailable,))


@pytest.mark.parametrize("face", ["sync", "async"])
def test_a_connection_that_the_server_closed_meanwhile_is_replaced(face: str, emptied: Server) -> None:
    """Operator: servers and firewalls close what is idle."""

    def hang_up() -> None:
        with emptied.client() as client:
            client.client_kill_filter(_type="normal", skipme=True)

    assert 11 == used_at_last(face, emptied.url, hang_up)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("hang_up", ["close", "abort"])
def test_calls_that_meet_a_connection_that_is_just_gone_are_made_by_another(
    emptied: Server, loop: str, hang_up: str
) -> None:
    """Between its end and the moment at which anybody is told; loops differ in what they say of writing to it."""
    use = pytest.importorskip("uvloop").run if loop == "uvloop" else asyncio.run
    unheard: list[Any] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
        async with AsyncMeter.connect(emptied.url, POLICY, options=OPTIONS, sweep_interval_ms=0) as meter:
            held = [await meter.reserve("acme", usage=Usage(input_tokens=5)) for _ in range(8)]
            for at in range(4):
                getattr(meter._driver._wire._line._transport, hang_up)()
                await asyncio.gather(held[at].settle(Usage(input_tokens=3)), held[4 + at].settle(Usage(input_tokens=3)))

            assert 24 == used(await meter.peek("acme"))

    use(main())
    gc.collect()
    assert [] == unheard


def test_a_forked_process_asks_by_connections_of_its_own(emptied: Server) -> None:
    with Meter.connect(emptied.url, POLICY, options=OPTIONS, sweep_interval_ms=0) as meter:
        meter.reserve("acme", usage=Usage(input_tokens=1))
        child = os.fork()
        if child == 0:
            try:
                for _ in range(50):
                    meter.reserve("acme", usage=Usage(input_tokens=1))
                os._exit(0)
            finally:
                os._exit(1)
        own = [used(meter.reserve("zoe", usage=Usage(input_tokens=2)).limits) for _ in range(50)]
        assert list(range(2, 102, 2)) == own
        assert 0 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert [51, 100] == [used(meter.peek("acme")), used(meter.peek("zoe"))]


def test_login_and_database_are_the_url_s(emptied: Server) -> None:
    with emptied.client() as client:
        client.execute_command("ACL", "SETUSER", "gateway", "on", ">secret", "~*", "+@all")
    url = f"redis://gateway:secret@127.0.0.1:{emptied.port}/3"

    async def main() -> int:
        async with AsyncMeter.connect(url, POLICY, options=OPTIONS, sweep_interval_ms=0) as meter:
            return used((await meter.reserve("acme", usage=Usage(input_tokens=10))).limits)

    try:
        with Meter.connect(url, POLICY, options=OPTIONS, sweep_interval_ms=0) as meter:
            assert 1 == used(meter.reserve("acme", usage=Usage(input_tokens=1)).limits)
        assert 11 == asyncio.run(main())
        with redis.Redis(port=emptied.port, db=0) as client:
            assert 0 == client.dbsize()
    finally:
        with emptied.client() as client:
            client.execute_command("ACL", "DELUSER", "gateway")
