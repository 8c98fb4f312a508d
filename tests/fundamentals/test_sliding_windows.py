"""Sliding windows: a quota in any span of the window's length, wherever it begins."""

from __future__ import annotations

import pytest

from meterlib import Limit, Meter, Policy, QuotaExceeded, Usage
from meterlib.testing import Clock
from tests.fundamentals.conftest import States

POLICY = Policy(limits=(Limit(name="tokens", unit="output_tokens", quota=1_000, window="1m", sub_windows=60),))
WINDOW_MS, STEP_MS = 60_000, 1_000
"""The window forgets in steps of a 60th of its length."""


def passes(meter: Meter, tokens: int) -> bool:
    """Whether a call of so many tokens is admitted; if so, it is used at once."""
    try:
        meter.reserve("acme", usage=Usage(output_tokens=tokens)).settle(Usage(output_tokens=tokens))
    except QuotaExceeded:
        return False
    return True


def test_no_minute_ever_holds_more_than_the_quota(meter: Meter, clock: Clock) -> None:
    """There is no border between two minutes at which a caller could have both quotas at once."""
    clock.set(1_790_000_000_000 // WINDOW_MS * WINDOW_MS + 59_000)
    assert passes(meter, 1_000)

    clock.advance(ms=2_000)
    assert not passes(meter, 1)
    clock.advance(ms=WINDOW_MS - 2_000 - 1)
    assert not passes(meter, 1)


@pytest.mark.parametrize("offset_ms", [0, 1, 499, 500, 999])
def test_nobody_waits_longer_than_the_window_and_a_step(meter: Meter, clock: Clock, offset_ms: int) -> None:
    """What was used is free again a minute later, or at most a 60th of it after that."""
    clock.set(1_790_000_000_000 + offset_ms)
    assert passes(meter, 1_000)

    clock.advance(ms=WINDOW_MS + STEP_MS)
    assert passes(meter, 1_000)


def test_a_window_slides_and_does_not_jump(meter: Meter, clock: Clock, states: States) -> None:
    """Each call's tokens come back when they are a minute old, and not all at once."""
    for _ in range(4):
        assert passes(meter, 250)
        clock.advance(ms=10_000)
    assert not passes(meter, 250)

    clock.advance(ms=WINDOW_MS - 40_000 + STEP_MS)
    assert 750 == states()["tokens"].used
    assert passes(meter, 250)
    assert not passes(meter, 250)


def test_each_of_many_entries_goes_at_its_own_moment(meter: Meter, clock: Clock, states: States) -> None:
    """What comes back comes back to the millisecond that was told, however many calls stand before or behind it."""
    for tokens in (10, 20, 40, 80):
        assert passes(meter, tokens)
        clock.advance(ms=3_000)
    for left in (140, 120, 80):
        frees_at_ms = states()["tokens"].frees_at_ms
        assert frees_at_ms is not None

        clock.set(frees_at_ms - 1)
        assert left < states()["tokens"].used
        clock.set(frees_at_ms)
        assert left == states()["tokens"].used
        assert passes(meter, 0)  # whoever writes the window leaves the same in it
        assert left == states()["tokens"].used


@pytest.mark.parametrize(("early_ms", "used"), [(1, 111), (0, 11)])
def test_who_is_admitted_is_told_what_counts_at_that_moment(
    meter: Meter, clock: Clock, early_ms: int, used: int
) -> None:
    """Also where the last call stands in the same sub-window, to whose end the first one counts."""
    meter.reserve("acme", usage=Usage(output_tokens=100))
    clock.advance(ms=WINDOW_MS + 500)
    meter.reserve("acme", usage=Usage(output_tokens=10))
    clock.advance(ms=499 - early_ms)

    (state,) = meter.reserve("acme", usage=Usage(output_tokens=1)).limits

    assert used == state.used


def test_usage_that_is_told_when_its_sub_window_just_slid_out_leaves_the_window_alone(
    meter: Meter, clock: Clock, states: States
) -> None:
    """A call that ran for a whole window counts for no later one."""
    held = meter.reserve("acme", usage=Usage(output_tokens=100))
    frees_at_ms = states()["tokens"].frees_at_ms
    assert frees_at_ms is not None

    clock.set(frees_at_ms)
    held.settle(Usage(output_tokens=900))
    assert (0, None) == (states()["tokens"].used, states()["tokens"].frees_at_ms)


@pytest.mark.parametrize("tokens", [1, 250, 251, 700, 1_000])
@pytest.mark.parametrize("offset_ms", [0, 1, 500, 999])
def test_retry_after_is_exact(meter: Meter, clock: Clock, tokens: int, offset_ms: int) -> None:
    """At that time this very call passes if nobody else ran, and a millisecond earlier it does not."""
    clock.advance(ms=offset_ms)
    for used in (250, 250, 500):
        assert passes(meter, used)
        clock.advance(ms=7_300)
    with pytest.raises(QuotaExceeded) as denied:
        meter.reserve("acme", usage=Usage(output_tokens=tokens))
    assert denied.value.retry_after_ms is not None

    clock.advance(ms=denied.value.retry_after_ms - 1)
    assert not passes(meter, tokens)
    clock.advance(ms=1)
    assert passes(meter, tokens)


def test_a_small_quota_of_requests_is_exact_to_the_millisecond(meter: Meter, clock: Clock) -> None:
    """Fifty a minute are fifty in any 60,000 ms, without a step."""
    meter.policy = Policy(limits=(Limit(name="requests", quota=50, window="1m"),))
    for _ in range(50):
        meter.reserve("acme")
        clock.advance(ms=10)
    with pytest.raises(QuotaExceeded) as denied:
        meter.reserve("acme")

    assert WINDOW_MS - 500 == denied.value.retry_after_ms
    clock.advance(ms=WINDOW_MS - 501)
    with pytest.raises(QuotaExceeded):
        meter.reserve("acme")
    clock.advance(ms=1)
    meter.reserve("acme")


def test_a_window_tells_when_it_frees(meter: Meter, clock: Clock, states: States) -> None:
    """`frees_at_ms` is when something is given back, `resets_at_ms` when everything is."""
    assert (None, None) == (states()["tokens"].frees_at_ms, states()["tokens"].resets_at_ms)
    passes(meter, 100)
    clock.advance(ms=20_000)
    passes(meter, 100)
    frees_ms, resets_ms = states()["tokens"].frees_at_ms or 0, states()["tokens"].resets_at_ms or 0

    clock.set(frees_ms - 1)
    assert 200 == states()["tokens"].used
    clock.set(frees_ms)
    assert 100 == states()["tokens"].used
    clock.set(resets_ms - 1)
    assert 100 == states()["tokens"].used
    clock.set(resets_ms)
    assert 0 == states()["tokens"].used


def test_a_clock_that_is_set_back_frees_nothing(meter: Meter, clock: Clock, states: States) -> None:
    """Time never goes back for a caller: what was used stays used, and it slides out all the same."""
    assert passes(meter, 1_000)
    clock.advance(ms=-3_600_000)
    assert not passes(meter, 1)

    clock.advance(ms=3_600_000 + WINDOW_MS + STEP_MS)
    assert 0 == states()["tokens"].used


def test_after_a_clock_was_set_back_time_goes_on_at_half_speed(meter: Meter, clock: Clock, states: States) -> None:
    """Windows go on sliding, if slowly, until the clock has caught up; from then on its time counts again."""
    began_ms = clock.now_ms
    assert passes(meter, 1_000)
    clock.advance(ms=-3_600_000)
    meter.record("acme", {}, Usage())
    assert began_ms == states()["tokens"].now_ms

    clock.advance(ms=40_000)
    meter.record("acme", {}, Usage())
    assert (began_ms + 20_000, 1_000) == (states()["tokens"].now_ms, states()["tokens"].used)

    clock.advance(ms=84_000)
    assert (began_ms + 62_000, 0) == (states()["tokens"].now_ms, states()["tokens"].used)
    clock.set(began_ms + 70_000)
    assert began_ms + 70_000 == states()["tokens"].now_ms


def test_a_clock_that_was_set_back_does_not_deny_for_ever(meter: Meter, clock: Clock) -> None:
    """A caller who is told to come back, and does, passes in the end; retry-after never stands still."""
    assert passes(meter, 1_000)
    clock.advance(ms=-3_600_000)
    for _ in range(30):
        meter.sweep()
        if passes(meter, 1):
            return
        clock.advance(ms=WINDOW_MS)

    raise AssertionError("half an hour later not one token is free")


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 0, 3, 1, 4), (1, 3, 4, 0, 2)])
def test_usage_counts_where_its_call_began_in_whatever_order_calls_end(
    meter: Meter, clock: Clock, states: States, order: tuple[int, ...]
) -> None:
    """Five calls, ten seconds apart, one of them taken for unsent: each slides out at its time, with what it used."""
    began_ms = clock.now_ms
    used = [10, 20, 40, 80, 160]
    held = []
    for _ in used:
        held.append(meter.reserve("acme", usage=Usage(output_tokens=100)))
        clock.advance(ms=10_000)
    held[2].cancel()
    assert 400 == states()["tokens"].used
    for call in order:
        held[call].settle(Usage(output_tokens=used[call]))

    assert (310, 0) == (states()["tokens"].used, states()["tokens"].held)
    for call in range(5):
        clock.set(began_ms + call * 10_000 + WINDOW_MS - 1)
        assert sum(used[call:]) == states()["tokens"].used
        clock.advance(ms=STEP_MS + 1)
        assert sum(used[call + 1 :]) == states()["tokens"].used
