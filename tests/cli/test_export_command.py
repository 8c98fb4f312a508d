"""`meterlib export` and `meterlib verify`: what they print, what they change, and what they end with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import meterlib
from meterlib.cli import main
from meterlib.config import Config
from meterlib.errors import PolicyError
from tests.billing.exporting import LEDGER, Books
from tests.support.commands import Run, runner
from tests.support.processes import running
from tests.support.servers import Server


@pytest.fixture
def books(valkey: Server, tmp_path: Path) -> Iterator[Books]:
    with valkey.client() as client:
        client.flushall()
        books = Books(tmp_path, client, valkey.url)
        yield books
        books.close()


@pytest.fixture
def run(books: Books, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command with the settings of this test."""
    return runner(capsys, books.settings)


def test_a_run_tells_what_it_exported(books: Books, run: Run) -> None:
    """The operator sees how many entries went where, and up to which."""
    books.book(6)

    ran = run("export", "run")

    rated = "rated 6 entries; rows without a price: opus (12)\n"
    assert (0, f"exported 6 entries to {books.path}, up to 0:6\n{rated}", "") == ran
    assert books.booked() == books.archived()
    assert f"exported 0 entries to {books.path}\n" == run("export", "run").out
    books.book()
    document = run("export", "run", "--json").json
    assert [{"shard": 0, "entries": 1, "epoch": "1600000000010", "last": 7, "problem": None}] == document["shards"]


def test_a_problem_is_told_in_words_and_in_json_and_ends_with_5(books: Books, run: Run) -> None:
    """A cron job that watches the exit code wakes somebody."""
    books.book(6)
    books.client.xdel(LEDGER, "3-0", "4-0")

    ran = run("export", "run")

    assert 5 == ran.code
    assert "exported 2 entries" in ran.out
    assert "meterlib: gap: entries 0:3-4 are missing from the ledger" in ran.err
    found = run("export", "run", "--json")
    assert (5, "gap", ["0:3-4"]) == (
        found.code,
        *(found.json["shards"][0]["problem"][name] for name in ("problem", "entries")),
    )
    assert 0 == run("export", "run", "--accept-gap", "0:3-4").code
    assert "lost for good, by decision of whoever exported: 0:3-4" in run("verify", str(books.path), config=False).out


def test_a_damaged_archive_stops_whatever_would_go_on_from_it(books: Books, run: Run) -> None:
    """Nothing is written behind a file that nobody can read."""
    books.book(3)
    run("export", "run")
    (file,) = (books.path / "shard-0000").iterdir()
    file.write_bytes(b"PAR1")
    books.book(3)

    for action in ("run", "status", "trim"):
        ran = run("export", action)
        assert 5 == ran.code, action
        assert file.name in ran.err
    assert [file] == [*(books.path / "shard-0000").iterdir()]
    assert 6 == books.client.xlen(LEDGER)


def test_a_ledger_begun_anew_goes_on_with_the_option_that_the_message_names(books: Books, run: Run) -> None:
    """The way out of a stop is in its message."""
    books.book(2)
    run("export", "run")
    books.client.flushall()
    assert 5 == run("export", "run").code
    books.clock.advance(ms=60_000)
    books.book(3)
    option = run("export", "run").err.partition("--accept-epoch ")[2].split()[0]

    assert 0 == run("export", "run", "--accept-epoch", option).code

    assert 5 == len(books.archived())
    assert 0 == run("export", "run").code


def test_the_status_says_what_waits(books: Books, run: Run) -> None:
    """How far behind the archive is, and that it still fits, without changing anything."""
    books.book(5)
    assert "5 entries wait to be exported" in run("export", "status").out
    assert not books.path.exists()
    run("export", "run")
    books.book(2)

    ran = run("export", "status")

    assert 0 == ran.code
    assert ["0", "5", "1", "7", "2", "2", "0.0"] in [line.split() for line in ran.out.splitlines()]
    (shard,) = run("export", "status", "--json").json["shards"]
    assert (5, 7, 2, None) == tuple(shard[name] for name in ("archived", "ledger_last", "waiting", "problem"))
    books.client.flushall()
    gone = run("export", "status")
    assert (5, True) == (gone.code, "regress" in gone.err)


def test_a_run_rates_what_it_exported_unless_it_is_told_not_to(books: Books, run: Run) -> None:
    """Bills can be made at once; and what was left is rated by the next run, or by `meterlib rate`."""
    books.book(3)
    document = run("export", "run", "--json").json
    assert (3, {"opus": 6}) == (document["rated"], document["unpriced"])
    books.book(3)

    assert f"exported 3 entries to {books.path}, up to 0:6\n" == run("export", "run", "--no-rate").out

    assert "rated 3 entries" in run("rate").out
    assert f"exported 0 entries to {books.path}\n" == run("export", "run").out


def test_a_price_book_that_is_not_acceptable_does_not_stop_the_export(books: Books, run: Run) -> None:
    """Entries are safe, and whoever is to mend the book is told which it is."""
    books.book(3)
    with books.settings.open("a") as settings:
        settings.write('book = "nowhere.toml"\n')

    ran = run("export", "run")

    assert 2 == ran.code
    assert "exported 3 entries" in ran.out
    assert "nowhere.toml cannot be read" in ran.err
    assert books.booked() == books.archived()


def test_compact_joins_short_files(books: Books, run: Run) -> None:
    """Fewer files, the same entries."""
    for _ in range(3):
        books.book()
        run("export", "run")

    assert f"3 files removed, 1 are left in {books.path}\n" == run("export", "compact").out
    assert books.booked() == books.archived()
    assert {"archive": str(books.path), "removed": 0, "files": 1} == run("export", "compact", "--json").json


def test_trim_removes_only_what_is_archived_and_the_export_goes_on(books: Books, run: Run) -> None:
    """The store's memory is freed, no entry is lost, and the next export can still tell its ledger."""
    books.book(9)
    run("export", "run")
    books.book(4)

    assert "0 entries removed" in run("export", "trim", "--keep", "20").out
    assert "6 entries removed from the store" in run("export", "trim", "--keep", "3").out

    assert 7 == books.client.xlen(LEDGER)
    assert {"removed": 0, "shards": [{"shard": 0, "removed": 0}]} == run("export", "trim", "--json").json
    assert "exported 4 entries" in run("export", "run").out
    assert [*range(1, 14)] == [one.n for one in books.archived()]
    assert "6 entries removed" in run("export", "trim", "--keep", "1").out
    assert 1 == books.client.xlen(LEDGER)
    books.book(2)
    assert "exported 2 entries" in run("export", "run").out
    assert [*range(1, 16)] == [one.n for one in books.archived()]


def test_a_report_of_a_time_that_was_trimmed_says_where_it_is(books: Books, run: Run) -> None:
    """Entries that left the store are missing from a report of it, and no mystery."""
    books.book(9)
    run("export", "run")
    run("export", "trim", "--keep", "2")

    ran = run("report", "--strict")

    assert 3 == ran.code
    assert "missing: 0:1-7\nthe store's ledger begins at 0:8; what was trimmed before is in the archive\n" in ran.out


def test_trim_keeps_what_calls_may_still_be_answered_with(valkey: Server, tmp_path: Path, run: Run) -> None:
    """Entries younger than the retention stay, whatever is archived."""
    with meterlib.Meter.connect(
        valkey.url, meterlib.Policy(limits=()), options=meterlib.StoreOptions(shards=1)
    ) as meter:
        for _ in range(5):
            meter.record("acme", {}, meterlib.Usage(input_tokens=1))
        run("export", "run")

        assert "0 entries removed" in run("export", "trim", "--keep", "1").out
        assert 5 == len(list(meter.ledger(0)))


def test_trim_leaves_a_ledger_alone_that_is_not_the_archived_one(books: Books, run: Run) -> None:
    """Nothing is removed where anything is in doubt."""
    books.book(6)
    run("export", "run")
    books.rewrite(6, lambda fields: fields.update({b"digest": b"0" * 16}))

    ran = run("export", "trim", "--keep", "1")

    assert (5, "") == (ran.code, ran.out)
    assert "another entry 0:6" in ran.err
    assert 6 == books.client.xlen(LEDGER)
    assert 2 == run("export", "trim", "--keep", "0").code


def test_verify_tells_the_digest_and_names_what_is_wrong(books: Books, run: Run, tmp_path: Path) -> None:
    """A customer can run it, with the files and nothing else."""
    books.book(6)
    run("export", "run")

    good = run("verify", str(books.path), config=False)
    document = run("verify", str(books.path), "--json", config=False).json

    assert (0, "") == (good.code, good.err)
    assert f"ok: 6 entries of 1 shards in {books.path}" in good.out
    assert document["shards"][0]["link"][:16] in good.out
    assert document["ok"]
    known = tmp_path / "known.json"
    known.write_text(json.dumps(document))
    assert 0 == run("verify", str(books.path), "--known", str(known), config=False).code
    last = sorted((books.path / "shard-0000").iterdir())[-1]
    data = last.read_bytes()
    last.unlink()
    assert 5 == run("verify", str(books.path), "--known", str(known), config=False).code
    last.write_bytes(data[:-1] + b"?")
    bad = run("verify", str(books.path), config=False)
    assert 5 == bad.code
    assert last.name in bad.err


@pytest.mark.parametrize(
    "words",
    [
        ["export", "run", "--accept-gap", "3"],
        ["export", "run", "--set-aside", "0:x"],
        ["export", "run", "--accept-epoch", "0"],
        ["export", "trim", "--keep", "-1"],
        ["export"],
        ["verify"],
    ],
    ids=" ".join,
)
def test_words_that_make_no_sense_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is done on a guess."""
    with pytest.raises(SystemExit) as stopped:
        main(words)

    assert 2 == stopped.value.code
    assert capsys.readouterr().err.startswith("usage: meterlib")


def test_what_is_no_archive_is_not_verified(run: Run, tmp_path: Path) -> None:
    """A mistyped folder is not taken for an archive without problems."""
    for folder in (tmp_path / "nowhere", tmp_path):
        assert 2 == run("verify", str(folder), config=False).code


@pytest.mark.parametrize("words", [["export"], ["export", "run"], ["export", "trim"], ["verify"]], ids=" ".join)
def test_help_has_examples_and_exit_codes(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """No other document is needed."""
    with pytest.raises(SystemExit):
        main([*words, "--help"])

    text = capsys.readouterr().out
    assert "\nexamples:\n  meterlib " in text
    assert "exit codes: 0 ok" in text
    assert max(map(len, text.splitlines())) <= 90


def test_following_goes_on_until_it_is_told_to_stop(books: Books) -> None:
    """A service manager's SIGTERM ends it in good order."""
    books.book(3)
    command = [sys.executable, "-m", "meterlib", "export", "run", "--follow", "--every", "1"]
    root = str(Path(meterlib.__file__).parent.parent)
    with running(
        [*command, "--config", str(books.settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=books.settings.parent,
        env=os.environ | {"PYTHONPATH": root},
    ) as following:
        assert following.stdout is not None
        assert following.stderr is not None
        assert f"exported 3 entries to {books.path}, up to 0:3\n" == following.stdout.readline()
        assert "rated 3 entries; rows without a price: opus (6)\n" == following.stdout.readline()
        books.book(1)
        assert f"exported 1 entry to {books.path}, up to 0:4\n" == following.stdout.readline()
        assert "rated 1 entry; rows without a price: opus (2)\n" == following.stdout.readline()
        following.send_signal(signal.SIGTERM)
        assert (0, "") == (following.wait(30), following.stderr.read())
    assert books.booked() == books.archived()
    assert not [name for name in books.files() if ".work-" in name]


@pytest.mark.parametrize(
    ("line", "path"),
    [('archive = " "', "billing.archive"), ("segment_entries = 0", "billing.segment_entries")],
)
def test_settings_are_checked(tmp_path: Path, line: str, path: str) -> None:
    """A mistake in the file is found when it is read, with its place."""
    file = tmp_path / "meterlib.toml"
    file.write_text(f"[billing]\n{line}\n")

    with pytest.raises(PolicyError) as caught:
        Config.load(file)

    assert path == caught.value.path


def test_the_archive_is_meant_from_where_the_settings_are(tmp_path: Path) -> None:
    """Wherever the command is run."""
    file = tmp_path / "meterlib.toml"
    file.write_text("")

    assert str(tmp_path / "meterlib-archive") == Config.load(file).billing.archive
