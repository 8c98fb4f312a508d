"""Policies: a setting that makes no sense is found when the policy is made, by its path, and never while serving."""

from __future__ import annotations

from typing import Any

import pytest
from fakeredis import FakeRedis

from meterlib import AsyncMeter, Limit, Meter, Policy, PolicyError, Tenant
from tests.bad_input.support import HUGE


def refusal(*limits: Any, tenants: Any = ()) -> PolicyError:
    """The error of a policy that is refused."""
    with pytest.raises(PolicyError) as refused:
        Policy(limits=limits, tenants=tenants)
    return refused.value


def limit(**settings: Any) -> Limit:
    """A limit that is fine but for these settings."""
    fine: dict[str, Any] = {"name": "requests", "quota": 50, "window": "1m"}
    return Limit(**(fine | settings))


@pytest.mark.parametrize("window", ["0ms", "0s", "0d", "32d", "745h", "999999999999d"])
def test_a_window_is_from_a_millisecond_to_a_month_long(window: str) -> None:
    """A window of nothing would never deny, and one of years would never forget."""
    error = refusal(limit(window=window))

    assert "limit[0].window" == error.path
    assert "is not within 1ms and 31d" in str(error)


@pytest.mark.parametrize(
    "window", ["-1m", "1", "m", "1.5m", "1 m", "1M", "1min", "٣m", "1m ", "1m\n", 60, 60.0, True, ["1m"]]
)
def test_a_window_is_a_number_and_a_unit_of_time(window: Any) -> None:
    """A number alone does not say of what; the error shows how to write it."""
    error = refusal(limit(window=window))

    assert "limit[0].window" == error.path
    assert "ms, s, m, h or d, such as '1m'" in str(error)


@pytest.mark.parametrize("window", ["1ms", "500ms", "30s", "1m", "5h", "31d"])
def test_a_window_may_be_any_length_between(window: str) -> None:
    """Both ends of the range belong to it."""
    assert window == Policy(limits=(limit(window=window),)).limits[0].window


@pytest.mark.parametrize(
    ("spans", "found"),
    [
        ({"window": None}, "none"),
        ({"window": ""}, "none"),
        ({"period": "month"}, "window and period"),
        ({"open": True}, "window and open"),
        ({"window": None, "period": "day", "open": True}, "period and open"),
        ({"period": "day", "open": True}, "window and period and open"),
    ],
)
def test_a_limit_has_exactly_one_span(spans: dict[str, Any], found: str) -> None:
    """A limit remembers by a window, a period or by what is open; the error says which were found."""
    error = refusal(limit(**spans))

    assert "limit[0]" == error.path
    assert f"exactly one of window, period and open = true is needed; found {found}" in str(error)


@pytest.mark.parametrize(
    "quota",
    [
        -1,
        2**53,
        2**63,
        1.0,
        50.0,
        float("nan"),
        float("inf"),
        True,
        False,
        "50",
        None,
        pytest.param(HUGE, id="5000 digits"),
    ],
)
def test_a_quota_is_a_whole_number(quota: Any) -> None:
    """Neither -1 nor a float means "unlimited": to have no limit, name none."""
    error = refusal(limit(quota=quota))

    assert "limit[0].quota" == error.path
    assert "an integer from 0 to 2^53 - 1 is needed" in str(error)
    assert "tenant[0].quotas.requests" == refusal(limit(), tenants=[Tenant(name="a", quotas={"requests": quota})]).path


@pytest.mark.parametrize("quota", [0, 1, 2**53 - 1])
def test_a_quota_may_be_zero(quota: int) -> None:
    """0 says, explicitly, that nothing passes."""
    assert quota == Policy(limits=(limit(quota=quota),)).limits[0].quota


def test_two_limits_cannot_have_one_name() -> None:
    """Denials and overrides call a limit by its name; the error says which one has it already."""
    error = refusal(limit(name="a"), limit(name="b"), limit(name="a", quota=1))

    assert "limit[2].name" == error.path
    assert "'a' is the name of limit[0] already" in str(error)


@pytest.mark.parametrize("name", ["", "1st", "a b", "a/b", "a:b", "{a}", "a\nb", "é", "x" * 65, "*", 5, None, b"a"])
def test_a_limits_name_is_a_plain_word(name: Any) -> None:
    """A name fits headers and commands as it is."""
    error = refusal(limit(name=name))

    assert "limit[0].name" == error.path
    assert "a letter, then up to 63 of A-Z a-z 0-9 _ . -" in str(error)


def test_a_policy_has_at_most_sixteen_limits() -> None:
    """One call decides over all limits at once, so there is an end to how many."""
    limits = tuple(limit(name=f"limit_{n}") for n in range(17))
    error = refusal(*limits)

    assert "limit" == error.path
    assert "at most 16 limits, not 17" in str(error)
    assert 16 == len(Policy(limits=limits[:16]).limits)


@pytest.mark.parametrize("unit", ["", "Requests", "input tokens", "input-tokens", "1k", "é", "a/b", "x" * 65, 5, None])
def test_a_unit_is_spelt_in_lower_case(unit: Any) -> None:
    """A unit reads as the usage's own field names do."""
    error = refusal(limit(unit=unit))

    assert "limit[0].unit" == error.path
    assert "lower-case letters, digits and _" in str(error)


@pytest.mark.parametrize("unit", ["request", "input_token", "inputtokens", "output_token", "total_token", "tokens"])
def test_a_misspelt_unit_is_not_a_limit_that_never_denies(unit: str) -> None:
    """A unit that is nearly a built-in one is a mistake, and the error names the one that was meant."""
    error = refusal(limit(unit=unit))

    assert "limit[0].unit" == error.path
    assert "did you mean" in str(error)


@pytest.mark.parametrize(
    ("per", "problem"),
    [
        ("provider", "a list of attribute names is needed, such as ['provider']"),
        (["provider", "provider"], "names an attribute twice"),
        (["tenant"], "the tenant is part of the partition anyway"),
        (["a b"], "is no attribute name"),
        ([""], "is no attribute name"),
        ([5], "is no attribute name"),
        pytest.param(5, "a list"),
        pytest.param([["a"]], "is no attribute name"),
    ],
)
def test_per_is_a_list_of_attributes(per: Any, problem: str) -> None:
    """A lone word would otherwise be read letter by letter."""
    error = refusal(limit(per=per))

    assert "limit[0].per" == error.path
    assert problem in str(error)


@pytest.mark.parametrize(
    "match",
    [
        "provider",
        ["provider"],
        5,
        {"provider": 5},
        {"provider": ("anthropic", 5)},
        {"provider": ()},
        {"provider": ""},
        {"tenant": "acme"},
    ],
    ids=repr,
)
def test_match_tells_attributes_and_their_values(match: Any) -> None:
    """A match that nothing could ever meet is a limit that was forgotten."""
    assert refusal(limit(match=match)).path.startswith("limit[0].match")


def test_an_attribute_to_match_has_a_plain_name() -> None:
    """What no call could ever have is no attribute to match."""
    assert refusal(limit(match={"a b": "x"})).path.startswith("limit[0].")


@pytest.mark.parametrize("period", ["year", "days", "Month", 5, ["day"]])
def test_a_period_is_one_of_four(period: Any) -> None:
    """Hours, days, weeks and months; the error lists them."""
    error = refusal(limit(window=None, period=period))

    assert "limit[0].period" == error.path
    assert "hour, day, week, month" in str(error)


@pytest.mark.parametrize(
    "tz",
    [
        "Mars/Olympus",
        "CEST+1",
        "",
        "../etc/passwd",
        "/etc/localtime",
        "Europe",
        "a\0b",
        "x" * 300,
        5,
        None,
    ],
)
def test_a_time_zone_is_one_that_there_is(tz: Any) -> None:
    """A zone is an IANA name; the error shows one."""
    error = refusal(limit(window=None, period="day", tz=tz))

    assert "limit[0].tz" == error.path
    assert "IANA time zone, such as 'Europe/Berlin'" in str(error)


def test_a_time_zone_belongs_to_a_period() -> None:
    """A sliding window knows no midnight: a zone there is a limit that was meant otherwise."""
    assert "limit[0].tz" == refusal(limit(tz="Europe/Berlin")).path


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"oversize": "admit"}, "limit[0].oversize"),
        ({"oversize": None}, "limit[0].oversize"),
        ({"on_expiry": "drop", "window": None, "period": "day"}, "limit[0].on_expiry"),
        ({"on_expiry": "free"}, "limit[0].on_expiry"),
        ({"on_expiry": "free", "window": None, "open": True}, "limit[0].on_expiry"),
        ({"sub_windows": 0}, "limit[0].sub_windows"),
        ({"sub_windows": 1001}, "limit[0].sub_windows"),
        ({"sub_windows": 60.0}, "limit[0].sub_windows"),
        ({"sub_windows": True}, "limit[0].sub_windows"),
        ({"sub_windows": 60, "window": None, "period": "day"}, "limit[0].sub_windows"),
        ({"retry_hint_ms": 0}, "limit[0].retry_hint_ms"),
        ({"retry_hint_ms": 3_600_001}, "limit[0].retry_hint_ms"),
        ({"retry_hint_ms": "1s"}, "limit[0].retry_hint_ms"),
        pytest.param({"open": "no", "window": None}, "limit[0].open"),
        pytest.param({"shared": "yes"}, "limit[0].shared"),
    ],
)
def test_every_other_setting_has_its_range(settings: dict[str, Any], path: str) -> None:
    """The error's path leads to the setting."""
    assert path == refusal(limit(**settings)).path


def test_a_setting_that_there_is_not_cannot_be_written() -> None:
    """A misspelt setting is an error in code as well."""
    with pytest.raises(TypeError, match="qouta"):
        Limit(name="requests", qouta=5, window="1m")  # type: ignore[call-arg]


def test_a_tenants_quota_is_of_a_limit_that_there_is() -> None:
    """A misspelt override would leave the tenant with the limit's own quota; the error names what was meant."""
    error = refusal(limit(name="requests"), tenants=[Tenant(name="acme", quotas={"request": 5})])

    assert "tenant[0].quotas.request" == error.path
    assert "did you mean 'requests'?" in str(error)
    assert "(valid: requests)" in str(error)


def test_a_tenant_is_listed_once() -> None:
    """Two lists of settings for one tenant would leave open which one counts."""
    error = refusal(tenants=[Tenant(name="acme"), Tenant(name="other"), Tenant(name="acme", funding="own")])

    assert "tenant[2].name" == error.path
    assert "'acme' is listed twice" in str(error)


@pytest.mark.parametrize(
    ("tenant", "path"),
    [
        (Tenant(name=""), "tenant[0].name"),
        (Tenant(name="a\nb"), "tenant[0].name"),
        (Tenant(name="acme "), "tenant[0].name"),
        (Tenant(name="acme", funding="mine"), "tenant[0].funding"),  # type: ignore[arg-type]
        pytest.param(5, "tenant[0]"),
        pytest.param(Tenant(name="acme", quotas=None), "tenant[0].quotas"),  # type: ignore[arg-type]
    ],
)
def test_a_tenants_settings_are_checked_alike(tenant: Any, path: str) -> None:
    """A tenant in the policy has a name that a call could have."""
    assert path == refusal(limit(), tenants=[tenant]).path


@pytest.mark.parametrize("limits", [[5], ["requests"], [None]])
def test_a_policy_is_made_of_limits(limits: Any) -> None:
    """Anything else among them is told by its place."""
    assert "limit[0]" == refusal(*limits).path


@pytest.mark.parametrize("limits", [None, 5, limit()])
def test_limits_are_a_list(limits: Any) -> None:
    """One limit is a list of one."""
    with pytest.raises(PolicyError) as refused:
        Policy(limits=limits)

    assert "limit" == refused.value.path


@pytest.mark.parametrize("name", ["", "buildkite", "Buildkite-Anthropic", pytest.param([])])
def test_a_preset_is_one_that_there_is(name: Any) -> None:
    """An unknown preset is no policy that lets everything pass."""
    with pytest.raises(PolicyError, match="buildkite-anthropic") as refused:
        Policy.preset(name)

    assert "preset" == refused.value.path


@pytest.mark.parametrize("meter", [Meter, AsyncMeter])
def test_a_shared_limit_needs_a_store_with_one_shard(meter: Any) -> None:
    """Tenants of sixteen shards cannot share a quota in one step, so such a meter is not made, nor changed to one."""
    shared = Policy(limits=(limit(), limit(name="all", shared=True)))
    with pytest.raises(PolicyError, match="one shard") as refused:
        meter.connect("memory://", shared)

    assert "limit[1].shared" == refused.value.path

    serving = meter.connect("memory://", Policy())
    with pytest.raises(PolicyError, match="one shard"):
        serving.policy = shared
    assert Policy() == serving.policy


def test_a_policy_that_is_refused_touches_no_store() -> None:
    """A bad policy is found before there is anything to decide."""
    store = FakeRedis()
    with pytest.raises(PolicyError):
        Meter(store, Policy(limits=(limit(name="all", shared=True),)))

    assert 0 == store.dbsize()
