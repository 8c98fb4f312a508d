"""What long commands show at a terminal while they work, and that nothing of it stays; and what Ctrl-C leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from meterlib import Usage
from meterlib.cli import main
from tests.billing.billed import ledger_of
from tests.billing.money import at_ms
from tests.billing.provider import Served, admin_usage
from tests.support.terminal import CTRL_C, ENVIRONMENT, AtTerminal, Screen

# Everything is shown at once, so that no test has to be slow to see it.
WATCHED = """
import sys
from meterlib.cli import main, progress
progress.PATIENCE_S, progress.TICK_S = -1, 3600
sys.exit(main(sys.argv[1:]))
"""
QUICK = WATCHED.replace("-1, 3600", "3600, 0.001")
INVOICE = ("report", "invoice", "--tenant", "acme", "--period", "2026-10")
SETTINGS = '[billing]\narchive = "archive"\nissuer = "Meters & Co"\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of two months and 600 entries more, rated, the first month closed; and a report of the provider."""
    folder = tmp_path_factory.mktemp("long")
    ledger = ledger_of(folder)
    for _ in range(600):
        ledger.call("acme", usage=Usage(input_tokens=1_000, output_tokens=10))
    ledger.rate()
    (folder / "meterlib.toml").write_text(SETTINGS)
    day_ms = at_ms("2026-10-01")
    served = [Served(day_ms + 1_000, {"input": 100, "output": 10}, model="claude-sonnet-5-5")]
    (folder / "usage.json").write_text(json.dumps(admin_usage(served, day_ms, day_ms + 86_400_000)))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        assert 0 == main([*INVOICE[:-1], "2026-11", "--bundle", "november.zip", "--output", "november.txt"])
        assert 0 == main(["export", "compact"])
    ledger.close()
    return folder


def seen(folder: Path, words: Sequence[str], code: str = WATCHED, term: str = "xterm") -> tuple[int, Screen, bytes]:
    """Exit code, screen and standard output of a command."""
    config = [] if words[0] == "verify" else ["--config", str(folder / "meterlib.toml")]
    with (folder / "out").open("wb") as out, AtTerminal(code, [*words, *config], out=out, TERM=term) as running:
        ended, screen = running.ended()
    return ended, screen, (folder / "out").read_bytes()


LONG = [
    pytest.param(["report", "usage"], ["going through 626 entries", "looking for what is missing"], id="usage"),
    pytest.param(["report", "cost", "--by", "tenant,day"], ["going through 626 entries"], id="cost"),
    pytest.param(["report", "limits"], ["going through 626 entries"], id="limits"),
    pytest.param(["report", "cost", "--format", "focus-1.4"], ["making FOCUS rows"], id="focus"),
    pytest.param(["report", "cost", "--format", "html"], ["drawing the page"], id="page"),
    pytest.param([*INVOICE, "--bundle", "invoice.zip"], ["gathering what the bundle needs"], id="bundle"),
    pytest.param(
        ["report", "reconcile", "--provider-file", "usage.json"],
        ["reading the provider's reports", "adding up our tokens", "looking for what explains"],
        id="reconcile",
    ),
    pytest.param(["close", "2026-10"], ["adding up 2026-10 again"], id="close"),
    pytest.param(["rate", "--book", "claude", "--dry-run"], ["rating entries again", "of 626"], id="rate"),
    pytest.param(["verify", "archive"], ["checking entries", "of 626"], id="verify"),
    pytest.param(["verify", "november.zip"], ["checking rows", "of 1,208"], id="verify a bundle"),
    pytest.param(["export", "compact"], ["joining files of shard 0"], id="compact"),
]


@pytest.mark.parametrize(("words", "phases"), LONG)
def test_long_commands_tell_what_they_are_at_and_leave_nothing_of_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], phases: list[str]
) -> None:
    """Whoever waits sees that something happens; the result is the same as without a terminal."""
    monkeypatch.chdir(folder)

    code, screen, out = seen(folder, words)

    shown = "\n".join(screen.ever)
    assert [phase for phase in phases if phase in shown] == phases, shown
    left = [line for line in screen.lines if line.strip()]
    assert (code, left, out) == _silent(folder, words)


def _silent(folder: Path, words: Sequence[str]) -> tuple[int, list[str], bytes]:
    """What a command says whose standard error is no terminal: exit code, what it says there, and its output."""
    config = [] if words[0] == "verify" else ["--config", "meterlib.toml"]
    ran = subprocess.run([sys.executable, "-c", WATCHED, *words, *config], cwd=folder, env=ENVIRONMENT,
                         capture_output=True, timeout=60, check=False)  # fmt: skip
    return ran.returncode, [line for line in ran.stderr.decode().splitlines() if line.strip()], ran.stdout


def test_what_is_over_at_once_shows_nothing(folder: Path) -> None:
    """A line that flickers up for a moment tells nobody anything."""
    code, screen, out = seen(folder, ["report", "usage"], QUICK)

    assert (0, [""], True) == (code, screen.lines, b"626 entries" in out)
    assert not [line for line in screen.ever if line]


def test_the_time_that_passes_is_shown_while_one_query_runs(folder: Path) -> None:
    """A command that says the same for a minute looks dead, unless seconds count up."""
    with (folder / "out").open("wb") as out, AtTerminal(ENDLESS, [str(folder)], out=out) as running:
        running.wait_for(r"going through 626 entries, \d+ s", times=3)
        running.press(CTRL_C)

        assert 130 == running.ended()[0]


def test_a_line_is_never_longer_than_the_terminal(folder: Path) -> None:
    """What was broken into two could not be wiped out."""
    config = ["--config", str(folder / "meterlib.toml")]
    with (
        (folder / "out").open("wb") as out,
        AtTerminal(WATCHED, ["report", "usage", *config], columns=20, out=out) as it,
    ):
        screen = it.ended()[1]

    assert [""] == screen.lines
    assert {len(line) for line in screen.ever} <= set(range(20))
    assert "going through 626 e" in screen.ever


def test_a_terminal_that_cannot_wipe_gets_no_progress(folder: Path) -> None:
    """An editor's shell window would be filled with it."""
    assert not [line for line in seen(folder, ["report", "usage"], WATCHED, "dumb")[1].ever if line]


def test_results_on_the_same_terminal_begin_on_a_line_of_their_own(folder: Path) -> None:
    """What was told meanwhile is wiped out before the first line of the report."""
    words = ["report", "usage", "--by", "tenant", "--config", str(folder / "meterlib.toml")]
    with AtTerminal(WATCHED, words) as running:
        code, screen = running.ended()

    assert 0 == code
    assert any("going through 626 entries" in line for line in screen.ever)
    assert not [line for line in screen.lines if "going through" in line or "looking for what is missing" in line]
    assert "tenant" in screen.lines[0]


# ── Ctrl-C ────────────────────────────────────────────────────────────────────────────────────────────────────────────

# A report whose query never ends, in DuckDB itself; its clock goes on by a second whenever it is read.
TAKES_LONG = """
import itertools, sys, time, types
from pathlib import Path
from meterlib.cli import main, progress, report_archive
progress.PATIENCE_S, progress.TICK_S = -1, 0.01
progress.time = types.SimpleNamespace(monotonic=itertools.count().__next__)
def report(reader, *_):
%s
report_archive.usage_report = report
folder = Path(sys.argv[1])
sys.exit(main(["report", "usage", "--output", str(folder / "never.txt"), "--config", str(folder / "meterlib.toml")]))
"""
# A part of the query for each of DuckDB's threads.
QUERY = """\
    each = [f"SELECT hash(a.range * b.range + {at}) h FROM range(9999999) a, range(9999999) b" for at in range(4)]
    reader.connection.execute(f"SELECT max(h) FROM ({' UNION ALL '.join(each)})").fetchall()
"""
ENDLESS = TAKES_LONG % QUERY
CLOSED = TAKES_LONG % "    reader.connection.close(); time.sleep(60)"


def test_ctrl_c_at_the_terminal_ends_a_query_that_runs(folder: Path, tmp_path: Path) -> None:
    """At once, with one line, and with nothing left of what was begun."""
    before = files(folder)
    with (tmp_path / "out").open("wb") as out, AtTerminal(ENDLESS, [str(folder)], out=out, TMPDIR=str(tmp_path)) as it:
        it.wait_for(r"going through 626 entries, \d+ s", times=50)  # when all threads of the query are at it
        it.press(CTRL_C)
        code, screen = it.ended()

    assert (130, ["meterlib: interrupted"]) == (code, [line.removeprefix("^C") for line in screen.lines if line])
    assert files(folder) == before
    assert ["out"] == [path.name for path in tmp_path.iterdir()]


def test_ctrl_c_behind_the_last_query_is_no_error(folder: Path, tmp_path: Path) -> None:
    """What was closed has nothing left to be interrupted."""
    with (tmp_path / "out").open("wb") as out, AtTerminal(CLOSED, [str(folder)], out=out, TMPDIR=str(tmp_path)) as it:
        it.wait_for(r"going through 626 entries, \d+ s", times=50)
        it.press(CTRL_C)
        code, screen = it.ended()

    assert (130, ["meterlib: interrupted"]) == (code, [line.removeprefix("^C") for line in screen.lines if line])


def files(folder: Path) -> dict[str, bytes]:
    """Every file below it, but for what tests write themselves."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != "out"}
