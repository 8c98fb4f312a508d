"""Calls that ask for more than a quota: each limit says what becomes of them, and none says "try later" for ever."""

from __future__ import annotations

import pytest

from meterlib import Limit, Meter, Policy, QuotaExceeded, Usage
from meterlib.testing import Clock
from tests.fundamentals.conftest import States

IDLE = Limit(name="tokens", unit="input_tokens", quota=1_000, window="1m")
STRICT = Limit(name="strict", unit="input_tokens", quota=1_000, window="1m", oversize="reject")
POLICY = Policy(limits=(IDLE,))
HUGE = Usage(input_tokens=2_500)


def test_a_huge_call_passes_when_nothing_else_is_used(meter: Meter, states: States) -> None:
    """By default it is let through on an idle quota, and goes into debt."""
    meter.reserve("acme", usage=HUGE)

    assert (2_500, 0) == (states()["tokens"].used, states()["tokens"].remaining)
    with pytest.raises(QuotaExceeded):
        meter.reserve("acme", usage=Usage(input_tokens=1))


def test_a_huge_call_waits_until_the_quota_is_idle(meter: Meter, clock: Clock) -> None:
    """It is told when that is, to the millisecond, so even this wait has an end."""
    meter.reserve("acme", usage=Usage(input_tokens=1))
    clock.advance(ms=30_000)
    meter.reserve("acme", usage=Usage(input_tokens=1))
    with pytest.raises(QuotaExceeded) as denied:
        meter.reserve("acme", usage=HUGE)
    assert ("quota", True) == (denied.value.denials[0].reason, denied.value.retryable)

    clock.advance(ms=(denied.value.retry_after_ms or 0) - 1)
    with pytest.raises(QuotaExceeded):
        meter.reserve("acme", usage=HUGE)
    clock.advance(ms=1)
    meter.reserve("acme", usage=HUGE)


def test_a_call_as_large_as_the_quota_is_not_oversize(meter: Meter) -> None:
    """Exactly the quota fits, under either rule."""
    meter.policy = Policy(limits=(IDLE, STRICT))

    assert [1_000, 1_000] == [state.used for state in meter.reserve("acme", usage=Usage(input_tokens=1_000)).limits]
    with pytest.raises(QuotaExceeded) as denied:
        meter.reserve("acme", usage=Usage(input_tokens=1_000))
    assert ["quota", "quota"] == [denial.reason for denial in denied.value.denials]
    assert denied.value.retryable


def test_a_limit_may_reject_huge_calls_for_good(meter: Meter, states: States) -> None:
    """With `oversize="reject"` the answer is final: no retry can help, and it says so."""
    meter.policy = Policy(limits=(STRICT,))
    with pytest.raises(QuotaExceeded, match="waiting does not help") as denied:
        meter.reserve("acme", usage=Usage(input_tokens=1_001))

    assert (False, None) == (denied.value.retryable, denied.value.retry_after_ms)
    assert ("oversize", None) == (denied.value.denials[0].reason, denied.value.denials[0].retry_after_ms)
    assert 0 == states()["strict"].used


def test_one_final_no_outweighs_a_later_yes(meter: Meter) -> None:
    """If one limit rejects for good and another one for now, the call is not told to come back."""
    meter.policy = Policy(limits=(IDLE, STRICT))
    meter.reserve("acme", usage=Usage(input_tokens=1))
    with pytest.raises(QuotaExceeded) as denied:
        meter.reserve("acme", usage=HUGE)

    assert (False, None) == (denied.value.retryable, denied.value.retry_after_ms)
    assert ["strict", "tokens"] == [denial.name for denial in denied.value.denials]


def test_what_a_running_call_turns_out_to_use_is_never_oversize(meter: Meter, states: States) -> None:
    """Usage is charged in full, whatever the rule for estimates."""
    meter.policy = Policy(limits=(STRICT,))
    meter.reserve("acme", usage=Usage(input_tokens=10)).settle(HUGE)

    assert 2_500 == states()["strict"].used
