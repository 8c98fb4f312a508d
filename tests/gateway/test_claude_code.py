"""Claude Code works through the gateway unchanged, and the ledger has what it says it used.

It is installed by npm and run without a network; see claude_code.py. A soak, since that takes 400 MB and a minute.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import structlog

pytest.importorskip("aiohttp", reason="needs meterlib[gateway]")

from meterlib import LedgerEntry, Limit
from tests.gateway.answers import STREAMS, TEXT, Answer, Hold, error, failing, html, paced
from tests.gateway.claude_code import Run, Tunnel, Unavailable, installed
from tests.gateway.provider import COUNT_TOKENS, Request, Script, usual
from tests.gateway.world import HOSTED, LIMITS, PROVIDER_KEY, TOKEN, World, a_world, with_settings

pytestmark = pytest.mark.soak

SAY_HI = ("-p", "say hi", "--output-format", "json")
STREAM = STREAMS["cached"]


@pytest.fixture(scope="module")
def claude(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("claude-code")
    try:
        yield asyncio.run(installed(folder))
    except Unavailable as reason:
        pytest.skip(str(reason))


class Session(NamedTuple):
    """A world, and a Claude Code that knows nothing else."""

    world: World
    tunnel: Tunnel
    claude: Path

    async def run(self, *arguments: str, **options: Any) -> Run:
        """With the tenant's token, unless the environment says otherwise; say hi, unless told otherwise."""
        run = await self.ends(*arguments, **options)
        await self.world.settled()
        return run

    async def ends(self, *arguments: str, **options: Any) -> Run:
        """The same, but its calls may still be under way."""
        environment = {"ANTHROPIC_API_KEY": TOKEN} | options.pop("environment", {})
        return await self.tunnel.run(self.claude, *(arguments or SAY_HI), environment=environment, **options)

    async def entries(self) -> list[LedgerEntry]:
        return sorted(await self.world.entries(), key=lambda entry: entry.n)


@asynccontextmanager
async def session(claude: Path, folder: Path, *scripts: Script, **settings: Any) -> AsyncIterator[Session]:
    tenant = with_settings(HOSTED, quotas=settings.pop("quotas", {}))
    async with a_world(tenant, **settings) as world, Tunnel(folder, world.url) as tunnel:
        world.provider.answers(*scripts)
        yield Session(world, tunnel, claude)


def used(entries: list[LedgerEntry]) -> dict[str, int]:
    """Sums of the input side, by Claude Code's names."""
    names = {
        "inputTokens": "input_tokens",
        "cacheReadInputTokens": "cache_read_input_tokens",
        "cacheCreationInputTokens": "cache_creation_input_tokens",
    }
    usages: list[dict[str, Any]] = [dict(entry.usage) for entry in entries]
    return {shown: sum(usage[name] for usage in usages) for shown, name in names.items()}


def told(run: Run) -> dict[str, int]:
    """The same, as Claude Code counted it."""
    [model] = run.json()["modelUsage"].values()
    return {name: model[name] for name in ("inputTokens", "cacheReadInputTokens", "cacheCreationInputTokens")}


# ── One call ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_say_hi(claude: Path, tmp_path: Path) -> None:
    """It answers; both sides counted the same; the provider saw the request as it was, without the tenant's token."""

    async def main() -> None:
        async with session(claude, tmp_path) as here:
            run = await here.run()
            [entry], [request] = await here.entries(), here.world.provider.requests
            shown = run.json()

            assert (0, TEXT) == (run.code, shown["result"]), run
            assert used([entry]) == told(run)
            assert entry.usage["output_tokens"] == shown["usage"]["output_tokens"]
            assert entry.usage["cache_creation"] == shown["usage"]["cache_creation"]
            assert shown["session_id"] == entry.attributes["session"]
            assert "/v1/messages?beta=true" == request.target
            assert "2023-06-01" == request.header("anthropic-version")
            assert "claude-code-20250219" in (request.header("anthropic-beta") or "")
            assert (PROVIDER_KEY, None) == (request.header("x-api-key"), request.header("authorization"))
            assert TOKEN not in str(request.headers)
            assert request.body.startswith(b'{"model":"')

    asyncio.run(main())


@pytest.mark.parametrize(
    ("environment", "settings"),
    [
        ({"ANTHROPIC_API_KEY": TOKEN}, None),
        ({"ANTHROPIC_API_KEY": None, "ANTHROPIC_AUTH_TOKEN": TOKEN}, None),
        ({"ANTHROPIC_API_KEY": TOKEN, "ANTHROPIC_AUTH_TOKEN": "another"}, None),
        ({"ANTHROPIC_API_KEY": "another", "ANTHROPIC_AUTH_TOKEN": TOKEN}, None),
        ({"ANTHROPIC_API_KEY": None}, {"apiKeyHelper": f"echo {TOKEN}"}),
    ],
    ids=["key", "token", "key and another token", "another key and token", "helper"],
)
def test_every_way_to_show_a_token(claude: Path, tmp_path: Path, environment: Any, settings: Any) -> None:
    """The right tenant is charged, whichever headers it comes in."""

    async def main() -> None:
        async with session(claude, tmp_path) as here:
            run = await here.run(environment=environment, settings=settings)

            assert 0 == run.code, run
            assert ["acme"] == [entry.tenant for entry in await here.entries()]

    asyncio.run(main())


def test_nothing_is_held_back(claude: Path, tmp_path: Path) -> None:
    """It sees the first words long before the last."""

    async def main() -> None:
        async with session(claude, tmp_path, Answer(events=paced(STREAM.events, 0.2))) as here:
            shown = (await here.run()).json()

            assert STREAM.text == shown["result"]
            assert shown["first_content_frame_ms"] - shown["time_to_request_ms"] < shown["duration_api_ms"] / 2

    asyncio.run(main())


@pytest.mark.parametrize("name", STREAMS)
def test_streams_with_a_point(claude: Path, tmp_path: Path, name: str) -> None:
    """Server tools, thinking, compaction and the rest: the text arrives, and the ledger has what the stream told."""
    stream = STREAMS[name]

    async def main() -> None:
        async with session(claude, tmp_path, Answer(events=stream.events)) as here:
            run = await here.run()
            entries = await here.entries()
            counts = {count: value for count, value in stream.usage.items() if isinstance(value, int)}

            assert (0, TEXT) == (run.code, run.json()["result"])  # a refused call is made again
            assert counts == {count: entries[0].usage[count] for count in counts}
            if name != "refusal":
                assert 1 == len(entries)

    asyncio.run(main())


def test_counting_and_discovery_cost_nothing(claude: Path, tmp_path: Path) -> None:
    """`/context` counts tokens some 25 times at once; the models are listed and the gateway is probed before a call."""
    discovers = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": None, "CLAUDE_CODE_ENABLE_GATEWAY_MODEL_DISCOVERY": "1"}

    async def main() -> None:
        async with session(claude, tmp_path, limits=LIMITS, quotas={"requests": 1}) as here:
            run = await here.run("-p", "/context")
            paths = [request.path for request in here.world.provider.requests]

            assert (0, {COUNT_TOKENS}) == (run.code, set(paths)), run
            assert len(paths) >= 20
            assert [] == await here.entries()

            run = await here.run(environment=discovers)
            targets = [request.target for request in here.world.provider.requests[len(paths) :]]

            assert 0 == run.code, run
            assert ["/v1/models?limit=1000", "/v1/messages?beta=true"] == targets
            assert 1 == len(await here.entries())

    asyncio.run(main())


# ── Refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("refusal", "attempts", "words"),
    [
        (error(400, "prompt is too long: 210000 tokens > 200000 maximum"), 1, "Prompt is too long"),
        (error(401, "some words"), 2, "some words"),
        (error(402, "some words"), 1, "some words"),
        (error(403, "some words"), 1, "some words"),
        (error(404, "some words"), 2, "selected model"),
        (error(413, "some words"), 1, "too large"),
        (error(429, "some words", retry_after=61), 1, "some words"),
        (error(500, "some words"), 2, "some words"),
        (error(529, "some words"), 2, "some words"),
        (html(), 2, "body is an HTML page"),
    ],
    ids=lambda value: str(value.status) if isinstance(value, Answer) else None,
)
def test_refusals_of_the_provider(claude: Path, tmp_path: Path, refusal: Answer, attempts: int, words: str) -> None:
    """They reach it as they are, so it does what it would do without a gateway; nothing is charged for them."""

    async def main() -> None:
        async with session(claude, tmp_path, *[refusal] * 9) as here:
            run = await here.run(environment={"CLAUDE_CODE_MAX_RETRIES": "1"})
            entries = await here.entries()

            assert 1 == run.code
            assert words in run.json()["result"]
            assert attempts == len(entries) == len(here.world.provider.requests)
            assert {str(refusal.status)} == {entry.facts["status"] for entry in entries}
            if refusal.status >= 400:
                assert {"inputTokens": 0, "cacheReadInputTokens": 0, "cacheCreationInputTokens": 0} == used(entries)

    asyncio.run(main())


def test_it_waits_for_a_window_and_goes_on(claude: Path, tmp_path: Path) -> None:
    """Refused by the gateway, it comes back by itself once it is told to."""
    limit = Limit(name="requests", quota=1, window="2s")

    async def main() -> None:
        with structlog.testing.capture_logs() as logged:
            async with session(claude, tmp_path, limits=(limit,)) as here:
                await here.world.post()
                running = asyncio.create_task(here.run())
                while not any(event["event"] == "call.denied" for event in logged):
                    await asyncio.sleep(0.01)
                here.world.advance(ms=3000)
                run = await running

                assert ["call.denied"] == [event["event"] for event in logged]
                assert (0, TEXT) == (run.code, run.json()["result"])
                assert run.elapsed_s > 2
                assert used((await here.entries())[1:]) == told(run)

    asyncio.run(main())


def test_it_does_not_wait_for_next_month(claude: Path, tmp_path: Path) -> None:
    """Out of budget, it says so at once, in the gateway's words."""
    limit = Limit(name="budget", quota=1, period="month")

    async def main() -> None:
        with structlog.testing.capture_logs() as logged:
            async with session(claude, tmp_path, limits=(limit,)) as here:
                await here.world.post()
                run = await here.run()

                assert 1 == run.code
                assert run.json()["result"].startswith("API Error: Request rejected (429) · budget: ")
                assert ["call.denied"] == [event["event"] for event in logged]
                assert 1 == len(here.world.provider.requests)

    asyncio.run(main())


# ── Streams that end early ────────────────────────────────────────────────────────────────────────────────────────────


# Bytes that come together with the break may be lost on it; what it has seen, it counts.
SLOW = paced(STREAM.events, 0.1)


@pytest.mark.parametrize(
    "broken",
    [
        Answer(events=SLOW, breaks_after=1500),
        Answer(events=SLOW, breaks_after=1500, breaks="fin"),
        Answer(events=SLOW, breaks_after=1500, breaks="fin", framing="close"),
        Answer(events=SLOW[:-4]),
    ],
    ids=["reset", "closed", "ended", "short"],
)
def test_a_stream_that_breaks_off_once(claude: Path, tmp_path: Path, broken: Answer) -> None:
    """It notices and tries again; both attempts are booked, and both sides counted the same input."""

    async def main() -> None:
        async with session(claude, tmp_path, broken) as here:
            run = await here.run()
            entries = await here.entries()

            assert (0, TEXT) == (run.code, run.json()["result"])
            assert ["partial", "final"] == [entry.quality for entry in entries]
            assert used(entries) == told(run)

    asyncio.run(main())


@pytest.mark.parametrize(
    "broken",
    [Answer(events=STREAM.events, breaks_after=1500), Answer(events=failing(STREAM.events, 5))],
    ids=["reset", "error"],
)
def test_streams_that_never_work(claude: Path, tmp_path: Path, broken: Answer) -> None:
    """It gives up streaming, and has its answer in one piece; every attempt is booked once."""

    def only_in_one_piece(request: Request) -> Answer:
        return broken if request.json()["stream"] else usual(request)

    async def main() -> None:
        async with session(claude, tmp_path) as here:
            here.world.provider.answers_always(only_in_one_piece)
            run = await here.run()
            entries = await here.entries()
            qualities = [entry.quality for entry in entries]

            assert (0, TEXT) == (run.code, run.json()["result"])
            assert [*["partial"] * (len(qualities) - 1), "final"] == qualities
            assert len(here.world.provider.requests) == len(entries) >= 2
            assert 1 == len({entry.facts["prompt"] for entry in entries})
            assert [*["true"] * (len(entries) - 1), "false"] == [entry.facts["stream"] for entry in entries]
            assert 0 == await here.world.open_reservations()

    asyncio.run(main())


@pytest.mark.parametrize("on_disconnect", ["drain", "cancel"])
def test_control_c(claude: Path, tmp_path: Path, on_disconnect: str) -> None:
    """A call whose user has had enough is booked once: with the provider's numbers, or with what was seen of it."""
    hold = Hold()
    answer = Answer(events=[*STREAM.events[:5], hold, *STREAM.events[5:]])

    async def main() -> None:
        async with session(claude, tmp_path, answer, on_disconnect=on_disconnect) as here:
            run = await here.ends(interrupt=hold.reached())
            here.world.gateway.tend()
            if on_disconnect == "drain":
                hold.release()
            request = here.world.provider.requests[0]
            await request.over()
            await here.world.settled()
            [entry] = await here.entries()

            assert TEXT not in run.out
            assert 11 == entry.usage["input_tokens"]
            assert (on_disconnect == "cancel") == (request.hung_up is not None)
            if on_disconnect == "drain":
                assert ("final", STREAM.usage["output_tokens"]) == (entry.quality, entry.usage["output_tokens"])
            else:
                assert "partial" == entry.quality
            assert 0 == await here.world.open_reservations()

    asyncio.run(main())
