"""DuckDB, loaded when an archive is first touched, so that whoever has none need not install it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EIO, ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from meterlib.errors import UsageError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

MEMORY_MAX = "512MB"
_FILE = re.compile(r'file \\?"([^"\\]+)')
_MADE: WeakSet[DuckDBPyConnection] = WeakSet()


def connect(scratch: Path | None = None) -> DuckDBPyConnection:
    """A database in memory with which Parquet files are written and read.

    One thread, since the bytes of a file must not depend on who was faster; nothing is loaded from the network, and
    what does not fit into memory goes to the scratch folder.

    Raises:
        UsageError: DuckDB is not installed.
    """
    try:
        import duckdb
    except ImportError:
        raise UsageError("an archive needs DuckDB: pip install 'meterlib[billing]'") from None
    settings: dict[str, Any] = {
        "threads": 1,
        "memory_limit": MEMORY_MAX,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "temp_directory": str(scratch) if scratch else "",
    }
    connection = duckdb.connect(":memory:", config=settings)
    _MADE.add(connection)
    return connection


def interrupt() -> None:
    """Queries that run now end with an error.

    For whoever handles Ctrl-C: DuckDB notices that by itself, but then waits until its other threads are through with
    what they are at, which may be the whole query (seen with 2.0.0).
    """
    for connection in list(_MADE):
        with suppress(failure()):  # it is closed, and somebody still holds it
            connection.interrupt()


def failure() -> type[Exception]:
    """What DuckDB raises."""
    import duckdb

    return duckdb.Error


def write_parquet(connection: Any, query: str, file: Path, metadata: str) -> None:
    """Write what a query finds to a file, always of the same bytes, and a text into its metadata, as `meterlib`.

    Raises:
        OSError: the disk is full, or fails.
    """
    connection.execute("SET threads = 1")  # else groups of rows would be cut by whoever is faster
    with disk_errors():
        connection.execute(
            f"COPY ({query}) TO {quoted(file)}"
            f" (FORMAT parquet, COMPRESSION zstd, KV_METADATA {{meterlib: {quoted(metadata)}}})"
        )


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turns DuckDB's word that a disk is full, or fails, into the OSError that everything else raises."""
    import duckdb

    try:
        yield
    except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
        text = str(error).partition("\n")[0]
        if "No space left on device" in text:  # of which DuckDB tells at length
            raise OSError(ENOSPC, "No space left on device", *_FILE.findall(text)[:1]) from None
        raise OSError(EIO, text) from None


def quoted(text: str | Path) -> str:
    """A text as SQL writes it, where no parameter may stand."""
    return "'" + str(text).replace("'", "''") + "'"
