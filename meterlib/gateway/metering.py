"""One call's metering: the hold before it, what its answer tells on the way, and one settlement whatever happens."""

from __future__ import annotations

import re
from collections.abc import Awaitable
from typing import Literal

from msgspec.structs import replace

from meterlib.core.checks import ATTRIBUTE_BYTES_MAX
from meterlib.core.ledger import Quality, counts_of
from meterlib.core.usage import Usage, amount_of
from meterlib.errors import MeterError, StoreError
from meterlib.gateway.background import Background, Later
from meterlib.gateway.encodings import Decoder, Unreadable, decoder_for
from meterlib.gateway.estimate import Estimate, Estimator
from meterlib.gateway.headers import Headers, is_fact, value_of
from meterlib.gateway.prompt import Prompt
from meterlib.gateway.spending import Cost
from meterlib.gateway.sse import UsageMessage, UsageStream
from meterlib.meter import AsyncReservation
from meterlib.store.telling import Log

ANSWER_BYTES_MAX = 1 << 30
"""An answer that decompresses to more is no answer; its usage stays as it was known until then."""

STOP = b'event: message_stop\ndata: {"type": "message_stop"}\n\n'
REVISE_AFTER_S = 0.05

NOTHING = Usage(input_tokens=0, cache_creation_input_tokens=0, cache_read_input_tokens=0, output_tokens=0)

End = Literal[
    "complete",  # the answer came to its end
    "refused",  # the provider answered with an error
    "error_event",  # the provider ended the stream with an error
    "cut",  # the provider's connection broke, or the stream ended without message_stop
    "no_answer",  # the call was sent, and no answer came
    "client_gone",  # the reader left
    "shutdown",  # the gateway was stopped
]
"""How calls end; entries have it among their facts."""

IMPLAUSIBLE = 1000
"""So many times what was asked for, no model ever writes."""

log = Log("meterlib.gateway")


class Metering:
    """The metering of one call that was admitted; nothing that the provider sends makes it fail.

    Args:
        reservation: what was admitted.
        estimator: learns from what the call turns out to have used.
        estimate: its own, of this call.
        prompt: what was asked for.
        background: does what need not be waited for.
        cost: what it costs, if any limit counts that.
    """

    def __init__(
        self,
        reservation: AsyncReservation,
        estimator: Estimator,
        estimate: Estimate,
        prompt: Prompt,
        background: Background,
        cost: Cost | None = None,
    ) -> None:
        self.reservation = reservation
        self.facts = {"estimated_input_tokens": str(amount_of(estimate.usage, "input_tokens") or 0)}
        self._estimator = estimator
        self._estimate = estimate
        self._model = prompt.model
        self._output_max = prompt.max_tokens
        self._background = background
        self._cost = cost
        self._reader: UsageStream | UsageMessage | None = None
        self._decoder: Decoder | None = None
        self._refused = False
        self._plain = False
        self._revising: Later | None = None
        self._outcome: tuple[Usage, Quality, dict[str, str]] | None = None

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream of events that can be read."""
        return isinstance(self._reader, UsageStream) and self._decoder is not None

    @property
    def finished(self) -> bool:
        """Whether all of the answer has come."""
        return self._reader is not None and self._reader.finished

    @property
    def error(self) -> str | None:
        """The error that the provider ended a stream with."""
        return self._reader.error if self._reader else None

    @property
    def between_events(self) -> bool:
        """Whether an event of our own could be put in here."""
        return self.streams and self._plain and self._reader is not None and self._reader.between_events

    @property
    def lacks_only_its_stop(self) -> bool:
        """Whether a stream has told all there is, and just not that it is over."""
        reader = self._reader
        concluded = isinstance(reader, UsageStream) and reader.concluded and not (reader.finished or reader.error)
        return concluded and self.between_events

    def add_stop(self) -> bytes:
        """The event that a stream lacks, which counts as if it had come."""
        self.facts["added"] = "message_stop"
        self.take(STOP)
        return STOP

    def answered(self, status: int, headers: Headers) -> None:
        """The head of the answer is there: from it on `take` knows how to read."""
        self.facts["status"] = str(status)
        self._keep("request_id", value_of(headers, "request-id"))
        self._refused = status >= 300
        if self._refused:
            return
        content_type = (value_of(headers, "content-type") or "").partition(";")[0].strip().lower()
        if content_type == "text/event-stream":
            self._reader = UsageStream()
        elif content_type.endswith("json"):
            self._reader = UsageMessage()
        encoding = value_of(headers, "content-encoding")
        self._plain = encoding in (None, "identity")
        try:
            self._decoder = decoder_for(encoding, ANSWER_BYTES_MAX)
        except Unreadable as error:
            self._unreadable(error)

    def take(self, chunk: bytes) -> None:
        """A piece of the answer: as soon as it tells the exact input, that is held in place of the estimate."""
        reader = self._reader
        if reader is None or self._decoder is None:
            return
        try:
            reader.feed(self._decoder.feed(chunk))
        except Exception as error:  # whatever it is: the client has its bytes, and is to have the next ones too
            self._unreadable(error)
        if reader.started and self._revising is None and not reader.finished:
            # A short answer is over before that, and its settlement says the same.
            self._revising = self._background.later(REVISE_AFTER_S, self._revise)

    def _revise(self) -> None:
        """Only the input is known by now. Nobody waits for this: the stream goes on, and the settlement counts."""
        if self._reader and self._outcome is None:
            usage = self._reader.usage
            if self._cost:
                exact = self._cost.meanwhile(usage, self._served(), self.reservation.reserved_at_ms)
            else:
                exact = replace(usage, output_tokens=None)
            self._background.spawn(self._quietly(self.reservation.revise(exact)))

    def tend(self) -> None:
        """Look after the call, every second or so: an answer that costs more than is held for it has more held."""
        reader, cost = self._reader, self._cost
        under_way = cost and self.streams and reader and reader.started and not reader.finished
        if cost and reader and under_way and cost.outgrown(reader.usage.output_tokens or 0):
            self._revise()

    def end(self) -> None:
        """The answer has come to its end, be it too early."""
        if self._reader:
            self._reader.end()

    async def renew(self, lease_ms: int) -> None:
        """The call goes on, so it is not to expire."""
        await self._quietly(self.reservation.renew(lease_ms))

    async def cancel(self) -> None:
        """Nothing was sent: the whole hold is free. If the store is away, the lease frees it."""
        await self._quietly(self.reservation.cancel())

    async def settle(self, end: End) -> None:
        """What was used is booked, and the hold is gone. Repeating it after an interruption books nothing twice.

        Should neither store nor journal take it, it is logged in full.
        """
        if self._outcome is None:
            self._outcome = self._conclude(end)
            if self._revising:
                self._revising.cancel()
        usage, quality, facts = self._outcome
        try:
            await self.reservation.settle(usage, quality=quality, facts=facts)
        except Exception as error:
            fields = {"tenant": self.reservation.tenant, "reservation_id": self.reservation.id}
            log.error("settlement.lost", usage=counts_of(usage), quality=quality, error=str(error), **fields)

    def _conclude(self, end: End) -> tuple[Usage, Quality, dict[str, str]]:
        """What is booked, once and for all: told again with any other fact, it would contradict itself."""
        self.facts["end"] = end
        usage, quality = self._result()
        if self._cost:
            whole = end == "complete" and quality != "estimated"
            model, at_ms = self.facts.get("model"), self.reservation.reserved_at_ms
            usage = self._cost.at_last(usage, model, at_ms, whole=whole)
        return usage, quality, dict(self.facts)

    def _result(self) -> tuple[Usage, Quality]:
        if self._refused:
            return NOTHING, "final"
        if self._reader is None:
            return Usage(), "estimated"
        self.end()
        usage, quality = self._reader.usage, self._reader.quality
        self._keep("model", self._served())
        if usage.iterations:
            self._keep("unknown_iterations", _unknown_iterations(usage))
        self._look_at(usage.output_tokens or 0)
        if self._reader.started and quality != "estimated":
            self._learn(usage)  # the input is exact, be the answer cut off
        return usage, quality

    def _look_at(self, output_tokens: int) -> None:
        """What the provider says is booked, and billed; but somebody should look at what can hardly be."""
        asked_for = self._output_max
        if asked_for and output_tokens > IMPLAUSIBLE * asked_for:
            self.facts["implausible"] = "output_tokens"
            fields = {"tenant": self.reservation.tenant, "reservation_id": self.reservation.id}
            log.error("usage.implausible", output_tokens=output_tokens, max_tokens=asked_for, **fields)

    def _served(self) -> str | None:
        """The model that answered, if it is another than the one asked for."""
        return self._reader.model if self._reader and self._reader.model != self._model else None

    def _learn(self, usage: Usage) -> None:
        try:
            self._estimator.learn(self._estimate, usage)
        except Exception as error:  # it may be anybody's, and must not keep the call from being settled
            log.error("estimator.failed", tenant=self.reservation.tenant, error=repr(error))

    def _keep(self, name: str, value: str | None) -> None:
        """Note a fact that the provider told, if it can be one."""
        if value and is_fact(name, value):
            self.facts[name] = value

    def _unreadable(self, error: Exception) -> None:
        self._decoder = None
        log.warning("answer.unreadable", tenant=self.reservation.tenant, error=str(error) or type(error).__name__)

    async def _quietly(self, step: Awaitable[object]) -> None:
        try:
            await step
        except StoreError as error:
            log.warning("store.failed", tenant=self.reservation.tenant, error=str(error))
        except MeterError:
            pass  # it was settled meanwhile


_ITERATIONS = ("message", "compaction", "advisor_message", "fallback_message")


def _unknown_iterations(usage: Usage) -> str:
    """Kinds of passes that nobody here knows: whether they are billed besides is not known either."""
    kinds = sorted({one.type for one in usage.iterations}.difference(_ITERATIONS))
    return re.sub(r"[^A-Za-z0-9_,]", "?", ",".join(kinds))[:ATTRIBUTE_BYTES_MAX]
