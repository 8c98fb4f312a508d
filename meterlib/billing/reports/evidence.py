"""What a report was made of: which entries were read, and whether any that should be in it is missing or has no price.

Of a report on one tenant, which that tenant may come to see, it tells of that tenant's entries, and of the shards that
they are in: how many calls others make is not its business.

It is worked out by the same look at the archive as the report, and is the same however the archive's files are cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from hashlib import sha256
from typing import Any

import msgspec

from meterlib.billing.archive.segments import KEY, Segment
from meterlib.billing.duck import quoted
from meterlib.billing.postings.postings import Postings
from meterlib.billing.reports.answers import Reader
from meterlib.billing.reports.query import Query
from meterlib.billing.reports.report import Gap
from meterlib.core.money import ZERO, plain, plus


class EntryRange(msgspec.Struct, frozen=True, kw_only=True):
    """Entries of one epoch of a shard's ledger that were booked in the time asked for."""

    epoch: str
    entries: int
    first: int
    last: int


class Tail(msgspec.Struct, frozen=True, kw_only=True):
    """What the store says of a shard.

    Attributes:
        shard: which.
        not_exported: entries of the time asked for that the archive has not got yet.
        open_reservations: not settled yet; what they use is in none of the entries.
        problem: why the store's ledger and the archive do not fit together; empty if they do.
    """

    shard: int
    not_exported: int
    open_reservations: int
    problem: str = ""


class ShardEvidence(msgspec.Struct, frozen=True, kw_only=True):
    """What was read of one shard.

    Attributes:
        shard: which.
        ranges: of the time asked for.
        gaps: numbers that no entry has, by decision of whoever exported, and that may have been of that time.
        archived_to: the shard's last archived entry; None in a report on one tenant.
        not_rated: how many of the entries have no rated rows yet.
    """

    shard: int
    ranges: tuple[EntryRange, ...]
    gaps: tuple[Gap, ...]
    archived_to: int | None
    not_rated: int


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What a report was made of.

    Attributes:
        complete: no entry is missing, as far as anybody could be asked, and none that has to be rated is not.
        tenant: whose entries are told of; None if everybody's.
        entries: how many were booked in the time asked for; so not_rated.
        gaps: how many there are in these shards; whose entries are missing there, nobody knows.
        unpriced: lines of the report's rows that have no price; None of a report without costs.
        partial: entries of the report that were cut short; so estimated, split_unknown, late and expired.
        open_reservations: of everybody; None in a report on one tenant, and where the store was not asked.
        not_exported: of everybody in these shards; None where the store was not asked.
        store: why it was not asked; empty if it was.
        problems: why store and archive do not fit together.
        digest: SHA-256 over all that is in the archive: entries, rated rows, re-ratings and closes.
        shards: each by itself.
    """

    complete: bool
    tenant: str | None
    entries: int
    gaps: int
    not_rated: int
    unpriced: int | None
    partial: int
    estimated: int
    split_unknown: int
    late: int
    expired: int
    open_reservations: int | None
    not_exported: int | None
    store: str
    problems: tuple[str, ...]
    digest: str
    shards: tuple[ShardEvidence, ...]

    @property
    def sound(self) -> bool:
        """Whether the report is complete, and everything in it has a price."""
        return self.complete and not self.unpriced


_COUNTED = {
    "partial": "quality = 'partial'",
    "estimated": "quality = 'estimated'",
    "split_unknown": "quality = 'split_unknown'",
    "late": "kind = 'late'",
    "expired": "kind = 'expired'",
}


def evidence(
    reader: Reader,
    postings: Postings,
    query: Query,
    *,
    tails: Sequence[Tail] | None,
    store: str = "",
    unpriced: int | None = None,
) -> Evidence:
    """What a report on this query is made of.

    Args:
        reader: that the report was made with, of these postings.
        postings: of the archive.
        query: what was asked.
        tails: what the store says; None if it was not asked.
        store: why it was not asked.
        unpriced: how many lines of the report have no price; None for a report without costs.
    """
    found = _counted(reader, postings, query)
    mine, everybody = query.tenant is not None, set(postings.segments)
    asked = everybody if not mine else _shards_of(reader, query, tails) & everybody or everybody
    shards = tuple(
        ShardEvidence(
            shard=shard,
            ranges=tuple(one for of, one, _ in found if of == shard),
            gaps=tuple(_gaps(reader, query, segments)),
            archived_to=None if mine else segments[-1].last if segments else 0,
            not_rated=sum(counts["not_rated"] for of, _, counts in found if of == shard),
        )
        for shard, segments in sorted(postings.segments.items())
        if shard in asked
    )
    counts = {name: sum(told[name] for _, _, told in found) for name in (*_COUNTED, "not_rated")}
    problems = tuple(tail.problem for tail in tails or () if tail.problem)
    waiting = None if tails is None else sum(tail.not_exported for tail in tails)
    gaps = sum(len(shard.gaps) for shard in shards)
    rated = unpriced is None or not counts["not_rated"]
    return Evidence(
        complete=not (gaps or waiting or problems) and rated,
        tenant=query.tenant,
        entries=sum(one.entries for _, one, _ in found),
        gaps=gaps,
        unpriced=unpriced,
        open_reservations=None if tails is None or mine else sum(tail.open_reservations for tail in tails),
        not_exported=waiting,
        store=store,
        problems=problems,
        digest=digest_of(postings),
        shards=shards,
        **counts,
    )


def _counted(reader: Reader, postings: Postings, query: Query) -> list[tuple[int, EntryRange, Mapping[str, int]]]:
    """Each range of the entries that are asked for, and how many of them are of which sort."""
    entries = reader.entries_of(query, "shard, epoch, n, kind, quality")
    groups = (
        f"SELECT shard, epoch, kind, quality, ({_not_rated(postings)}) AS not_rated,"
        f" count(*) AS entries, min(n) AS first, max(n) AS last FROM ({entries}) GROUP BY ALL"
    )
    sorts = [*_COUNTED.values(), "not_rated"]
    counts = ", ".join(f"coalesce(sum(entries) FILTER ({sort}), 0)::BIGINT" for sort in sorts)
    found = reader.connection.execute(
        f"SELECT shard, epoch, sum(entries)::BIGINT, min(first), max(last), {counts} FROM ({groups})"
        " GROUP BY shard, epoch ORDER BY shard, epoch"
    ).fetchall()
    names = (*_COUNTED, "not_rated")
    return [
        (shard, EntryRange(epoch=epoch, entries=entries, first=first, last=last), dict(zip(names, counts, strict=True)))
        for shard, epoch, entries, first, last, *counts in found
    ]


def _shards_of(reader: Reader, query: Query, tails: Sequence[Tail] | None) -> set[int]:
    """The shards that have a tenant's entries, of whatever time, and that which the store keeps its next ones in."""
    found = reader.connection.execute(
        f"SELECT DISTINCT shard FROM ({reader.entries}) WHERE tenant = {quoted(str(query.tenant))}"
    ).fetchall()
    return {*(shard for (shard,) in found), *(tail.shard for tail in tails or ())}


def _not_rated(postings: Postings) -> str:
    """SQL of whether an entry is behind what is rated."""
    ends = []
    for shard in sorted(postings.unrated()):
        rated = postings.rated.get(shard)
        epoch, last = (rated[-1].segment.epoch, rated[-1].segment.last) if rated else ("", 0)
        ends.append(f"(shard = {shard} AND (epoch > {quoted(epoch)} OR epoch = {quoted(epoch)} AND n > {last}))")
    return " OR ".join(ends) or "false"


def _gaps(reader: Reader, query: Query, segments: Sequence[Segment]) -> Iterable[Gap]:
    """Numbers between segments, unless what stands around them was booked before or behind the time asked for."""
    since_ms, until_ms = query.bounds(reader.billing_tz)
    epoch, end = segments[0].epoch if segments else "", 0
    for segment in segments:
        if segment.epoch == epoch and segment.first > end + 1:
            before_ms = _booked_at(reader, segment, end)
            behind_ms = _booked_at(reader, segment, segment.first)
            early = since_ms is not None and behind_ms is not None and behind_ms < since_ms
            late = until_ms is not None and before_ms is not None and before_ms >= until_ms
            if not (early or late):
                yield Gap(first=end + 1, last=segment.first - 1)
        epoch, end = segment.epoch, segment.last


def _booked_at(reader: Reader, segment: Segment, n: int) -> int | None:
    found: Any = reader.connection.execute(
        f"SELECT min(booked_at) FROM ({reader.entries})"
        f" WHERE shard = {segment.shard} AND epoch = {quoted(segment.epoch)} AND n = {n}"
    ).fetchone()
    return None if found[0] is None else int(found[0])


def digest_of(postings: Postings) -> str:
    """SHA-256 over what is in an archive, whatever files it is in."""
    told = {
        "entries": {str(shard): _end(postings, segments) for shard, segments in postings.segments.items() if segments},
        "rated": {str(shard): _rated(postings, shard) for shard, files in postings.rated.items() if files},
        "ratings": [one.manifest.digest for one in postings.reposts],
        "closes": [close.digest for close in postings.closes],
    }
    return sha256(msgspec.json.encode(told, order="deterministic")).hexdigest()


def _end(postings: Postings, segments: Sequence[Segment]) -> list[Any]:
    last = segments[-1]
    return [last.epoch, last.last, postings.archive.facts(last).link]


def _rated(postings: Postings, shard: int) -> list[Any]:
    """How far a shard is rated, and the control totals of its rated rows, which do not depend on how files are cut."""
    files = postings.rated[shard]
    last = files[-1].segment
    totals: dict[str, Decimal] = {}
    for facts in _metadata(postings, [file.path for file in files]):
        for name, total in facts["sums"].items():
            totals[name] = plus(totals.get(name, ZERO), Decimal(total))
    return [last.epoch, last.last, {name: plain(total) for name, total in sorted(totals.items())}]


def unknown_names(postings: Postings) -> set[str]:
    """Names in the archive's entries that no column is made of."""
    files = [postings.archive.file(segment) for segments in postings.segments.values() for segment in segments]
    return {name for facts in _metadata(postings, files) for name in facts.get("unknown", [])}


def _metadata(postings: Postings, files: Sequence[Any]) -> list[dict[str, Any]]:
    """What the metadata of files say, of all of them at once."""
    if not files:
        return []
    listed = ", ".join(quoted(file) for file in files)
    found = postings.archive.database().execute(
        f"SELECT value FROM parquet_kv_metadata([{listed}]) WHERE key = '{KEY}'"
    )
    return [msgspec.json.decode(value) for (value,) in found.fetchall()]
