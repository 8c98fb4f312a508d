"""Ids of others: what one tenant does under an id never touches another tenant's call of that id."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fakeredis import FakeAsyncRedis, FakeRedis, FakeServer

from meterlib import (
    AsyncMeter,
    Limit,
    Meter,
    Policy,
    ReservationConflict,
    ReservationEnded,
    ReservationNotFound,
    Usage,
)
from meterlib.testing import Clock

POLICY = Policy(
    limits=(
        Limit(name="tokens", unit="output_tokens", quota=100, window="1m"),
        Limit(name="month", unit="output_tokens", quota=10_000, period="month"),
        Limit(name="at_once", quota=4, open=True),
    )
)
TENANTS = ["acme", "mallory", "acme:mallory", "{acme}", "*", "acme/call-1"]
Ask = Callable[..., Any]


@pytest.fixture(params=["sync", "async", "memory"])
def ask(request: pytest.FixtureRequest) -> Iterator[Ask]:
    """Asks a meter whose tenants all share one shard, or lie in different ones as their names have it."""
    clock = Clock()
    if request.param == "memory":
        meter: Any = Meter.connect("memory://", POLICY, clock=clock)
        yield lambda verb, *rest, **named: getattr(meter, verb)(*rest, **named)
        return
    server = FakeServer()
    if request.param == "sync":
        with FakeRedis(server=server) as client:
            meter = Meter(client, POLICY, clock=clock)
            yield lambda verb, *rest, **named: getattr(meter, verb)(*rest, **named)
        return
    with asyncio.Runner() as runner:
        async_client = FakeAsyncRedis(server=server)
        meter = AsyncMeter(async_client, POLICY, clock=clock)
        yield lambda verb, *rest, **named: runner.run(getattr(meter, verb)(*rest, **named))
        runner.run(async_client.aclose())


def everything(ask: Ask) -> dict[str, Any]:
    """All that can be seen of all tenants, and of all ledgers."""
    seen: dict[str, Any] = {tenant: ask("peek", tenant) for tenant in TENANTS}
    return seen | {f"ledger {shard}": ask("head", shard) for shard in range(16)}


@pytest.mark.parametrize("other", TENANTS[1:])
def test_settling_another_tenants_call_writes_nothing(ask: Ask, other: str) -> None:
    """A settle under the wrong tenant is refused, and neither side's quota, hold or ledger changes."""
    ask("reserve", "acme", {}, Usage(output_tokens=40), reservation_id="call-1")
    ask("reserve", other, {}, Usage(output_tokens=5), reservation_id="call-2")
    before = everything(ask)

    with pytest.raises(ReservationConflict) as refused:
        ask("settle", other, "call-1", Usage(output_tokens=7))

    assert "call-1" == refused.value.reservation_id
    assert "nothing was written" in str(refused.value)
    assert before == everything(ask)
    assert "open" == ask("find", "acme", "call-1").status
    with pytest.raises(ReservationNotFound):
        ask("find", other, "call-1")


def test_the_refusal_does_not_tell_whose_call_it_is(ask: Ask) -> None:
    """Whoever tries ids learns nothing about the tenant that has one."""
    ask("reserve", "acme", {"customer": "secret-project"}, Usage(output_tokens=40), reservation_id="call-1")

    with pytest.raises(ReservationConflict) as refused:
        ask("settle", "mallory", "call-1", Usage(output_tokens=7))

    assert "acme" not in f"{refused.value} {vars(refused.value)}"
    assert "secret-project" not in f"{refused.value} {vars(refused.value)}"


@pytest.mark.parametrize(
    ("verb", "rest"), [("revise", (Usage(output_tokens=99),)), ("renew", (3_600_000,)), ("find", ())]
)
def test_another_tenants_call_is_as_unknown_as_one_never_made(ask: Ask, verb: str, rest: tuple[Any, ...]) -> None:
    """An id of another tenant and one that nobody has get the same answer, word for word."""
    ask("reserve", "acme", {}, Usage(output_tokens=40), reservation_id="call-1")
    before = everything(ask)

    with pytest.raises(ReservationNotFound) as foreign:
        ask(verb, "mallory", "call-1", *rest)
    with pytest.raises(ReservationNotFound) as unknown:
        ask(verb, "mallory", "call-9", *rest)

    assert str(foreign.value).replace("call-1", "call-9") == str(unknown.value)
    assert before == everything(ask)


def test_cancelling_another_tenants_call_frees_nothing(ask: Ask) -> None:
    """A cancel is remembered for the tenant that said it, and the other one's hold stays."""
    ask("reserve", "acme", {}, Usage(output_tokens=40), reservation_id="call-1")
    before = everything(ask)
    ask("cancel", "mallory", "call-1")

    assert before["acme"] == ask("peek", "acme")
    assert "open" == ask("find", "acme", "call-1").status
    assert 7 == ask("settle", "acme", "call-1", Usage(output_tokens=7)).usage["output_tokens"]


def test_two_tenants_may_choose_the_same_id(ask: Ask) -> None:
    """Ids are unique within a tenant; each settles its own."""
    for used, tenant in enumerate(TENANTS):
        ask("reserve", tenant, {}, Usage(output_tokens=40), reservation_id="call-1")
        assert 40 == ask("peek", tenant)[0].held, used
    for used, tenant in enumerate(TENANTS):
        ask("settle", tenant, "call-1", Usage(output_tokens=used))

    assert list(range(len(TENANTS))) == [ask("peek", tenant)[0].used for tenant in TENANTS]


def test_an_id_cannot_be_used_for_something_else(ask: Ask) -> None:
    """The same id with another payload is a conflict that names both, before the call ends and after."""
    ask("reserve", "acme", {}, Usage(output_tokens=40), reservation_id="call-1")
    before = everything(ask)
    with pytest.raises(ReservationConflict) as reserving:
        ask("reserve", "acme", {}, Usage(output_tokens=41), reservation_id="call-1")
    with pytest.raises(ReservationConflict, match="settle it"):
        ask("record", "acme", {}, Usage(output_tokens=40), record_id="call-1")

    assert "40" in (reserving.value.existing or "")
    assert "41" in (reserving.value.given or "")
    assert before == everything(ask)

    ask("settle", "acme", "call-1", Usage(output_tokens=7))
    after = everything(ask)
    with pytest.raises(ReservationConflict) as settling:
        ask("settle", "acme", "call-1", Usage(output_tokens=8))
    with pytest.raises(ReservationConflict):
        ask("record", "acme", {}, Usage(output_tokens=40), record_id="call-1")
    with pytest.raises(ReservationEnded) as cancelling:
        ask("cancel", "acme", "call-1")
    with pytest.raises(ReservationEnded):
        ask("reserve", "acme", {}, Usage(output_tokens=40), reservation_id="call-1")

    assert "7" in (settling.value.existing or "")
    assert "8" in (settling.value.given or "")
    assert "settled" == cancelling.value.kind
    assert after == everything(ask)
