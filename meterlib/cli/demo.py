"""`meterlib demo`: hands its options to the demo."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = """\
Watch it work, with nothing to set up: starts a real embedded server and a made-up
provider that speaks the Claude API, lets several tenants call it for a few
seconds, shows their limits filling and denying, and prints the usage report and
where the ledger is. Needs the extra `demo`: pip install 'meterlib[demo]'.
---
examples:
  meterlib demo
  meterlib demo --seconds 20 --seed 7
  meterlib demo --json --data /tmp/demo | jq .

exit codes: 0 ok; 1 what was booked is not what was served; 2 it cannot run
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `meterlib demo`."""
    parser.add_argument("--seconds", type=_seconds, default=8.0, metavar="N", help="how long it runs (default: 8)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="another seed, other traffic (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON document at the end, for programs")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of its embedded store")
    parser.add_argument("--no-color", action="store_true", help="plain lines, no colour and no animation")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; returns the exit code."""
    from meterlib import demo

    return demo.run(
        seconds=arguments.seconds,
        seed=arguments.seed,
        json_output=arguments.json,
        data=arguments.data,
        no_color=arguments.no_color,
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no number of seconds above 0 and at most 3600")
    return seconds
