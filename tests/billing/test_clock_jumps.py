"""A server whose clock jumps, on a real one: what is booked meanwhile is archived, rated and billed once, in order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from meterlib import Meter, Policy, StoreOptions, Usage
from meterlib.billing.archive.archive import Archive
from tests.billing.money import BOOK, at_ms
from tests.support.commands import Run, runner
from tests.support.servers import FrozenClock, Server, available, start_server

HOUR_MS, YEAR_MS = 3_600_000, 365 * 86_400_000
SETTINGS = """\
[store]
url = "{url}"
shards = 1
[billing]
archive = "archive"
book = "book.toml"
fallback = "none"
segment_entries = 4
"""


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FrozenClock, Server]]:
    """A server whose whole clock is set."""
    if reason := FrozenClock.available() or available("valkey"):
        pytest.skip(reason)
    clock = FrozenClock(tmp_path_factory.mktemp("clock"), at_ms("2026-10-10"))
    with start_server(tmp_path_factory.mktemp("frozen"), clock=clock) as server:
        yield clock, server


class Gateway:
    """Calls at the server's own time, and what was told of each."""

    def __init__(self, url: str, clock: FrozenClock) -> None:
        self.clock = clock
        self.meter = Meter.connect(url, Policy(), options=StoreOptions(shards=1), sweep_interval_ms=0)
        self.calls = 0

    def book(self, calls: int) -> None:
        """Calls, a second apart."""
        for _ in range(calls):
            self.clock.set(self.clock.now_ms + 1000)
            usage = Usage(input_tokens=1_000_000, output_tokens=0)
            self.meter.record("acme", {"provider": "anthropic", "model": "plain"}, usage, record_id=f"r{self.calls}")
            self.calls += 1


@pytest.fixture
def gateway(frozen: tuple[FrozenClock, Server], tmp_path: Path) -> Iterator[Gateway]:
    clock, server = frozen
    clock.set(at_ms("2026-10-10"))
    with server.client() as client:
        client.flushall()
    (tmp_path / "meterlib.toml").write_text(SETTINGS.format(url=server.url))
    (tmp_path / "book.toml").write_text(BOOK)
    gateway = Gateway(server.url, clock)
    yield gateway
    gateway.meter.close()


@pytest.fixture
def run(gateway: Gateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys, tmp_path / "meterlib.toml")


@pytest.mark.parametrize(
    "jumps", [(-HOUR_MS,), (YEAR_MS,), (YEAR_MS, -YEAR_MS), (-HOUR_MS, YEAR_MS, -YEAR_MS - HOUR_MS)]
)
def test_whatever_the_clock_does_each_call_is_archived_once_and_in_order_of_time(
    gateway: Gateway, run: Run, tmp_path: Path, jumps: tuple[int, ...]
) -> None:
    """Back an hour, forward a year and back: numbers hide no entry, and times of a ledger never go back."""
    gateway.book(3)
    assert 0 == run("export", "run").code
    for jump_ms in jumps:
        gateway.clock.set(gateway.clock.now_ms + jump_ms)
        gateway.book(3)
        assert 0 == run("export", "run").code

    with Archive(tmp_path / "archive") as archive:
        entries = list(archive.entries(0))
    assert [f"r{number}" for number in range(gateway.calls)] == [one.reservation_id for one in entries]
    assert sorted(one.booked_at for one in entries) == [one.booked_at for one in entries]
    assert 0 == run("verify", str(tmp_path / "archive")).code
    cost = run("report", "cost", "--by", "tenant", "--json", "--strict")
    assert (0, str(3 * gateway.calls)) == (cost.code, cost.json["rows"][0]["list_cost"])
    assert 0 == run("export", "status").code


def test_a_month_that_a_jump_seemed_to_end_is_closed_with_what_was_booked_in_it(
    gateway: Gateway, run: Run, tmp_path: Path
) -> None:
    """What was booked at the wrong time is billed in the month that its entry says, once; nothing changes the close."""
    gateway.book(2)
    gateway.clock.set(gateway.clock.now_ms + YEAR_MS)
    gateway.book(1)
    gateway.clock.set(gateway.clock.now_ms - YEAR_MS)
    gateway.book(2)
    assert 0 == run("export", "run").code

    closed = run("close", "2026-10", "--json")

    assert (0, 2) == (closed.code, sum(sum(one["entries"].values()) for one in closed.json["shards"]))
    gateway.book(1)
    assert 0 == run("export", "run").code
    assert 0 == run("close", "2026-10").code, "it is what it was"
    months = run("report", "cost", "--by", "period", "--json").json["rows"]
    assert {"2026-10": "6", "2027-10": "12"} == {row["period"]: row["list_cost"] for row in months}
    assert 0 == run("verify", str(tmp_path / "archive")).code
