"""How long an interpreter takes to import the library: `python -m benchmarks.importing`.

Beside it, what it stands on, and other limiters. The time of an interpreter that imports nothing is taken off.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from statistics import median

from benchmarks.common import parser_of, show, table_of

NOTHING = "(an interpreter that imports nothing)"
TARGET_MS = 150
FIRST_METER = "import meterlib; meterlib.Meter.connect('redis://127.0.0.1:1', meterlib.Policy())"
PROGRAMS = {
    NOTHING: "pass",
    "import meterlib": "import meterlib",
    "import asyncio, msgspec": "import asyncio, msgspec",
    "import meterlib, and a first meter": FIRST_METER,
    "import redis, redis.asyncio": "import redis, redis.asyncio",
    "import limits, limits.aio, redis": "import limits, limits.aio, redis, redis.asyncio",
    "import throttled, redis": "import throttled, throttled.asyncio, redis, redis.asyncio",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 0."""
    options = parser_of("importing", __doc__, servers=False).parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="meterlib-bench-") as folder:
        # As installed: compiled before, wherever this checkout may or may not be written to.
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        found = _measure(environment, 5 if options.quick else 41)
    _show(found)
    return 0


def _measure(environment: Mapping[str, str], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each round; in the first, which does not count, everything is compiled."""
    found: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    names = list(PROGRAMS)
    for number in range(rounds + 1):
        for name in names if number % 2 else reversed(names):
            began_s = time.perf_counter()
            subprocess.run([sys.executable, "-c", PROGRAMS[name]], env=environment, check=True)
            if number:
                found[name].append(1000 * (time.perf_counter() - began_s))
    return found


def _show(found: Mapping[str, Sequence[float]]) -> None:
    nothing = found[NOTHING]
    table = table_of(f"Time of an import, in ms; target {TARGET_MS}", "", "p50", "least", "target")
    for name, times in found.items():
        own = [one - base for one, base in zip(times, nothing, strict=True)] if times is not nothing else times
        verdict = "reached" if median(own) <= TARGET_MS else "not reached in this run"
        table.add_row(name, f"{median(own):.0f}", f"{min(own):.0f}", verdict if name == "import meterlib" else "")
    show(table)


if __name__ == "__main__":
    sys.exit(main())
