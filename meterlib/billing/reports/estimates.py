"""How good the estimates before the calls were, told from ledger entries. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import ceil

import msgspec

from meterlib.billing.reports.report import Group, Grouped
from meterlib.core.ledger import LedgerEntry
from meterlib.core.usage import Usage, amount_of

ESTIMATED_INPUT_TOKENS = "estimated_input_tokens"
"""The fact of a call that tells what was estimated before it, where more than that was held or less."""


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """What calls were charged of input tokens, by what was estimated: 1 is as estimated, 2 is twice as much.

    Attributes:
        group: a value for each thing grouped by, None where the calls had none.
        calls: settled ones of which both numbers are known.
        median: half of them are at most this; None if there are none.
        p95: 95 of 100 are at most this.
    """

    group: Group
    calls: int
    median: float | None
    p95: float | None


class Estimates(Grouped["array[float]"]):
    """How charges compare with their estimates. The quantiles are exact: 8 bytes are kept for each call.

    A revision puts the provider's own numbers in the place of an estimate, so the fact `ESTIMATED_INPUT_TOKENS` goes
    before the estimate of the entry, if the call has it. Left out is usage that was estimated itself, and calls that
    the provider refused. Charges and estimates of nothing count as one token.
    """

    def _count(self, entry: LedgerEntry) -> None:
        estimated, charged = _estimated(entry), _charged(entry)
        if estimated is not None and charged is not None:
            ratios = self._groups.setdefault(self._group_of(entry), array("d"))
            ratios.append(max(charged, 1) / max(estimated, 1))

    def rows(self) -> list[Accuracy]:
        """One for each group that has such calls, in order of what is grouped by."""
        groups = sorted(self._groups.items(), key=lambda item: self._order(item[0]))
        return [_accuracy(group, ratios) for group, ratios in groups]

    def total(self) -> Accuracy:
        """All groups together."""
        return _accuracy((), [ratio for ratios in self._groups.values() for ratio in ratios])


_PROMPT = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


def _charged(entry: LedgerEntry) -> int | None:
    if entry.kind != "settled" or entry.quality == "estimated":
        return None
    # Every prompt has tokens: where none were counted, the provider refused the call.
    return _input_tokens(entry.usage) if any(entry.usage.get(name) for name in _PROMPT) else None


def _estimated(entry: LedgerEntry) -> int | None:
    told = entry.facts.get(ESTIMATED_INPUT_TOKENS, "")
    return int(told) if told.isascii() and told.isdigit() else _input_tokens(entry.estimate)


def _input_tokens(usage: Mapping[str, object]) -> int | None:
    with suppress(msgspec.ValidationError):
        return amount_of(msgspec.convert(usage, Usage), "input_tokens")
    return None


def _accuracy(group: Group, ratios: Sequence[float]) -> Accuracy:
    ordered = sorted(ratios)
    median, p95 = (ordered[ceil(len(ordered) * part) - 1] if ordered else None for part in (0.5, 0.95))
    return Accuracy(group=group, calls=len(ordered), median=median, p95=p95)
