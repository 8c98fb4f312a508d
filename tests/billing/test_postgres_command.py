"""`meterlib export` with PostgreSQL beside the archive: what it prints, and what one does while the other is down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import meterlib
from meterlib.config import Config
from meterlib.errors import PolicyError
from tests.billing.exporting import LEDGER
from tests.billing.test_postgres import PostgresBooks
from tests.support.commands import Ran, runner
from tests.support.postgres import PASSWORD, PostgresServer
from tests.support.processes import line_with, running
from tests.support.servers import Server

ROOT = Path(meterlib.__file__).parent.parent
SINK = """
postgres_env = "METERLIB_TEST_POSTGRES"
postgres_schema = "{schema}"
"""

# An exporter that kills itself at a step of its second block.
KILLED = """
import os, signal, sys
from meterlib.billing.export import postgres
from meterlib.cli import main

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

step, seen = sys.argv[1], []
postgres.BLOCK_ENTRIES = 4
postgres.Postgres.__init__.__defaults__ = ("meterlib", 4)
write, copy = postgres.Postgres._write, postgres.Postgres._copy

def wrapped_write(sink, connection, draft):
    seen.append(draft)
    if step == "before the block" and len(seen) == 2:
        die()
    write(sink, connection, draft)
    if step == "after the commit" and len(seen) == 2:
        die()

def wrapped_copy(sink, connection, draft):
    copy(sink, connection, draft)
    if step == "after the rows" and len(seen) == 2:
        die()

postgres.Postgres._write, postgres.Postgres._copy = wrapped_write, wrapped_copy
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def books(
    valkey: Server, postgres_server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[PostgresBooks]:
    with valkey.client() as client:
        client.flushall()
        books = PostgresBooks(tmp_path, postgres_server, client=client, url=valkey.url)
        books.settings.write_text(books.settings.read_text() + SINK.format(schema=books.schema))
        monkeypatch.setenv("METERLIB_TEST_POSTGRES", postgres_server.secret_url)
        yield books
        books.close()


@pytest.fixture
def run(books: PostgresBooks, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command with the settings of this test."""

    def run(*words: str) -> Ran:
        ran = runner(capsys, books.settings)(*words)

        assert PASSWORD not in ran.out + ran.err
        return ran

    return run


def without_postgres(books: PostgresBooks) -> None:
    """Somebody takes it out of the settings."""
    books.settings.write_text(books.settings.read_text().replace(SINK.format(schema=books.schema), ""))


def test_a_run_writes_both_and_tells_of_both(books: PostgresBooks, run: Any) -> None:
    """Each with its own count and position."""
    books.book(6)

    ran = run("export", "run")

    place = f"PostgreSQL postgres at 127.0.0.1, schema {books.schema}"
    assert (0, "") == (ran.code, ran.err)
    assert [
        f"exported 6 entries to {books.path}, up to 0:6",
        f"exported 6 entries to {place}, up to 0:6",
    ] == ran.out.splitlines()[:2]
    assert books.booked() == books.archived() == books.loaded()
    books.book()
    document = run("export", "run", "--json").json
    assert (1, [(place, 1, None)]) == (
        document["entries"],
        [(sink["sink"], sink["entries"], sink["failure"]) for sink in document["sinks"]],
    )


def test_one_that_is_down_does_not_stop_the_other(
    books: PostgresBooks, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive goes on, the failure is told, and the next run brings the database up to it."""
    books.book(3)
    run("export", "run")
    books.book(2)
    with monkeypatch.context() as patched:
        patched.setenv("METERLIB_TEST_POSTGRES", books.server.secret_url.replace(f":{books.server.port}", ":1"))
        patched.setattr("meterlib.billing.export.postgres._PAUSES_S", ())

        ran = run("export", "run")
        status = run("export", "status")
        trimmed = run("export", "trim", "--keep", "1")

    assert (1, True) == (ran.code, "exported 2 entries" in ran.out)
    assert "schema" in ran.err
    assert 1 == ran.err.count("onnection refused") == status.err.count("onnection refused")
    assert (1, 1, "") == (status.code, trimmed.code, trimmed.out)
    assert 5 == books.client.xlen(LEDGER)
    assert [5, 3] == [len(books.archived()), len(books.loaded())]
    assert 0 == run("export", "run").code
    assert books.booked() == books.loaded()


def test_a_damaged_archive_does_not_stop_postgresql(books: PostgresBooks, run: Any) -> None:
    """The other way round: whoever can go on does."""
    books.book(3)
    run("export", "run")
    (file,) = (books.path / "shard-0000").iterdir()
    file.write_bytes(b"PAR1")
    books.book(3)

    ran = run("export", "run")

    assert (5, True) == (ran.code, file.name in ran.err)
    assert books.booked() == books.loaded()


def test_the_status_says_where_each_is(books: PostgresBooks, run: Any) -> None:
    """Position and lag of every shard, for people and for programs."""
    books.book(3)
    books.export_all()
    books.book(2)
    books.export()

    ran = run("export", "status")

    assert 0 == ran.code
    assert ["0", "5", "1", "5", "0"] in [line.split()[:5] for line in ran.out.splitlines()]
    assert ["0", "3", "5", "2"] in [line.split() for line in ran.out.splitlines()]
    (sink,) = run("export", "status", "--json").json["sinks"]
    assert [{"shard": 0, "exported": 3, "ledger_last": 5, "waiting": 2, "problem": None}] == sink["shards"]


def test_trim_waits_for_the_last_and_for_one_that_the_settings_have_forgotten(books: PostgresBooks, run: Any) -> None:
    """Taking PostgreSQL out of the settings must not silently let entries go that it lacks."""
    books.book(4)
    run("export", "run")
    books.book(5)
    books.export()
    settings = books.settings.read_text()
    without_postgres(books)

    refused = run("export", "trim", "--keep", "1")

    assert (2, "") == (refused.code, refused.out)
    assert "meterlib export forget 'postgres " in refused.err
    assert 9 == books.client.xlen(LEDGER)
    books.settings.write_text(settings)
    assert "3 entries removed" in run("export", "trim", "--keep", "1").out
    without_postgres(books)
    name = refused.err.partition("forget '")[2].partition("'")[0]
    assert [f"archive {books.path}", name] == run("export", "forget").out.splitlines()
    assert 2 == run("export", "forget", "postgres").code
    assert 0 == run("export", "forget", name).code
    assert "5 entries removed" in run("export", "trim", "--keep", "1").out


def test_the_schema_is_printed_for_whoever_may_make_it(books: PostgresBooks, run: Any) -> None:
    """The same statements that the first run would give."""
    books.sql(run("export", "schema").out)
    books.book(2)

    assert 0 == run("export", "run").code
    assert books.booked() == books.loaded()


def test_an_entry_is_set_aside_with_the_option_that_the_message_names(books: PostgresBooks, run: Any) -> None:
    """Quarantined and counted, by somebody's decision, and never skipped silently."""
    books.book(5)
    books.rewrite(3, lambda fields: fields.update({b"kind": b"refunded"}))
    stopped = run("export", "run")
    assert 5 == stopped.code
    option = stopped.err.partition("--set-aside ")[2].split(",")[0]

    ran = run("export", "run", "--set-aside", option)

    assert (0, 2) == (ran.code, ran.out.count("; 1 set aside"))
    assert [1, 2, 4, 5] == [entry.n for entry in books.loaded()] == [entry.n for entry in books.archived()]
    assert 0 == run("export", "run").code


@pytest.mark.parametrize("step", ["before the block", "after the rows", "after the commit"])
def test_a_killed_exporter_loses_and_doubles_nothing(books: PostgresBooks, step: str) -> None:
    """kill -9 of a real process at any step: rows and checkpoint are both there or neither is."""
    books.book(11)
    words = ["export", "run", "--config", str(books.settings)]

    killed = subprocess.run(
        [sys.executable, "-c", KILLED, step, *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )

    assert -9 == killed.returncode, killed.stderr
    assert (8 if step == "after the commit" else 4) == len(books.loaded())
    assert [None, None] == [one.problem for one in books.export_all()]
    assert books.booked() == books.archived() == books.loaded()


def test_two_exporter_processes_at_once_write_each_entry_once(books: PostgresBooks) -> None:
    """Both to the end, into both."""
    books.book(61)
    command = [sys.executable, "-c", KILLED, "never", "export", "run", "--config", str(books.settings)]

    both = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]

    assert [("", 0), ("", 0)] == [(one.communicate(timeout=60)[1], one.returncode) for one in both]
    assert books.booked() == books.archived() == books.loaded()


def test_following_outlives_its_database(books: PostgresBooks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down for a while, it is found again; the archive never waited."""
    with PostgresServer() as server:
        books.server = server
        books.book(2)
        command = [sys.executable, "-u", "-m", "meterlib", "export", "run", "--follow", "--every", "1"]
        with running(
            [*command, "--config", str(books.settings)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"METERLIB_TEST_POSTGRES": server.secret_url},
        ) as following:
            assert following.stdout is not None
            assert ["exported 2", "exported 2"] == [following.stdout.readline()[:10] for _ in range(2)]
            server.stop()
            books.book(1)
            line_with("trying again", following.stderr)
            server.start()
            line_with("PostgreSQL", following.stdout)
            following.send_signal(signal.SIGTERM)
            assert PASSWORD not in following.communicate(timeout=30)[1]
            assert 0 == following.returncode
        assert books.booked() == books.archived() == books.loaded()


@pytest.mark.parametrize(
    ("lines", "path"),
    [
        ('postgres = "mysql://a@b/c"', "billing.postgres"),
        (f'postgres = "postgresql://a:{PASSWORD}@b/c"', "billing.postgres"),
        (f'postgres = "postgresql://a@b/c?password={PASSWORD}"', "billing.postgres"),
        ('postgres_env = "not a name"', "billing.postgres_env"),
        ('postgres = "postgresql://a@b/c"\npostgres_env = "X"', "billing.postgres_env"),
        ('postgres_schema = "Robert\'); DROP"', "billing.postgres_schema"),
        ('postgres_schema = "pg_mine"', "billing.postgres_schema"),
    ],
)
def test_settings_are_checked(tmp_path: Path, lines: str, path: str) -> None:
    """A mistake is found when the file is read, with its place, and without the secret in it."""
    file = tmp_path / "meterlib.toml"
    file.write_text(f"[billing]\n{lines}\n")

    with pytest.raises(PolicyError) as caught:
        Config.load(file)

    assert path == caught.value.path
    assert PASSWORD not in str(caught.value)


def test_a_variable_that_is_not_set_is_named(books: PostgresBooks, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is exported to half of the sinks by mistake."""
    books.book(1)
    monkeypatch.delenv("METERLIB_TEST_POSTGRES")

    ran = run("export", "run")

    assert (2, "") == (ran.code, ran.out)
    assert "METERLIB_TEST_POSTGRES" in ran.err
    assert not books.path.exists()
