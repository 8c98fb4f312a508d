"""The tenants' calls through a meter to a provider: each reserved, sent, followed and settled, however it ends."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from contextlib import suppress
from random import Random
from typing import Literal, NamedTuple

import aiohttp
import msgspec

from meterlib import AsyncMeter, AsyncReservation, QuotaExceeded, Usage
from meterlib.core.ledger import Quality
from meterlib.demo.callers import CALLERS, Call, Caller, calls_of
from meterlib.gateway.sse import UsageStream, quality_of, usage_of

_NOTHING_USED = Usage(input_tokens=0, cache_creation_input_tokens=0, cache_read_input_tokens=0, output_tokens=0)


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


EventKind = Literal["denied", "settled", "partial", "refused", "cancelled"]


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
        stream, revised = UsageStream(), False
        try:
            async for chunk in response.content.iter_any():
                stream.feed(chunk)
                if stream.started and not revised:
                    await reservation.revise(stream.usage)
                    revised = True
        except aiohttp.ClientPayloadError:
            answer.trouble = "connection broke"
        finally:
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
