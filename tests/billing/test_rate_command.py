"""`meterlib rate`: what it prints and posts, and what it leaves alone."""

from __future__ import annotations

import json
import sys
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from meterlib.billing.postings import reratings
from meterlib.billing.postings.reposts import Manifest, encoded
from meterlib.billing.postings.reratings import Rerating
from meterlib.config import Config
from meterlib.errors import PolicyError
from tests.billing.money import BOOK, at_ms, tokens
from tests.billing.posting import DEARER, WIDER, Ledgers, amounts, as_rated, prices
from tests.support.commands import Run, runner

SETTINGS = """\
[store]
url = "memory://"
shards = 1
[billing]
archive = "archive"
segment_entries = 4
book = "test.toml"
fallback = "none"
upstream_discount = "7%"
[[tenant]]
name = "acme"
discount = "12.5%"
markup = "3%"
platform_fee = "5%"
"""
MTOK = tokens(input_tokens=1_000_000)


@pytest.fixture
def ledgers(tmp_path: Path) -> Ledgers:
    ledgers = Ledgers(tmp_path)
    ledgers.settings.write_text(SETTINGS)
    for name, text in [("test", BOOK), ("dearer", DEARER), ("wider", WIDER)]:
        (tmp_path / f"{name}.toml").write_text(text)
    return ledgers


@pytest.fixture
def run(ledgers: Ledgers, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `meterlib rate` with the settings of this test."""
    return partial(runner(capsys, ledgers.settings), "rate")


def book(ledgers: Ledgers, name: str) -> str:
    return str(ledgers.path.parent / f"{name}.toml")


def test_what_is_archived_is_rated_once(ledgers: Ledgers, run: Run) -> None:
    """By the settings: prices, and each tenant's terms."""
    for day in range(1, 8):
        ledgers.call(f"2026-10-0{day}")
    ledgers.call("2026-10-09", "nobody's")
    ledgers.export()

    assert (0, "rated 8 entries; rows without a price: nobody's (1)\n", "") == run()

    assert as_rated(ledgers.entries) == ledgers.rows()
    assert {"archive": str(ledgers.path), "rated": 0, "unpriced": {}} == run("--json").json
    assert "rated 0 entries\n" == run().out


def test_the_difference_is_shown_before_anything_is_posted(ledgers: Ledgers, run: Run) -> None:
    """By model, and in all; nothing is written without a yes."""
    ledgers.call("2025-10-09", "new", MTOK)
    ledgers.call("2026-10-09", usage=MTOK)
    ledgers.call("2026-10-09", "steep", MTOK)
    ledgers.rate()
    before = ledgers.files()

    for words in ((), ("--dry-run",)):
        shown = run("--book", book(ledgers, "wider"), *words)
        assert 0 == shown.code
        assert ["new", "USD", "1", "1", "0"] in [line.split()[:5] for line in shown.out.splitlines()]
        assert ["plain", "USD", "1", "0", "0", "+1", "+0.90125", "+0.93"] in [
            line.split() for line in shown.out.splitlines()
        ]
        assert "steep" not in shown.out
        assert "nothing was posted" in shown.out
    document = run("--book", book(ledgers, "wider"), "--json").json

    assert (None, ["new", "plain"]) == (document["posted"], [model["model"] for model in document["models"]])
    assert {"currency": "USD", "list_cost": "1", "contracted_cost": "0.90125", "billed_cost": "0.90125"}.items() <= (
        document["models"][1]["costs"][0].items()
    )
    assert before == ledgers.files()


def test_what_was_unpriced_is_priced_by_a_book_that_knows_it(ledgers: Ledgers, run: Run) -> None:
    """A model that came out before the book knew it: its usage was kept, and gets its price."""
    ledgers.call("2025-12-09", "new", MTOK)
    ledgers.rate()
    assert [True] == [row.unpriced != "" for row in ledgers.rows()]

    ran = run("--book", book(ledgers, "wider"), "--yes")

    assert (0, "posted 2 rows as re-rating 1") == (ran.code, ran.out.splitlines()[-1])
    first, posted, taken = ledgers.rows()
    assert (-first.quantity, -1, first.line) == (taken.quantity, taken.posting, taken.reverses)
    assert (Decimal(1), "", 1) == (posted.list_cost, posted.unpriced, posted.posting)
    assert [] == ledgers.problems()


def test_the_same_book_again_has_nothing_to_do(ledgers: Ledgers, run: Run) -> None:
    """What was posted stands, and rating by the first book takes it back."""
    for day in range(1, 8):
        ledgers.call(f"2026-10-0{day}")
    ledgers.rate()
    words = ("--book", book(ledgers, "dearer"), "--yes")
    assert "posted 14 rows as re-rating 1" in run(*words).out
    before = ledgers.files()

    assert (0, "nothing changes: all that was rated costs the same by these prices\n", "") == run(*words)

    assert before == ledgers.files()
    assert "posted 14 rows as re-rating 2" in run("--book", book(ledgers, "test"), "--yes").out
    assert [(0, 7), (1, 0), (2, 0)] == ledgers.query("SELECT rating, sum(posting) FROM rows GROUP BY ALL ORDER BY ALL")
    assert [] == ledgers.problems()


def test_only_calls_of_a_time_are_rated_again(ledgers: Ledgers, run: Run) -> None:
    """Half-open: the first moment counts, the last does not."""
    for day in (8, 9, 10, 11):
        ledgers.call(f"2026-10-{day:02}")
    ledgers.rate()

    run("--book", book(ledgers, "dearer"), "--since", "2026-10-09", "--until", "2026-10-11", "--yes")

    assert [(2,), (3,)] == ledgers.query("SELECT DISTINCT n FROM rows WHERE rating = 1 ORDER BY n")
    assert 0 == ledgers.rate_again(DEARER, since_ms=at_ms("2026-10-09"), until_ms=at_ms("2026-10-11"))
    assert [] == ledgers.problems()


def test_the_book_that_comes_with_meterlib_can_be_named(ledgers: Ledgers, run: Run) -> None:
    """It alone, then."""
    ledgers.call("2026-10-09", "claude-sonnet-4-5", MTOK)
    ledgers.rate()

    (model,) = run("--book", "claude", "--json", "--yes").json["models"]

    assert ("claude-sonnet-4-5", 1) == (model["model"], model["priced"])
    assert ["book:claude"] == [row.price_source for row in ledgers.rows("rating = 1 AND posting = 1")]


@pytest.mark.parametrize(("answer", "posted"), [("y", 1), ("Y ", 1), ("n", 0), ("", 0), (EOFError(), 0)])
def test_on_a_terminal_it_asks(
    ledgers: Ledgers, run: Run, monkeypatch: pytest.MonkeyPatch, answer: Any, posted: int
) -> None:
    """Nothing is posted but by a yes."""
    ledgers.call("2026-10-09")
    ledgers.rate()
    asked: list[str] = []

    def told(question: str) -> str:
        asked.append(question)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr("builtins.input", told)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run("--book", book(ledgers, "dearer"))

    assert ["post 2 rows as re-rating 1? [y/N] "] == asked
    assert [(posted,)] == ledgers.query("SELECT max(rating) FROM rows")


def test_of_two_re_ratings_at_once_one_is_posted(ledgers: Ledgers, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other was worked out against what stands no more: its owner is told to look again."""
    ledgers.call("2026-10-09")
    ledgers.rate()
    post = Rerating.post

    def post_late(rerating: Rerating, now_ms: int) -> int:
        monkeypatch.setattr(Rerating, "post", post)
        ledgers.rate_again(WIDER)
        return post(rerating, now_ms)

    monkeypatch.setattr(Rerating, "post", post_late)

    ran = run("--book", book(ledgers, "dearer"), "--yes")

    assert (1, "meterlib: another re-rating was posted meanwhile: look at the difference anew\n") == (ran.code, ran.err)
    assert [("a book",)] == [(manifest["book"],) for manifest in manifests(ledgers)]
    assert "nothing changes" in run("--book", book(ledgers, "dearer"), "--yes").out
    assert [] == ledgers.problems()


def test_who_posts_is_told_of_what_was_rated_in_the_last_moment(
    ledgers: Ledgers, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has other prices than what was posted."""
    ledgers.call("2026-10-09")
    ledgers.rate()

    def meanwhile(manifest: Manifest) -> bytes:
        ledgers.call("2026-10-10")
        ledgers.rate()
        return encoded(manifest)

    monkeypatch.setattr(reratings, "encoded", meanwhile)

    ran = run("--book", book(ledgers, "dearer"), "--yes")

    assert 0 == ran.code
    assert "meterlib: 1 entry was rated by the prices before, in the moment before this was posted" in ran.err
    assert amounts(as_rated(ledgers.entries, DEARER)) != ledgers.totals()
    monkeypatch.undo()
    assert not run("--book", book(ledgers, "dearer"), "--yes").err
    assert amounts(as_rated(ledgers.entries, DEARER)) == ledgers.totals()


def manifests(ledgers: Ledgers) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(ledgers.path.glob("rated/rating-*/manifest.json"))]


def test_what_is_rated_or_joined_meanwhile_does_no_harm(ledgers: Ledgers) -> None:
    """A re-rating may take an hour; exports go on, and join files under its hands."""
    for day in (8, 9, 10):
        ledgers.call(f"2026-10-{day:02}")
        ledgers.rate()
    with ledgers.archive() as archive, Rerating(archive, prices(DEARER), "a book") as rerating:
        going_on = [True]

        def meanwhile(count: int) -> None:
            if going_on.pop():
                ledgers.call("2026-10-11")
                ledgers.rate()
                ledgers.call("2026-10-12")
                ledgers.rate()
            going_on.append(False)

        rerating.work_out(meanwhile)
        assert 1 == rerating.post(1_900_000_000_000)

    assert [(n,) for n in range(1, 6)] == ledgers.query("SELECT DISTINCT n FROM rows WHERE rating = 1 ORDER BY n")
    assert amounts(as_rated(ledgers.entries, DEARER)) == ledgers.totals()
    assert 0 == ledgers.rate_again(DEARER)
    assert [] == ledgers.problems()


def test_a_re_rating_that_is_not_posted_leaves_nothing(ledgers: Ledgers) -> None:
    """Whatever stops it."""
    ledgers.call("2026-10-09")
    ledgers.rate()
    before = ledgers.files()

    def interrupted() -> None:
        with ledgers.archive() as archive, Rerating(archive, prices(DEARER), "a book") as rerating:
            rerating.work_out()
            assert rerating.rows
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert before == ledgers.files()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--yes",), "--yes: goes with --book"),
        (("--since", "2026-10-01"), "--since: goes with --book"),
        (("--dry-run",), "--dry-run: goes with --book"),
        (("--book", "nowhere.toml"), "nowhere.toml cannot be read"),
        (("--book", "claude", "--since", "yesterday"), "--since"),
        (("--archive", "nowhere"), "--archive: there is no archive nowhere"),
    ],
)
def test_words_that_make_no_sense_are_refused(ledgers: Ledgers, run: Run, words: tuple[str, ...], told: str) -> None:
    """With what to do, and before anything is done."""
    ledgers.call("2026-10-09")
    ledgers.export()

    ran = run(*words)

    assert 2 == ran.code
    assert told in ran.err
    assert {} == ledgers.rated_files()


def test_a_book_that_is_not_acceptable_rates_nothing(ledgers: Ledgers, run: Run) -> None:
    """The setting is named."""
    ledgers.call("2026-10-09")
    ledgers.export()
    Path(book(ledgers, "test")).write_text("name = 3")

    assert 2 == run().code

    assert {} == ledgers.rated_files()


def test_the_zone_of_periods_is_checked(tmp_path: Path) -> None:
    """When the file is read, with its place."""
    file = tmp_path / "meterlib.toml"
    file.write_text('[billing]\ntz = "Europe/Bonn"\n')

    with pytest.raises(PolicyError, match="is no IANA time zone") as caught:
        Config.load(file)

    assert "billing.tz" == caught.value.path
