"""Processes that a test starts and talks to; none outlives a test that fails."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any


@contextmanager
def running(words: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process until it has ended; a test that fails kills it, since it may be waiting for the test to go on."""
    with subprocess.Popen(words, text=True, **options) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def line_with(words: str, stream: IO[str] | None) -> str:
    """The next line of a process's that has these words; the stream must not end before."""
    assert stream is not None
    for line in stream:
        if words in line:
            return line
    raise AssertionError(f"it has ended without saying {words!r}")
