"""Partitions: whose quota a call uses, which limits it touches, and who has a quota of his own."""

from __future__ import annotations

import pytest
from fakeredis import FakeRedis

from meterlib import Limit, Meter, Policy, QuotaExceeded, StoreOptions, Tenant
from meterlib.testing import Clock
from tests.fundamentals.conftest import States

POLICY = Policy(
    limits=(
        Limit(name="all", quota=5, window="1m"),
        Limit(name="by_provider", quota=2, window="1m", per=("provider",)),
        Limit(name="opus", quota=1, window="1m", match={"model": "claude-opus-*"}),
        Limit(name="batch", quota=1, window="1m", match={"pipeline": ("batch", "nightly-*"), "model": "*"}),
    ),
    tenants=(Tenant(name="large", quotas={"all": 50, "by_provider": 20}), Tenant(name="blocked", quotas={"all": 0})),
)
ANTHROPIC, OPENAI = {"provider": "anthropic"}, {"provider": "openai"}


def test_each_tenant_has_a_quota_of_its_own(meter: Meter, states: States) -> None:
    """What one customer uses, no other one lacks."""
    meter.reserve("acme", ANTHROPIC)

    assert (1, 0) == (states("acme")["all"].used, states("other")["all"].used)


def test_per_gives_each_value_a_quota_of_its_own(meter: Meter, states: States) -> None:
    """Two providers are two quotas; a call that names none uses a third one."""
    meter.reserve("acme", ANTHROPIC)
    meter.reserve("acme", ANTHROPIC)
    meter.reserve("acme")
    with pytest.raises(QuotaExceeded) as denied:
        meter.reserve("acme", ANTHROPIC)
    assert ["by_provider"] == [denial.name for denial in denied.value.denials]

    meter.reserve("acme", OPENAI)
    used = [states("acme", attributes)["by_provider"].used for attributes in (ANTHROPIC, OPENAI, {})]
    assert [2, 1, 1] == used


def test_attributes_that_no_limit_names_make_no_difference(meter: Meter, states: States) -> None:
    """A session or a key is written down, and counts towards the same quota."""
    meter.reserve("acme", ANTHROPIC | {"session": "one"})
    meter.reserve("acme", ANTHROPIC | {"session": "two"})

    assert 2 == states("acme", ANTHROPIC)["by_provider"].used


@pytest.mark.parametrize(
    ("attributes", "touched"),
    [
        ({}, ["all", "by_provider"]),
        ({"model": "claude-opus-4-1"}, ["all", "by_provider", "opus"]),
        ({"model": "claude-sonnet-4-5"}, ["all", "by_provider"]),
        ({"model": "my-claude-opus-4"}, ["all", "by_provider"]),
        ({"model": "Claude-Opus-4"}, ["all", "by_provider"]),
        ({"model": "claude-sonnet-4-5", "pipeline": "batch"}, ["all", "by_provider", "batch"]),
        ({"model": "claude-sonnet-4-5", "pipeline": "nightly-eu"}, ["all", "by_provider", "batch"]),
        ({"model": "claude-opus-4-1", "pipeline": "batch"}, ["all", "by_provider", "opus", "batch"]),
        ({"pipeline": "batch"}, ["all", "by_provider"]),
    ],
)
def test_match_says_which_calls_a_limit_applies_to(
    meter: Meter, attributes: dict[str, str], touched: list[str]
) -> None:
    """Every attribute named has to fit one of its values or patterns, letter by letter; a missing one does not."""
    held = meter.reserve("acme", attributes)

    assert touched == [state.name for state in held.limits]
    assert touched == [state.name for state in meter.peek("acme", attributes)]


def test_a_tenant_may_have_quotas_of_its_own(meter: Meter, states: States) -> None:
    """An override takes the place of the limit's quota, for this tenant and for the limits it names."""
    assert (50, 20) == (states("large")["all"].quota, states("large")["by_provider"].quota)
    assert (5, 2) == (states("acme")["all"].quota, states("acme")["by_provider"].quota)
    for _ in range(3):
        meter.reserve("large", ANTHROPIC)
    with pytest.raises(QuotaExceeded):
        meter.reserve("blocked", ANTHROPIC)


def test_limits_change_with_the_policy(meter: Meter, states: States) -> None:
    """A new policy holds from the next call on, and what was used before still counts."""
    meter.reserve("acme", ANTHROPIC)
    meter.reserve("acme", ANTHROPIC)
    meter.policy = Policy(limits=(Limit(name="by_provider", quota=3, window="1m", per=("provider",)),))
    meter.reserve("acme", ANTHROPIC)

    assert (3, 3) == (states("acme", ANTHROPIC)["by_provider"].used, states("acme", ANTHROPIC)["by_provider"].quota)
    with pytest.raises(QuotaExceeded):
        meter.reserve("acme", ANTHROPIC)


@pytest.mark.parametrize("store", [None, FakeRedis], ids=["memory", "fakeredis"])
def test_tenants_may_share_a_quota(clock: Clock, store: type[FakeRedis] | None) -> None:
    """On a store with one shard a limit can count all tenants together."""
    policy = Policy(limits=(Limit(name="everybody", quota=2, window="1m", shared=True),))
    meter = Meter(store() if store else "memory://", policy, options=StoreOptions(shards=1), clock=clock)
    meter.reserve("acme")
    meter.reserve("other")
    with pytest.raises(QuotaExceeded):
        meter.reserve("third")

    assert [2, 2] == [meter.peek(tenant)[0].used for tenant in ("acme", "third")]
