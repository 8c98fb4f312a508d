"""Processes and tasks that race for one quota: it is used up to the last unit, and never beyond."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from meterlib import Limit, Meter, Policy, Usage
from meterlib.testing import Clock
from tests.concurrency.processes import run_together
from tests.concurrency.worker import OPTIONS, TENANT, Job
from tests.conftest import soak_seconds
from tests.faults.world import check_books
from tests.support.servers import Server

NOW_MS = 1_790_000_000_000
WINDOW = Limit(name="window", unit="units", quota=700, window="7d")
PERIOD = Limit(name="period", unit="units", quota=600, period="month")
OPEN = Limit(name="open", quota=150, open=True)
REQUESTS = Limit(name="requests", quota=170, window="7d")


def race(server: Server, policy: Policy, *, now_ms: int | None, seed: int = 0, tasks: int = 8) -> list[int]:
    """All amounts that were admitted to three processes."""
    jobs = [
        Job(verb="race", url=server.url, policy=policy, seed=seed * 10 + n, tasks=tasks, now_ms=now_ms)
        for n in range(3)
    ]
    said = run_together(jobs)
    assert all(len(words) == 1 for words in said)
    return [amount for words in said for amount in words[0]]


@pytest.mark.parametrize("limit", [WINDOW, PERIOD], ids=lambda limit: limit.name)
def test_racing_callers_get_exactly_the_quota(limit: Limit, emptied: Server) -> None:
    """Operator: however many gateways share a quota, together they get all of it and nothing more."""
    admitted = race(emptied, Policy(limits=(limit,)), now_ms=None)
    assert sum(admitted) == limit.quota


def test_racing_callers_get_exactly_as_many_slots_as_there_are(emptied: Server) -> None:
    """Operator: no more calls run at the same time than allowed, and no slot stays empty."""
    assert len(race(emptied, Policy(limits=(OPEN,)), now_ms=NOW_MS)) == OPEN.quota


def test_racing_callers_of_several_limits_are_held_to_the_tightest(emptied: Server) -> None:
    """Operator: all limits hold at once, and a call that one of them denies uses up none of the others."""
    policy = Policy(limits=(WINDOW, PERIOD, OPEN, REQUESTS))
    admitted = race(emptied, policy, now_ms=NOW_MS)
    assert sum(admitted) <= PERIOD.quota
    assert len(admitted) <= OPEN.quota
    assert sum(admitted) == PERIOD.quota or len(admitted) == OPEN.quota
    with meter_of(emptied, policy) as meter:
        used = {limit.name: limit.used for limit in meter.peek(TENANT)}
    assert used == {
        "window": sum(admitted),
        "period": sum(admitted),
        "open": len(admitted),
        "requests": len(admitted),
    }


def meter_of(server: Server, policy: Policy) -> Meter:
    """A meter at the moment of the race."""
    return Meter.connect(server.url, policy, options=OPTIONS, clock=Clock(NOW_MS))


@pytest.mark.parametrize("usages", [1, 4], ids=["the same usage", "other usages"])
def test_a_settle_made_by_many_books_once(usages: int, emptied: Server) -> None:
    """Finance: of any number of settles of one reservation, one is booked, and all who agree with it get its number."""
    policy = Policy(limits=(WINDOW, OPEN))
    with meter_of(emptied, policy) as meter:
        ids = [meter.reserve(TENANT, {}, Usage(amounts={"units": 50})).id for _ in range(5)]
        job = Job(
            verb="settle",
            url=emptied.url,
            policy=policy,
            now_ms=NOW_MS,
            tasks=24,
            amount_max=usages,
            reservation_ids=ids,
        )
        answers = [tuple(answer) for words in run_together([job, job, job]) for answer in words[0]]
        assert len(answers) == 72 * len(ids)
        for settled in ids:
            (winner,) = {answer for answer in answers if answer[0] == settled and answer[1] != "conflict"}
            assert answers.count(winner) == 72 // usages
        entries = list(meter.ledger(0))
        assert Counter(check_books(meter)) == Counter((settled, "settled") for settled in ids)
        window, slots = meter.peek(TENANT)
        assert (window.used, window.held, slots.used) == (sum(amount(entry.usage) for entry in entries), 0, 0)


def amount(usage: object) -> int:
    """The units of an entry's usage."""
    assert isinstance(usage, dict)
    return int(usage["amounts"]["units"])


@pytest.mark.soak
def test_races_again_and_again(emptied: Server) -> None:
    """Operator: what holds for one race holds for many, with other amounts and another number of tasks."""
    ends_at, seed = time.monotonic() + soak_seconds(), 1
    while time.monotonic() < ends_at:
        with emptied.client() as client:
            client.flushall()
        limit = (WINDOW, PERIOD)[seed % 2]
        assert sum(race(emptied, Policy(limits=(limit,)), now_ms=NOW_MS, seed=seed, tasks=1 + seed % 40)) == limit.quota
        seed += 1
