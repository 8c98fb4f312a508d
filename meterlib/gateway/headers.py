"""Which headers cross the gateway, in either direction, and what its own say of a caller's limits. Pure.

Headers are pairs of a lower-case name and a value, in the order in which they came.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache

from meterlib.core.checks import check_attributes
from meterlib.core.decisions import LimitState
from meterlib.core.policy import Limit, duration_ms
from meterlib.errors import InvalidInput

Headers = Sequence[tuple[str, str]]

VERSION = "2023-06-01"
"""What the Claude API is asked for where a client names no version."""

_REQUEST = {"accept", "content-type", "content-encoding", "user-agent", "x-app"}
_REQUEST_PREFIXES = ("anthropic-", "x-stainless-")
_ANSWER = {
    "cache-control",
    "content-encoding",
    "content-length",
    "content-type",
    "date",
    "request-id",
    "retry-after",
    "retry-after-ms",
    "x-should-retry",
}
_ANSWER_PREFIXES = ("anthropic-",)
_LIMITS = ("anthropic-ratelimit-", "anthropic-priority-", "anthropic-fast-", "ratelimit")
_ACCOUNT = ("anthropic-organization-id", "anthropic-workspace-id")
_INTEGER_MAX = 999_999_999_999_999
"""Integers of structured fields (RFC 9651) have at most 15 digits."""
_FAMILIES = {"requests": "requests", "input_tokens": "input-tokens", "output_tokens": "output-tokens"}


def values_of(headers: Headers, name: str) -> list[str]:
    """All values of a header."""
    return [value for header, value in headers if header == name]


def value_of(headers: Headers, name: str) -> str | None:
    """The value of a header, the first if there are several; None if there is none."""
    for header, value in headers:
        if header == name:
            return value
    return None


def for_upstream(
    headers: Headers, credential: tuple[str, str], betas: Sequence[str] | None
) -> tuple[list[tuple[str, str]], list[str]]:
    """The headers that a request goes on with, and the values of `anthropic-beta` that were dropped.

    Only what means something to the provider passes; credentials are replaced, and the answer is asked for as it is,
    not compressed.
    """
    hops = _hops(headers)
    passed = [(name, value) for name, value in headers if _goes_on(name) and name not in hops and _is_plain(value)]
    dropped: list[str] = []
    if betas is not None:
        passed, dropped = _with_betas(passed, betas)
    if not any(name == "anthropic-version" for name, _ in passed):
        passed.append(("anthropic-version", VERSION))
    return [*passed, credential, ("accept-encoding", "identity")], dropped


def for_client(
    headers: Iterable[tuple[str, str]], *, keep_limits: bool, keep_account: bool = True
) -> list[tuple[str, str]]:
    """The headers that an answer goes on with.

    What the provider says of its limits, and of the account that it bills, only goes to those whose they are.
    """
    headers = list(headers)
    hops = _hops(headers)
    return [
        (name, value)
        for name, value in headers
        if _goes_back(name, keep_limits, keep_account)
        and name not in hops
        and _is_plain(value)
        # If it cannot be noted in the ledger, the client is told another, so that both have the same.
        and (name != "request-id" or is_fact("request_id", value))
    ]


@lru_cache(maxsize=256)
def _goes_back(name: str, keep_limits: bool, keep_account: bool) -> bool:
    kept_back = (() if keep_limits else _LIMITS) + (() if keep_account else _ACCOUNT)
    return (name in _ANSWER or name.startswith(_ANSWER_PREFIXES)) and not name.startswith(kept_back)


def without(headers: Headers, *names: str) -> list[tuple[str, str]]:
    """The headers but for these."""
    return [(name, value) for name, value in headers if name not in names]


@lru_cache(maxsize=256)
def _goes_on(name: str) -> bool:
    return name in _REQUEST or name.startswith(_REQUEST_PREFIXES)


def _hops(headers: Headers) -> Collection[str]:
    """What `connection` keeps to this connection."""
    told = value_of(headers, "connection")
    if told is None:
        return ()
    return {word.strip().lower() for value in values_of(headers, "connection") for word in value.split(",")}


@lru_cache(maxsize=64)
def is_fact(name: str, value: str) -> bool:
    """Whether something that was told can be noted in the ledger; asked twice in each call, of the same value."""
    try:
        check_attributes({name: value})
    except InvalidInput:
        return False
    return True


def _is_plain(value: str) -> bool:
    return value.isascii() and (value.isprintable() or value.replace("\t", " ").isprintable())


def _with_betas(headers: Headers, allowed: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    kept, dropped = [], []
    for name, value in headers:
        if name == "anthropic-beta":
            betas = [beta.strip() for beta in value.split(",") if beta.strip()]
            dropped += [beta for beta in betas if beta not in allowed]
            value = ",".join(beta for beta in betas if beta in allowed)
        if value:
            kept.append((name, value))
    return kept, dropped


# ── What a caller is told of its limits ───────────────────────────────────────────────────────────────────────────────


def of_limits(states: Sequence[LimitState], limits: Mapping[str, Limit]) -> list[tuple[str, str]]:
    """The limits a call touched, as the Claude API tells them and as the IETF's draft (RateLimit, -11) does.

    Where several limits count the same unit, the API's headers tell the one with the least left. A reset is the time at
    which all of a quota is there again if nobody uses more.
    """
    told: list[tuple[str, str]] = []
    tightest: dict[str, LimitState] = {}
    for state in states:
        limit = limits.get(state.name)
        family = None if limit is None or limit.open else _FAMILIES.get(state.unit)
        if family and (family not in tightest or state.remaining < tightest[family].remaining):
            tightest[family] = state
    for family, state in tightest.items():
        told += _family(family, state.quota, state.remaining, _reset_ms(state))
    told += _tokens(states, tightest)
    if states:
        told.append(("ratelimit-policy", ", ".join([_policy(state, limits.get(state.name)) for state in states])))
        told.append(("ratelimit", ", ".join([_rate(state) for state in states])))
    return told


def _family(family: str, quota: int, remaining: int, reset_ms: int) -> list[tuple[str, str]]:
    start = f"anthropic-ratelimit-{family}"
    reset = _moment(-(-reset_ms // 1000))
    return [(f"{start}-limit", str(quota)), (f"{start}-remaining", str(remaining)), (f"{start}-reset", reset)]


@lru_cache(maxsize=1024)
def _moment(seconds: int) -> str:
    """RFC 3339, in UTC; the calls of a busy second share one."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _tokens(states: Sequence[LimitState], tightest: Mapping[str, LimitState]) -> list[tuple[str, str]]:
    """`tokens`: the limit over all tokens; without one, those over input and output together."""
    total = [state for state in states if state.unit == "total_tokens"]
    if total:
        least = min(total, key=lambda state: state.remaining)
        return _family("tokens", least.quota, least.remaining, _reset_ms(least))
    parts = [tightest[family] for family in ("input-tokens", "output-tokens") if family in tightest]
    if not parts:
        return []
    reset_ms = max(_reset_ms(state) for state in parts)
    return _family("tokens", sum(s.quota for s in parts), sum(s.remaining for s in parts), reset_ms)


def _reset_ms(state: LimitState) -> int:
    return state.resets_at_ms or state.now_ms


def _policy(state: LimitState, limit: Limit | None) -> str:
    is_open, window = (limit.open, limit.window) if limit else (False, None)
    return _policy_words(state.name, state.quota, state.unit, is_open, window)


@lru_cache(maxsize=1024)
def _policy_words(name: str, quota: int, unit: str, is_open: bool, window: str | None) -> str:
    words = f'"{name}";q={min(quota, _INTEGER_MAX)}'
    if is_open:
        return f'{words};qu="concurrent-requests"'
    if window:
        words += f";w={math.ceil(duration_ms(window) / 1000)}"
    return words if unit == "requests" else f'{words};meterlib-unit="{unit}"'


def _rate(state: LimitState) -> str:
    words = f'"{state.name}";r={min(state.remaining, _INTEGER_MAX)}'
    if state.frees_at_ms is None:
        return words
    return f"{words};t={max(0, -((state.now_ms - state.frees_at_ms) // 1000))}"
