"""A reservation ends once: settled twice, settled too late, or settled, cancelled and expired at the same moment."""

from __future__ import annotations

import random
import threading
from collections import Counter

import pytest
import redis

from meterlib import LedgerEntry, Meter, ReservationConflict, ReservationEnded
from meterlib.testing import Clock
from tests.faults.world import (
    HOUR_MS,
    OPTIONS,
    OTHER_USED,
    POLICY,
    START_MS,
    TENANT,
    USED,
    check_books,
    contents,
    hold,
    standing,
)
from tests.support.servers import Server

ROUNDS = 150


@pytest.mark.parametrize("swept", [False, True], ids=["not swept", "swept"])
def test_a_settle_after_the_lease_is_booked_late_once_and_charged(
    swept: bool, meter: Meter, clock: Clock, direct: redis.Redis
) -> None:
    """Finance: usage that comes after its reservation expired is billed once, and every budget counts it."""
    hold(meter, "mine", lease_ms=1000)
    clock.advance(ms=1000)
    if swept:
        meter.sweep()
        assert standing(meter)["hour"] == (100, 0)
        assert standing(meter)["freed"] == (0, 0)
        assert standing(meter)["kept"] == (50, 0)
    entry = meter.settle(TENANT, "mine", USED)
    assert (entry.kind, entry.after, entry.reserved_at) == ("late", "expired", START_MS)
    settled = contents(direct)
    for _ in range(3):
        assert meter.settle(TENANT, "mine", USED).n == entry.n
    with pytest.raises(ReservationEnded, match="late"):
        meter.cancel(TENANT, "mine")
    assert contents(direct) == settled
    assert check_books(meter) == [("mine", "expired"), ("mine", "late")]
    assert standing(meter) == {
        "requests": (1, 0),
        "minute": (130, 0),
        "hour": (130, 0),
        "kept": (20, 0),
        "freed": (150, 0),
        "open": (0, 0),
    }


def test_a_lease_ends_at_its_last_millisecond_and_not_before(meter: Meter, clock: Clock) -> None:
    """Operator: until the moment it was told, a reservation can be settled in time; from then on it is late."""
    for early_ms, kind in ((1, "settled"), (0, "late")):
        mine = hold(meter, f"mine-{early_ms}", lease_ms=5000)
        assert mine.expires_at_ms == clock.now_ms + 5000
        clock.set(mine.expires_at_ms - early_ms)
        assert meter.find(TENANT, mine.id).status == ("open" if early_ms else "expired")
        assert mine.settle(USED).kind == kind


def test_a_second_settle_with_another_usage_is_refused_and_the_first_stands(
    meter: Meter, clock: Clock, direct: redis.Redis
) -> None:
    """Finance: what was booked is never replaced; who says otherwise is told both numbers."""
    for prepare in ("settled", "late"):
        mine = hold(meter, f"mine-{prepare}", lease_ms=1000)
        if prepare == "late":
            clock.advance(ms=1000)
        first = mine.settle(USED)
        assert first.kind == prepare
        before = contents(direct)
        with pytest.raises(ReservationConflict, match="another usage") as conflict:
            mine.settle(OTHER_USED)
        assert conflict.value.existing is not None
        assert conflict.value.given is not None
        assert '"input_tokens":130' in conflict.value.existing
        assert '"input_tokens":7' in conflict.value.given
        assert contents(direct) == before
        assert mine.settle(USED).n == first.n


def test_settle_cancel_and_expiry_at_the_same_moment_have_one_winner(
    server: Server, meter: Meter, direct: redis.Redis
) -> None:
    """Finance: whatever races at a lease's last moment, the reservation ends once, and usage is booked once."""
    lease_ms = 60_000
    clocks = {name: Clock(START_MS) for name in ("settle", "cancel", "expire")}
    meters = {name: Meter.connect(server.url, POLICY, options=OPTIONS, clock=clocks[name]) for name in clocks}
    barrier = threading.Barrier(3, timeout=20)
    told: dict[str, list[object]] = {name: [] for name in clocks}

    def race(name: str) -> None:
        for number in range(ROUNDS):
            now_ms = START_MS + number * lease_ms
            clocks[name].set(now_ms)
            barrier.wait()
            if name == "settle":
                hold(meters[name], f"race-{number}", lease_ms=lease_ms)
            # The winner of the race for the server is also the one whose clock counts: time never goes back.
            clocks[name].set(now_ms + lease_ms - (name != "expire"))
            barrier.wait()
            try:
                if name == "settle":
                    told[name].append(meters[name].settle(TENANT, f"race-{number}", USED))
                elif name == "cancel":
                    meters[name].cancel(TENANT, f"race-{number}")
                    told[name].append(None)
                else:
                    told[name].append(meters[name].sweep())
            except ReservationEnded as error:
                told[name].append(error)
            barrier.wait()

    threads = [threading.Thread(target=race, args=(name,)) for name in clocks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for one in meters.values():
        one.close()
    assert {name: len(answers) for name, answers in told.items()} == dict.fromkeys(clocks, ROUNDS)
    by_id: dict[str, list[str]] = {}
    for entry_id, kind in check_books(meter):
        by_id.setdefault(entry_id, []).append(kind)
    ways = Counter(tuple(kinds) for kinds in by_id.values())
    assert set(ways) <= {("settled",), ("cancelled", "late"), ("expired", "late")}
    assert sum(ways.values()) == ROUNDS
    for number in range(ROUNDS):
        kinds = by_id[f"race-{number}"]
        settled, cancelled = told["settle"][number], told["cancel"][number]
        assert isinstance(settled, LedgerEntry)
        assert settled.kind == kinds[-1]
        assert (cancelled is None) == (kinds[0] == "cancelled")
        if isinstance(cancelled, ReservationEnded):
            assert cancelled.kind in kinds
    assert meter.head(0).open_reservations == 0


def test_many_verbs_at_random_on_few_reservations_end_each_of_them_once(
    server: Server, meter: Meter, clock: Clock
) -> None:
    """Finance: any order of duplicates by any number of callers comes to one end and one booking for each id."""
    failed: list[BaseException] = []

    def live(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(150):
                name = f"few-{chance.randrange(25)}"
                verb = chance.choice(["reserve", "settle", "settle", "cancel", "revise", "renew"])
                try:
                    if verb == "reserve":
                        hold(meter, name)
                    elif verb == "settle":
                        meter.settle(TENANT, name, chance.choice([USED, OTHER_USED]))
                    elif verb == "cancel":
                        meter.cancel(TENANT, name)
                    elif verb == "revise":
                        meter.revise(TENANT, name, USED)
                    else:
                        meter.renew(TENANT, name, 2 * HOUR_MS)
                except (ReservationConflict, ReservationEnded):
                    pass
                except Exception as error:
                    if type(error).__name__ != "ReservationNotFound":
                        raise
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=live, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    clock.advance(ms=3 * HOUR_MS)
    meter.sweep()
    ended = check_books(meter)
    assert len({entry_id for entry_id, _ in ended}) == 25
    assert {limit.held for limit in meter.peek(TENANT, {"provider": "anthropic"})} == {0}


def test_a_reservation_taken_up_again_by_another_process_can_be_revised_and_renewed(
    server: Server, meter: Meter, clock: Clock
) -> None:
    """Operator: a gateway that restarts in the middle of a call goes on with the same hold, and keeps it alive."""
    first = hold(meter, "mine", lease_ms=60_000)
    first.revise(OTHER_USED)
    first.renew(60_000)
    with Meter.connect(server.url, POLICY, options=OPTIONS, clock=clock) as restarted:
        again = hold(restarted, "mine", lease_ms=60_000)
        again.revise(USED)
        assert standing(meter)["hour"] == (130, 130)
        clock.advance(ms=50_000)
        again.renew(60_000)
        clock.advance(ms=50_000)
        assert again.settle(USED).kind == "settled"
