"""Clocks that jump, and time that simply passes: no admission too many, no hold for ever, windows that do slide."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest
import redis

from meterlib import Limit, Meter, Policy, QuotaExceeded, StoreOptions, Usage
from meterlib.testing import Clock
from tests.faults.world import check_books, everything
from tests.support.servers import FrozenClock, Server, available, start_server

NOW_MS = 1_790_000_000_000
SECOND_MS = 1000
MINUTE_MS = 60_000
HOUR_MS = 3_600_000
DAY_MS = 86_400_000
QUOTA = 6
OPTIONS = StoreOptions(shards=1)
POLICY = Policy(
    limits=(
        Limit(name="exact", quota=QUOTA, window="1m"),
        Limit(name="coarse", unit="input_tokens", quota=QUOTA * 10, window="1m"),
    )
)
SLOTS = Policy(limits=(Limit(name="slots", quota=2, open=True),))
STEPS_BACK_MS = (SECOND_MS, 10 * MINUTE_MS, DAY_MS)


class Settable(Protocol):
    """A clock of the server's or of the scripts'."""

    @property
    def now_ms(self) -> int: ...

    def set(self, now_ms: int) -> None: ...


class Timed(NamedTuple):
    """A store whose time is set."""

    clock: Settable
    server: Server
    own: Clock | None

    def meter(self, policy: Policy) -> Meter:
        return Meter.connect(self.server.url, policy, options=OPTIONS, clock=self.own, sweep_interval_ms=0)

    def advance(self, ms: int) -> None:
        self.clock.set(self.clock.now_ms + ms)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FrozenClock, Server]]:
    reason = FrozenClock.available() or available("valkey")
    if reason:
        pytest.skip(reason)
    clock = FrozenClock(tmp_path_factory.mktemp("clock"), NOW_MS)
    with start_server(tmp_path_factory.mktemp("frozen"), clock=clock) as server:
        yield clock, server


@pytest.fixture(params=["the server's clock", "the scripts' clock"])
def timed(request: pytest.FixtureRequest) -> Timed:
    """An empty store, once with the time of a whole server set, and once only that of the scripts."""
    if request.param == "the server's clock":
        clock, server = request.getfixturevalue("frozen")
        clock.set(NOW_MS)
        made = Timed(clock, server, None)
    else:
        own = Clock(NOW_MS)
        made = Timed(own, request.getfixturevalue("valkey"), own)
    with made.server.client() as client:
        client.flushall()
    return made


def admitted(meter: Meter, amount: int = 10) -> bool:
    """Whether a call passes; it is settled at once."""
    try:
        meter.reserve("acme", {}, Usage(input_tokens=amount)).settle(Usage(input_tokens=amount))
    except QuotaExceeded:
        return False
    return True


def fill(meter: Meter) -> int:
    """Make calls until one is denied; how many passed."""
    passed = 0
    while admitted(meter):
        passed += 1
        assert passed <= 100
    return passed


# ── The clock is set back ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("back_ms", STEPS_BACK_MS)
def test_a_clock_set_back_admits_nothing_more(timed: Timed, back_ms: int) -> None:
    """Operator: a server whose clock is put right, however far, gives nobody a second quota."""
    with timed.meter(POLICY) as meter:
        assert fill(meter) == QUOTA
        timed.advance(-back_ms)
        assert fill(meter) == 0
        for _ in range(59):
            timed.advance(SECOND_MS)
            assert fill(meter) == 0
        check_books(meter)


@pytest.mark.parametrize("back_ms", STEPS_BACK_MS)
def test_a_window_goes_on_sliding_after_the_clock_was_set_back(timed: Timed, back_ms: int) -> None:
    """Operator: after a step back time goes on at half speed: a full quota is free after two windows, and not before.

    Something was written in between: in a busy store somebody always does.
    """
    with timed.meter(POLICY) as meter:
        assert fill(meter) == QUOTA
        timed.advance(-back_ms)
        meter.record("somebody-else", {}, Usage(input_tokens=1))
        waited_ms = 0
        while fill(meter) == 0:
            timed.advance(500)
            waited_ms += 500
            assert waited_ms <= 2 * MINUTE_MS + 3 * SECOND_MS
        assert waited_ms >= MINUTE_MS
        check_books(meter)


@pytest.mark.parametrize("back_ms", STEPS_BACK_MS[1:])
def test_a_window_goes_on_sliding_even_if_all_calls_are_denied(timed: Timed, back_ms: int) -> None:
    """Operator: after a step back by a day, a tenant whose quota is full is not locked out for that day."""
    with timed.meter(POLICY) as meter:
        assert fill(meter) == QUOTA
        timed.advance(-back_ms)
        waited_ms = 0
        while not admitted(meter):
            timed.advance(SECOND_MS)
            waited_ms += SECOND_MS
            meter.sweep()
            assert waited_ms <= 2 * MINUTE_MS + 3 * SECOND_MS


@pytest.mark.parametrize("back_ms", STEPS_BACK_MS)
def test_a_hold_ends_though_the_clock_was_set_back(timed: Timed, back_ms: int) -> None:
    """Operator: a crashed caller's slot is free after at most twice its lease, wherever the clock was put."""
    with timed.meter(SLOTS) as meter:
        mine = meter.reserve("acme", {}, lease_ms=MINUTE_MS)
        timed.advance(-back_ms)
        meter.record("somebody-else", {}, Usage(input_tokens=1))
        timed.advance(MINUTE_MS - back_ms % 2 - 2)
        assert meter.find("acme", mine.id).status == "open"
        timed.advance(MINUTE_MS + 10)
        meter.sweep()
        assert meter.find("acme", mine.id).status == "expired"
        assert meter.head(0).open_reservations == 0
        assert meter.peek("acme")[0].used == 0


@pytest.mark.parametrize("back_ms", STEPS_BACK_MS[1:])
def test_a_hold_ends_though_the_clock_was_set_back_and_only_the_sweep_runs(timed: Timed, back_ms: int) -> None:
    """Operator: the background sweep alone frees a crashed caller's slot, within twice its lease."""
    with timed.meter(SLOTS) as meter:
        meter.reserve("acme", {}, lease_ms=MINUTE_MS)
        timed.advance(-back_ms)
        for _ in range(14):
            meter.sweep()
            timed.advance(10 * SECOND_MS)
        meter.sweep()
        assert meter.head(0).open_reservations == 0


@pytest.mark.parametrize("back_ms", STEPS_BACK_MS)
def test_books_stay_in_order_though_the_clock_was_set_back(timed: Timed, back_ms: int) -> None:
    """Finance: numbers have no gap and times never decrease, wherever the clock was put."""
    with timed.meter(POLICY) as meter:
        for number in range(20):
            meter.record("acme", {}, Usage(input_tokens=1), record_id=f"record-{number}")
            timed.advance(-back_ms if number % 4 == 2 else SECOND_MS)
        assert len(check_books(meter)) == 20


# ── The clock is set forward ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_clock_that_jumps_forward_and_back_admits_one_more_window_and_no_more(timed: Timed) -> None:
    """Operator: an hour forward frees what an hour frees; coming back does not free it again."""
    with timed.meter(POLICY) as meter:
        assert fill(meter) == QUOTA
        timed.advance(HOUR_MS)
        assert fill(meter) == QUOTA
        timed.advance(-HOUR_MS)
        passed = 0
        for _ in range(59):
            passed += fill(meter)
            timed.advance(SECOND_MS)
        assert passed == 0


def test_holds_that_a_jump_forward_ended_are_settled_late_and_once(timed: Timed) -> None:
    """Finance: calls that were running while the clock jumped are billed in full, marked late."""
    with timed.meter(SLOTS) as meter:
        running = [meter.reserve("acme", {}, Usage(input_tokens=5), lease_ms=10 * MINUTE_MS) for _ in range(2)]
        timed.advance(HOUR_MS)
        assert meter.reserve("acme", {}).limits[0].used == 1
        timed.advance(-HOUR_MS)
        for reservation in running:
            entry = reservation.settle(Usage(input_tokens=7))
            assert (entry.kind, entry.after) == ("late", "expired")
            assert reservation.settle(Usage(input_tokens=7)).n == entry.n
        kinds = [kind for _, kind in check_books(meter)]
        assert sorted(kinds) == ["expired", "expired", "late", "late"]
        assert meter.peek("acme")[0].used == 1


# ── Time passes ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_window_slides_under_constant_traffic(timed: Timed) -> None:
    """Operator: a tenant that never pauses gets its quota in every window, and not only in the first."""
    passed: list[int] = []
    with timed.meter(POLICY) as meter:
        for _ in range(3 * 60):
            if admitted(meter):
                passed.append(timed.clock.now_ms)
            timed.advance(SECOND_MS)
    for first, seventh in zip(passed, passed[QUOTA:], strict=False):
        assert seventh - first >= MINUTE_MS
    assert 3 * QUOTA - 1 <= len(passed) <= 3 * QUOTA


def test_traffic_just_below_the_quota_is_never_denied(timed: Timed) -> None:
    """Operator: whoever keeps to the quota, with the resolution of the window to spare, is never turned away."""
    with timed.meter(POLICY) as meter:
        for _ in range(4 * QUOTA):
            assert admitted(meter)
            timed.advance(MINUTE_MS // QUOTA + SECOND_MS)


def test_ten_thousand_denied_calls_leave_no_trace(valkey: Server) -> None:
    """Operator: a client that hammers while it is denied is not punished for it, and costs the store nothing."""
    clock = Clock(NOW_MS)
    with valkey.client() as client, Meter.connect(valkey.url, POLICY, options=OPTIONS, clock=clock) as meter:
        client.flushall()
        assert fill(meter) == QUOTA
        before = traces(client)
        denied, call = 0, Usage(input_tokens=10)
        for _ in range(10_000):
            try:
                meter.reserve("acme", {}, call)
            except QuotaExceeded:
                denied += 1
        assert denied == 10_000
        assert traces(client) == before
        clock.advance(ms=MINUTE_MS + SECOND_MS)
        assert [limit.used for limit in meter.peek("acme")] == [0, 0]
        assert fill(meter) == QUOTA


def traces(client: redis.Redis) -> list[object]:
    """How often the server was changed, and all that it holds."""
    return [client.info("persistence")["rdb_changes_since_last_save"], everything(client)]


def test_a_denial_changes_nothing_and_an_append_only_file_does_not_grow(tmp_path: Path) -> None:
    """Operator: denied calls cost no disk."""
    reason = available("valkey")
    if reason:
        pytest.skip(reason)
    clock = Clock(NOW_MS)
    with (
        start_server(tmp_path, append_only=True) as server,
        Meter.connect(server.url, POLICY, options=OPTIONS, clock=clock) as meter,
    ):
        assert fill(meter) == QUOTA
        files = sorted((tmp_path / "appendonlydir").iterdir())
        before = [file.read_bytes() for file in files]
        for _ in range(200):
            assert not admitted(meter)
        assert [file.read_bytes() for file in files] == before
