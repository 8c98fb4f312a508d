"""`meterlib prices`: what is in force, what differs, and how another book is put in force."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meterlib.billing.prices.files import parse_book
from meterlib.cli import main
from meterlib.cli.prices import HELP
from tests.billing.money import BOOK


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def configured(book: str | None = "prices.toml", fallback: str = "none") -> None:
    place = f'book = "{book}"\n' if book else ""
    Path("meterlib.toml").write_text(f'[billing]\n{place}fallback = "{fallback}"\n')


def test_show_tells_what_is_in_force_now(capsys: pytest.CaptureFixture[str]) -> None:
    """Without any set-up: the book that ships, its tiers, ways of service and what holds besides."""
    assert main(["prices", "show", "claude-haiku-*"]) == 0
    out = capsys.readouterr().out

    assert "claude-haiku-5-5  standard  > 100,000" in out
    assert "web search: 10 per 1,000 requests" in out
    assert "inference in us: token prices times 1.1" in out
    assert "opus" not in out


@pytest.mark.parametrize(("day", "cache_read"), [("2026-10-06", "0.2"), ("2026-10-07", "0.1")])
def test_show_looks_at_any_day(capsys: pytest.CaptureFixture[str], day: str, cache_read: str) -> None:
    """A bill of September is checked against September's prices."""
    assert main(["prices", "show", "claude-sonnet-5-5", "--at", day, "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["prices"]

    assert told["variants"]["standard"][0]["cache_read"] == cache_read
    assert (told["book"], told["geo"]) == ("book:claude", {"us": "1.1"})
    assert "pric" in told["source"]


def test_show_says_when_nobody_knows_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    """It is no error, and nobody takes it for free."""
    configured(book=None)
    assert main(["prices", "show", "claude-2"]) == 0
    assert "stays unpriced" in capsys.readouterr().out


def test_show_asks_the_fallback_for_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    """Of two thousand models only those that are named are shown, and by which package."""
    assert main(["prices", "show", "claude-2", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["prices"]
    assert told["book"].startswith("genai-prices/")
    assert main(["prices", "show", "gpt-5", "--provider", "openai", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["prices"]) == 1


def test_diff_shows_prices_and_days(capsys: pytest.CaptureFixture[str]) -> None:
    """What changed, from what to what, from when to when; nothing is said of what did not."""
    Path("old.toml").write_text(BOOK)
    Path("new.toml").write_text(BOOK.replace("output = 2\n", "output = 2.5\n"))
    assert main(["prices", "diff", "old.toml", "new.toml"]) == 0
    out = capsys.readouterr().out
    assert "2 -> 2.5" in out
    assert "2026-01-01" in out
    assert "1 price of 1 model" in out

    assert main(["prices", "diff", "old.toml", "old.toml"]) == 0
    assert capsys.readouterr().out == "the same prices\n"
    assert main(["prices", "diff", "claude", "old.toml", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["changes"] == []
    assert "anthropic/claude-opus-5" in told["only_old"]
    assert told["only_new"] == ["anthropic/old", "anthropic/plain", "anthropic/steep"]


def test_diff_with_a_smaller_book_names_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    """A book of one's own prices need not have every model: those are named, and not listed price by price."""
    Path("old.toml").write_text(BOOK)
    Path("new.toml").write_text(BOOK[: BOOK.index('[[model]]\nname = "steep"')])
    assert main(["prices", "diff", "old.toml", "new.toml"]) == 0
    assert capsys.readouterr().out == "the same prices\nonly in test: old, steep\n"


def test_import_writes_only_when_told_to(capsys: pytest.CaptureFixture[str]) -> None:
    """First the difference, then the book; the file is the very same, comments included."""
    configured()
    Path("new.toml").write_text("# by hand\n" + BOOK)
    assert main(["prices", "import", "new.toml"]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert not Path("prices.toml").exists()

    assert main(["prices", "import", "new.toml", "--yes"]) == 0
    assert "in force from now on" in capsys.readouterr().out
    assert Path("prices.toml").read_bytes() == Path("new.toml").read_bytes()
    assert sorted(path.name for path in Path().iterdir()) == ["meterlib.toml", "new.toml", "prices.toml"]

    assert main(["prices", "import", "new.toml", "--yes"]) == 0
    assert "the same prices" in capsys.readouterr().out
    assert main(["prices", "show", "plain", "--at", "2026-11-01"]) == 0
    assert "book:test" in capsys.readouterr().out


def test_a_book_that_is_not_acceptable_is_never_written(capsys: pytest.CaptureFixture[str]) -> None:
    """What is in force stays, and the error says file and place."""
    configured()
    Path("prices.toml").write_text(BOOK)
    Path("new.toml").write_text(BOOK.replace("output = 15", "outptu = 15"))

    assert main(["prices", "import", "new.toml", "--yes"]) == 2
    assert "model[0].price[0].outptu: there is no such setting; did you mean 'output'?" in capsys.readouterr().err
    assert Path("prices.toml").read_text() == BOOK


def test_a_book_in_force_that_is_broken_can_be_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    """Or else nobody could mend it this way."""
    configured()
    Path("prices.toml").write_text("name = 1")
    Path("new.toml").write_text(BOOK)

    assert main(["prices", "show"]) == 2
    assert main(["prices", "import", "new.toml", "--yes"]) == 0
    assert "the book in force is not acceptable" in capsys.readouterr().err
    assert Path("prices.toml").read_text() == BOOK


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["import", "new.toml"], "billing.book: is not set"),
        (["diff", "claude", "nowhere.toml"], "nowhere.toml cannot be read"),
        (["show", "--at", "yesterday"], "--at: 'yesterday' is no date"),
    ],
)
def test_wrong_usage_is_told_in_one_line(words: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With exit code 2, and nothing done."""
    Path("new.toml").write_text(BOOK)
    assert main(["prices", *words]) == 2
    assert problem in capsys.readouterr().err


def test_ones_own_book_is_not_called_as_the_one_that_ships(capsys: pytest.CaptureFixture[str]) -> None:
    """Rated rows name their book: two of one name could not be told apart."""
    configured()
    Path("new.toml").write_text(BOOK.replace('"test"', '"claude"'))
    assert main(["prices", "import", "new.toml", "--yes"]) == 2
    assert "give yours another name" in capsys.readouterr().err


def test_the_book_in_the_help_is_one() -> None:
    """Whoever copies it has a book."""
    lines = HELP.partition("tables of their own:\n")[2].partition("exit codes")[0].splitlines()
    book = parse_book("\n".join(line[2:].partition("   ")[0] for line in lines))
    assert book.find("anthropic", "claude-sonnet-5-5-20260928") is not None


@pytest.mark.parametrize("words", [["--help"], ["show", "--help"], ["diff", "--help"], ["import", "--help"]])
def test_help_has_examples_and_exit_codes(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """At each depth, and no wider than a terminal."""
    with pytest.raises(SystemExit) as left:
        main(["prices", *words])
    out = capsys.readouterr().out
    assert left.value.code == 0
    assert "examples:" in out
    assert "exit codes:" in out
    assert max(len(line) for line in out.splitlines()) <= 88
