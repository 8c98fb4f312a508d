"""What people do wrong with the commands of billing, and what disks do: told with what leads there, and the fix."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from meterlib import Usage
from tests.billing.billed import ledger_of
from tests.support.commands import Run, runner
from tests.support.terminal import ENVIRONMENT

SETTINGS = '[store]\nshards = 1\n[billing]\narchive = "archive"\nissuer = "Meters & Co"\nbook = "prices.toml"\n'
INVOICE = ("report", "invoice", "--tenant", "acme", "--period", "2026-10", "--offline")
BOOK = """
name = "mine"
currency = "USD"
provider = "anthropic"
[[model]]
name = "claude-sonnet-5-5"
[[model.price]]
source = "a contract"
input = 1
output = 2
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two months of calls, archived and rated, the first closed."""
    folder = tmp_path_factory.mktemp("original")
    ledger = ledger_of(folder)
    for at in range(60):
        ledger.call("acme", usage=Usage(input_tokens=1), session=f"session-{at}")
    ledger.rate()
    ledger.close()
    (folder / "meterlib.toml").write_text(SETTINGS)
    (folder / "prices.toml").write_text(BOOK)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, where commands run."""
    folder = tmp_path / "folder"
    shutil.copytree(original, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys, folder / "meterlib.toml")


# ── What is asked for ─────────────────────────────────────────────────────────────────────────────────────────────────

READERS = [
    ["report", "usage"],
    ["report", "cost"],
    ["report", "limits"],
    ["report", "invoice", "--tenant", "acme", "--period", "2026-10"],
    ["report", "reconcile", "--provider-file", "u.json"],
    ["rate"],
    ["close", "2026-10"],
]


@pytest.mark.parametrize("words", READERS, ids=lambda words: " ".join(words[:2]))
def test_a_folder_that_is_no_archive_is_not_taken_for_an_empty_one(folder: Path, run: Run, words: list[str]) -> None:
    """A mistyped folder must never give a bill of nothing that calls itself complete."""
    (folder / "photos").mkdir()
    (folder / "photos" / "cat.jpg").write_bytes(b"")

    for place in ("photos", "prices.toml", "nowhere", ""):
        ran = run(*words, "--archive", place)

        assert (2, "") == (ran.code, ran.out)
        assert ran.err.startswith("meterlib: --archive: ")
        assert "no archive" in ran.err

    settings = folder / "meterlib.toml"
    settings.write_text(settings.read_text().replace('"archive"', '"photos"'))
    assert run(*words).err.startswith("meterlib: [billing] archive: ")


def test_an_archive_that_was_just_made_has_nothing_in_it(folder: Path, run: Run) -> None:
    """Before the first entry is exported, reports are empty, and no error."""
    (folder / "new").mkdir()

    assert 0 == run("report", "cost", "--archive", "new", "--offline").code


def test_an_invoice_of_nobody_says_so(folder: Path, run: Run) -> None:
    """A customer's name that is mistyped looks like a customer who owes nothing."""
    with (folder / "meterlib.toml").open("a") as file:
        file.write('[[tenant]]\nname = "acme"\n')

    ran = run("report", "invoice", "--tenant", "acmee", "--period", "2026-10", "--offline")

    assert (0, "meterlib: there is nothing of tenant 'acmee'; did you mean 'acme'?\n") == (ran.code, ran.err)
    assert "" == run(*INVOICE).err


def test_a_span_that_is_none_is_refused(run: Run) -> None:
    """Or `rate` would say that the other book changes nothing."""
    ran = run("rate", "--book", "claude", "--since", "2026-11-01", "--until", "2026-10-01")

    assert (2, "meterlib: --until: 2026-10-01 is not after --since 2026-11-01\n") == (ran.code, ran.err)


def test_what_is_no_bundle_is_named(folder: Path, run: Run) -> None:
    """Several are checked one after the other, in a script."""
    for content in (b"", b"PK", BOOK.encode()):
        (folder / "bundle.zip").write_bytes(content)
        ran = run("verify", "bundle.zip")

        assert 5 == ran.code
        assert ran.err.startswith("meterlib: bundle.zip is no invoice bundle, or is broken")


@pytest.mark.parametrize("option", ["--output", "--bundle"])
def test_where_nothing_can_be_written_is_told_before_any_work(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """Nobody waits a minute for a report that has no place to go."""
    monkeypatch.setattr("meterlib.cli.report_archive.Postings", _worked)
    (folder / "file").write_text("")
    for place, problem in [("nowhere/f", "there is no folder nowhere"), (".", "is a folder"), ("file/f", "no folder")]:
        ran = run(*INVOICE, option, place)

        assert (2, True, True) == (ran.code, ran.err.startswith(f"meterlib: {option}: "), problem in ran.err)


def _worked(*_: object) -> None:
    raise AssertionError("the archive was looked at")


# ── Folders and disks ─────────────────────────────────────────────────────────────────────────────────────────────────

# A program whom permissions hold for, even where tests run as root.
MORTAL = """
import ctypes, os, sys
if os.geteuid() == 0:
    libc = ctypes.CDLL(None, use_errno=True)
    class Header(ctypes.Structure):
        _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]
    none = (ctypes.c_uint32 * 6)()
    assert 0 == libc.capset(ctypes.byref(Header(0x20080522, 0)), none)
from meterlib.cli import main
sys.exit(main(sys.argv[1:]))
"""


def mortal(*words: str) -> tuple[int, str]:
    ran = subprocess.run([sys.executable, "-c", MORTAL, *words], env=ENVIRONMENT, capture_output=True, text=True,
                         timeout=60, check=False)  # fmt: skip
    return ran.returncode, ran.stderr


@pytest.fixture
def sealed(folder: Path) -> Callable[[int], None]:
    """Takes from, or gives back to, everybody what they may do with the folder and all in it."""

    def seal(bits: int) -> None:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(bits | 0o111 if path.is_dir() else bits)

    return seal


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_an_archive_that_may_only_be_read_is_read(folder: Path, sealed: Callable[[int], None]) -> None:
    """An auditor gets it on a read-only disk; what would write to it says what it lacks."""
    sealed(0o444)
    try:
        assert (0, "") == mortal("report", "cost", "--offline")
        assert (0, "") == mortal("verify", "archive")
        assert (0, "") == mortal("close", "--list")
        told = {
            "--output: nothing can be written to .: permission denied": [*INVOICE, "--output", "new.txt"],
            "--bundle: nothing can be written to .: permission denied": [*INVOICE, "--bundle", "new.zip"],
        }
        for message, words in told.items():
            assert (2, f"meterlib: {message}\n") == mortal(*words)
        message = f"[Errno 13] Permission denied: nothing can be written to '{folder}/archive'"
        assert (1, f"meterlib: {message}\n") == mortal("rate", "--book", "claude", "--dry-run")
    finally:
        sealed(0o755)


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_a_file_that_may_not_be_read_is_no_damage(folder: Path, sealed: Callable[[int], None]) -> None:
    """It is named, and nobody is told that the archive was tampered with."""
    file = next((folder / "archive" / "shard-0000").glob("*.parquet"))
    file.chmod(0)
    try:
        for words in (["report", "usage", "--offline"], ["verify", "archive"]):
            code, err = mortal(*words)
            assert (1, True) == (code, err.startswith("meterlib: [Errno 13] Permission denied: "))
            assert file.name in err
    finally:
        sealed(0o755)


STARVED = """
import resource, signal, sys
from meterlib.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(sys.argv[2:]))
"""
STARVING = [
    pytest.param([*INVOICE, "--bundle", "new.zip"], 2_000, "new.zip", id="bundle"),
    pytest.param(
        ["report", "usage", "--by", "session", "--offline", "--output", "new.txt"], 300, "new.txt", id="table"
    ),
    pytest.param(["report", "cost", "--offline", "--format", "html", "--output", "new.html"], 300, "", id="page"),
    pytest.param(["report", "cost", "--offline", "--format", "focus-1.4", "--output", "new.csv"], 900, "", id="focus"),
    pytest.param(["report", "cost", "--offline", "--format", "parquet", "--output", "new.p"], 300, "", id="parquet"),
    pytest.param(["prices", "import", "dearer.toml", "--yes"], 50, "prices.toml", id="prices import"),
    pytest.param(["rate", "--book", "claude", "--yes"], 900, "archive", id="rate again"),
]


@pytest.mark.parametrize(("words", "bytes_max", "named"), STARVING)
def test_a_disk_that_is_full_leaves_what_there_was(
    folder: Path, tmp_path: Path, words: list[str], bytes_max: int, named: str
) -> None:
    """One line, which names what could not be written, and nothing half behind it."""
    (folder / "dearer.toml").write_text(BOOK.replace("input = 1", "input = 3"))
    (tmp_path / "scratch").mkdir()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    ran = subprocess.run([sys.executable, "-c", STARVED, str(bytes_max), *words], capture_output=True, text=True,
                         env=ENVIRONMENT | {"TMPDIR": str(tmp_path / "scratch")}, timeout=60, check=False)  # fmt: skip

    assert (1, 1) == (ran.returncode, ran.stderr.count("\n")), ran.stderr
    assert ran.stderr.startswith("meterlib: [Errno ")
    assert named in ran.stderr
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert [] == list((tmp_path / "scratch").iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("form", ["table", "csv", "parquet"])
def test_a_device_that_is_full_is_named(folder: Path, run: Run, form: str) -> None:
    """As a file would be, though nothing is made in its place."""
    ran = run("report", "usage", "--offline", "--format", form, "--output", "/dev/full")

    assert (1, "meterlib: [Errno 28] No space left on device: '/dev/full'\n") == (ran.code, ran.err)
    assert Path("/dev/full").is_char_device()
