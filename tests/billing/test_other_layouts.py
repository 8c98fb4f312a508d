"""A store of another number of shards takes over: an archive goes on, whatever it was exported from before."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from meterlib import Meter, Policy, StoreOptions, Usage
from meterlib.billing.archive.archive import Archive
from meterlib.testing import Clock
from tests.billing.money import BOOK, at_ms
from tests.support.commands import Run, runner
from tests.support.servers import Server

SETTINGS = """\
[store]
url = "{url}"
prefix = "{prefix}"
shards = {shards}
[billing]
archive = "archive"
book = "book.toml"
fallback = "none"
segment_entries = 4
"""
TENANTS = [f"tenant-{number}" for number in range(6)]


class Place:
    """A gateway whose store is replaced, by one under another prefix, with another number of shards."""

    def __init__(self, folder: Path, url: str) -> None:
        self.settings, self._url = folder / "meterlib.toml", url
        self.clock = Clock(at_ms("2026-10-10"))
        self.booked: Counter[str] = Counter()
        (folder / "book.toml").write_text(BOOK)

    def use(self, prefix: str, shards: int) -> None:
        """From now on, this store."""
        self._options = StoreOptions(shards=shards, prefix=prefix)
        self.settings.write_text(SETTINGS.format(url=self._url, prefix=prefix, shards=shards))

    def book(self, calls: int) -> None:
        """So many calls of each tenant."""
        with Meter.connect(self._url, Policy(), options=self._options, clock=self.clock) as meter:
            for tenant in TENANTS * calls:
                self.clock.advance(ms=10)
                meter.record(
                    tenant, {"provider": "anthropic", "model": "plain"}, Usage(input_tokens=1000, output_tokens=0)
                )
                self.booked[tenant] += 1


@pytest.fixture
def place(valkey: Server, tmp_path: Path) -> Place:
    with valkey.client() as client:
        client.flushall()
    return Place(tmp_path, valkey.url)


@pytest.fixture
def run(place: Place, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys, place.settings)


def calls(run: Run, *words: str) -> dict[str, int]:
    ran = run("report", "usage", "--by", "tenant", "--json", "--strict", *words)
    assert 0 == ran.code, ran.err
    return {row["tenant"]: row["calls"] for row in ran.json["rows"]}


def taken_over(place: Place, run: Run, before: int, after: int) -> None:
    """The old store is exported, and a new one of another number of shards begins; what differs is looked at."""
    place.use("old", before)
    place.book(3)
    assert 0 == run("export", "run").code
    place.use("new", after)
    place.clock.set(at_ms("2026-10-20"))
    place.book(2)

    stopped = run("export", "run")

    assert 5 == stopped.code
    for shard in range(min(before, after)):
        assert f"meterlib ledger fork --shard {shard};" in stopped.err
        assert 0 == run("ledger", "fork", "--shard", str(shard), "--yes").code
    assert 0 == run("export", "run").code


@pytest.mark.parametrize(("before", "after"), [(4, 2), (1, 3)])
def test_each_call_is_archived_once_whatever_shard_its_tenant_moved_to(
    place: Place, run: Run, before: int, after: int
) -> None:
    """Old numbers stay, new ones go on behind them; whoever is asked for, all shards that ever had them are read."""
    taken_over(place, run, before, after)

    assert dict(place.booked) == calls(run)
    for tenant in TENANTS[:2]:
        assert {tenant: place.booked[tenant]} == calls(run, "--tenant", tenant)
    with Archive(place.settings.parent / "archive") as archive:
        assert list(range(max(before, after))) == archive.shards()
    assert 0 == run("verify", str(place.settings.parent / "archive")).code
    invoice = run("report", "invoice", "--tenant", TENANTS[0], "--period", "2026-10", "--strict", "--json")
    assert (0, "5000") == (invoice.code, str(invoice.json["lines"][0]["quantity"]))


def test_another_number_of_shards_for_the_same_store_is_refused(place: Place, run: Run) -> None:
    """It would be exported in part; the archive alone can still be reported on, and says that nobody was asked."""
    place.use("old", 4)
    place.book(1)
    assert 0 == run("export", "run").code
    place.use("old", 2)

    for words in (["export", "run"], ["export", "status"], ["export", "trim"], ["close", "2026-10"]):
        refused = run(*words)
        assert (1, "") == (refused.code, refused.out)
        assert "set [store] shards to the store's" in refused.err
    report = run("report", "usage", "--json")
    assert (0, None) == (report.code, report.json["completeness"]["not_exported"])
    assert "set [store] shards to the store's" in report.json["completeness"]["store"]


def test_a_month_of_shards_that_are_gone_is_closed_on_somebodys_word(place: Place, run: Run) -> None:
    """Nobody can be asked whether anything of them is still to come, so nobody else can say it."""
    taken_over(place, run, 4, 2)
    place.clock.set(at_ms("2026-11-02"))
    place.book(1)
    assert 0 == run("export", "run").code

    refused = run("close", "2026-10", "--offline")

    assert 3 == refused.code
    assert refused.err.endswith("go on with --retired 2 --retired 3\n")
    assert 3 == run("close", "2026-10", "--offline", "--retired", "3").code
    wrong = run("close", "2026-10", "--offline", "--retired", "1")
    assert (2, "meterlib: --retired: the store has shard 1: [store] shards is 2\n") == (wrong.code, wrong.err)
    wrong = run("close", "2026-10", "--offline", "--retired", "2", "--retired", "3", "--retired", "9")
    assert (2, "meterlib: --retired: the archive has nothing of shard 9: leave it out\n") == (wrong.code, wrong.err)
    closed = run("close", "2026-10", "--offline", "--retired", "2", "--retired", "3", "--json")
    assert 0 == closed.code
    entries = {shard["shard"]: sum(shard["entries"].values()) for shard in closed.json["shards"]}
    assert ([0, 1, 2, 3], 5 * len(TENANTS)) == (sorted(entries), sum(entries.values()))
    assert 0 == run("verify", str(place.settings.parent / "archive")).code
