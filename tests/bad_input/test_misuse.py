"""Meters used as they are not made to be: closed, on a client of the other kind, with settings that make no sense."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fakeredis import FakeAsyncRedis, FakeRedis

from meterlib import AsyncMeter, InvalidInput, Meter, MeterError, Policy, StoreOptions, Usage, UsageError
from meterlib.testing import Clock
from tests.bad_input.support import POLICY, AsyncWire, Face, Wire
from tests.bad_input.test_names import ENTRY
from tests.support import servers

VERBS: list[tuple[str, tuple[Any, ...]]] = [
    ("reserve", ("acme",)),
    ("revise", ("acme", "call-1", Usage())),
    ("renew", ("acme", "call-1")),
    ("settle", ("acme", "call-1", Usage())),
    ("cancel", ("acme", "call-1")),
    ("record", ("acme", {}, Usage())),
    ("adjust", (ENTRY, {"input_tokens": -1}, "a test")),
    ("peek", ("acme",)),
    ("find", ("acme", "call-1")),
    ("sweep", ()),
    ("ledger", (0,)),
    ("head", (0,)),
]


@pytest.mark.parametrize(("verb", "arguments"), VERBS, ids=[verb for verb, _ in VERBS])
def test_a_closed_meter_says_so(face: Face, verb: str, arguments: tuple[Any, ...]) -> None:
    """Whatever is asked after the end, the answer is that it is closed, and nothing is sent."""
    for _ in range(2):  # closing twice is as good as once
        face.call("close" if isinstance(face.meter, Meter) else "aclose")

    with pytest.raises(UsageError, match="closed"):
        face.call(verb, *arguments)

    assert [] == face.wire.sent


def test_a_reservation_of_a_closed_meter_says_so() -> None:
    """A reservation that outlives its meter is not settled in silence."""
    store = FakeRedis()
    with Meter(store, POLICY, clock=Clock()) as meter:
        held = meter.reserve("acme", reservation_id="call-1")

    with pytest.raises(UsageError, match="closed"):
        held.settle(Usage())
    assert not held.ended
    assert "open" == Meter(store, POLICY, clock=Clock()).find("acme", "call-1").status


def test_a_meter_and_its_client_are_both_sync_or_both_async() -> None:
    """A client of the other kind is refused when the meter is made, and the error says which one is needed."""
    with pytest.raises(InvalidInput, match=r"a client of redis is needed here") as wants_sync:
        Meter(AsyncWire(), POLICY)
    with pytest.raises(InvalidInput, match=r"a client of redis\.asyncio is needed here") as wants_async:
        AsyncMeter(Wire(), POLICY)

    assert "client" == wants_sync.value.field == wants_async.value.field


def test_clients_of_fakeredis_are_told_apart_as_well() -> None:
    """Tests of users meet the same error as their services would."""
    with pytest.raises(InvalidInput, match=r"redis\.asyncio is needed here, not fakeredis"):
        AsyncMeter(FakeRedis(), POLICY)
    with pytest.raises(InvalidInput, match=r"redis is needed here, not fakeredis"):
        Meter(FakeAsyncRedis(), POLICY)


@pytest.mark.parametrize("client", [object(), Policy(), Wire])
def test_a_client_is_one(client: Any) -> None:
    """Something that is no client is refused when the meter is made."""
    with pytest.raises(InvalidInput) as refused:
        Meter(client if client is not Wire else object, POLICY)

    assert "client" == refused.value.field


@pytest.mark.skipif(servers.available("valkey") is not None, reason=str(servers.available("valkey")))
def test_an_async_meter_belongs_to_one_event_loop(tmp_path: Path) -> None:
    """Connections belong to the loop that opened them; another loop is told so."""
    with servers.start_server(tmp_path) as server:
        meter = AsyncMeter.connect(server.url, POLICY, sweep_interval_ms=0)

        async def peek_and_close(*, close: bool) -> None:
            await meter.peek("acme")
            if close:
                await meter.aclose()

        with asyncio.Runner() as first:
            first.run(peek_and_close(close=False))
            try:
                with asyncio.Runner() as second, pytest.raises(UsageError):
                    second.run(peek_and_close(close=False))
            finally:
                first.run(meter.aclose())


@pytest.mark.parametrize("meter", [Meter, AsyncMeter])
@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"when_down": "alow"}, "when_down"),
        ({"when_down": None}, "when_down"),
        ({"policy": "meterlib.toml"}, "policy"),
        ({"policy": {}}, "policy"),
        ({"options": {"shards": 1}}, "options"),
        ({"clock": 1_790_000_000_000}, "clock"),
        ({"sweep_interval_ms": -1}, "sweep_interval_ms"),
        ({"sweep_interval_ms": "10s"}, "sweep_interval_ms"),
    ],
    ids=str,
)
def test_a_meter_is_made_with_settings_that_make_sense(meter: Any, settings: dict[str, Any], field: str) -> None:
    """A wrong setting is found when the meter is made; above all, none may turn "deny" into "allow"."""
    with pytest.raises(InvalidInput) as refused:
        meter("memory://", **({"policy": POLICY} | settings))

    assert field == refused.value.field


@pytest.mark.parametrize(
    "options",
    [
        {"shards": 0},
        {"shards": -1},
        {"shards": 1.5},
        {"shards": "16"},
        {"shards": True},
        {"prefix": ""},
        {"prefix": "{}"},
        {"prefix": "a\nb"},
        {"prefix": 5},
        {"retention_ms": -1},
        {"sweep_max": -1},
        {"timeout_ms": 0},
        {"deadline_ms": -1},
        {"connections_max": 0},
    ],
    ids=str,
)
def test_a_store_is_used_with_options_that_make_sense(options: dict[str, Any]) -> None:
    """A number of shards that cannot be, or a prefix that tears keys apart, is found before any key is written."""
    with pytest.raises(MeterError) as refused:
        Meter(Wire(), POLICY, options=StoreOptions(**options))

    assert next(iter(options)) in str(refused.value)


def test_an_option_that_there_is_not_cannot_be_written() -> None:
    """A misspelt option is an error."""
    with pytest.raises(TypeError, match="shard"):
        StoreOptions(shard=1)  # type: ignore[call-arg]
