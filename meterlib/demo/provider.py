"""A provider of made-up answers that speaks the Claude API's wire format over real HTTP on 127.0.0.1."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from random import Random
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import msgspec
from aiohttp import web

from meterlib.core.ledger import counts_of
from meterlib.core.usage import CacheCreation, ServerToolUse, Usage

Script = Literal[
    "answer",  # as most answers are
    "tools",  # the provider searches the web meanwhile: the end tells much more input than the start
    "deltas",  # several message_deltas, some of their fields null, and an event that nobody knows yet
    "zeros",  # as backends do that fill the end's input side with 0
    "refusal",  # nothing is said; output goes from 1 back to 0
    "overloaded_midway",  # an error event in the middle
    "cut",  # the connection breaks in the middle
    "short",  # the stream ends in order, but without message_stop
    "rate_limited",  # 429 instead of an answer
    "overloaded",  # 529 instead of an answer
]
SCRIPTS: dict[Script, int] = {
    "answer": 80,
    "tools": 5,
    "deltas": 4,
    "zeros": 2,
    "refusal": 1,
    "overloaded_midway": 2,
    "cut": 2,
    "short": 1,
    "rate_limited": 1,
    "overloaded": 2,
}
"""How often each happens, in a hundred."""

ENDS_EARLY = ("overloaded_midway", "cut", "short")
_REFUSED: dict[Script, tuple[int, str, str]] = {
    "rate_limited": (429, "rate_limit_error", "This request would exceed your account's rate limit."),
    "overloaded": (529, "overloaded_error", "Overloaded"),
}
_FRAME_TOKENS = 4
"""What surrounds a prompt, and is never cached."""

_NOTHING = Usage(input_tokens=0, cache_creation_input_tokens=0, cache_read_input_tokens=0, output_tokens=0)
_TEXT = (
    "The meter of a gateway counts tokens as they flow: naïve sums drift, señor, 合計は合う, and nobody pays twice. 🙂"
)


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What one request was answered with, and what it used by the provider's own count.

    Of an answer that ended early, the output counted is what was sent: a token for each four characters begun.
    """

    request_id: str
    user: str
    script: Script
    status: int
    usage: Usage


class Provider:
    """Answers `POST /v1/messages` while the context lasts, by a script that its seed decides.

    The n-th request of a user (`metadata.user_id`) is answered the same whenever the seed is the same. Prompts are
    cached as the Claude API does it: up to each `cache_control`, for each user and model.

    Attributes:
        url: where it listens, once the context is entered.
        served: what it has answered, in the order of arrival; an answer stands here before its first byte is sent.

    """

    def __init__(self, seed: int, *, scripts: Sequence[Script] = (), pace_ms: float = 30.0) -> None:
        self.url = ""
        self.served: list[Served] = []
        self._seed = seed
        self._scripts = scripts
        self._pace_s = pace_ms / 1000
        self._requests: Counter[str] = Counter()
        self._cached: set[str] = set()
        application = web.Application(client_max_size=32 << 20)
        application.router.add_post("/v1/messages", self._messages)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        try:
            body = json.loads(await request.read())
            user, model, streamed = str(body["metadata"]["user_id"]), str(body["model"]), body.get("stream") is True
            prompt = list(_blocks(body))
        except (ValueError, KeyError, TypeError) as error:
            return _error(400, "invalid_request_error", f"messages: {error!r}", "req_0")
        self._requests[user] += 1
        rng = Random(f"{self._seed}/{user}/{self._requests[user]}")
        request_id = f"req_{rng.getrandbits(96):024x}"
        script = self._next_script(rng, streamed)
        if script in _REFUSED:
            status, kind, message = _REFUSED[script]
            self.served.append(Served(request_id=request_id, user=user, script=script, status=status, usage=_NOTHING))
            return _error(status, kind, message, request_id)
        answer = _answer(script, model, self._read_prompt(f"{user}/{model}", prompt), rng)
        self.served.append(Served(request_id=request_id, user=user, script=script, status=200, usage=answer.usage))
        await asyncio.sleep(self._pace_s * rng.uniform(1, 5))
        return await self._send(request, request_id, answer, rng) if streamed else _plain(request_id, model, answer)

    def _next_script(self, rng: Random, streamed: bool) -> Script:
        chosen = rng.choices(list(SCRIPTS), list(SCRIPTS.values()))[0]
        if self._scripts:
            chosen = self._scripts[(self._requests.total() - 1) % len(self._scripts)]
        return "answer" if chosen in ENDS_EARLY and not streamed else chosen

    def _read_prompt(self, owner: str, prompt: Sequence[_Block]) -> Usage:
        """The input side of the usage; all of the prompt up to its last `cache_control` is cached from here on."""
        digest = hashlib.sha256(owner.encode())
        tokens = read = cached = 0
        written = {"5m": 0, "1h": 0}
        for block in prompt:
            digest.update(block.text.encode())
            key = digest.hexdigest()
            tokens += tokens_of(block.text)
            if key in self._cached:
                cached = read = tokens
                written = dict.fromkeys(written, 0)
            elif block.cached_for:
                self._cached.add(key)
                written[block.cached_for] += tokens - cached
                cached = tokens
        return Usage(
            input_tokens=tokens - cached + _FRAME_TOKENS,
            cache_creation_input_tokens=sum(written.values()),
            cache_read_input_tokens=read,
            cache_creation=CacheCreation(
                ephemeral_5m_input_tokens=written["5m"], ephemeral_1h_input_tokens=written["1h"]
            ),
            service_tier="standard",
        )

    async def _send(self, request: web.Request, request_id: str, answer: _Answer, rng: Random) -> web.StreamResponse:
        response = web.StreamResponse(headers={"request-id": request_id, "cache-control": "no-cache"})
        response.content_type, response.charset = "text/event-stream", "utf-8"
        await response.prepare(request)
        stream = b"".join(_wire(event) for event in answer.events)
        for piece in _torn(stream, len(answer.events), rng):
            await response.write(piece)
            await asyncio.sleep(self._pace_s * rng.uniform(0.2, 1.8))
        if answer.script == "cut" and request.transport:
            request.transport.close()
        return response


# ── What is asked ─────────────────────────────────────────────────────────────────────────────────────────────────────


def prose(rng: Random, characters: int) -> str:
    """So much text that nobody needs to read."""
    return " ".join(rng.choices(_TEXT.split(), k=characters // 4 + 1))[:characters]


def tokens_of(text: str) -> int:
    """The provider's count of tokens; its callers can only guess."""
    return -(-len(text.encode()) * 10 // 38)


class _Block(NamedTuple):
    text: str
    cached_for: str


def _blocks(body: dict[str, Any]) -> Iterator[_Block]:
    """All text of a prompt, in the order in which it is cached."""
    system = body.get("system", [])
    for content in (system, *(message["content"] for message in body["messages"])):
        blocks: list[dict[str, Any]] = [{"text": content}] if isinstance(content, str) else content
        for block in blocks:
            control = block.get("cache_control")
            yield _Block(block["text"], control.get("ttl", "5m") if control else "")


# ── What is answered ──────────────────────────────────────────────────────────────────────────────────────────────────


class _Answer(NamedTuple):
    script: Script
    usage: Usage
    text: str
    events: list[dict[str, Any]]


def _answer(script: Script, model: str, prompt: Usage, rng: Random) -> _Answer:
    tokens = rng.randint(20, 260)
    text = "" if script == "refusal" else prose(rng, round(tokens * 3.7))
    first = msgspec.structs.replace(prompt, output_tokens=1 if script == "refusal" else rng.randint(1, 8))
    total = _total(script, prompt, 0 if script == "refusal" else tokens, rng)
    said = _said(text, rng)
    events = [_message_start(model, first, rng), {"type": "ping"}, *said]
    if script in ENDS_EARLY:
        events = events[: rng.randint(3, len(events) - 1)]
        sent = sum(len(event["delta"]["text"]) for event in events if event["type"] == "content_block_delta")
        total = msgspec.structs.replace(first, output_tokens=max(first.output_tokens or 0, -(-sent // 4)))
        if script == "overloaded_midway":
            events.append({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}})
    else:
        events += [*_message_deltas(script, total), {"type": "message_stop"}]
    return _Answer(script, total, text, events)


def _total(script: Script, prompt: Usage, output_tokens: int, rng: Random) -> Usage:
    total = msgspec.structs.replace(prompt, output_tokens=output_tokens)
    if script != "tools":
        return total
    return msgspec.structs.replace(
        total,
        input_tokens=(prompt.input_tokens or 0) + rng.randint(2000, 8000),
        server_tool_use=ServerToolUse(web_search_requests=rng.randint(1, 2), web_fetch_requests=0),
    )


def _message_start(model: str, first: Usage, rng: Random) -> dict[str, Any]:
    message: dict[str, Any] = {
        "id": f"msg_{rng.getrandbits(96):024x}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": counts_of(first),
    }
    return {"type": "message_start", "message": message}


def _said(text: str, rng: Random) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    ]
    while text:
        size = rng.randint(20, 90)
        delta = {"type": "text_delta", "text": text[:size]}
        events.append({"type": "content_block_delta", "index": 0, "delta": delta})
        text = text[size:]
    return [*events, {"type": "content_block_stop", "index": 0}]


def _message_deltas(script: Script, total: Usage) -> list[dict[str, Any]]:
    usage = counts_of(total)
    usage.pop("cache_creation", None)
    usage.pop("service_tier", None)
    ends = {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": usage}
    match script:
        case "deltas":
            early = {"output_tokens": (total.output_tokens or 0) * 2, "input_tokens": None}
            future = {"type": "future_event", "usage": {"input_tokens": 99, "output_tokens": 99}}
            return [ends | {"usage": early}, future, ends]
        case "zeros":
            return [ends | {"usage": usage | {name: 0 for name in usage if name.endswith("input_tokens")}}]
        case "refusal":
            return [ends | {"delta": {"stop_reason": "refusal", "stop_sequence": None}}]
    return [ends]


# ── How it is sent ────────────────────────────────────────────────────────────────────────────────────────────────────


def _wire(event: dict[str, Any]) -> bytes:
    return f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n".encode()


def _torn(stream: bytes, pieces: int, rng: Random) -> Iterator[bytes]:
    """The stream in about so many pieces, cut where a network would cut: anywhere."""
    start = 0
    for end in sorted(rng.sample(range(1, len(stream)), pieces - 1)):
        yield stream[start:end]
        start = end
    yield stream[start:]


def _plain(request_id: str, model: str, answer: _Answer) -> web.Response:
    message = {
        "id": f"msg_{request_id[4:]}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [{"type": "text", "text": answer.text}],
        "stop_reason": "refusal" if answer.script == "refusal" else "end_turn",
        "stop_sequence": None,
        "usage": counts_of(answer.usage),
    }
    return web.json_response(message, headers={"request-id": request_id})


def _error(status: int, kind: str, message: str, request_id: str) -> web.Response:
    body = {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}
    headers = {"request-id": request_id} | ({"retry-after": "1"} if status == 429 else {})
    return web.json_response(body, status=status, headers=headers)
