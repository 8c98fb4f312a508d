"""How limits stand, and why one denied: what callers are told, read from a script's reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from meterlib.core.operations import LimitArguments, Reply
from meterlib.core.policy import BoundLimit
from meterlib.errors import QuotaExceeded


class LimitState(msgspec.Struct, frozen=True, kw_only=True):
    """How one limit stands for one partition.

    Attributes:
        name: the limit's name.
        unit: what it counts.
        quota: how much may count at any time.
        used: how much counts now, open holds included; above the quota there is debt.
        held: the part of `used` that reservations hold, until they are settled, cancelled, or swept after their lease.
        remaining: what is left, 0 in debt.
        frees_at_ms: when some of it is given back (ms since 1970 UTC); None when nothing is used.
        resets_at_ms: when all of it is, if nobody uses more; None when nothing is used.
        now_ms: the store's time at this state.
    """

    name: str
    unit: str
    quota: int
    used: int
    held: int
    remaining: int
    frees_at_ms: int | None
    resets_at_ms: int | None
    now_ms: int


class Denial(msgspec.Struct, frozen=True, kw_only=True):
    """Why one limit denied a call.

    Attributes:
        name: the limit's name.
        unit: what it counts.
        quota: how much may count at any time.
        used: how much counted, open holds included.
        requested: how much the call asked for.
        reason: `quota`: used up for now; `oversize`: more than the quota, so it will never fit.
        retry_after_ms: when this limit would let this very call pass, from then; None if never.
        hint: the time is a configured guess.
        period: the limit counts a calendar period, and not a window: a budget.
    """

    name: str
    unit: str
    quota: int
    used: int
    requested: int
    reason: Literal["quota", "oversize"]
    retry_after_ms: int | None
    hint: bool
    period: bool


def states_of(limits: Sequence[BoundLimit], reply: Reply, at: int) -> tuple[LimitState, ...]:
    """The states that a reply describes from position `at` on, four numbers each."""
    return tuple([_state(limit, reply, at + 4 * position) for position, limit in enumerate(limits)])


def _state(limit: BoundLimit, reply: Reply, at: int) -> LimitState:
    numbers: list[Any] = reply[at : at + 4]  # integers by the script's contract
    settled, held, frees_at_ms, resets_at_ms = numbers
    used = settled + held
    return LimitState(
        name=limit.name,
        unit=limit.unit,
        quota=limit.quota,
        used=used,
        held=held,
        remaining=limit.quota - used if used < limit.quota else 0,
        frees_at_ms=frees_at_ms or None,
        resets_at_ms=resets_at_ms or None,
        now_ms=reply[1],  # type: ignore[arg-type]
    )


def quota_exceeded(
    tenant: str, limits: Sequence[BoundLimit], arguments: Sequence[LimitArguments], reply: Reply
) -> QuotaExceeded:
    """The error that a denied reply amounts to: all denials, the one that frees last first, and all limits."""
    denials, states = [], []
    now_ms = int(reply[1])
    for position, (bound, argument) in enumerate(zip(limits, arguments, strict=True)):
        states.append(_state(bound, reply, 4 + 6 * position))
        verdict, passes_at_ms, settled, held = reply[2 + 6 * position : 6 + 6 * position]
        if verdict in (b"passes", "passes"):
            continue
        oversize = verdict in (b"oversize", "oversize")
        hint = bound.limit.open and not oversize
        wait_ms = bound.limit.retry_hint_ms if hint else max(1, int(passes_at_ms) - now_ms)
        denials.append(
            Denial(
                name=bound.limit.name,
                unit=bound.limit.unit,
                quota=bound.quota,
                used=int(settled) + int(held),
                requested=argument.amount,
                reason="oversize" if oversize else "quota",
                retry_after_ms=None if oversize else wait_ms,
                hint=hint,
                period=bound.limit.period is not None,
            )
        )
    denials.sort(key=lambda denial: (denial.retry_after_ms is not None, -(denial.retry_after_ms or 0)))
    retryable = all(denial.retry_after_ms is not None for denial in denials)
    return QuotaExceeded(
        tenant,
        tuple(denials),
        retry_after_ms=denials[0].retry_after_ms if retryable else None,
        retryable=retryable,
        hint=retryable and any(denial.hint for denial in denials),
        limits=tuple(states),
    )
