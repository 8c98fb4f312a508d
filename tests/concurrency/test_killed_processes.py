"""Processes that die at any moment: no hold outlives its lease, no booked usage is lost, and the sums agree."""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any, Literal

import pytest

from meterlib import Limit, Meter, Policy
from meterlib.testing import Clock
from tests.concurrency.processes import run_together
from tests.concurrency.worker import LEASE_MS, OPTIONS, TENANT, Job
from tests.conftest import soak_seconds
from tests.faults.world import STATE, ask, check_books
from tests.support.servers import Server

NOW_MS = 1_790_000_000_000
POLICY = Policy(
    limits=(
        Limit(name="window", unit="units", quota=600, window="7d"),
        Limit(name="kept", unit="units", quota=1_000_000, period="month"),
        Limit(name="freed", unit="units", quota=1_000_000, period="month", on_expiry="free"),
        Limit(name="requests", quota=10_000, window="7d"),
        Limit(name="open", quota=60, open=True),
    )
)
WHEN: tuple[Literal["before", "sent", "after"], ...] = ("before", "sent", "after")


def mortal_jobs(server: Server, seed: int) -> list[Job]:
    """Three processes, of which two die at a script call and a moment of it that the seed chooses."""
    chance = random.Random(seed)
    return [
        Job(
            verb="live", url=server.url, policy=POLICY, now_ms=NOW_MS, seed=seed * 10 + n, lives=40,
            die_at=0 if n == 0 else chance.randint(1, 90), die_when=chance.choice(WHEN),
        )
        for n in range(3)
    ]  # fmt: skip


def units(counts: Any) -> int:
    """The units of an entry's usage or estimate."""
    return int(counts.get("amounts", {}).get("units", 0))


def check_after_deaths(server: Server, said: list[list[Any]]) -> None:
    """All leases are over and swept: nothing is open, everything ended once, and ledger and limits agree."""
    words = [word for lines in said for word in lines]
    assert [word for word in words if word[0] == "error"] == []
    clock = Clock(NOW_MS + LEASE_MS)
    with server.client() as client, Meter.connect(server.url, POLICY, options=OPTIONS, clock=clock) as meter:
        known = {name.rpartition(b"/")[2].decode() for name in ask(client, "HKEYS", STATE) if name.startswith(b"r/")}
        meter.sweep()
        assert meter.head(0).open_reservations == 0
        ended = check_books(meter)
        assert Counter(entry_id for entry_id, _ in ended) == Counter(known)
        kinds = dict(ended)
        entries = {entry.reservation_id: entry for entry in meter.ledger(0)}
        for word in words:
            if word[0] == "held":
                assert word[1] in kinds
            elif word[0] == "settled":
                entry = entries[word[1]]
                assert (entry.kind, entry.n, units(entry.usage)) == ("settled", word[3], word[2])
            elif word[0] == "cancelled":
                assert kinds[word[1]] == "cancelled"
        limits = {limit.name: (limit.used, limit.held) for limit in meter.peek(TENANT)}
    of_kind = Counter(kinds.values())
    used = sum(units(entry.usage) for entry in entries.values() if entry.kind == "settled")
    left = sum(units(entry.estimate) for entry in entries.values() if entry.kind == "expired")
    assert set(of_kind) <= {"settled", "cancelled", "expired"}
    assert limits == {
        "window": (used + left, 0),
        "kept": (used + left, 0),
        "freed": (used, 0),
        "requests": (of_kind["settled"] + of_kind["expired"], 0),
        "open": (0, 0),
    }


@pytest.mark.parametrize("seed", range(3))
def test_processes_that_die_at_any_moment_leave_nothing_behind(seed: int, emptied: Server) -> None:
    """Finance: whatever a gateway was doing when it was killed, the books are whole and every hold ends by itself."""
    said = run_together(mortal_jobs(emptied, seed))
    assert said[0][-1] == ["done"]
    check_after_deaths(emptied, said)


@pytest.mark.parametrize("when", WHEN)
def test_a_process_that_dies_at_its_settle_has_settled_or_not(
    when: Literal["before", "sent", "after"], emptied: Server
) -> None:
    """Finance: killed around its settle, a call is either booked in full or stands as expired with its estimate."""
    jobs = [
        Job(
            verb="live",
            url=emptied.url,
            policy=POLICY,
            now_ms=NOW_MS,
            seed=die_at,
            lives=5,
            die_at=die_at,
            die_when=when,
        )
        for die_at in (1, 2, 3, 4)
    ]
    check_after_deaths(emptied, run_together(jobs))


@pytest.mark.soak
def test_processes_die_again_and_again(emptied: Server) -> None:
    """Finance: what holds for one death holds for many."""
    ends_at, seed = time.monotonic() + soak_seconds(), 1000
    while time.monotonic() < ends_at:
        with emptied.client() as client:
            client.flushall()
        check_after_deaths(emptied, run_together(mortal_jobs(emptied, seed)))
        seed += 1
