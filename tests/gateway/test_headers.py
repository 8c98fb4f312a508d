"""Which headers cross the gateway, and what its own say of a caller's limits: told from the functions alone."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterlib import Limit
from meterlib.core.decisions import Denial, LimitState
from meterlib.core.policy import BoundLimit, window_field
from meterlib.errors import QuotaExceeded
from meterlib.gateway.answers import RETRY_AFTER_S_MAX, denied, new_request_id
from meterlib.gateway.headers import VERSION, for_client, for_upstream, of_limits

NOW_MS = 1_790_000_000_000
KEY = ("x-api-key", "sk-provider")

# ── What crosses ──────────────────────────────────────────────────────────────────────────────────────────────────────

FORWARDED = re.compile(r"anthropic-.*|x-stainless-.*|accept|content-type|content-encoding|user-agent|x-app")
ANSWERED = re.compile(
    r"anthropic-.*|request-id|retry-after|retry-after-ms|x-should-retry|content-(type|length|encoding)|cache-control|date"
)
KEPT_HERE = (
    "authorization",
    "x-api-key",
    "proxy-authorization",
    "host",
    "cookie",
    "connection",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "expect",
    "content-length",
    "forwarded",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-real-ip",
    "x-claude-code-session-id",
    "x-tenant",
    "accept-encoding",
)
some_names = st.one_of(
    st.sampled_from(["anthropic-beta", "anthropic-version", "anthropic-x", "x-stainless-lang", "accept", "user-agent"]),
    st.sampled_from(["request-id", "retry-after", "set-cookie", "location", "content-type", "x-app", *KEPT_HERE]),
    st.from_regex(r"[a-z0-9-]{1,12}", fullmatch=True),
)
some_headers = st.lists(st.tuples(some_names, st.text(max_size=20)), max_size=12)


@given(headers=some_headers, hops=st.lists(some_names, max_size=3))
def test_only_what_concerns_the_provider_reaches_it(headers: list[tuple[str, str]], hops: list[str]) -> None:
    """No credential, cookie, host, forwarding or hop-by-hop header does, whatever else was sent."""
    told = [*headers, ("connection", ", ".join(hop.upper() for hop in hops))]

    passed, dropped = for_upstream(told, KEY, None)

    own = [KEY, ("accept-encoding", "identity")]
    assert own == passed[-2:]
    assert not dropped
    for name, value in passed[:-2]:
        assert FORWARDED.fullmatch(name)
        assert (name, value) in headers or (name, value) == ("anthropic-version", VERSION)
        assert name not in hops or name == "anthropic-version"
        assert value.isascii()
        assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f]", value)
    versions = [value for name, value in passed if name == "anthropic-version"]
    sent = [value for name, value in headers if name == "anthropic-version" and value.isascii() and value.isprintable()]
    assert versions == (sent if sent and "anthropic-version" not in hops else [VERSION])


@given(headers=some_headers)
def test_what_may_pass_passes_unchanged_and_in_order(headers: list[tuple[str, str]]) -> None:
    """Headers are an open list: an `anthropic-` header that nobody knows yet is the provider's affair."""
    sent = [(name, value) for name, value in headers if name != "connection"]
    wanted = [pair for pair in sent if FORWARDED.fullmatch(pair[0]) and pair[1].isascii() and pair[1].isprintable()]

    passed, _ = for_upstream(sent, KEY, None)

    added = [("anthropic-version", VERSION)]
    kept = [pair for pair in passed[:-2] if "\t" not in pair[1] and pair not in added]
    assert kept == [pair for pair in wanted if pair not in added]


@given(headers=some_headers, keep_limits=st.booleans())
def test_only_what_concerns_the_client_comes_back(headers: list[tuple[str, str]], keep_limits: bool) -> None:
    """No cookie, no redirect, and nothing of the limits of a key that many share."""
    for name, value in for_client(headers, keep_limits=keep_limits):
        assert ANSWERED.fullmatch(name)
        assert (name, value) in headers
        assert value.isascii()
        assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f]", value)


@pytest.mark.parametrize("family", ["ratelimit", "priority", "fast"])
@pytest.mark.parametrize("rest", ["requests-limit", "input-tokens-remaining", "unified-status", "tokens-reset"])
def test_the_limits_of_a_shared_key_are_nobodys_business(family: str, rest: str) -> None:
    """Who brings a key of their own may see them."""
    header = (f"anthropic-{family}-{rest}", "49")

    assert [header] == for_client([header], keep_limits=True)
    assert [] == for_client([header], keep_limits=False)


def test_the_providers_advice_on_retries_passes() -> None:
    """`retry-after` and `x-should-retry` are the provider's also where its limits are not shown."""
    headers = [("retry-after", "7"), ("retry-after-ms", "6500"), ("x-should-retry", "true"), ("request-id", "req_1")]

    assert headers == for_client(headers, keep_limits=False)


def test_a_hop_of_the_provider_ends_here() -> None:
    """What its `connection` names is not for the client."""
    headers = [("connection", "close, Anthropic-Hop"), ("anthropic-hop", "1"), ("anthropic-organization-id", "org")]

    assert [("anthropic-organization-id", "org")] == for_client(headers, keep_limits=True)
    assert [] == for_client(headers, keep_limits=True, keep_account=False)


def test_all_betas_pass_by_default_and_only_those_allowed_where_some_are() -> None:
    """Unknown values are told, so that the drop can be noted."""
    headers = [("anthropic-beta", "a-1,b-2 , c-3"), ("anthropic-beta", "d-4")]

    everything, none_dropped = for_upstream(headers, KEY, None)
    some, dropped = for_upstream(headers, KEY, ["b-2"])
    nothing, all_dropped = for_upstream(headers, KEY, [])

    assert headers == [pair for pair in everything if pair[0] == "anthropic-beta"]
    assert [("anthropic-beta", "b-2")] == [pair for pair in some if pair[0] == "anthropic-beta"]
    assert [] == [pair for pair in nothing if pair[0] == "anthropic-beta"]
    assert ([], ["a-1", "c-3", "d-4"], ["a-1", "b-2", "c-3", "d-4"]) == (none_dropped, dropped, all_dropped)


@pytest.mark.parametrize("version", ["2023-06-01", "2026-10-21", "2099-01-01", "tomorrow"])
def test_a_version_passes_unchanged(version: str) -> None:
    """Also one that nobody knows yet."""
    passed, _ = for_upstream([("anthropic-version", version)], KEY, None)

    assert [version] == [value for name, value in passed if name == "anthropic-version"]


def test_minted_ids_look_like_the_providers() -> None:
    """And are not told twice."""
    ids = {new_request_id() for _ in range(1000)}

    assert 1000 == len(ids)
    assert all(re.fullmatch(r"req_[0-9a-f]{24}", each) for each in ids)


# ── What a caller is told of its limits ───────────────────────────────────────────────────────────────────────────────


def parsed_list(text: str) -> list[tuple[str, dict[str, Any]]]:
    """A List of String Items of RFC 9651, by its section 4.2; anything else is an error."""
    items, rest = [], text
    while rest:
        found = re.match(r'"((?:[ !#-\[\]-~]|\\["\\])*)"', rest)
        assert found, rest
        rest = rest[found.end() :]
        parameters: dict[str, Any] = {}
        while rest.startswith(";"):
            pair = re.match(r"; *([a-z*][a-z0-9_.*-]*)(=)?", rest)
            assert pair, rest
            rest = rest[pair.end() :]
            value: object = True
            if pair[2]:
                bare = re.match(r'-?[0-9]{1,15}(?![0-9.])|"((?:[ !#-\[\]-~]|\\["\\])*)"|:[A-Za-z0-9+/=]*:', rest)
                assert bare, rest
                value = bare[0][1:-1] if bare[0][0] in '":' else int(bare[0])
                rest = rest[bare.end() :]
            parameters[pair[1]] = value
        items.append((re.sub(r"\\(.)", r"\1", found[1]), parameters))
        if rest:
            comma = re.match(r"[ \t]*,[ \t]*(?=.)", rest)
            assert comma, f"more than a comma between items: {rest}"
            rest = rest[comma.end() :]
    return items


@pytest.mark.parametrize("broken", ["a", '"a', '"a";', '"a",', '"a";Q=1', '"a";q=', '"a";q=1234567890123456', '"é"'])
def test_the_parser_of_these_tests_is_strict(broken: str) -> None:
    """Or else it would prove nothing."""
    with pytest.raises(AssertionError):
        parsed_list(broken)


UNITS = ("requests", "input_tokens", "output_tokens", "total_tokens", "cost_nanousd")
amounts = st.one_of(st.integers(0, 10), st.integers(0, 100_000), st.integers(0, 2**53 - 1))


@st.composite
def told_limits(draw: st.DrawFn) -> tuple[dict[str, Limit], list[LimitState]]:
    """Limits, and how they stand."""
    limits, states = {}, []
    for at in range(draw(st.integers(1, 5))):
        span: dict[str, Any] = draw(
            st.sampled_from(
                [{"window": "1m"}, {"window": "5h"}, {"window": "200ms"}, {"period": "day"}, {"open": True}]
            )
        )
        name = draw(st.from_regex(r"[A-Za-z][A-Za-z0-9_.-]{0,9}", fullmatch=True)) + str(at)
        quota, used = draw(amounts), draw(amounts)
        limits[name] = Limit(name=name, quota=quota, unit=draw(st.sampled_from(UNITS)), **span)
        frees_in, resets_in = sorted(draw(st.tuples(st.integers(1, 10**8), st.integers(1, 10**8))))
        states.append(
            LimitState(
                name=name,
                unit=limits[name].unit,
                quota=quota,
                used=used,
                held=0,
                remaining=max(0, quota - used),
                frees_at_ms=NOW_MS + frees_in if used else None,
                resets_at_ms=NOW_MS + resets_in if used else None,
                now_ms=NOW_MS,
            )
        )
    return limits, states


@given(told=told_limits())
def test_the_drafts_headers_can_be_parsed_and_say_how_limits_stand(
    told: tuple[dict[str, Limit], list[LimitState]],
) -> None:
    """RateLimit and RateLimit-Policy, by the grammar of structured fields, one item for each limit."""
    limits, states = told
    headers = dict(of_limits(states, limits))
    policies, rates = parsed_list(headers["ratelimit-policy"]), parsed_list(headers["ratelimit"])

    assert [state.name for state in states] == [name for name, _ in policies] == [name for name, _ in rates]
    for state, (_, policy), (_, rate) in zip(states, policies, rates, strict=True):
        limit = limits[state.name]
        assert min(state.quota, 10**15 - 1) == policy["q"]
        assert min(state.remaining, 10**15 - 1) == rate["r"]
        assert policy.get("w") == {"1m": 60, "5h": 18_000, "200ms": 1, None: None}[limit.window]
        assert policy.get("qu", "requests") == ("concurrent-requests" if limit.open else "requests")
        if state.frees_at_ms is None:
            assert "t" not in rate
        else:
            assert 0 <= rate["t"] * 1000 - (state.frees_at_ms - NOW_MS) < 1000


@given(told=told_limits())
def test_the_apis_headers_tell_the_tightest_limit_of_each_unit(
    told: tuple[dict[str, Limit], list[LimitState]],
) -> None:
    """Whole numbers, and as reset the time at which all of the quota is there again."""
    limits, states = told
    headers = dict(of_limits(states, limits))

    for unit, family in [
        ("requests", "requests"),
        ("input_tokens", "input-tokens"),
        ("output_tokens", "output-tokens"),
    ]:
        among = [state for state in states if state.unit == unit and not limits[state.name].open]
        start = f"anthropic-ratelimit-{family}"
        if not among:
            assert not [name for name in headers if name.startswith(start)]
            continue
        least = min(among, key=lambda state: state.remaining)
        assert (str(least.quota), str(least.remaining)) == (headers[f"{start}-limit"], headers[f"{start}-remaining"])
        reset = headers[f"{start}-reset"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", reset)
        reset_ms = datetime.fromisoformat(reset).timestamp() * 1000
        assert 0 <= reset_ms - (least.resets_at_ms or NOW_MS) < 1000


def test_tokens_are_input_and_output_together_or_the_limit_over_all() -> None:
    """As the API tells them."""

    def state(name: str, used: int, resets_in_ms: int) -> LimitState:
        quota = {"in": 1000, "out": 500, "all": 900}[name]
        unit = {"in": "input_tokens", "out": "output_tokens", "all": "total_tokens"}[name]
        at_ms = NOW_MS + resets_in_ms
        return LimitState(
            name=name, unit=unit, quota=quota, used=used, held=0, remaining=max(0, quota - used),
            frees_at_ms=at_ms, resets_at_ms=at_ms, now_ms=NOW_MS,
        )  # fmt: skip

    limits = {
        name: Limit(name=name, quota=1, unit=unit, window="1m")
        for name, unit in [("in", "input_tokens"), ("out", "output_tokens"), ("all", "total_tokens")]
    }
    parts = [state("in", 400, 10_000), state("out", 700, 20_000)]

    def tokens(states: list[LimitState]) -> list[str]:
        told = dict(of_limits(states, limits))
        return [told[f"anthropic-ratelimit-tokens-{what}"] for what in ("limit", "remaining", "reset")]

    late, early = ("2026-09-21T14:13:40Z", "2026-09-21T14:13:25Z")
    assert ["1500", "600", late] == tokens(parts)
    assert ["900", "0", early] == tokens([*parts, state("all", 1100, 5_000)])
    assert not dict(of_limits([], limits))


# ── When to come back ─────────────────────────────────────────────────────────────────────────────────────────────────


def a_denial(limit: Limit, wait_ms: int | None, *, hint: bool = False) -> QuotaExceeded:
    bound = BoundLimit(limit, limit.quota, window_field(limit, "acme", {}))
    denial = Denial(
        name=bound.name, unit=bound.unit, quota=bound.quota, used=7, requested=3,
        reason="oversize" if wait_ms is None else "quota", retry_after_ms=wait_ms, hint=hint,
        period=limit.period is not None,
    )  # fmt: skip
    state = LimitState(
        name=bound.name, unit=bound.unit, quota=bound.quota, used=7, held=0, remaining=0,
        frees_at_ms=None, resets_at_ms=None, now_ms=NOW_MS,
    )  # fmt: skip
    return QuotaExceeded("acme", (denial,), wait_ms, wait_ms is not None, hint, (state,))


def told_of(limit: Limit, wait_ms: int | None, seed: int = 0) -> tuple[str, str, dict[str, str]]:
    refusal = denied(a_denial(limit, wait_ms), {limit.name: limit}, Random(seed))
    assert 429 == refusal.status
    return refusal.type, str(refusal), dict(refusal.headers)


@given(wait_ms=st.integers(1, 60_000), seed=st.integers(0, 1000))
def test_a_window_says_when_to_come_back(wait_ms: int, seed: int) -> None:
    """In whole seconds, never too early, never beyond a minute, and at most a fifth later than need be."""
    kind, _, headers = told_of(Limit(name="rpm", quota=7, window="1m"), wait_ms, seed)
    least = -(-wait_ms // 1000)

    assert "rate_limit_error" == kind
    assert {"retry-after"} == set(headers)
    assert re.fullmatch("[1-9][0-9]?", headers["retry-after"])
    assert least <= int(headers["retry-after"]) <= min(RETRY_AFTER_S_MAX, least * 1.2)


def test_not_all_come_back_in_the_same_instant() -> None:
    """Identical waits are told with a spread."""
    limit = Limit(name="rpm", quota=7, window="1m")
    waits = {int(told_of(limit, 30_000, seed)[2]["retry-after"]) for seed in range(200)}

    assert set(range(30, 37)) == waits


@given(wait_ms=st.integers(61_001, 31 * 86_400_000))
def test_nobody_is_told_to_sleep_for_more_than_a_minute(wait_ms: int) -> None:
    """Clients that obey would seem to hang, and some would come back at once."""
    _, text, headers = told_of(Limit(name="long", quota=7, window="5h"), wait_ms)
    seconds = -(-wait_ms // 1000)

    assert {"x-should-retry": "false", "retry-after": str(seconds)} == headers
    assert f"{seconds:,} s" in text


@pytest.mark.parametrize("period", ["hour", "day", "week", "month"])
@pytest.mark.parametrize("wait_ms", [1, 30_000, 86_400_000])
def test_a_budget_says_which_and_until_when(period: Any, wait_ms: int) -> None:
    """It is no rate: clients are not to try again by themselves, however soon it is renewed."""
    limit = Limit(name="spend", quota=1_000, unit="input_tokens", period=period, tz="Europe/Berlin")
    kind, text, headers = told_of(limit, wait_ms)
    until = datetime.fromtimestamp((NOW_MS + wait_ms) // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    assert "billing_error" == kind
    assert {"x-should-retry": "false", "retry-after": str(-(-wait_ms // 1000))} == headers
    assert f"1,000 input tokens for {'today' if period == 'day' else f'this {period}'} (Europe/Berlin)" in text
    assert until in text


@pytest.mark.parametrize("quota", [0, 2])
def test_what_can_never_pass_is_not_to_be_tried_again(quota: int) -> None:
    """Not even later."""
    kind, text, headers = told_of(Limit(name="rpm", quota=quota, window="1m"), None)

    assert ("rate_limit_error", {"x-should-retry": "false"}) == (kind, headers)
    assert f"at most {quota} requests" in text
