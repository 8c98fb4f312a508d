"""Ledger entries: immutable facts in integers, and how they stand in the store."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Literal

import msgspec

from meterlib.core.policy import Funding
from meterlib.core.usage import Usage

EntryKind = Literal["settled", "cancelled", "expired", "late", "recorded", "adjusted"]
Quality = Literal["final", "partial", "estimated", "split_unknown"]
"""How far a usage is to be trusted: as reported at the end; cut short; an estimate; cache split not known."""


class CallFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who made a call; told when it is reserved."""

    tenant: str
    attributes: Mapping[str, str] = {}
    funding: Funding = "hosted"


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What came of a call; told when it is settled, recorded or adjusted."""

    usage: Mapping[str, object] = {}
    quality: Quality = "final"
    facts: Mapping[str, str] = {}
    adjusts: str = ""
    adjusts_id: str = ""
    reason: str = ""
    actor: str = ""


class Settlement(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that is needed to settle a reservation, now or from a journal later.

    `call_facts` are those the reservation was made with, where the caller knows them.
    """

    tenant: str
    reservation_id: str
    usage: Usage
    quality: Quality = "final"
    facts: Mapping[str, str] = {}
    call_facts: CallFacts | None = None


class LedgerEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One fact about one call. It is never edited; corrections are entries of their own.

    Attributes:
        shard: which of the store's ledgers it stands in.
        n: its number there; numbers of a shard have no gap.
        kind: `settled`, `cancelled` (nothing was sent), `expired` (never settled; `estimate` says what was held),
            `late` (usage that came after the reservation had ended, or of one that is unknown), `recorded` (usage
            that had none), `adjusted` (a signed correction).
        after: of a `late` entry: what the reservation was before: `expired`, `cancelled` or `unknown`.
        reservation_id: the caller's id of the call.
        tenant: who is charged.
        attributes: other facts of the call.
        funding: who pays the provider.
        usage: token counts in the Claude API's names and nesting; of `adjusted`, the difference, which may be negative.
        estimate: what was held before the call.
        quality: how far the usage is to be trusted.
        facts: what else the caller told at settlement, such as the provider's request id.
        reserved_at: ms since 1970 UTC, by the server's clock; 0 where there was no reservation.
        booked_at: ms since 1970 UTC; entries of a shard are in this order.
        epoch: the ledger's epoch, in entries that were read from it; another one means that the ledger lost its
            tail and was begun anew.
        adjusts: of `adjusted`: the entry it corrects, as `shard:n`; with `reason` and `actor`.
        adjusts_id: the reservation id of that entry: where a ledger lost its tail, another one may bear its number.
    """

    shard: int
    n: int
    kind: EntryKind
    reservation_id: str
    tenant: str
    attributes: Mapping[str, str]
    funding: Funding
    usage: Mapping[str, object]
    quality: Quality
    reserved_at: int
    booked_at: int
    epoch: str = ""
    after: str = ""
    estimate: Mapping[str, object] = {}
    facts: Mapping[str, str] = {}
    adjusts: str = ""
    adjusts_id: str = ""
    reason: str = ""
    actor: str = ""


_call_facts = msgspec.json.Decoder(CallFacts)
_outcome = msgspec.json.Decoder(Outcome)
_counts = msgspec.json.Decoder(dict[str, object])
_encode = msgspec.json.Encoder(order="deterministic").encode


def counts_of(usage: Usage) -> dict[str, object]:
    """A usage as plain data: only what is known, in the Claude API's nesting."""
    return _counts.decode(_encode(usage))


def encode(record: msgspec.Struct) -> bytes:
    """JSON whose bytes depend on nothing but the record."""
    return _encode(record)


def digest_of(*payload: bytes) -> str:
    """16 hexadecimal digits that tell one payload from another."""
    return blake2b(b"\x00".join([*payload, b""]), digest_size=8).hexdigest()


def entry_of(shard: int, n: int, fields: Mapping[bytes, bytes]) -> LedgerEntry:
    """The entry that stands in the store as these fields."""
    call_facts = _call_facts.decode(fields[b"call"])
    outcome = _outcome.decode(fields[b"outcome"] or b"{}")
    estimate = fields[b"estimate"]
    return LedgerEntry(
        epoch=fields[b"epoch"].decode(),
        shard=shard,
        n=n,
        kind=fields[b"kind"].decode(),  # type: ignore[arg-type]
        after=fields[b"after"].decode(),
        reservation_id=fields[b"id"].decode(),
        tenant=call_facts.tenant,
        attributes=call_facts.attributes,
        funding=call_facts.funding,
        usage=outcome.usage,
        estimate=_counts.decode(estimate) if estimate else {},
        quality=outcome.quality,
        facts=outcome.facts,
        reserved_at=int(fields[b"reserved_at"]),
        booked_at=int(fields[b"booked_at"]),
        adjusts=outcome.adjusts,
        adjusts_id=outcome.adjusts_id,
        reason=outcome.reason,
        actor=outcome.actor,
    )


def decode_call_facts(blob: bytes) -> CallFacts:
    """The facts that a reservation was made with."""
    return _call_facts.decode(blob)


def decode_counts(blob: bytes) -> dict[str, object]:
    """Token counts as plain data."""
    return _counts.decode(blob) if blob else {}
