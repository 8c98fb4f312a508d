"""Tries of the same call can be told from the ledger, by a digest of the prompt that gives nothing else away."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="needs meterlib[gateway]")

from meterlib.cli import main
from meterlib.gateway.tokens import hash_of
from meterlib.settings import TenantSettings
from tests.gateway.answers import STREAMS, Answer, error
from tests.gateway.world import HOSTED, TOKEN, World, a_world, message, run, with_settings

OTHER_TOKEN = "ml_another-token-of-acme"
TWO = with_settings(HOSTED, tokens=[hash_of(TOKEN), hash_of(OTHER_TOKEN)])
GLOBEX = TenantSettings(name="globex", tokens=[hash_of("ml_a-token-of-globex")])
PROMPT = message(
    "Hello, Claude",
    system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    tools=[{"name": "look", "description": "looks", "input_schema": {"type": "object"}}],
)


async def prompts(world: World) -> list[str]:
    """The digest that each entry has, in the order of the calls."""
    await world.settled()
    return [entry.facts["prompt"] for entry in sorted(await world.entries(), key=lambda entry: (entry.shard, entry.n))]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stream": True},
        {"max_tokens": 1},
        {"model": "claude-haiku-4-5"},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"metadata": {"user_id": "somebody"}},
        {"system": [{"type": "text", "text": "Be brief."}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello, Claude"}]}]},
    ],
    ids=str,
)
def test_whoever_tries_again_sends_the_same_prompt(changes: Mapping[str, Any]) -> None:
    """With what other settings ever, in one piece or as a stream; headers that count tries are not to be relied on."""

    async def use(world: World) -> None:
        await world.post(PROMPT)
        await world.post(PROMPT | dict(changes))
        first, second = await prompts(world)
        assert first == second
        assert 16 == len(first)
        entries = sorted(await world.entries(), key=lambda entry: entry.n)
        assert ["false", "true" if changes.get("stream") else "false"] == [one.facts["stream"] for one in entries]

    run(use, HOSTED)


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": [{"role": "user", "content": "Hello, Claude!"}]},
        {"messages": [{"role": "assistant", "content": "Hello, Claude"}]},
        {"messages": [*PROMPT["messages"], {"role": "assistant", "content": ""}]},
        {"system": "Be brief!"},
        {"system": None},
        {"tools": []},
    ],
    ids=str,
)
def test_another_prompt_is_another_call(changes: Mapping[str, Any]) -> None:
    async def use(world: World) -> None:
        told = {name: value for name, value in (PROMPT | dict(changes)).items() if value is not None}
        await world.post(PROMPT)
        await world.post(told)
        assert 2 == len(set(await prompts(world)))

    run(use, HOSTED)


def test_nobody_can_tell_a_prompt_by_trying() -> None:
    """Each credential has digests of its own, and they are none of the content alone, or of what settings hold."""
    keys = [TOKEN, OTHER_TOKEN, "ml_a-token-of-globex", "sk-ant-mine"]

    async def use(world: World) -> None:
        for key in keys:
            await world.post(PROMPT, key=key)
        found = set(await prompts(world))
        assert len(keys) == len(found)
        raw = json.dumps(PROMPT).encode()
        for known in (b"", *(hash_of(one).encode() for one in keys)):
            for hashed in (hashlib.sha256(known + raw), hashlib.blake2b(raw, key=known[:64])):
                assert not [digest for digest in found if digest in hashed.hexdigest()]

    run(use, TWO, GLOBEX, callers="anyone")


def test_another_gateway_tells_the_same() -> None:
    """A client's next try may go to any of them, today or after a restart."""

    async def play() -> None:
        found = []
        for _ in range(2):
            async with a_world(HOSTED) as world:
                await world.post(PROMPT)
                await world.post(PROMPT, headers={"x-api-key": "", "authorization": f"Bearer {TOKEN}"}, key=None)
                found += await prompts(world)
        assert 1 == len(set(found))

    asyncio.run(play())


def test_tries_are_counted_from_the_ledger_to_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stream that breaks, an overloaded provider, and the same in one piece; beside a call that just works."""
    pytest.importorskip("duckdb", reason="needs meterlib[billing]")
    store, archive = f"embedded://{tmp_path}/store", tmp_path / "archive"

    async def play() -> None:
        async with a_world(HOSTED, store=store, folder=tmp_path) as world:
            broken = Answer(events=STREAMS["cached"].events, breaks_after=1500)
            world.provider.answers(broken, error(529))
            for stream in (True, True, False):
                await world.post(PROMPT | {"stream": stream}, headers={"x-claude-code-session-id": "s1"})
            await world.post(message("something else"), headers={"x-claude-code-session-id": "s2"})
            await world.settled()

    asyncio.run(play())
    file = tmp_path / "meterlib.toml"
    file.write_text(f'[store]\nurl = "{store}"\nshards = 2\n[billing]\narchive = "{archive}"\n')
    assert 0 == main(["export", "run", "--config", str(file)])
    capsys.readouterr()
    assert 0 == main(["report", "retries", "--by", "session", "--format", "json", "--config", str(file)])

    first, second = json.loads(capsys.readouterr().out)["rows"]
    assert {"session": "s1", "calls": 1, "retried": 1, "tries": 3, "gave_up_streaming": 1, "unanswered": 0}.items() <= (
        first.items()
    )
    assert first["extra_input_tokens"] > 0
    assert {"session": "s2", "calls": 1, "retried": 0, "tries": 1, "extra_input_tokens": 0}.items() <= second.items()
    assert 0 == main(["report", "retries", "--by", "session", "--config", str(file)])
    printed = capsys.readouterr().out
    assert ["s1", "1", "1", "3", "1", "0"] == next(line.split()[:6] for line in printed.splitlines() if "s1" in line)
