"""What the store says of an archive that is reported on, and the last lines of such a report."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Sequence

from meterlib.billing.export.start import Start
from meterlib.billing.postings.postings import Postings
from meterlib.billing.reports.evidence import Evidence, ShardEvidence, Tail
from meterlib.billing.reports.query import Query
from meterlib.cli.store import Store, opened
from meterlib.cli.times import terminal_width
from meterlib.config import Config
from meterlib.errors import IntegrityError, PolicyError, StoreError

GAPS_SHOWN = 10
SHARDS_SHOWN = 16


def asked(
    config: Config, arguments: argparse.Namespace, postings: Postings, query: Query
) -> tuple[list[Tail] | None, str]:
    """What the store says, or why it was not asked. A report from an archive needs no store."""
    if arguments.offline:
        return None, "--offline"
    try:
        with opened(config, arguments.config) as store:
            shards = range(store.shards) if query.tenant is None else [store.shard_of(query.tenant)]
            return [_tail(store, postings, query, shard) for shard in shards], ""
    except StoreError as error:
        return None, str(error)
    except PolicyError as error:
        if error.path != "store.url":
            raise
        return None, str(error).partition(": ")[2]


def _tail(store: Store, postings: Postings, query: Query, shard: int) -> Tail:
    position, known = postings.archive.end(shard)
    head = store.head(shard)
    try:
        epoch, after = Start(shard, position, known, head, store.run).found(None)
    except IntegrityError as error:
        return Tail(shard=shard, not_exported=0, open_reservations=head.open_reservations, problem=str(error))
    segments = postings.segments.get(shard, [])
    if epoch == position.epoch:  # what was exported since the archive was looked at is not in the report either
        after = min(after, segments[-1].last if segments else 0)
    first, end = after + 1, max(head.last_number, head.ledger_last) + 1
    if query.time_basis == "booked" and end > first:
        since_ms, until_ms = query.bounds(postings.tz)
        first = first if since_ms is None else max(first, store.first_since(shard, since_ms, head))
        end = end if until_ms is None else min(end, store.first_since(shard, until_ms, head))
    return Tail(shard=shard, not_exported=max(0, end - first), open_reservations=head.open_reservations)


# ── In words ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def evidence_lines(evidence: Evidence) -> list[str]:
    """The last lines of a report, broken where the terminal ends."""
    width = terminal_width()
    return [
        part
        for line in _lines(evidence)
        for part in textwrap.wrap(line, width, subsequent_indent="  ", break_on_hyphens=False)
    ]


def _lines(evidence: Evidence) -> Iterable[str]:
    shards = evidence.shards
    whose = f"shard {shards[0].shard}" if len(shards) == 1 else f"{len(shards)} shards"
    whose = whose if evidence.tenant is None else f"{evidence.tenant} in {whose}"
    count = f"{evidence.entries:,} {'entry' if evidence.entries == 1 else 'entries'}"
    missing = _missing(evidence)
    if evidence.complete:
        known = "" if evidence.not_exported is not None else ", as far as the archive goes"
        yield f"complete: {count} of {whose}, no gap{known}"
    else:
        yield f"INCOMPLETE: {count} of {whose}; {'; '.join(missing)}"
    if evidence.unpriced:
        lines = "1 line has" if evidence.unpriced == 1 else f"{evidence.unpriced:,} lines have"
        yield f"UNPRICED: {lines} no price, so costs are at least what is said, and may be more"
    yield from evidence.problems
    if used := [shard for shard in shards if shard.ranges]:
        yield f"entries by shard: {_ranges(used)}"
    if stored := _stored(evidence):
        yield stored
    yield (
        f"late {evidence.late:,}, expired {evidence.expired:,}, partial {evidence.partial:,},"
        f" estimated {evidence.estimated:,}, cache split not known {evidence.split_unknown:,},"
        f" not rated {evidence.not_rated:,}"
    )
    yield f"read: sha256 {evidence.digest}"


def _stored(evidence: Evidence) -> str:
    """What the store knows beyond the archive."""
    if evidence.not_exported is None:
        return f"the store was not asked ({evidence.store}): what is not exported yet, and still open, is not known"
    told = [] if evidence.not_exported else ["not exported 0"]
    if evidence.open_reservations is not None:
        told.insert(0, f"open reservations {evidence.open_reservations:,} (their usage is not in yet)")
    return ", ".join(told)


def _missing(evidence: Evidence) -> list[str]:
    missing = []
    gaps = [f"{shard.shard}:{gap}" for shard in evidence.shards for gap in shard.gaps]
    if gaps:
        more = f" and {len(gaps) - GAPS_SHOWN} gaps more" if len(gaps) > GAPS_SHOWN else ""
        missing.append(f"lost for good: {', '.join(gaps[:GAPS_SHOWN])}{more}")
    if evidence.not_exported:
        missing.append(f"not exported yet: {evidence.not_exported:,}; see meterlib export run")
    if evidence.not_rated and evidence.unpriced is not None:
        missing.append(f"not rated yet: {evidence.not_rated:,}; see meterlib rate")
    if evidence.problems:
        missing.append("the store's ledger is not the archive's")
    return missing


def _ranges(shards: Sequence[ShardEvidence]) -> str:
    told = []
    for shard in shards[:SHARDS_SHOWN]:
        epochs = len(shard.ranges) > 1
        told += [
            f"{shard.shard}:{one.first}-{one.last}{f' of epoch {one.epoch}' if epochs else ''}" for one in shard.ranges
        ]
    more = f", and {len(shards) - SHARDS_SHOWN} shards more" if len(shards) > SHARDS_SHOWN else ""
    return ", ".join(told) + more
