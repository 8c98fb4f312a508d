"""Usage is a fact: whatever the store's trouble with a settlement, it waits in the journal until the store takes it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import structlog

from meterlib import AsyncMeter, LedgerEntry, Meter, Policy, StoreCorrupt, StoreOptions, Usage
from meterlib.store.keys import shard_keys
from meterlib.testing import Clock
from tests.support.servers import Server

OPTIONS = StoreOptions(shards=2, prefix="nowhere")
USED = Usage(output_tokens=150)
HERE, ELSEWHERE = "acme", "wayne"  # in one shard each
STATE = shard_keys(OPTIONS.prefix, 0)[0]


@pytest.fixture
def direct(valkey: Server) -> Iterator[redis.Redis]:
    with valkey.client() as client:
        client.flushall()
        yield client


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def restored_from_an_old_backup(direct: redis.Redis, meter: Meter) -> bytes:
    """The state of a shard is set back behind its ledger; returns the one that fits."""
    older = bytes(direct.dump(STATE) or b"")
    meter.record(HERE, {}, USED)
    newer = bytes(direct.dump(STATE) or b"")
    direct.restore(STATE, 0, older, replace=True)
    return newer


def booked(meter: Meter) -> list[LedgerEntry]:
    return [entry for shard in range(meter.shards) for entry in meter.ledger(shard)]


def test_usage_waits_while_the_store_does_not_make_sense(
    valkey: Server, direct: redis.Redis, clock: Clock, journal: Path
) -> None:
    """Finance: a store that was restored in part books nothing, and what was used meanwhile is not lost."""
    with Meter.connect(valkey.url, Policy(), options=OPTIONS, clock=clock, journal=journal) as meter:
        held = meter.reserve(HERE)
        fitting = restored_from_an_old_backup(direct, meter)
        with structlog.testing.capture_logs() as logs:
            assert 0 == held.settle(USED).n
        assert [("settlement.journalled", True)] == [
            (log["event"], "in the ledger already" in log["error"]) for log in logs
        ]
        assert 0 == meter.replay()

        direct.restore(STATE, 0, fitting, replace=True)
        assert (1, 0) == (meter.replay(), meter.replay())
        assert [held.id] == [entry.reservation_id for entry in booked(meter) if entry.kind == "settled"]


def test_the_async_meter_keeps_such_usage_too(valkey: Server, direct: redis.Redis, clock: Clock, journal: Path) -> None:
    """Finance: the same promise, awaited."""
    with Meter.connect(valkey.url, Policy(), options=OPTIONS, clock=clock) as meter:
        meter.reserve(HERE, reservation_id="held")
        fitting = restored_from_an_old_backup(direct, meter)

    async def trouble() -> list[int]:
        async with AsyncMeter.connect(valkey.url, Policy(), options=OPTIONS, clock=clock, journal=journal) as meter:
            assert 0 == (await meter.settle(HERE, "held", USED)).n
            refused = await meter.replay()
            direct.restore(STATE, 0, fitting, replace=True)
            return [refused, await meter.replay()]

    assert [0, 1] == asyncio.run(trouble())


def test_without_a_journal_the_caller_hears_of_it(valkey: Server, direct: redis.Redis, clock: Clock) -> None:
    """Gateway: where nothing keeps the usage, the settle fails and says what is wrong with the store."""
    with Meter.connect(valkey.url, Policy(), options=OPTIONS, clock=clock) as meter:
        held = meter.reserve(HERE)
        restored_from_an_old_backup(direct, meter)
        with pytest.raises(StoreCorrupt, match="in the ledger already"):
            held.settle(USED)


def test_one_damaged_shard_does_not_hold_up_the_settlements_of_the_others(
    valkey: Server, direct: redis.Redis, clock: Clock, journal: Path
) -> None:
    """Finance: what waits for a shard that books nothing lets those of other shards pass, and goes on waiting."""
    with Meter.connect(valkey.url, Policy(), options=OPTIONS, clock=clock, journal=journal) as meter:
        first, second, other = meter.reserve(HERE), meter.reserve(HERE), meter.reserve(ELSEWHERE)
        fitting = restored_from_an_old_backup(direct, meter)
        for held in (first, second):
            assert 0 == held.settle(USED).n
        meter._journal.append(other._settlement(USED, "final", None))  # type: ignore[union-attr]

        assert (1, 0) == (meter.replay(), meter.replay())
        direct.restore(STATE, 0, fitting, replace=True)
        assert 2 == meter.replay()
        settled = {entry.reservation_id for entry in booked(meter) if entry.kind == "settled"}
        assert {first.id, second.id, other.id} == settled
