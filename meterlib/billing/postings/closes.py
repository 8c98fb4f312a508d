"""Closed billing periods as they stand in an archive: `closes/2026-10.json`, written once and never changed.

Each carries the digest of itself and of the one before it, so that whoever keeps the newest one can tell that none of
them was changed.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import msgspec

from meterlib.errors import IntegrityError

FOLDER = "closes"
CLOSE_SCHEMA = 1

Proof = Literal["store", "archive"]


class ClosedShard(msgspec.Struct, frozen=True, kw_only=True):
    """How far a shard goes in a period.

    Attributes:
        shard: which.
        epoch: of the last entry that was booked up to the period's end; empty if there is none.
        last: its number.
        link: the archive's link behind it: the digest of every entry up to there.
        entries: how many entries were booked in the period, by kind.
        gaps: numbers that no entry of the period has, by decision of whoever exported, as `shard:first-last`.
    """

    shard: int
    epoch: str
    last: int
    link: str
    entries: dict[str, int] = {}
    gaps: list[str] = []


class ClosedTotal(msgspec.Struct, frozen=True, kw_only=True):
    """What the rows of a period come to, for one tenant and currency, apart for each earlier period they correct.

    Attributes:
        currency: ISO 4217; empty for what has no price.
        corrects: the closed period that the rows correct; empty for the period's own.
        rows: how many there are, those that were taken back subtracted.
        unpriced: how many of them have no price, so that the costs are a floor.
        list_cost: exact, as text; so the other costs.
    """

    currency: str
    tenant: str
    corrects: str
    rows: int
    unpriced: int
    list_cost: str
    contracted_cost: str
    billed_cost: str
    upstream_cost: str


class Close(msgspec.Struct, frozen=True, kw_only=True):
    """A closed period.

    Attributes:
        schema: version of this record.
        period: the month, such as `2026-10`.
        tz: the zone that it is a month of.
        from_ms: its first moment, in ms since 1970 UTC.
        until_ms: the first moment behind it.
        closed_at_ms: when it was closed.
        library: the version of meterlib.
        proof: who said that nothing of the period is still to come: the `store`, or the `archive` itself, since every
            shard has an entry that was booked later.
        reposts: how many re-ratings are counted; those after them appear as corrections in a later period.
        shards: how far each goes.
        totals: by currency, tenant and corrected period.
        unpriced: how many rows have no price.
        qualities: how many entries of the period with usage are of each quality, such as `partial`.
        before: the digest of the close before it; empty if it is the first.
        digest: of all else.
    """

    schema: int
    period: str
    tz: str
    from_ms: int
    until_ms: int
    closed_at_ms: int
    library: str
    proof: Proof
    reposts: int
    shards: list[ClosedShard]
    totals: list[ClosedTotal]
    unpriced: int
    qualities: dict[str, int]
    before: str
    digest: str = ""

    def sealed(self) -> Close:
        """The record with its digest."""
        return msgspec.structs.replace(self, digest=digest_of(self))

    def facts(self) -> dict[str, Any]:
        """What another close of the same period would have to say as well."""
        told = msgspec.to_builtins(self)
        return {name: told[name] for name in told if name not in ("closed_at_ms", "library", "proof", "digest")}


def digest_of(close: Close) -> str:
    """SHA-256 over the record without its digest."""
    return sha256(encoded(msgspec.structs.replace(close, digest=""))).hexdigest()


def encoded(close: Close) -> bytes:
    """The bytes of a record's file."""
    return msgspec.json.format(msgspec.json.encode(close, order="deterministic"), indent=1) + b"\n"


def file_of(archive: Path, period: str) -> Path:
    """Where the record of a period is."""
    return archive / FOLDER / f"{period}.json"


def read_close(file: Path) -> Close:
    """A record.

    Raises:
        IntegrityError: it is damaged, or another one than its name says.
    """
    data = file.read_bytes()
    try:
        close = msgspec.json.decode(data, type=Close, strict=True)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise IntegrityError("damaged", f"{file} cannot be read as a close: {error}") from None
    if f"{close.period}.json" != file.name or close.digest != digest_of(close) or encoded(close) != data:
        raise IntegrityError("damaged", f"{file} is not what was written: its digest is another")
    return close


def closed_until(archive: Path) -> int:
    """When the last closed period of an archive ended, in ms since 1970 UTC; 0 if none is closed."""
    last = max((archive / FOLDER).glob("[0-9]*.json"), default=None)
    return 0 if last is None else read_close(last).until_ms


def closes_of(archive: Path) -> list[Close]:
    """All closes of an archive, in order of time.

    Raises:
        IntegrityError: one is damaged or missing.
    """
    found = sorted((archive / FOLDER).glob("[0-9]*.json"))
    closes = sorted((read_close(file) for file in found), key=lambda close: close.from_ms)
    for at, close in enumerate(closes):
        before = closes[at - 1] if at else None
        expected = ("", close.from_ms) if before is None else (before.digest, before.until_ms)
        if (close.before, close.from_ms) != expected:
            file = file_of(archive, close.period)
            raise IntegrityError("damaged", f"{file} does not follow the close before it: one is missing or another")
    return closes
