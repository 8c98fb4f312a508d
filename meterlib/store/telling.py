"""Where the store's own words go: to the program's logs, or to standard error where it has set up none.

structlog itself would print them among a program's results.
"""

from __future__ import annotations

import sys
from typing import Any

import structlog


def log() -> Any:
    """The logger to tell an operator something by."""
    if structlog.is_configured():
        return structlog.get_logger("meterlib")
    return structlog.wrap_logger(structlog.PrintLogger(sys.stderr))
