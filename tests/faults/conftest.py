"""Real servers of both kinds, one per module and emptied between tests; meters with and without a proxy before them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from meterlib import Meter
from meterlib.store.scripts import lua_folder, script
from meterlib.testing import Clock
from tests.faults.world import IMPATIENT, OPTIONS, POLICY, START_MS
from tests.support.proxy import FaultProxy
from tests.support.servers import Server


@pytest.fixture
def direct(server: Server) -> Iterator[redis.Redis]:
    """A client of the server, which is empty but for the scripts."""
    with server.client() as client:
        client.flushall()
        for path in lua_folder().glob("*.lua"):
            client.script_load(script(path.stem).text)
        yield client


@pytest.fixture
def clock() -> Clock:
    """The scripts' clock."""
    return Clock(START_MS)


@pytest.fixture
def meter(server: Server, direct: redis.Redis, clock: Clock) -> Iterator[Meter]:
    """A meter of the emptied server that nothing happens to."""
    with Meter.connect(server.url, POLICY, options=OPTIONS, clock=clock) as connected:
        yield connected


@pytest.fixture
def proxy(server: Server) -> Iterator[FaultProxy]:
    """A proxy before the server, to be told what to spoil."""
    with FaultProxy(server.port) as running:
        yield running


@pytest.fixture
def remote(proxy: FaultProxy, direct: redis.Redis, clock: Clock) -> Iterator[Meter]:
    """A meter behind the proxy, with an open connection, that gives a try up after 150 ms."""
    with Meter.connect(proxy.url, POLICY, options=IMPATIENT, clock=clock) as connected:
        connected.peek("acme")
        yield connected
