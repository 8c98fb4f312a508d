"""Meters whose store tells what reached it: nothing, where an argument is refused."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest

from meterlib import AsyncMeter, InvalidInput, Limit, Meter, Policy
from meterlib.store.keys import layout
from meterlib.testing import Clock

POLICY = Policy(
    limits=(
        Limit(name="requests", quota=50, window="1m", per=("provider",)),
        Limit(name="input_tokens", unit="input_tokens", quota=50_000, window="1m"),
        Limit(name="budget", unit="cost_nanousd", quota=10**12, period="month"),
        Limit(name="at_once", quota=4, open=True),
    )
)
HUGE = 10**4999
"""An integer of 5,000 digits: Python refuses to write it down."""


class Sent(Exception):
    """The store was asked for something: the arguments were accepted."""


class Wire:
    """A client of redis-py's shape that keeps what would be sent, and knows nothing but the store's layout."""

    def __init__(self, shards: int = 16) -> None:
        self.sent: list[tuple[Any, ...]] = []
        self._layout = layout(shards).encode()

    def execute_command(self, *words: Any, **options: Any) -> Any:
        self.sent.append(words)
        if words[0] == "GET":
            return self._layout
        raise Sent(words[0])

    @property
    def script_keys(self) -> list[bytes]:
        """The keys of the script that was to run."""
        words = self.sent[-1]
        assert words[0] == "EVALSHA"
        return [str(key).encode() for key in words[3 : 3 + int(words[2])]]


class AsyncWire(Wire):
    """The same for redis.asyncio."""

    async def execute_command(self, *words: Any, **options: Any) -> Any:
        return Wire.execute_command(self, *words, **options)

    async def aclose(self) -> None:
        """A client of redis.asyncio can be closed so."""


class Face:
    """A meter, sync or async, on a wire."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.wire = Wire() if kind == "sync" else AsyncWire()
        meter = Meter if kind == "sync" else AsyncMeter
        self.meter: Meter | AsyncMeter = meter(self.wire, POLICY, clock=Clock())

    def call(self, verb: str, *arguments: Any, **named: Any) -> Any:
        """Do what a verb says, awaited where it is to be."""
        result = getattr(self.meter, verb)(*arguments, **named)
        if inspect.iscoroutine(result):
            return asyncio.run(result)
        if inspect.isasyncgen(result):
            return asyncio.run(_all_of(result))
        return list(result) if inspect.isgenerator(result) else result

    def refusal(self, verb: str, *arguments: Any, **named: Any) -> InvalidInput:
        """The error of a verb that refuses its arguments, having sent nothing."""
        with pytest.raises(InvalidInput) as refused:
            self.call(verb, *arguments, **named)
        assert [] == self.wire.sent
        return refused.value

    def accepts(self, verb: str, *arguments: Any, **named: Any) -> bool:
        """Whether a verb asks the store; anything but InvalidInput is passed on."""
        try:
            self.call(verb, *arguments, **named)
        except Sent:
            return True
        except InvalidInput:
            assert [] == self.wire.sent
            return False
        raise AssertionError(f"{verb} neither asked the store nor refused")


async def _all_of(entries: Any) -> list[Any]:
    return [entry async for entry in entries]
