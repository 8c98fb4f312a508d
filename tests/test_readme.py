"""The README's examples run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", blocks("python"), ids=lambda snippet: snippet.splitlines()[0][:40])
def test_each_python_snippet_runs(snippet: str) -> None:
    """What the README shows can be pasted and run."""
    ran = subprocess.run([sys.executable, "-W", "error", "-c", snippet], capture_output=True, text=True, timeout=60)

    assert (0, "") == (ran.returncode, ran.stderr)


def test_the_configuration_example_is_a_valid_policy(tmp_path: Path) -> None:
    """The README's meterlib.toml loads."""
    from meterlib import Policy

    path = tmp_path / "meterlib.toml"
    path.write_text(blocks("toml")[0])

    assert ["requests", "input_tokens"] == [limit.name for limit in Policy.load(str(path)).limits]


def test_the_table_of_commands_names_real_commands() -> None:
    """Every command in the README has a --help."""
    from meterlib.cli import main

    for command in dict.fromkeys(re.findall(r"^\| `meterlib (\w+(?: show)?)", README, re.MULTILINE)):
        with pytest.raises(SystemExit) as stopped:
            main([*command.split(), "--help"])

        assert 0 == stopped.value.code
