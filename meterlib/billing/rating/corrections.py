"""Entries that belong to earlier ones: what a correction corrects, and after what a late usage came.

Both are looked up in the archive, in as few of its segments as can be: a correction names its entry, and a call that
ended cannot have done so before it was reserved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from meterlib.billing import duck
from meterlib.billing.archive.archive import Archive
from meterlib.billing.archive.rows import LINE, entry_from
from meterlib.billing.archive.segments import Segment, unreadable
from meterlib.billing.rating.rating import add_usage
from meterlib.core.ledger import LedgerEntry

Place = tuple[str, int]
"""Epoch and number of an entry."""


class Corrected(NamedTuple):
    """What a correction is about.

    Attributes:
        entry: the call, its usage with all corrections before this one included.
        touched: the entry that the correction names: the call's, or an earlier correction of it.
        places: of the call and its corrections before this one.
    """

    entry: LedgerEntry
    touched: LedgerEntry
    places: tuple[Place, ...]


class Earlier:
    """Finds, for entries of a shard, the earlier ones that they belong to.

    Args:
        archive: where.
        database: to read it with.
        segments: of the shard, up to those that hold the entries.
    """

    def __init__(self, archive: Archive, database: Any, segments: Sequence[Segment]) -> None:
        self._archive = archive
        self._database = database
        self._segments = segments
        self._epochs = sorted({segment.epoch for segment in segments})
        self._known: dict[Place, LedgerEntry] = {}

    def corrected(self, adjusted: Sequence[LedgerEntry]) -> dict[Place, Corrected]:
        """What each of these corrections is about, by its place; those whose entry is not archived are left out."""
        self._load_chain(adjusted)
        touched = {place_of(one): found for one in adjusted if (found := self._target(one)) is not None}
        roots = {place: root for place, one in touched.items() if (root := self._root(one)) is not None}
        if not roots:
            return {}
        before = self._corrections_of(roots.values())
        totals = {place_of(root): root for root in roots.values()}
        places: dict[Place, tuple[Place, ...]] = {place: (place,) for place in totals}
        corrected: dict[Place, Corrected] = {}
        for one in sorted({**before, **{place_of(one): one for one in adjusted}}.values(), key=place_of):
            call = self._root(one)
            if call is None or (total := totals.get(place_of(call))) is None:
                continue
            if place_of(one) in roots:
                corrected[place_of(one)] = Corrected(total, touched[place_of(one)], places[place_of(call)])
            usage = add_usage(total.usage, one.usage)
            places[place_of(call)] += (place_of(one),)
            totals[place_of(call)] = msgspec.structs.replace(total, usage=usage)
        return corrected

    def _target(self, entry: LedgerEntry) -> LedgerEntry | None:
        """The entry that a correction names: of its own epoch, or of the last one before it that has the number."""
        for place in self._places(entry):
            known = self._known.get(place)
            if known is not None and known.tenant == entry.tenant and entry.adjusts_id in ("", known.reservation_id):
                return known
        return None

    def _places(self, entry: LedgerEntry) -> Iterator[Place]:
        shard, _, n = entry.adjusts.partition(":")
        if shard != str(entry.shard) or not n.isdigit():
            return
        for epoch in reversed(self._epochs):
            if (epoch, int(n)) < place_of(entry):
                yield epoch, int(n)

    def _root(self, entry: LedgerEntry) -> LedgerEntry | None:
        """The call at the end of a chain of corrections."""
        one: LedgerEntry | None = entry
        while one is not None and one.kind == "adjusted":
            one = self._target(one)
        return one

    def _load_chain(self, adjusted: Iterable[LedgerEntry]) -> None:
        """Have all that these corrections name, and what that names, if it is a correction again."""
        pending = list(adjusted)
        while pending:
            wanted = {place for one in pending for place in self._places(one)} - self._known.keys()
            loaded = list(self._load(wanted))
            self._known |= {place_of(one): one for one in loaded}
            pending = [one for one in loaded if one.kind == "adjusted"]

    def _load(self, places: set[Place]) -> Iterator[LedgerEntry]:
        for segment in self._segments:
            numbers = [n for epoch, n in places if epoch == segment.epoch and segment.first <= n <= segment.last]
            if numbers:
                yield from self._read(segment, f"n IN ({', '.join(map(str, sorted(numbers)))})")

    def _corrections_of(self, calls: Iterable[LedgerEntry]) -> dict[Place, LedgerEntry]:
        """All corrections of these calls, and of those corrections, as far as the segments go."""
        found: dict[Place, LedgerEntry] = {}
        named = {place_of(call) for call in calls}
        since = min(named)
        while named:
            texts = ", ".join(duck.quoted(f"{self._segments[0].shard}:{n}") for _, n in sorted(named))
            where = f"kind = 'adjusted' AND adjusts IN ({texts})"
            behind = [segment for segment in self._segments if (segment.epoch, segment.last) > since]
            holding = [segment for segment in behind if self._archive.facts(segment).entries.get("adjusted")]
            read = {place_of(one): one for segment in holding for one in self._read(segment, where)}
            new = {place: one for place, one in read.items() if place not in found}
            found |= new
            self._known |= new
            self._load_chain(new.values())
            named = set(new)
        return found

    def _read(self, segment: Segment, where: str) -> Iterator[LedgerEntry]:
        file = self._archive.file(segment)
        query = f"SELECT {LINE} FROM read_parquet({duck.quoted(file)}) WHERE {where} ORDER BY n"
        try:
            lines = self._database.execute(query).fetchall()
        except duck.failure() as error:
            raise unreadable(file, error) from None
        for (line,) in lines:
            yield entry_from(segment.shard, line.encode())

    def ended(self, late: Iterable[tuple[Place, str, str, int]]) -> dict[Place, int]:
        """When the reservations of late usage ended, in ms since 1970 UTC; those that are not archived are left out.

        Args:
            late: of each late entry its place, reservation id, tenant, and when it was reserved.
        """
        open_calls: dict[tuple[str, str], list[tuple[Place, int]]] = {}
        for place, reservation_id, tenant, reserved_at in late:
            open_calls.setdefault((reservation_id, tenant), []).append((place, reserved_at))
        found: dict[Place, int] = {}
        for segment in reversed(self._segments):
            if not open_calls:
                break
            first_booked, ended = self._ended_in(segment, open_calls)
            for call, at, booked_at in ended:
                waiting = open_calls[call]
                found |= {place: booked_at for place, _ in waiting if at < place and place not in found}
            open_calls = {
                call: left
                for call, waiting in open_calls.items()
                if (left := [one for one in waiting if one[0] not in found and one[1] <= first_booked])
            }
        return found

    def _ended_in(
        self, segment: Segment, calls: Iterable[tuple[str, str]]
    ) -> tuple[int, list[tuple[tuple[str, str], Place, int]]]:
        """When a segment begins, and which of the calls ended in it, the last of them first."""
        file = self._archive.file(segment)
        source = f"read_parquet({duck.quoted(file)})"
        ids = ", ".join(duck.quoted(reservation_id) for reservation_id, _ in sorted(calls))
        query = (
            f"SELECT reservation_id, tenant, n, booked_at FROM {source}"
            f" WHERE kind IN ('expired', 'cancelled') AND reservation_id IN ({ids}) ORDER BY n DESC"
        )
        try:
            (first_booked,) = self._database.execute(f"SELECT min(booked_at) FROM {source}").fetchone()
            rows = self._database.execute(query).fetchall()
        except duck.failure() as error:
            raise unreadable(file, error) from None
        known = set(calls)
        ended = [((one, tenant), (segment.epoch, n), at) for one, tenant, n, at in rows if (one, tenant) in known]
        return first_booked, ended


def place_of(entry: LedgerEntry) -> Place:
    """Epoch and number of an entry."""
    return entry.epoch, entry.n
