"""What must be true whenever calls have ended, however they did: the ledger and the limits tell the same story."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
import msgspec

from meterlib import LedgerEntry, Limit, Usage
from meterlib.core.ledger import counts_of
from meterlib.core.usage import amount_of
from meterlib.gateway.sse import usage_of
from tests.gateway.answers import PATIENCE_S, Answer, Event
from tests.gateway.world import World

ENDS = ("settled", "cancelled", "expired")
WIDE = (
    Limit(name="requests", quota=100_000, window="1d", per=["provider"]),
    Limit(name="input_tokens", unit="input_tokens", quota=10_000_000, window="1d", per=["provider"]),
    Limit(name="output_tokens", unit="output_tokens", quota=10_000_000, window="1d", per=["provider"]),
    Limit(name="open", quota=1000, open=True),
)
"""Limits that nothing here reaches, and out of which nothing slides while a test lasts."""


async def ended(world: World, *, kinds: Mapping[str, int] | None = None) -> list[LedgerEntry]:
    """Wait until all calls have ended; every one did so once, holds nothing, and counts as the ledger says.

    Returns:
        The entries, in the order in which their calls were admitted. `kinds` says how many of which there are to be.
    """
    await until(lambda: not (world.gateway.open_calls or world.gateway._handling or world.gateway._background))
    entries = sorted(await world.entries(), key=lambda entry: (entry.reserved_at, entry.shard, entry.n))
    assert 0 == await world.open_reservations()
    assert {1} >= set(Counter(entry.reservation_id for entry in entries).values())
    assert set(ENDS) >= {entry.kind for entry in entries}
    if kinds is not None:
        assert kinds == Counter(entry.kind for entry in entries)
    for tenant in {entry.tenant for entry in entries}:
        await _agree(world, tenant, [entry for entry in entries if entry.tenant == tenant])
    return entries


async def _agree(world: World, tenant: str, entries: list[LedgerEntry]) -> None:
    for limit in await world.meter.peek(tenant, {"provider": "anthropic"}):
        charged = 0 if limit.name == "open" else sum(_charge(entry, limit.unit) for entry in entries)

        assert (limit.name, charged, 0) == (limit.name, limit.used, limit.held)


def _charge(entry: LedgerEntry, unit: str) -> int:
    """What a call counts for: as much as is known of it, and else as much as was held."""
    if entry.kind == "cancelled":
        return 0
    known = amount_of(msgspec.convert(entry.usage, Usage), unit)
    return (amount_of(msgspec.convert(entry.estimate, Usage), unit) or 0) if known is None else known


async def until(there: Callable[[], object]) -> None:
    """Wait for what is bound to come."""
    async with asyncio.timeout(PATIENCE_S):
        while not there():
            await asyncio.sleep(0.001)


async def noticed(world: World) -> None:
    """Wait until the gateway can see that its only client has left, and have it look."""
    await until(lambda: world.gateway.open_calls and all(call._exchange.gone for call in world.gateway._calls))
    world.gateway.tend()


async def read(response: aiohttp.ClientResponse, size: int) -> bytes:
    """The first bytes of an answer."""
    async with asyncio.timeout(PATIENCE_S):
        return await response.content.readexactly(size)


async def read_to_end(response: aiohttp.ClientResponse) -> tuple[bytes, bool]:
    """The rest of an answer, and whether it ended as an answer does."""
    pieces = []
    async with asyncio.timeout(PATIENCE_S):
        try:
            async for piece in response.content.iter_any():
                pieces.append(piece)
        except aiohttp.ClientError:
            return b"".join(pieces), False
    return b"".join(pieces), True


def leave(response: aiohttp.ClientResponse, *, reset: bool = False) -> None:
    """Go away in the middle of an answer, politely or not."""
    connection = response.connection
    assert connection
    assert connection.transport
    if reset:
        never_linger = struct.pack("ii", 1, 0)
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, never_linger)
    connection.transport.abort()


def size_of(events: list[Event], count: int) -> int:
    """How many bytes the first events of a stream take."""
    return len(Answer(events=events[:count]).body())


def told(usage: Mapping[str, Any]) -> dict[str, object]:
    """What the ledger keeps of a usage that the provider told."""
    return counts_of(usage_of(msgspec.json.encode({"usage": usage})))
