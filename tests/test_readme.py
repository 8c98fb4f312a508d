"""The README's examples run as they stand."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", blocks("python"), ids=lambda snippet: snippet.splitlines()[0][:40])
def test_each_python_snippet_runs(snippet: str, tmp_path: Path) -> None:
    """What the README shows can be pasted and run."""
    command = [sys.executable, "-W", "error", "-c", snippet]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment)

    assert (0, "") == (ran.returncode, ran.stderr)


@pytest.mark.parametrize("example", blocks("toml"), ids=lambda example: example.splitlines()[0][:40])
def test_each_configuration_example_is_valid(example: str, tmp_path: Path) -> None:
    """The README's meterlib.toml loads, and means what it says."""
    from meterlib.config import Config

    path = tmp_path / "meterlib.toml"
    path.write_text(example)
    config = Config.load(path)

    assert [limit.name for limit in config.policy.limits] in (["requests", "input_tokens"], ["spend"])
    assert "acme" == config.tenant[0].name


def snippet_after(mark: str) -> str:
    return README.split(f"<!-- {mark} -->\n```python\n")[1].split("```")[0]


def test_the_mounted_gateway_of_the_example_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten lines are enough to have the gateway in one's own app."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(snippet_after("asgi: mount"), names)

    async def use() -> None:
        async with names["gateway"].lifespan():
            probe, *_ = await asked(names["app"], "HEAD", "/claude/api/hello")
            refusal, body, *_ = await asked(names["app"], "POST", "/claude/v1/messages", b"{}")
            assert (200, 401) == (probe["status"], refusal["status"])
            assert b"authentication_error" in body["body"]

    asyncio.run(use())


def test_the_metered_app_of_the_example_is_metered() -> None:
    """Ten lines are enough to meter an app of one's own."""
    names: dict[str, Any] = {}
    exec(snippet_after("asgi: middleware"), names)

    async def use() -> list[Any]:
        body = b'{"model": "claude-sonnet-4-5", "messages": []}'
        start, *_ = await asked(names["app"], "POST", "/v1/messages", body)
        assert 200 == start["status"]
        meter = names["meter"]
        entries = [entry for shard in range(meter.shards) async for entry in meter.ledger(shard)]
        await meter.aclose()
        return entries

    (entry,) = asyncio.run(use())
    assert ("acme", {"input_tokens": 12, "output_tokens": 3}) == (entry.tenant, entry.usage)


async def asked(app: Any, method: str, path: str, body: bytes = b"") -> list[Any]:
    """What an app sends in answer to a request."""
    sent: list[Any] = []
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": [], "root_path": ""}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


def test_the_table_of_commands_names_real_commands() -> None:
    """Every command in the README has a --help."""
    from meterlib.cli import main

    for command in dict.fromkeys(re.findall(r"^\| `meterlib (\w+(?: show)?)", README, re.MULTILINE)):
        with pytest.raises(SystemExit) as stopped:
            main([*command.split(), "--help"])

        assert 0 == stopped.value.code
