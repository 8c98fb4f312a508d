"""What a caller does to its dicts after a call changes nothing about that call."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import MappingProxyType

import pytest
from fakeredis import FakeAsyncRedis, FakeServer

from meterlib import AsyncMeter, Limit, Meter, Policy, StoreOptions, Tenant, Usage
from meterlib.store.journal import Journal
from meterlib.testing import Clock, MemoryMeter

POLICY = Policy(limits=(Limit(name="requests", quota=1, window="1m", per=("model",)),))
HASTY = StoreOptions(shards=1, timeout_ms=50, deadline_ms=50)
NOBODY = "redis://127.0.0.1:1/0"


def test_a_reservation_keeps_the_attributes_it_was_made_with() -> None:
    """Gateway: one dict may be used for call after call, each with another model in it."""
    meter = MemoryMeter(POLICY)
    attributes = {"model": "haiku"}
    first = meter.reserve("acme", attributes)
    attributes["model"] = "opus"
    second = meter.reserve("acme", attributes)

    assert [{"model": "haiku"}, {"model": "opus"}] == [first.attributes, second.attributes]


def test_usage_that_waits_in_the_journal_is_charged_to_the_call_it_is_of(tmp_path: Path) -> None:
    """Finance: a dict that was used again meanwhile does not move usage to another model."""
    attributes, facts = {"model": "haiku"}, {"request_id": "req_1"}
    with Meter.connect(NOBODY, POLICY, options=HASTY, when_down="allow", journal=tmp_path / "journal") as meter:
        held = meter.reserve("acme", attributes)
        attributes["model"] = "opus"
        held.settle(Usage(input_tokens=1), facts=facts)

    (waiting,) = Journal(tmp_path / "journal").waiting()
    assert waiting.settlement.call_facts is not None
    assert {"model": "haiku"} == waiting.settlement.call_facts.attributes


def test_a_settle_under_way_is_not_changed_any_more(tmp_path: Path) -> None:
    """Gateway: what a task passes is taken as it is in that moment, however long the store takes."""
    attributes, facts = {"model": "haiku"}, {"request_id": "req_1"}

    async def settle() -> None:
        async with AsyncMeter.connect(NOBODY, POLICY, options=HASTY, journal=tmp_path / "journal") as meter:
            task = asyncio.create_task(meter.settle("acme", "call-1", Usage(), facts=facts, attributes=attributes))
            await asyncio.sleep(0)  # it begins
            attributes["model"], facts["request_id"] = "opus", "req_2"
            await task

    asyncio.run(settle())

    (waiting,) = Journal(tmp_path / "journal").waiting()
    assert waiting.settlement.call_facts is not None
    assert {"model": "haiku"} == waiting.settlement.call_facts.attributes
    assert {"request_id": "req_1"} == waiting.settlement.facts


def test_a_call_that_waits_its_turn_waits_with_the_attributes_it_came_with() -> None:
    """Gateway: who waits for a limit is admitted by that limit, not by another one of a dict used again."""

    async def wait() -> list[str]:
        clock = Clock()
        async with AsyncMeter.connect("memory://", POLICY, clock=clock) as meter:
            attributes = {"model": "haiku"}
            await meter.reserve("acme", attributes)
            waiting = asyncio.create_task(meter.reserve("acme", attributes, max_wait_ms=60_000))
            await asyncio.sleep(0)  # it is denied, and waits
            attributes["model"] = "opus"
            clock.advance(ms=120_000)
            return [dict((await waiting).attributes)["model"]]

    assert ["haiku"] == asyncio.run(wait())


def test_an_entry_keeps_the_attributes_it_was_booked_with() -> None:
    """Finance: an entry in hand says what the ledger says."""
    meter = MemoryMeter(POLICY)
    attributes, facts = {"model": "haiku"}, {"request_id": "req_1"}
    entry = meter.record("acme", attributes, Usage(), facts=facts)
    late = meter.settle("acme", "call-1", Usage(), attributes=attributes, facts=facts)
    attributes["model"], facts["request_id"] = "opus", "req_2"

    assert [{"model": "haiku"}] * 2 == [entry.attributes, late.attributes]
    assert [{"request_id": "req_1"}] * 2 == [entry.facts, late.facts]


def test_an_adjustment_keeps_the_difference_it_was_booked_with() -> None:
    """Finance: an entry in hand says what the ledger says, the innermost number included."""
    meter = MemoryMeter(POLICY)
    inner, amounts = {"web_search_requests": -1}, {"pages": 3}
    difference = {"input_tokens": -3, "server_tool_use": inner, "amounts": amounts}
    recorded = meter.record("acme", {}, Usage(input_tokens=7, amounts=amounts))
    adjusted = meter.adjust(recorded, difference, "counted twice")
    difference["input_tokens"] = inner["web_search_requests"] = amounts["pages"] = 99

    booked = [entry.usage for shard in range(meter.shards) for entry in meter.ledger(shard)]
    assert booked == [recorded.usage, adjusted.usage]
    assert {"input_tokens": -3, "server_tool_use": {"web_search_requests": -1}, "amounts": {"pages": 3}} == booked[1]


def test_an_adjustment_under_way_is_not_changed_any_more() -> None:
    """Finance: a task that corrects entry after entry may use one dict for all."""
    server = FakeServer()

    async def adjust() -> list[object]:
        async with FakeAsyncRedis(server=server) as client:
            meter = AsyncMeter(client, POLICY, clock=Clock())
            recorded = await meter.record("acme", {}, Usage(input_tokens=7))
            inner = {"web_search_requests": -1}
            task = asyncio.create_task(meter.adjust(recorded, {"server_tool_use": inner}, "counted twice"))
            await asyncio.sleep(0)  # it begins
            inner["web_search_requests"] = 99
            entry = await task
            stored = [own async for own in meter.ledger(entry.shard)]
            return [entry.usage, stored[-1].usage]

    assert [{"server_tool_use": {"web_search_requests": -1}}] * 2 == asyncio.run(adjust())


@pytest.mark.parametrize("kind", [dict, MappingProxyType])
def test_any_mapping_will_do(kind: type) -> None:
    """Gateway: attributes may come as a mapping that cannot be changed."""
    meter = MemoryMeter(POLICY)
    attributes = kind({"model": "haiku"})
    entry = meter.reserve("acme", attributes).settle(Usage(), facts=kind({"request_id": "req_1"}))

    assert ({"model": "haiku"}, {"request_id": "req_1"}) == (entry.attributes, entry.facts)
    assert {"model": "haiku"} == meter.record("acme", attributes, Usage()).attributes


def test_a_policy_stays_as_it_was_checked() -> None:
    """Operator: limits may be made of lists and dicts that go on being used, and checked ones cannot become wrong."""
    per, models, quotas = ["key"], ["claude-*"], {"requests": 5}
    match = {"model": models}
    limit = Limit(name="requests", quota=1, window="1m", per=per, match=match)
    policy = Policy(limits=[limit], tenants=[Tenant(name="acme", quotas=quotas)])
    per.append("no name")
    models.clear()
    match["tenant"] = [""]
    quotas["requests"] = -1

    assert (("key",), {"model": ("claude-*",)}) == (policy.limits[0].per, policy.limits[0].match)
    assert {"requests": 5} == policy.tenants[0].quotas
    assert {"requests": 5} == MemoryMeter(policy).quotas_of("acme", {"model": "claude-opus-4"})
