"""What of a ledger entry is to be priced: its passes through models, and how much of each kind they used. Pure.

A call is one pass: its own numbers, by the model that served it. Further passes are in `iterations`, where the Claude
API tells them (Claude docs: compaction, advisor tool, refusals and fallback):

- `compaction` and `advisor_message` are billed besides, since the call's own numbers leave them out;
- where a `fallback_message` served the call, an attempt before it that was declined after it had begun to answer is
  billed besides; one that was declined before any output is not billed;
- all others are parts of the call's own numbers, and only looked at to see whether they add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeAlias

from meterlib.billing.prices.prices import GLOBAL, STANDARD
from meterlib.core.ledger import LedgerEntry

PROVIDER = "anthropic"
"""Whose prices hold for a call that does not say who served it: meterlib fronts the Claude API."""

UNKNOWN = "unknown"
"""Kind of what a usage tells under names that nobody here knows; there is no price for it."""

INPUT, OUTPUT, WRITE_5M, WRITE_1H, WRITE_UNSPLIT, READ, SEARCH, FETCH, EXECUTION, OTHER = range(10)
KINDS = (
    "input",
    "output",
    "cache_write_5m",
    "cache_write_1h",
    "cache_write_5m",
    "cache_read",
    "web_search",
    "web_fetch",
    "code_execution",
    UNKNOWN,
)
"""The kind of each slot. A cache write of unknown time to live is priced as one of five minutes, the API's default."""

SPLIT_UNKNOWN = "split_unknown"
SPLIT_CONTRADICTS = "split_contradicts"
PASSES_DIFFER = "passes_differ"
TIER_OF_DIFFERENCE = "tier_of_difference"
TIER_OF_AVERAGE = "tier_of_average"
DECLINED = "declined"

Amounts: TypeAlias = tuple[int | None, ...]
"""How much of each slot of `KINDS`; None where that is not known, which is not nothing."""


class Pass(NamedTuple):
    """One run of a model within a call.

    Attributes:
        number: 0 the call's own numbers, then the others in their order.
        kind: `call`, `compaction`, `advisor_message` or `message` (a declined attempt).
        provider: whose prices hold.
        model: that did it; empty if nobody told.
        variant: how it was served, as price books call it.
        geo: where, if that was confined to a place; else `global`.
        prompt: tokens of its whole prompt, which decide about the tier; of several calls' together, their average.
        amounts: what it used.
        flags: what is doubtful about the numbers, separated by commas.
        unknown: names behind the amount of the kind `unknown`.
    """

    number: int
    kind: str
    provider: str
    model: str
    variant: str
    geo: str
    prompt: int
    amounts: Amounts
    flags: str = ""
    unknown: str = ""


def passes_of(entry: LedgerEntry) -> tuple[Pass, ...]:
    """What of an entry is to be priced; nothing of one that tells that nothing was used."""
    if entry.kind in ("cancelled", "expired"):
        return ()
    model = entry.facts.get("model") or entry.attributes.get("model", "")
    provider = entry.attributes.get("provider") or PROVIDER
    return passes_of_usage(entry.usage, provider, model, signed=entry.kind == "adjusted")


def passes_of_usage(
    usage: Mapping[str, object], provider: str, model: str, *, signed: bool = False
) -> tuple[Pass, ...]:
    """What of a usage is to be priced.

    Args:
        usage: in the Claude API's names and nesting.
        provider: whose prices hold.
        model: that served the call.
        signed: the usage is a difference: what it does not name did not change, and numbers may be negative.
    """
    if usage and usage.keys() <= {"amounts", "requests"} and not usage.get("requests"):
        return ()  # no call, but units of one's own, which no book has prices for
    iterations = _mappings(usage.get("iterations"))
    served = next((str(one["model"]) for one in reversed(iterations) if _fell_back(one) and one.get("model")), model)
    amounts, flag, unknown = _amounts(usage, signed)
    flags = [flag] if flag else []
    if iterations and not signed and not _adds_up(usage, iterations):
        flags.append(PASSES_DIFFER)
    variant, geo = variant_of(usage.get("service_tier"), usage.get("speed")), geo_of(usage.get("inference_geo"))
    prompt = -(-_prompt(amounts) // max(_count(usage, "requests"), 1))  # of several calls: what one of them has
    own = Pass(0, "call", provider, served, variant, geo, prompt, amounts, ",".join(flags), unknown)
    return (own, *_others(own, usage, iterations))


def _others(own: Pass, usage: Mapping[str, object], iterations: list[Mapping[str, object]]) -> Iterator[Pass]:
    """The passes that are billed besides the call's own numbers."""
    last_fallback = max((at for at, one in enumerate(iterations) if _fell_back(one)), default=-1)
    for at, one in enumerate(iterations):
        kind = str(one.get("type") or "message")
        model = str(one.get("model") or own.model)
        declined = at < last_fallback and model != own.model
        if declined and not _count(one, "output_tokens"):
            continue
        if not declined and kind not in ("compaction", "advisor_message"):
            continue
        amounts, flag, unknown = _amounts(one, signed=True)
        flags = ",".join(word for word in (flag, DECLINED if declined else "") if word)
        # How fast the call was served says nothing of other models; that it was part of a batch does.
        speed = usage.get("speed") if model == own.model or declined else None
        variant = variant_of(usage.get("service_tier"), speed)
        yield Pass(at + 1, kind, own.provider, model, variant, own.geo, _prompt(amounts), amounts, flags, unknown)


# ── Numbers ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_TEXTS = {"service_tier", "speed", "inference_geo", "type", "model"}
_COUNTED = {"input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"}
_TOOLS = {"web_search_requests": SEARCH, "web_fetch_requests": FETCH, "code_execution_requests": EXECUTION}
_PARTS = {"cache_creation", "output_tokens_details", "server_tool_use", "iterations", "amounts"}
_SPLIT = {"ephemeral_5m_input_tokens": WRITE_5M, "ephemeral_1h_input_tokens": WRITE_1H}


def _amounts(usage: Mapping[str, object], signed: bool) -> tuple[Amounts, str, str]:
    """How much of each kind, what is doubtful about it, and the names that are not known."""
    amounts: list[int | None] = [0] * len(KINDS)
    for name, slot in (("input_tokens", INPUT), ("output_tokens", OUTPUT)):
        told = usage.get(name)
        amounts[slot] = told if type(told) is int else 0 if signed else None
    amounts[READ] = _count(usage, "cache_read_input_tokens")
    flag = _writes(usage, amounts, signed)
    tools = usage.get("server_tool_use")
    unknown = {}
    for name, value in tools.items() if isinstance(tools, Mapping) else ():
        if name in _TOOLS:
            amounts[_TOOLS[name]] = value if type(value) is int else 0
        elif type(value) is int and value:
            unknown[f"server_tool_use.{name}"] = value
    for name, value in usage.items():
        if type(value) is int and value and name not in _COUNTED and name != "requests":
            unknown[name] = value
        elif isinstance(value, Mapping) and name not in _PARTS:
            unknown |= {f"{name}.{part}": number for part, number in value.items() if type(number) is int and number}
    amounts[OTHER] = sum(unknown.values())
    return tuple(amounts), flag, ", ".join(sorted(unknown))


def _writes(usage: Mapping[str, object], amounts: list[int | None], signed: bool) -> str:
    """Fill in the cache writes: split as far as that is told, and the rest of their total."""
    split = usage.get("cache_creation")
    told = split if isinstance(split, Mapping) else {}
    for name, slot in _SPLIT.items():
        amounts[slot] = _count(told, name)
    known = sum(_count(told, name) for name in _SPLIT)
    total = usage.get("cache_creation_input_tokens")
    rest = total - known if type(total) is int else 0
    if rest < 0 and not signed:
        return SPLIT_CONTRADICTS  # the parts are more than their sum: they are taken, being what the prices are of
    amounts[WRITE_UNSPLIT] = rest
    return SPLIT_UNKNOWN if rest else ""


def _prompt(amounts: Amounts) -> int:
    return sum(amounts[slot] or 0 for slot in (INPUT, WRITE_5M, WRITE_1H, WRITE_UNSPLIT, READ))


def _adds_up(usage: Mapping[str, object], iterations: list[Mapping[str, object]]) -> bool:
    """Whether the parts of the call's own numbers are those numbers."""
    own = [one for one in iterations if one.get("type", "message") in ("message", "fallback_message")]
    if any(_fell_back(one) for one in own):
        own = [one for one in own if _fell_back(one)][-1:]
    return not own or all(sum(_count(one, name) for one in own) == _count(usage, name) for name in _COUNTED)


def variant_of(tier: object, speed: object) -> str:
    """How a call was served, by its `service_tier` and `speed`, as price books call it."""
    told = (str(word) for word in (tier, speed) if word and word != STANDARD)
    return "+".join(told) or STANDARD


def geo_of(place: object) -> str:
    """Where a call was served, by its `inference_geo`, as price books call it."""
    return GLOBAL if not place or place in (GLOBAL, "not_available") else str(place)


def _fell_back(iteration: Mapping[str, object]) -> bool:
    return iteration.get("type") == "fallback_message"


def _count(told: Mapping[str, object], name: str) -> int:
    value = told.get(name)
    return value if type(value) is int else 0


def _mappings(value: object) -> list[Mapping[str, object]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list | tuple) else []
