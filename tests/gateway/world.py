"""A gateway between a test's client and a scripted provider, on a clock that the test sets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from msgspec.structs import replace

from meterlib import AsyncMeter, LedgerEntry, Limit, Policy, StoreOptions
from meterlib.billing.prices.pricing import TermsBook, books_of
from meterlib.billing.rating.budget import CostTables
from meterlib.core.usd import COST
from meterlib.gateway.app import Gateway
from meterlib.gateway.callers import Callers
from meterlib.gateway.server import Server
from meterlib.gateway.spending import Spending
from meterlib.gateway.tokens import hash_of
from meterlib.settings import BillingSettings, GatewaySettings, TenantSettings
from meterlib.testing import Clock
from tests.gateway.provider import Provider

MODEL = "claude-sonnet-4-5"
TOKEN = "ml_a-token-of-acme"
PROVIDER_KEY = "sk-ant-hosted-0001"
OWN_KEY = "sk-ant-own-0002"
BASE = "/v3/ai/anthropic"
HOSTED = TenantSettings(name="acme", tokens=[hash_of(TOKEN)])
LIMITS = (
    Limit(name="requests", quota=50, window="1m", per=["provider"]),
    Limit(name="input_tokens", unit="input_tokens", quota=50_000, window="1m", per=["provider"]),
)


BILLING = BillingSettings(fallback="none")


class Got(NamedTuple):
    """What a client got."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    whole: bool = True

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> tuple[int, str]:
        return self.status, self.json["error"]["type"]


class World:
    """Attributes:

    url: the gateway's base URL.
    provider: what it forwards to.
    clock: the store's and the gateway's.
    """

    def __init__(self, server: Server, provider: Provider, clock: Clock, http: aiohttp.ClientSession) -> None:
        self.server = server
        self.gateway = server.gateway
        self.meter = server.gateway.meter
        self.provider = provider
        self.clock = clock
        self.http = http
        self.url = server.url

    async def entries(self) -> list[LedgerEntry]:
        """The whole ledger."""
        return [entry for shard in range(self.meter.shards) async for entry in self.meter.ledger(shard)]

    async def entry(self) -> LedgerEntry:
        """The one entry there is, as soon as it is there."""
        await self.settled()
        entries = await self.entries()
        assert 1 == len(entries), entries
        return entries[0]

    async def settled(self) -> None:
        """Wait until no call is under way, and nothing is left to be done for one."""
        while self.gateway.open_calls or self.gateway._handling or self.gateway._background:
            await asyncio.sleep(0.001)

    async def open_reservations(self) -> int:
        return sum([(await self.meter.head(shard)).open_reservations for shard in range(self.meter.shards)])

    def advance(self, *, ms: int) -> None:
        """Time goes on, and the gateway looks after its calls."""
        self.clock.advance(ms=ms)
        self.gateway.tend()

    async def post(
        self,
        body: object = None,
        *,
        path: str = "/v1/messages",
        key: str | None = TOKEN,
        headers: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> Got:
        """Send a message as a client does, and read the answer to its end."""
        async with self.asked(body, path=path, key=key, headers=headers, **fields) as response:
            pieces = []
            try:
                async for piece in response.content.iter_any():
                    pieces.append(piece)
            except aiohttp.ClientPayloadError:
                return Got(response.status, response.headers, b"".join(pieces), whole=False)
            return Got(response.status, response.headers, b"".join(pieces))

    @asynccontextmanager
    async def asked(
        self,
        body: object = None,
        *,
        path: str = "/v1/messages",
        key: str | None = TOKEN,
        headers: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a message, and have the answer as it comes."""
        data = body if isinstance(body, bytes) else json.dumps(message(**fields) if body is None else body).encode()
        sent = {"content-type": "application/json"} | ({"x-api-key": key} if key else {}) | dict(headers or {})
        async with self.http.post(self.url + path, data=data, headers=sent) as response:
            yield response

    async def get(self, path: str, *, key: str | None = TOKEN, method: str = "GET") -> Got:
        headers = {"x-api-key": key} if key else {}
        async with self.http.request(method, self.url + path, headers=headers) as response:
            return Got(response.status, response.headers, await response.read())


def message(text: str = "Hello, Claude", *, stream: bool = False, model: str = MODEL, **fields: Any) -> dict[str, Any]:
    """The body of a message."""
    return {
        "model": model,
        "max_tokens": 1024,
        "messages": [{"role": "user", "content": text}],
        **({"stream": True} if stream else {}),
        **fields,
    }


@asynccontextmanager
async def a_world(
    *tenants: TenantSettings,
    limits: tuple[Limit, ...] = (),
    store: str = "memory://",
    clock: Clock | None = None,
    folder: Path | None = None,
    options: StoreOptions | None = None,
    billing: BillingSettings = BILLING,
    **settings: Any,
) -> AsyncIterator[World]:
    """All of it, while the context lasts; without tenants, whoever brings a key may call."""
    clock = clock or Clock()
    policy = Policy(limits=limits, tenants=[_limited(tenant) for tenant in tenants])
    options = options or StoreOptions(shards=2)
    journal = folder and folder / "journal"
    async with AsyncExitStack() as end:
        provider = await end.enter_async_context(Provider())
        usual = {"listen": "127.0.0.1:0", "base_path": BASE, "upstream": provider.url, "shutdown_ms": 0}
        told: dict[str, Any] = usual | settings
        configured = GatewaySettings(**told)
        environment = {"ANTHROPIC_API_KEY": PROVIDER_KEY, "OWN": OWN_KEY}
        callers = Callers(configured, tenants, environment, bytes(32), lambda: clock.now_ms / 1000)
        meter = AsyncMeter.connect(store, policy, options=options, clock=clock, journal=journal)
        counted = any(limit.unit == COST for limit in limits)
        gateway = Gateway(
            configured,
            callers,
            meter,
            closes_meter=True,
            spending=spending_of(billing, tenants, clock) if counted else None,
            now_s=lambda: clock.now_ms / 1000,
        )
        server = await end.enter_async_context(Server(gateway))
        http = await end.enter_async_context(aiohttp.ClientSession(auto_decompress=False))
        yield World(server, provider, clock, http)


def spending_of(billing: BillingSettings, tenants: Sequence[TenantSettings], clock: Clock) -> Spending:
    """What tells what calls cost, at the time that the test sets."""
    costs = CostTables(books_of(billing), TermsBook(billing, tenants).of, billing.budget_basis)
    return Spending(costs, billing.unpriced, now_ms=lambda: clock.now_ms)


def _limited(tenant: TenantSettings) -> Any:
    from meterlib import Tenant

    return Tenant(name=tenant.name, quotas=tenant.quotas, funding=tenant.funding)


def run(use: Callable[[World], Any], *tenants: TenantSettings, **settings: Any) -> Any:
    """What `use` makes of a world of these tenants and settings."""

    async def main() -> Any:
        async with a_world(*tenants, **settings) as world:
            async with asyncio.timeout(30):
                return await use(world)

    return asyncio.run(main())


def with_settings(tenant: TenantSettings, **changes: Any) -> TenantSettings:
    return replace(tenant, **changes)
