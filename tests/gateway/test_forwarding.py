"""What goes on to the provider and what comes back: bytes as they came, on known paths, to one host, with one id."""

from __future__ import annotations

import asyncio
import importlib
import json
import re
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("aiohttp", reason="needs meterlib[gateway]")

from meterlib import Limit
from tests.gateway.answers import ERROR_TYPES, Answer, error, html, redirect
from tests.gateway.provider import COUNT_TOKENS, MODELS, Provider
from tests.gateway.test_admission import shape
from tests.gateway.wire import BODY, MESSAGES, Play, chunked, exchanged, lasting, names, request
from tests.gateway.world import BASE, HOSTED, LIMITS, MODEL, TOKEN, World, run

DONE = Answer(json={"usage": {"input_tokens": 1, "output_tokens": 1}})

# ── Bodies ────────────────────────────────────────────────────────────────────────────────────────────────────────────

spaces = st.text(" \t\r\n", max_size=3)
numbers = st.one_of(
    st.integers().map(str),
    st.from_regex(r"-?(0|[1-9][0-9]{0,18})(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?", fullmatch=True),
    st.sampled_from(
        ["-0", "-0.0", "1E400", "1e-400", "1.0", "100000000000000000000000000000", "1.10000000000000000000"]
    ),
)


def escaped(text: str) -> st.SearchStrategy[str]:
    """A string of JSON, its characters escaped or not."""
    ways = [
        st.sampled_from(
            [
                json.dumps(each)[1:-1],
                json.dumps(each, ensure_ascii=False)[1:-1],
                "".join(map(r"\u{:04X}".format, _units(each))),
            ]
        )
        for each in text
    ]
    return st.tuples(*ways).map(lambda parts: f'"{"".join(parts)}"')


def _units(character: str) -> list[int]:
    raw = character.encode("utf-16-be")
    return [int.from_bytes(raw[at : at + 2]) for at in range(0, len(raw), 2)]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).flatmap(escaped)
scalars = st.one_of(numbers, texts, st.sampled_from(["true", "false", "null"]))


def lists_of(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    items = st.lists(st.tuples(spaces, values, spaces).map("".join), max_size=3)
    return items.map(lambda each: f"[{','.join(each)}]")


def objects_of(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pairs = st.tuples(spaces, texts, spaces, st.just(":"), spaces, values, spaces).map("".join)
    return st.lists(pairs, max_size=3).map(lambda each: f"{{{','.join(each)}}}")


documents = st.recursive(scalars, lambda values: lists_of(values) | objects_of(values), max_leaves=8)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """A request in JSON such as no serialiser would write it."""
    fields = {"model": f'"{MODEL}"', "max_tokens": draw(numbers), "messages": draw(documents)}
    fields |= {f"x{at}": draw(documents) for at in range(draw(st.integers(0, 3)))}
    fields |= {name: draw(documents) for name in draw(st.sets(st.sampled_from(["system", "tools", "metadata"])))}
    pairs = [
        f'{draw(spaces)}"{name}"{draw(spaces)}:{draw(spaces)}{fields[name]}{draw(spaces)}'
        for name in draw(st.permutations(sorted(fields)))
    ]
    return f"{draw(spaces)}{{{','.join(pairs)}}}{draw(spaces)}".encode()


@pytest.fixture(scope="module")
def world_in_play() -> Any:
    with lasting(HOSTED) as both:
        yield both


@settings(max_examples=100)
@given(
    body=bodies(), path=st.sampled_from(["/v1/messages", COUNT_TOKENS]), cuts=st.lists(st.integers(1, 200), max_size=4)
)
def test_bodies_go_on_byte_for_byte(
    world_in_play: tuple[World, Play[Any]], body: bytes, path: str, cuts: list[int]
) -> None:
    """However its numbers, keys, spaces and escapes are written, and in whatever pieces it comes."""
    world, play = world_in_play
    pieces = [piece for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), None], strict=True) if (piece := body[a:b])]
    data = request("POST", BASE + path, "transfer-encoding: chunked", body=chunked(*pieces), length=False)

    async def use() -> None:
        world.provider.answers(DONE, path=path)
        got = await exchanged(world, data if cuts else request("POST", BASE + path, body=body))
        sent = world.provider.requests.pop()

        assert 200 == got.status, got.body
        assert body == sent.body
        assert (str(len(body)), None) == (sent.header("content-length"), sent.header("transfer-encoding"))

    play(use())


def gzipped(data: bytes) -> bytes:
    encoder = zlib.compressobj(wbits=31)
    return encoder.compress(data) + encoder.flush()


def brotlied(data: bytes) -> bytes:
    return bytes(importlib.import_module("brotli").compress(data))


def zstandard(data: bytes) -> bytes:
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return bytes(importlib.import_module(name).compress(data))
        except ImportError:
            continue
    pytest.skip("no zstd here")


@pytest.mark.parametrize(
    ("encoding", "encode"),
    [("gzip", gzipped), ("x-gzip", gzipped), ("deflate", zlib.compress), ("br", brotlied), ("zstd", zstandard)],
)
def test_compressed_bodies_go_on_as_they_are(encoding: str, encode: Callable[[bytes], bytes]) -> None:
    """They are read for metering, and passed on with their encoding named."""

    async def use(world: World) -> None:
        world.provider.answers(DONE)
        body = encode(BODY)
        got = await world.post(body, headers={"content-encoding": encoding})
        (sent,) = world.provider.requests

        assert (200, body, encoding) == (got.status, sent.body, sent.header("content-encoding"))
        assert MODEL == (await world.entry()).attributes["model"]

    run(use, HOSTED)


# ── Headers ───────────────────────────────────────────────────────────────────────────────────────────────────────────

HOSTILE = (
    "authorization: Bearer sk-mine",
    "connection: keep-alive, x-secret, anthropic-hop",
    "x-secret: 1",
    "anthropic-hop: 1",
    "keep-alive: timeout=5",
    "te: trailers",
    "trailer: x-checksum",
    "upgrade: h2c",
    "proxy-authorization: Basic eA==",
    "proxy-connection: keep-alive",
    "expect: 100-continue",
    "cookie: session=1",
    "forwarded: for=1.2.3.4;host=evil.example",
    "x-forwarded-for: 1.2.3.4",
    "x-forwarded-host: evil.example",
    "x-forwarded-proto: https",
    "x-original-url: /admin",
    "x-rewrite-url: /admin",
    "x-http-method-override: DELETE",
    "x-real-ip: 1.2.3.4",
    "via: 1.1 evil",
    "range: bytes=0-1",
    "if-none-match: *",
    "accept-encoding: gzip, br",
    "origin: http://evil.example",
    "referer: http://evil.example",
    "x-claude-code-session-id: s-1",
    "x-tenant: globex",
)


def test_what_reaches_the_provider() -> None:
    """What concerns it, its own key, and nothing of who called, from where or how."""
    kept = {
        "anthropic-version": "2026-10-21",
        "anthropic-beta": "a-1,b-2",
        "anthropic-dangerous-direct-browser-access": "true",
        "anthropic-future": "x",
        "x-stainless-retry-count": "0",
        "x-app": "cli",
        "user-agent": "claude-cli/2.1.330 (external, sdk-cli)",
        "accept": "application/json",
        "content-type": "application/json",
    }

    async def use(world: World) -> None:
        lines = [f"{name}: {value}" for name, value in kept.items()]
        got = await exchanged(world, request("POST", MESSAGES, *lines, *HOSTILE))
        assert 100 == got.status
        (sent,) = [await world.provider.arrived()]
        told = {name.lower(): value for name, value in sent.headers}

        assert len(told) == len(sent.headers)
        assert kept == {name: value for name, value in told.items() if name in kept}
        assert {"host", "content-length", "x-api-key", "accept-encoding"} == set(told) - set(kept)
        assert world.provider.url == f"http://{told['host']}"
        assert ("identity", "sk-ant-hosted-0001") == (told["accept-encoding"], told["x-api-key"])

    run(use, HOSTED)


def test_a_version_is_named_where_the_client_names_none() -> None:
    async def use(world: World) -> None:
        await world.post()
        assert "2023-06-01" == world.provider.requests[0].header("anthropic-version")

    run(use, HOSTED)


def test_betas_that_are_not_allowed_are_dropped_and_noted() -> None:
    """As Buildkite's gateway does; by default all pass."""

    async def use(world: World) -> None:
        await world.post(headers={"anthropic-beta": "context-management-2025-06-27,claude-code-20250219"})
        assert "context-management-2025-06-27" == world.provider.requests[0].header("anthropic-beta")
        assert "claude-code-20250219" == (await world.entry()).facts["betas_dropped"]

    run(use, HOSTED, betas=["context-management-2025-06-27"])


def test_the_session_is_noted_and_kept_here() -> None:
    """For attribution; a header that cannot be a fact must not fail the call."""

    async def use(world: World) -> None:
        told = {"x-claude-code-session-id": "s-1", "x-claude-code-agent-id": "sk-ant-0", "x-team": "ü" * 200}
        assert 200 == (await world.post(headers=told)).status
        entry = await world.entry()
        assert ("s-1", None, None) == tuple(entry.attributes.get(name) for name in ("session", "agent", "team"))
        assert not [name for name, _ in world.provider.requests[0].headers if "claude-code" in name.lower()]

    attributes = {"session": "X-Claude-Code-Session-Id", "agent": "x-claude-code-agent-id", "team": "x-team"}
    run(use, HOSTED, attributes=attributes)


def test_claude_codes_session_and_agents_are_noted_by_default() -> None:
    """Whose agent it was that used so much, and which one had begun it."""

    async def use(world: World) -> None:
        told = {"session-id": "s-1", "agent-id": "a-2", "parent-agent-id": "a-1"}
        await world.post(headers={f"x-claude-code-{name}": value for name, value in told.items()})
        await world.post()
        first, second = sorted(await world.entries(), key=lambda entry: entry.n)
        assert {"session": "s-1", "agent": "a-2", "parent_agent": "a-1"}.items() <= first.attributes.items()
        assert {"key", "model", "provider"} == set(second.attributes)

    run(use, HOSTED)


# ── Paths ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("query", ["", "?beta=true", '?a=%zz&b=[]{}|^`"<>\\', "??x=1?", "?a=" + "b" * 9000])
def test_queries_pass_as_they_are(query: str) -> None:
    """They make no difference to where a request goes."""

    async def use(world: World) -> None:
        for method, path in [("POST", "/v1/messages"), ("POST", COUNT_TOKENS), ("GET", f"{MODELS}/{MODEL}")]:
            world.provider.answers(DONE, path=path)
            data = request(method, f"{BASE}{path}{query}", body=BODY if method == "POST" else b"")
            assert 200 == (await exchanged(world, data)).status
            assert path + query == world.provider.requests[-1].target

    run(use, HOSTED)


def test_a_fragment_is_not_for_anybody() -> None:
    async def use(world: World) -> None:
        assert 200 == (await exchanged(world, request("POST", f"{MESSAGES}?beta=true#/../admin?x"))).status
        assert "/v1/messages?beta=true" == world.provider.requests[0].target

    run(use, HOSTED)


NOWHERE = (
    "/",
    BASE,
    f"{BASE}/",
    f"{BASE}/v1",
    f"{BASE}/v1/messages/",
    f"{BASE}//v1/messages",
    f"/{MESSAGES}",
    f"{BASE}x/v1/messages",
    "/v1/messages",
    f"{BASE}/v1/./messages",
    f"{BASE}/v1/x/../messages",
    f"{BASE}/v1%2fmessages",
    f"{BASE}/v1/messages%00",
    f"{BASE}/v1/messages%23",
    f"{BASE}/V1/messages",
    f"{BASE}/v1/messages;x=1",
    f"{BASE}/v1/messages/batches",
    f"{BASE}/v1/messages/count_tokens/x",
    f"{BASE}/v1/organizations/usage_report/messages",
    f"{BASE}/v1/files",
    f"{BASE}/v1/models/",
    f"{BASE}/v1/models/.",
    f"{BASE}/v1/models/..",
    f"{BASE}/v1/models/a/b",
    f"{BASE}/v1/models/a%2fb",
    f"{BASE}/v1/models/..%2f..%2fadmin",
    f"{BASE}/v1/models/%2e%2e",
    f"{BASE}/v1/models/a%00",
    f"{BASE}/v1/models/{'m' * 257}",
    f"{BASE}/v1/complete",
    f"{BASE}/healthz",
    "http://evil.example/v1/messages",
    f"http://evil.example{MESSAGES}",
    f"https://user@evil.example:1{MESSAGES}",
    "*",
)


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_unknown_paths_are_nowhere(method: str) -> None:
    """A JSON 404 from here, and never a redirect: clients would drop their credential, or give it to others."""

    async def use(world: World) -> None:
        for target in NOWHERE:
            if target != "*" or method == "OPTIONS":
                got = await exchanged(world, request(method, target))
                assert (404, "not_found_error") == shape(got), target
                assert "location" not in got.headers
        assert [] == world.provider.requests

    run(use, HOSTED, limits=LIMITS)


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "CONNECT", "PROPFIND"])
def test_each_path_takes_one_method(method: str) -> None:
    """Which one is told."""

    async def use(world: World) -> None:
        for path, expected in [
            ("/v1/messages", "POST"),
            (COUNT_TOKENS, "POST"),
            (MODELS, "GET"),
            (f"{MODELS}/m", "GET"),
        ]:
            if method != expected:
                got = await exchanged(world, request(method, BASE + path, body=b""), method)
                assert (405, expected) == (got.status, got.headers["allow"])
                assert method == "HEAD" or (405, "invalid_request_error") == shape(got)
        assert [] == world.provider.requests

    run(use, HOSTED)


def test_a_tunnel_is_not_made() -> None:
    async def use(world: World) -> None:
        assert (404, "not_found_error") == shape(
            await exchanged(world, request("CONNECT", "evil.example:443", body=b""))
        )

    run(use, HOSTED)


def test_the_host_header_decides_nothing() -> None:
    """Calls go where the settings say."""

    async def use(world: World) -> None:
        data = request().replace(b"host: gateway", b"host: evil.example:1@127.0.0.1")
        assert 200 == (await exchanged(world, data)).status
        assert world.provider.url.removeprefix("http://") == world.provider.requests[0].header("host")

    run(use, HOSTED)


@pytest.mark.parametrize("base_path", ["", "/x", "/v3/ai/anthropic"])
def test_the_base_path_is_taken_off(base_path: str) -> None:
    async def use(world: World) -> None:
        got = await world.post(path="/v1/messages?beta=true")
        assert (200, "/v1/messages?beta=true") == (got.status, world.provider.requests[0].target)
        assert 200 == (await world.get("", method="HEAD", key=None)).status

    run(use, HOSTED, base_path=base_path)


def test_the_providers_base_path_is_put_on() -> None:
    async def main() -> None:
        async with Provider() as provider:

            async def use(world: World) -> None:
                assert 200 == (await world.post()).status
                assert ["/proxy/a/v1/messages"] == [each.target for each in provider.requests]

            from tests.gateway.world import a_world

            async with a_world(HOSTED, upstream=f"{provider.url}/proxy/a/") as world:
                await use(world)

    asyncio.run(main())


# ── What comes back ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", sorted(ERROR_TYPES))
@pytest.mark.parametrize("stream", [False, True])
def test_the_providers_errors_pass_unmodified(status: int, stream: bool) -> None:
    """Clients match their wording. They are told apart from ours in the ledger, and nothing is charged for them."""
    answer = error(
        status, "prompt is too long: 210000 tokens > 200000 maximum", retry_after=7, headers={"x-should-retry": "true"}
    )

    async def use(world: World) -> None:
        world.provider.answers(answer)
        got = await world.post(stream=stream)
        entry = await world.entry()

        assert (status, answer.body()) == (got.status, got.body)
        assert ("7", "true", "req_test_error") == tuple(
            got.headers[name] for name in ("retry-after", "x-should-retry", "request-id")
        )
        assert "application/json" == got.headers["content-type"]
        assert ("settled", "refused", str(status)) == (entry.kind, entry.facts["end"], entry.facts["status"])
        assert "req_test_error" == entry.facts["request_id"]
        assert 0 == entry.usage["input_tokens"] == entry.usage["output_tokens"]

    run(use, HOSTED, limits=LIMITS)


@pytest.mark.parametrize("own", [True, False])
def test_a_429_of_the_provider_is_not_ours(own: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours is logged as a denial and has no entry; the provider's has one. Both tell the tenant's own numbers."""
    limits = (Limit(name="rpm", quota=0 if own else 5, window="1m"),)

    async def use(world: World) -> None:
        world.provider.answers(error(429, retry_after=9))
        got = await world.post()
        await world.settled()

        assert (429, "rate_limit_error") == got.error
        assert "0" if own else "5" == got.headers["anthropic-ratelimit-requests-limit"]
        assert "anthropic-ratelimit-output-tokens-limit" not in got.headers
        assert ([] if own else ["429"]) == [entry.facts["status"] for entry in await world.entries()]

    run(use, HOSTED, limits=limits)
    assert own == ("call.denied" in capsys.readouterr().err)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("path", ["/v1/messages", COUNT_TOKENS, MODELS])
def test_no_redirect_is_followed_or_passed_on(status: int, path: str) -> None:
    """It could lead anywhere, with the key."""

    async def use(world: World) -> None:
        world.provider.answers(redirect(f"{world.provider.url}/v1/elsewhere", status), path=path)
        got = await (world.get(path) if path == MODELS else world.post(path=path))

        assert (502, "api_error") == shape(got)
        assert "location" not in got.headers
        assert 1 == len(world.provider.requests)

    run(use, HOSTED)


def test_headers_of_the_provider_are_chosen() -> None:
    """No cookie, no hop, no number of the shared key or name of its account; what clients need of it passes."""
    sent = {
        "set-cookie": "a=b",
        "location": "http://evil.example",
        "connection": "keep-alive, anthropic-hop",
        "anthropic-hop": "1",
        "server": "provider",
        "via": "1.1 cloudflare",
        "cf-ray": "1",
        "strict-transport-security": "max-age=1",
        "access-control-allow-origin": "*",
        "www-authenticate": "Bearer",
        "anthropic-priority-input-tokens-remaining": "1",
        "anthropic-fast-output-tokens-limit": "1",
        "ratelimit": '"x";r=1',
        "anthropic-odd": "\xe9\x80",
        "retry-after": "3",
        "anthropic-future": "yes",
        "content-type": "application/json; charset=utf-8",
    }

    async def use(world: World) -> None:
        world.provider.answers(Answer(headers=sent, json={}))
        got = await exchanged(world, request())

        told = {name: value for name, value in got.headers.items() if "ratelimit" not in name}
        assert ("3", "yes", sent["content-type"]) == tuple(
            told.pop(name) for name in ("retry-after", "anthropic-future", "content-type")
        )
        assert "meterlib" == told.pop("server")
        assert {"request-id", "content-length", "date"} == set(told)
        families = names(list(got.headers.items())) - set(told)
        assert not [name for name in families if "output" in name]

    run(use, HOSTED, limits=LIMITS)


@pytest.mark.parametrize("size", [60_000, 70_000, 500_000])
def test_a_huge_head_of_the_provider_is_no_trouble_of_ours(size: int) -> None:
    """It passes or it is no answer; never an error of the gateway."""

    async def use(world: World) -> None:
        world.provider.answers_always(Answer(headers={"anthropic-huge": "x" * size}, json={}))
        got = await exchanged(world, request())
        assert got.status == 200 or (502, "api_error") == shape(got)
        assert (200, [], 1) == (
            (await world.get(f"{MODELS}/{MODEL}")).status,
            [each for each in await world.entries() if each.kind != "settled"],
            len(await world.entries()),
        )

    run(use, HOSTED)


# ── Ids ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("answer", "minted"),
    [
        (Answer(json={}), False),
        (Answer(json={}, without=["request-id"]), True),
        (Answer(json={}, headers={"request-id": "x" * 300}), True),
        (error(529), False),
        (html(200), True),
        (Answer(instead="rst"), True),
        (redirect("/x"), True),
    ],
)
def test_the_client_and_the_ledger_have_the_same_id(answer: Answer, minted: bool) -> None:
    """The provider's, or else one of ours."""

    async def use(world: World) -> None:
        world.provider.answers(answer)
        got = await world.post()
        entry = await world.entry()
        told = got.headers["request-id"]

        assert told == entry.facts["request_id"] or answer.status == 307
        assert bool(re.fullmatch(r"req_[0-9a-f]{24}", told)) == minted
        if got.status in (502, 529):
            assert told == got.json["request_id"]

    run(use, HOSTED)


def test_every_answer_has_an_id() -> None:
    """Also those that the provider knows nothing of."""

    async def use(world: World) -> None:
        got = [
            await world.post(),
            await world.post(stream=True),
            await world.post(b"{"),
            await world.post(key="ml_x"),
            await world.post(path=COUNT_TOKENS),
            await world.get(MODELS),
            await world.get(f"{MODELS}/{MODEL}"),
            await world.get("/nowhere"),
            await world.get("", method="HEAD"),
            await world.get("/v1/messages"),
            await exchanged(world, b"nonsense\r\n\r\n"),
            await exchanged(world, request("GET", "/healthz", body=b"", key=TOKEN)),
        ]
        assert len(got) == len({each.headers["request-id"] for each in got})

    run(use, HOSTED)
