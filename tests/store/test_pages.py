"""Pages of a ledger as an export reads them: the same entries as `read_ledger` has, the next one asked for ahead."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

import pytest
import redis
from redis.cluster import RedisCluster

from meterlib import AsyncMeter, Meter, Policy, StoreOptions, Usage
from meterlib.store import flows
from meterlib.store.answers import entries_of
from meterlib.store.commands import StoredPage
from meterlib.store.keys import shard_keys
from tests.store.test_clients import ASYNC, SYNC
from tests.support.proxy import FaultProxy
from tests.support.servers import Server, start_server

OPTIONS = StoreOptions(shards=1)
ENTRIES = 7
PAGE = 3


@pytest.fixture
def server(valkey: Server) -> Server:
    with valkey.client() as client:
        client.flushall()
    return valkey


def book(meter: Meter, count: int = ENTRIES) -> None:
    """Entries that differ."""
    for at in range(count):
        meter.record("acme", {"at": str(at)}, Usage(input_tokens=at), record_id=f"r{at}")


def read(meter: Meter) -> list[tuple[int, dict[bytes, bytes]]]:
    """The whole ledger, page by page, as an export reads it."""
    run, found, after = meter._driver.run, [], 0
    while page := run(flows.read_page(0, after, PAGE)):
        found += told(page)
        after = found[-1][0]
        if len(page) < PAGE:
            break
    return found


def told(page: StoredPage) -> list[tuple[int, dict[bytes, bytes]]]:
    """Numbers and fields of a page."""
    return entries_of([(sent, dict(zip(parts[::2], parts[1::2], strict=True))) for sent, parts in page])


def stored(meter: Meter) -> list[tuple[int, dict[bytes, bytes]]]:
    """The same at once, in the plain way."""
    entries: list[tuple[int, dict[bytes, bytes]]] = meter._driver.run(flows.read_stored(0, 0, 100))
    return entries


@pytest.mark.parametrize("kind", SYNC)
def test_pages_hold_what_the_ledger_holds_on_any_client(server: Server, kind: str) -> None:
    """Whatever redis-py makes of an answer elsewhere."""
    with SYNC[kind](server) as client, Meter(client, Policy(), options=OPTIONS) as meter:
        book(meter)

        assert stored(meter) == read(meter)
        assert ENTRIES == len(stored(meter))


@pytest.mark.parametrize("kind", ASYNC)
def test_pages_hold_what_the_ledger_holds_on_any_async_client(server: Server, kind: str) -> None:
    """The async face reads the same."""

    async def both() -> tuple[Any, Any]:
        async with ASYNC[kind](server) as client, AsyncMeter(client, Policy(), options=OPTIONS) as meter:
            for at in range(ENTRIES):
                await meter.record("acme", {}, Usage(input_tokens=at))
            run = meter._driver.run
            return await run(flows.read_stored(0, 0, 100)), told(await run(flows.read_page(0, 0, 100)))

    plain, paged = asyncio.run(both())

    assert plain == paged
    assert ENTRIES == len(plain)


def test_pages_hold_what_the_ledger_holds_in_memory_and_on_a_cluster(tmp_path: Any) -> None:
    """Nor does it matter what the store is."""
    with Meter.connect("memory://", Policy(), options=OPTIONS) as meter:
        book(meter)
        assert stored(meter) == read(meter)
    with (
        start_server(tmp_path, "valkey", cluster=True) as node,
        RedisCluster(host="127.0.0.1", port=node.port) as client,
        Meter(client, Policy(), options=OPTIONS) as meter,
    ):
        book(meter)
        assert stored(meter) == read(meter)


def test_what_was_asked_ahead_and_not_fetched_is_nobody_elses_answer(server: Server) -> None:
    """An export that stops in the middle leaves no connection behind on which an answer waits."""
    with redis.Redis(port=server.port, max_connections=2) as client, Meter(client, Policy(), options=OPTIONS) as meter:
        book(meter)
        run = meter._driver.run
        for _ in range(5):
            assert [1, 2, 3] == [n for n, _ in told(run(flows.read_page(0, 0, PAGE)))]
            assert [3, 4, 5] == [n for n, _ in told(run(flows.read_page(0, 2, PAGE)))]
            assert ENTRIES == run(flows.read_head(0)).last_number
            assert ENTRIES == len(list(meter.ledger(0)))
    with server.client() as watcher:
        assert 1 == len(watcher.client_list())


@pytest.mark.parametrize("fault", ["drop_replies", "cut_requests"])
def test_a_page_whose_connection_broke_is_asked_for_anew(server: Server, fault: str) -> None:
    """Whoever reads does not notice."""
    ledger = shard_keys(OPTIONS.prefix, 0)[3]
    with FaultProxy(server.port) as proxy, redis.Redis(port=proxy.port) as client:
        with Meter(client, Policy(), options=OPTIONS) as meter:
            book(meter)
            getattr(proxy, fault)(1, matching=f"XRANGE {ledger} 4-0".encode())

            assert stored(meter) == read(meter)
        assert 1 == proxy.faults


def test_what_is_booked_behind_a_page_that_was_asked_ahead_comes_with_the_next(server: Server) -> None:
    """A page holds what the ledger had when it was asked for; nothing is passed over."""
    with redis.Redis(port=server.port) as client, Meter(client, Policy(), options=OPTIONS) as meter:
        book(meter, PAGE + 1)
        run = meter._driver.run
        first = told(run(flows.read_page(0, 0, PAGE)))
        meter.record("acme", {}, Usage(input_tokens=99))
        second = told(run(flows.read_page(0, PAGE, PAGE)))
        third = told(run(flows.read_page(0, second[-1][0], PAGE)))

        assert stored(meter) == first + second + third


def test_no_page_is_older_than_the_head_that_was_read_before_it(server: Server) -> None:
    """An export that begins anew takes a short page for the end of all that the head tells of."""
    with redis.Redis(port=server.port) as client, Meter(client, Policy(), options=OPTIONS) as meter:
        book(meter, PAGE)
        run = meter._driver.run
        assert PAGE == len(run(flows.read_page(0, 0, PAGE)))  # from here on the page behind it is asked for
        meter.record("acme", {}, Usage(input_tokens=99))

        head = run(flows.read_head(0))

        assert [head.last_number] == [n for n, _ in told(run(flows.read_page(0, PAGE, PAGE)))]


def test_readers_that_are_at_one_page_together_leave_the_connections_to_others(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engineer: threads that read the same ledger of one meter do not use up its connections."""
    patient = StoreOptions(shards=1, connections_max=4)
    with Meter.connect(server.url, Policy(), options=patient, sweep_interval_ms=0) as meter:
        book(meter)
        both, ask = threading.Barrier(2, timeout=10), meter._driver._ahead.ask

        def together(*page: Any) -> None:
            both.wait()
            ask(*page)
            both.wait()

        monkeypatch.setattr(meter._driver._ahead, "ask", together)
        for _ in range(2):
            readers = [threading.Thread(target=meter._driver.run, args=(flows.read_page(0, 0, PAGE),)) for _ in "ab"]
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join()

        meter._driver._ahead.forget()

        assert patient.connections_max == meter._driver.client.connection_pool.pool.qsize()


def test_a_page_that_was_asked_ahead_is_not_fetched_by_a_forked_process(server: Server) -> None:
    """Engineer: a process that is forked while a ledger is read reads on, and so does the one that it came from."""
    with Meter.connect(server.url, Policy(), options=OPTIONS, sweep_interval_ms=0) as meter:
        book(meter)
        assert [1, 2, 3] == [n for n, _ in told(meter._driver.run(flows.read_page(0, 0, PAGE)))]
        child = os.fork()
        if child == 0:
            status = 1
            try:
                found = told(meter._driver.run(flows.read_page(0, 3, PAGE)))
                status = int([4, 5, 6] != [n for n, _ in found])
            finally:
                os._exit(status)

        assert 0 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert [4, 5, 6] == [n for n, _ in told(meter._driver.run(flows.read_page(0, 3, PAGE)))]
