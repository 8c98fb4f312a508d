"""What a call used, in the Claude API's own words, and the formulas that turn it into amounts by unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec
from msgspec.structs import astuple

from meterlib.core.checks import check_amount
from meterlib.errors import InvalidInput


class _Counts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Integers that are known (0 included) or not (None)."""

    def __post_init__(self) -> None:
        for position, value in enumerate(astuple(self)):
            if value is None or (type(value) is int and 0 <= value <= 9007199254740991):
                continue
            if type(value) is not str and not isinstance(value, _NESTED):
                check_amount(value, f"usage.{self.__struct_fields__[position]}")


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


_NESTED = (_Counts, tuple, list, dict)


class Usage(_Counts, frozen=True, kw_only=True, omit_defaults=True):
    """Token counts of one call; names and nesting are the Claude API's.

    A number that is not known is None, never 0: a limit then goes on counting what was held for it.

    `input_tokens`, `cache_creation_input_tokens` and `cache_read_input_tokens` are disjoint; the prompt is their sum.
    `amounts` holds whole numbers of any other unit that a limit counts, such as `{"cost_nanousd": 1_250_000}`.

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
    amounts: dict[str, int] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        for unit, amount in self.amounts.items():
            if unit in FORMULAS:
                raise InvalidInput(f"usage.amounts.{unit}", "this unit is worked out from the token counts")
            check_amount(amount, f"usage.amounts.{unit}")


def _requests(usage: Usage) -> int:
    return 1


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
    """How much of a unit a usage amounts to; None where that is not known."""
    formula = FORMULAS.get(unit)
    return formula(usage) if formula else usage.amounts.get(unit)


def amounts_of(usage: Usage, units: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """The known amounts of a usage in the given units."""
    known = ((unit, amount_of(usage, unit)) for unit in units)
    return tuple((unit, min(amount, 9007199254740991)) for unit, amount in known if amount is not None)
