"""`meterlib demo`: made-up tenants call a made-up provider, and are limited and metered on a real embedded server."""

from __future__ import annotations

import sys
from pathlib import Path

from meterlib.errors import MeterError

DATA = Path("meterlib-data/demo")
FAILED = 2
INTERRUPTED = 130


def run(*, seconds: float, seed: int, json_output: bool, data: Path | None, no_color: bool) -> int:
    """Run the demo for so many seconds, and print what came of it.

    Args:
        seconds: how long new calls are made; open ones then end, which takes another second or two.
        seed: the same seed makes the same calls and answers.
        json_output: print one JSON document at the end, and nothing else.
        data: folder of the embedded store; `meterlib-data/demo` by default. Another run there continues its ledger.
        no_color: print plain lines, also on a terminal.

    Returns:
        The exit code: 0 if the ledger agrees with what the provider served, 1 if not, 2 if the demo could not
        run, 130 if it was interrupted (the open calls were settled all the same).

    """
    try:
        from meterlib.demo.play import play
    except ModuleNotFoundError as error:
        if (error.name or "meterlib").partition(".")[0] == "meterlib":
            raise
        print(f"the demo needs {error.name}, which is not installed: pip install 'meterlib[demo]'", file=sys.stderr)
        return FAILED
    folder, return_code = (data or DATA).absolute(), FAILED
    try:
        return play(seconds=seconds, seed=seed, json_output=json_output, data=folder, no_color=no_color)
    except* MeterError as errors:
        print(f"the demo cannot go on: {_first(errors)}", file=sys.stderr)
    except* KeyboardInterrupt:  # before the first call or after the last
        return_code = INTERRUPTED
    return return_code


def _first(errors: BaseException) -> BaseException:
    """The first of the errors that calls at the same time ended with."""
    return _first(errors.exceptions[0]) if isinstance(errors, BaseExceptionGroup) else errors
