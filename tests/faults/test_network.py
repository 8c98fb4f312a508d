"""Replies that get lost, requests that come late or not at all, answers that make no sense: one effect, one answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import redis
from msgspec.structs import replace as replaced

from meterlib import AsyncMeter, Meter, ReservationEnded, StoreError, StoreUnavailable
from meterlib.testing import Clock
from tests.faults.world import (
    ATTRIBUTES,
    ESTIMATE,
    IMPATIENT,
    OTHER_USED,
    POLICY,
    TENANT,
    USED,
    VERBS,
    Verb,
    build,
    check_books,
    contents,
    hold,
    standing,
)
from tests.support.proxy import FaultProxy
from tests.support.servers import Server, wait_until

each_verb = pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
World = tuple[object, dict[str, object]]
GARBAGE = {
    "nonsense": b"garbage\r\n",
    "bytes of no meaning": b"\x00\xff\xfe\r\n",
    "an impossible length": b"$-7\r\n\r\n",
    "another type: a number": b":0\r\n",
    "another type: a status": b"+OK\r\n",
    "another type: nothing": b"$-1\r\n",
    "another type: no list": b"*-1\r\n",
    "an empty list": b"*0\r\n",
    "a list of a number": b"*1\r\n:5\r\n",
    "too many answers": b"*2\r\n*0\r\n*0\r\n",
}
MALFORMED = {
    "an answer without a word": b"*1\r\n*0\r\n",
    "an answer that is a number": b"*1\r\n*1\r\n:7\r\n",
    "an answer of an unknown word": b"*1\r\n*2\r\n$5\r\nhello\r\n:1\r\n",
    "an answer that is cut short": b"*1\r\n*2\r\n$7\r\nsettled\r\n:1\r\n",
}
PASSING = {
    "loading": b"-LOADING server is loading the dataset in memory\r\n",
    "slot on the move": b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n",
    "a replica": b"-READONLY You can't write against a read only replica.\r\n",
    "busy": b"-BUSY server is busy running a script.\r\n",
}
PASSING_IN_A_CLUSTER = {
    "cluster down": b"-CLUSTERDOWN The cluster is down\r\n",
    "primary down": b"-MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.\r\n",
}


def undisturbed(verb: Verb, meter: Meter, clock: Clock, direct: redis.Redis) -> World:
    """What the caller is told, and what the store then holds, if nothing goes wrong; the store is left empty."""
    build(meter, clock)
    world = verb.answer(meter), contents(direct)
    direct.flushall()
    return world


# ── The reply gets lost ───────────────────────────────────────────────────────────────────────────────────────────────


@each_verb
def test_a_call_whose_reply_is_lost_up_to_five_times_takes_effect_once(
    verb: Verb, meter: Meter, remote: Meter, proxy: FaultProxy, clock: Clock, direct: redis.Redis
) -> None:
    """Finance: a connection that breaks right after the store acted never counts or bills anything twice."""
    expected = undisturbed(verb, meter, clock, direct)
    for lost in range(1, 6):
        build(meter, clock)
        before = proxy.faults
        proxy.drop_replies(lost)
        assert (verb.answer(remote), contents(direct)) == expected
        assert proxy.faults == before + lost
        check_books(meter)
        direct.flushall()


@each_verb
def test_a_call_whose_reply_never_comes_is_repeated_and_takes_effect_once(
    verb: Verb, meter: Meter, remote: Meter, proxy: FaultProxy, clock: Clock, direct: redis.Redis
) -> None:
    """Operator: a reply that is swallowed costs one time-out, and neither a wrong answer nor a second effect."""
    expected = undisturbed(verb, meter, clock, direct)
    build(meter, clock)
    proxy.swallow_replies(1)
    assert (verb.answer(remote), contents(direct)) == expected
    assert proxy.faults == 1


def test_a_client_that_repeats_by_itself_does_no_harm(
    meter: Meter, proxy: FaultProxy, clock: Clock, direct: redis.Redis
) -> None:
    """Engineer: a ready-made client of redis-py, which repeats commands on its own, may be handed to a meter."""
    expected = {verb.name: undisturbed(verb, meter, clock, direct) for verb in VERBS}
    with redis.Redis(port=proxy.port, socket_timeout=0.15) as client:
        repeating = Meter(client, POLICY, options=IMPATIENT, clock=clock)
        for verb in VERBS:
            build(meter, clock)
            proxy.drop_replies(2)
            assert (verb.answer(repeating), contents(direct)) == expected[verb.name]
            direct.flushall()


# ── The request comes late, or not at all ─────────────────────────────────────────────────────────────────────────────


def late(
    first: Callable[[Meter], object], proxy: FaultProxy, clock: Clock, meanwhile: Callable[[], object], word: bytes
) -> None:
    """Let the request of `first` reach the store only after `meanwhile`; its caller has given up before."""
    options = replaced(IMPATIENT, timeout_ms=50, deadline_ms=60)
    with Meter.connect(proxy.url, POLICY, options=options, clock=clock) as hasty:
        hasty.peek(TENANT)
        done = len(proxy.executed)
        proxy.delay_requests(1, 0.4, matching=word)
        proxy.cut_requests(9, matching=word)  # whatever the caller tries after that one
        with pytest.raises(StoreUnavailable, match="repeating is safe"):
            first(hasty)
        assert not [words for words in proxy.executed[done:] if word in words]
        meanwhile()
        wait_until(lambda: any(word in words for words in proxy.executed[done:]), "the delayed request")


def executed(direct: redis.Redis) -> int:
    """How many script calls the server has run."""
    return int(direct.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0))


def test_a_reserve_that_comes_after_its_own_cancel_opens_nothing(
    meter: Meter, proxy: FaultProxy, clock: Clock, direct: redis.Redis
) -> None:
    """Operator: a caller that gave up and cancelled never leaves a hold behind, however late its request arrives."""
    before = executed(direct)
    late(
        lambda hasty: hold(hasty, "late-one"),
        proxy,
        clock,
        lambda: meter.cancel(TENANT, "late-one"),
        b"r/acme/late-one",
    )
    wait_until(lambda: executed(direct) >= before + 3, "the delayed reserve's end")
    assert meter.find(TENANT, "late-one").status == "cancelled"
    assert set(standing(meter).values()) == {(0, 0)}
    assert meter.head(0).open_reservations == 0
    assert check_books(meter) == []
    with pytest.raises(ReservationEnded, match="cancelled"):
        hold(meter, "late-one")


def test_a_reserve_that_comes_after_its_own_settle_opens_nothing(
    meter: Meter, proxy: FaultProxy, clock: Clock, direct: redis.Redis
) -> None:
    """Finance: usage that was booked as of an unknown reservation is not held a second time by the late reserve."""
    before = executed(direct)
    late(
        lambda hasty: hold(hasty, "late-one"),
        proxy,
        clock,
        lambda: meter.settle(TENANT, "late-one", USED, attributes=ATTRIBUTES),
        b"r/acme/late-one",
    )
    wait_until(lambda: executed(direct) >= before + 4, "the delayed reserve's end")
    assert check_books(meter) == [("late-one", "late")]
    assert standing(meter)["hour"] == (130, 0)
    assert standing(meter)["open"] == (0, 0)


def test_a_reserve_that_comes_after_its_own_repetition_holds_once(
    meter: Meter, proxy: FaultProxy, clock: Clock, direct: redis.Redis
) -> None:
    """Operator: of a request and its repetition, whichever comes first holds, and the other changes nothing."""
    before = executed(direct)
    late(lambda hasty: hold(hasty, "late-one"), proxy, clock, lambda: hold(meter, "late-one"), b"r/acme/late-one")
    wait_until(lambda: executed(direct) >= before + 3, "the delayed reserve's end")
    assert standing(meter)["hour"] == (100, 100)
    assert standing(meter)["open"] == (1, 1)


def test_a_revision_that_comes_after_a_later_one_changes_nothing(
    meter: Meter, proxy: FaultProxy, clock: Clock, direct: redis.Redis
) -> None:
    """Operator: what is held is always the newest estimate, whatever order revisions arrive in."""
    hold(meter, "mine")
    before = executed(direct)
    late(
        lambda hasty: hasty.revise(TENANT, "mine", OTHER_USED, revision=1),
        proxy,
        clock,
        lambda: meter.revise(TENANT, "mine", USED, revision=2),
        b"r/acme/mine",
    )
    wait_until(lambda: executed(direct) >= before + 3, "the delayed revision's end")
    assert standing(meter)["hour"] == (130, 130)


def test_a_settle_that_comes_after_its_own_cancel_is_booked_as_late(
    meter: Meter, proxy: FaultProxy, clock: Clock, direct: redis.Redis
) -> None:
    """Finance: usage is a fact; settled and cancelled out of order, it stands in the ledger once, marked late."""
    hold(meter, "mine")
    before = executed(direct)
    late(
        lambda hasty: hasty.settle(TENANT, "mine", USED),
        proxy,
        clock,
        lambda: meter.cancel(TENANT, "mine"),
        b"r/acme/mine",
    )
    wait_until(lambda: executed(direct) >= before + 3, "the delayed settle's end")
    assert check_books(meter) == [("mine", "cancelled"), ("mine", "late")]
    assert standing(meter)["hour"] == (130, 0)
    assert meter.settle(TENANT, "mine", USED).n == 2


@each_verb
def test_a_request_that_is_cut_short_is_not_executed_and_can_be_repeated(
    verb: Verb, meter: Meter, remote: Meter, proxy: FaultProxy, clock: Clock, direct: redis.Redis
) -> None:
    """Operator: half a request does nothing; the caller does not even notice."""
    expected = undisturbed(verb, meter, clock, direct)
    build(meter, clock)
    proxy.cut_requests(3)
    assert (verb.answer(remote), contents(direct)) == expected
    assert proxy.faults == 3


# ── The answer makes no sense ─────────────────────────────────────────────────────────────────────────────────────────


SPOILT = [verb for verb in VERBS if verb.name in ("reserve", "settle", "settle an unknown one", "cancel", "record")]


def spoil_and_repeat(
    payload: bytes, meter: Meter, remote: Meter, proxy: FaultProxy, clock: Clock, direct: redis.Redis
) -> list[StoreError]:
    """Give every verb a false answer; it may fail as a store does, and repeated it must have had its one effect."""
    failures = []
    for verb in SPOILT:
        expected = undisturbed(verb, meter, clock, direct)
        build(meter, clock)
        proxy.garble_replies(1, payload)
        try:
            verb.answer(remote)
        except StoreError as error:
            failures.append(error)
        other = remote.reserve("another", {}, ESTIMATE, lease_ms=12_345)
        assert other.expires_at_ms - other.reserved_at_ms == 12_345, "somebody else's answer"
        other.cancel()
        check_books(meter)
        direct.flushall()
        build(meter, clock)
        proxy.garble_replies(1, payload)
        try:
            answer = verb.answer(remote)
        except StoreError:
            answer = verb.answer(remote)
        assert (answer, contents(direct)) == expected
        direct.flushall()
    return failures


@pytest.mark.parametrize("payload", GARBAGE.values(), ids=GARBAGE.keys())
def test_an_answer_that_is_garbage_is_never_believed(
    payload: bytes, meter: Meter, remote: Meter, proxy: FaultProxy, clock: Clock, direct: redis.Redis
) -> None:
    """Operator: garbage is an unknown outcome, safe to repeat; the next call gets its own answer."""
    for failure in spoil_and_repeat(payload, meter, remote, proxy, clock, direct):
        assert isinstance(failure, StoreUnavailable)


@pytest.mark.parametrize("payload", MALFORMED.values(), ids=MALFORMED.keys())
def test_an_answer_of_the_right_shape_and_wrong_content_is_never_believed(
    payload: bytes, meter: Meter, remote: Meter, proxy: FaultProxy, clock: Clock, direct: redis.Redis
) -> None:
    """Operator: an answer that no script gives is an unknown outcome, and not an IndexError in the gateway."""
    for failure in spoil_and_repeat(payload, meter, remote, proxy, clock, direct):
        assert isinstance(failure, StoreUnavailable)


def test_a_reply_too_many_is_not_taken_for_the_answer_to_the_next_call(
    meter: Meter, remote: Meter, proxy: FaultProxy, clock: Clock, direct: redis.Redis
) -> None:
    """Operator: a connection with something left in it is not used again, so no call gets another call's answer."""
    spoil_and_repeat(b":0\r\n:1\r\n", meter, remote, proxy, clock, direct)


@pytest.mark.parametrize("payload", PASSING.values(), ids=PASSING.keys())
def test_an_error_that_passes_is_waited_out(
    payload: bytes, meter: Meter, remote: Meter, proxy: FaultProxy, clock: Clock, direct: redis.Redis
) -> None:
    """Operator: a store that is loading, failing over or busy delays calls, and does not fail them."""
    assert spoil_and_repeat(payload, meter, remote, proxy, clock, direct) == []


@pytest.mark.parametrize("payload", PASSING_IN_A_CLUSTER.values(), ids=PASSING_IN_A_CLUSTER.keys())
def test_an_error_of_a_failover_is_waited_out(
    payload: bytes, meter: Meter, remote: Meter, proxy: FaultProxy, clock: Clock, direct: redis.Redis
) -> None:
    """Operator: a cluster without a primary for a moment delays calls, and does not fail them."""
    assert spoil_and_repeat(payload, meter, remote, proxy, clock, direct) == []


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"-OOM command not allowed when used memory > 'maxmemory'.\r\n", "memory"),
        (b"-MISCONF Errors writing to the AOF file: No space left on device\r\n", "disk"),
        (b"-NOREPLICAS Not enough good replicas to write.\r\n", "replicas"),
        (b"-NOPERM User default has no permissions to run the 'evalsha' command\r\n", "permission"),
    ],
)
def test_a_refusal_says_what_is_wrong(payload: bytes, words: str, remote: Meter, proxy: FaultProxy) -> None:
    """Operator: a store that says no is not asked again, and the error says in words what to mend."""
    proxy.garble_replies(1, payload)
    with pytest.raises(StoreError, match=words) as refusal:
        hold(remote, "new")
    assert type(refusal.value).__name__ == "StoreRefused"
    assert hold(remote, "new").expires_at_ms


def test_a_store_that_cannot_be_reached_is_reported_within_the_deadline(proxy: FaultProxy, clock: Clock) -> None:
    """Operator: with the store gone a call fails clearly, and works again with the same meter once it is back."""
    with Meter.connect(proxy.url, POLICY, options=replaced(IMPATIENT, deadline_ms=100), clock=clock) as meter:
        proxy.refuse(True)
        with pytest.raises(StoreUnavailable):
            hold(meter, "new")
        proxy.refuse(False)
        assert hold(meter, "new").reserved_at_ms == clock.now_ms


def test_closing_a_meter_closes_its_connections(server: Server, meter: Meter, direct: redis.Redis) -> None:
    """Operator: a process that opens and closes meters does not use up the store's connections."""
    before = len(direct.client_list())
    for _ in range(3):
        with Meter.connect(server.url, POLICY, options=IMPATIENT) as short_lived:
            short_lived.peek(TENANT)
        kept = short_lived  # so that nothing is closed for want of a reference

    async def connect_and_close() -> AsyncMeter:
        async with AsyncMeter.connect(server.url, POLICY, options=IMPATIENT) as short_lived_too:
            await short_lived_too.peek(TENANT)
        return short_lived_too

    kept_too = asyncio.run(connect_and_close())
    wait_until(lambda: len(direct.client_list()) <= before, "the connections' end", seconds=2)
    assert repr(kept) != repr(kept_too)
