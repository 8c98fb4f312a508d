"""What a provider may answer: the Claude API's own shapes, and every way of sending their bytes badly.

Nothing here does I/O but to wait where a script says so; `provider.py` sends it.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeAlias

PATIENCE_S = 20.0
"""How long a test waits for what must come; nothing waits so long unless it is broken."""

MODEL = "claude-sonnet-4-5"
TEXT = "Naïve sums drift, señor: 合計は合う, and nobody pays twice. 🙂"

Event: TypeAlias = Mapping[str, Any]
Encoding: TypeAlias = Literal["gzip", "deflate", "br", "zstd"]


class Hold:
    """A point where an answer stands still until the test lets it go on."""

    def __init__(self) -> None:
        self._reached = asyncio.Event()
        self._released = asyncio.Event()

    async def reached(self) -> None:
        """Wait until the answer stands here: all that comes before is in the hands of the network."""
        await asyncio.wait_for(self._reached.wait(), PATIENCE_S)

    def release(self) -> None:
        """Let the answer go on, now or as soon as it gets here."""
        self._released.set()

    async def __call__(self) -> None:
        self._reached.set()
        await self._released.wait()


@dataclass(frozen=True)
class Pause:
    """A moment of silence, for clients in other processes that measure time; otherwise take a `Hold`."""

    seconds: float

    async def __call__(self) -> None:
        await asyncio.sleep(self.seconds)


Wait: TypeAlias = Hold | Pause
Item: TypeAlias = Event | str | bytes | Wait
"""Of a stream: an event, the text of a comment, bytes as they are, or a wait."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer, down to its bytes and moments.

    Attributes:
        headers: they replace those of the same name that every answer has; a name may come more than once.
        without: names of headers that every answer has, and this one has not.
        json, events, raw: what the body is; at most one of them.
        framing: how the end of the body is told; by default chunked for events, else its length.
        cut_every: the body is sent in pieces of so many bytes. By default there is a piece for each item.
        cut_at: the body is sent in pieces that end at these offsets.
        line_end, space: of events: what ends a line, and whether there is a space after `data:`.
        many_lines: the data of an event takes many `data:` lines.
        open_end: the last line ends of the stream are left out.
        encoding: content encoding, flushed after each item.
        negotiated: the encoding is used only if the request accepts it.
        before_head: what is waited for before anything is sent.
        before_body: the answer does not wait for the body of the request.
        breaks_after: after so many bytes of the body (as encoded) the connection breaks.
        breaks: how it breaks: in order (`fin`) or not (`rst`).
        instead: what happens instead of any answer: the connection breaks, or nothing ever comes.
        then_closes: the connection is closed after the answer, which nobody was told.

    """

    status: int = 200
    headers: Mapping[str, str] | Sequence[tuple[str, str]] = ()
    without: Sequence[str] = ()
    json: Any = None
    events: Sequence[Item] | None = None
    raw: bytes | None = None
    framing: Literal["chunked", "length", "close"] | None = None
    cut_every: int | None = None
    cut_at: Sequence[int] = ()
    line_end: Literal["\n", "\r\n", "\r"] = "\n"
    space: bool = True
    many_lines: bool = False
    open_end: bool = False
    encoding: Encoding | None = None
    negotiated: bool = False
    before_head: Sequence[Wait] = ()
    before_body: bool = False
    breaks_after: int | None = None
    breaks: Literal["rst", "fin"] = "rst"
    instead: Literal["rst", "fin", "silence"] | None = None
    then_closes: bool = False

    def plain(self) -> bytes:
        """The body before it is encoded."""
        return b"".join(part for part in self._parts() if isinstance(part, bytes))

    def body(self) -> bytes:
        """All bytes of the body as they are sent, when nothing breaks."""
        return b"".join(part for part in self._encoded() if isinstance(part, bytes))

    def pieces(self) -> Iterator[bytes | Wait]:
        """The body as it is sent: piece by piece, with its waits, up to where it breaks."""
        parts = self._cut() if self.cut_every or self.cut_at else self._encoded()
        left = math.inf if self.breaks_after is None else self.breaks_after
        for part in parts:
            if isinstance(part, bytes):
                if part[: int(min(left, len(part)))]:
                    yield part[: int(min(left, len(part)))]
                left -= len(part)
                if left < 0:
                    return
            else:
                yield part

    def _parts(self) -> list[bytes | Wait]:
        if self.raw is not None:
            return [self.raw]
        if self.events is None:
            return [json.dumps(self.json, ensure_ascii=False).encode()] if self.json is not None else []
        parts = [item if isinstance(item, Hold | Pause) else self._wire(item) for item in self.events]
        last = parts[-1] if parts else None
        if self.open_end and isinstance(last, bytes):
            parts[-1] = last.rstrip(b"\r\n")
        return parts

    def _wire(self, item: Event | str | bytes) -> bytes:
        if isinstance(item, bytes):
            return item
        end, data = self.line_end, "data: " if self.space else "data:"
        if isinstance(item, str):
            return f": {item}{end}{end}".encode()
        text = json.dumps(item, ensure_ascii=False, indent=1 if self.many_lines else None)
        lines = "".join(f"{data}{line}{end}" for line in text.split("\n"))
        return f"event:{data[5:]}{item['type']}{end}{lines}{end}".encode()

    def _encoded(self) -> Iterator[bytes | Wait]:
        if self.encoding is None:
            yield from self._parts()
            return
        encode = _ENCODERS[self.encoding]()
        for part in self._parts():
            yield encode.flushed(part) if isinstance(part, bytes) else part
        yield encode.end()

    def _cut(self) -> Iterator[bytes | Wait]:
        """All between two waits in one, cut where told."""
        run, start = b"", 0
        for part in (*self._encoded(), None):
            if isinstance(part, bytes):
                run += part
                continue
            every = range(0, len(run), self.cut_every or len(run) or 1)
            offsets = sorted({0, len(run), *every, *(at - start for at in self.cut_at if 0 < at - start < len(run))})
            yield from (run[a:b] for a, b in pairwise(offsets))
            run, start = b"", start + len(run)
            if part is not None:
                yield part


# ── Content encodings ─────────────────────────────────────────────────────────────────────────────────────────────────


class _Encoder(NamedTuple):
    flushed: Callable[[bytes], bytes]
    end: Callable[[], bytes]


def _zlib(window_bits: int) -> _Encoder:
    encoder = zlib.compressobj(wbits=window_bits)
    return _Encoder(lambda data: encoder.compress(data) + encoder.flush(zlib.Z_SYNC_FLUSH), encoder.flush)


def _brotli() -> _Encoder:
    encoder = importlib.import_module("brotli").Compressor()
    return _Encoder(lambda data: bytes(encoder.process(data) + encoder.flush()), encoder.finish)


def _zstd() -> _Encoder:
    encoder = _zstd_library().ZstdCompressor()
    return _Encoder(lambda data: bytes(encoder.compress(data, encoder.FLUSH_BLOCK)), encoder.flush)


def _zstd_library() -> Any:
    try:
        return importlib.import_module("compression.zstd")
    except ImportError:
        return importlib.import_module("backports.zstd")


_ENCODERS: dict[Encoding, Callable[[], _Encoder]] = {
    "gzip": lambda: _zlib(31),
    "deflate": lambda: _zlib(15),
    "br": _brotli,
    "zstd": _zstd,
}


def encodings() -> list[Encoding]:
    """Those that can be made here: br and zstd need a library."""
    found: list[Encoding] = []
    for name, encoder in _ENCODERS.items():
        try:
            encoder()
        except ImportError:
            continue
        found.append(name)
    return found


# ── Plain answers ─────────────────────────────────────────────────────────────────────────────────────────────────────


def message(
    *,
    usage: Mapping[str, Any],
    text: str = TEXT,
    model: str = MODEL,
    stop_reason: str = "end_turn",
    id: str = "msg_test",  # noqa: A002  (the API's name)
) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    return {
        "id": id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [{"type": "text", "text": text}] if text else [],
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": dict(usage),
    }


ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def error(
    status: int,
    message: str = "made up by a test",
    *,
    kind: str | None = None,
    retry_after: str | int | None = None,
    request_id: str = "req_test_error",
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """A refusal in the Claude API's shape."""
    body = {
        "type": "error",
        "error": {"type": kind or ERROR_TYPES[status], "message": message},
        "request_id": request_id,
    }
    all_headers = {"request-id": request_id, **(headers or {})}
    if retry_after is not None:
        all_headers["retry-after"] = str(retry_after)
    return Answer(status=status, headers=all_headers, json=body)


def html(status: int = 200) -> Answer:
    """What something in between answers instead of the API."""
    return Answer(
        status=status, headers={"content-type": "text/html"}, without=["request-id"], raw=b"<html>Sign in</html>"
    )


def redirect(location: str, status: int = 307) -> Answer:
    """The answer is elsewhere."""
    return Answer(status=status, headers={"location": location}, raw=b"")


def rate_limit_headers(*, requests: int = 49, input_tokens: int = 49_000, output_tokens: int = 8000) -> dict[str, str]:
    """What every answer of the API says of the limits of the key it came with, here with so much remaining."""
    told = {}
    tokens = input_tokens + output_tokens
    for name, limit, remaining in [
        ("requests", 50, requests),
        ("input-tokens", 50_000, input_tokens),
        ("output-tokens", 8000, output_tokens),
        ("tokens", 58_000, tokens),
    ]:
        told[f"anthropic-ratelimit-{name}-limit"] = str(limit)
        told[f"anthropic-ratelimit-{name}-remaining"] = str(remaining)
        told[f"anthropic-ratelimit-{name}-reset"] = "2026-11-22T10:00:01Z"
    return told


# ── Streams ───────────────────────────────────────────────────────────────────────────────────────────────────────────

PING: Event = {"type": "ping"}
STOP: Event = {"type": "message_stop"}
FUTURE: Event = {"type": "future_event", "usage": {"input_tokens": 99, "output_tokens": 99}}
"""An event that nobody knows yet; its usage is not the answer's."""


def start(usage: Mapping[str, Any], *, model: str = MODEL, id: str = "msg_test") -> Event:  # noqa: A002
    """The first event, which tells the input."""
    begun = message(usage=usage, text="", model=model, id=id) | {"stop_reason": None}
    return {"type": "message_start", "message": begun}


def delta(usage: Mapping[str, Any], *, stop_reason: str | None = "end_turn") -> Event:
    """What the answer has used up to here; the last one counts."""
    return {
        "type": "message_delta",
        "delta": {"stop_reason": stop_reason, "stop_sequence": None},
        "usage": dict(usage),
    }


def block(content: Mapping[str, Any], deltas: Sequence[Mapping[str, Any]] = (), *, index: int = 0) -> list[Event]:
    """One content block, from its start to its stop."""
    return [
        {"type": "content_block_start", "index": index, "content_block": dict(content)},
        *({"type": "content_block_delta", "index": index, "delta": dict(each)} for each in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def said(text: str, *, index: int = 0, characters: int = 8) -> list[Event]:
    """A block of text, so many characters at a time."""
    parts = [text[at : at + characters] for at in range(0, len(text), characters)]
    return block({"type": "text", "text": ""}, [{"type": "text_delta", "text": part} for part in parts], index=index)


def stream(
    *,
    usage_start: Mapping[str, Any],
    usage_end: Mapping[str, Any],
    text: str = TEXT,
    model: str = MODEL,
    stop_reason: str = "end_turn",
) -> list[Event]:
    """The events of an answer, from message_start to message_stop, with a ping as the API sends it."""
    blocks = said(text) if text else []
    return [start(usage_start, model=model), PING, *blocks, delta(usage_end, stop_reason=stop_reason), STOP]


def failing(events: Sequence[Event], after: int, kind: str = "overloaded_error") -> list[Event]:
    """Those events, but after so many of them the provider gives up."""
    return [*events[:after], {"type": "error", "error": {"type": kind, "message": "Overloaded"}}]


def paced(events: Sequence[Item], seconds: float) -> list[Item]:
    """Those events with a pause before each."""
    return [each for item in events for each in (Pause(seconds), item)]


def mixed(events: Sequence[Item], *others: Item) -> list[Item]:
    """Those events, and after each the others: pings, comments, events that nobody knows. Nothing follows the end."""
    return [each for item in events[:-1] for each in (item, *others)] + list(events[-1:])


# ── Streams with a point ──────────────────────────────────────────────────────────────────────────────────────────────


class Told(NamedTuple):
    """A stream, and what it says was used and shown when it is over."""

    events: list[Event]
    usage: dict[str, Any]
    text: str
    stop_reason: str = "end_turn"


_NO_CACHE = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}


def _server_tools() -> Told:
    """A search of the web meanwhile: the end tells much more input than the start."""
    end = {
        "input_tokens": 10_682,
        **_NO_CACHE,
        "output_tokens": 510,
        "server_tool_use": {"web_search_requests": 1, "web_fetch_requests": 0},
    }
    query = [{"type": "input_json_delta", "partial_json": part} for part in ("", '{"query": "wea', 'ther 東京"}')]
    found = {
        "type": "web_search_result",
        "title": "天気",
        "url": "https://example.com/",
        "encrypted_content": "EqgfCioIARgB",
        "page_age": None,
    }
    events = [
        start({"input_tokens": 2679, **_NO_CACHE, "output_tokens": 3}),
        PING,
        *block({"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {}}, query),
        *block({"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": [found]}, index=1),
        *said(TEXT, index=2),
        delta(end),
        STOP,
    ]
    return Told(events, end, TEXT)


def _cached() -> Told:
    """The split of the cache writes, the tier and all that is fixed early come only in the start."""
    begun = {
        "input_tokens": 11,
        "cache_creation_input_tokens": 500,
        "cache_read_input_tokens": 70_000,
        "cache_creation": {"ephemeral_5m_input_tokens": 300, "ephemeral_1h_input_tokens": 200},
        "output_tokens": 2,
        "service_tier": "standard",
        "inference_geo": "us",
    }
    end = {name: begun[name] for name in ("input_tokens", *_NO_CACHE)} | {"output_tokens": 42}
    return Told(stream(usage_start=begun, usage_end=end), begun | end, TEXT)


def _output_only() -> Told:
    """The delta tells nothing of the input."""
    begun = {"input_tokens": 25, "cache_creation_input_tokens": 7, "cache_read_input_tokens": 9, "output_tokens": 1}
    return Told(stream(usage_start=begun, usage_end={"output_tokens": 15}), begun | {"output_tokens": 15}, TEXT)


def _zeros() -> Told:
    """The delta's input side is filled with zeros, as some backends do that are not the API itself."""
    begun = {"input_tokens": 25, "cache_creation_input_tokens": 7, "cache_read_input_tokens": 9, "output_tokens": 1}
    end = {"input_tokens": 0, **_NO_CACHE, "output_tokens": 15}
    return Told(stream(usage_start=begun, usage_end=end), begun | {"output_tokens": 15}, TEXT)


def _refusal() -> Told:
    """Nothing is said; the output goes from 1 back to 0."""
    begun = {"input_tokens": 30, **_NO_CACHE, "output_tokens": 1}
    events = stream(usage_start=begun, usage_end={"output_tokens": 0}, text="", stop_reason="refusal")
    return Told(events, begun | {"output_tokens": 0}, "", "refusal")


def _several_deltas() -> Told:
    """Three deltas, some of their fields null: the last number told counts, be it less."""
    begun = {"input_tokens": 25, **_NO_CACHE, "output_tokens": 1}
    early = delta({"input_tokens": None, "output_tokens": 90}, stop_reason=None)
    later = delta({"input_tokens": 40, "output_tokens": 20}, stop_reason=None)
    events = [start(begun), *said(TEXT), early, PING, later, delta({"output_tokens": 33}), STOP]
    return Told(events, begun | {"input_tokens": 40, "output_tokens": 33}, TEXT)


def _iterations() -> Told:
    """A compaction before the answer, whose tokens are in none of the top numbers."""
    begun = {"input_tokens": 45_000, **_NO_CACHE, "output_tokens": 1}
    compaction = {"type": "compaction", "input_tokens": 180_000, "output_tokens": 3500, **_NO_CACHE}
    last = {"type": "message", "input_tokens": 45_000, "output_tokens": 1234, **_NO_CACHE}
    end = {"input_tokens": 45_000, **_NO_CACHE, "output_tokens": 1234, "iterations": [compaction, last]}
    return Told(stream(usage_start=begun, usage_end=end), begun | end, TEXT)


def _thinking() -> Told:
    """Thoughts that are not shown; their estimated tokens are no count."""
    begun = {"input_tokens": 60, **_NO_CACHE, "output_tokens": 4}
    end = {"output_tokens": 700, "output_tokens_details": {"thinking_tokens": 640}}
    thoughts = [{"type": "thinking_delta", "thinking": "", "estimated_tokens": tokens} for tokens in (128, 256, 200)]
    signed = {"type": "signature_delta", "signature": "EqQBCgIYAhIM1gbcDa9GJwZA2b3h"}
    hidden = block({"type": "thinking", "thinking": "", "signature": ""}, [*thoughts, signed])
    return Told([start(begun), PING, *hidden, *said(TEXT, index=1), delta(end), STOP], begun | end, TEXT)


def _unknown() -> Told:
    """Events that nobody knows yet, with a usage that is not the answer's."""
    begun = {"input_tokens": 25, **_NO_CACHE, "output_tokens": 1}
    events = [start(begun), FUTURE, *said(TEXT), FUTURE, delta({"output_tokens": 15}), FUTURE, STOP]
    return Told(events, begun | {"output_tokens": 15}, TEXT)


STREAMS: dict[str, Told] = {
    "server_tools": _server_tools(),
    "cached": _cached(),
    "output_only": _output_only(),
    "zeros": _zeros(),
    "refusal": _refusal(),
    "several_deltas": _several_deltas(),
    "iterations": _iterations(),
    "thinking": _thinking(),
    "unknown": _unknown(),
}
