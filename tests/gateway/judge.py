"""A stand-in for the provider that judges estimates: its own tokenizer, its own prompt cache, and agents at work.

It shares no code with the estimator. The tokenizer cuts text as byte-pair encoders do, so that a byte of JSON or code
makes more tokens than one of prose; the cache is written down from the provider's documentation, with whole prompts
as keys.
"""

from __future__ import annotations

import json
import random
import re
from base64 import b64encode
from collections.abc import Iterator
from math import ceil
from typing import Any, NamedTuple

from meterlib.core.usage import Usage

Json = dict[str, Any]

# ── The provider ──────────────────────────────────────────────────────────────────────────────────────────────────────

_PIECE = re.compile(r"(?P<word> ?[^\W\d_]+)|(?P<digits>\d+)|(?P<space>\s+)|(?P<symbols>(?:[^\w\s]|_)+)")


def tokens_of(text: str, factor: float) -> float:
    """Words in pieces of some seven letters, digits by threes, symbols by twos, and a token for each gap."""
    tokens = 0
    for piece in _PIECE.finditer(text):
        length = len(piece[0].encode())
        match piece.lastgroup:
            case "word":
                tokens += ceil(length / 7)
            case "digits":
                tokens += ceil(length / 3)
            case "symbols":
                tokens += ceil(length / 2)
            case _:
                tokens += 1
    return tokens * factor


def block_tokens(block: Json, factor: float) -> float:
    """Tokens of a tool or a block of content."""
    match block.get("type"):
        case "text":
            return 4 + tokens_of(block["text"], factor)
        case "tool_result":
            content = block["content"]
            inner = [{"type": "text", "text": content}] if isinstance(content, str) else content
            return 4 + sum(block_tokens(part, factor) for part in inner)
        case "tool_use":
            return 8 + tokens_of(block["name"] + json.dumps(block["input"]), factor)
        case "image":
            return 1_560
        case "thinking":
            return len(block["signature"]) * 0.75 / 4.2 * factor
        case _:
            return 10 + tokens_of(json.dumps(block), factor)


ROLE = '{"role"'
"""How a message's block begins, in whose JSON the role comes first; tools and system have none."""


class Entry(NamedTuple):
    ttl_s: float
    expires_s: float


class Provider:
    """One model's tokenizer, and the prompt cache of one customer."""

    def __init__(self, factor: float, cached_tokens_min: int = 1_024) -> None:
        self.factor = factor
        self.cached_tokens_min = cached_tokens_min
        self._entries: dict[str, Entry] = {}
        self._sizes: dict[str, float] = {}

    def call(self, request: Json, now_s: float) -> Usage:
        """What the call uses; from now on its prefixes are cached."""
        blocks, ends = self._flattened(request)
        has_images = any('"type": "image"' in block for block in blocks)
        prefix, prefixes = "", []
        sizes = [350.0 if request.get("tools") else 0.0]
        for block in blocks:
            # The first image to come into a conversation makes all its messages new, but not the system.
            prefix = f"{hash((prefix, block, has_images and block.startswith(ROLE))):x}"
            prefixes.append(prefix)
            sizes.append(sizes[-1] + self._size(block))
        read = self._read(prefixes, ends, now_s)
        written = read
        for at, ttl_s in ends.items():
            if sizes[at + 1] >= self.cached_tokens_min:
                self._entries.setdefault(prefixes[at], Entry(ttl_s, now_s + ttl_s))
                self._refresh(prefixes[at], now_s)
                written = max(written, at + 1)
        part = [round(sizes[read]) if read else 0, round(sizes[written]) if written else 0, round(sizes[-1])]
        return Usage(
            cache_read_input_tokens=part[0],
            cache_creation_input_tokens=part[1] - part[0],
            input_tokens=part[2] - part[1] + 3,
            output_tokens=100,
        )

    def _read(self, prefixes: list[str], ends: dict[int, float], now_s: float) -> int:
        for end in sorted(ends, reverse=True):
            for at in range(end, end - 20, -1):
                entry = self._entries.get(prefixes[at]) if at >= 0 else None
                if entry and entry.expires_s > now_s:
                    self._refresh(prefixes[at], now_s)
                    return at + 1
        return 0

    def _refresh(self, prefix: str, now_s: float) -> None:
        entry = self._entries[prefix]
        self._entries[prefix] = entry._replace(expires_s=now_s + entry.ttl_s)

    def _size(self, block: str) -> float:
        if block not in self._sizes:
            plain = json.loads(block)
            plain.pop("role", None)
            self._sizes[block] = block_tokens(plain, self.factor)
        return self._sizes[block]

    @staticmethod
    def _flattened(request: Json) -> tuple[list[str], dict[int, float]]:
        blocks = [*request.get("tools", []), *request.get("system", [])]
        for message in request["messages"]:
            content = message["content"]
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            blocks += [{"role": message["role"]} | block for block in content]
        ends: dict[int, float] = {}
        plain = []
        for at, block in enumerate(blocks):
            if "cache_control" in block:
                ends[at] = 3600.0 if block["cache_control"].get("ttl") == "1h" else 300.0
            plain.append(json.dumps({name: value for name, value in block.items() if name != "cache_control"}))
        return plain, ends


# ── What agents read ──────────────────────────────────────────────────────────────────────────────────────────────────

_ENGLISH = """
    the of and to in is that for it with as was on be at by this have from or one had not but what all were when we
    there can an your which their said if do will each about how up out them then she many some so these would other
    into has more her two like him see time could no make than first been its who now people my made over did down
    only way find use may water long little very after words called just where most know through customer
    agreement international responsibility understanding development government information organisation
"""
_IDENTIFIERS = """
    self value result index config request response handler buffer token cache limit store reserve settle parse
    encode decode total count usage error message content tenant window shard entry key path line item node
"""
WORDS, NAMES = _ENGLISH.split(), _IDENTIFIERS.split()


def prose(rng: random.Random, size: int) -> str:
    """English, more or less."""
    text = ""
    while len(text) < size:
        sentence = " ".join(rng.choices(WORDS, k=rng.randint(6, 20)))
        text += sentence.capitalize() + rng.choice([". ", ", as they say. ", ".\n\n"])
    return text


def code(rng: random.Random, size: int) -> str:
    """Python, with line numbers as editors of agents add them."""
    lines: list[str] = []
    while size > 0:
        a, b, c = rng.choices(NAMES, k=3)
        indent = "    " * rng.randint(1, 4)
        line = rng.choice(
            [f"{a}_{b} = self._{c}[{b}]", f"if {a}.{b} != {c}_max:", f"return {a}({b}, {c}={rng.randint(0, 999)})",
             f"def {a}_{b}(self, {c}: int) -> {a.capitalize()}:", f'raise {b.capitalize()}Error(f"{{{a}!r}}: no {c}")',
             f"# the {a} of the {b} may differ from that of the {c}", ""]
        )  # fmt: skip
        lines.append(f"{len(lines) + 1:6d}\t{indent}{line}\n")
        size -= len(lines[-1])
    return "".join(lines)


def data(rng: random.Random, size: int) -> str:
    """JSON of a web service."""
    rows: list[Json] = []
    while len(rows) * 110 < size:
        rows.append(
            {"id": rng.randrange(10**9), rng.choice(NAMES): rng.choice(WORDS), "ok": rng.random() < 0.5,
             "at": f"2026-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}T{rng.randint(0, 23):02d}:15:00Z",
             rng.choice(NAMES): [rng.randrange(1000) for _ in range(3)]}
        )  # fmt: skip
    return json.dumps(rows, separators=(",", ":"))


def listing(rng: random.Random, size: int) -> str:
    """Output of a shell."""
    lines: list[str] = []
    while size > 0:
        name = "/".join(rng.choices(NAMES, k=3))
        lines.append(f"-rw-r--r-- 1 root root {rng.randrange(10**5)} Nov {rng.randint(1, 30)} 10:15 {name}.py\n")
        size -= len(lines[-1])
    return "".join(lines)


KINDS = (code, code, prose, data, listing)
"""Agents read code more than anything else."""

PIXEL_ROW = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (1920).to_bytes(4, "big") + (1080).to_bytes(4, "big")

# ── Agents ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Agent:
    """Grows a conversation as Claude Code does, with breakpoints behind its system and at the last two user turns."""

    def __init__(self, rng: random.Random, *, system_size: int = 20_000, ttl: str | None = None) -> None:
        self._rng = rng
        self._control = {"type": "ephemeral"} | ({"ttl": ttl} if ttl else {})
        self._tools = [
            {"name": f"Tool{n}", "description": prose(rng, 1_000),
             "input_schema": {"type": "object", "properties": {name: {"type": "string", "description": prose(rng, 80)}
                                                               for name in rng.sample(NAMES, 4)}}}
            for n in range(12)
        ]  # fmt: skip
        self._system = [
            {"type": "text", "text": "You are an agent."},
            {"type": "text", "text": prose(rng, system_size), "cache_control": self._control},
        ]
        self._messages: list[Json] = [{"role": "user", "content": [{"type": "text", "text": prose(rng, 2_000)}]}]
        self._turns = 0

    def requests(self, model: str) -> Iterator[Json]:
        """One request after another."""
        while True:
            yield self._request(model)
            self._answer()

    def _request(self, model: str) -> Json:
        messages = list(self._messages)
        for at in (-3, -1):
            if -at <= len(messages):
                *others, last = messages[at]["content"]
                messages[at] = {"role": "user", "content": [*others, last | {"cache_control": self._control}]}
        if len(messages) > 3:  # as clients do once a text has lost its breakpoint
            messages[0] = {"role": "user", "content": messages[0]["content"][0]["text"]}
        return {"model": model, "stream": True, "max_tokens": 32_000, "tools": self._tools, "system": self._system,
                "messages": messages}  # fmt: skip

    def _answer(self) -> None:
        rng = self._rng
        self._turns += 1
        uses, results = [], []
        for n in range(rng.choice([1, 1, 1, 2, 3])):
            name = f"toolu_{self._turns}_{n}"
            uses.append({"type": "tool_use", "id": name, "name": f"Tool{n}", "input": self._input()})
            results.append({"type": "tool_result", "tool_use_id": name, "content": self._result()})
        thinking = {"type": "thinking", "thinking": "", "signature": "A" * rng.randint(300, 2_000)}
        said = {"type": "text", "text": prose(rng, rng.randint(50, 600))}
        self._messages.append({"role": "assistant", "content": [thinking, said, *uses]})
        self._messages.append({"role": "user", "content": results})

    def _input(self) -> Json:
        rng = self._rng
        if rng.random() < 0.3:
            return {"file_path": f"/srv/{rng.choice(NAMES)}.py", "new_string": code(rng, rng.randint(200, 3_000))}
        return {"command": " ".join(rng.choices(NAMES, k=5))}

    def _result(self) -> Any:
        rng = self._rng
        if rng.random() < 0.03:
            source = {"type": "base64", "media_type": "image/png", "data": b64encode(PIXEL_ROW + bytes(64)).decode()}
            return [{"type": "image", "source": source}]
        size = min(40_000, int(rng.lognormvariate(7.6, 1.1)))
        return rng.choice(KINDS)(rng, size)
