"""Who is let in, and what the others are told: which limit said so, when to come back, that nothing was used."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("aiohttp", reason="needs meterlib[gateway]")

from meterlib import Limit, Policy, StoreOptions
from meterlib.gateway.answers import Refusal
from meterlib.gateway.free import Pace
from meterlib.gateway.tokens import hash_of
from meterlib.settings import TenantSettings
from tests.gateway.answers import Answer, Hold, error, redirect
from tests.gateway.provider import COUNT_TOKENS, MODELS
from tests.gateway.test_headers import parsed_list
from tests.gateway.wire import Play, lasting
from tests.gateway.world import HOSTED, LIMITS, MODEL, TOKEN, Got, World, message, run, with_settings

REQUEST_ID = re.compile(r"req_[0-9a-f]{24}")
HASTY = StoreOptions(shards=2, timeout_ms=50, deadline_ms=100)
TEN = (Limit(name="rpm", quota=10, window="1m"),)


def shape(got: Got) -> tuple[int, str]:
    """Status and kind of an error in the API's shape, with one id in its header and its body."""
    told = got.json
    assert {"type", "error", "request_id"} == set(told)
    assert "error" == told["type"]
    assert {"type", "message"} <= set(told["error"]) <= {"type", "message", "details"}
    assert told["request_id"] == got.headers["request-id"]
    assert REQUEST_ID.fullmatch(told["request_id"])
    assert "application/json" == got.headers["content-type"]
    return got.error


# ── Denials ───────────────────────────────────────────────────────────────────────────────────────────────────────────

windows: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict,
    unit=st.sampled_from(["requests", "input_tokens", "total_tokens", "output_tokens"]),
    quota=st.integers(1, 400),
    window=st.sampled_from(["300ms", "1s", "7s", "30s", "59s"]),
    sub_windows=st.sampled_from([None, 1, 70]),
)


@settings(max_examples=40)
@given(told=st.lists(windows, min_size=1, max_size=3), pauses_ms=st.lists(st.integers(0, 9_000), max_size=6))
def test_after_the_wait_the_same_call_passes(
    world_in_play: tuple[World, Play[Any]], told: list[dict[str, Any]], pauses_ms: list[int]
) -> None:
    """Whatever the limits are and whatever was used before: who comes back when told is let in."""
    world, play = world_in_play
    limits = tuple(Limit(name=f"limit{at}", **each) for at, each in enumerate(told))

    async def use() -> None:
        world.clock.advance(ms=200_000)  # all windows of the example before have slid out
        world.meter.policy = Policy(limits=limits)
        for pause_ms in pauses_ms:
            world.clock.advance(ms=pause_ms)
            await world.post()
        for _ in range(12):
            got = await world.post()
            if got.status != 429:
                continue
            await world.settled()
            sent = len(world.provider.requests)
            assert ("rate_limit_error", 0) == (shape(got)[1], len(world.provider.requests) - sent)
            wait_s = int(got.headers["retry-after"])
            assert 1 <= wait_s
            assert (wait_s > 60) == (got.headers.get("x-should-retry") == "false")
            world.clock.advance(ms=wait_s * 1000)
            assert 200 == (await world.post()).status

    play(use())


@pytest.fixture(scope="module")
def world_in_play() -> Any:
    with lasting(HOSTED) as both:
        yield both


def test_a_window_of_a_minute_never_asks_for_more_than_a_minute() -> None:
    """It forgets in steps of a second, and so may take one more: that one is asked for when it is due."""

    async def use(world: World) -> None:
        assert 0 == world.clock.now_ms % 1000
        await world.post(message("x" * 60_000))
        waits = []
        while (got := await world.post()).status == 429:
            assert "x-should-retry" not in got.headers
            waits.append(int(got.headers["retry-after"]))
            world.clock.advance(ms=waits[-1] * 1000)

        assert [60, 1] == waits

    run(use, HOSTED, limits=(Limit(name="itpm", quota=10_000, unit="input_tokens", window="1m"),))


def test_the_wait_is_not_longer_than_need_be() -> None:
    """At most a fifth more than the window says, and a second for rounding."""

    async def use(world: World) -> None:
        for _ in range(10):
            await world.post()
            world.clock.advance(ms=2_000)
        got = await world.post()
        least = 60 - 20

        assert least <= int(got.headers["retry-after"]) <= least * 1.2
        world.clock.advance(ms=least * 1000 - 1)
        assert 429 == (await world.post()).status
        world.clock.advance(ms=1)
        assert 200 == (await world.post()).status

    run(use, HOSTED, limits=TEN)


def test_a_denied_call_never_reaches_the_provider_and_costs_nothing() -> None:
    """Neither its connections nor the ledger nor the limits know of it."""

    async def use(world: World) -> None:
        for _ in range(10):
            await world.post()
        await world.settled()
        before = (len(world.provider.requests), await world.entries(), await world.meter.peek("acme", {}))
        world.provider.requests.clear()
        denied = [await world.post(stream=stream) for stream in (False, True) for _ in range(5)]
        await world.settled()

        assert {(429, "rate_limit_error")} == {shape(got) for got in denied}
        assert [] == world.provider.requests
        assert before[1:] == (await world.entries(), await world.meter.peek("acme", {}))
        assert 0 == await world.open_reservations()

    run(use, HOSTED, limits=TEN)


def test_headers_agree_with_the_decision() -> None:
    """Counting down to 0, where the denial comes; resets are when all is there again."""

    async def use(world: World) -> None:
        seen = []
        for _ in range(11):
            got = await world.post()
            told = got.headers
            start = "anthropic-ratelimit-requests-"
            (rate, policy) = (parsed_list(told["ratelimit"])[0], parsed_list(told["ratelimit-policy"])[0])
            assert ("rpm", "rpm") == (rate[0], policy[0])
            assert ("10", {"q": 10, "w": 60}) == (told[start + "limit"], policy[1])
            assert told[start + "remaining"] == str(rate[1]["r"])
            reset_ms = datetime.fromisoformat(told[start + "reset"]).timestamp() * 1000
            assert world.clock.now_ms + 60_000 - 1000 <= reset_ms <= world.clock.now_ms + 61_000
            seen.append((got.status, rate[1]["r"]))
            world.clock.advance(ms=100)
        assert [(200, left) for left in range(9, -1, -1)] == seen[:-1]
        assert (429, 0) == seen[-1]
        assert rate[1]["t"] <= int(told["retry-after"])

    run(use, HOSTED, limits=TEN)


def test_each_tenants_numbers_are_its_own() -> None:
    """Not the provider's, which are those of the key that all share; and not another tenant's."""
    other = TenantSettings(name="globex", tokens=[with_hash("ml_globex")], quotas={"requests": 7})

    async def use(world: World) -> None:
        for _ in range(3):
            await world.post()
        got = await world.post(key="ml_globex")
        families = {
            name: value for name, value in got.headers.items() if name.lower().startswith("anthropic-ratelimit")
        }

        assert ("7", "6") == (
            families["anthropic-ratelimit-requests-limit"],
            families["anthropic-ratelimit-requests-remaining"],
        )
        assert "50000" == families["anthropic-ratelimit-input-tokens-limit"]
        assert not [name for name in families if "output" in name]
        assert all(value.isdigit() or value.endswith("Z") for value in families.values())

    run(use, HOSTED, other, limits=LIMITS)


def with_hash(token: str) -> str:
    return hash_of(token)


@pytest.mark.parametrize(("period", "when"), [("hour", "this hour"), ("day", "today"), ("month", "this month")])
def test_a_used_up_budget_names_period_and_reset(period: Any, when: str) -> None:
    """Clients do not sleep for it."""
    budget = Limit(name="budget", quota=2, period=period)

    async def use(world: World) -> None:
        world.clock.set(int(datetime(2026, 11, 30, 23, 0, tzinfo=UTC).timestamp() * 1000))
        for _ in range(2):
            await world.post()
        got = await world.post(stream=True)

        assert (429, "billing_error") == shape(got)
        assert "false" == got.headers["x-should-retry"]
        assert {"error_code": "budget_exhausted"} == got.json["error"]["details"]
        assert when in got.json["error"]["message"]
        assert "2026-12-01T00:00:00Z" in got.json["error"]["message"]
        world.clock.advance(ms=int(got.headers["retry-after"]) * 1000)
        assert 200 == (await world.post()).status

    run(use, HOSTED, limits=(budget,))


def test_a_long_window_says_not_to_wait_for_it() -> None:
    """61 seconds and more are no wait for a client."""

    async def use(world: World) -> None:
        await world.post()
        got = await world.post()

        assert (429, "rate_limit_error") == shape(got)
        assert ("false", True) == (got.headers["x-should-retry"], int(got.headers["retry-after"]) > 60)
        world.clock.advance(ms=int(got.headers["retry-after"]) * 1000)
        assert 200 == (await world.post()).status

    run(use, HOSTED, limits=(Limit(name="five_hours", quota=1, window="5h"),))


@pytest.mark.parametrize(
    "limit",
    [
        Limit(name="none", quota=0, window="1m"),
        Limit(name="no_input", quota=0, unit="input_tokens", window="1m"),
        Limit(name="small", quota=1, unit="total_tokens", window="1m", oversize="reject"),
        Limit(name="nobody", quota=0, open=True),
    ],
    ids=lambda limit: limit.name,
)
def test_what_can_never_pass_is_said_to_be_so(limit: Limit) -> None:
    """There is no time to come back at."""

    async def use(world: World) -> None:
        got = await world.post()

        assert (429, "rate_limit_error") == shape(got)
        assert "false" == got.headers["x-should-retry"]
        assert "retry-after" not in got.headers
        assert "never" in got.json["error"]["message"]

    run(use, HOSTED, limits=(limit,))


def test_an_estimate_above_the_quota_is_no_endless_denial() -> None:
    """The bucket is smaller than the call: it passes when the bucket is full, goes into debt, and others wait."""
    limit = Limit(name="itpm", quota=50, unit="input_tokens", window="1m")

    async def use(world: World) -> None:
        first = await world.post(message("x" * 40_000))
        await world.settled()
        second = await world.post()

        assert [200, 429] == [first.status, second.status]
        assert "0" == second.headers["anthropic-ratelimit-input-tokens-remaining"]
        world.clock.advance(ms=61_000)
        assert 200 == (await world.post()).status

    run(use, HOSTED, limits=(limit,))


def test_concurrency_tells_a_hint_and_frees_with_the_answer() -> None:
    """Nobody knows when a slot frees; the configured guess is told."""
    hold = Hold()
    limit = Limit(name="parallel", quota=1, open=True, retry_hint_ms=4_000)

    async def use(world: World) -> None:
        world.provider.answers(Answer(json={}, before_head=[hold]))
        first = asyncio.ensure_future(world.post())
        await hold.reached()
        got = await world.post()
        hold.release()
        await first

        assert (429, "rate_limit_error") == shape(got)
        assert "4" == got.headers["retry-after"]
        assert "1 requests at the same time" in got.json["error"]["message"]
        assert ("parallel", {"q": 1, "qu": "concurrent-requests"}) == parsed_list(got.headers["ratelimit-policy"])[0]
        assert not [name for name in got.headers if name.lower().startswith("anthropic-ratelimit-requests")]
        assert 200 == (await world.post()).status

    run(use, HOSTED, limits=(limit,))


def test_the_limit_that_frees_last_decides_the_wait() -> None:
    """Coming back for the first one would be in vain."""
    limits = (
        Limit(name="short", quota=1, window="5s"),
        Limit(name="long", quota=1, window="40s"),
    )

    async def use(world: World) -> None:
        await world.post()
        got = await world.post()

        assert 40 <= int(got.headers["retry-after"]) <= 48
        assert got.json["error"]["message"].startswith("long: ")

    run(use, HOSTED, limits=limits)


def test_every_try_is_a_request_of_its_own() -> None:
    """Clients say how often they tried; that makes no difference."""

    async def use(world: World) -> None:
        for count in "000123":
            await world.post(headers={"x-stainless-retry-count": count, "x-claude-code-session-id": "s-1"})
        await world.settled()
        entries = await world.entries()

        assert 6 == len(entries)
        assert {"s-1"} == {entry.attributes["session"] for entry in entries}
        assert 6 == len({entry.reservation_id for entry in entries})

    run(use, HOSTED, limits=LIMITS)


def test_sixty_calls_in_a_minute_of_fifty() -> None:
    """However many come at once."""

    async def use(world: World) -> None:
        got = await asyncio.gather(*[world.post() for _ in range(60)])

        assert [200] * 50 + [429] * 10 == sorted(each.status for each in got)
        assert 50 == len(world.provider.requests)

    run(use, HOSTED, limits=LIMITS[:1])


# ── What makes no sense ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("counts", [True, False])
def test_a_request_without_sense_counts_as_one(counts: bool) -> None:
    """Or else nothing would limit those who send nothing else. It has no tokens, and never leaves the gateway."""
    senseless = [
        (b"{", {}),
        (b'{"model": "m", "stream": "yes"}', {}),
        (b"\x1f\x8b", {"content-encoding": "gzip"}),
        (b"{}", {"content-encoding": "rot13"}),
    ]

    async def use(world: World) -> None:
        got = [await world.post(body, headers=headers) for body, headers in senseless * 2]
        await world.settled()
        entries = await world.entries()

        assert {(400, "invalid_request_error")} == {shape(each) for each in got[:5]}
        assert [] == world.provider.requests
        if counts:
            assert [400] * 5 + [429] * 3 == [each.status for each in got]
            assert {0} == {each.usage["input_tokens"] for each in entries}
            assert {each.headers["request-id"] for each in got[:5]} == {each.facts["request_id"] for each in entries}
            assert "0" == got[-1].headers["anthropic-ratelimit-requests-remaining"]
            assert {("invalid", "400")} == {(each.facts["end"], each.facts["status"]) for each in entries}
        else:
            assert ([400] * 8, []) == ([each.status for each in got], entries)

    run(use, HOSTED, limits=(Limit(name="rpm", quota=5, window="1m"),), count_invalid_requests=counts)


# ── What costs nothing ────────────────────────────────────────────────────────────────────────────────────────────────


def test_counting_tokens_is_free_and_has_its_own_pace() -> None:
    """Claude Code counts 25 to 52 times at once."""

    async def use(world: World) -> None:
        for _ in range(10):
            await world.post()
        got = await asyncio.gather(*[world.post(path=COUNT_TOKENS + "?beta=true") for _ in range(52)])
        await world.settled()

        assert {200} == {each.status for each in got}
        assert {"input_tokens"} == set(got[0].json)
        assert 10 == len(await world.entries())
        assert 429 == (await world.post()).status
        assert {True} == {each.target.endswith("?beta=true") for each in world.provider.requests[10:]}

    run(use, HOSTED, limits=TEN)


@pytest.mark.parametrize("ms", [0, 1, 999, 30_500, 59_999])
def test_the_pace_of_counting_is_a_wait_of_at_most_a_minute(ms: int) -> None:
    """61 seconds would be no wait for Claude Code."""

    async def use(world: World) -> None:
        for _ in range(3):
            assert 200 == (await world.post(path=COUNT_TOKENS)).status
        world.clock.advance(ms=ms)
        got = await world.post(path=COUNT_TOKENS)
        wait_s = int(got.headers["retry-after"])

        assert (429, "rate_limit_error") == shape(got)
        assert 1 <= wait_s <= 60
        assert wait_s == -(-(60_000 - ms) // 1000)
        assert 3 == len(world.provider.requests)
        assert 200 == (await world.post()).status
        world.clock.advance(ms=wait_s * 1000)
        assert 200 == (await world.post(path=COUNT_TOKENS)).status

    run(use, HOSTED, count_tokens_per_minute=3)


def test_no_pace_at_all_is_said_to_be_so() -> None:
    async def use(world: World) -> None:
        got = await world.post(path=COUNT_TOKENS)

        assert (429, "false") == (got.status, got.headers["x-should-retry"])
        assert "retry-after" not in got.headers

    run(use, HOSTED, count_tokens_per_minute=0)


def test_the_paces_of_many_tenants_take_no_more_memory_than_those_of_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each caller with a key of its own is a tenant; those that have not counted for longest are forgotten first."""
    monkeypatch.setattr("meterlib.gateway.free._TENANTS_MAX", 3)
    pace = Pace(lambda: 0.0)
    for tenant in ("a", "b", "c", "a", "d"):
        pace.check(tenant, 2)
    assert ["c", "a", "d"] == list(pace._done)
    with pytest.raises(Refusal):
        pace.check("a", 2)
    pace.check("b", 1)


def test_whoever_counts_too_often_keeps_nobody_else_from_counting() -> None:
    """The pace is each tenant's own."""
    other = TenantSettings(name="globex", tokens=[hash_of("ml_globex")])

    async def use(world: World) -> None:
        assert [200, 429] == [(await world.post(path=COUNT_TOKENS)).status for _ in range(2)]
        assert 200 == (await world.post(path=COUNT_TOKENS, key="ml_globex")).status

    run(use, HOSTED, other, count_tokens_per_minute=1)


def test_probes_are_free_and_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    """Claude Code warms its connection up without a credential."""

    async def use(world: World) -> None:
        for path in ("", "/", "/api/hello"):
            got = await world.get(path, key=None, method="HEAD")
            assert (200, b"") == (got.status, got.body)
            assert REQUEST_ID.fullmatch(got.headers["request-id"])
        assert ([], []) == (world.provider.requests, await world.entries())

    run(use, HOSTED, limits=LIMITS)
    assert ("", "") == tuple(capsys.readouterr())


# ── Models ────────────────────────────────────────────────────────────────────────────────────────────────────────────

SONNETS = with_settings(HOSTED, models=["claude-sonnet-*"])


def test_a_model_that_is_not_allowed_is_not_there() -> None:
    """Wherever it is named; and nothing of it is charged."""

    async def use(world: World) -> None:
        for path in ("/v1/messages", COUNT_TOKENS):
            got = await world.post(path=path, model="claude-opus-5")
            assert (404, "not_found_error") == shape(got)
        assert (404, "not_found_error") == shape(await world.get(f"{MODELS}/claude-opus-5"))
        assert ([], []) == (world.provider.requests, await world.entries())
        assert 200 == (await world.post(path=COUNT_TOKENS)).status
        assert 200 == (await world.get(f"{MODELS}/{MODEL}")).status

    run(use, SONNETS, limits=LIMITS)


def test_a_tenants_models_go_before_those_of_all() -> None:
    """Who names none has the gateway's."""
    other = TenantSettings(name="globex", tokens=[hash_of("ml_globex")])

    async def use(world: World) -> None:
        for key, expected in ((TOKEN, [200, 404]), ("ml_globex", [404, 200])):
            models = ("claude-sonnet-4-5", "claude-opus-5")
            assert expected == [(await world.post(model=model, key=key)).status for model in models]

    run(use, SONNETS, other, models=["claude-opus-*"])


def test_a_shared_keys_account_is_nobodys_business_in_a_list_of_models_either() -> None:
    """Whose key it is sees it."""

    async def use(world: World) -> None:
        hosted, own = await world.get(MODELS), await world.get(MODELS, key="sk-mine")
        assert 200 == hosted.status == own.status
        assert "anthropic-organization-id" not in hosted.headers
        assert "org-test" == own.headers["anthropic-organization-id"]

    run(use, SONNETS, callers="anyone", models=["claude-*"])


@pytest.mark.parametrize("path", ["/v1/messages", COUNT_TOKENS])
@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "claude-opus-5", "model": "claude-sonnet-4-5", "messages": []}',
        b'{"model": "claude-opus-5", "messages": [], "mod\\u0065l": "claude-sonnet-4-5"}',
        b' {"model":\t"claude-opus-5" ,"messages": [{"content": "\\u00fc"}],\n"model":"claude-sonnet-4-5"} ',
    ],
)
def test_two_models_in_one_request_are_none(path: str, body: bytes) -> None:
    """The provider might go by the other one."""

    async def use(world: World) -> None:
        got = await world.post(body, path=path)

        assert (400, "invalid_request_error") == shape(got)
        assert [] == world.provider.requests
        deeper = {"input": {"model": "claude-opus-5"}, "model": "x"}
        fine = message(system="model", tools=[deeper, deeper], temperature=1e0)
        assert 200 == (await world.post(json.dumps(fine, indent=3).encode(), path=path)).status

    run(use, SONNETS)


def test_models_are_listed_as_far_as_they_may_be_used() -> None:
    async def use(world: World) -> None:
        world.provider.models = ["claude-opus-5", "claude-sonnet-4-5", "claude-sonnet-5", "claude-haiku-4-5"]
        got = await world.get(f"{MODELS}?limit=1000")
        first = await world.get(f"{MODELS}?limit=2")
        rest = await world.get(f"{MODELS}?limit=2&after_id={first.json['last_id']}")

        assert ["claude-sonnet-4-5", "claude-sonnet-5"] == [each["id"] for each in got.json["data"]]
        assert ("claude-sonnet-4-5", "claude-sonnet-5", False) == (
            got.json["first_id"],
            got.json["last_id"],
            got.json["has_more"],
        )
        assert [["claude-sonnet-4-5"], ["claude-sonnet-5"]] == [
            [each["id"] for each in page.json["data"]] for page in (first, rest)
        ]
        assert (True, False) == (first.json["has_more"], rest.json["has_more"])
        assert str(len(got.body)) == got.headers["content-length"]
        assert "req_test_000000" == got.headers["request-id"]
        assert not [name for name in got.headers if "ratelimit" in name.lower()]

    run(use, SONNETS)


def test_a_page_without_a_model_of_ours_is_passed_over() -> None:
    """Clients take an empty page for the last one, whatever it says of more."""

    async def use(world: World) -> None:
        others = [f"claude-opus-{number}" for number in range(7)]
        world.provider.models = ["claude-sonnet-4", *others, "claude-sonnet-5", "gpt-1", "gpt-2"]
        first = await world.get(f"{MODELS}?limit=2&after_id=claude-sonnet-4&x=%20y")
        pages = [(["claude-opus-4", "claude-opus-5"], True), (["claude-sonnet-4"], False)]
        for ids, more in pages:
            page = {"data": [{"id": each} for each in ids], "has_more": more, "first_id": ids[0], "last_id": ids[-1]}
            world.provider.answers(Answer(json=page), path=MODELS)
        back = await world.get(f"{MODELS}?limit=2&before_id=claude-sonnet-5")
        assert "claude-opus-4" == world.provider.requests[-1].query["before_id"]
        none = await world.get(f"{MODELS}?limit=3&after_id=claude-sonnet-5")

        assert ["claude-sonnet-5"] == [each["id"] for each in first.json["data"]]
        assert " y" == world.provider.requests[3].query["x"]
        assert ["claude-sonnet-4"] == [each["id"] for each in back.json["data"]]
        assert ([], False, None, None) == tuple(none.json[name] for name in ("data", "has_more", "first_id", "last_id"))

    run(use, SONNETS)


def test_pages_without_end_come_to_one() -> None:
    async def use(world: World) -> None:
        page = Answer(json={"data": [{"id": "gpt"}], "has_more": True, "first_id": "a", "last_id": "a"})
        world.provider.answers_always(page, path=MODELS)
        got = await world.get(MODELS)

        assert ([], True, 20) == (got.json["data"], got.json["has_more"], len(world.provider.requests))

    run(use, SONNETS)


BAD_LISTS: dict[str, tuple[Answer, tuple[int, str]]] = {
    "html": (Answer(raw=b"<html>"), (502, "api_error")),
    "a list": (Answer(json=[1]), (502, "api_error")),
    "a redirect": (redirect("http://127.0.0.1:1/v1/models"), (502, "api_error")),
    "far too long": (Answer(json={"data": [{"id": "claude-sonnet-5", "x": "x" * (5 << 20)}]}), (502, "api_error")),
    "cut": (Answer(json={"data": []}, breaks_after=3), (502, "api_error")),
    "nothing": (Answer(instead="rst"), (502, "api_error")),
}


@pytest.mark.parametrize("what", BAD_LISTS)
def test_a_list_of_models_that_is_none(what: str) -> None:
    """Not read beyond measure, not followed, not passed on."""
    answer, told = BAD_LISTS[what]

    async def use(world: World) -> None:
        world.provider.answers(answer, answer, path=MODELS)  # nothing is asked for twice that was answered
        got = await world.get(MODELS)

        assert told == shape(got)
        assert "location" not in got.headers

    run(use, SONNETS)


def test_the_providers_refusal_to_list_passes() -> None:
    async def use(world: World) -> None:
        answer = error(529, retry_after=3)
        world.provider.answers(answer, path=MODELS)
        got = await world.get(MODELS)

        assert (529, answer.body(), "3") == (got.status, got.body, got.headers["retry-after"])

    run(use, SONNETS)


# ── Health ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_health_is_told_without_a_credential() -> None:
    """At the root, whatever the base path is; and nothing besides."""

    async def use(world: World) -> None:
        root = world.url.removesuffix("/v3/ai/anthropic")
        for path in ("/healthz", "/readyz"):
            async with world.http.get(root + path) as response:
                assert (200, {"status": "ok"}) == (response.status, await response.json())
            async with world.http.head(root + path) as response:
                assert (200, b"") == (response.status, await response.read())
            async with world.http.post(root + path) as response:
                assert 404 == response.status

    run(use, HOSTED)


def test_ready_is_who_has_a_store_and_is_not_stopping() -> None:
    async def use(world: World) -> None:
        root = world.url.removesuffix("/v3/ai/anthropic")

        async def told(path: str) -> tuple[int, Any]:
            async with world.http.get(root + path) as response:
                return response.status, (await response.json()).get("error", {}).get("message")

        await world.meter.aclose()
        assert (503, "the store does not answer") == await told("/readyz")
        world.gateway._closing = True
        assert (503, "stopping") == await told("/readyz")
        assert (200, None) == await told("/healthz")
        got = await world.post()
        assert ((503, "api_error"), "1") == (shape(got), got.headers["retry-after"])
        assert [] == world.provider.requests

    run(use, HOSTED)


def test_without_a_store_nobody_is_let_in_and_all_are_told_to_come_back() -> None:
    """Nothing of the store is told."""

    async def use(world: World) -> None:
        got = await world.post()

        assert (503, "api_error") == shape(got)
        assert 1 <= int(got.headers["retry-after"]) <= 3
        assert not re.search(r"redis|127\.0\.0\.1|meterlib|:1/", got.body.decode(), re.IGNORECASE)
        assert [] == world.provider.requests

    run(use, HOSTED, limits=TEN, store="redis://:hunter2@127.0.0.1:1/0", options=HASTY)
