"""Where the library's words go: to the program's logs, or to standard error where it has set up none.

structlog itself would print them among a program's results. It is loaded at the first word: most programs never hear
any, and to import the library would take a third longer with it.
"""

from __future__ import annotations

import sys
from typing import Any


class Log:
    """A logger by its name; whether the program has set up its logs is seen at each event, not at import."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, level: str) -> Any:
        import structlog

        if structlog.is_configured():
            return getattr(structlog.get_logger(self._name), level)
        return getattr(structlog.wrap_logger(structlog.PrintLogger(sys.stderr)), level)


log = Log("meterlib")
