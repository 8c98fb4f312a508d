"""Servers that freeze, die, come back, or forget the scripts: nothing counts twice, and nothing booked is lost."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import redis
from msgspec.structs import replace

from meterlib import Meter, QuotaExceeded, StoreUnavailable
from meterlib.testing import Clock
from tests.faults.world import (
    ACT_MS,
    HOUR_MS,
    IMPATIENT,
    OPTIONS,
    POLICY,
    TENANT,
    USED,
    VERBS,
    ask,
    build,
    check_books,
    contents,
    hold,
    standing,
)
from tests.support.servers import Server, available, start_server, wait_until

HASTY = replace(IMPATIENT, timeout_ms=60, deadline_ms=61)  # one try


@pytest.fixture(scope="module", params=["valkey", "redis"])
def durable(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that keeps an append-only file and syncs every write."""
    kind = str(request.param)
    reason = available(kind)
    if reason:
        pytest.skip(reason)
    with start_server(tmp_path_factory.mktemp(kind), kind, append_only=True) as running:
        yield running


def frozen_under(server: Server, direct: redis.Redis, act: Callable[[], object]) -> None:
    """Let the server stand still while somebody calls and gives up; it has run what was sent when this returns."""
    before = executed(direct)
    server.pause()
    try:
        with pytest.raises(StoreUnavailable, match="repeating is safe"):
            act()
    finally:
        server.resume()
    wait_until(lambda: executed(direct) > before, "what was sent meanwhile")


def executed(direct: redis.Redis) -> int:
    """How many script calls the server has run."""
    return int(direct.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0))


def test_calls_to_a_frozen_server_take_effect_once_when_it_goes_on(
    server: Server, meter: Meter, clock: Clock, direct: redis.Redis
) -> None:
    """Operator: callers of a server that stands still time out; what they had sent does no harm when it goes on."""
    with Meter.connect(server.url, POLICY, options=HASTY, clock=clock) as hasty:
        hold(hasty, "first-call").cancel()
        for verb in VERBS:
            if verb.name == "adjust":  # reads the ledger first, which would be all that a frozen server gets to see
                continue
            direct.flushall()
            build(meter, clock)
            verb.answer(meter)
            expected = contents(direct)
            direct.flushall()
            build(meter, clock)
            hasty.peek(TENANT)
            frozen_under(server, direct, partial(verb.act, hasty))
            verb.act(meter)
            assert contents(direct) == expected, verb.name
            check_books(meter)


def test_a_hold_that_nobody_waited_for_is_gone_when_its_lease_ends(
    server: Server, meter: Meter, clock: Clock, direct: redis.Redis
) -> None:
    """Operator: a reserve that a frozen server runs after its caller gave up is a hold for one lease, and no longer."""
    with Meter.connect(server.url, POLICY, options=HASTY, clock=clock) as hasty:
        hasty.cancel(TENANT, "first-call")
        frozen_under(server, direct, lambda: hold(hasty, "nobodys", lease_ms=60_000))
    assert standing(meter)["open"] == (1, 1)
    clock.advance(ms=60_000)
    assert standing(meter)["open"] == (0, 0)
    meter.sweep()
    assert meter.head(0).open_reservations == 0
    assert check_books(meter) == [("nobodys", "expired")]


def test_a_server_killed_between_any_two_calls_loses_nothing_it_acknowledged(durable: Server, clock: Clock) -> None:
    """Finance: with an append-only file that is synced, every booked entry is there after a crash, and no other."""
    with (
        durable.client() as client,
        Meter.connect(durable.url, POLICY, options=OPTIONS, clock=clock) as meter,
    ):
        client.flushall()
        build(meter, clock)
        answers = [verb.answer(meter) for verb in VERBS]
        expected = contents(client)
        client.flushall()
        build(meter, clock)
        for verb, answer in zip(VERBS, answers, strict=True):
            durable.kill()
            durable.start()
            assert verb.answer(meter) == answer, verb.name
            durable.kill()
            durable.start()
        assert contents(client) == expected
        assert {client.pttl(key) for key in ask(client, "KEYS", "*")} == {-1}
        check_books(meter)


def test_calls_made_while_a_server_restarts_wait_for_it(durable: Server, clock: Clock) -> None:
    """Operator: a restart within the deadline is a pause to callers, and not an error."""
    with durable.client() as client, Meter.connect(durable.url, POLICY, options=OPTIONS, clock=clock) as meter:
        client.flushall()
        hold(meter, "mine")
        durable.kill()
        booked: list[object] = []
        settling = threading.Thread(target=lambda: booked.append(meter.settle(TENANT, "mine", USED)))
        settling.start()
        durable.start()
        settling.join(10)
        assert len(booked) == 1
        assert check_books(meter) == [("mine", "settled")]


def test_a_server_without_a_file_forgets_but_usage_is_still_booked(
    server: Server, meter: Meter, clock: Clock, direct: redis.Redis
) -> None:
    """Finance: a settle whose reservation the store lost is written all the same, marked late, and charged once."""
    mine = hold(meter, "mine")
    server.kill()
    server.start()
    entry = mine.settle(USED)
    assert (entry.kind, entry.after, entry.n) == ("late", "unknown", 1)
    assert mine.settle(USED).n == 1
    assert standing(meter)["hour"] == (130, 0)
    assert check_books(meter) == [("mine", "late")]


# ── The scripts are gone ──────────────────────────────────────────────────────────────────────────────────────────────


def random_life(meter: Meter, chance: random.Random, flush: redis.Redis | None) -> list[object]:
    """Calls at random; with `flush`, the server forgets its scripts now and then."""
    told: list[object] = []
    for number in range(120):
        if flush is not None and chance.random() < 0.5:
            flush.script_flush()
        elif flush is None:
            chance.random()
        reservation_id = f"life-{chance.randrange(number + 1)}"
        verb = chance.choice(["reserve", "settle", "cancel", "revise", "record", "peek", "sweep"])
        try:
            if verb == "reserve":
                told.append(hold(meter, reservation_id).limits)
            elif verb == "settle":
                told.append(meter.settle(TENANT, reservation_id, USED))
            elif verb == "cancel":
                meter.cancel(TENANT, reservation_id)
            elif verb == "revise":
                meter.revise(TENANT, reservation_id, USED)
            elif verb == "record":
                told.append(meter.record(TENANT, {}, USED, record_id=f"record-{reservation_id}"))
            elif verb == "peek":
                told.append(meter.peek(TENANT, {"provider": "anthropic"}))
            else:
                told.append((meter.sweep().expired, check_books(meter)))
        except Exception as error:
            told.append(str(error))
    return told


@pytest.mark.parametrize("seed", range(3))
def test_a_server_that_forgets_its_scripts_at_random_is_not_noticed(
    seed: int, meter: Meter, clock: Clock, direct: redis.Redis
) -> None:
    """Operator: SCRIPT FLUSH, at whatever moment, changes no answer and no state."""
    undisturbed = random_life(meter, random.Random(seed), None), contents(direct)
    direct.flushall()
    assert (random_life(meter, random.Random(seed), direct), contents(direct)) == undisturbed


def test_a_server_that_forgets_its_scripts_all_the_time_is_not_noticed(
    server: Server, meter: Meter, clock: Clock, direct: redis.Redis
) -> None:
    """Operator: even if the scripts vanish within a call, between its parts, everything is counted and booked once."""
    over = threading.Event()
    failed: list[BaseException] = []

    def forget() -> None:
        with server.client() as client:
            while not over.is_set():
                client.script_flush()

    def live(name: str) -> None:
        try:
            for number in range(40):
                hold(meter, f"{name}-{number}").settle(USED)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=live, args=(name,)) for name in "ab"]
    forgetting = threading.Thread(target=forget)
    forgetting.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    over.set()
    forgetting.join(10)
    assert failed == []
    assert len(check_books(meter)) == 80
    assert standing(meter)["hour"] == (80 * 130, 0)


def test_six_hundred_foreign_scripts_push_ours_out_unnoticed(meter: Meter, clock: Clock, direct: redis.Redis) -> None:
    """Operator: a server shared with users of EVAL, which keeps only so many scripts, answers as before."""
    direct.script_flush()
    build(meter, clock)
    foreign = itertools.count()
    for verb in VERBS:
        for _ in range(50):
            direct.eval(f"return {next(foreign)}", 0)
        verb.answer(meter)
    assert next(foreign) == 600
    pushed_out = contents(direct)
    direct.flushall()
    build(meter, clock)
    for verb in VERBS:
        verb.answer(meter)
    assert contents(direct) == pushed_out


def test_the_text_of_a_script_is_sent_once_and_then_only_its_name(
    meter: Meter, clock: Clock, direct: redis.Redis
) -> None:
    """Operator: calls cost the network their arguments, and not kilobytes of script, however many there are."""
    direct.script_flush()
    direct.config_resetstat()
    for number in range(20):
        hold(meter, f"short-{number}").settle(USED)
    assert direct.info("commandstats")["cmdstat_eval"]["calls"] == 2


def test_a_denial_is_still_a_denial_after_a_restart(durable: Server, clock: Clock) -> None:
    """Operator: a crash gives nobody a fresh quota."""
    with durable.client() as client, Meter.connect(durable.url, POLICY, options=OPTIONS, clock=clock) as meter:
        client.flushall()
        clock.set(ACT_MS)
        for number in range(20):
            hold(meter, f"slot-{number}", lease_ms=HOUR_MS)
        durable.kill()
        durable.start()
        with pytest.raises(QuotaExceeded, match="open"):
            hold(meter, "one-more")
