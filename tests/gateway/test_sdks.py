"""The `anthropic` package works through the gateway unchanged, and the ledger has what it told its caller.

It runs in a process of its own, as in a developer's application. The version that is installed here runs always; those
that a soak installs differ in how they show the key, in the API's version, and in what they do with a stream.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="needs meterlib[gateway]")

from meterlib import LedgerEntry, Limit
from meterlib.core.ledger import counts_of
from meterlib.gateway.sse import usage_of
from tests.gateway.answers import PATIENCE_S, STREAMS, TEXT, Answer, Hold, error, failing, message
from tests.gateway.world import HOSTED, LIMITS, PROVIDER_KEY, TOKEN, World, run, with_settings

VERSIONS = ("0.125.0", "1.17.0", "2.12.0")
CLIENT = Path(__file__).with_name("sdk_client.py")
MESSAGES = ("create", "stream", "stream_raw", "beta_create", "beta_stream")


class Sdk:
    """A process with some version of the package; it takes a second to import, so all tests share it."""

    def __init__(self, python: str) -> None:
        self._python = python
        self._process: subprocess.Popen[str] | None = None

    async def plays(self, world: World, *scenarios: str, key: str = TOKEN, **options: Any) -> list[dict[str, Any]]:
        """What it told of each scenario."""
        arguments = [world.url, key, ",".join(scenarios), json.dumps(options)]
        try:
            lines = await asyncio.wait_for(asyncio.to_thread(self._talk, arguments, len(scenarios)), PATIENCE_S)
        except BaseException:
            self.close()  # which also ends the thread
            raise
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _talk(self, arguments: list[str], answers: int) -> list[str]:
        process = self._process = self._process or self._start()
        assert process.stdin
        assert process.stdout
        process.stdin.write(json.dumps(arguments) + "\n")
        process.stdin.flush()
        return [process.stdout.readline() for _ in range(answers)]

    def _start(self) -> subprocess.Popen[str]:
        # Without -P, our own files could be taken for modules of the package.
        command = [self._python, "-P", str(CLIENT)]
        environment = {"PATH": os.environ["PATH"], "PYTHONUTF8": "1"}
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture(
    scope="module", params=["installed", *(pytest.param(version, marks=pytest.mark.soak) for version in VERSIONS)]
)
def sdk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sdk]:
    if request.param == "installed":
        if importlib.util.find_spec("anthropic") is None:
            pytest.skip("needs anthropic, of meterlib[test]")
        python = sys.executable
    else:
        python = installed(request.param, tmp_path_factory.mktemp("sdk"))
    with closing(Sdk(python)) as sdk:
        yield sdk


def installed(version: str, folder: Path) -> str:
    """A Python of its own with this version of the package, if it can be had."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--retries", "1", f"anthropic=={version}"]
    installing = subprocess.run(pip, capture_output=True, text=True, check=False)
    if installing.returncode:
        pytest.skip(f"anthropic {version} cannot be installed: {installing.stderr[-300:]}")
    return python


async def entries(world: World) -> list[LedgerEntry]:
    """All of the ledger, oldest first, as soon as nothing is under way."""
    await world.settled()
    return sorted(await world.entries(), key=lambda entry: entry.n)


def counts(usage: dict[str, Any]) -> dict[str, Any]:
    """A usage as the ledger has it, out of one as the API has it."""
    return counts_of(usage_of(json.dumps({"usage": usage}).encode()))


def in_any_order(usages: list[dict[str, Any]]) -> list[str]:
    return sorted(json.dumps(usage, sort_keys=True) for usage in usages)


# ── Usage ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_both_sides_see_the_same_usage(sdk: Sdk) -> None:
    """Field by field, whichever way a message is asked for; and the provider sees its own key and the client's rest."""

    async def use(world: World) -> None:
        told = await sdk.plays(world, *MESSAGES)
        booked = await entries(world)

        assert [each["usage"] for each in told] == [entry.usage for entry in booked]
        assert [request.usage for request in world.provider.requests] == [entry.usage for entry in booked]
        assert {"final"} == {entry.quality for entry in booked}
        assert {(TEXT, "end_turn")} == {(each["text"], each["stop_reason"]) for each in told}
        for each, entry, request in zip(told, booked, world.provider.requests, strict=True):
            assert each.get("request_id") in (entry.facts["request_id"], None)
            assert each["api_version"] == request.header("anthropic-version")
            assert (PROVIDER_KEY, None) == (request.header("x-api-key"), request.header("authorization"))
            assert TOKEN not in str(request.headers)

    run(use, HOSTED)


def test_streams_with_a_point(sdk: Sdk) -> None:
    """Server tools, refusals, thinking, several deltas, events nobody knows: the ledger has what the stream told."""

    async def use(world: World) -> None:
        world.provider.answers(*(Answer(events=stream.events) for stream in STREAMS.values()))
        told = await sdk.plays(world, *["stream"] * len(STREAMS))
        for name, each, entry in zip(STREAMS, told, await entries(world), strict=True):
            stream = STREAMS[name]

            assert (stream.text, stream.stop_reason) == (each["text"], each["stop_reason"]), name
            assert counts(stream.usage) == entry.usage, name
            if name != "zeros":  # the package believes the zeros, and some versions leave out what they do not know
                assert entry.usage == {**entry.usage, **counts(each["usage"])}, name

    run(use, HOSTED)


def test_however_the_provider_sends_a_stream(sdk: Sdk) -> None:
    """Text and ledger are exact, however the bytes were cut, ended, framed or compressed."""
    stream = STREAMS["cached"]
    forms: list[dict[str, Any]] = [
        {"cut_every": 1},
        {"cut_every": 7, "line_end": "\r\n"},
        {"cut_every": 7, "line_end": "\r", "space": False, "many_lines": True},
        {"cut_every": 7, "line_end": "\r\n", "encoding": "gzip"},
        {"encoding": "deflate", "framing": "close"},
        {"encoding": "gzip", "negotiated": True, "framing": "length"},
    ]

    async def use(world: World) -> None:
        world.provider.answers(*(Answer(events=stream.events, **form) for form in forms))
        told = await sdk.plays(world, *["stream"] * len(forms))
        for form, each, entry in zip(forms, told, await entries(world), strict=True):
            assert (stream.text, stream.usage) == (each["text"], each["usage"]), form
            assert stream.usage == entry.usage, form

    run(use, HOSTED)


def test_what_costs_nothing_is_not_booked(sdk: Sdk) -> None:
    """Counting tokens and looking at models works, and leaves no entry."""

    async def use(world: World) -> None:
        count, models, model = await sdk.plays(world, "count_tokens", "models_list", "models_get")

        assert len(world.provider.requests[0].body) // 4 + 1 == count["result"]
        assert world.provider.models == models["result"]
        assert "claude-sonnet-4-5" == model["result"]["id"]
        assert [] == await entries(world)

    run(use, HOSTED, limits=LIMITS)


# ── Refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_refusal_of_the_provider_reaches_the_caller(sdk: Sdk) -> None:
    """With its status, its type, its words and its id; nothing is charged."""
    statuses = (400, 401, 403, 404, 413)

    async def use(world: World) -> None:
        world.provider.answers(
            *(error(status, f"words of {status}", request_id=f"req_{status}") for status in statuses)
        )
        told = await sdk.plays(world, *["create"] * len(statuses))
        for status, each, entry in zip(statuses, told, await entries(world), strict=True):
            found = each["error"]

            assert (status, f"req_{status}") == (found["status"], found["request_id"])
            assert f"words of {status}" in found["message"]
            assert error(status).json["error"]["type"] == found["type"]
            assert [0.0] == each["attempts"]
            assert (0, 0) == (entry.usage["input_tokens"], entry.usage["output_tokens"])

    run(use, HOSTED)


def test_a_busy_provider_is_tried_again(sdk: Sdk) -> None:
    """After as long as it said; each attempt has an entry of its own."""

    async def use(world: World) -> None:
        world.provider.answers(error(429, retry_after=1), error(529, headers={"retry-after-ms": "10"}))
        [told] = await sdk.plays(world, "error_429_retry")
        booked = await entries(world)

        assert 3 == len(told["attempts"])
        assert told["attempts"][1] >= 1
        assert ["429", "529", "200"] == [entry.facts["status"] for entry in booked]
        assert told["usage"] == booked[-1].usage

    run(use, HOSTED)


def test_a_refusal_that_says_so_is_not_tried_again(sdk: Sdk) -> None:
    """`x-should-retry` passes through the gateway."""

    async def use(world: World) -> None:
        world.provider.answers(error(429, retry_after=1, headers={"x-should-retry": "false"}))
        [told] = await sdk.plays(world, "should_retry_false")

        assert ("RateLimitError", 1) == (told["error"]["class"], len(told["attempts"]))

    run(use, HOSTED)


def test_a_refusal_of_the_gateway_looks_like_the_providers(sdk: Sdk) -> None:
    """Class, status, type and id are where a caller expects them; the provider hears nothing of it."""

    async def use(world: World) -> None:
        denied, stream = (await sdk.plays(world, "create", "create", "stream", max_retries=0))[1:]
        [unknown] = await sdk.plays(world, "create", key="ml_nobody's")

        for each, kind, status in [
            (denied, ("RateLimitError", "rate_limit_error"), 429),
            (stream, ("RateLimitError", "rate_limit_error"), 429),
            (unknown, ("AuthenticationError", "authentication_error"), 401),
        ]:
            assert (*kind, status) == tuple(each["error"][name] for name in ("class", "type", "status"))
            assert each["error"]["request_id"].startswith("req_")
            assert 1 == len(each["attempts"])
        assert 1 == len(world.provider.requests)

    run(use, with_settings(HOSTED, quotas={"requests": 1}), limits=LIMITS)


@pytest.mark.parametrize("how", ["create", "retrieve", "list"])
def test_batches_are_said_not_to_be_there(sdk: Sdk, how: str) -> None:
    """They would pass by every limit; the package raises what it raises of anything that is not found, at once."""

    async def use(world: World) -> None:
        [told] = await sdk.plays(world, "batches", how=how)

        found = {name: told["error"][name] for name in ("class", "status", "type")}
        assert {"class": "NotFoundError", "status": 404, "type": "not_found_error"} == found
        assert "batches are not served here" in told["error"]["message"]
        assert 1 == len(told["attempts"])
        assert ([], []) == (world.provider.requests, await entries(world))

    run(use, HOSTED, limits=LIMITS)


def test_a_used_up_budget_is_not_asked_again(sdk: Sdk) -> None:
    """The package would sleep until next month, in the middle of somebody's program."""
    budget = Limit(name="calls", quota=1, period="month")

    async def use(world: World) -> None:
        _, told = await sdk.plays(world, "create", "stream")

        assert ("RateLimitError", "billing_error", 429) == tuple(
            told["error"][name] for name in ("class", "type", "status")
        )
        assert "it is renewed at" in told["error"]["message"]
        assert 1 == len(told["attempts"])

    run(use, HOSTED, limits=(budget,))


def test_a_caller_whose_patience_ends_tries_again_and_both_are_booked(sdk: Sdk) -> None:
    """The provider works on both: it is paid for both, and the ledger says that they are tries of the same call."""
    holds = [Hold(), Hold()]

    async def use(world: World) -> None:
        usages = [{"input_tokens": 10 + at, "output_tokens": 20 + at} for at in range(2)]
        world.provider.answers(
            *(Answer(json=message(usage=usage), before_head=[hold]) for usage, hold in zip(usages, holds, strict=True))
        )
        [told] = await sdk.plays(world, "create", timeout_s=0.3, max_retries=1)
        assert ("APITimeoutError", 2) == (told["error"]["class"], len(told["attempts"]))
        while not all(call._exchange.gone for call in world.gateway._calls):
            await asyncio.sleep(0.001)
        world.gateway.tend()
        for hold in holds:
            hold.release()
        first, second = await entries(world)
        assert in_any_order(usages) == in_any_order([dict(first.usage), dict(second.usage)])
        assert {("complete", "gone")} == {(one.facts["end"], one.facts["client"]) for one in (first, second)}
        assert first.facts["prompt"] == second.facts["prompt"]

    run(use, HOSTED)


# ── Streams that end early ────────────────────────────────────────────────────────────────────────────────────────────


def test_no_caller_takes_half_an_answer_for_a_whole_one(sdk: Sdk) -> None:
    """Whatever the provider's stream broke off with, the package raises; what was seen of it is booked."""
    events = STREAMS["cached"].events
    answers = [
        Answer(events=events, breaks_after=1500, breaks="rst"),
        Answer(events=events, breaks_after=1500, breaks="fin"),
        Answer(events=events, breaks_after=1500, breaks="rst", framing="close"),
        Answer(events=events, breaks_after=1500, breaks="fin", framing="close"),
        Answer(events=events[:-2]),
        Answer(events=failing(events, 6)),
    ]

    async def use(world: World) -> None:
        world.provider.answers(*answers)
        told = await sdk.plays(world, *["stream"] * len(answers))
        for answer, each, entry in zip(answers, told, await entries(world), strict=True):
            usage = entry.usage

            assert "error" in each, answer
            assert "partial" == entry.quality, answer
            assert (11, 500, 70_000) == (
                usage["input_tokens"],
                usage["cache_creation_input_tokens"],
                usage["cache_read_input_tokens"],
            )

    run(use, HOSTED)


@pytest.mark.parametrize("on_disconnect", ["drain", "cancel"])
def test_a_caller_that_has_had_enough(sdk: Sdk, on_disconnect: str) -> None:
    """Either the answer is read to its end for the provider's numbers, or it is given up for what was seen of it."""
    stream, hold = STREAMS["cached"], Hold()

    async def use(world: World) -> None:
        world.provider.answers(Answer(events=[*stream.events[:5], hold, *stream.events[5:]]))
        [told] = await sdk.plays(world, "break_midway")
        world.gateway.tend()
        if on_disconnect == "drain":
            hold.release()
        [entry] = await entries(world)

        assert stream.text.startswith(told["text"])
        if on_disconnect == "drain":
            assert (stream.usage, "final") == (entry.usage, "final")
            assert world.provider.requests[0].hung_up is None
        else:
            await world.provider.requests[0].over()

            assert (11, "partial") == (entry.usage["input_tokens"], entry.quality)
            assert world.provider.requests[0].hung_up is not None
        assert 0 == await world.open_reservations()

    run(use, HOSTED, on_disconnect=on_disconnect)


def test_many_calls_at_once(sdk: Sdk) -> None:
    """Fifty, every other one streamed: each is booked once, and nothing stays held."""

    async def use(world: World) -> None:
        [told] = await sdk.plays(world, "concurrent", calls=50)
        booked = await entries(world)

        assert 50 == len(booked)
        assert in_any_order(told["result"]) == in_any_order([dict(entry.usage) for entry in booked])
        assert 0 == await world.open_reservations()

    run(use, HOSTED, limits=LIMITS)
