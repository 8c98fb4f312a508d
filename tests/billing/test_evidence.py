"""What a report says of its own completeness; and that one tenant's says nothing of the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fakeredis
import msgspec
import pytest

from meterlib import Meter, Policy, StoreOptions, Usage
from meterlib.billing.archive.archive import Archive
from meterlib.billing.export.export import Accepted, Exporter
from meterlib.billing.postings.postings import Postings
from meterlib.billing.reports.answers import Reader
from meterlib.billing.reports.evidence import Evidence, Tail, evidence
from meterlib.billing.reports.query import Query
from meterlib.errors import IntegrityError
from meterlib.store.keys import shard_keys, shard_of
from meterlib.testing import Clock

SHARDS = 3
NOW_MS = 1_790_000_000_000


class Ledgers:
    """Shards of a store, and an archive beside them."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock(NOW_MS)
        self.client = fakeredis.FakeRedis()
        self.meter = Meter(self.client, Policy(), options=StoreOptions(shards=SHARDS), clock=self.clock)
        self.path = folder / "archive"

    def book(self, tenant: str, count: int = 1) -> None:
        """Append entries of a tenant."""
        for _ in range(count):
            self.clock.advance(ms=10)
            self.meter.record(tenant, {}, Usage(input_tokens=1))

    def lose(self, shard: int, n: int) -> None:
        """Remove an entry of the store, as nobody should."""
        self.client.xdel(shard_keys("meterlib", shard)[3], f"{n}-0")

    def export(self, *gaps: tuple[int, int, int]) -> None:
        """Everything into the archive, these gaps accepted."""
        accepted = Accepted(gaps=frozenset(gaps))
        with (
            Archive(self.path, 2) as archive,
            Exporter(archive, self.meter._driver.run, accepted=accepted) as exporter,
        ):
            assert [None] * SHARDS == [exporter.export(shard).problem for shard in range(SHARDS)]

    def evidence(self, tails: list[Tail] | None = None, **asked: object) -> Evidence:
        """Of a report on usage."""
        query = msgspec.convert(asked, Query)
        with Archive(self.path, 2) as archive:
            postings = Postings(archive, "UTC")
            with Reader(postings) as reader:
                return evidence(reader, postings, query, tails=tails)


@pytest.fixture
def ledgers(tmp_path: Path) -> Iterator[Ledgers]:
    ledgers = Ledgers(tmp_path)
    yield ledgers
    ledgers.meter.close()


def tenant_of(shard: int, but: str = "") -> str:
    """A tenant whose ledger is that shard's."""
    return next(f"t{at}" for at in range(100) if shard_of(f"t{at}", SHARDS) == shard and f"t{at}" != but)


def sans_digest(one: Evidence) -> Evidence:
    return msgspec.structs.replace(one, digest="")


def test_what_others_use_changes_nothing_that_a_tenant_is_told(ledgers: Ledgers) -> None:
    """An invoice's last lines go to the customer; how much the others use is not its business."""
    mine = tenant_of(1)
    neighbour, stranger = tenant_of(1, but=mine), tenant_of(2)
    ledgers.book(neighbour)
    ledgers.book(mine, 3)
    ledgers.export()
    tail = Tail(shard=1, not_exported=0, open_reservations=0)
    before = ledgers.evidence([tail], tenant=mine)

    ledgers.book(neighbour, 5)
    ledgers.book(stranger, 7)
    ledgers.export()
    tail = msgspec.structs.replace(tail, open_reservations=9)
    after = ledgers.evidence([tail], tenant=mine)

    assert sans_digest(before) == sans_digest(after)
    assert (3, mine, [1]) == (after.entries, after.tenant, [shard.shard for shard in after.shards])
    assert [(2, 4, 3)] == [(one.first, one.last, one.entries) for one in after.shards[0].ranges]
    assert 16 == ledgers.evidence().entries


def test_a_tenants_report_tells_of_gaps_where_its_entries_are(ledgers: Ledgers) -> None:
    """Whose entries are missing nobody knows; those of another shard were never this tenant's."""
    mine, stranger = tenant_of(0), tenant_of(2)
    for tenant in (mine, stranger):
        ledgers.book(tenant, 5)
    ledgers.lose(2, 3)
    ledgers.export((2, 3, 3))

    assert ledgers.evidence(tenant=mine).complete
    assert (0, 1) == (ledgers.evidence(tenant=mine).gaps, ledgers.evidence(tenant=stranger).gaps)
    assert not ledgers.evidence(tenant=stranger).complete
    assert not ledgers.evidence(tenant="nobody").complete, "it may have been its entry"
    home = Tail(shard=0, not_exported=0, open_reservations=0)
    assert ledgers.evidence([home], tenant="nobody").complete, "the store knows where that would have been"


def test_a_shard_whose_first_file_is_gone_makes_no_report(ledgers: Ledgers) -> None:
    """Its digest would be that of the whole, since each link stands for all entries before it."""
    ledgers.book(tenant_of(0), 5)
    ledgers.export()
    with Archive(ledgers.path, 2) as archive:
        first, *rest = archive.segments(0)
        archive.file(first).unlink()

        with pytest.raises(IntegrityError, match="0:1-2: it is missing") as lost:
            ledgers.evidence()
        assert ("0:1-2",) == lost.value.entries
        archive.file(rest[0]).unlink()
        with pytest.raises(IntegrityError, match="0:1-4: it is missing"):
            ledgers.evidence()
