"""A server that meterlib cannot work with says so in its own words; the caller hears what is needed instead."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.exceptions import AskError, MovedError, ResponseError

from meterlib import AsyncMeter, Meter, Policy, StoreRefused
from meterlib.store.faults import verdict
from meterlib.testing import Clock

# Word for word what Redis 6.2 answers to EVAL of a script that begins with #!lua.
REDIS_6 = "Error compiling script (new function): user_script:1: unexpected symbol near '#'"


class OldServer:
    """A client of a server that takes commands, but not our scripts."""

    def execute_command(self, *words: Any, **options: Any) -> Any:
        if words[0] in ("EVALSHA", "EVAL"):
            raise ResponseError(REDIS_6)
        return None

    def close(self) -> None:
        """Nothing is open."""


class OldServerForTasks(OldServer):
    async def execute_command(self, *words: Any, **options: Any) -> Any:
        return OldServer.execute_command(self, *words, **options)

    async def aclose(self) -> None:
        """Nothing is open."""


def test_a_server_that_is_too_old_is_told_with_the_versions_that_are_not() -> None:
    """Operator: Redis 6 is named as the trouble, not the data in it."""
    with Meter(OldServer(), Policy(), clock=Clock()) as meter, pytest.raises(StoreRefused) as refusal:
        meter.reserve("acme")

    assert "too old: Redis 7.0 or newer, or Valkey, is needed" in str(refusal.value)


def test_the_async_meter_tells_it_as_well() -> None:
    """Operator: the same words, awaited."""

    async def reserve() -> None:
        async with AsyncMeter(OldServerForTasks(), Policy(), clock=Clock()) as meter:
            await meter.reserve("acme")

    with pytest.raises(StoreRefused, match=r"too old: Redis 7\.0 or newer, or Valkey, is needed"):
        asyncio.run(reserve())


@pytest.mark.parametrize("error", [MovedError("1234 127.0.0.1:7001"), AskError("1234 127.0.0.1:7001")])
def test_a_node_of_a_cluster_is_told_with_the_url_to_write(error: ResponseError) -> None:
    """Operator: a plain client before a cluster is told how to become another one."""
    told = verdict("reserve", error)

    assert isinstance(told, StoreRefused)
    assert "redis+cluster://" in str(told)
