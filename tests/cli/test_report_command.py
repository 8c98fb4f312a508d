"""`meterlib report usage | cost | invoice | limits`: what they print, of an archive that an export has made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pytest

from meterlib import Usage
from tests.billing.exporting import LEDGER, Books
from tests.billing.money import BOOK, at_ms
from tests.support.commands import Run, runner
from tests.support.servers import Server

CALL = {"provider": "anthropic", "model": "plain"}


@pytest.fixture
def books(valkey: Server, tmp_path: Path) -> Iterator[Books]:
    with valkey.client() as client:
        client.flushall()
        books = Books(tmp_path, client, valkey.url)
        settings = (
            'book = "book.toml"\nfallback = "none"\ntz = "Europe/Berlin"\nissuer = "Meters & Co"\nmarkup = "10%"\n'
        )
        with books.settings.open("a") as file:
            file.write(settings)
        (tmp_path / "book.toml").write_text(BOOK)
        books.clock.set(at_ms("2026-10-10T12:00"))
        yield books
        books.close()


@pytest.fixture
def run(books: Books, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command with the settings of this test."""
    return runner(capsys, books.settings)


def record(books: Books, tenant: str = "acme", model: str = "plain", at: str | None = None, **told: Any) -> None:
    """An entry that was booked at this time."""
    if at is not None:
        books.clock.set(at_ms(at))
    number = books.client.xlen(LEDGER)
    tokens = {"input_tokens": 1_000_000, "output_tokens": 0} | told.pop("usage", {})
    attributes = CALL | {"model": model} | told.pop("attributes", {})
    books.meter.record(tenant, attributes, Usage(**tokens), record_id=f"r{number}", **told)


# ── Usage and cost ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_usage_from_the_archive_is_what_the_store_says(books: Books, run: Run) -> None:
    """Entries of every kind, with passes of other models, give the same sums; only the names of models differ."""
    books.book_all_kinds()
    run("export", "run")

    live = run("report", "--by", "tenant,kind,funding,quality,day", "--json").json
    archived = run("report", "usage", "--by", "tenant,kind,funding,quality,day", "--tz", "UTC", "--json").json

    unsplit = "unsplit_cache_creation_input_tokens"
    assert live["rows"] == [{name: row[name] for name in row if name != unsplit} for row in archived["rows"]]
    assert live["total"] == {name: amount for name, amount in archived["total"].items() if name != unsplit}
    assert live == run("report", "usage", "--live", "--by", "tenant,kind,funding,quality,day", "--json").json


def test_costs_add_up_by_tenant_and_model(books: Books, run: Run) -> None:
    """List, contracted, billed, upstream and margin, exact; decimals are text in JSON."""
    record(books)
    record(books, usage={"output_tokens": 1})
    record(books, "globex", "steep", funding="own")
    run("export", "run")

    table, document = run("report", "cost"), run("report", "cost", "--json").json

    acme, globex = document["rows"]
    assert {"tenant": "acme", "model": "plain", "currency": "USD", "list_cost": "6.000015",
            "contracted_cost": "6.6000165", "billed_cost": "6.6000165", "upstream_cost": "6.000015",
            "margin": "0.6000015", "unpriced": 0} == acme  # fmt: skip
    assert ("0.5", "0") == (globex["list_cost"], globex["billed_cost"])
    assert ["6.500015", "6.6000165"] == [document["totals"][0][name] for name in ("list_cost", "billed_cost")]
    assert document["totals"][0]["at_least"] is False
    assert "cost in USD, by tenant, model (Europe/Berlin)" in table.out
    assert ["acme", "plain", "6.000015", "6.6000165", "6.6000165", "6.000015", "0.6000015"] in [
        line.split() for line in table.out.splitlines()
    ]


def test_what_has_no_price_makes_a_total_a_floor(books: Books, run: Run) -> None:
    """The table says at least, JSON and CSV leave out what nobody knows, and --strict exits with 3."""
    record(books)
    record(books, model="nobody-knows")
    run("export", "run")

    table, document = run("report", "cost", "--strict"), run("report", "cost", "--json").json
    cells = run("report", "cost", "--by", "model", "--format", "csv").cells

    assert 3 == table.code
    assert "at least 3.00" in table.out
    assert "UNPRICED: 1 line has no price, so costs are at least what is said" in table.out
    assert [None, "3"] == [row["list_cost"] for row in document["rows"]]
    assert (True, 1) == (document["completeness"]["complete"], document["completeness"]["unpriced"])
    assert ["nobody-knows", "USD", "", "", "", "", "", "1"] == cells[1]
    assert [True] == [total["at_least"] for total in document["totals"]]
    assert 0 == run("report", "cost", "--strict", "--until", "2026-10-01").code
    assert 0 == run("report", "usage", "--strict").code, "usage needs no price"


def test_groups_may_be_repeated_or_listed(books: Books, run: Run) -> None:
    """`--by a --by b` and `--by a,b` are the same."""
    record(books, attributes={"team": "red"})
    run("export", "run")

    listed = run("report", "usage", "--by", "tenant,team,token_type", "--json").json
    repeated = run("report", "usage", "--by", "tenant", "--by", "team", "--by", "token_type", "--json").json

    assert listed == repeated
    assert [{"tenant": "acme", "team": "red", "token_type": "input", "quantity": 1_000_000}] == listed["rows"]


def test_cells_of_csv_are_nothing_that_a_spreadsheet_runs(books: Books, run: Run) -> None:
    """Names come from callers; numbers stay numbers, with all their digits."""
    odd = ["=1+1", "+1", "-1", "@SUM(A1)", "fine", 'a"b,c', "ü≠"]
    for team in odd:
        record(books, attributes={"team": team}, model=team, usage={"input_tokens": 1})
    run("export", "run")

    usage = run("report", "usage", "--by", "team", "--format", "csv")
    cost = run("report", "cost", "--by", "model", "--format", "csv")
    invoice = run("report", "invoice", "--tenant", "acme", "--period", "2026-10", "--format", "csv")

    for ran, column in ((usage, 0), (cost, 0), (invoice, 3)):
        texts = [row[column] for row in ran.cells[1:]]
        assert "'=1+1" in texts
        assert not [text for text in texts if text.startswith(("=", "+", "-", "@"))]
    assert {*odd} == {row[0].removeprefix("'") for row in usage.cells[1:]}
    assert "complete: 7 entries" in usage.err


def test_numbers_that_a_double_cannot_hold_are_text_in_json(books: Books, run: Run) -> None:
    """Counts are numbers as long as nobody loses a digit."""
    for _ in range(2):
        record(books, usage={"input_tokens": 2**53 - 1})
    run("export", "run")

    document = run("report", "usage", "--by", "tenant", "--json").json

    assert (2, str(2**54 - 2)) == tuple(document["total"][name] for name in ("calls", "input_tokens"))


def test_every_line_of_jsonl_is_an_object_and_the_last_says_what_was_read(books: Books, run: Run) -> None:
    """Rows first, then the totals, then the completeness."""
    record(books)
    record(books, "globex")
    run("export", "run")

    lines = [json.loads(line) for line in run("report", "cost", "--by", "tenant", "--format", "jsonl").out.splitlines()]

    assert ["acme", "globex"] == [line["tenant"] for line in lines[:2]]
    assert "6" == lines[2]["totals"][0]["list_cost"]
    assert 2 == lines[3]["completeness"]["entries"]
    assert 4 == len(lines)


def test_parquet_has_exact_types_and_its_footer_inside(books: Books, run: Run, tmp_path: Path) -> None:
    """The completeness is in the metadata, under `meterlib`."""
    record(books)
    run("export", "run")
    file = tmp_path / "cost's.parquet"

    ran = run("report", "cost", "--by", "day", "--format", "parquet", "--output", str(file))

    assert (0, "") == ran[:2]
    relation = str(file).replace("'", "''")
    with duckdb.connect() as database:
        rows = database.execute(f"SELECT day, list_cost FROM '{relation}'").fetchall()
        asked = f"SELECT value FROM parquet_kv_metadata('{relation}') WHERE key = 'meterlib'"
        ((told,),) = database.execute(asked).fetchall()
    assert [("2026-10-10", Decimal(3))] == rows
    assert 1 == json.loads(told)["completeness"]["entries"]
    assert [file.name] == [one.name for one in tmp_path.iterdir() if "cost" in one.name], "nothing temporary is left"


def test_focus_and_the_page_are_made_of_the_same_rows(books: Books, run: Run, tmp_path: Path) -> None:
    """With the option, and what has no price makes --strict exit with 3 there too."""
    record(books, at="2026-10-10T12:00")
    run("export", "run")

    for version in ("1.2", "1.3", "1.4"):
        (heading, row) = run("report", "cost", "--period", "2026-10", "--format", f"focus-{version}").cells
        assert Decimal("3.3") == Decimal(row[heading.index("BilledCost")])
    assert "complete: 1 entry" in run("report", "cost", "--format", "focus-1.2").err
    assert 0 == run("report", "cost", "--format", "html", "--output", str(tmp_path / "page.html")).code
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!DOCTYPE html>") or page.lower().startswith("<!doctype html>")
    assert "complete: 1 entry" in page
    record(books, model="nobody-knows")
    run("export", "run")
    assert 3 == run("report", "cost", "--format", "html", "--strict").code
    assert 3 == run("report", "cost", "--format", "focus-1.4", "--strict").code


# ── Completeness ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_last_lines_say_what_was_read(books: Books, run: Run) -> None:
    """Ranges, what is not exported, and the digest."""
    for _ in range(3):
        record(books)
    run("export", "run")
    held = books.meter.reserve("acme", CALL)

    lines = run("report", "usage").out

    assert "complete: 3 entries of shard 0, no gap" in lines
    assert "entries by shard: 0:1-3\n" in lines
    assert "open reservations 1 (their usage is not in yet), not exported 0" in lines
    assert "late 0, expired 0, partial 0, estimated 0, cache split not known 0, not rated 0" in lines
    assert "read: sha256 " in lines
    held.cancel()


def test_entries_that_are_not_exported_yet_make_a_report_incomplete(books: Books, run: Run) -> None:
    """If they are of the time that was asked for; --offline does not look, and says so."""
    record(books, at="2026-10-10")
    run("export", "run")
    record(books, at="2026-10-20")
    record(books, at="2026-10-21")

    ran = run("report", "cost", "--strict")

    assert 3 == ran.code
    assert "INCOMPLETE: 1 entry of shard 0; not exported yet: 2; see meterlib export run" in ran.out
    assert 0 == run("report", "cost", "--strict", "--until", "2026-10-20T02:00").code
    assert 3 == run("report", "cost", "--strict", "--until", "2026-10-20T02:00:00.001").code
    assert 1 == run("report", "cost", "--since", "2026-10-21", "--json").json["completeness"]["not_exported"]
    offline = run("report", "cost", "--strict", "--offline")
    assert 0 == offline.code
    assert "the store was not asked (--offline)" in offline.out


def test_a_report_needs_no_store(books: Books, run: Run) -> None:
    """An archive can be reported on anywhere; why the store was not asked is said."""
    record(books)
    run("export", "run")
    text = books.settings.read_text()
    url = next(line for line in text.splitlines() if line.startswith("url"))
    books.settings.write_text(text.replace(url, 'url = "redis://127.0.0.1:1/0"'))

    ran = run("report", "usage", "--strict")

    assert 0 == ran.code
    assert "the store was not asked (nobody answers at redis://127.0.0.1:1" in ran.out
    books.settings.write_text(text.replace(url, 'url = "embedded://./none"'))
    assert "does not exist yet" in run("report", "usage").out
    assert not (books.settings.parent / "none").exists()


def test_entries_that_are_not_rated_yet_are_missing_from_costs(books: Books, run: Run, tmp_path: Path) -> None:
    """Usage has them."""
    record(books)
    run("export", "run")
    rated = tmp_path / "archive" / "rated"
    rated.rename(tmp_path / "elsewhere")

    cost, usage = run("report", "cost", "--strict"), run("report", "usage", "--strict")

    assert (3, 0) == (cost.code, usage.code)
    assert "not rated yet: 1; see meterlib rate" in cost.out
    assert "no rated rows" in cost.out
    assert 1 == run("report", "usage", "--json").json["completeness"]["not_rated"]


def test_entries_that_are_lost_for_good_stay_missing(books: Books, run: Run) -> None:
    """Whoever exported accepted it; whoever bills still sees it, if it may be of that time."""
    for day in (1, 2, 3, 4):
        record(books, at=f"2026-10-0{day}T12:00")
    books.client.xdel(LEDGER, "2-0", "3-0")
    run("export", "run")
    run("export", "run", "--accept-gap", "0:2-3")

    ran = run("report", "usage", "--strict")

    assert (3, True) == (ran.code, "lost for good: 0:2-3" in ran.out)
    assert 0 == run("report", "usage", "--strict", "--until", "2026-10-01T13:00").code
    assert 0 == run("report", "usage", "--strict", "--since", "2026-10-04T15:00").code
    assert 3 == run("report", "usage", "--strict", "--since", "2026-10-04").code
    assert [{"first": 2, "last": 3}] == run("report", "usage", "--json").json["completeness"]["shards"][0]["gaps"]


def test_a_store_that_is_not_the_archives_is_told(books: Books, run: Run) -> None:
    """A ledger that lost its tail makes every later report doubtful."""
    for _ in range(3):
        record(books)
    run("export", "run")
    books.client.flushall()

    ran = run("report", "usage", "--strict")

    assert 3 == ran.code
    assert "INCOMPLETE" in ran.out
    assert "it lost them" in ran.out


EVERY = [
    ["usage", "--by", "tenant,model"],
    ["cost", "--by", "tenant,model"],
    ["limits", "--by", "tenant,model"],
    ["retries", "--by", "tenant,model"],
    ["invoice", "--tenant", "=acme", "--period", "2026-10"],
]


@pytest.mark.parametrize("words", EVERY, ids=[words[0] for words in EVERY])
def test_every_report_says_the_same_in_every_format(books: Books, run: Run, tmp_path: Path, words: list[str]) -> None:
    """JSON, lines of JSON, CSV, Parquet and a page; names are text in each of them."""
    for at, model in enumerate(("plain", "plain", "steep", "<b>nobody")):
        held = books.meter.reserve("=acme", CALL | {"model": model}, Usage(input_tokens=1_000))
        held.settle(Usage(input_tokens=1_500 * at, output_tokens=333), facts={"prompt": "c0ffee", "end": "complete"})
    run("export", "run")

    document = run("report", *words, "--json").json
    lines = [json.loads(line) for line in run("report", *words, "--format", "jsonl").out.splitlines()]
    (heading, *cells) = run("report", *words, "--format", "csv").cells
    file = tmp_path / "report.parquet"
    assert 0 == run("report", *words, "--format", "parquet", "--output", str(file)).code
    with duckdb.connect() as database:
        columns = [column for column, *_ in database.execute(f"DESCRIBE FROM '{file}'").fetchall()]
        rows = database.execute(f"FROM '{file}'").fetchall()
        asked = f"SELECT value FROM parquet_kv_metadata('{file}') WHERE key = 'meterlib'"
        ((metadata,),) = database.execute(asked).fetchall()
    page = run("report", *words, "--format", "html").out

    told = document.get("rows", document.get("lines"))
    assert told == lines[: len(told)]
    assert {"completeness": document["completeness"]} == lines[-1]
    assert columns == heading
    assert [[_as_cell(value) for value in row] for row in rows] == [[_as_cell(cell) for cell in row] for row in cells]
    assert [[_as_cell(row[name]) for name in columns] for row in told] == [
        [_as_cell(cell) for cell in row] for row in cells[: len(told)]
    ]
    assert {name: document[name] for name in document if name not in ("rows", "lines")} == json.loads(metadata)
    assert "complete: 4 entries" in page
    assert "&lt;b&gt;nobody" in page
    assert "<b>nobody" not in page


def _as_cell(value: object) -> str | Decimal:
    """What a cell says, whatever it is written as."""
    text = "" if value is None else str(value).removeprefix("'")
    try:
        return Decimal(text)
    except ArithmeticError:
        return text


def test_the_page_of_limits_has_what_was_denied(books: Books, run: Run) -> None:
    """Beside how good estimates were, in the words of the table, and what of it matters most."""
    record(books, usage={"amounts": {"denied_requests": 7}})
    held = books.meter.reserve("acme", CALL, Usage(input_tokens=1_000))
    held.settle(Usage(input_tokens=1_500))
    run("export", "run")

    text = run("report", "limits", "--by", "tenant,day", "--format", "html").out
    table = run("report", "limits", "--by", "tenant,day").out

    assert "<h1><bdi>Limits, by tenant, day (Europe/Berlin)</bdi></h1>" in text
    assert "<li><b>7</b><span>denied calls</span></li>" in text
    for cell in ("acme", "2026-10-10", "50.000", "1.500"):
        assert cell in table
        assert cell in text
    assert "No calls in this time." in run("report", "limits", "--until", "2020-01-01", "--format", "html").out


FORMATS = [["usage"], ["usage", "--json"], ["usage", "--by", "day,team", "--format", "csv"],
           ["cost", "--by", "team", "--format", "jsonl"], ["cost", "--format", "focus-1.4"],
           ["cost", "--format", "html"], ["limits", "--by", "model"],
           ["invoice", "--tenant", "acme", "--period", "2026-10"],
           ["invoice", "--tenant", "acme", "--period", "2026-10", "--format", "json"]]  # fmt: skip


def test_the_same_archive_gives_the_same_bytes_however_its_files_are_cut(books: Books, run: Run) -> None:
    """Rerun, and after files were joined; a later entry changes the digest."""
    for at in range(10):
        record(books, attributes={"team": f"t{at % 3}"}, model="steep" if at % 2 else "plain")
        run("export", "run")
    files = sorted(books.files())
    before = {tuple(words): run("report", *words) for words in FORMATS}

    assert before == {tuple(words): run("report", *words) for words in FORMATS}
    run("export", "compact")
    assert files != sorted(books.files())
    assert before == {tuple(words): run("report", *words) for words in FORMATS}
    digest = run("report", "usage", "--json").json["completeness"]["digest"]
    record(books)
    run("export", "run")
    assert digest != run("report", "usage", "--json").json["completeness"]["digest"]


# ── Invoices ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_invoice_has_lines_with_quantity_price_and_amount(books: Books, run: Run) -> None:
    """And a rounding line, so that they add up; it says that the period is still open."""
    record(books, usage={"output_tokens": 333})
    run("export", "run")

    ran = run("report", "invoice", "--tenant", "acme", "--period", "2026-10")
    document = run("report", "invoice", "--tenant", "acme", "--period", "2026-10", "--json").json

    assert "OPEN: the period is not closed" in ran.out
    assert ["plain", "input", "-", "1,000,000", "1,000,000", "3.30", "3.30"] in [
        line.split() for line in ran.out.splitlines()
    ]
    assert "total 3.31 USD" in ran.out
    assert "rounding 0.00 USD (exact sum 3.3054945)" in ran.out
    assert (False, "2026-10-01T00:00+02:00", "2026-11-01T00:00+01:00") == tuple(
        document[name] for name in ("closed", "since", "until")
    )
    assert ["3.30", "0.01"] == [line["amount"] for line in document["lines"]]
    cells = run("report", "invoice", "--tenant", "acme", "--period", "2026-10", "--format", "csv").cells
    amounts = [(row[0], Decimal(row[cells[0].index("amount")])) for row in cells[1:]]
    assert dict(amounts)["total"] == sum(amount for section, amount in amounts if section != "total")


def test_invoice_is_short_for_report_invoice(books: Books, run: Run) -> None:
    """What is asked for so often has a shorter name, with the same options and help."""
    record(books, usage={"output_tokens": 333})
    run("export", "run")
    words = ("--tenant", "acme", "--period", "2026-10")

    assert run("report", "invoice", *words).out == run("invoice", *words).out


def test_what_is_booked_after_a_close_is_in_the_next_invoice(books: Books, run: Run) -> None:
    """A closed invoice never changes; a correction of it says which month it corrects."""
    record(books, at="2026-10-10T12:00")
    run("export", "run")
    books.clock.set(at_ms("2026-11-02"))
    record(books, usage={"input_tokens": 10})
    entry = next(iter(books.meter.ledger(0)))
    run("export", "run")
    assert 0 == run("close", "2026-10").code
    october = run("report", "invoice", "--tenant", "acme", "--period", "2026-10", "--json").json
    books.meter.adjust(entry, {"input_tokens": -500_000}, "double", actor="ann")
    run("export", "run")

    later = run("report", "invoice", "--tenant", "acme", "--period", "2026-10", "--json").json
    november = run("report", "invoice", "--tenant", "acme", "--period", "2026-11", "--json").json

    assert october["closed"]
    assert [october[name] for name in ("lines", "totals")] == [later[name] for name in ("lines", "totals")]
    assert [("usage", "", 10), ("corrections", "2026-10", -500_000)] == [
        (line["section"], line["corrects"], line["quantity"]) for line in november["lines"]
    ]
    assert "Corrections of closed periods" in run("report", "invoice", "--tenant", "acme", "--period", "2026-11").out


# ── What cannot be asked ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["cost", "--by", "no name"], "--by: 'no name' is no name"),
        (["usage", "--by", "charge"], "--by: 'charge' is told by rated rows only"),
        (["cost", "--tz", "Mars"], "--tz: 'Mars' is no IANA time zone"),
        (["cost", "--period", "2026-13"], "--period: '2026-13' is no month"),
        (["cost", "--period", "2026-10", "--since", "2026-10-01"], "--period: it says since when"),
        (["cost", "--period", "2026-10", "--time-basis", "event"], "--period: a billing period is of what was booked"),
        (["cost", "--since", "yesterday"], "--since: 'yesterday' is no date"),
        (["cost", "--archive", "nowhere"], "--archive: there is no archive nowhere: `meterlib export run` makes it"),
        (["--by", "tenant", "cost"], "--by: it goes behind the report's name: meterlib report cost --by"),
        (["--strict", "usage"], "--strict: it goes behind the report's name"),
        (["usage", "--live", "--period", "2026-10"], "--period: is about the archive"),
        (["usage", "--live", "--format", "html"], "--format: html is made from the archive"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_the_option_that_asks(
    books: Books, run: Run, words: list[str], error: str
) -> None:
    """Exit code 2, one line, and nothing on standard output."""
    record(books)
    run("export", "run")

    ran = run("report", *words)

    assert (2, "") == ran[:2]
    assert error in ran.err
    assert 1 == ran.err.count("\n")


def test_a_mistyped_name_is_explained(books: Books, run: Run) -> None:
    """An empty column is no riddle."""
    record(books)
    run("export", "run")

    assert "no entry has an attribute 'tenat'; did you mean 'tenant'?" in run("report", "cost", "--by", "tenat").err
    assert "there is nothing of tenant 'acne'" in run("report", "usage", "--tenant", "acne").err


def test_a_file_is_there_as_a_whole_or_not_at_all(books: Books, run: Run, tmp_path: Path) -> None:
    """A report that failed leaves what was there before."""
    record(books)
    run("export", "run")
    file = tmp_path / "report.csv"
    file.write_text("before")

    assert 2 == run("report", "cost", "--by", "no name", "--output", str(file)).code
    assert "before" == file.read_text()
    assert 0 == run("report", "cost", "--by", "tenant", "--format", "csv", "--output", str(file)).code
    assert file.read_text().startswith("tenant,currency,list_cost")
    nowhere = run("report", "cost", "--output", str(tmp_path / "nowhere" / "x"))
    assert (2, f"meterlib: --output: there is no folder {tmp_path / 'nowhere'}\n") == (nowhere.code, nowhere.err)
    folder = run("report", "cost", "--output", str(tmp_path))
    assert (2, f"meterlib: --output: {tmp_path} is a folder; name a file in it\n") == (folder.code, folder.err)


@pytest.mark.parametrize("shape", ["csv", "parquet", "html", "focus-1.4"])
def test_what_is_no_file_is_written_to_and_does_not_become_one(
    books: Books, run: Run, tmp_path: Path, shape: str
) -> None:
    """A pipe stays a pipe, a device a device, and a link a link."""
    record(books)
    run("export", "run")
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "report.csv"
    os.mkfifo(pipe)
    link.symlink_to(file)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)

    for place in (pipe, link):
        assert 0 == run("report", "cost", "--by", "tenant", "--format", shape, "--output", str(place)).code
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert file.read_bytes() == os.read(reader, 65_536)
    os.close(reader)
    bundle = ("report", "invoice", "--tenant", "acme", "--period", "2026-10", "--bundle")
    assert (2, f"meterlib: --bundle: {pipe} is no file\n") == run(*bundle, str(pipe))[::2]


def test_a_file_of_the_archive_that_cannot_be_read_is_named(books: Books, run: Run) -> None:
    """One line and exit code 5, whatever is asked."""
    record(books)
    run("export", "run")
    segment = next((books.path / "shard-0000").glob("*.parquet"))
    segment.write_bytes(b"")

    for words in (("usage",), ("cost", "--by", "team"), ("limits",)):
        ran = run("report", *words)
        assert (5, "", 1) == (ran.code, ran.out, ran.err.count("\n"))
        assert str(segment.name) in ran.err


def test_ctrl_c_within_a_query_is_ctrl_c(books: Books, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """DuckDB raises an error of its own then; any other error of that kind is a defect and stays one."""
    record(books)
    run("export", "run")
    said = iter(["Query interrupted", "something else"])

    def fail(*_: object) -> None:
        raise RuntimeError(next(said))

    monkeypatch.setattr("meterlib.cli.report_archive.usage_report", fail)
    assert (130, "", "meterlib: interrupted\n") == run("report", "usage")
    with pytest.raises(RuntimeError, match="something else"):
        run("report", "usage")
