"""The gateway's own answers, in the Claude API's shape: what it refuses, and why."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from random import Random

import msgspec

from meterlib.core.decisions import Denial, LimitState
from meterlib.core.policy import Limit
from meterlib.core.usd import COST, usd
from meterlib.errors import QuotaExceeded
from meterlib.gateway.headers import Headers

RETRY_AFTER_S_MAX = 60
"""Claude Code gives up at 61, and old SDKs come back at once."""

RESOLUTION_S = 1
"""So much longer than a minute may a window of a minute take, since it forgets in steps. Who then comes back too early
is told to wait for a second more, which is better than to be given up."""

HELD_RETRY_S = 5
"""When to come back to a budget of which calls under way hold the rest: nobody knows when they end, and how."""

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
        limit: the limit that denied the call, if one did.
    """

    limit = ""

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
    themselves: they would sleep for hours. A budget whose rest is only held, by calls under way, is not used up.
    """
    states = {state.name: state for state in error.limits}
    waits = [(_wait_s(denial, states.get(denial.name)), denial) for denial in error.denials]
    wait_s, told = max(waits, key=lambda wait: math.inf if wait[0] is None else wait[0])
    held = _is_only_held(told, states.get(told.name))
    refusal = _denied(told, _told(told, limits.get(told.name)), wait_s, held, error.limits[0].now_ms, random)
    refusal.limit = told.name
    return refusal


def _denied(told: Denial, what: str, wait_s: int | None, held: bool, now_ms: int, random: Random) -> Refusal:
    asked, used = _amount(told, told.requested), _amount(told, told.used)
    if wait_s is None:
        message = f"{told.name}: this call asks for {asked} of at most {what}, so it can never be admitted"
        return Refusal(429, "rate_limit_error", message, [("x-should-retry", "false")])
    long = [("x-should-retry", "false"), ("retry-after", str(wait_s))]
    if told.period and not held:
        until = _moment(now_ms + (told.retry_after_ms or 0))
        message = f"{told.name}: the budget of {what} is used up ({used} are used, {asked} asked for)"
        message += f"; it is renewed at {until}"
        return Refusal(429, "billing_error", message, long, error_code="budget_exhausted")
    message = f"{told.name}: this call would exceed {what}; {used} are used, {asked} asked for"
    if held:
        message = f"{told.name}: calls under way hold the rest of {what}; {used} are used or held, {asked} asked for"
    if wait_s > RETRY_AFTER_S_MAX + RESOLUTION_S:
        return Refusal(429, "rate_limit_error", f"{message}; it passes in {wait_s:,} s", long)
    wait_s = min(RETRY_AFTER_S_MAX, wait_s + random.randint(0, int(wait_s * _JITTER)))
    return Refusal(429, "rate_limit_error", f"{message}; try again in {wait_s} s", [("retry-after", str(wait_s))])


def _wait_s(denial: Denial, state: LimitState | None) -> int | None:
    """How long to wait for one limit; None if that is in vain."""
    if denial.retry_after_ms is None:
        return None
    if _is_only_held(denial, state):
        return HELD_RETRY_S
    return max(1, math.ceil(denial.retry_after_ms / 1000))


def _is_only_held(denial: Denial, state: LimitState | None) -> bool:
    """Whether a budget would let the call pass if the calls under way used nothing."""
    held = state.held if denial.period and state else 0
    return held > 0 and denial.used - held + denial.requested <= denial.quota


def _moment(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _amount(denial: Denial, number: int) -> str:
    return usd(number) if denial.unit == COST else f"{number:,}"


def _told(denial: Denial, limit: Limit | None) -> str:
    """The quota and its span: `50 requests in any 1m`."""
    what = usd(denial.quota) if denial.unit == COST else f"{denial.quota:,} {denial.unit.replace('_', ' ')}"
    if limit is None:
        return what  # a reload took it away meanwhile
    if limit.period:
        return f"{what} for {_SPANS[limit.period]} ({limit.tz})"
    return f"{what} at the same time" if limit.open else f"{what} in any {limit.window}"


def unpriced(budget: str, model: str) -> Refusal:
    """The answer to a call that a budget in US dollars cannot count."""
    message = (
        f"{budget}: model {model!r:.80} has no price here, so the budget in US dollars cannot count it; whoever runs"
        " the gateway can add a price ([billing] book) or let such calls pass uncounted ([billing] unpriced = 'allow')"
    )
    return Refusal(400, "invalid_request_error", message, error_code="model_unpriced")


def store_down(budget: str | None = None) -> Refusal:
    """The answer while nothing can be decided, about a budget or about rates; clients come back by themselves."""
    headers = [("retry-after", str(_random.randint(1, 3)))]
    if budget:
        message = f"{budget}: the budget is unavailable just now; try again"
        return Refusal(429, "billing_error", message, headers, error_code="budget_unavailable")
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
