"""The meter of each test: three stores, two faces, one clock that a test sets."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from typing import Any, cast

import pytest
from fakeredis import FakeAsyncRedis, FakeRedis

from meterlib import AsyncMeter, AsyncReservation, LedgerEntry, LimitState, Meter, Policy, StoreOptions, Usage
from meterlib.testing import Clock
from tests.support.servers import Server

_prefixes = (f"fundamentals-{number}" for number in itertools.count())

Entries = Callable[[], list[LedgerEntry]]
States = Callable[..., dict[str, LimitState]]


@pytest.fixture
def clock() -> Clock:
    """The time of the meter, at 2026-09-21 14:13:20 UTC until a test moves it."""
    return Clock(1_790_000_000_000)


@pytest.fixture(scope="session")
def server(valkey: Server) -> Server:
    """A real Valkey, shared by all tests, each under keys of its own."""
    return valkey


@pytest.fixture(
    params=["memory", "memory-async", "fakeredis", "fakeredis-async", "valkey", "valkey-async"],
)
def meter(request: pytest.FixtureRequest, clock: Clock) -> Iterator[Meter]:
    """A meter with the file's POLICY; async ones are awaited behind the same methods."""
    policy: Policy = request.module.POLICY
    store, _, face = request.param.partition("-")
    options = StoreOptions(prefix=next(_prefixes))
    with ExitStack() as end:
        if face == "async":
            yield end.enter_context(_awaited(store, request, policy, options, clock))
        elif store == "fakeredis":
            client = end.enter_context(closing(FakeRedis()))
            yield end.enter_context(Meter(client, policy, options=options, clock=clock))
        else:
            yield end.enter_context(Meter.connect(_url(store, request), policy, options=options, clock=clock))


@pytest.fixture
def entries(meter: Meter) -> Entries:
    """The ledger: all entries there are by now."""
    return lambda: [entry for shard in range(meter.shards) for entry in meter.ledger(shard)]


@pytest.fixture
def states(meter: Meter) -> States:
    """How the limits of a tenant stand, by name."""
    return lambda tenant="acme", attributes=None: {s.name: s for s in meter.peek(tenant, attributes)}


def _url(store: str, request: pytest.FixtureRequest) -> str:
    if store == "memory":
        return "memory://"
    url: str = request.getfixturevalue("server").url
    return url


@contextmanager
def _awaited(
    store: str, request: pytest.FixtureRequest, policy: Policy, options: StoreOptions, clock: Clock
) -> Iterator[Meter]:
    with asyncio.Runner() as runner:
        client: Any = FakeAsyncRedis() if store == "fakeredis" else _url(store, request)
        meter = AsyncMeter(client, policy, options=options, clock=clock)
        yield cast(Meter, AwaitedMeter(meter, runner))
        runner.run(meter.aclose())
        if store == "fakeredis":
            runner.run(client.aclose())


class AwaitedMeter:
    """An AsyncMeter whose verbs wait for their result."""

    def __init__(self, meter: AsyncMeter, runner: asyncio.Runner) -> None:
        object.__setattr__(self, "_meter", meter)
        object.__setattr__(self, "_runner", runner)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._meter, name)
        if not callable(found):
            return found
        return lambda *arguments, **named: self._runner.run(_result_of(found, *arguments, **named))

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._meter, name, value)

    def reserve(self, *arguments: Any, **named: Any) -> AwaitedReservation:
        return AwaitedReservation(self._runner.run(self._meter.reserve(*arguments, **named)), self._runner)

    def ledger(self, shard: int, after: int = 0) -> Iterator[LedgerEntry]:
        async def all_of() -> list[LedgerEntry]:
            return [entry async for entry in self._meter.ledger(shard, after)]

        return iter(self._runner.run(all_of()))

    def reservation(
        self, tenant: str, attributes: Mapping[str, str] | None = None, usage: Usage | None = None, **named: Any
    ) -> AbstractContextManager[AwaitedReservation]:
        return self._block(self._meter.reservation(tenant, attributes, usage, **named))

    @contextmanager
    def _block(self, block: Any) -> Iterator[AwaitedReservation]:
        held = AwaitedReservation(self._runner.run(block.__aenter__()), self._runner)
        try:
            yield held
        except BaseException as error:
            if not self._runner.run(block.__aexit__(type(error), error, error.__traceback__)):
                raise
        else:
            self._runner.run(block.__aexit__(None, None, None))


class AwaitedReservation:
    """An AsyncReservation whose methods wait for their result."""

    def __init__(self, held: AsyncReservation, runner: asyncio.Runner) -> None:
        self._held = held
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._held, name)
        if name in ("settle", "revise", "renew", "cancel"):
            return lambda *arguments, **named: self._runner.run(found(*arguments, **named))
        return found


async def _result_of(verb: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    return await verb(*arguments, **named)
