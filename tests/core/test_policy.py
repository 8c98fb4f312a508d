"""Policies: which limits a call touches, with which quota, and in which partition."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterlib import Limit, Policy, Tenant
from meterlib.core.policy import BoundLimit, CompiledPolicy, duration_ms, fits

VALUES = st.sampled_from(["anthropic", "openai", "claude-opus-4", "claude-sonnet-4", "a", "A"])
ATTRIBUTES = st.dictionaries(st.sampled_from(["provider", "model", "key"]), VALUES)
PATTERNS = st.sampled_from(["anthropic", "openai", "claude-*", "*-4", "*", "a", "?", "[aA]"])


def limit(name: str = "requests", **settings: Any) -> Limit:
    """A limit of 50 requests in a minute, but for these settings."""
    fine: dict[str, Any] = {"name": name, "quota": 50, "window": "1m"}
    return Limit(**(fine | settings))


def touched(policy: Policy, tenant: str = "acme", **attributes: str) -> tuple[BoundLimit, ...]:
    """The limits that a call touches."""
    return CompiledPolicy(policy).limits_of(tenant, attributes)


@given(ATTRIBUTES)
def test_a_limit_without_a_match_applies_to_every_call(attributes: dict[str, str]) -> None:
    """Whatever is known of the call, or nothing."""
    assert limit().applies_to(attributes)


@pytest.mark.parametrize(
    ("pattern", "value", "expected"),
    [
        ("anthropic", "anthropic", True),
        ("anthropic", "Anthropic", False),
        ("anthropic", "anthropic2", False),
        ("anthropic", "my-anthropic", False),
        ("claude-*", "claude-", True),
        ("claude-*", "claude-opus-4", True),
        ("claude-*", "Claude-opus-4", False),
        ("*", "", True),
        ("*opus*", "claude-opus-4", True),
        ("*opus", "claude-opus-4", False),
        (("openai", "anthropic"), "anthropic", True),
        (("openai", "anthropic"), "bedrock", False),
        (("openai", "claude-*"), "claude-opus-4", True),
        ((), "anthropic", False),
        ("claude-sonnet-4-5[1m]", "claude-sonnet-4-5[1m]", True),
        ("claude-sonnet-4-5[1m]", "claude-sonnet-4-51", False),
        ("gpt-?", "gpt-4", False),
        ("gpt-?", "gpt-?", True),
        ("*[!a]", "b", False),
        ("*[!a]", "x\ny[!a]", True),
    ],
)
def test_a_value_fits_a_pattern_as_a_whole(pattern: str | tuple[str, ...], value: str, expected: bool) -> None:
    """From end to end, and capitals count; of several patterns one is enough."""
    assert expected == limit(match={"model": pattern}).applies_to({"model": value})


def found(pattern: str, value: str) -> bool:
    """Whether a pattern fits, by trying every length that its first `*` may stand for."""
    if not pattern:
        return not value
    if pattern[0] == "*":
        return any(found(pattern[1:], value[at:]) for at in range(len(value) + 1))
    return bool(value) and value[0] == pattern[0] and found(pattern[1:], value[1:])


LETTERS = st.text("ab*?[]!-^\\.\n", max_size=6)


@given(st.one_of(st.tuples(LETTERS, LETTERS), LETTERS.map(lambda text: (text, text))))
def test_only_a_star_stands_for_anything_but_itself(texts: tuple[str, str]) -> None:
    """Names of models have brackets, and no other character of a pattern means more than it is."""
    pattern, value = texts

    assert found(pattern, value) == fits(value, pattern)


@given(st.dictionaries(st.sampled_from(["provider", "model"]), PATTERNS, min_size=1), ATTRIBUTES)
def test_every_attribute_named_has_to_fit(match: dict[str, str], attributes: dict[str, str]) -> None:
    """A match is the "and" of its parts, and an attribute that the call lacks fits nothing."""
    parts = [name in attributes and limit(match={name: match[name]}).applies_to(attributes) for name in match]

    assert all(parts) == limit(match=match).applies_to(attributes)


def test_limits_are_touched_in_the_policys_order() -> None:
    """Denials and headers come in the order in which the limits were written."""
    policy = Policy(limits=(limit("b"), limit("a", match={"model": "x"}), limit("c")))

    assert ["b", "a", "c"] == [bound.limit.name for bound in touched(policy, model="x")]
    assert ["b", "c"] == [bound.limit.name for bound in touched(policy, model="y")]


def test_a_tenants_quota_takes_the_place_of_the_limits() -> None:
    """For that tenant and that limit alone; 0 is a quota as well."""
    policy = Policy(
        limits=(limit("a"), limit("b")),
        tenants=(Tenant(name="large", quotas={"a": 500}), Tenant(name="no", quotas={"b": 0})),
    )

    assert [500, 50] == [bound.quota for bound in touched(policy, "large")]
    assert [50, 0] == [bound.quota for bound in touched(policy, "no")]
    assert [50, 50] == [bound.quota for bound in touched(policy, "acme")]


def test_a_tenants_funding_is_the_policys() -> None:
    """Hosted unless a tenant brings its own key."""
    compiled = CompiledPolicy(Policy(tenants=(Tenant(name="own", funding="own"), Tenant(name="hosted"))))

    assert ["own", "hosted", "hosted"] == [compiled.funding_of(tenant) for tenant in ("own", "hosted", "unlisted")]


def test_a_partition_is_told_by_the_attributes_in_per() -> None:
    """Equal values share a quota; other attributes make no difference; a missing one is a value of its own."""
    policy = Policy(limits=(limit(per=("provider", "model")),))

    def place(**attributes: str) -> str:
        return touched(policy, **attributes)[0].window_field

    assert place(provider="a", model="b") == place(provider="a", model="b", key="c")
    places = [place(), place(provider="a"), place(model="a"), place(provider="a", model="a"), place(provider="b")]
    assert len(places) == len(set(places))


def test_a_shared_limit_has_one_partition_for_all_tenants() -> None:
    """And it is none that a tenant could have by its name."""
    policy = Policy(limits=(limit(shared=True),))
    own = Policy(limits=(limit(),))

    assert touched(policy, "acme")[0].window_field == touched(policy, "other")[0].window_field
    assert touched(policy, "acme")[0].window_field not in {touched(own, name)[0].window_field for name in ("*", "%2A")}


@given(st.lists(st.tuples(st.sampled_from(["acme", "other"]), ATTRIBUTES), max_size=20))
def test_what_was_worked_out_once_stays_right(calls: list[tuple[str, dict[str, str]]]) -> None:
    """Limits are remembered by tenant and attributes, and the memory never mixes two calls up."""
    policy = Policy(
        limits=(limit("a", per=("model",)), limit("b", match={"provider": "a*"})),
        tenants=(Tenant(name="other", quotas={"a": 1}),),
    )
    remembering = CompiledPolicy(policy)
    for tenant, attributes in calls:
        fresh = [(b.limit.name, b.quota, b.window_field) for b in touched(policy, tenant, **attributes)]

        assert fresh == [(b.limit.name, b.quota, b.window_field) for b in remembering.limits_of(tenant, attributes)]


@pytest.mark.parametrize(
    ("settings", "quota", "step_ms"),
    [
        ({}, 50, 1),
        ({}, 60, 1),
        ({}, 61, 1_000),
        ({"unit": "input_tokens"}, 50, 1_000),
        ({"sub_windows": 10}, 50, 6_000),
        ({"sub_windows": 1}, 50, 60_000),
        ({"window": "30ms", "unit": "input_tokens"}, 50, 1),
        ({"window": "1h"}, 61, 60_000),
    ],
)
def test_a_window_forgets_in_steps_of_a_sixtieth(settings: dict[str, Any], quota: int, step_ms: int) -> None:
    """A few requests are exact to the ms, and a limit may ask for another resolution."""
    assert step_ms == limit(**settings).sub_window_ms(quota)


@pytest.mark.parametrize(
    ("text", "length_ms"),
    [("1ms", 1), ("500ms", 500), ("30s", 30_000), ("1m", 60_000), ("5h", 18_000_000), ("7d", 604_800_000)],
)
def test_a_duration_is_a_number_and_a_unit(text: str, length_ms: int) -> None:
    """Milliseconds, seconds, minutes, hours, days."""
    assert length_ms == duration_ms(text)


def test_a_period_is_worked_out_for_each_moment() -> None:
    """A limit of a calendar day counts in another window tomorrow, and in the same one later today."""
    bound = touched(Policy(limits=(Limit(name="day", quota=1, period="day"),)))[0]
    today, later, tomorrow = 1_790_000_000_000, 1_790_000_000_000 + 3_600_000, 1_790_000_000_000 + 86_400_000
    asked = [bound.arguments(1, moment) for moment in (today, later, tomorrow, today)]

    assert asked[0] == asked[1] == asked[3]
    assert asked[0].window_field != asked[2].window_field
    assert all(
        a.period_start_ms <= m < a.period_end_ms for a, m in zip(asked, (today, later, tomorrow, today), strict=True)
    )
