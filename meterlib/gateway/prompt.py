"""What the body of a messages request says, as far as metering needs it. Pure.

The body itself goes to the provider byte for byte; nothing here changes it, and a field that is not named here is
between the client and the provider.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TypeAlias

import msgspec
from msgspec import Raw

from meterlib.core.checks import AMOUNT_MAX, check_text
from meterlib.errors import InvalidInput

MODEL_BYTES_MAX = 256
SPEED_BYTES_MAX = 128

TTL_S = 300
"""How long the provider keeps a cached prefix that nobody uses, unless the request says otherwise."""
TTL_LONG_S = 3600

Block: TypeAlias = dict[str, Raw]
"""A tool, a block of the system or of a message: its fields as they came, without `cache_control`, with `role`."""


class Breakpoint(msgspec.Struct, frozen=True):
    """The prompt up to and including block `at` is to be cached, for `ttl_s` seconds."""

    at: int
    ttl_s: int


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """A request's settings, and its content in the order in which the provider caches it.

    Blocks are equal where the provider takes them for the same: with or without `cache_control`, which clients move
    from message to message as a conversation grows, and as plain text or as a list of one block of text.

    Attributes:
        model: the model asked for.
        stream: the answer is to come as events.
        max_tokens: the most output asked for; None where no such number is told.
        speed: as asked for; None where nothing was.
        blocks: tools, then the system, then the messages.
        system_at: where in `blocks` the system begins; as many tools there are.
        messages_at: where in `blocks` the messages begin.
        breakpoints: where the prompt is to be cached, in order. That of automatic caching (`cache_control` of the whole
            request) is one of them.
        settings: whatever else decides whether cached messages are found again: the choice of tools, thinking, and
            whether there is an image anywhere.
        must_use_tool: the model is not free to answer without a tool.
    """

    model: str
    stream: bool
    max_tokens: int | None
    speed: str | None
    blocks: list[Block]
    system_at: int
    messages_at: int
    breakpoints: tuple[Breakpoint, ...]
    settings: bytes
    must_use_tool: bool


def prompt_of(body: bytes) -> Prompt:
    """Read the body of a request.

    Raises:
        InvalidInput: it is no JSON object in UTF-8, names no acceptable `model`, or its `stream` is no boolean. The
            provider would refuse it too.
    """
    told = _read(body)
    stream = bytes(told.stream)
    if stream not in (b"", b"true", b"false"):
        raise InvalidInput("stream", "must be true or false")
    tools, system, messages = _tools_of(told), _system_of(told), _messages_of(told)
    blocks = [*tools, *system, *messages]
    breakpoints, images = _take_apart(blocks)
    choice = bytes(told.tool_choice)
    return Prompt(
        model=_model_of(told.model),
        stream=stream == b"true",
        max_tokens=_count_of(told.max_tokens),
        speed=_speed_of(told.speed),
        blocks=blocks,
        system_at=len(tools),
        messages_at=len(tools) + len(system),
        breakpoints=_with_automatic(breakpoints, blocks, told.cache_control),
        settings=b"\n".join((choice, bytes(told.thinking), b"images" if images else b"")),
        must_use_tool=_type_of(choice) in ("any", "tool"),
    )


# ── Shapes ────────────────────────────────────────────────────────────────────────────────────────────────────────────

_ABSENT = Raw(b"")


class _Settings(msgspec.Struct):
    model: Raw = _ABSENT
    stream: Raw = _ABSENT
    max_tokens: Raw = _ABSENT
    speed: Raw = _ABSENT
    tool_choice: Raw = _ABSENT
    thinking: Raw = _ABSENT
    cache_control: Raw = _ABSENT


class _Message(msgspec.Struct):
    role: str
    content: str | list[Block]


class _Body(_Settings):
    tools: list[Block] | None = None
    system: str | list[Block] | None = None
    messages: list[_Message] = []


class _OddBody(_Settings):
    """Anything goes: what the provider thinks of a strange prompt is its own affair."""

    tools: Raw = _ABSENT
    system: Raw = _ABSENT
    messages: Raw = _ABSENT


class _Typed(msgspec.Struct):
    type: str = ""
    ttl: str = ""


_body = msgspec.json.Decoder(_Body)
_odd_body = msgspec.json.Decoder(_OddBody)
_typed = msgspec.json.Decoder(_Typed)
_string = msgspec.json.Decoder(str)
_integer = msgspec.json.Decoder(int)
_encode = msgspec.json.Encoder().encode


def _read(body: bytes) -> _Body | _OddBody:
    try:
        if not body.isascii():
            body.decode()  # fields that stay raw are not looked into
        try:
            return _body.decode(body)
        except msgspec.ValidationError:
            return _odd_body.decode(body)
    except RecursionError:
        raise InvalidInput("body", "is nested too deeply") from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise InvalidInput("body", f"is no JSON object in UTF-8: {error}") from None


# ── Settings ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _model_of(told: Raw) -> str:
    if not told:
        raise InvalidInput("model", "is missing")
    try:
        model = _string.decode(told)
    except msgspec.MsgspecError:
        raise InvalidInput("model", "must be text") from None
    return check_text(model, "model", MODEL_BYTES_MAX)


def _count_of(told: Raw) -> int | None:
    if not told:
        return None
    with suppress(msgspec.MsgspecError):
        count = _integer.decode(told)
        return count if 0 <= count <= AMOUNT_MAX else None
    return None


def _speed_of(told: Raw) -> str | None:
    if not told:
        return None
    with suppress(msgspec.MsgspecError, InvalidInput):
        return check_text(_string.decode(told), "speed", SPEED_BYTES_MAX)
    return None


def _type_of(told: bytes) -> str:
    if not told:
        return ""
    with suppress(msgspec.MsgspecError):
        return _typed.decode(told).type
    return ""


# ── Content ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_TEXT = Raw(b'"text"')


def _tools_of(told: _Body | _OddBody) -> Sequence[Block]:
    return _odd(told.tools) if isinstance(told, _OddBody) else told.tools or ()


def _system_of(told: _Body | _OddBody) -> Sequence[Block]:
    return _odd(told.system) if isinstance(told, _OddBody) else _content_of(told.system or [])


def _messages_of(told: _Body | _OddBody) -> Sequence[Block]:
    if isinstance(told, _OddBody):
        return _odd(told.messages)
    blocks: list[Block] = []
    roles: dict[str, Raw] = {}
    for message in told.messages:
        role = roles.get(message.role) or roles.setdefault(message.role, Raw(_encode(message.role)))
        content = _content_of(message.content)
        for block in content:
            block["role"] = role
        blocks += content
    return blocks


def _odd(told: Raw) -> Sequence[Block]:
    return [{"odd": told}] if told else []


def _content_of(content: str | list[Block]) -> list[Block]:
    return [{"type": _TEXT, "text": Raw(_encode(content))}] if isinstance(content, str) else content


def _take_apart(blocks: list[Block]) -> tuple[list[Breakpoint], bool]:
    """Take `cache_control` out of the blocks; tell where it stood, and whether one of them is or has an image."""
    breakpoints = []
    images = False
    for at, block in enumerate(blocks):
        if "cache_control" in block:
            ttl_s = _ttl_s_of(block.pop("cache_control"))
            if ttl_s:
                breakpoints.append(Breakpoint(at, ttl_s))
        if "text" in block:
            text = bytes(block["text"])
            if b"\\" in text and (b"\\u" in text or b"\\/" in text):
                # Some clients escape more than JSON needs. Plain text was decoded above, so this must look the same.
                block["text"] = _plainly(text)
        elif "content" in block:
            content = bytes(block["content"])
            images = images or (content.startswith(b"[") and b'"image"' in content)
        elif "source" in block:
            images = images or bytes(block.get("type", b"")) == b'"image"'
    return breakpoints, images


def _plainly(text: bytes) -> Raw:
    with suppress(msgspec.MsgspecError):
        return Raw(_encode(_string.decode(text)))
    return Raw(text)


def _ttl_s_of(told: Raw) -> int:
    """How long to cache; 0 for `null`, which stands for no breakpoint."""
    if not told or bytes(told) == b"null":
        return 0
    with suppress(msgspec.MsgspecError):
        return TTL_LONG_S if _typed.decode(told).ttl == "1h" else TTL_S
    return TTL_S


def _with_automatic(breakpoints: list[Breakpoint], blocks: list[Block], told: Raw) -> tuple[Breakpoint, ...]:
    """All breakpoints: automatic caching is one at the last block that can have one."""
    ttl_s = _ttl_s_of(told)
    if ttl_s:
        at = len(blocks) - 1
        while at >= 0 and not _is_cacheable(blocks[at]):
            at -= 1
        if at >= 0 and at not in (taken.at for taken in breakpoints):
            breakpoints.append(Breakpoint(at, ttl_s))
            breakpoints.sort(key=lambda taken: taken.at)
    return tuple(breakpoints)


def _is_cacheable(block: Block) -> bool:
    if _type_of(_encode(block)) in ("thinking", "redacted_thinking"):
        return False
    return bytes(block.get("text", b'" "')) != b'""'
