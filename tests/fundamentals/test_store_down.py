"""Store down: who decides then, and how no usage is lost, on a real server that is killed and started again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog

from meterlib import AsyncMeter, Limit, Meter, Policy, StoreOptions, StoreUnavailable, Usage
from meterlib.testing import Clock
from tests.support.servers import Server, available, start_server

pytestmark = pytest.mark.skipif(available("valkey") is not None, reason=str(available("valkey")))
POLICY = Policy(limits=(Limit(name="output", unit="output_tokens", quota=1_000, window="1m"),))
HASTY = StoreOptions(timeout_ms=200, deadline_ms=300)
ATTRIBUTES = {"provider": "anthropic"}
USED = Usage(output_tokens=150)


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """A server that keeps what it acknowledged, for one test to kill and start."""
    with start_server(tmp_path / "server", append_only=True) as running:
        yield running


def test_calls_are_denied_while_the_store_is_down(own_server: Server, clock: Clock) -> None:
    """By default nobody passes unmetered; the error says that repeating is safe, and then it works."""
    with Meter.connect(own_server.url, POLICY, options=HASTY, clock=clock) as meter:
        own_server.kill()
        with pytest.raises(StoreUnavailable, match="repeating is safe"):
            meter.reserve("acme", ATTRIBUTES, USED, reservation_id="call-1")
        own_server.start()

        assert meter.reserve("acme", ATTRIBUTES, USED, reservation_id="call-1").metered


def test_calls_may_be_allowed_while_the_store_is_down(own_server: Server, clock: Clock) -> None:
    """With `when_down="allow"` they pass, and are marked: no limit was asked."""
    with Meter.connect(own_server.url, POLICY, options=HASTY, clock=clock, when_down="allow") as meter:
        assert meter.reserve("acme", ATTRIBUTES, USED).metered
        own_server.kill()
        held = meter.reserve("acme", ATTRIBUTES, USED)

        assert (False, ()) == (held.metered, held.limits)


def test_a_settle_without_a_journal_is_an_error(own_server: Server, clock: Clock) -> None:
    """Without a place to keep it, the caller is told that usage could not be written."""
    with Meter.connect(own_server.url, POLICY, options=HASTY, clock=clock) as meter:
        held = meter.reserve("acme", ATTRIBUTES, USED)
        own_server.kill()
        with pytest.raises(StoreUnavailable):
            held.settle(USED)
        assert not held.ended
        own_server.start()

        assert "settled" == held.settle(USED).kind


def test_usage_is_kept_in_a_journal_and_booked_once(own_server: Server, clock: Clock, tmp_path: Path) -> None:
    """What was settled while the store was down is in the ledger when it is back, exactly once."""
    journal = tmp_path / "journal"
    with Meter.connect(own_server.url, POLICY, options=HASTY, clock=clock, when_down="allow", journal=journal) as meter:
        reserved = meter.reserve("acme", ATTRIBUTES, Usage(output_tokens=400), reservation_id="reserved")
        own_server.kill()
        unmetered = meter.reserve("acme", ATTRIBUTES, USED, reservation_id="unmetered")
        with structlog.testing.capture_logs() as logs:
            waiting = [reserved.settle(USED), unmetered.settle(USED)]
        assert [0, 0] == [entry.n for entry in waiting]
        assert ["settlement.journalled"] * 2 == [log["event"] for log in logs]
        assert 0 == meter.replay()

    own_server.start()
    with Meter.connect(own_server.url, POLICY, options=HASTY, clock=clock, journal=journal) as successor:
        assert (2, 0) == (successor.replay(), successor.replay())
        booked = [entry for shard in range(successor.shards) for entry in successor.ledger(shard)]

        assert [("settled", "reserved"), ("late", "unmetered")] == [(e.kind, e.reservation_id) for e in booked]
        assert [ATTRIBUTES, ATTRIBUTES] == [entry.attributes for entry in booked]
        assert (300, 0) == (successor.peek("acme", ATTRIBUTES)[0].used, successor.peek("acme", ATTRIBUTES)[0].held)


def test_a_settle_that_did_get_through_is_not_booked_again(own_server: Server, clock: Clock, tmp_path: Path) -> None:
    """The store may have booked a settle whose answer was lost; the journal's copy then finds it done."""
    journal = tmp_path / "journal"
    with Meter.connect(own_server.url, POLICY, options=HASTY, clock=clock, journal=journal) as meter:
        held = meter.reserve("acme", ATTRIBUTES, USED, reservation_id="call-1")
        own_server.kill()
        held.settle(USED)
        own_server.start()
        first = held.settle(USED)
        assert 1 == meter.replay()

        assert [(first.n, "call-1")] == [(entry.n, entry.reservation_id) for entry in meter.ledger(first.shard)]
        assert 150 == meter.peek("acme", ATTRIBUTES)[0].used


def test_the_async_meter_keeps_a_journal_too(own_server: Server, clock: Clock, tmp_path: Path) -> None:
    """The same promise, awaited."""

    async def outage() -> list[str]:
        async with AsyncMeter.connect(
            own_server.url, POLICY, options=HASTY, clock=clock, when_down="allow", journal=tmp_path / "journal"
        ) as meter:
            reserved = await meter.reserve("acme", ATTRIBUTES, USED, reservation_id="reserved")
            own_server.kill()
            unmetered = await meter.reserve("acme", ATTRIBUTES, USED, reservation_id="unmetered")
            assert not unmetered.metered
            for held in (reserved, unmetered):
                assert 0 == (await held.settle(USED)).n
            own_server.start()
            assert 2 == await meter.replay()
            assert 0 == await meter.replay()
            return [e.reservation_id for shard in range(meter.shards) async for e in meter.ledger(shard)]

    assert ["reserved", "unmetered"] == asyncio.run(outage())


@pytest.mark.parametrize("verb", ["reserve", "revise", "settle", "cancel", "record", "peek"])
def test_a_store_that_was_never_reached_is_told_of_as_one_that_is_gone(tmp_path: Path, verb: str) -> None:
    """By the verb that was called, and not by what a meter has to know of its store before."""
    with Meter.connect(f"unix://{tmp_path}/none.sock", POLICY, options=HASTY) as meter:
        calls: dict[str, Callable[[], object]] = {
            "reserve": lambda: meter.reserve("acme"),
            "revise": lambda: meter.revise("acme", "call-1", USED),
            "settle": lambda: meter.settle("acme", "call-1", USED),
            "cancel": lambda: meter.cancel("acme", "call-1"),
            "record": lambda: meter.record("acme", {}, USED),
            "peek": lambda: meter.peek("acme"),
        }
        with pytest.raises(StoreUnavailable) as gone:
            calls[verb]()

        assert verb == gone.value.operation
