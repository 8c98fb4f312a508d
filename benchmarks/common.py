"""What the benchmarks have in common: their options, a throw-away server, and how tables look."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tests.support.servers import available, start_server

WIDTH = 160
"""Of what is written to no terminal: the widest table fits."""

# That a throw-away server has no append-only file is known.
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))


def parser_of(name: str, doc: str | None, seconds: str = "", servers: bool = True) -> argparse.ArgumentParser:
    """A benchmark's options; `seconds` says what they are, where it is timed."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(doc or "").split("\n\n")[0])
    if seconds:
        parser.add_argument("--seconds", type=float, help=seconds)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller sizes, to see that it runs")
    if servers:
        kinds = "valkey (the bundled one), redis (redis-server), or the URL of an empty server, which is emptied again"
        parser.add_argument("--server", default="valkey", help=kinds)
    return parser


def on_core(server: Any, core: int | None) -> None:
    """Keep a server of this machine on one core, from now on; Linux only."""
    if core is None:
        return
    try:
        os.sched_setaffinity(int(server.info("server")["process_id"]), {core})
    except (AttributeError, OSError) as error:
        raise SystemExit(f"--server-core {core}: {error}") from None


@contextmanager
def server_of(wanted: str) -> Iterator[str]:
    """The URL of a throw-away server of this kind, or the given one."""
    if "://" in wanted:
        yield wanted
        return
    reason = available(wanted)
    if reason:
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory(prefix="meterlib-bench-") as folder, start_server(Path(folder), wanted) as server:
        yield server.url


def table_of(title: str, first: str, *columns: str) -> Table:
    """A table of numbers, led by what they are of."""
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def show(*tables: Table) -> None:
    """Print them for people."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for table in tables:
        console.print(table)
