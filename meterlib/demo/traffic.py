"""Made-up tenants who call a provider through a meter: what they ask, and how each call is reserved and settled."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from random import Random
from typing import Any, Literal, NamedTuple

import aiohttp
import msgspec

from meterlib import AsyncMeter, AsyncReservation, Limit, Policy, QuotaExceeded, Tenant, Usage
from meterlib.core.ledger import Quality
from meterlib.demo.provider import prose
from meterlib.gateway.sse import UsageStream, quality_of, usage_of

PRESET = "buildkite-anthropic"
MINUTE = "5s"
"""How long a minute of the preset lasts here, so that limits fill, deny and free while one watches."""

PROVIDER = {"provider": "anthropic"}
_NOTHING_USED = Usage(input_tokens=0, cache_creation_input_tokens=0, cache_read_input_tokens=0, output_tokens=0)


def demo_policy() -> Policy:
    """The preset with short minutes, and a limit of open calls, which one tenant has less of than the others."""
    limits = [msgspec.structs.replace(limit, window=MINUTE) for limit in Policy.preset(PRESET).limits]
    open_calls = Limit(name="open_calls", open=True, quota=16, retry_hint_ms=250)
    tenants = [Tenant(name="hooli", quotas={"open_calls": 3})]
    return Policy(limits=(*limits, open_calls), tenants=tuple(tenants))


# ── What is asked ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Caller(NamedTuple):
    """One tenant's appetite.

    Attributes:
        tenant: its name.
        story: what to know of it.
        model: which model it asks.
        calls_per_s: how often it would call if nobody stopped it.
        characters: length of what each call adds: at least, at most.
        context_characters: length of what all its calls begin with, marked to be cached.
        patience_s: how long a denied call is tried again.
        streamed: the part of its calls that ask for a stream.
        one_at_a_time: whether it waits for an answer before it asks the next.

    """

    tenant: str
    story: str
    model: str
    calls_per_s: float
    characters: tuple[int, int]
    context_characters: int = 0
    patience_s: float = 1.0
    streamed: float = 1.0
    one_at_a_time: bool = False


CALLERS = (
    Caller("acme", "a CI fleet, wants far more requests than it has", "claude-haiku-4-5", 20, (400, 1600)),
    Caller("initech", "reads long documents, runs out of input tokens", "claude-opus-4-5", 3.5, (16_000, 30_000), 0, 3),
    Caller("hooli", "runs many calls at once, may have three open", "claude-sonnet-4-5", 7, (800, 4000)),
    Caller(
        "globex",
        "an agent: a huge context read from the cache, which counts nothing",
        "claude-sonnet-4-5",
        calls_per_s=4,
        characters=(1500, 4000),
        context_characters=90_000,
        patience_s=3,
        one_at_a_time=True,
    ),
    Caller("ada", "one person with small questions", "claude-haiku-4-5", 1.5, (100, 600), streamed=0.3),
)


class Call(NamedTuple):
    """One call that a tenant means to make, `after_s` after the one before."""

    tenant: str
    after_s: float
    body: dict[str, Any]
    estimate: Usage
    patience_s: float
    changes_its_mind: bool

    @property
    def attributes(self) -> dict[str, str]:
        """What limits and reports tell calls apart by."""
        return {**PROVIDER, "model": self.body["model"]}


def calls_of(caller: Caller, seed: int) -> Iterator[Call]:
    """All that a tenant ever asks; the same for the same seed."""
    rng = Random(f"{seed}/{caller.tenant}")
    context = prose(rng, caller.context_characters)
    turns: list[str] = []
    new = context
    while True:
        turns = (
            [*turns, prose(rng, rng.randint(*caller.characters))]
            if context and len(turns) < 8
            else [prose(rng, rng.randint(*caller.characters))]
        )
        new += turns[-1]
        yield Call(
            tenant=caller.tenant,
            after_s=rng.expovariate(caller.calls_per_s),
            body=_body(caller, context, turns, rng.random() < caller.streamed),
            estimate=Usage(input_tokens=_estimated_tokens(new)),
            patience_s=caller.patience_s,
            changes_its_mind=rng.random() < 0.02,
        )
        new = ""


def _body(caller: Caller, context: str, turns: list[str], streamed: bool) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": caller.model,
        "max_tokens": 1024,
        "stream": streamed,
        "metadata": {"user_id": caller.tenant},
        "messages": [{"role": "user", "content": [{"type": "text", "text": turn}]} for turn in turns],
    }
    if context:
        hour, minutes = {"type": "ephemeral", "ttl": "1h"}, {"type": "ephemeral"}
        body["system"] = [{"type": "text", "text": context, "cache_control": hour}]
        body["messages"][-1]["content"][-1]["cache_control"] = minutes
    return body


def _estimated_tokens(text: str) -> int:
    # Without the provider's tokenizer this is a guess, and rather too much than too little.
    return -(-len(text.encode()) * 2 // 7)


# ── What comes of it ──────────────────────────────────────────────────────────────────────────────────────────────────


class Tally(msgspec.Struct):
    """What became of a tenant's calls so far; `denied` counts every try."""

    admitted: int = 0
    denied: int = 0
    gave_up: int = 0
    settled: int = 0
    partial: int = 0
    refused: int = 0
    cancelled: int = 0

    @property
    def open(self) -> int:
        """Admitted and not over yet."""
        return self.admitted - self.settled - self.cancelled

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(mine + others for mine, others in zip(_counts(self), _counts(other), strict=True)))


def _counts(tally: Tally) -> list[int]:
    return [getattr(tally, name) for name in tally.__struct_fields__]


EventKind = Literal["denied", "gave up", "settled", "partial", "refused", "cancelled"]


class Event(NamedTuple):
    """Something that happened to a tenant's call, for people to read."""

    at_s: float
    tenant: str
    kind: EventKind
    text: str


class _Answer:
    """What is known of a call's answer at any moment: enough to settle it there and then."""

    def __init__(self) -> None:
        self.sent = True
        self.usage = Usage()
        self.quality: Quality = "estimated"
        self.facts: dict[str, str] = {}
        self.trouble = ""

    def know(self, usage: Usage, quality: Quality) -> None:
        self.usage, self.quality = usage, quality


class Traffic:
    """All tenants' calls, from the first until `stop()`; each ends settled or cancelled, exactly once.

    Attributes:
        tallies: what became of the calls, by tenant.
        events: what happened last.
        reservation_ids: of every call that was admitted.

    """

    def __init__(self, meter: AsyncMeter, provider_url: str, seed: int) -> None:
        self.tallies = {caller.tenant: Tally() for caller in CALLERS}
        self.events: deque[Event] = deque(maxlen=200)
        self.reservation_ids: list[str] = []
        self._denied_s: dict[tuple[str, str], float] = {}
        self._meter = meter
        self._url = f"{provider_url}/v1/messages"
        self._seed = seed
        self._jitter = Random(seed)
        self._stopping = asyncio.Event()
        self._started_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """How long it has been going on."""
        return time.monotonic() - self._started_s

    @property
    def stopping(self) -> bool:
        """Whether no new call is made any more."""
        return self._stopping.is_set()

    @property
    def total(self) -> Tally:
        """What became of all tenants' calls."""
        return sum(self.tallies.values(), Tally())

    def is_denying(self, tenant: str, limit: str) -> bool:
        """Whether this limit of the tenant's has denied a call just now."""
        denied_s = self._denied_s.get((tenant, limit))
        return denied_s is not None and self.elapsed_s - denied_s < 0.5

    def stop(self) -> None:
        """No call is made from here on; those that are open go on to their end."""
        self._stopping.set()

    async def run(self) -> None:
        """Make calls until `stop()`; returns when the last of them is over."""
        timeout = aiohttp.ClientTimeout(total=30)
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(timeout=timeout, connector=connector) as self._http,
            asyncio.TaskGroup() as group,
        ):
            for caller in CALLERS:
                group.create_task(self._run_caller(caller, group))

    async def _run_caller(self, caller: Caller, group: asyncio.TaskGroup) -> None:
        for call in calls_of(caller, self._seed):
            await self._sleep(call.after_s)
            if self.stopping:
                return
            running = group.create_task(self._make(call))
            if caller.one_at_a_time:
                await running

    async def _make(self, call: Call) -> None:
        """One call, tried again as long as its caller is patient."""
        until_s = time.monotonic() + call.patience_s
        while not self.stopping:
            try:
                await self._make_metered(call)
                return
            except QuotaExceeded as denied:
                self._tell_denied(call, denied)
                # Some jitter, or else all that were denied would come back in the same instant.
                wait_s = (denied.retry_after_ms or 0) / 1000 + self._jitter.uniform(0, 0.4)
                if not denied.retryable or time.monotonic() + wait_s > until_s:
                    break
            await self._sleep(wait_s)
        self.tallies[call.tenant].gave_up += 1

    async def _make_metered(self, call: Call) -> None:
        """Reserve, send, settle: the whole use of the meter.

        Raises:
            QuotaExceeded: nothing was sent, and nothing counts.

        """
        async with self._meter.reservation(call.tenant, call.attributes, call.estimate) as reservation:
            self._admitted(reservation)
            if call.changes_its_mind:
                self._tell_cancelled(call, "the caller left before anything was sent")
                return  # and the reservation is cancelled
            answer = _Answer()
            reservation.dispatched()
            try:
                await self._forward(call, reservation, answer)
            finally:
                await self._end(call, reservation, answer)

    async def _forward(self, call: Call, reservation: AsyncReservation, answer: _Answer) -> None:
        headers = {"x-api-key": "demo", "anthropic-version": "2023-06-01", "content-type": "application/json"}
        try:
            async with self._http.post(self._url, data=json.dumps(call.body), headers=headers) as response:
                answer.facts["request_id"] = response.headers.get("request-id", "")
                if response.status != 200:
                    answer.trouble = f"provider answered {response.status}"
                    answer.know(_NOTHING_USED, "final")
                elif response.content_type == "text/event-stream":
                    await self._follow(response, reservation, answer)
                else:
                    usage = usage_of(await response.read())
                    answer.know(usage, quality_of(usage))
        except aiohttp.ClientConnectorError as error:
            answer.sent, answer.trouble = False, str(error)
        except (aiohttp.ClientError, TimeoutError) as error:
            answer.trouble = answer.trouble or f"no answer: {type(error).__name__}"

    async def _follow(self, response: aiohttp.ClientResponse, reservation: AsyncReservation, answer: _Answer) -> None:
        """A stream to its end, orderly or not; the hold is corrected as soon as the provider tells the real input."""
        stream = UsageStream()
        revised = False
        try:
            async for chunk in response.content.iter_any():
                stream.feed(chunk)
                answer.know(stream.usage, stream.quality)
                if stream.started and not revised:
                    revised = True
                    await reservation.revise(stream.usage)
        except aiohttp.ClientPayloadError:
            answer.trouble = "connection broke"
        stream.end()
        answer.know(stream.usage, stream.quality)
        if not stream.finished:
            answer.trouble = stream.error or answer.trouble or "no message_stop"

    async def _end(self, call: Call, reservation: AsyncReservation, answer: _Answer) -> None:
        if not answer.sent:
            await reservation.cancel()
            return self._tell_cancelled(call, answer.trouble)
        entry = await reservation.settle(answer.usage, quality=answer.quality, facts=answer.facts)
        self._tell_settled(call, answer, entry.quality)
        return None

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    # ── What people are told ──────────────────────────────────────────────────────────────────────────────────────────

    def _tell(self, call: Call, kind: EventKind, text: str) -> None:
        self.events.append(Event(self.elapsed_s, call.tenant, kind, text))

    def _admitted(self, reservation: AsyncReservation) -> None:
        self.tallies[reservation.tenant].admitted += 1
        self.reservation_ids.append(reservation.id)

    def _tell_denied(self, call: Call, denied: QuotaExceeded) -> None:
        self.tallies[call.tenant].denied += 1
        for denial in denied.denials:
            self._denied_s[call.tenant, denial.name] = self.elapsed_s
        first = denied.denials[0]
        wait = f"again in {(denied.retry_after_ms or 0) / 1000:.1f} s" if denied.retryable else "waiting is in vain"
        self._tell(
            call, "denied", f"{spoken(first.name)}: {first.used:,} + {first.requested:,} > {first.quota:,}; {wait}"
        )

    def _tell_cancelled(self, call: Call, why: str) -> None:
        self.tallies[call.tenant].cancelled += 1
        self._tell(call, "cancelled", why)

    def _tell_settled(self, call: Call, answer: _Answer, quality: Quality) -> None:
        tally = self.tallies[call.tenant]
        tally.settled += 1
        amounts = _spoken_usage(answer.usage, call.estimate)
        if not answer.trouble:
            self._tell(call, "settled", amounts)
        elif quality == "final":
            tally.refused += 1
            self._tell(call, "refused", f"{answer.trouble}: no tokens charged")
        else:
            tally.partial += 1
            self._tell(call, "partial", f"{answer.trouble}; what came: {amounts}")


def spoken(name: str) -> str:
    """A limit's name as people say it."""
    return name.replace("_", " ")


def _spoken_usage(usage: Usage, estimate: Usage) -> str:
    if usage.input_tokens is None:
        return "unknown, so the estimate stays"
    written, read = usage.cache_creation_input_tokens or 0, usage.cache_read_input_tokens or 0
    parts = [f"{usage.input_tokens:,} in"]
    parts += [f"{written:,} to cache"] if written else []
    parts += [f"{read:,} from cache"] if read else []
    parts += [f"{usage.output_tokens or 0:,} out"]
    guess = estimate.input_tokens or 0
    parts += [f"(held {guess:,})"] if usage.input_tokens + written > guess + 100 else []
    return ", ".join(parts).replace(", (", " (")
