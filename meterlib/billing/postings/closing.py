"""Closing a billing period: what it comes to, written down once, when nothing of it is still to come.

Entries belong to the month in which they were booked, and within a ledger that time never goes back: so a month ends at
one entry of each shard, and whatever is booked later is of a later month. To know where it ends, somebody has to say
that nothing of it is still to come. The store can: its clock is past the end, and all that it had booked by then is
archived. The archive alone can as well, if every shard has an entry that was booked after the end.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import meterlib
from meterlib.billing import duck
from meterlib.billing.archive.archive import Archive
from meterlib.billing.archive.rows import LINE, chained
from meterlib.billing.archive.segments import Segment, sync_folder, synced_digest, unreadable
from meterlib.billing.export.start import Run, Start
from meterlib.billing.months import month_at, month_named
from meterlib.billing.postings.closes import (
    CLOSE_SCHEMA,
    Close,
    ClosedShard,
    ClosedTotal,
    Proof,
    encoded,
    file_of,
    read_close,
)
from meterlib.billing.postings.postings import Postings
from meterlib.billing.rating.rated import COSTS
from meterlib.core.periods import zone
from meterlib.errors import IntegrityError, InvalidInput
from meterlib.store import flows

_USED = ("settled", "late", "recorded")
"""Kinds of entries whose quality matters."""


class Word(NamedTuple):
    """What the store says of a shard: its clock, and the number of the last entry it had booked when that was read."""

    shard: int
    clock_ms: int
    last: int


def word_of(archive: Archive, run: Run, shard: int, clock_ms: int) -> Word:
    """The store's word on a shard, whose ledger has to be the one that was archived.

    Args:
        archive: where it was archived.
        run: runs the store's flows.
        shard: which.
        clock_ms: the shard's clock; read before this is called, so that what is booked later is later.

    Raises:
        IntegrityError: the store's ledger is another one.
    """
    head = run(flows.read_head(shard))
    position, known = archive.end(shard)
    Start(shard, position, known, head, run).found(None)
    return Word(shard, clock_ms, max(head.last_number, head.ledger_last))


class Closing:
    """The close of a period, as far as it can be.

    Args:
        postings: of the archive.
        period: the month.

    Raises:
        InvalidInput: it is no month, or not the one that comes next.
        IntegrityError: the archive's files do not fit together.

    Attributes:
        postings: of the archive.
        month: the period.
        standing: the close that there is already; None if the period is open.
    """

    def __init__(self, postings: Postings, period: str) -> None:
        self.postings = postings
        self._archive = postings.archive
        self.month = month_named(period, postings.tz, "PERIOD")
        self.standing = next((close for close in postings.closes if close.period == period), None)
        if self.standing is None and postings.closes:
            self._check_next(postings.closes)

    def _check_next(self, closes: Sequence[Close]) -> None:
        first, last = closes[0], closes[-1]
        if self.month.start_ms < first.from_ms:
            raise InvalidInput("PERIOD", f"the first period that was closed is {first.period}, and this is before it")
        if self.month.start_ms != last.until_ms:
            following = month_at(self.postings.tz, last.until_ms).label
            raise InvalidInput("PERIOD", f"{last.period} was closed last, so {following} is the next")

    def hindrances(self, words: Sequence[Word] | None, shards: int, retired: Collection[int] = ()) -> list[str]:
        """Why the period cannot be closed yet; nothing if it can.

        Args:
            words: what the store says of each shard; None to go by the archive alone.
            shards: how many the store has.
            retired: further ones, of a store that is gone, of which nothing is still to come by somebody's word.
        """
        return self.postings.steady(lambda: self._hindrances(words, shards, retired))

    def _hindrances(self, words: Sequence[Word] | None, shards: int, retired: Collection[int]) -> list[str]:
        found = []
        if beyond := [shard for shard in sorted(self.postings.segments) if shard >= shards and shard not in retired]:
            return [
                f"the archive has entries of shard {beyond[-1]}, and the store has {shards}: set [store] shards; or, if"
                " they are of a store that is gone, and all of it was exported, go on with"
                f" {' '.join(f'--retired {shard}' for shard in beyond)}"
            ]
        for shard in range(shards):
            archived = self._last_archived(shard)
            word = words[shard] if words is not None else None
            if word is not None and word.clock_ms < self.month.end_ms:
                end = f"{self._end()} ([billing] tz {self.postings.tz!r})"
                return [f"{self.month.label} is not over: it ends at {end}"]
            if archived[1] >= self.month.end_ms or (word is not None and archived[0] >= word.last):
                continue
            if word is None:
                found.append(
                    f"shard {shard} has no archived entry that was booked after {self.month.label}: only the store can"
                    " say that nothing of it is still to come"
                )
            else:
                entries = f"{shard}:{archived[0] + 1}-{word.last}"
                found.append(f"entries {entries} are not exported; `meterlib export run` does it")
        unrated = self._unrated()
        return found + [f"entries {entries} are not rated; `meterlib rate` does it" for entries in unrated]

    def _end(self) -> str:
        """The first moment behind the month, on the clocks of its zone."""
        return datetime.fromtimestamp(self.month.end_ms // 1000, zone(self.postings.tz)).isoformat(timespec="minutes")

    def _last_archived(self, shard: int) -> tuple[int, int]:
        """Number of the last archived entry of a shard, and when it was booked."""
        segments = self.postings.segments.get(shard)
        if not segments:
            return 0, 0
        query = f"SELECT booked_at FROM {self._files(segments[-1:])} WHERE n = {segments[-1].last}"
        ((booked_at,),) = self._query(query, segments[-1])
        return segments[-1].last, booked_at

    def _unrated(self) -> list[str]:
        found = []
        for shard in self.postings.unrated():
            rated = self.postings.rated.get(shard)
            end = (rated[-1].segment.epoch, rated[-1].segment.last) if rated else ("", 0)
            behind = [one for one in self.postings.segments[shard] if (one.epoch, one.last) > end]
            for segment in behind:
                first = end[1] + 1 if segment.epoch == end[0] and segment.first <= end[1] else segment.first
                query = f"SELECT max(n) FROM {self._files([segment])} WHERE n >= {first} AND booked_at < "
                ((last,),) = self._query(f"{query}{self.month.end_ms}", segment)
                if last is not None:
                    found.append(f"{shard}:{first}-{last}")
        return found

    def drawn_up(self, closed_at_ms: int, proof: Proof) -> Close:
        """The record of the period, as the archive has it now.

        Raises:
            IntegrityError: a shard's time goes back, or its files do not fit together.
        """
        return self.postings.steady(lambda: self._drawn_up(closed_at_ms, proof))

    def _drawn_up(self, closed_at_ms: int, proof: Proof) -> Close:
        closes = [close for close in self.postings.closes if close.until_ms <= self.month.start_ms]
        told = [self._shard(shard, segments) for shard, segments in sorted(self.postings.segments.items())]
        qualities: dict[str, int] = {}
        for _, counts in told:
            for quality, count in counts.items():
                qualities[quality] = qualities.get(quality, 0) + count
        totals = self._totals()
        reposts = len(self.postings.reposts) if self.standing is None else self.standing.reposts
        return Close(
            schema=CLOSE_SCHEMA,
            period=self.month.label,
            tz=self.postings.tz,
            from_ms=self.month.start_ms,
            until_ms=self.month.end_ms,
            closed_at_ms=closed_at_ms,
            library=meterlib.__version__,
            proof=proof,
            reposts=reposts,
            shards=[shard for shard, _ in told if shard.last],
            totals=totals,
            unpriced=sum(total.unpriced for total in totals),
            qualities=dict(sorted(qualities.items())),
            before=closes[-1].digest if closes else "",
        ).sealed()

    def _totals(self) -> list[ClosedTotal]:
        sums = ", ".join(f"CAST(coalesce(sum({cost}), 0) AS VARCHAR)" for cost in COSTS)
        label = duck.quoted(self.month.label)

        query = (
            "SELECT currency, tenant, corrects, CAST(sum(posting) AS BIGINT),"
            " CAST(coalesce(sum(posting) FILTER (unpriced <> ''), 0) AS BIGINT),"
            f" {sums} FROM ({self.postings.rows_sql()}) WHERE period = {label} GROUP BY ALL"
            " ORDER BY tenant, currency, corrects"
        )
        names = ("currency", "tenant", "corrects", "rows", "unpriced", *COSTS)
        found = self._archive.database().execute(query).fetchall()
        return [ClosedTotal(**dict(zip(names, row, strict=True))) for row in found]

    def _shard(self, shard: int, segments: Sequence[Segment]) -> tuple[ClosedShard, dict[str, int]]:
        """How far a shard goes, and how many of its entries of the period are of each quality."""
        last: tuple[str, int] = ("", 0)
        entries: dict[str, int] = {}
        qualities: dict[str, int] = {}
        gaps: list[str] = []
        before: tuple[str, int, int] = ("", 0, 0)
        for segment in segments:
            found = self._looked_through(segment, before)
            for kind, quality, count in found.counts:
                entries[kind] = entries.get(kind, 0) + count
                if kind in _USED:
                    qualities[quality] = qualities.get(quality, 0) + count
            if found.last:
                last = segment.epoch, found.last
                facts = self._archive.facts(segment)
                if facts.follows_epoch == segment.epoch and facts.follows_n + 1 < segment.first and found.began:
                    gaps.append(f"{shard}:{facts.follows_n + 1}-{segment.first - 1}")
            before = segment.epoch, segment.last, found.booked_at
        link = self._link(segments, last)
        told = ClosedShard(shard=shard, epoch=last[0], last=last[1], link=link, entries=entries, gaps=gaps)
        return told, qualities

    def _looked_through(self, segment: Segment, before: tuple[str, int, int]) -> Looked:
        source = self._files([segment])
        back = (
            "SELECT min(n) FROM (SELECT n, booked_at, lag(booked_at) OVER (ORDER BY n) AS earlier"
            f" FROM {source}) WHERE booked_at < earlier"
        )
        ((n,),) = self._query(back, segment)
        span = f"SELECT first(booked_at ORDER BY n), last(booked_at ORDER BY n) FROM {source}"
        ((first_booked, last_booked),) = self._query(span, segment)
        if n is None and before[0] == segment.epoch and first_booked < before[2]:
            n = segment.first
        if n is not None:
            entry = f"{segment.shard}:{n}"
            problem = f"entry {entry} was booked before the one before it, which no ledger does"
            raise IntegrityError("conflict", f"{self._archive.file(segment)}: {problem}", (entry,))
        begun, over = self._bounds(segment)
        ((last,),) = self._query(f"SELECT max(n) FROM {source} WHERE NOT ({over})", segment)
        counts = self._query(
            f"SELECT kind, quality, count(*) FROM {source} WHERE {begun} AND NOT ({over}) GROUP BY ALL ORDER BY ALL",
            segment,
        )
        ((began,),) = self._query(f"SELECT {begun} FROM {source} WHERE n = {segment.first}", segment)
        return Looked(last or 0, counts, began, last_booked)

    def _bounds(self, segment: Segment) -> tuple[str, str]:
        """SQL of whether an entry of a segment is not before the period, and of whether it is behind it.

        By the time it was booked, or by how far a close went: a clock that was set back opens no closed period again.
        """
        before = [close for close in self.postings.closes if close.until_ms <= self.month.start_ms]
        begun, over = f"booked_at >= {self.month.start_ms}", f"booked_at >= {self.month.end_ms}"
        if before:
            begun = _behind(before[-1], segment)
        if self.standing is not None:
            over = _behind(self.standing, segment)
        return begun, over

    def _link(self, segments: Sequence[Segment], last: tuple[str, int]) -> str:
        """The archive's link behind an entry, in hexadecimal."""
        for segment in segments:
            if segment.epoch == last[0] and segment.first <= last[1] <= segment.last:
                facts = self._archive.facts(segment)
                if last[1] == segment.last:
                    return facts.link
                link = bytes.fromhex(facts.before)
                query = f"SELECT {LINE} FROM {self._files([segment])} WHERE n <= {last[1]} ORDER BY n"
                return chained(link, (line.encode() for (line,) in self._query(query, segment))).hex()
        return ""

    def _files(self, segments: Sequence[Segment]) -> str:
        files = ", ".join(duck.quoted(self._archive.file(segment)) for segment in segments)
        return f"read_parquet([{files}])"

    def _query(self, query: str, segment: Segment) -> Any:
        try:
            return self._archive.database().execute(query).fetchall()
        except duck.failure() as error:
            raise unreadable(self._archive.file(segment), error) from None

    def write(self, close: Close) -> Close:
        """Have the record stand, on the disk; the one that does, if somebody else was first."""
        file = file_of(self._archive.path, close.period)
        if not file.parent.is_dir():
            file.parent.mkdir(exist_ok=True)
            sync_folder(file.parent.parent)
        scratch = self._archive.work().folder / file.name
        scratch.write_bytes(encoded(close))
        synced_digest(scratch)
        try:
            os.link(scratch, file)
        except FileExistsError:
            return read_close(file)
        finally:
            scratch.unlink()
        sync_folder(file.parent)
        return close

    def differences(self) -> list[str]:
        """In what the standing close is not what the archive says now."""
        if self.standing is None:
            return []
        told, now = self.standing.facts(), self.drawn_up(0, "archive").facts()
        return [name for name in told if told[name] != now[name]]


def _behind(close: Close, segment: Segment) -> str:
    """SQL of whether an entry of a segment is behind the last one of a close."""
    last = next(((one.epoch, one.last) for one in close.shards if one.shard == segment.shard), ("", 0))
    if segment.epoch == last[0]:
        return f"n > {last[1]}"
    return "true" if segment.epoch > last[0] else "false"


class Looked(NamedTuple):
    """What a segment has of a period: the last entry before its end, counts, whether it begins in it, its last time."""

    last: int
    counts: list[tuple[str, str, int]]
    began: bool
    booked_at: int
