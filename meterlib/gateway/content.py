"""How much a prompt's content weighs: its text in bytes, the rest in tokens. Pure.

Nobody outside knows the tokenizer of the Claude models, so how many tokens a text is can only be learnt: it is the
text's weight times a ratio. The weight of a text is its bytes, put right for what kind of bytes they are, so that one
ratio serves code, data and prose. All that is no text has published sizes in tokens.
"""

from __future__ import annotations

import re
from binascii import Error, a2b_base64
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from math import ceil, sqrt
from typing import NamedTuple

import msgspec
from msgspec import Raw

from meterlib.gateway.prompt import Block

BLOCK_TOKENS = 2
"""What separates a block from the next."""
TOOL_TOKENS = 30
"""What a tool's definition is framed with, told from the one example whose tokens are published."""
IMAGE_TOKENS = 1_560
"""An image that is not in the request, or of no known format: as if it had 1920 x 1080 pixels."""
PAGE_TOKENS = 2_170
"""A page of a PDF: its text, and its image."""
PAGE_BYTES = 60_000
"""What a page takes in a PDF that does not tell how many it has."""


class Weight(NamedTuple):
    """Text by its weight, and tokens of what is no text."""

    text: float
    tokens: int


class Model(NamedTuple):
    """What is published of a model. All in tokens, but `image_edge_max` in pixels.

    Attributes:
        image_tokens_max: larger images are scaled down to this.
        image_edge_max: longer ones too.
        cached_tokens_min: shorter prefixes are not cached.
        tool_tokens: the hidden prompt that explains tools, where there is one.
        forced_tool_tokens: the same, where the model must use one.
    """

    image_tokens_max: int
    image_edge_max: int
    cached_tokens_min: int
    tool_tokens: int
    forced_tool_tokens: int


_VERSION = re.compile(r"(?<![\d.])(\d{1,2})(?:[-.](\d{1,2}))?(?!\d)")
_FAMILY = re.compile(r"fable|haiku|mythos|opus|sonnet")
_CACHED_TOKENS_MIN: Mapping[tuple[str, int, int], int] = {
    ("opus", 5, 0): 512, ("fable", 5, 0): 512, ("mythos", 5, 0): 512,
    ("opus", 4, 7): 2_048, ("haiku", 3, 5): 2_048, ("haiku", 3, 0): 2_048, ("mythos", 0, 0): 2_048,
    ("opus", 4, 5): 4_096, ("opus", 4, 6): 4_096, ("haiku", 4, 5): 4_096,
}  # fmt: skip
_TOOL_TOKENS: Mapping[tuple[str, int, int], tuple[int, int]] = {
    ("opus", 5, 0): (286, 406),
    ("sonnet", 4, 5): (496, 588),
    ("haiku", 3, 5): (264, 340),
    ("haiku", 3, 0): (264, 340),
}


@lru_cache(maxsize=1024)
def model_of(name: str) -> Model:
    """What is published of the model of this name; of one that nobody knows yet, what holds for most."""
    version = _VERSION.search(name)
    number = (int(version[1]), int(version[2] or 0)) if version else (0, 0)
    family = _FAMILY.search(name)
    key = (family[0] if family else "", *number)
    sharp = number >= (4, 7)
    return Model(
        image_tokens_max=4_784 if sharp else 1_568,
        image_edge_max=2_576 if sharp else 1_568,
        cached_tokens_min=_CACHED_TOKENS_MIN.get(key, 1_024),
        tool_tokens=_TOOL_TOKENS.get(key, (470, 560))[0],
        forced_tool_tokens=_TOOL_TOKENS.get(key, (470, 560))[1],
    )


# ── Blocks ────────────────────────────────────────────────────────────────────────────────────────────────────────────

_PLAIN = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ "
_ASCII = bytes(range(128))


def weigh(blocks: Iterable[Block], model: Model) -> Weight:
    """What tools or blocks weigh together, with what separates them."""
    scale = _Scale(model)
    scale.put(blocks)
    return Weight(weigh_text(b"".join(scale.texts)) + scale.hidden, scale.tokens)


def weigh_text(text: bytes) -> float:
    """The weight of text that stands in JSON.

    Words make long tokens and everything else short ones. The factors are a least-squares fit to how the tokenizer of
    the older Claude models, which is public, cuts code, data, listings and prose in several languages. There they
    bring the error of one ratio for all kinds down from 22 % to 17 %.
    """
    dense = text.translate(None, _PLAIN)
    plain = len(text) - len(dense)
    escapes = dense.count(b"\\")  # JSON's own: the model never sees them
    beyond = 0 if dense.isascii() else len(dense.translate(None, _ASCII))
    return 0.85 * plain + 2.0 * (len(dense) - escapes - beyond) + 1.3 * beyond


class _Scale:
    """Collects text, to be weighed in one go, and tokens of what is none."""

    def __init__(self, model: Model) -> None:
        self.texts: list[Raw] = []
        self.hidden = 0.0
        self.tokens = 0
        self._model = model

    def put(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            self.tokens += BLOCK_TOKENS
            kind = bytes(block["type"]) if "type" in block else b""
            if kind == b'"text"':
                self.texts.append(block.get("text", _NOTHING))
            elif kind == b'"tool_result"':
                self._put_content(block.get("content", _NOTHING))
            elif kind in (b'"thinking"', b'"redacted_thinking"'):
                self._put_thinking(block)
            elif kind == b'"image"':
                self._put_image(block)
            elif kind == b'"document"':
                self._put_document(block)
            else:
                self._put_whole(block)

    def _put_whole(self, block: Block) -> None:
        """A tool, its use, or what is not known here: all fields, but for those that the model hardly sees."""
        if "defer_loading" in block and bytes(block["defer_loading"]) == b"true":
            self.tokens -= BLOCK_TOKENS  # not in the prompt until the model searches for it
            return
        if "input_schema" in block:
            self.tokens += TOOL_TOKENS
        self.texts += [value for name, value in block.items() if name not in ("type", "role", "id", "tool_use_id")]

    def _put_content(self, content: Raw) -> None:
        if bytes(content).startswith(b"["):
            with suppress(msgspec.MsgspecError, RecursionError):
                return self.put(_blocks.decode(content))
        self.texts.append(content)
        return None

    def _put_thinking(self, block: Block) -> None:
        """Thinking is paid for in full, but often told in its signature alone, encrypted and in base64."""
        told = block.get("thinking", _NOTHING)
        encrypted = len(bytes(block.get("signature", b""))) + len(bytes(block.get("data", b"")))
        self.hidden += max(0.0, 0.75 * 0.85 * encrypted - weigh_text(bytes(told)))
        self.texts.append(told)

    def _put_image(self, block: Block) -> None:
        size = image_size(bytes(_source_of(block).get("data", b""))[1:-1])
        self.tokens += image_tokens(*size, self._model) if size else IMAGE_TOKENS

    def _put_document(self, block: Block) -> None:
        source = _source_of(block)
        kind, data = bytes(source.get("type", b"")), source.get("data", _NOTHING)
        if kind == b'"text"':
            self.texts.append(data)
        elif kind == b'"content"':
            self._put_content(source.get("content", _NOTHING))
        else:
            self.tokens += pdf_pages(bytes(data)[1:-1]) * PAGE_TOKENS


_NOTHING = Raw(b"")
_blocks = msgspec.json.Decoder(list[Block])
_source = msgspec.json.Decoder(Block)


def _source_of(block: Block) -> Block:
    with suppress(KeyError, msgspec.MsgspecError):
        return _source.decode(block["source"])
    return {}


# ── Images and documents ──────────────────────────────────────────────────────────────────────────────────────────────

PATCH_PIXELS = 28


def image_tokens(width: int, height: int, model: Model) -> int:
    """Tokens of an image of so many pixels, which the provider scales down if it is too large."""
    scale = min(1.0, model.image_edge_max / max(width, height, 1))
    columns = ceil(width * scale / PATCH_PIXELS)
    rows = ceil(height * scale / PATCH_PIXELS)
    if columns * rows <= model.image_tokens_max:
        return columns * rows
    columns = max(1, int(sqrt(model.image_tokens_max * width / height)))
    while columns > 1 and columns * ceil(columns * height / width) > model.image_tokens_max:
        columns -= 1
    return min(columns * ceil(columns * height / width), model.image_tokens_max)


HEADER_BYTES = 64
JPEG_HEADER_BYTES = 256 << 10
"""Where the size of a photograph stands: behind its profile and its preview."""


def image_size(data: bytes) -> tuple[int, int] | None:
    """Width and height in pixels of a PNG, GIF, WebP or JPEG in base64; None if it is none."""
    head = _from_base64(data, HEADER_BYTES)
    size = None
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        size = _number(head[16:20]), _number(head[20:24])
    elif head.startswith((b"GIF87a", b"GIF89a")):
        size = _number(head[7:5:-1]), _number(head[9:7:-1])
    elif head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        size = _webp_size(head)
    elif head.startswith(b"\xff\xd8"):
        size = _jpeg_size(_from_base64(data, JPEG_HEADER_BYTES))
    return size if size and min(size) > 0 else None


def _from_base64(data: bytes, wanted: int) -> bytes:
    """At least so many of the bytes, as far as there are any."""
    told = data[: wanted * 4 // 3 + 64].translate(None, b"\\ \r\n")
    try:
        return a2b_base64(told[: len(told) // 4 * 4])
    except Error:
        return b""


def _number(digits: bytes) -> int:
    return int.from_bytes(digits, "big")


def _webp_size(head: bytes) -> tuple[int, int] | None:
    match head[12:16]:
        case b"VP8X":
            return _number(head[26:23:-1]) + 1, _number(head[29:26:-1]) + 1
        case b"VP8L":
            bits = _number(head[24:20:-1])
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            return _number(head[27:25:-1]) & 0x3FFF, _number(head[29:27:-1]) & 0x3FFF
    return None


def _jpeg_size(head: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 9 <= len(head) and head[at] == 0xFF:
        marker = head[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return _number(head[at + 7 : at + 9]), _number(head[at + 5 : at + 7])
        # Markers may be padded with more 0xFF.
        at += 1 if marker == 0xFF else 2 + max(2, _number(head[at + 2 : at + 4]))
    return None


_PDF_PAGES = re.compile(rb"/Count\s+(\d{1,5})\b")
PDF_LOOKED_AT_BYTES = 256 << 10
PDF_PAGES_MAX = 600


def pdf_pages(data: bytes) -> int:
    """About how many pages a PDF in base64 has: by its own word if it stands at either end, else by its size."""
    size = len(data) * 3 // 4
    ends = _from_base64(data, PDF_LOOKED_AT_BYTES)
    if len(ends) < size:
        ends += _from_base64(data[-(PDF_LOOKED_AT_BYTES // 3 * 4) :], PDF_LOOKED_AT_BYTES)
    told = max((int(count) for count in _PDF_PAGES.findall(ends)), default=0)
    return max(1, min(told or round(size / PAGE_BYTES), PDF_PAGES_MAX))
