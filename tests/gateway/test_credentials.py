"""Who a caller is: by tokens of tenants, by keys of their own, and by nothing else; and that no secret gets about."""

from __future__ import annotations

import asyncio
import gc
import hmac
import json
import logging
import os
import stat
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("aiohttp", reason="needs meterlib[gateway]")

import structlog

from meterlib import Limit, Policy
from meterlib.config import Config
from meterlib.errors import PolicyError
from meterlib.gateway.answers import Refusal
from meterlib.gateway.assembly import callers_for
from meterlib.gateway.callers import CREDENTIAL_BYTES_MAX, Callers, Secret, read_or_make_key
from meterlib.gateway.tokens import hash_of, new_token
from meterlib.settings import GatewaySettings, TenantSettings, TokenSettings
from meterlib.testing import Clock
from tests.gateway.answers import STREAMS, Answer, Hold, error
from tests.gateway.provider import COUNT_TOKENS, MODELS
from tests.gateway.test_admission import shape
from tests.gateway.wire import MESSAGES, exchanged, lasting, request
from tests.gateway.world import HOSTED, LIMITS, OWN_KEY, PROVIDER_KEY, TOKEN, Got, World, run

GLOBEX_TOKEN = "ml_a-token-of-globex"
GLOBEX = TenantSettings(name="globex", tokens=[hash_of(GLOBEX_TOKEN)], funding="own", upstream_key_env="OWN")
KNOWN = ("acme", "globex")
UNAUTHORIZED = (401, "authentication_error")


async def asked(world: World, *headers: tuple[str, str]) -> Got:
    """What a request with these credentials is answered."""
    lines = [f"{name}: {value}".encode("utf-8", "surrogateescape") for name, value in headers]
    return await exchanged(world, request("POST", MESSAGES, *lines, key=None))


async def tenant_of(world: World, *headers: tuple[str, str]) -> str | None:
    """Whom a request with these credentials is charged to; None if it is refused."""
    known = len(await world.entries())
    got = await asked(world, *headers)
    await world.settled()
    entries = await world.entries()
    if got.status == 401:
        assert UNAUTHORIZED == shape(got)
        assert known == len(entries)
        return None
    (entry,) = sorted(entries, key=lambda each: each.booked_at)[known:] if known else entries
    return entry.tenant


# ── Tokens ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-api-key", TOKEN),
        ("X-API-KEY", TOKEN),
        ("authorization", f"Bearer {TOKEN}"),
        ("authorization", f"bearer {TOKEN}"),
        ("Authorization", f"Token {TOKEN}"),
        ("authorization", f"TOKEN   {TOKEN}"),
    ],
)
def test_a_token_may_be_shown_in_each_way(name: str, value: str) -> None:
    """As SDKs old and new, Claude Code and curl do."""

    async def use(world: World) -> None:
        assert 200 == (await asked(world, (name, value))).status
        entry = await world.entry()
        assert ("acme", "hosted") == (entry.tenant, entry.funding)
        assert hash_of(TOKEN)[7:15] == entry.attributes["key"]
        (sent,) = world.provider.requests
        assert (PROVIDER_KEY, None) == (sent.header("x-api-key"), sent.header("authorization"))

    run(use, HOSTED, GLOBEX)


@pytest.mark.parametrize(
    ("api_key", "authorization", "tenant"),
    [
        (TOKEN, f"Bearer {TOKEN}", "acme"),
        (TOKEN, f"Bearer {GLOBEX_TOKEN}", "acme"),
        (GLOBEX_TOKEN, f"Bearer {TOKEN}", "globex"),
        ("unknown", f"Bearer {TOKEN}", "acme"),
        (TOKEN, "Bearer unknown", "acme"),
        (TOKEN, "Basic dXNlcjpwYXNz", "acme"),
        (TOKEN, "Bearer", "acme"),
        ("", f"Bearer {TOKEN}", "acme"),
        ("unknown", "Bearer unknown", None),
        (f"Bearer {TOKEN}", "unknown", None),
    ],
)
def test_of_two_credentials_the_api_key_counts_first(api_key: str, authorization: str, tenant: str | None) -> None:
    """And the other is tried where that is none; Claude Code sends both."""

    async def use(world: World) -> None:
        assert tenant == await tenant_of(world, ("x-api-key", api_key), ("authorization", authorization))

    run(use, HOSTED, GLOBEX)


BAD: dict[str, list[tuple[str, str]]] = {
    "nothing": [],
    "unknown": [("x-api-key", "ml_unknown")],
    "unknown bearer": [("authorization", "Bearer unknown")],
    "another case": [("x-api-key", TOKEN.upper())],
    "one more": [("x-api-key", f"{TOKEN}x")],
    "one less": [("x-api-key", TOKEN[:-1])],
    "its hash": [("x-api-key", hash_of(TOKEN))],
    "its hash's digits": [("authorization", f"Bearer {hash_of(TOKEN)[7:]}")],
    "no scheme": [("authorization", TOKEN)],
    "another scheme": [("authorization", f"Basic {TOKEN}")],
    "not ASCII": [("x-api-key", "tökén")],
    "not UTF-8": [("authorization", "Bearer \udcff\udcfe")],
    "twice": [("x-api-key", TOKEN), ("x-api-key", TOKEN)],
    "twice, in another header too": [("authorization", f"Bearer {TOKEN}"), ("x-api-key", "a"), ("x-api-key", TOKEN)],
    "as a list": [("x-api-key", f"{TOKEN}, {TOKEN}")],
    "in a cookie": [("cookie", f"x-api-key={TOKEN}")],
    "for a proxy": [("proxy-authorization", f"Bearer {TOKEN}")],
    "longer than any": [("x-api-key", "x" * (CREDENTIAL_BYTES_MAX + 1))],
    "the provider's": [("x-api-key", PROVIDER_KEY)],
    "a tenant's name": [("x-api-key", "acme"), ("x-tenant", "acme")],
}


def test_whoever_is_not_known_gets_the_same_answer() -> None:
    """Whatever is wrong: nothing is learnt from it, nothing reaches the provider, nothing is charged."""

    async def use(world: World) -> None:
        bodies = set()
        for headers in BAD.values():
            got = await asked(world, *headers)
            assert UNAUTHORIZED == shape(got), headers
            bodies.add(got.body.replace(got.headers["request-id"].encode(), b""))
        for path in (COUNT_TOKENS, "/v1/messages"):
            got = await world.post(path=path, key="ml_unknown")
            bodies.add(got.body.replace(got.headers["request-id"].encode(), b""))
        got = await world.get(MODELS, key="ml_unknown")
        bodies.add(got.body.replace(got.headers["request-id"].encode(), b""))
        assert 1 == len(bodies)
        assert ([], []) == (world.provider.requests, await world.entries())

    run(use, HOSTED, GLOBEX, limits=LIMITS)


def test_a_megabyte_of_a_token_is_refused_before_it_is_read() -> None:
    async def use(world: World) -> None:
        got = await asked(world, ("x-api-key", "x" * (1 << 20)))
        assert (431, "invalid_request_error") == shape(got)
        assert [] == world.provider.requests

    run(use, HOSTED)


def test_nothing_but_a_comparison_of_hashes_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """For an unknown token too there is exactly one, of equal length, in constant time: timing tells nothing."""
    compared: list[tuple[str, str]] = []

    def compare(stored: str, shown: str) -> bool:
        compared.append((stored, shown))
        return stored == shown

    monkeypatch.setattr(hmac, "compare_digest", compare)
    callers = Callers(GatewaySettings(), [HOSTED], {"ANTHROPIC_API_KEY": PROVIDER_KEY}, bytes(32))
    for shown in (TOKEN, "ml_unknown", "x"):
        with suppress(Refusal):
            callers.caller_of([("x-api-key", shown)])

    assert [hash_of(each) for each in (TOKEN, "ml_unknown", "x")] == [shown for _, shown in compared]
    assert {len(hash_of(TOKEN))} == {len(stored) for stored, _ in compared}


@settings(max_examples=60)
@given(
    headers=st.lists(
        st.tuples(st.sampled_from(["x-api-key", "authorization"]), st.text(max_size=30) | st.just(TOKEN)), max_size=3
    )
)
def test_no_credential_is_an_error_of_ours(headers: list[tuple[str, str]]) -> None:
    """Whatever text it is: a tenant, or 401."""
    callers = Callers(GatewaySettings(), [HOSTED], {"ANTHROPIC_API_KEY": PROVIDER_KEY}, bytes(32))
    refused: Refusal | None = None
    try:
        assert "acme" == callers.caller_of(headers).tenant
        assert ("x-api-key", TOKEN) in headers
    except Refusal as refusal:
        refused = refusal
    assert refused is None or UNAUTHORIZED == (refused.status, refused.type)


EXPIRES = datetime(2026, 11, 22, 10, tzinfo=UTC)
FINITE = TenantSettings(name="acme", tokens=[TokenSettings(hash=hash_of(TOKEN), expires=EXPIRES), hash_of("ml_other")])
EXPIRED = (401, "authentication_error", "this token has expired; another one is needed")


def told(got: Got) -> tuple[int, str, str]:
    return *shape(got), got.json["error"]["message"]


@pytest.mark.parametrize("offset_ms", [-1, 0, 1, 10**10])
def test_a_token_is_refused_from_when_it_expires(offset_ms: int) -> None:
    """To the moment, by the time of day; and with that reason, which only who has the token is told."""

    async def use(world: World) -> None:
        world.clock.advance(ms=round(EXPIRES.timestamp() * 1000) + offset_ms - world.clock.now_ms)
        got = await asked(world, ("x-api-key", TOKEN))
        if offset_ms < 0:
            assert 200 == got.status
        else:
            assert EXPIRED == told(got)
            assert [] == world.provider.requests
        assert 200 == (await asked(world, ("x-api-key", "ml_other"))).status
        unknown = await asked(world, ("x-api-key", TOKEN + "x"))
        assert UNAUTHORIZED == shape(unknown)
        assert "expired" not in unknown.body.decode()

    run(use, FINITE, clock=Clock(round(EXPIRES.timestamp() * 1000) - 10_000))


@pytest.mark.parametrize("secret", [TOKEN, "sk-of-our-own-making"])
def test_an_expired_token_is_never_taken_for_a_callers_own_key(secret: str) -> None:
    """It would go to the provider; whatever a token looks like, whose hash the settings have."""
    finite = TenantSettings(name="acme", tokens=[TokenSettings(hash=hash_of(secret), expires=EXPIRES)])

    async def use(world: World) -> None:
        assert EXPIRED == told(await asked(world, ("x-api-key", secret)))
        assert EXPIRED == told(await asked(world, ("authorization", f"Bearer {secret}")))
        assert [] == world.provider.requests

    run(use, finite, callers="anyone", clock=Clock(round(EXPIRES.timestamp() * 1000)))


def test_an_expired_token_beside_one_that_counts_does_no_harm() -> None:
    """Claude Code sends both of its credentials, and people renew one of them."""

    async def use(world: World) -> None:
        for pair in ((TOKEN, "ml_other"), ("ml_other", TOKEN)):
            headers = (("x-api-key", pair[0]), ("authorization", f"Bearer {pair[1]}"))
            assert 200 == (await asked(world, *headers)).status

    run(use, FINITE, clock=Clock(round(EXPIRES.timestamp() * 1000)))


def test_a_stream_outlives_its_token() -> None:
    """A call is authorised when it begins; only the next one is refused."""
    hold = Hold()

    async def use(world: World) -> None:
        events = STREAMS["cached"].events
        world.provider.answers(Answer(events=[*events[:4], hold, *events[4:]]))
        async with world.asked(stream=True) as response:
            await hold.reached()
            world.advance(ms=20_000)
            assert EXPIRED == told(await world.post())
            hold.release()
            assert (await response.read()).endswith(b'"message_stop"}\n\n')

    run(use, FINITE, clock=Clock(round(EXPIRES.timestamp() * 1000) - 10_000))


def test_new_tokens_differ_and_can_be_recognised() -> None:
    """256 bits, a prefix and a checksum for those who look for leaked secrets."""
    tokens = {new_token() for _ in range(100)}

    assert 100 == len(tokens)
    for token in tokens:
        assert (3 + 43 + 8, True, True) == (len(token), token.startswith("ml_"), token.isascii())


# ── Keys of their own ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("shown", "sent"),
    [
        (("x-api-key", "sk-ant-mine"), ("x-api-key", "sk-ant-mine")),
        (("authorization", "Bearer sk-ant-mine"), ("authorization", "Bearer sk-ant-mine")),
        (("authorization", "bearer sk-ant-mine"), ("authorization", "Bearer sk-ant-mine")),
        (("authorization", "Token sk-ant-mine"), ("x-api-key", "sk-ant-mine")),
    ],
)
def test_without_any_configuration_a_callers_own_key_goes_on(shown: tuple[str, str], sent: tuple[str, str]) -> None:
    """As it was shown; metered under a name that does not tell it, and not billed."""

    async def use(world: World) -> None:
        assert 200 == (await asked(world, shown)).status
        entry = await world.entry()
        assert "own" == entry.funding
        assert entry.tenant.startswith("key-")
        assert "mine" not in repr(entry)
        credentials = [pair for pair in world.provider.requests[0].headers if pair[0] in ("x-api-key", "authorization")]
        assert [sent] == credentials

    run(use)


def test_names_of_keys_are_stable_and_each_their_own(tmp_path: Path) -> None:
    """Also after a restart; another installation has other names."""
    keys = [read_or_make_key(tmp_path / name) for name in ("a", "a", "b")]

    def names(key: bytes) -> list[str]:
        callers = Callers(GatewaySettings(), [], {}, key)
        return [callers.caller_of([("x-api-key", f"sk-{each}")]).tenant for each in range(20)]

    first, again, other = map(names, keys)
    assert first == again
    assert 40 == len({*first, *other})
    assert "team" == Callers(GatewaySettings(tenant="team"), [], {}, keys[0]).caller_of([("x-api-key", "sk")]).tenant


def test_the_file_of_the_names_is_for_its_owner_only(tmp_path: Path) -> None:
    """Who has it could try keys until a name fits."""
    path = tmp_path / "folder" / "key"
    key = read_or_make_key(path)

    assert 0o600 == stat.S_IMODE(path.stat().st_mode)
    assert [path] == list(path.parent.iterdir())
    assert 32 == len(key)
    assert key != read_or_make_key(tmp_path / "other")


def test_a_key_file_that_is_there_is_only_read(tmp_path: Path) -> None:
    """It may be mounted read-only, or the disk full."""
    path = tmp_path / "folder" / "key"
    path.parent.mkdir()
    path.write_text("ab" * 32 + "\n")
    (path.parent / f"key.{os.getpid()}").mkdir()  # nothing could be made here

    assert b"\xab" * 32 == read_or_make_key(path)


@pytest.mark.parametrize("content", [b"", b"zz", b"ab", b"\xff\xfe", b"ab" * 5000])
def test_a_key_file_that_holds_none_is_no_key(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)

    with pytest.raises(PolicyError, match="holds no key") as raised:
        read_or_make_key(path)
    assert "gateway.key_file" == raised.value.path


@pytest.mark.parametrize("tenants", ["", '[[tenant]]\nname = "acme"\ntokens = ["sha256:' + 64 * "0" + '"]\n'])
@pytest.mark.parametrize("callers", ["", 'callers = "anyone"\n'])
def test_a_key_file_is_made_only_where_names_are_derived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tenants: str, callers: str
) -> None:
    """Where only tenants may call there are no such names; a shared store's is where the gateway runs."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "meterlib.toml"
    file.write_text(f'[store]\nurl = "redis://127.0.0.1:1"\n[gateway]\n{callers}{tenants}')
    callers_for(Config.load(file), {"ANTHROPIC_API_KEY": PROVIDER_KEY})

    assert bool(callers or not tenants) == (tmp_path / "meterlib-gateway.key").exists()


def test_a_key_file_that_cannot_be_made_is_the_operators_matter(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(PolicyError, match="cannot be used"):
        read_or_make_key(tmp_path / "file" / "key")


def test_anyone_besides_tenants() -> None:
    """Where that is set: tokens of tenants count first, and what looks like a token but is none is no key."""

    async def use(world: World) -> None:
        both = ("authorization", f"Bearer {TOKEN}")
        assert "acme" == await tenant_of(world, ("x-api-key", "sk-own"), both)
        assert str(await tenant_of(world, ("x-api-key", "sk-own"))).startswith("key-")
        assert None is await tenant_of(world, ("x-api-key", "ml_revoked"))
        assert None is await tenant_of(world, ("x-api-key", "ml_revoked"), ("authorization", "Bearer sk-own"))
        assert None is await tenant_of(world)
        await tenant_of(world, ("x-api-key", "sk-first"), ("authorization", "Bearer sk-second"))
        assert ("sk-first", None) == tuple(
            world.provider.requests[-1].header(name) for name in ("x-api-key", "authorization")
        )

    run(use, HOSTED, callers="anyone")


def test_funding_is_told_by_the_tenant() -> None:
    """A tenant's own key is the operator's to keep: its callers show tokens."""

    async def use(world: World) -> None:
        await asked(world, ("x-api-key", GLOBEX_TOKEN))
        entry = await world.entry()
        assert ("globex", "own") == (entry.tenant, entry.funding)
        assert OWN_KEY == world.provider.requests[0].header("x-api-key")

    run(use, HOSTED, GLOBEX)


@pytest.mark.parametrize("funding", ["own", "hosted"])
@pytest.mark.parametrize("limits", [(), LIMITS], ids=["unlimited", "limited"])
@pytest.mark.parametrize("headers", ["ours", "upstream"])
def test_whose_numbers_a_caller_sees(funding: str, limits: tuple[Limit, ...], headers: Any) -> None:
    """The provider's only who brings the key that they are of, where no limit of ours says anything."""

    async def use(world: World) -> None:
        got = await world.post(key="sk-own" if funding == "own" else TOKEN)
        told = got.headers.get("anthropic-ratelimit-output-tokens-limit")
        assert (told == "8000") == (funding == "own" and not limits and headers == "upstream")
        assert ("anthropic-ratelimit-requests-limit" in got.headers) == bool(limits or told)

    run(use, HOSTED, limits=limits, callers="anyone", ratelimit_headers=headers)


@pytest.mark.parametrize("value", [None, "", "  ", "schlüssel", "a\nb"])
def test_a_missing_provider_key_is_found_at_the_start(value: str | None) -> None:
    """And its value never repeated."""
    environment = {} if value is None else {"OWN": value, "ANTHROPIC_API_KEY": value}

    with pytest.raises(PolicyError, match="no variable OWN") as raised:
        Callers(GatewaySettings(), [GLOBEX], environment, bytes(32))
    assert "tenant[0].upstream_key_env" == raised.value.path
    with pytest.raises(PolicyError, match="no variable ANTHROPIC_API_KEY") as raised:
        Callers(GatewaySettings(), [HOSTED], environment, bytes(32))
    assert "gateway.upstream_key_env" == raised.value.path
    if value and value.strip():
        assert value not in str(raised.value)


# ── Other settings while running ──────────────────────────────────────────────────────────────────────────────────────


def others(*tenants: TenantSettings, **told: Any) -> tuple[GatewaySettings, Callers, Policy]:
    configured = GatewaySettings(**told)
    keys = {"ANTHROPIC_API_KEY": PROVIDER_KEY, "OWN": OWN_KEY}
    return configured, Callers(configured, tenants, keys, bytes(32)), Policy()


def test_a_revoked_token_is_unknown_from_the_next_request_on() -> None:
    """What it began goes on to its end, and is charged."""
    hold = Hold()

    async def use(world: World) -> None:
        events = [{"type": "message_start", "message": {"usage": {"input_tokens": 5, "output_tokens": 1}}}]
        stop = {"type": "message_stop"}
        world.provider.answers(Answer(events=[*events, hold, stop]))
        async with world.asked(stream=True) as response:
            await hold.reached()
            world.gateway.reload(*others(GLOBEX))
            assert UNAUTHORIZED == shape(await world.post())
            assert 200 == (await world.post(key=GLOBEX_TOKEN)).status
            hold.release()
            assert b"message_stop" in await response.read()
        await world.settled()
        assert {("acme", "hosted"), ("globex", "own")} == {(e.tenant, e.funding) for e in await world.entries()}

    run(use, HOSTED, GLOBEX)


def test_a_file_that_has_lost_its_tenants_opens_nothing() -> None:
    """It may be half written; who means it, says so."""

    async def use(world: World) -> None:
        with pytest.raises(PolicyError, match="say 'anyone'") as raised:
            world.gateway.reload(*others())
        assert "gateway.callers" == raised.value.path
        assert [401, 200] == [(await world.post(key=key)).status for key in ("sk-own", TOKEN)]
        world.gateway.reload(*others(callers="anyone"))
        assert [200, 401] == [(await world.post(key=key)).status for key in ("sk-own", TOKEN)]

    run(use, HOSTED)


def test_settings_whose_limits_are_refused_change_nothing() -> None:
    """A file counts as a whole or not at all."""

    async def use(world: World) -> None:
        settings, callers, _ = others(callers="anyone")
        shared = Policy(limits=[Limit(name="all", quota=9, window="1m", shared=True)])
        with pytest.raises(PolicyError, match="one shard"):
            world.gateway.reload(settings, callers, shared)
        assert [401, 200] == [(await world.post(key=key)).status for key in ("sk-own", TOKEN)]

    run(use, HOSTED)


# ── Secrets ───────────────────────────────────────────────────────────────────────────────────────────────────────────

CANARIES = (TOKEN, PROVIDER_KEY, OWN_KEY, "sk-ant-canary-own", "ml_canary-unknown", "canary-prompt", "canary-basic")


def test_no_secret_gets_about(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither keys nor tokens nor prompts are in logs, answers, headers, the ledger, errors or what objects say."""
    caplog.set_level(logging.DEBUG)
    seen: list[str] = []
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG))

    class Failing:
        """An estimator with a fault: whoever logs its traceback must not log what is in the variables."""

        def estimate(self, tenant: str, prompt: object) -> Any:
            raise RuntimeError(tenant)

        def learn(self, *_: object) -> None:
            pass

    async def use(world: World) -> None:
        body = {"model": "m", "messages": [{"role": "user", "content": "canary-prompt"}]}
        world.provider.answers(error(401), error(529), Answer(instead="rst"), Answer(raw=b"<html>"), Answer(events=[]))
        shown = [{"x-api-key": TOKEN}, {"x-api-key": "sk-ant-canary-own"}, {"authorization": f"Bearer {TOKEN}"}]
        for headers in [*shown * 3, {"x-api-key": "ml_canary-unknown"}, {"authorization": "Basic canary-basic"}]:
            seen.extend(said(await world.post(body, key=None, headers=headers)))
        seen.extend(said(await world.post(b'{"model": "sk-ant-canary-own", "x": "canary-prompt"}')))
        seen.extend(said(await world.post(b'{"messages": "canary-prompt')))
        seen.extend(said(await world.post(body, headers={"x-claude-code-session-id": "sk-ant-canary-own"})))
        seen.extend(said(await world.get(MODELS)))
        await world.settled()
        estimator = world.gateway._admission._estimator
        world.gateway._admission._estimator = Failing()
        broken = await world.post(body)
        assert (500, "api_error") == shape(broken)
        seen.extend(said(broken))
        for entry in await world.entries():
            seen.extend((repr(entry), str(entry)))
        hold = Hold()
        world.gateway._admission._estimator = estimator
        world.provider.answers(Answer(json={}, before_head=[hold]))
        running = asyncio.ensure_future(world.post(body))
        await hold.reached()
        ours = [each for each in gc.get_objects() if str(type(each).__module__).startswith("meterlib.")]
        assert {"Outgoing", "Call", "Caller", "Metering"} <= {type(each).__name__ for each in ours}
        seen.extend(repr(each).replace("canary-prompt", "a prompt is no secret of ours") for each in ours)
        hold.release()
        await running
        caller = world.gateway.callers.caller_of([("x-api-key", TOKEN)])
        seen.append(repr([caller, caller.credential, world.gateway.callers, Secret(TOKEN)]))
        with pytest.raises(Refusal) as raised:
            world.gateway.callers.caller_of([("x-api-key", "ml_canary-unknown")])
        seen.append(repr(raised.value))

    try:
        run(use, HOSTED, limits=LIMITS, callers="anyone")
    finally:
        structlog.reset_defaults()
    captured = capsys.readouterr()
    text = "\n".join([*seen, caplog.text, captured.out, captured.err])
    assert "request.failed" in text
    assert [] == [canary for canary in CANARIES if canary in text]


def said(got: Got) -> list[str]:
    return [got.body.decode(), json.dumps(dict(got.headers))]


def test_a_tenants_token_never_reaches_the_provider() -> None:
    """In no header, whatever the path and wherever it was shown."""

    async def use(world: World) -> None:
        both = [f"authorization: Bearer {TOKEN}", f"proxy-authorization: Bearer {TOKEN}", f"cookie: t={TOKEN}"]
        for method, path in [("POST", "/v1/messages"), ("POST", COUNT_TOKENS), ("GET", MODELS)]:
            target = world.url[world.url.index("/v3") :] + path
            body = b'{"model": "m", "messages": []}' if method == "POST" else b""
            assert 200 == (await exchanged(world, request(method, target, *both, body=body))).status
        assert 3 == len(world.provider.requests)
        for sent in world.provider.requests:
            assert TOKEN not in repr(sent)
            assert PROVIDER_KEY == sent.header("x-api-key")

    run(use, HOSTED)


def test_secrets_can_be_used_but_not_seen() -> None:
    secret = Secret("sk-ant")

    assert ("sk-ant", "Bearer sk-ant", b"sk-ant") == (str(secret), f"Bearer {secret}", secret.encode())
    assert "sk-ant" not in repr([("x-api-key", secret)])


def test_who_calls_decides_whatever_else_a_request_says() -> None:
    """Tenant, provider, key and funding come from the credential and the settings, never from a header or the body."""
    headers = [f"{name}: globex" for name in ("x-tenant", "x-meterlib-tenant", "tenant", "x-provider", "x-user-id")]
    body = b'{"model": "m", "messages": [], "tenant": "globex", "api_key": "x", "base_url": "http://evil.example"}'

    with lasting(HOSTED, GLOBEX) as (world, play):

        async def use() -> None:
            assert 200 == (await exchanged(world, request("POST", MESSAGES, *headers, body=body))).status
            entry = await world.entry()
            assert ("acme", "hosted", "anthropic") == (entry.tenant, entry.funding, entry.attributes["provider"])
            assert "globex" not in repr(entry)
            assert body == world.provider.requests[0].body
            await asyncio.sleep(0)

        play(use())
