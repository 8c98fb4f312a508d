"""One run of the demo from its first call to its report."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec
from rich.console import Console

from meterlib import AsyncMeter, LedgerEntry, Policy
from meterlib.demo import INTERRUPTED
from meterlib.demo.audit import Audit, audit, entries_of, ledger_ends
from meterlib.demo.callers import CALLERS, MINUTE, PRESET, PROVIDER, demo_policy
from meterlib.demo.provider import Provider
from meterlib.demo.screen import (
    HEIGHT_MIN,
    WIDTH_MIN,
    LiveScreen,
    PlainScreen,
    Screen,
    SilentScreen,
    print_audit,
    print_report,
    print_totals,
    print_whereabouts,
)
from meterlib.demo.traffic import Traffic

PICTURES_PER_S = 10
CONFIGURATION = "demo.toml"


class Outcome(NamedTuple):
    """What is left when a run is over."""

    traffic: Traffic
    entries: list[LedgerEntry]
    audit: Audit
    interrupted: bool


def play(*, seconds: float, seed: int, json_output: bool, data: Path, no_color: bool) -> int:
    """Run the demo and print its outcome; see `meterlib.demo.run`."""
    console = Console(no_color=no_color or None, highlight=False)
    screen = SilentScreen() if json_output else _screen(console, seconds, no_color)
    policy = demo_policy()
    outcome = asyncio.run(_play(seconds, seed, data, policy, screen))
    if json_output:
        print(json.dumps(_document(outcome, seconds, seed, data), indent=2))
    else:
        console.print()
        print_totals(console, outcome.traffic)
        print_report(console, outcome.entries)
        print_audit(console, outcome.audit)
        print_whereabouts(console, _seen_from_here(data), _seen_from_here(data / CONFIGURATION))
    return INTERRUPTED if outcome.interrupted else 0 if outcome.audit.agrees else 1


def _screen(console: Console, seconds: float, no_color: bool) -> Screen:
    fits = console.width >= WIDTH_MIN and console.height >= HEIGHT_MIN
    speaks = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")
    plain = no_color or console.no_color or not (fits and speaks)
    return PlainScreen(console) if plain else LiveScreen(console, seconds)


async def _play(seconds: float, seed: int, data: Path, policy: Policy, screen: Screen) -> Outcome:
    async with Provider(seed) as provider, AsyncMeter.connect(_url(data), policy) as meter:
        before = await ledger_ends(meter)
        (data / CONFIGURATION).write_text(as_toml(data, policy))
        traffic = Traffic(meter, provider.url, seed)
        with _ending(traffic, seconds) as interrupted, screen:
            watching = asyncio.create_task(_watch(meter, traffic, screen))
            try:
                await traffic.run()
            finally:
                watching.cancel()
                with suppress(asyncio.CancelledError):
                    await watching
            screen.show(traffic, await _states(meter))
        entries = await entries_of(meter, before, traffic.reservation_ids)
        return Outcome(traffic, entries, audit(entries, provider.served, traffic.reservation_ids), interrupted.is_set())


@contextmanager
def _ending(traffic: Traffic, seconds: float) -> Iterator[asyncio.Event]:
    """No new call is made after so many seconds, or when somebody interrupts; the event tells that somebody did."""
    interrupted = asyncio.Event()

    def interrupt() -> None:
        interrupted.set()
        traffic.stop()

    loop = asyncio.get_running_loop()
    timer = loop.call_later(seconds, traffic.stop)
    with suppress(ValueError, RuntimeError):  # only the main thread hears of signals
        loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        yield interrupted
    finally:
        timer.cancel()
        with suppress(ValueError, RuntimeError):
            loop.remove_signal_handler(signal.SIGINT)


async def _watch(meter: AsyncMeter, traffic: Traffic, screen: Screen) -> None:
    while True:
        states = await _states(meter)
        try:
            screen.show(traffic, states)
        except (SystemExit, OSError):  # rich wants to exit when nobody reads its output any more
            traffic.stop()
            return
        await asyncio.sleep(1 / PICTURES_PER_S)


async def _states(meter: AsyncMeter) -> dict[str, Any]:
    tenants = [caller.tenant for caller in CALLERS]
    states = await asyncio.gather(*(meter.peek(tenant, PROVIDER) for tenant in tenants))
    return dict(zip(tenants, states, strict=True))


def _seen_from_here(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _url(data: Path) -> str:
    return f"embedded://{quote(str(data))}"


def _document(outcome: Outcome, seconds: float, seed: int, data: Path) -> dict[str, Any]:
    """The outcome for a program to read."""
    return {
        "seconds": seconds,
        "seed": seed,
        "preset": PRESET,
        "minute": MINUTE,
        "interrupted": outcome.interrupted,
        "tenants": {name: msgspec.to_builtins(tally) for name, tally in outcome.traffic.tallies.items()},
        "total": msgspec.to_builtins(outcome.traffic.total),
        "audit": {"agrees": outcome.audit.agrees, **msgspec.to_builtins(outcome.audit)},
        "ledger": {"folder": str(data), "url": _url(data), "config": str(data / CONFIGURATION)},
    }


def as_toml(data: Path, policy: Policy) -> str:
    """A `meterlib.toml` with which every other command finds the demo's store and limits."""
    parts = ["# Written by `meterlib demo`.", "[store]", f"url = {json.dumps(_url(data))}"]
    for name, records in (("limit", policy.limits), ("tenant", policy.tenants)):
        for record in records:
            fields: dict[str, Any] = msgspec.to_builtins(record)
            parts += ["", f"[[{name}]]", *(f"{key} = {_toml_value(value)}" for key, value in fields.items())]
    return "\n".join(parts) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml_value(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)  # texts, whole numbers, booleans and lists of them are the same in TOML
