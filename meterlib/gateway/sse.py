"""What the bytes of a Claude API answer say of its usage, whether it came in one piece or as a stream of events.

Nothing here fails on what a provider sends: a number that is no count is one that was not told, and an event that
cannot be read is one that did not come. The client's own copy of the bytes must never suffer from being metered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec

from meterlib.core.checks import AMOUNT_MAX, check_text
from meterlib.core.ledger import Quality
from meterlib.core.usage import CacheCreation, Iteration, OutputTokensDetails, ServerToolUse, Usage

EVENT_BYTES_MAX = 16 << 20
"""Results of a web search make events of some megabytes; nothing real comes near this."""

CHARACTERS_PER_TOKEN = 4
"""How the output of an answer that was cut off is told from its visible text."""

CONTENT_BYTES_KEPT = 64 << 10
"""So much of the text waits to be looked at, in the hope that nobody needs to."""

TEXT_BYTES_MAX = 128
"""Of a tier, a speed or a region; anything longer is none."""

_BOM = b"\xef\xbb\xbf"
_NO_NAME = "message"


class Event(NamedTuple):
    """One event: its name (`message`, if the stream gave none) and its data as it came."""

    name: str
    data: bytes


class EventDecoder:
    """Events out of the bytes of an event stream, in whatever pieces they arrive.

    Lines end with CR, LF or CRLF; several `data` lines of an event are joined by LF; comments are skipped. An event
    whose lines have more than `event_bytes_max` bytes is left out, and counted in `oversized`.
    """

    def __init__(self, event_bytes_max: int = EVENT_BYTES_MAX) -> None:
        self.oversized = 0
        self._event_bytes_max = event_bytes_max
        self._at_start = True
        self._lf_belongs_to_last_line = False
        self._line = bytearray()
        self._name = ""
        self._data: list[bytes] = []
        self._bytes = 0

    @property
    def between_events(self) -> bool:
        """Whether nothing of an event has come that is not complete."""
        return not (self._line or self._bytes or self._lf_belongs_to_last_line)

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that this piece completes."""
        if self._lf_belongs_to_last_line and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._lf_belongs_to_last_line = False
        events = []
        for piece in chunk.splitlines(keepends=True):
            text = piece.rstrip(b"\r\n")
            if len(text) == len(piece) or self._line:
                self._keep(text)
            if len(text) < len(piece):
                event = self._take_line(bytes(self._line) or text)
                self._line.clear()
                if event:
                    events.append(event)
        self._lf_belongs_to_last_line = self._lf_belongs_to_last_line or chunk.endswith(b"\r")
        return events

    def skip(self) -> None:
        """Whole events have come that somebody else has read."""
        self._at_start = False

    def end(self) -> list[Event]:
        """The event that was left open when the stream ended, if it was."""
        last = [self._take_line(bytes(self._line)) if self._line else None, self._take_line(b"")]
        self._line.clear()
        return [event for event in last if event]

    def _keep(self, text: bytes) -> None:
        # One byte more than allowed is enough to see that a line is too long, so that no line can fill the memory.
        self._line += text[: len(_BOM) + self._event_bytes_max + 1 - len(self._line)]

    def _take_line(self, line: bytes) -> Event | None:
        if self._at_start:
            line = line.removeprefix(_BOM)
            self._at_start = False
        if not line:
            return self._take_event()
        field, _, value = line.partition(b":")
        if field:
            self._bytes += len(line)
        if field in (b"data", b"event"):
            if self._bytes > self._event_bytes_max:
                self._data.clear()
            elif field == b"data":
                self._data.append(value.removeprefix(b" "))
            else:
                self._name = value.removeprefix(b" ").decode(errors="replace")
        return None

    def _take_event(self) -> Event | None:
        oversized = self._bytes > self._event_bytes_max
        self.oversized += oversized
        event = Event(self._name or _NO_NAME, b"\n".join(self._data)) if self._data and not oversized else None
        self._name, self._data, self._bytes = "", [], 0
        return event


class UsageStream:
    """The usage of a streamed answer as far as it has been told, from `message_start` and each `message_delta`.

    A delta's numbers are totals, so they replace what was told before, also by less. But some backends that are not
    the Claude API itself fill the input side of their deltas with 0: a 0 there never replaces what the start told.

    Attributes:
        model: the model that answers, which may be another than the one asked for.
        started: `message_start` has come, which tells the input.
        concluded: a `message_delta` has told why the answer ended and what it used, and no more of the answer came
            behind it: only `message_stop` may be missing.
        finished: `message_stop` has come: every number is known.
        error: type of the error that the provider ended the stream with, such as `overloaded_error`.

    """

    def __init__(self, event_bytes_max: int = EVENT_BYTES_MAX) -> None:
        self.model: str | None = None
        self.started = False
        self.concluded = False
        self.finished = False
        self.error: str | None = None
        self._event_bytes_max = event_bytes_max
        self._decoder = EventDecoder(event_bytes_max)
        self._start: dict[str, Any] = {}
        self._told: dict[str, Any] = {}
        self._known: Usage | None = None
        self._content = bytearray()
        self._characters = 0
        self._tokens_without_text = 0

    def feed(self, chunk: bytes) -> None:
        """The bytes of this piece are taken into account."""
        self._known = None
        at, end = 0, len(chunk)
        as_usual = b"\r" not in chunk
        while at < end:
            if as_usual and self._decoder.between_events:
                at = self._skim(chunk, at)
            if at < end:
                blank_at = chunk.find(b"\n\n", at) if as_usual else -1
                begin, at = at, blank_at + 2 if blank_at >= 0 else end
                for event in self._decoder.feed(chunk[begin:at]):
                    self._take(*event)
        if len(self._content) > CONTENT_BYTES_KEPT:
            self._take_kept_content()

    def end(self) -> None:
        """What the stream ended with is taken into account, even if it lacks its last line end."""
        if self.between_events:
            return
        self._known = None
        for event in self._decoder.end():
            if _json_object(event.data):  # or else it was cut off in the middle, and nobody can say what it was
                self._take(*event)

    @property
    def between_events(self) -> bool:
        """Whether nothing of an event has come that is not complete."""
        return self._decoder.between_events

    @property
    def usage(self) -> Usage:
        """What is known now. Of an answer that is not finished, the output is at least what was seen of it."""
        if self._known is None:
            told = self._told
            if not self.finished and (seen := self._output_tokens_seen):
                told = told | {"output_tokens": max(told.get("output_tokens", 0), min(seen, AMOUNT_MAX))}
            self._known = _usage(told)
        return self._known

    @property
    def quality(self) -> Quality:
        """How good the numbers are if the stream ends now."""
        usage = self.usage
        if self.finished or usage.input_tokens is None:
            return quality_of(usage)
        return "partial"

    @property
    def _output_tokens_seen(self) -> int:
        self._take_kept_content()
        return -(-self._characters // CHARACTERS_PER_TOKEN) + self._tokens_without_text

    def _skim(self, chunk: bytes, at: int) -> int:
        """Take whole events that are written as the Claude API writes them; returns where the first other one begins.

        Only of an answer that is cut off does anybody ask how long its text was. So the events of a text, which are
        nearly all there are, are kept as they are: looking for their end costs a tenth of reading them.
        """
        begin = at
        while True:
            if content := _CONTENT.match(chunk, at):
                self._content += content[0]
                self.concluded = False
                at = content.end()
            elif (event := _EVENT.match(chunk, at)) and event.end() - at <= self._event_bytes_max:
                self._take(event[1].decode(), event[2])
                at = event.end()
            else:
                break
        if at > begin:
            self._decoder.skip()
        return at

    def _take_kept_content(self) -> None:
        for event in EventDecoder(self._event_bytes_max).feed(bytes(self._content)):
            if event.name == "content_block_delta":
                self._take_content(event.data)
        self._content.clear()

    def _take(self, name: str | None, data: bytes) -> None:
        if name == _NO_NAME:
            name = _text(_json_object(data), "type")
        match name:
            case "content_block_delta":
                self._take_content(data)
                self.concluded = False
            case "content_block_start" | "content_block_stop":
                self.concluded = False
            case "message_start":
                self._take_start(_part(_json_object(data), "message"))
            case "message_delta":
                self._take_end(_json_object(data))
            case "message_stop":
                self.finished = True
                self._content.clear()
            case "error":
                self.error = _text(_part(_json_object(data), "error"), "type") or "error"

    def _take_start(self, message: Mapping[str, Any]) -> None:
        if self.started or not message:
            return
        self.started = True
        self.model = _text(message, "model")
        self._take_delta(_part(message, "usage"))
        self._start = dict(self._told)

    def _take_end(self, told: Mapping[str, Any]) -> None:
        usage = _part(told, "usage")
        self._take_delta(usage)
        ended = _text(_part(told, "delta"), "stop_reason") is not None
        self.concluded = self.started and ended and _is_count(usage.get("output_tokens"))

    def _take_delta(self, usage: Mapping[str, Any]) -> None:
        for name, value in usage.items():
            if name in _COUNTS:
                zero_is_filling = name in _INPUT and self._start.get(name)
                if _is_count(value) and (value or not zero_is_filling):
                    self._told[name] = value
            elif name in _OTHER and value is not None and not (name in _TOLD_ONCE and name in self._told):
                self._told[name] = value

    def _take_content(self, data: bytes) -> None:
        try:
            delta = _content_delta.decode(data).delta
        except _UNREADABLE:
            return
        shown = len(delta.text or "") + len(delta.thinking or "") + len(delta.partial_json or "")
        self._characters += shown
        if not shown and 0 < (delta.estimated_tokens or 0) <= AMOUNT_MAX:
            self._tokens_without_text += delta.estimated_tokens or 0


class UsageMessage:
    """The usage of an answer that comes as one JSON document; it is known at the end, or not at all.

    Attributes are those of `UsageStream`. Of a document larger than `bytes_max` nothing is known.
    """

    def __init__(self, bytes_max: int = EVENT_BYTES_MAX) -> None:
        self.model: str | None = None
        self.started = False
        self.finished = False
        self.error: str | None = None
        self.usage = Usage()
        self._pieces: list[bytes] = []
        self._room = bytes_max

    def feed(self, chunk: bytes) -> None:
        """The bytes of this piece are taken into account."""
        self._room -= len(chunk)
        if self._room < 0:
            self._pieces.clear()
        else:
            self._pieces.append(chunk)

    def end(self) -> None:
        """All bytes are there; told again, nothing changes."""
        if not self._pieces:
            return
        message = _json_object(b"".join(self._pieces))
        self._pieces.clear()
        self.model, self.usage = _text(message, "model"), _usage(_part(message, "usage"))
        self.started = self.finished = bool(message)

    @property
    def between_events(self) -> bool:
        """There are no events, so there is no place between them."""
        return False

    @property
    def quality(self) -> Quality:
        """How good the numbers are."""
        return quality_of(self.usage)


def usage_of(message: bytes) -> Usage:
    """The usage that a plain JSON answer tells; nothing is known of an answer that has none, such as an error."""
    return _usage(_part(_json_object(message), "usage"))


def quality_of(usage: Usage) -> Quality:
    """How good the numbers of a complete answer are."""
    if usage.input_tokens is None or usage.output_tokens is None:
        return "estimated"
    split_tokens = _sum_of(usage.cache_creation or CacheCreation()) or 0
    return "final" if split_tokens == (usage.cache_creation_input_tokens or 0) else "split_unknown"


_EVENT = re.compile(rb"event: ([a-z_]++)\ndata: (.*+)\n\n")
_CONTENT = re.compile(rb"(?:event: content_block_(?:delta|start|stop)\ndata: .*+\n\n)++")
"""As the Claude API writes them, which is without CR: a name, one line of data, a blank line."""

_INPUT = frozenset(("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"))
_COUNTS = _INPUT | {"output_tokens"}
_OTHER = {
    "cache_creation": CacheCreation,
    "output_tokens_details": OutputTokensDetails,
    "server_tool_use": ServerToolUse,
    "service_tier": str,
    "speed": str,
    "inference_geo": str,
    "iterations": tuple[Iteration, ...],
}
_TOLD_ONCE = ("service_tier", "cache_creation")
_UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)


class _ContentDelta(msgspec.Struct):
    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = None
    estimated_tokens: int | None = None


class _ContentBlockDelta(msgspec.Struct):
    delta: _ContentDelta


_content_delta = msgspec.json.Decoder(_ContentBlockDelta)


def _json_object(data: bytes) -> Mapping[str, Any]:
    try:
        value = msgspec.json.decode(data)
    except _UNREADABLE:
        return {}
    return value if isinstance(value, dict) else {}


def _part(told: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = told.get(name)
    return value if isinstance(value, dict) else {}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= AMOUNT_MAX


def _text(told: Mapping[str, Any], name: str) -> str | None:
    value = told.get(name)
    return value if isinstance(value, str) else None


def _usage(told: Mapping[str, Any]) -> Usage:
    known: dict[str, Any] = {}
    for name, value in told.items():
        if name in _COUNTS:
            if _is_count(value):
                known[name] = value
        elif name in _OTHER and value is not None:
            with suppress(*_UNREADABLE):
                known[name] = _other(name, value)
    if "cache_creation" in known and "cache_creation_input_tokens" not in known:
        known["cache_creation_input_tokens"] = _sum_of(known["cache_creation"])
    return Usage(**known)


def _other(name: str, value: Any) -> Any:
    kind = _OTHER[name]
    found: Any = msgspec.convert(value, kind)
    return check_text(found, name, TEXT_BYTES_MAX) if kind is str else found


def _sum_of(split: CacheCreation) -> int | None:
    """The cache writes that a split adds up to; None if it tells nothing."""
    known = [n for n in (split.ephemeral_5m_input_tokens, split.ephemeral_1h_input_tokens) if n is not None]
    return min(sum(known), AMOUNT_MAX) if known else None
