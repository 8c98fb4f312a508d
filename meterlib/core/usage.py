"""What a call used, in the Claude API's own words, and the formulas that turn it into amounts by unit."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import msgspec
from msgspec.structs import astuple, force_setattr

from meterlib.core.checks import AMOUNT_MAX, check_amount, check_text, shown
from meterlib.errors import InvalidInput


class _Counts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Integers that are known (0 included) or not (None)."""

    def __post_init__(self) -> None:
        for position, value in enumerate(astuple(self)):
            if value is None or (type(value) is int and 0 <= value <= AMOUNT_MAX):
                continue
            name = self.__struct_fields__[position]
            if name not in _NO_COUNTS:
                check_amount(value, f"usage.{name}")


class CacheCreation(_Counts, frozen=True, kw_only=True, omit_defaults=True):
    """`cache_creation_input_tokens` split by the cache's time to live; a split, not an addition."""

    ephemeral_5m_input_tokens: int | None = None
    ephemeral_1h_input_tokens: int | None = None


class OutputTokensDetails(_Counts, frozen=True, kw_only=True, omit_defaults=True):
    """Parts of `output_tokens`; already counted there."""

    thinking_tokens: int | None = None


class ServerToolUse(_Counts, frozen=True, kw_only=True, omit_defaults=True):
    """Requests that the provider's own tools made."""

    web_search_requests: int | None = None
    web_fetch_requests: int | None = None
    code_execution_requests: int | None = None


class Iteration(_Counts, frozen=True, kw_only=True, omit_defaults=True):
    """One pass within a call. Tokens of `compaction` and `advisor_message` are not in the call's own numbers."""

    type: str = "message"
    model: str | None = None
    input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation: CacheCreation | None = None
    output_tokens: int | None = None


_PARTS: Mapping[str, type] = {
    "cache_creation": CacheCreation,
    "output_tokens_details": OutputTokensDetails,
    "server_tool_use": ServerToolUse,
}
_NO_COUNTS = {"type", "model", "service_tier", "speed", "inference_geo", "iterations", "amounts", *_PARTS}

_NONE_KNOWN = (None, None, None)
_UNIT = re.compile(r"[a-z][a-z0-9_]{0,63}")


class Usage(_Counts, frozen=True, kw_only=True, omit_defaults=True):
    """Token counts of one call; names and nesting are the Claude API's.

    A number that is not known is None, never 0: a limit then goes on counting what was held for it.

    `input_tokens`, `cache_creation_input_tokens` and `cache_read_input_tokens` are disjoint; the prompt is their sum.
    `amounts` holds whole numbers of any other unit that a limit counts, such as `{"cost_nanousd": 1_250_000}`.
    `requests` is told only where one usage stands for several calls, or for none; otherwise it is one.

    Raises:
        InvalidInput: a number is negative, not an integer, or 2^53 and more.
    """

    input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    output_tokens: int | None = None
    cache_creation: CacheCreation | None = None
    output_tokens_details: OutputTokensDetails | None = None
    server_tool_use: ServerToolUse | None = None
    service_tier: str | None = None
    speed: str | None = None
    inference_geo: str | None = None
    iterations: tuple[Iteration, ...] = ()
    requests: int | None = None
    amounts: dict[str, int] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.service_tier, self.speed, self.inference_geo) != _NONE_KNOWN:
            self._check_texts()
        if (self.cache_creation, self.output_tokens_details, self.server_tool_use) != _NONE_KNOWN:
            self._check_parts()
        if self.iterations != ():
            self._check_iterations()
        if self.amounts != {}:
            self._check_amounts()

    def _check_texts(self) -> None:
        for name in ("service_tier", "speed", "inference_geo"):
            text = getattr(self, name)
            if text is not None:
                check_text(text, f"usage.{name}", 128)

    def _check_parts(self) -> None:
        for name, kind in _PARTS.items():
            part = getattr(self, name)
            if part is not None and not isinstance(part, kind):
                raise InvalidInput(f"usage.{name}", f"{kind.__name__} is needed, not {type(part).__name__}")

    def _check_iterations(self) -> None:
        if not isinstance(self.iterations, list | tuple):
            problem = f"a list of Iteration is needed, not {type(self.iterations).__name__}"
            raise InvalidInput("usage.iterations", problem)
        for position, iteration in enumerate(self.iterations):
            if not isinstance(iteration, Iteration):
                problem = f"an Iteration is needed, not {type(iteration).__name__}"
                raise InvalidInput(f"usage.iterations[{position}]", problem)

    def _check_amounts(self) -> None:
        if not isinstance(self.amounts, Mapping):
            problem = f"a mapping of units to whole numbers is needed, not {type(self.amounts).__name__}"
            raise InvalidInput("usage.amounts", problem)
        # A copy: what the caller does to its own dict later must not change what was checked.
        force_setattr(self, "amounts", dict(self.amounts))
        for unit, amount in self.amounts.items():
            if not isinstance(unit, str) or not _UNIT.fullmatch(unit):
                raise InvalidInput("usage.amounts", f"{shown(unit)} is no unit: lower-case letters, digits and _")
            if unit in FORMULAS:
                raise InvalidInput(f"usage.amounts.{unit}", "this unit is worked out from the token counts")
            check_amount(amount, f"usage.amounts.{unit}")


def _requests(usage: Usage) -> int:
    return 1 if usage.requests is None else usage.requests


def _input_tokens(usage: Usage) -> int | None:
    """What input-token limits count: uncached input and cache writes, but no cache reads.

    As the Claude API's own limits do, and Buildkite's `total_input_token`. Compaction and advisor passes are counted
    and billed besides the numbers of the call.
    """
    if usage.input_tokens is None and usage.cache_creation_input_tokens is None:
        return None
    total = (usage.input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
    for iteration in usage.iterations:
        if iteration.type in ("compaction", "advisor_message"):
            total += (iteration.input_tokens or 0) + (iteration.cache_creation_input_tokens or 0)
    return total


def _output_tokens(usage: Usage) -> int | None:
    if not usage.iterations or usage.output_tokens is None:
        return usage.output_tokens
    extra = (i.output_tokens or 0 for i in usage.iterations if i.type in ("compaction", "advisor_message"))
    return usage.output_tokens + sum(extra)


def _total_tokens(usage: Usage) -> int | None:
    """`input_tokens` and `output_tokens` together, as those units count them."""
    of_input, of_output = _input_tokens(usage), _output_tokens(usage)
    return None if of_input is None and of_output is None else (of_input or 0) + (of_output or 0)


FORMULAS: Mapping[str, Callable[[Usage], int | None]] = {
    "requests": _requests,
    "input_tokens": _input_tokens,
    "output_tokens": _output_tokens,
    "total_tokens": _total_tokens,
}
"""What each built-in unit counts; a unit of any other name is looked up in `Usage.amounts`."""


def amount_of(usage: Usage, unit: str) -> int | None:
    """How much of a unit a usage amounts to, as far as the store can count; None where that is not known."""
    formula = FORMULAS.get(unit)
    amount = formula(usage) if formula else usage.amounts.get(unit)
    return AMOUNT_MAX if amount is not None and amount > AMOUNT_MAX else amount


def amounts_of(usage: Usage) -> tuple[tuple[str, int], ...]:
    """All known amounts of a usage by unit, also of what nothing limits here: a hold may be of another policy."""
    known = [(unit, amount_of(usage, unit)) for unit in FORMULAS]
    return (*[(unit, amount) for unit, amount in known if amount is not None], *usage.amounts.items())
