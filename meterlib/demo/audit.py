"""Whether the ledger says of a run what its provider says it served, call by call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from meterlib import AsyncMeter, LedgerEntry
from meterlib.core.ledger import counts_of
from meterlib.demo.provider import Served

FIELDS = (
    "input_tokens",
    "cache_creation_input_tokens",
    "ephemeral_5m_input_tokens",
    "ephemeral_1h_input_tokens",
    "cache_read_input_tokens",
    "output_tokens",
    "web_search_requests",
)
"""What is compared; the two `ephemeral` fields split the cache writes."""


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """The two accounts of a run and where they differ.

    Attributes:
        calls_served: how many requests the provider answered, refusals included.
        entries_settled: how many settlements the ledger has.
        entries_cancelled: how many reservations of the run ended without a request.
        provider: the sum of each field, as the provider counts.
        ledger: the sum of each field in the ledger.
        differences: everything that does not agree, in words.

    """

    calls_served: int
    entries_settled: int
    entries_cancelled: int
    provider: dict[str, int]
    ledger: dict[str, int]
    differences: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether both say the same of every call."""
        return not self.differences


async def ledger_ends(meter: AsyncMeter) -> list[int]:
    """The number of the last entry in each shard."""
    return [(await meter.head(shard)).ledger_last for shard in range(meter.shards)]


async def entries_of(meter: AsyncMeter, after: Sequence[int], reservation_ids: Iterable[str]) -> list[LedgerEntry]:
    """The entries of these reservations that stand behind `after` in each shard; others may share the ledger."""
    ours = set(reservation_ids)
    entries = []
    for shard, n in enumerate(after):
        entries += [entry async for entry in meter.ledger(shard, n) if entry.reservation_id in ours]
    return entries


def audit(entries: Sequence[LedgerEntry], served: Sequence[Served], reservation_ids: Sequence[str]) -> Audit:
    """Compare each call's entry with the provider's own count of that call."""
    settled = [entry for entry in entries if entry.kind == "settled"]
    by_request = {entry.facts.get("request_id", ""): _flat(entry.usage) for entry in settled}
    by_provider = {call.request_id: _flat(counts_of(call.usage)) for call in served}
    return Audit(
        calls_served=len(served),
        entries_settled=len(settled),
        entries_cancelled=sum(entry.kind == "cancelled" for entry in entries),
        provider=_sums(by_provider.values()),
        ledger=_sums(_flat(entry.usage) for entry in settled),
        differences=(*_uneven(entries, reservation_ids), *_unequal(by_request, by_provider)),
    )


def _uneven(entries: Sequence[LedgerEntry], reservation_ids: Sequence[str]) -> list[str]:
    booked = Counter(entry.reservation_id for entry in entries)
    uneven = [f"reservation {id_}: {booked[id_]} entries" for id_ in reservation_ids if booked[id_] != 1]
    odd = [e for e in entries if e.kind not in ("settled", "cancelled")]
    return uneven + [f"reservation {entry.reservation_id}: {entry.kind}" for entry in odd]


def _unequal(by_request: Mapping[str, Mapping[str, int]], by_provider: Mapping[str, Mapping[str, int]]) -> list[str]:
    differences = []
    for request_id in sorted({*by_request, *by_provider}):
        ours, theirs = by_request.get(request_id), by_provider.get(request_id)
        if ours is None or theirs is None:
            differences.append(f"{request_id}: only the {'provider' if ours is None else 'ledger'} knows it")
            continue
        for field in FIELDS:
            if ours[field] != theirs[field]:
                differences.append(f"{request_id}: {field} is {ours[field]} in the ledger, {theirs[field]} served")
    return differences


def _flat(usage: Mapping[str, Any]) -> dict[str, int]:
    nested = {**usage, **(usage.get("cache_creation") or {}), **(usage.get("server_tool_use") or {})}
    return {field: nested.get(field) or 0 for field in FIELDS}


def _sums(usages: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total = dict.fromkeys(FIELDS, 0)
    for usage in usages:
        for field, amount in usage.items():
            total[field] += amount
    return total
