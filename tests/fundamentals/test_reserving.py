"""Reserve: take a hold on every limit that a call touches, or on none, before the call is made."""

from __future__ import annotations

from typing import Any

import pytest

from meterlib import Limit, Meter, Policy, QuotaExceeded, Usage
from meterlib.testing import Clock
from tests.fundamentals.conftest import Entries, States

POLICY = Policy(
    limits=(
        Limit(name="requests", quota=3, window="1m"),
        Limit(name="input_tokens", unit="input_tokens", quota=1_000, window="1m"),
    )
)


def test_a_reservation_holds_its_estimate(meter: Meter, states: States) -> None:
    """What a call is expected to use counts from the moment it is reserved."""
    meter.reserve("acme", usage=Usage(input_tokens=400))

    assert (1, 1, 2) == (states()["requests"].used, states()["requests"].held, states()["requests"].remaining)
    assert (400, 600) == (states()["input_tokens"].held, states()["input_tokens"].remaining)


def test_a_reservation_tells_how_its_limits_stand(meter: Meter) -> None:
    """A gateway can write its rate-limit headers without asking again."""
    held = meter.reserve("acme", usage=Usage(input_tokens=400))

    assert meter.peek("acme") == held.limits
    assert held.metered


def test_a_quota_may_be_used_to_the_last_unit(meter: Meter, states: States) -> None:
    """Exactly the quota passes, and one unit more does not."""
    meter.reserve("acme", usage=Usage(input_tokens=600))
    meter.reserve("acme", usage=Usage(input_tokens=400))

    assert 0 == states()["input_tokens"].remaining
    with pytest.raises(QuotaExceeded):
        meter.reserve("acme", usage=Usage(input_tokens=1))


def test_a_denied_call_takes_nothing(meter: Meter, states: States, entries: Entries) -> None:
    """If one limit denies, no other one counts the call either, and nothing is written down."""
    meter.reserve("acme", usage=Usage(input_tokens=900))
    before = meter.peek("acme")
    with pytest.raises(QuotaExceeded):
        meter.reserve("acme", usage=Usage(input_tokens=101))

    assert before == meter.peek("acme")
    assert [] == entries()


def test_a_denial_names_every_limit_that_denied(meter: Meter, clock: Clock) -> None:
    """The one that frees last stands first, and its time is when the call may come back."""
    meter.reserve("acme", usage=Usage(input_tokens=1_000))
    clock.advance(ms=10_000)
    meter.reserve("acme")
    meter.reserve("acme")
    with pytest.raises(QuotaExceeded) as denied:
        meter.reserve("acme", usage=Usage(input_tokens=1))

    assert {"requests", "input_tokens"} == {denial.name for denial in denied.value.denials}
    assert ("acme", True, False) == (denied.value.tenant, denied.value.retryable, denied.value.hint)
    assert max(d.retry_after_ms or 0 for d in denied.value.denials) == denied.value.retry_after_ms
    assert denied.value.denials[0].retry_after_ms == denied.value.retry_after_ms
    tokens = next(denial for denial in denied.value.denials if denial.unit == "input_tokens")
    assert (1_000, 1_000, 1, "quota") == (tokens.quota, tokens.used, tokens.requested, tokens.reason)


def test_only_the_limits_that_denied_are_named(meter: Meter) -> None:
    """A limit that would have let the call pass is not blamed."""
    meter.reserve("acme", usage=Usage(input_tokens=1_000))
    with pytest.raises(QuotaExceeded) as denied:
        meter.reserve("acme", usage=Usage(input_tokens=1))

    assert ["input_tokens"] == [denial.name for denial in denied.value.denials]


def test_a_quota_of_nothing_denies_for_good(meter: Meter) -> None:
    """A quota of 0 says no, and never "try later"."""
    meter.policy = Policy(limits=(Limit(name="closed", quota=0, window="1m"),))
    with pytest.raises(QuotaExceeded) as denied:
        meter.reserve("acme")

    assert (False, None) == (denied.value.retryable, denied.value.retry_after_ms)
    assert "oversize" == denied.value.denials[0].reason


@pytest.mark.parametrize("span", [{"window": "1m"}, {"period": "day"}, {"open": True}], ids=str)
def test_a_quota_of_nothing_denies_what_takes_nothing_of_it(meter: Meter, span: dict[str, Any]) -> None:
    """A call whose amount is 0 or not told is a call; nor is one told to wait until old usage has gone."""
    meter.policy = Policy(limits=(Limit(name="closed", unit="output_tokens", quota=10, **span),))
    meter.reserve("acme", usage=Usage(output_tokens=5))
    meter.reserve("cancelled", usage=Usage(output_tokens=5)).cancel()
    meter.policy = Policy(limits=(Limit(name="closed", unit="output_tokens", quota=0, **span),))
    for tenant in ("acme", "cancelled", "new"):
        for usage in (Usage(), Usage(output_tokens=0), Usage(input_tokens=7)):
            with pytest.raises(QuotaExceeded) as denied:
                meter.reserve(tenant, usage=usage)
            assert (False, "oversize") == (denied.value.retryable, denied.value.denials[0].reason)


def test_a_call_that_touches_no_limit_passes(meter: Meter, entries: Entries) -> None:
    """Without a limit there is nothing to deny, and the call is metered all the same."""
    meter.policy = Policy()
    meter.reserve("acme", usage=Usage(input_tokens=10**9)).settle(Usage(input_tokens=10**9))

    assert [{"input_tokens": 10**9}] == [entry.usage for entry in entries()]
