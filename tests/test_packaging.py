"""The wheel is complete: what it installs can reserve."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESERVE = """
import meterlib, fakeredis
meter = meterlib.Meter(fakeredis.FakeRedis(), meterlib.Policy.preset("buildkite-anthropic"))
with meter:
    meter.reserve("acme", {"provider": "anthropic"}).settle(meterlib.Usage(input_tokens=1, output_tokens=1))
from meterlib.billing.prices.files import claude_book
assert claude_book().models
print(meterlib.__file__)
"""


def test_the_wheel_carries_scripts_and_prices_and_reserves(tmp_path: Path) -> None:
    """Who installs meterlib from a wheel, without a checkout, has all it takes."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")

    ran = subprocess.run(
        [sys.executable, "-c", RESERVE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (0, "") == (ran.returncode, ran.stderr)
    assert str(tmp_path / "site") in ran.stdout
