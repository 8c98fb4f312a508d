"""The words that both sides of a reconciliation are told in: groups, buckets, and what is counted in them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from decimal import Decimal
from typing import NamedTuple, TypeAlias

from meterlib.core.money import plus

MEASURES = ("input", "cache_write_5m", "cache_write_1h", "cache_read", "output", "web_search")
"""What usage reports count, by the names that rated rows have for it."""
Counts: TypeAlias = tuple[int, ...]
"""A number for each of `MEASURES`."""
NOTHING: Counts = (0,) * len(MEASURES)


_DATED = re.compile(r"[-@](?:[0-9]{8}|latest)$")


class Group(NamedTuple):
    """What rows are told apart by; empty where a report does not tell it (or tells of no model, workspace or key)."""

    model: str = ""
    tier: str = ""
    speed: str = ""
    geo: str = ""
    workspace: str = ""
    key: str = ""


class Cell(NamedTuple):
    """A group's usage between two moments, in ms since 1970 UTC, the second one excluded."""

    start_ms: int
    end_ms: int
    group: Group


class CostCell(NamedTuple):
    """What a group cost between two moments; `kind` is a kind of token or request, `tokens`, or empty for all."""

    start_ms: int
    end_ms: int
    group: Group
    kind: str


class Cost(NamedTuple):
    """Cents. `amount` is what is invoiced, before credits; `listed` the same at list price, where that is told."""

    amount: Decimal
    listed: Decimal | None


def moment_text(ms: int) -> str:
    """A moment as the provider writes it."""
    moment = datetime.fromtimestamp(ms // 1000, UTC).replace(microsecond=ms % 1000 * 1000)
    return moment.isoformat(timespec="milliseconds" if ms % 1000 else "seconds").replace("+00:00", "Z")


def base_model(name: str) -> str:
    """A model's name without its date: calls may name it by either, and the provider by the other."""
    return _DATED.sub("", name)


def only(group: Group, by: Iterable[str]) -> Group:
    """The group with nothing but these fields."""
    return Group(**{name: getattr(group, name) for name in by})


def added(one: Iterable[int], other: Iterable[int]) -> Counts:
    """The sum."""
    return tuple(a + b for a, b in zip(one, other, strict=True))


def both(one: Cost | None, other: Cost) -> Cost:
    """Two costs together."""
    if one is None:
        return other
    listed = None if one.listed is None or other.listed is None else plus(one.listed, other.listed)
    return Cost(plus(one.amount, other.amount), listed)
