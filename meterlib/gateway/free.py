"""What costs nothing: counting tokens has a pace of its own, and the list of models shows what a caller may use."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable
from urllib.parse import parse_qsl, urlencode

import msgspec

from meterlib.gateway.answers import RETRY_AFTER_S_MAX, Refusal
from meterlib.gateway.call import Outgoing
from meterlib.gateway.upstream import Answer, NoAnswer, NotSent, Upstream

MODELS_BYTES_MAX = 4 << 20
MODELS_PAGES_MAX = 20
_TENANTS_MAX = 10_000
_SPAN_S = 60


class Pace:
    """How often each tenant has done something in the last minute, in this process.

    It guards the provider from floods of what is not billed; what is billed is limited by the store.
    """

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._done: OrderedDict[str, deque[float]] = OrderedDict()

    def check(self, tenant: str, quota: int) -> None:
        """Count one more of `count_tokens`, of at most `quota` a minute.

        Raises:
            Refusal: it would be too many.
        """
        now_s = self._now_s()
        done = self._done.setdefault(tenant, deque())
        self._done.move_to_end(tenant)
        if len(self._done) > _TENANTS_MAX:
            self._done.popitem(last=False)
        while done and done[0] <= now_s - _SPAN_S:
            done.popleft()
        message = f"this call would exceed {quota:,} calls of count_tokens per minute"
        if not quota:
            raise Refusal(429, "rate_limit_error", message, [("x-should-retry", "false")])
        if len(done) >= quota:
            wait_s = min(RETRY_AFTER_S_MAX, max(1, math.ceil(done[0] + _SPAN_S - now_s)))
            raise Refusal(429, "rate_limit_error", message, [("retry-after", str(wait_s))])
        done.append(now_s)


def query_behind(query: str, page: bytes) -> str | None:
    """The query of the page behind a filtered one that has nothing left; None if it is not needed, or there is none.

    Clients take an empty page for the last one, whatever it says of more.
    """
    told = msgspec.json.decode(page, type=dict[str, object])
    if told.get("data") or not told.get("has_more"):
        return None
    asked = parse_qsl(query, keep_blank_values=True)
    name, place = ("before_id", "first_id") if "before_id" in dict(asked) else ("after_id", "last_id")
    at = told.get(place)
    others = [(key, value) for key, value in asked if key not in ("before_id", "after_id")]
    return urlencode([*others, (name, at)]) if isinstance(at, str) else None


async def whole_answer(upstream: Upstream, request: Outgoing) -> tuple[Answer, bytes]:
    """What the provider answers, if that is no more than a list of models can have.

    Raises:
        Refusal: there is no such answer.
    """
    try:
        answer = await upstream.send(*request)
        try:
            body = await _read(answer)
        finally:
            answer.close()
    except NotSent:
        raise Refusal(502, "api_error", "the provider cannot be reached") from None
    except NoAnswer as error:
        if error.timed_out:
            raise Refusal(504, "timeout_error", "the provider took too long to answer") from None
        raise Refusal(502, "api_error", "the provider gave no answer") from None
    if 300 <= answer.status < 400:
        raise Refusal(502, "api_error", "the provider answered with a redirect, which is never followed")
    return answer, body


async def _read(answer: Answer) -> bytes:
    pieces, size = [], 0
    async for chunk in answer.chunks():
        size += len(chunk)
        if size > MODELS_BYTES_MAX:
            raise Refusal(502, "api_error", "the provider's list of models is too large")
        pieces.append(chunk)
    return b"".join(pieces)
