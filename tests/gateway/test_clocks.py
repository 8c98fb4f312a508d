"""The time of day may jump; how long something takes is not told by it, and what limits count is the store's to say."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime

import aiohttp
import pytest

pytest.importorskip("aiohttp", reason="needs meterlib[gateway]")

from meterlib import AsyncMeter, Limit, Policy, StoreOptions
from meterlib.gateway.app import Gateway
from meterlib.gateway.callers import Callers
from meterlib.gateway.server import Server as GatewayServer
from meterlib.settings import GatewaySettings
from tests.gateway.answers import STREAMS, Answer, Hold
from tests.gateway.books import until
from tests.gateway.provider import Provider
from tests.gateway.world import HOSTED, PROVIDER_KEY, TOKEN, message
from tests.support.servers import Server

DAY_S = 24 * 3600
POLICY = Policy(
    limits=[
        Limit(name="requests", quota=50, window="1m"),
        Limit(name="of-the-month", quota=5_000_000, unit="input_tokens", period="month"),
        Limit(name="parallel", quota=5, open=True),
    ]
)


@pytest.mark.parametrize("jump_s", [-3600, 3600, -400 * DAY_S, 400 * DAY_S])
def test_a_jump_of_this_machines_clock_changes_nothing(
    jump_s: int, valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An open stream is not cut off, pinged, dropped, given up or let expire; the next call finds the same limits."""
    with valkey.client() as client:
        client.flushall()
        server_s = client.time()[0]
    own_time, own_ns = time.time, time.time_ns
    hold = Hold()
    events = STREAMS["cached"].events
    answer = Answer(events=[*events[:4], hold, *events[4:]])

    async def play() -> None:
        async with Provider() as provider, aiohttp.ClientSession() as http:
            told = GatewaySettings(
                listen="127.0.0.1:0", upstream=provider.url, lease_ms=60_000, ping_after_ms=30_000, drain_ms=30_000,
                write_timeout_ms=30_000, upstream_idle_timeout_ms=30_000, upstream_timeout_ms=60_000, shutdown_ms=0,
                count_tokens_per_minute=1,
            )  # fmt: skip
            callers = Callers(told, [HOSTED], {"ANTHROPIC_API_KEY": PROVIDER_KEY}, b"")
            meter = AsyncMeter.connect(valkey.url, POLICY, options=StoreOptions(shards=1), sweep_interval_ms=10)
            async with GatewayServer(Gateway(told, callers, meter, closes_meter=True)) as server:
                gateway, headers = server.gateway, {"x-api-key": TOKEN}
                provider.answers(answer)

                async def counted() -> int:
                    url = f"{server.url}/v1/messages/count_tokens"
                    async with http.post(url, json=message(), headers=headers) as response:
                        await response.read()
                        return response.status

                async with http.post(f"{server.url}/v1/messages", json=message(stream=True), headers=headers) as got:
                    await hold.reached()
                    assert [200, 429] == [await counted(), await counted()]
                    monkeypatch.setattr(time, "time", lambda: own_time() + jump_s)
                    monkeypatch.setattr(time, "time_ns", lambda: own_ns() + jump_s * 10**9)
                    gateway.tend()
                    assert 429 == await counted()
                    assert 1 == gateway.open_calls
                    hold.release()
                    assert answer.body() == await got.read()
                async with http.post(f"{server.url}/v1/messages", json=message(), headers=headers) as got:
                    assert 200 == got.status
                    assert "48" == got.headers["anthropic-ratelimit-requests-remaining"]
                    reset = datetime.fromisoformat(got.headers["anthropic-ratelimit-requests-reset"])
                    assert 0 <= reset.timestamp() - server_s <= 120
                await until(lambda: not gateway.open_calls)
                entries = [entry async for entry in meter.ledger(0)]
                assert [("settled", "final", "complete")] * 2 == [
                    (entry.kind, entry.quality, entry.facts["end"]) for entry in entries
                ]
                assert all(abs(entry.booked_at / 1000 - server_s) <= 120 for entry in entries)
                states = {state.name: state for state in await meter.peek("acme", {})}
                spent = sum(
                    int(str(entry.usage[name]))
                    for entry in entries
                    for name in ("input_tokens", "cache_creation_input_tokens")
                )
                assert (spent, 0) == (states["of-the-month"].used, states["parallel"].used)
                resets_at_ms = states["of-the-month"].resets_at_ms
                assert resets_at_ms
                assert 0 < resets_at_ms / 1000 - server_s <= 31 * DAY_S

    asyncio.run(play())
