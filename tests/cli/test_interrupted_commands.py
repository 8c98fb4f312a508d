"""Ctrl-C within the commands of billing, at each moment at which they touch a file: nothing half is left, ever."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from meterlib.cli import main
from tests.billing.billed import Ledger, fill_november, fill_october
from tests.billing.exporting import BLOCK, Books
from tests.billing.money import BOOK, at_ms
from tests.billing.posting import DEARER
from tests.billing.provider import Served, admin_usage
from tests.support.interrupts import Moments, interrupted
from tests.support.servers import Server

SETTINGS = '[store]\nshards = 1\n[billing]\narchive = "archive"\nissuer = "Meters & Co"\nbook = "prices.toml"\n'
INVOICE = ["report", "invoice", "--tenant", "acme", "--period", "2026-10", "--offline"]
MOMENTS_MAX = 400


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two months of calls, archived and rated, the first closed, and what commands want to read besides."""
    folder = tmp_path_factory.mktemp("original")
    ledger = Ledger(folder, block=50_000)
    fill_october(ledger)
    ledger.rate()
    fill_november(ledger)
    ledger.rate()
    ledger.close_month("2026-10")
    ledger.close()
    day_ms = at_ms("2026-10-01")
    served = [Served(day_ms + 1_000, {"input": 100, "output": 10}, model="claude-sonnet-5-5")]
    (folder / "usage.json").write_text(json.dumps(admin_usage(served, day_ms, day_ms + 86_400_000)))
    (folder / "meterlib.toml").write_text(SETTINGS)
    (folder / "prices.toml").write_text(BOOK)
    (folder / "dearer.toml").write_text(DEARER)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        assert 0 == main([*INVOICE, "--bundle", "acme.zip", "--output", "acme.txt"])
    return folder


@pytest.fixture
def scratch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(one.relative_to(folder)): one.read_bytes() for one in sorted(folder.rglob("*")) if one.is_file()}


READING = [
    ["report", "usage", "--offline", "--output", "old.txt"],
    ["report", "cost", "--offline", "--format", "csv", "--output", "new.csv"],
    ["report", "cost", "--offline", "--format", "parquet", "--output", "new.parquet"],
    ["report", "cost", "--offline", "--format", "focus-1.4", "--output", "new.csv"],
    ["report", "cost", "--offline", "--format", "html", "--output", "new.html"],
    [*INVOICE, "--bundle", "new.zip", "--output", "new.txt"],
    ["report", "reconcile", "--provider-file", "usage.json"],
    ["rate", "--book", "dearer.toml", "--dry-run"],
    ["verify", "archive"],
    ["verify", "acme.zip"],
]


@pytest.mark.parametrize("words", READING, ids=" ".join)
def test_an_interrupt_leaves_a_whole_file_or_the_one_before(
    original: Path, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """Whatever a report was to be written to is as it was, or there is the whole report; and nothing else is new."""
    folder = tmp_path / "folder"
    shutil.copytree(original, folder)
    monkeypatch.chdir(folder)
    (folder / "old.txt").write_text("what was there")
    before = files(folder)
    code = main(words)
    after = files(folder)
    for at in range(1, MOMENTS_MAX):
        for name in after.keys() - before.keys():
            (folder / name).unlink(missing_ok=True)
        for name in ("old.txt",):
            (folder / name).write_bytes(before[name])

        with interrupted(at, folder, scratch) as moments:
            ended = main(words)

        found = files(folder)
        assert [] == list(scratch.iterdir()), moments.events[-1]
        if moments.passed < at:
            assert (code, after) == (ended, found)
            break
        assert 130 == ended, moments.events[-1]
        assert found.keys() <= after.keys(), moments.events[-1]
        assert all(content in (before.get(name), after[name]) for name, content in found.items()), moments.events[-1]
    assert 1 < at < MOMENTS_MAX - 1


def nothing_rated(archive: Path) -> None:
    shutil.rmtree(archive / "rated")
    shutil.rmtree(archive / "closes")


def nothing_closed(archive: Path) -> None:
    shutil.rmtree(archive / "closes")


CHANGING = [
    pytest.param(["rate"], nothing_rated, id="rate"),
    pytest.param(["rate", "--book", "dearer.toml", "--yes"], nothing_closed, id="rate again"),
    pytest.param(["prices", "import", "dearer.toml", "--yes"], None, id="prices import"),
    pytest.param(["close", "2026-10", "--offline"], nothing_closed, id="close"),
    pytest.param(["export", "compact"], None, id="compact"),
]


@pytest.mark.parametrize(("words", "undo"), CHANGING)
def test_after_an_interrupt_the_same_command_comes_to_its_end(
    original: Path, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str],
    undo: Callable[[Path], None] | None,
) -> None:  # fmt: skip
    """What changes something does it as a whole or not at all, and leaves nothing behind that is in its own way."""
    monkeypatch.setattr(time, "time_ns", lambda: 1_800_000_000_000_000_000)

    def run(name: str, at: int) -> tuple[int, Moments, Path]:
        folder = tmp_path / name
        shutil.copytree(original, folder)
        monkeypatch.chdir(folder)
        if undo is not None:
            undo(folder / "archive")
        with interrupted(at, folder, scratch) as moments:
            return main(words), moments, folder

    code, _, folder = run("undisturbed", 0)
    after = files(folder)
    assert (0, False) == (code, after == files(original))
    assert 0 == main(["verify", "archive"])
    for at in range(1, MOMENTS_MAX):
        code, moments, folder = run(str(at), at)
        if moments.passed < at:
            break
        assert 130 == code, moments.events[-1]
        assert not [name for name in files(folder) if "/." in f"/{name}"], moments.events[-1]
        assert [] == list(scratch.iterdir()), moments.events[-1]
        assert 0 == main(words), moments.events[-1]
        assert after == files(folder), moments.events[-1]
    assert 1 < at < MOMENTS_MAX - 1


# A stream that is still open in memory goes with the process; here it is told of, since the process goes on.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupted_export_goes_on_without_a_trace(
    valkey: Server, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks, pieces and an entry that is set aside: the archive comes to the same bytes, whenever Ctrl-C came."""
    with valkey.client() as client:
        client.flushall()
        books = Books(tmp_path, client, valkey.url)
        books.book(BLOCK + 1)
        books.rewrite(3, lambda fields: fields.update({b"kind": b"refunded"}))
        after = None
        for at in range(MOMENTS_MAX):
            words = ["export", "run", "--set-aside", "0:3", "--config", str(books.settings)]
            with interrupted(at, tmp_path, scratch) as moments:
                code = main(words)
            if after is None:
                after = books.files()
            elif moments.passed < at:
                break
            else:
                assert 130 == code, moments.events[-1]
                assert [] == list(scratch.iterdir()), moments.events[-1]
                assert not [name for name in books.files() if ".work-" in name], moments.events[-1]
            assert 0 == main(words)
            assert after == books.files(), moments.events[-1]
            shutil.rmtree(books.path)
        books.close()
    assert 10 < at < MOMENTS_MAX - 1
