"""Commands, run as from the command line, and what they answered."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pytest

from meterlib.cli import main


class Ran(NamedTuple):
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def cells(self) -> list[list[str]]:
        """The rows of CSV."""
        return list(csv.reader(io.StringIO(self.out)))

    @property
    def findings(self) -> dict[str, dict[str, Any]]:
        """What the doctor found, by check."""
        return {finding["check"]: finding for finding in self.json["findings"]}


Run: TypeAlias = Callable[..., Ran]
NO_SETTINGS = ("verify",)
"""Commands that know of no settings."""


def runner(capsys: pytest.CaptureFixture[str], settings: Path | None = None) -> Run:
    """Runs commands; with these settings, unless others are named."""

    def run(*words: str, config: str | Path | bool | None = settings) -> Ran:
        given = [] if words[0] in NO_SETTINGS or config in (None, False) else ["--config", str(config)]
        code = main([*words, *given])
        return Ran(code, *capsys.readouterr())

    return run
