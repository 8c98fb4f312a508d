"""Real exporter processes that are killed, raced and starved of disk, and servers that lose the end of their file."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import meterlib
from meterlib.cli import main
from meterlib.errors import StoreRefused
from tests.billing.exporting import LEDGER, Books
from tests.support.servers import Server, available, start_server

ROOT = Path(meterlib.__file__).parent.parent
AOF = Path("appendonlydir") / "appendonly.aof.1.incr.aof"

# An exporter that kills itself at a step.
KILLED = """
import os, signal, sys
from pathlib import Path
from meterlib.billing.archive import drafts, segments
from meterlib.billing.export import export
from meterlib.cli import main

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def after(function):
    def wrapped(*arguments, **named):
        function(*arguments, **named)
        die()
    return wrapped

step = sys.argv[1]
if step == "before the read":
    export.flows.read_stored = die
elif step == "after the read":
    drafts.Draft.add = after(drafts.Draft.add)
elif step == "after the write":
    segments.synced_digest = die
elif step == "after the sync":
    os.link = die
elif step == "after the link":
    os.link = after(os.link)
elif step == "after the folder's sync":
    segments.publish = after(segments.publish)
elif step == "before pieces are removed":
    unlink = Path.unlink
    def unlink_but_no_piece(path, *arguments, **named):
        return die() if path.parent.name == "shard-0000" else unlink(path, *arguments, **named)
    Path.unlink = unlink_but_no_piece
sys.exit(main(sys.argv[2:]))
"""

STARVED = """
import resource, sys
from meterlib.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(sys.argv[2:]))
"""


def program(code: str, *words: str, books: Books) -> list[str]:
    return [sys.executable, "-c", code, *words, "export", "run", "--config", str(books.settings)]


def ran(code: str, *words: str, books: Books) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        program(code, *words, books=books), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def books(valkey: Server, tmp_path: Path) -> Iterator[Books]:
    with valkey.client() as client:
        client.flushall()
        books = Books(tmp_path, client, valkey.url)
        yield books
        books.close()


@pytest.mark.parametrize(
    "step",
    [
        "before the read",
        "after the read",
        "after the write",
        "after the sync",
        "after the link",
        "after the folder's sync",
        "before pieces are removed",
    ],
)
def test_a_killed_exporter_loses_and_doubles_nothing(books: Books, tmp_path: Path, step: str) -> None:
    """kill -9 at any step: the next run goes on from whole files, removes what was left, and ends at the same bytes."""
    books.book(2)
    books.export()
    books.book(8)

    assert -9 == ran(KILLED, step, books=books).returncode

    assert [*books.path.glob(".work-*")]
    found = books.archived()
    assert books.booked()[: len(found)] == found
    assert (2 if step in ("before the read", "after the read", "after the write", "after the sync") else 4) <= len(
        found
    )

    books.export()
    assert not [*books.path.glob(".work-*")]
    assert books.booked() == books.archived()
    assert [(1, 4), (5, 8), (9, 10)] == books.names()
    (tmp_path / "other").mkdir()
    undisturbed = Books(tmp_path / "other", books.client)
    undisturbed.meter = books.meter
    undisturbed.export()
    assert undisturbed.files() == books.files()


def test_two_exporter_processes_at_once_write_each_entry_once(books: Books) -> None:
    """No lease that could lapse while somebody writes: both may go on to the end."""
    books.book(41)

    both = [
        subprocess.Popen(program(KILLED, "never", books=books), cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]

    assert [(0, ""), (0, "")] == [(one.wait(60), one.stderr.read()) for one in both if one.stderr is not None]
    for one in both:
        assert one.stderr is not None
        one.stderr.close()
    assert books.booked() == books.archived()
    assert not [name for name in books.files() if ".work-" in name]


@pytest.mark.parametrize("size", [500, 1500, 3000, 5000])
def test_a_full_disk_stops_the_export_and_leaves_whole_files(books: Books, size: int) -> None:
    """Whichever file does not fit: nothing half is left, and once there is room the export goes on."""
    books.book(6)

    starved = ran(STARVED, str(size), books=books)

    assert 1 == starved.returncode, starved.stderr
    assert starved.stderr.startswith("meterlib: [Errno")
    assert [] == books.archived()
    assert {} == books.files()
    books.export()
    assert books.booked() == books.archived()


def test_a_store_that_is_full_is_exported_and_trimmed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Operator: the way out of a store without memory is open, though nothing was ever exported from it before."""
    with start_server(tmp_path / "server", "valkey") as server, server.client() as client:
        books = Books(tmp_path, client, server.url)
        books.book(10)
        books.clock.advance(ms=25 * 3_600_000)
        books.book()
        client.config_set("maxmemory", "1mb")
        with pytest.raises(StoreRefused, match="out of memory"):
            books.meter.reserve("acme")
        booked = books.booked()
        words = ["--config", str(books.settings)]

        assert 0 == main(["export", "run", "--no-rate", *words])
        assert 0 == main(["export", "trim", "--keep", "1", *words])

        books.close()
        assert booked == books.archived()
        assert 1 == client.xlen(LEDGER), capsys.readouterr()


@pytest.mark.parametrize("broken", [1, 2, 3, 4])
def test_a_sync_that_fails_is_not_tried_again(books: Books, monkeypatch: pytest.MonkeyPatch, broken: int) -> None:
    """After a failed fsync the kernel may have dropped the data: the file is made anew by the next run."""
    books.book(6)
    fsync, calls = os.fsync, []

    def failing(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == broken:
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match="Input/output error"):
            books.export()

    assert not [name for name in books.files() if ".work-" in name]
    found = books.archived()
    assert books.booked()[: len(found)] == found
    books.export()
    assert books.booked() == books.archived()


@pytest.mark.parametrize("kind", ["valkey", "redis"])
def test_a_server_that_lost_its_tail_stops_the_export(tmp_path: Path, kind: str) -> None:
    """The append-only file was cut: what was exported stays the truth, and the numbers are not used twice."""
    if reason := available(kind):
        pytest.skip(reason)
    with start_server(tmp_path / "server", kind, append_only=True) as server, server.client() as client:
        books = Books(tmp_path, client, server.url)
        books.book(4)
        size = (server.folder / AOF).stat().st_size
        books.book(2)
        assert 6 == books.export().last
        exported = books.archived()
        server.kill()
        with (server.folder / AOF).open("r+b") as file:
            file.truncate(size + 17)
        server.start()

        problem = books.export().problem

        assert problem is not None
        assert ("regress", ("0:5-6",)) == (problem.problem, problem.entries)
        assert exported == books.archived()
        books.book(1)
        assert ("0:6",) == getattr(books.export().problem, "entries", None)
        books.book(3)
        problem = books.export().problem
        assert problem is not None
        assert ("conflict", ("0:6",)) == (problem.problem, problem.entries)
        assert exported == books.archived()
        books.close()
