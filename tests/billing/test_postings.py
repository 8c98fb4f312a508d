"""What archived entries cost is decided once, whoever rates them, whatever dies, and however prices change."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tracemalloc
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import meterlib
from meterlib import LedgerEntry
from meterlib.billing import duck
from meterlib.billing.archive import segments
from meterlib.billing.archive.archive import Archive
from meterlib.billing.postings import pieces
from meterlib.billing.postings.pieces import STORED, RatedFiles
from meterlib.billing.postings.postings import ENTRY_COLUMNS, Postings
from meterlib.billing.postings.rater import Rater, next_block
from meterlib.billing.rating.rating_sql import COLUMNS
from meterlib.billing.rating.rerating import compare
from meterlib.errors import IntegrityError
from tests.billing.exporting import LEDGER
from tests.billing.money import BOOK, at_ms, entries, tokens
from tests.billing.posting import DEARER, WIDER, Ledgers, amounts, as_rated, prices

ROOT = Path(meterlib.__file__).parent.parent
OCTOBER = at_ms("2026-10-10")


@pytest.fixture
def ledgers(tmp_path: Path) -> Ledgers:
    return Ledgers(tmp_path)


def some(ledgers: Ledgers, count: int, model: str = "plain") -> None:
    for _ in range(count):
        at = OCTOBER + len(ledgers.entries) * 1000
        ledgers.call(at, model, tokens(input_tokens=len(ledgers.entries) + 1, output_tokens=2))


# ── What rows there are ───────────────────────────────────────────────────────────────────────────────────────────────


def test_every_entry_is_rated_as_rate_does_it(ledgers: Ledgers) -> None:
    """Nothing is rated twice, and entries that used nothing have no rows."""
    some(ledgers, 5)
    ledgers.call(OCTOBER + 9000, kind="cancelled", usage={"input_tokens": 0})
    some(ledgers, 2, "steep")

    assert 8 == ledgers.rate().entries
    assert 0 == ledgers.rate().entries

    assert as_rated(ledgers.entries) == ledgers.rows()
    assert [] == ledgers.problems()
    some(ledgers, 3)
    assert 3 == ledgers.rate().entries
    assert as_rated(ledgers.entries) == ledgers.rows()


def test_an_archive_without_anything_has_relations_without_rows(ledgers: Ledgers) -> None:
    """Reports of a gateway that nobody used yet are empty, not broken."""
    assert [] == ledgers.query("SELECT * FROM rows")
    assert [] == ledgers.query("SELECT * FROM entries")
    some(ledgers, 1)
    ledgers.export()
    assert [] == ledgers.query("SELECT * FROM rows")
    assert [(1,)] == ledgers.query("SELECT count(*) FROM entries")
    with ledgers.archive() as archive:
        assert ({0: 0}, {0: 1}) == (Postings(archive).upto(), Postings(archive).unrated())


def test_relations_have_the_columns_that_reports_are_made_of(ledgers: Ledgers) -> None:
    """Whether or not there are files, re-ratings or closes."""
    wanted = [*STORED, "rating", "posted_at_ms", "period", "corrects"]
    for _ in range(2):
        with ledgers.archive() as archive:
            database = duck.connect()
            told = database.execute(f"DESCRIBE {Postings(archive).rows_sql()}").fetchall()
            assert set(wanted) == {row[0] for row in told}
            kinds = {row[0]: row[1] for row in told}
            assert COLUMNS == {name: kinds[name] for name in COLUMNS}
            told = database.execute(f"DESCRIBE {Postings(archive).entries_sql()}").fetchall()
            assert list(ENTRY_COLUMNS.items()) == [(row[0], row[1]) for row in told]
            database.close()
        some(ledgers, 2)
        ledgers.rate()
        ledgers.rate_again(DEARER)


def test_a_price_that_changes_within_a_month_holds_from_its_day_on(ledgers: Ledgers) -> None:
    """Each call costs what was in force when it was made, whenever it is rated."""
    ledgers.call("2026-10-06T23:59:59.999", usage=tokens(cache_read_input_tokens=1_000_000))
    ledgers.call("2026-10-07", usage=tokens(cache_read_input_tokens=1_000_000))

    ledgers.rate()

    assert ["0.2", "0.1"] == [f"{row.list_price:.1f}" for row in ledgers.rows()]


def test_what_was_rated_keeps_its_price_whatever_book_comes(ledgers: Ledgers) -> None:
    """A price book is for what comes; what was rated by another one stays, to the byte."""
    some(ledgers, 5)
    ledgers.rate()
    before = ledgers.rated_files()
    some(ledgers, 1)

    assert 1 == ledgers.rate(DEARER).entries

    assert before.items() <= ledgers.rated_files().items()
    expected = [*as_rated(ledgers.entries[:5]), *as_rated(ledgers.entries[5:], DEARER)]
    assert expected == ledgers.rows()


def test_compacting_the_archive_leaves_rated_rows_alone(ledgers: Ledgers) -> None:
    """They are of entries, not of files, and rating goes on in the middle of a joined one."""
    for _ in range(3):
        some(ledgers, 1)
        ledgers.rate()
    with ledgers.archive() as archive:
        assert archive.compact(0, pieces_max=1)
        before = ledgers.rated_files()
    some(ledgers, 3)
    ledgers.rate()

    assert [] == ledgers.problems()
    assert as_rated(ledgers.entries) == ledgers.rows()
    assert len(before) == 3
    assert 2 == len(ledgers.rated_files()), "pieces of a full block are joined"


def test_rated_pieces_are_joined_and_hold_the_same_rows(ledgers: Ledgers) -> None:
    """An exporter that runs every few seconds leaves no heap of files."""
    for count in (1, 2, 1, 1, 3, 1):
        some(ledgers, count)
        ledgers.rate(DEARER if count == 2 else BOOK)
        rows = ledgers.rows()
    with ledgers.archive() as archive:
        spans = [(file.segment.first, file.segment.last) for file in RatedFiles(archive).way(0)]
        made = [one for file in RatedFiles(archive).way(0) for one in RatedFiles(archive).facts(file).made]

    assert [(1, 4), (5, 8), (9, 9)] == spans
    assert [(1, 1), (2, 3), (4, 4), (5, 8), (9, 9)] == [(one.first, one.last) for one in made]
    assert 9 == len({row.n for row in rows})
    assert [] == ledgers.problems()


@pytest.mark.parametrize("texts", [(BOOK, WIDER), (WIDER, BOOK), (WIDER, DEARER, WIDER)])
def test_pieces_are_joined_of_which_only_some_know_a_price(ledgers: Ledgers, texts: tuple[str, ...]) -> None:
    """A model without a price gets one, or loses it: that none was known then is written down as prices are."""
    calls = []
    for text in texts:
        calls.append(ledgers.call("2025-06-01", "old"))
        ledgers.rate(text)
    for at in range(8 - len(calls)):
        ledgers.correction(calls[at % len(calls)], OCTOBER, {"output_tokens": 5, "input_tokens": -7})
        ledgers.rate(DEARER)

    with ledgers.archive() as archive:
        spans = [(file.segment.first, file.segment.last) for file in RatedFiles(archive).way(0)]
    assert [(1, 4), (5, 8)] == spans
    assert [] == ledgers.problems()
    assert [text == WIDER for text in texts] == [
        bool(row.unpriced) for row in ledgers.rows() if row.n <= len(texts) and row.token_type == "input"
    ]
    for call, text in zip(calls, texts, strict=True):
        mine = [row for row in ledgers.rows() if _number_of(row.n, ledgers) == call.n]
        assert {text == WIDER} == {bool(row.unpriced) for row in mine}


def _number_of(n: int, ledgers: Ledgers) -> int:
    adjusts = ledgers.entries[n - 1].adjusts
    return int(adjusts.partition(":")[2]) if adjusts else n


def test_memory_does_not_grow_with_what_is_not_rated(tmp_path: Path) -> None:
    """Operator: a week's backlog is rated by the machine that rates a minute's."""
    peaks = []
    for count in (2_000, 6_000):
        (tmp_path / str(count)).mkdir()
        ledgers = Ledgers(tmp_path / str(count), block=1000)
        some(ledgers, 1)
        ((_, fields),) = ledgers.client.xrange(LEDGER)
        with ledgers.client.pipeline(transaction=False) as pipeline:
            for n in range(2, count + 1):
                pipeline.xadd(LEDGER, fields, id=f"{n}-0")
            pipeline.execute()
        ledgers.export()
        with ledgers.archive() as archive, Rater(archive, prices()) as rater:
            tracemalloc.start()
            assert count == rater.rate(0).entries
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    assert peaks[1] < 1.3 * peaks[0]


# ── Corrections ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_correction_is_rated_with_the_call_that_it_corrects(ledgers: Ledgers) -> None:
    """Wherever that is in the archive: a prompt that turns out longer is in another tier, all of it."""
    call = ledgers.call(OCTOBER, "steep", tokens(input_tokens=90_000))
    some(ledgers, 6)
    ledgers.rate()
    first = ledgers.correction(call, OCTOBER + 90_000, {"input_tokens": 5_000})
    ledgers.rate()
    some(ledgers, 5)
    ledgers.correction(call, OCTOBER + 95_000, {"input_tokens": 10_000})
    ledgers.correction(first, OCTOBER + 96_000, {"input_tokens": -3_000})
    ledgers.rate()

    assert as_rated(ledgers.entries) == ledgers.rows()
    steep = [row for row in ledgers.rows() if row.model == "steep"]
    assert sum(row.quantity * row.list_price for row in steep if row.list_price) == 102_000 * steep[-1].list_price  # type: ignore[operator]
    assert f"{steep[-1].list_price:.1f}" == "0.5"
    assert [] == ledgers.problems()


def test_a_correction_of_a_correction_counts_for_those_that_come_after_it(ledgers: Ledgers) -> None:
    """Though they name the call and not it, and it is in another segment."""
    call = ledgers.call(OCTOBER, "steep", tokens(input_tokens=90_000))
    first = ledgers.correction(call, OCTOBER + 1000, {"input_tokens": 5_000})
    ledgers.correction(first, OCTOBER + 2000, {"input_tokens": 20_000})
    some(ledgers, 3)
    ledgers.correction(call, OCTOBER + 9000, {"input_tokens": -10_000})
    ledgers.rate()

    assert as_rated(ledgers.entries) == ledgers.rows()
    standing = sum(row.quantity * row.list_price for row in ledgers.rows("model = 'steep'") if row.list_price)
    assert standing == Decimal("0.5") * 105_000


def test_a_call_that_expired_and_turns_out_to_have_used_something_costs_that(ledgers: Ledgers) -> None:
    """The provider billed it, so an operator books it."""
    expired = ledgers.call(OCTOBER, kind="expired", usage={})
    ledgers.correction(expired, OCTOBER + 1000, {"input_tokens": 1_000_000})
    ledgers.rate()

    assert ["3.000000000000"] == [f"{row.list_cost}" for row in ledgers.rows()]
    ledgers.correction(expired, OCTOBER + 2000, {"input_tokens": -400_000})
    ledgers.rate()
    assert ["3.000000000000", "-1.200000000000"] == [f"{row.list_cost}" for row in ledgers.rows()]
    assert [] == ledgers.problems()


@pytest.mark.parametrize("again", [False, True])
def test_what_a_correction_takes_back_has_the_price_it_was_rated_at(ledgers: Ledgers, *, again: bool) -> None:
    """Whatever the book says by now: taken back in full, a call costs nothing, and keeps its price for the rest."""
    call = ledgers.call(OCTOBER, "plain", tokens(input_tokens=1_000_000), tenant="acme")
    ledgers.rate()
    if again:
        ledgers.rate_again(DEARER)
    ledgers.correction(call, OCTOBER + 1000, {"input_tokens": -400_000})
    ledgers.rate(BOOK if again else DEARER)
    standing = ledgers.totals()[0]
    ledgers.correction(call, OCTOBER + 2000, {"input_tokens": -600_000})
    ledgers.rate(BOOK if again else DEARER)

    assert Decimal("2.4" if again else "1.8") == standing
    assert [0, 0, 0, 0, 0] == list(ledgers.totals())
    assert [] == ledgers.problems()


def test_a_correction_of_a_call_without_a_price_has_none_either(ledgers: Ledgers) -> None:
    """Else a book that knows the model by then would take back money that was never billed."""
    today = WIDER.replace("valid_until = 2026-01-01\n", "")
    call = ledgers.call(OCTOBER, "new", tokens(input_tokens=1_000_000))
    ledgers.rate()
    ledgers.correction(call, OCTOBER + 1000, {"input_tokens": -400_000})
    ledgers.rate(today)

    assert [("", True), ("", True)] == [(row.currency, bool(row.unpriced)) for row in ledgers.rows()]
    ledgers.rate_again(today)
    assert Decimal("0.6") == ledgers.totals()[0]
    assert [] == ledgers.problems()


def test_a_correction_finds_prices_of_another_tier_in_the_book_of_its_call(ledgers: Ledgers) -> None:
    """Though no row of the call has them: what the book said of longer prompts was written down with its price."""
    call = ledgers.call(OCTOBER, "steep", tokens(input_tokens=90_000))
    ledgers.rate()
    dearer = BOOK.replace("input = 0.1\n", "input = 0.2\n").replace("input = 0.5\n", "input = 0.9\n")
    ledgers.correction(call, OCTOBER + 1000, {"input_tokens": 20_000})
    ledgers.rate(dearer)

    told = [(row.quantity, f"{row.list_price:.1f}", row.above) for row in ledgers.rows() if row.token_type == "input"]
    assert [(90_000, "0.1", 0), (110_000, "0.5", 100_000), (-90_000, "0.1", 0)] == told
    assert [] == ledgers.problems()


def test_a_correction_of_an_entry_that_is_lost_is_priced_as_booked(ledgers: Ledgers) -> None:
    """It is not dropped, and says what is doubtful about it."""
    call = ledgers.call(OCTOBER, "steep", tokens(input_tokens=90_000))
    ledgers.correction(msgspec.structs.replace(call, n=77), OCTOBER + 1000, {"input_tokens": 5_000})
    ledgers.correction(msgspec.structs.replace(call, tenant="globex"), OCTOBER + 1000, {"input_tokens": 1})
    ledgers.rate()

    assert ["", "tier_of_difference", "tier_of_difference"] == [row.flags for row in ledgers.rows()]
    assert [] == ledgers.problems()


# ── Whoever dies, whoever is first ────────────────────────────────────────────────────────────────────────────────────

# A rater that kills itself at a step.
KILLED = """
import os, signal, sys
from pathlib import Path
from meterlib.billing.postings import pieces, rater
from meterlib.cli import main

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def after(function):
    def wrapped(*arguments, **named):
        function(*arguments, **named)
        die()
    return wrapped

step = sys.argv[1]
if step == "before the rating":
    rater.stage_block = die
elif step == "after the rating":
    rater.stage_block = after(rater.stage_block)
elif step == "after the write":
    pieces.synced_digest = die
elif step == "after the sync":
    pieces._renamed = die
elif step == "after the rename":
    pieces._renamed = after(pieces._renamed)
elif step == "after the folder's sync":
    pieces.RatedFiles.put = after(pieces.RatedFiles.put)
elif step == "before the joined file":
    pieces.publish = die
elif step == "after the joined file":
    pieces.publish = after(pieces.publish)
elif step == "while pieces are removed":
    unlink = Path.unlink
    def unlink_one_piece(path, *arguments, **named):
        unlink(path, *arguments, **named)
        if "rated" in path.parts and ".work-" not in str(path):
            die()
    Path.unlink = unlink_one_piece
sys.exit(main(["rate", *sys.argv[2:]]))
"""
EARLY = ("before the rating", "after the rating", "after the write", "after the sync")
STEPS = (
    *EARLY,
    "after the rename",
    "after the folder's sync",
    "before the joined file",
    "after the joined file",
    "while pieces are removed",
)
SETTINGS = """\
[store]
shards = 1
[billing]
archive = "archive"
segment_entries = 4
book = "{book}.toml"
fallback = "none"
upstream_discount = "7%"
[[tenant]]
name = "acme"
discount = "12.5%"
markup = "3%"
platform_fee = "5%"
"""


def settings_with(ledgers: Ledgers, name: str, text: str) -> Path:
    folder = ledgers.path.parent
    (folder / f"{name}.toml").write_text(text)
    file = folder / f"settings-{name}.toml"
    file.write_text(SETTINGS.format(book=name))
    return file


def program(step: str, file: Path) -> list[str]:
    return [sys.executable, "-c", KILLED, step, "--config", str(file)]


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_rater_loses_and_doubles_nothing(ledgers: Ledgers, step: str) -> None:
    """kill -9 at any step: what stands is whole, and the next run ends at the same rows."""
    some(ledgers, 2)
    ledgers.rate()
    some(ledgers, 9)
    ledgers.export()
    file = settings_with(ledgers, "test", BOOK)

    assert -9 == subprocess.run(program(step, file), cwd=ROOT, capture_output=True, check=False, timeout=60).returncode

    assert [*ledgers.path.glob(".work-*")]
    rated = {row.n for row in ledgers.rows()}
    assert [*range(1, len(rated) + 1)] == sorted(rated)
    assert (len(rated) == 2) == (step in EARLY)
    assert [] == ledgers.problems()
    ledgers.rate()
    assert not [*ledgers.path.glob(".work-*")]
    assert as_rated(ledgers.entries) == ledgers.rows()
    assert [] == ledgers.problems()
    assert 3 == len(ledgers.rated_files())


def test_two_rater_processes_with_two_books_give_each_entry_one_price(ledgers: Ledgers) -> None:
    """Both may go on to the end; whoever is first with a block decides, and both ends are well."""
    some(ledgers, 41)
    ledgers.export()
    files = [settings_with(ledgers, "test", BOOK), settings_with(ledgers, "dearer", DEARER)]

    both = [subprocess.Popen(program("never", file), cwd=ROOT, stdout=subprocess.DEVNULL) for file in files]

    assert [0, 0] == [one.wait(60) for one in both]
    ways = {n: [] for n in range(1, 42)}  # type: dict[int, list[Any]]
    for row in ledgers.rows():
        ways[row.n].append(row)
    for one in ledgers.entries:
        assert ways[one.n] in (as_rated([one]), as_rated([one], DEARER))
    assert [] == ledgers.problems()


def test_a_rater_that_comes_second_goes_on_behind_the_first(ledgers: Ledgers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two had rated the same entries, one further than the other: one result stands, nothing is left of the other."""
    some(ledgers, 2)
    ledgers.export()
    put = RatedFiles.put

    def put_late(files: RatedFiles, database: Any, facts: Any) -> bool:
        monkeypatch.setattr(RatedFiles, "put", put)
        some(ledgers, 5)
        assert 7 == ledgers.rate(DEARER).entries
        return put(files, database, facts)

    monkeypatch.setattr(RatedFiles, "put", put_late)
    with ledgers.archive() as archive, Rater(archive, prices()) as rater:
        assert 0 == rater.rate(0).entries

    assert as_rated(ledgers.entries, DEARER) == ledgers.rows()
    assert [] == ledgers.problems()


def test_a_rater_that_slept_while_its_piece_was_rated_joined_and_removed_changes_nothing(
    ledgers: Ledgers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is free again, but what comes under it is passed by, and goes with the next joining."""
    some(ledgers, 2)
    ledgers.export()
    put = RatedFiles.put

    def put_late(files: RatedFiles, database: Any, facts: Any) -> bool:
        monkeypatch.setattr(RatedFiles, "put", put)
        ledgers.rate(DEARER)
        some(ledgers, 2)
        ledgers.rate(DEARER)
        assert 1 == len(ledgers.rated_files())
        taken = put(files, database, facts)
        assert 2 == len(ledgers.rated_files())
        assert as_rated(ledgers.entries, DEARER) == ledgers.rows()
        return taken

    monkeypatch.setattr(RatedFiles, "put", put_late)
    with ledgers.archive() as archive, Rater(archive, prices()) as rater:
        rater.rate(0)

    assert as_rated(ledgers.entries, DEARER) == ledgers.rows()
    assert 1 == len(ledgers.rated_files())
    assert [] == ledgers.problems()


def test_a_disk_that_fails_leaves_whole_files(ledgers: Ledgers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever sync fails: nothing half stands, and the next run goes on."""
    some(ledgers, 6)
    ledgers.export()
    synced = segments.synced_digest
    calls: list[Path] = []

    def fails_second(file: Path) -> str:
        calls.append(file)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return synced(file)

    monkeypatch.setattr(pieces, "synced_digest", fails_second)
    with ledgers.archive() as archive, Rater(archive, prices()) as rater, pytest.raises(OSError, match="Input/output"):
        rater.rate(0)

    assert {1, 2, 3, 4} == {row.n for row in ledgers.rows()}
    ledgers.rate()
    assert as_rated(ledgers.entries) == ledgers.rows()


def test_a_missing_file_of_rated_rows_is_named_and_stops_what_would_go_on(ledgers: Ledgers) -> None:
    """Nothing is rated anew where rows went missing."""
    some(ledgers, 10)
    ledgers.rate()
    with ledgers.archive() as archive:
        first, second, _ = RatedFiles(archive).way(0)
        kept = second.path.read_bytes()
        second.path.unlink()
        some(ledgers, 1)
        ledgers.export()
        with pytest.raises(IntegrityError, match=r"rated rows up to entry 0:8: it is missing"):
            next_block(Archive(ledgers.path, 4), RatedFiles(archive), 0)
        second.path.write_bytes(kept)
        first.path.unlink()
        with pytest.raises(IntegrityError, match=r"rated rows up to entry 0:4: it is missing"):
            Postings(archive)
    assert ledgers.problems()


# ── Any history ───────────────────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def histories(draw: st.DrawFn) -> list[Any]:
    """Entries in bursts, corrections of any of them so far, and what is done in between, by which book."""
    steps: list[Any] = []
    count = 0
    for _ in range(draw(st.integers(1, 4))):
        burst = draw(st.lists(entries(), min_size=1, max_size=5))
        count += len(burst)
        steps.append(("book", burst))
        for _ in range(draw(st.integers(0, 2))):
            change = {"input_tokens": draw(st.integers(-3, 120_000)), "output_tokens": draw(st.integers(-2, 5))}
            steps.append(("correct", draw(st.integers(1, count)), change))
            count += 1
        steps.append((draw(st.sampled_from(["rate", "rate", "again"])), draw(st.sampled_from([BOOK, DEARER, WIDER]))))
    return steps


def correct(ledgers: Ledgers, at: int, n: int, change: dict[str, Any]) -> None:
    ledgers.correction(ledgers.entries[n - 1], at, change)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(histories())
def test_the_sum_of_the_rows_is_that_of_the_entries_whatever_was_done(history: list[Any]) -> None:
    """Rated in pieces by several books, corrected at the prices that calls have, and all again by the last book."""
    with tempfile.TemporaryDirectory() as folder:
        ledgers = Ledgers(Path(folder))
        at = OCTOBER
        pinned: list[LedgerEntry] = []
        expected: list[Any] = []
        texts: dict[int, str] = {}
        again = False
        for word, *what in history:
            at += 10_000
            if word == "book":
                ledgers.add(msgspec.structs.replace(one, booked_at=at) for one in what[0])
            elif word == "correct":
                correct(ledgers, at, *what)
            elif word == "rate":
                ledgers.rate(*what)
                new = {one.n for one in ledgers.entries[len(pinned) :]}
                texts |= dict.fromkeys(new, what[0])
                expected += [row for row in as_rated(ledgers.entries, what[0], expected, texts) if row.n in new]
                pinned = list(ledgers.entries)
            else:
                again = bool(ledgers.rate_again(*what)) or again
        if not again:
            assert expected == ledgers.rows()
        ledgers.rate()
        ledgers.rate_again(WIDER)

        assert amounts(as_rated(ledgers.entries, WIDER)) == ledgers.totals()
        assert 0 == ledgers.rate_again(WIDER)
        assert [] == ledgers.problems()


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(entries(), min_size=1, max_size=8), st.lists(st.sampled_from([DEARER, WIDER, BOOK]), max_size=2))
def test_re_ratings_post_what_the_comparison_of_rows_says(several: list[LedgerEntry], books: list[str]) -> None:
    """The relation and the plain function make the same rows."""
    with tempfile.TemporaryDirectory() as folder:
        ledgers = Ledgers(Path(folder))
        ledgers.add(msgspec.structs.replace(one, booked_at=OCTOBER) for one in several)
        ledgers.rate()
        number = 0
        for text in books:
            before = ledgers.rows()
            deltas = compare(before, as_rated(ledgers.entries, text), number + 1)
            wanted = sorted((row for delta in deltas for row in delta.rows), key=lambda row: (row.n, row.line))
            assert len(wanted) == ledgers.rate_again(text)
            number += bool(wanted)
            if wanted:
                assert wanted == ledgers.rows(f"rating = {number}")
