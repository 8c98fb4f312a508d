"""The gateway's own answers, in the Claude API's shape: what it refuses, and why."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from random import Random

import msgspec

from meterlib.core.decisions import Denial
from meterlib.core.policy import Limit
from meterlib.errors import QuotaExceeded
from meterlib.gateway.headers import Headers

RETRY_AFTER_S_MAX = 60
"""Claude Code gives up at 61, and old SDKs come back at once."""

RESOLUTION_S = 1
"""So much longer than a minute may a window of a minute take, since it forgets in steps. Who then comes back too early
is told to wait for a second more, which is better than to be given up."""

_JITTER = 0.2
_random = Random()  # only spreads retries; nothing depends on it being hard to guess
_SPANS = {"hour": "this hour", "day": "today", "week": "this week", "month": "this month"}


class Refusal(Exception):
    """A request that the gateway answers itself.

    Attributes:
        status: of the answer.
        type: the kind of error, in the Claude API's words.
        headers: further headers of the answer.
        error_code: for programs, where the API has one.
    """

    def __init__(
        self, status: int, kind: str, message: str, headers: Headers = (), *, error_code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = kind
        self.headers = list(headers)
        self.error_code = error_code

    def body(self, request_id: str) -> bytes:
        """The answer's body."""
        error: dict[str, object] = {"type": self.type, "message": str(self)}
        if self.error_code:
            error["details"] = {"error_code": self.error_code}
        return msgspec.json.encode({"type": "error", "error": error, "request_id": request_id})


def new_request_id() -> str:
    """An id in the provider's shape, for answers that it has not given."""
    return f"req_{secrets.token_hex(12)}"


def denied(error: QuotaExceeded, limits: Mapping[str, Limit], random: Random = _random) -> Refusal:
    """The answer to a call that a limit denied.

    A window's denial says when to come back, in at most a minute, and a little later than that for some, so that not
    all come back in the same instant. Where waiting is in vain, or takes longer, clients are told not to try again by
    themselves: they would sleep for hours.
    """
    first = error.denials[0]
    what = _told(first, limits.get(first.name))
    if not error.retryable:
        message = f"{first.name}: this call asks for {first.requested:,} of at most {what}, so it can never be admitted"
        return Refusal(429, "rate_limit_error", message, [("x-should-retry", "false")])
    wait_ms = error.retry_after_ms or 1
    wait_s = max(1, math.ceil(wait_ms / 1000))
    if first.period:
        until = datetime.fromtimestamp((error.limits[0].now_ms + wait_ms) / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        message = f"{first.name}: the budget of {what} is used up ({first.used:,} are used); it is renewed at {until}"
        headers = [("x-should-retry", "false"), ("retry-after", str(wait_s))]
        return Refusal(429, "billing_error", message, headers, error_code="budget_exhausted")
    message = f"{first.name}: this call would exceed {what}; {first.used:,} are used, {first.requested:,} asked for"
    if wait_s > RETRY_AFTER_S_MAX + RESOLUTION_S:
        headers = [("x-should-retry", "false"), ("retry-after", str(wait_s))]
        return Refusal(429, "rate_limit_error", f"{message}; it passes in {wait_s:,} s", headers)
    wait_s = min(RETRY_AFTER_S_MAX, wait_s + random.randint(0, int(wait_s * _JITTER)))
    return Refusal(429, "rate_limit_error", f"{message}; try again in {wait_s} s", [("retry-after", str(wait_s))])


def _told(denial: Denial, limit: Limit | None) -> str:
    """The quota and its span: `50 requests in any 1m`."""
    what = f"{denial.quota:,} {denial.unit.replace('_', ' ')}"
    if limit is None:
        return what  # a reload took it away meanwhile
    if limit.period:
        return f"{what} for {_SPANS[limit.period]} ({limit.tz})"
    return f"{what} at the same time" if limit.open else f"{what} in any {limit.window}"


def store_down() -> Refusal:
    """The answer while nothing can be decided; clients come back by themselves."""
    headers = [("retry-after", str(_random.randint(1, 3)))]
    return Refusal(503, "api_error", "the gateway cannot decide about limits just now; try again", headers)


def filtered_models(body: bytes, may_use: Callable[[str], bool]) -> bytes:
    """The provider's list of models, with only those left that a caller may use.

    Where there are further pages, the ids that lead there stay the provider's: an empty page has none of its own.
    """
    try:
        told = msgspec.json.decode(body, type=dict[str, object])
    except msgspec.DecodeError:
        raise Refusal(502, "api_error", "the provider's list of models cannot be read") from None
    listed = told.get("data")
    models = [model for model in listed if may_use(str(_id_of(model)))] if isinstance(listed, list) else []
    ids = [_id_of(model) for model in models] or [None]
    ends = {} if told.get("has_more") else {"first_id": ids[0], "last_id": ids[-1]}
    return msgspec.json.encode(told | {"data": models} | ends)


def _id_of(model: object) -> object:
    return model.get("id") if isinstance(model, dict) else None
