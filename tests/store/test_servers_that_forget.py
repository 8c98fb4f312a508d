"""A server that may throw the ledger away is told in the log of whoever writes to it, without asking the doctor."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis
import structlog

from meterlib import AsyncMeter, Meter, Policy, StoreOptions
from tests.support.servers import Server, start_server

ROOT = Path(__file__).parents[2]
OPTIONS = StoreOptions(shards=2)


@pytest.fixture(scope="module")
def durable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with start_server(tmp_path_factory.mktemp("durable"), "valkey", append_only=True) as server:
        yield server


@pytest.fixture
def direct(durable: Server) -> Iterator[redis.Redis]:
    with durable.client() as client:
        client.flushall()
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("appendonly", "yes")
        yield client


def told(url: Any, *, calls: int = 3) -> list[dict[str, Any]]:
    """What a meter's first calls log; nothing but reads, where there are to be no calls."""
    with structlog.testing.capture_logs() as logs:
        meter = Meter.connect(url, Policy(), options=OPTIONS) if isinstance(url, str) else Meter(url, Policy())
        with meter:
            meter.peek("acme")
            for _ in range(calls):
                meter.reserve("acme")
    return [dict(log) for log in logs]


def test_a_server_that_evicts_is_told_once(durable: Server, direct: redis.Redis) -> None:
    """Operator: a policy that deletes ledger entries is in the log after the first call, and not after each."""
    direct.config_set("maxmemory-policy", "allkeys-lru")

    (log,) = told(durable.url)

    assert ("store.may_evict", "warning", "allkeys-lru") == (log["event"], log["log_level"], log["policy"])
    assert "set maxmemory-policy noeviction" in log["advice"]


def test_a_server_without_an_append_only_file_is_told_once(durable: Server, direct: redis.Redis) -> None:
    """Operator: a ledger that a restart would lose is in the log as well."""
    direct.config_set("appendonly", "no")

    (log,) = told(durable.url)

    assert ("store.not_durable", "warning") == (log["event"], log["log_level"])
    assert "set appendonly yes" in log["advice"]


def test_a_meter_that_came_to_read_first_is_told_when_it_writes(durable: Server, direct: redis.Redis) -> None:
    """Operator: looking says nothing, and does not use the warning up."""
    direct.config_set("maxmemory-policy", "volatile-ttl")
    told(durable.url)

    assert [] == told(durable.url, calls=0)
    assert ["store.may_evict"] == [log["event"] for log in told(durable.url)]


def test_tasks_that_come_at_once_are_told_once(durable: Server, direct: redis.Redis) -> None:
    """Operator: a burst of first calls makes one line, for an async meter too."""
    direct.config_set("maxmemory-policy", "allkeys-lfu")

    async def burst() -> None:
        async with AsyncMeter.connect(durable.url, Policy(), options=OPTIONS) as meter:
            await asyncio.gather(*(meter.reserve(f"tenant-{number}") for number in range(20)))

    with structlog.testing.capture_logs() as logs:
        asyncio.run(burst())

    assert ["store.may_evict"] == [log["event"] for log in logs]


def test_a_server_that_is_well_is_not_talked_about(durable: Server, direct: redis.Redis, tmp_path: Path) -> None:
    """Operator: nothing is logged where nothing is to be done."""
    assert [] == told(durable.url)
    assert [] == told(f"embedded://{tmp_path / 'data'}")
    assert [] == told("memory://")


def test_a_server_that_does_not_tell_is_left_in_peace(durable: Server, direct: redis.Redis) -> None:
    """Operator: managed servers that forbid the question, and stand-ins that do not know it, work without a word."""
    direct.config_set("maxmemory-policy", "allkeys-lru")
    ask: Any = direct.execute_command
    ask("ACL", "SETUSER", "guest", "on", ">pw", "~*", "+@all", "-info")

    assert [] == told(durable.url.replace("redis://", "redis://guest:pw@"))
    assert [] == told(fakeredis.FakeRedis(server=fakeredis.FakeServer()))


def test_a_cluster_is_asked_as_well(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Operator: a cluster is no exception."""
    with start_server(tmp_path_factory.mktemp("cluster"), "valkey", cluster=True, append_only=True) as cluster:
        with cluster.client() as client:
            client.config_set("maxmemory-policy", "allkeys-lru")
        url = f"redis+cluster://127.0.0.1:{cluster.port}"
        assert ["store.may_evict"] == [log["event"] for log in told(url)]

        async def reserve() -> None:
            async with AsyncMeter.connect(url, Policy(), options=OPTIONS) as meter:
                await meter.reserve("acme")

        with structlog.testing.capture_logs() as logs:
            asyncio.run(reserve())
        assert ["store.may_evict"] == [log["event"] for log in logs]


def test_a_program_that_sets_up_no_logs_keeps_its_standard_output(durable: Server, direct: redis.Redis) -> None:
    """Gateway: results that a script prints are not mixed with what is told to its operator."""
    direct.config_set("maxmemory-policy", "allkeys-lru")
    program = (
        "import sys; from meterlib import Meter, Policy\n"
        "with Meter.connect(sys.argv[1], Policy()) as meter: meter.reserve('acme'); print('done')"
    )
    ran = subprocess.run([sys.executable, "-c", program, durable.url], capture_output=True, text=True, cwd=ROOT)

    assert (0, "done\n") == (ran.returncode, ran.stdout)
    assert "store.may_evict" in ran.stderr
