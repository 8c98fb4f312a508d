"""`meterlib limits TENANT`: how every limit of a tenant stands."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import msgspec

from meterlib.cli.exits import OK
from meterlib.cli.options import add_config, add_json, pair
from meterlib.cli.store import Store, opened
from meterlib.cli.tables import Column, print_table
from meterlib.cli.times import in_text, local_text, terminal_width
from meterlib.config import Config
from meterlib.core.checks import check_attributes, check_tenant
from meterlib.core.decisions import LimitState
from meterlib.core.policy import Limit
from meterlib.core.usd import COST, usd
from meterlib.errors import InvalidInput

HELP = """\
Show how every limit of a tenant stands: its quota, how much counts now (used),
the part of that which open reservations hold (held), what remains, when some of
it is given back, and when all of it is if nobody uses more. Changes nothing.

A limit has a quota of its own for each combination of the attributes it is `per`;
all that the store knows at this moment are shown. With --attribute, the limits
that such a call would touch are shown instead. Limits over cost_nanousd are shown
in US dollars; with --json, all numbers are whole ones of the limit's unit.
---
examples:
  meterlib limits acme
  meterlib limits acme --attribute provider=anthropic --attribute model=claude-sonnet-4-5
  meterlib limits acme --json | jq '.limits[] | select(.remaining == 0)'

exit codes: 0 ok; 1 the store failed; 2 wrong usage or configuration
"""


class Line(msgspec.Struct, frozen=True):
    """One limit and one partition of it; None for any partition that nothing counts in now."""

    partition: Mapping[str, str] | None
    state: LimitState


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `meterlib limits`."""
    parser.add_argument("tenant", metavar="TENANT", help="whose limits")
    parser.add_argument(
        "--attribute",
        action="append",
        type=pair,
        default=[],
        metavar="name=value",
        help="the limits that a call with this attribute touches; may be repeated",
    )
    add_json(parser)
    add_config(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print how limits stand; returns the exit code."""
    tenant = check_tenant(arguments.tenant)
    attributes = dict(arguments.attribute)
    if len(attributes) < len(arguments.attribute):
        raise InvalidInput("--attribute", "one name is given two values")
    check_attributes(attributes)
    config = Config.find(arguments.config)
    with opened(config, arguments.config) as store:
        lines = _asked(store, tenant, attributes) if attributes else _known(store, config, tenant)
    if arguments.json:
        _print_json(config, tenant, lines)
    else:
        _print_table(config, tenant, lines)
    _print_hints(config, tenant, lines, attributes)
    return OK


def _asked(store: Store, tenant: str, attributes: Mapping[str, str]) -> list[Line]:
    per = {limit.name: limit.per for limit in store.context.policy.limits}
    states = store.peek(tenant, attributes)
    return [Line({name: attributes[name] for name in per[state.name] if name in attributes}, state) for state in states]


def _known(store: Store, config: Config, tenant: str) -> list[Line]:
    """Every partition that the store knows, in the policy's order; a limit without any has one line all the same."""
    found = store.partitions(tenant)
    lines: list[Line] = []
    for limit in config.policy.limits:
        own = [Line(partition.attributes, partition.state) for partition in found if partition.state.name == limit.name]
        lines += own or [Line(None, _untouched(config, tenant, limit))]
    return lines


def _untouched(config: Config, tenant: str, limit: Limit) -> LimitState:
    quotas = [settings.quotas for settings in config.tenant if settings.name == tenant]
    quota = quotas[0].get(limit.name, limit.quota) if quotas else limit.quota
    return LimitState(
        name=limit.name,
        unit=limit.unit,
        quota=quota,
        used=0,
        held=0,
        remaining=quota,
        frees_at_ms=None,
        resets_at_ms=None,
        now_ms=time.time_ns() // 1_000_000,
    )


def _print_json(config: Config, tenant: str, lines: Sequence[Line]) -> None:
    limits = [{"partition": line.partition} | msgspec.to_builtins(line.state) | _waits(line.state) for line in lines]
    print(json.dumps({"tenant": tenant, "funding": _funding(config, tenant), "limits": limits}, indent=2))


def _waits(state: LimitState) -> dict[str, int | None]:
    times = {"frees_in_ms": state.frees_at_ms, "resets_in_ms": state.resets_at_ms}
    return {name: None if at_ms is None else max(0, at_ms - state.now_ms) for name, at_ms in times.items()}


def _funding(config: Config, tenant: str) -> str:
    return next((settings.funding for settings in config.tenant if settings.name == tenant), "hosted")


def _print_table(config: Config, tenant: str, lines: Sequence[Line]) -> None:
    print(f"limits of {tenant} ({_funding(config, tenant)})")
    if not lines:
        return
    print()
    keys = [Column("limit", key=True), Column("partition", key=True)]
    numbers = [Column(heading, number=True) for heading in ("quota", "used", "held", "remaining")]
    print_table([*keys, *numbers, Column("next frees"), Column("all free")], [_cells(line) for line in lines])
    for note in _notes(config, lines):
        print()
        print(textwrap.fill(note, terminal_width()))


def _cells(line: Line) -> list[str]:
    state = line.state
    in_dollars = state.unit == COST
    unit = "USD" if in_dollars else state.unit
    name = state.name if unit in ("requests", state.name) else f"{state.name} ({unit})"
    partition = "any" if line.partition is None else ", ".join(f"{k}={v}" for k, v in line.partition.items()) or "all"
    counts = (state.quota, state.used, state.held, state.remaining)
    numbers = [usd(count) if in_dollars else f"{count:,}" for count in counts]
    frees = "all then" if state.frees_at_ms == state.resets_at_ms else _when(state.frees_at_ms, state.now_ms)
    resets = _when(state.resets_at_ms, state.now_ms)
    return [name, partition, *numbers, "-" if resets == "-" else frees, resets]


def _when(at_ms: int | None, now_ms: int) -> str:
    return "-" if at_ms is None else f"{in_text(at_ms - now_ms)} ({local_text(at_ms, now_ms)})"


def _notes(config: Config, lines: Sequence[Line]) -> list[str]:
    opens = {limit.name for limit in config.policy.limits if limit.open}
    notes = []
    if any(line.state.used > line.state.quota for line in lines):
        notes.append("Used above the quota is debt: calls are denied until it has slid out.")
    if any(line.state.name in opens and line.state.used for line in lines):
        notes.append("Open reservations free when their calls end; the times shown are the ends of their leases.")
    return notes


def _print_hints(config: Config, tenant: str, lines: Sequence[Line], attributes: Mapping[str, Any]) -> None:
    if not config.policy.limits:
        print("meterlib: no limits are configured; see --config", file=sys.stderr)
    elif attributes and not lines:
        print("meterlib: no limit applies to a call with these attributes", file=sys.stderr)
    names = [settings.name for settings in config.tenant]
    if not attributes and tenant not in names and all(line.partition is None for line in lines):
        close = get_close_matches(tenant, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        print(
            f"meterlib: nothing of tenant {tenant!r} counts now, and the settings do not list it{hint}", file=sys.stderr
        )
