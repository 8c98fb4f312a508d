"""Bundles: a customer checks its invoice from one file, with nothing of anybody else in it, and lies are found."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from hashlib import sha256
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meterlib.billing import duck
from meterlib.billing.bundle.bundle import BundleManifest, FileFacts, encoded, put, write_bundle
from meterlib.billing.bundle.check import BundleVerdict, verify_bundle
from meterlib.billing.bundle.gather import gather
from meterlib.billing.export.export import Accepted
from meterlib.billing.postings.closes import Close
from meterlib.billing.postings.postings import Postings
from meterlib.billing.prices.terms import Terms
from meterlib.billing.reports.answers import Reader
from meterlib.billing.reports.invoice import invoice
from tests.billing.money import BOOK, at_ms, entries, entry, tokens
from tests.billing.posting import DEARER, WIDER, Ledgers

SECRET = "nobody-elses-business"
OCTOBER, NOVEMBER = "2026-10", "2026-11"
NO_PLAIN = BOOK.replace("plain", "gone")


def bundled(books: Ledgers, folder: Path, tenant: str = "acme", period: str = OCTOBER) -> Path:
    """The bundle of an invoice."""
    path = folder / f"{tenant}-{period}.zip"
    with books.archive() as archive:
        postings = Postings(archive, books.tz)
        closed = period in {close.period for close in postings.closes}
        with Reader(postings, books.tz) as reader:
            bill = invoice(reader, tenant, period, closed)
        database = duck.connect()
        write_bundle(path, gather(database, postings, bill))
        database.close()
    return path


def fill(books: Ledgers) -> None:
    """October, closed, and some of November: of every kind of row that an invoice may have."""
    cached = tokens(
        input_tokens=1_001,
        output_tokens=77,
        cache_creation_input_tokens=900,
        cache_read_input_tokens=48_000,
        cache_creation={"ephemeral_5m_input_tokens": 400, "ephemeral_1h_input_tokens": 300},
        server_tool_use={"web_search_requests": 3},
        iterations=[{"type": "compaction", "input_tokens": 70_000, "output_tokens": 7}],
    )
    first = books.call(
        "2026-10-02", usage=cached, attributes={"model": "plain", "note": "=1+1", "provider": "anthropic"}
    )
    books.call("2026-10-03", "steep", tokens(input_tokens=150_000, output_tokens=3))
    books.call("2026-10-04", "nobody-knows", cached)
    books.call("2026-10-05", usage=cached, funding="own", reservation_id="'quoted")
    books.call("2026-10-05", usage=cached, tenant="globex", attributes={"model": "plain", "secret": SECRET})
    books.call("2026-10-06", usage={}, kind="cancelled")
    books.correction(first, at_ms("2026-10-20"), {"output_tokens": -70, "input_tokens": 5})
    books.rate()
    assert not isinstance(books.close_period(OCTOBER), list)
    books.correction(first, at_ms("2026-11-02"), {"output_tokens": 11})
    books.call("2026-11-03", usage=cached)
    books.rate()


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Ledgers]:
    books = Ledgers(tmp_path)
    fill(books)
    yield books
    books.close()


def files_of(path: Path) -> dict[str, bytes]:
    with ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sealed(path: Path, files: dict[str, bytes]) -> BundleVerdict:
    """What is found of other files, each digest of which was made anew by whoever changed them."""
    manifest = msgspec.json.decode(files["manifest.json"], type=BundleManifest)
    facts = {
        name: FileFacts(sha256=sha256(data).hexdigest(), bytes=len(data))
        for name, data in files.items()
        if name != "manifest.json"
    }
    manifest = msgspec.structs.replace(manifest, files=facts).sealed()
    changed = path.with_name("changed.zip")
    with ZipFile(changed, "w") as archive:
        for name, data in files.items():
            put(archive, name, [bundle_json(manifest) if name == "manifest.json" else data])
    return verify_bundle(changed)


def bundle_json(value: Any) -> bytes:
    return encoded(value)


@pytest.mark.parametrize("period", [OCTOBER, NOVEMBER])
@pytest.mark.parametrize("tenant", ["acme", "globex", "nobody"])
def test_a_bundle_verifies(books: Ledgers, tmp_path: Path, tenant: str, period: str) -> None:
    """Closed or open, with corrections, own keys, fees, unpriced models, or with nothing in it."""
    found = verify_bundle(bundled(books, tmp_path, tenant, period))

    assert [] == found.problems
    assert [] == found.notes
    assert (tenant, period, period == OCTOBER) == (found.tenant, found.period, found.closed)
    assert (
        (found.rows > 0)
        == (found.entries > 0)
        == ((tenant, period) in {("acme", OCTOBER), ("acme", NOVEMBER), ("globex", OCTOBER)})
    )


def test_the_same_archive_gives_the_same_bytes(books: Ledgers, tmp_path: Path) -> None:
    """Whenever it is written."""
    (tmp_path / "again").mkdir()

    assert bundled(books, tmp_path).read_bytes() == bundled(books, tmp_path / "again").read_bytes()


def test_nothing_of_another_customer_or_of_what_the_operator_pays_is_in_it(books: Ledgers, tmp_path: Path) -> None:
    """Neither names nor attributes nor totals of others, nor prices between operator and provider."""
    content = b"".join(files_of(bundled(books, tmp_path)).values())

    assert b"acme" in content
    for word in (b"globex", SECRET.encode(), b"upstream"):
        assert word not in content
    assert SECRET.encode() in b"".join(files_of(bundled(books, tmp_path, "globex")).values())


def test_rows_of_a_re_rating_verify(books: Ledgers, tmp_path: Path) -> None:
    """What was taken back and posted anew, of a closed month, is on the next invoice, with both prices in full."""
    assert books.rate_again(DEARER, at_ms("2026-11-20"))

    found = verify_bundle(bundled(books, tmp_path, "acme", NOVEMBER))

    assert ([], []) == (found.problems, found.notes)
    assert b'"found": false' not in files_of(tmp_path / f"acme-{NOVEMBER}.zip")["prices.json"]


@pytest.mark.parametrize(("first", "second"), [(BOOK, NO_PLAIN), (NO_PLAIN, BOOK)])
def test_a_closed_month_verifies_though_nothing_is_left_in_one_currency(
    first: str, second: str, tmp_path: Path
) -> None:
    """The close tells of rows that were all taken back, as none that cost nothing; the invoice has no line of them."""
    ledgers = Ledgers(tmp_path)
    ledgers.call("2026-10-02")
    ledgers.rate(first)
    assert ledgers.rate_again(second, at_ms("2026-10-20"))
    assert isinstance(ledgers.close_period("2026-10", at_ms("2026-11-02")), Close)

    found = verify_bundle(bundled(ledgers, tmp_path))

    assert ([], True) == (found.problems, found.closed)
    ledgers.close()


def test_calls_verify_on_either_side_of_where_their_price_changes(tmp_path: Path) -> None:
    """By a token of the prompt, or by a millisecond; also where a later book draws the line elsewhere."""
    ledgers = Ledgers(tmp_path)
    for prompt in (100_000, 100_001):
        ledgers.call("2026-10-02", "steep", tokens(input_tokens=prompt))
    for at in ("2026-10-06T23:59:59.999", "2026-10-07"):
        ledgers.call(at, usage=tokens(cache_read_input_tokens=1_000_000))
    ledgers.rate()
    assert [] == verify_bundle(bundled(ledgers, tmp_path)).problems
    ledgers.rate_again(BOOK.replace("tokens = 100_000", "tokens = 100_001").replace("2026-10-07", "2026-10-08"))

    found = verify_bundle(bundled(ledgers, tmp_path))

    assert ([], [], 8) == (found.problems, found.notes, found.rows)
    ledgers.close()


def test_a_correction_finds_its_call_among_entries_of_the_same_number(tmp_path: Path) -> None:
    """The ledger lost some, and went on with their numbers, which somebody accepted."""
    ledgers = Ledgers(tmp_path)
    ledgers.call("2026-10-02", usage=tokens(input_tokens=1_000))
    lost = ledgers.call("2026-10-02", usage=tokens(input_tokens=2_000), reservation_id="lost")
    ledgers.rate()
    ledgers.lose(1, "1600000009999")
    found = ledgers.call("2026-10-03", usage=tokens(input_tokens=5), reservation_id="found")
    assert ledgers.export(Accepted(epochs={0: "1600000009999"})).problem is None
    ledgers.rate(terms=OTHER_TERMS)
    for call, count in ((lost, -2_000), (found, 4), (lost, 70)):
        ledgers.correction(call, at_ms("2026-10-04"), {"input_tokens": count})
    ledgers.rate(terms={})

    verdict = verify_bundle(bundled(ledgers, tmp_path))

    assert ([], 6) == (verdict.problems, verdict.rows)
    ledgers.close()


def test_corrections_verify_by_the_terms_of_their_calls(books: Ledgers, tmp_path: Path) -> None:
    """Terms, fee and book changed since, and some of it was rated again; what is added has the terms of its call."""
    earlier = books.entries[0], books.entries[3]
    for call in earlier:
        books.correction(call, at_ms("2026-11-05"), {"output_tokens": 5, "cache_read_input_tokens": -48_000})
    books.rate(DEARER, OTHER_TERMS)
    assert books.rate_again(DEARER, at_ms("2026-11-20"), terms=OTHER_TERMS)
    for call in earlier:
        books.correction(call, at_ms("2026-11-21"), {"output_tokens": 9})
    books.rate(BOOK, {})

    path = bundled(books, tmp_path, "acme", NOVEMBER)

    found = verify_bundle(path)
    assert ([], []) == (found.problems, found.notes)
    files = files_of(path)
    stated = [one for one in json.loads(files["terms.json"]) if one["corrects"]]
    assert [(8, "0:1", 0), (10, "0:1", 0), (11, "0:4", 0), (12, "0:1", 1), (13, "0:4", 1)] == [
        (one["first"], one["corrects"], one["rerated"]) for one in stated
    ]
    for at, problem in [(0, "are not those of 0:1, which it corrects"), (4, "are not those of re-rating 1")]:
        told = json.loads(files["terms.json"])
        lie = next(one for one in told if one == stated[at])
        lie["markup"] = "0.5"
        changed = sealed(path, files | {"terms.json": bundle_json(told)})
        assert any(problem in one for one in changed.problems), changed.problems
    told = [one for one in json.loads(files["terms.json"]) if one != stated[2]]
    changed = sealed(path, files | {"terms.json": bundle_json(told)})
    assert any("is not stated that it has the terms of 0:4" in one for one in changed.problems)


OTHER_TERMS = {"acme": Terms.of("50%", "1%", "20%", "9%")}


@pytest.mark.parametrize("kind", ["expired", "cancelled"])
def test_a_correction_of_a_call_that_nothing_was_known_of_verifies(tmp_path: Path, kind: str) -> None:
    """It says what was used after all, and a further one takes some of that back."""
    ledgers = Ledgers(tmp_path)
    (call,) = ledgers.add([entry("plain", {}, "2026-10-02", kind=kind)])
    ledgers.rate()
    ledgers.correction(call, at_ms("2026-10-03"), {"input_tokens": 5_000, "cache_read_input_tokens": 70})
    ledgers.correction(call, at_ms("2026-10-04"), {"input_tokens": -4_000, "output_tokens": 3})
    ledgers.rate()

    found = verify_bundle(bundled(ledgers, tmp_path))

    assert ([], 4) == (found.problems, found.rows)


SPLIT = ("ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens")


def altered_row(files: dict[str, bytes], wanted: Callable[[dict[str, str]], bool], **told: str) -> dict[str, bytes]:
    """The files with one row changed, what it costs worked out anew."""
    table = whole_rows(files)
    next(row for row in table if wanted(row)).update(told)
    return with_rows(files, table)


@pytest.mark.parametrize("rated_again", [False, True])
def test_a_fee_is_on_as_much_as_its_own_key_paid(books: Ledgers, tmp_path: Path, rated_again: bool) -> None:
    """Of any other quantity it is found, though it is multiplied and added up as it should be."""
    if rated_again:
        assert books.rate_again(DEARER, at_ms("2026-11-20"))
    period = NOVEMBER if rated_again else OCTOBER
    path = bundled(books, tmp_path, "acme", period)
    files = files_of(path)
    is_fee = {"charge": "platform_fee"} | ({"corrects": OCTOBER, "posting": "1"} if rated_again else {})

    assert [] == sealed(path, altered_row(files, lambda row: is_fee.items() <= row.items())).problems
    found = sealed(path, altered_row(files, lambda row: is_fee.items() <= row.items(), quantity="1000000000"))

    assert any("platform fee on other usage" in problem or "another quantity" in problem for problem in found.problems)


def whole_rows(files: dict[str, bytes]) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(files["rows.csv"].decode())))


def with_rows(files: dict[str, bytes], table: list[dict[str, str]]) -> dict[str, bytes]:
    """The files with other rows, each of which costs what it says."""
    for row in table:
        for name in ("list", "contracted", "billed") if row["per"] and row["list_price"] else ():
            cost = Decimal(row[f"{name}_price"]) * Decimal(row["quantity"]) / Decimal(row["per"])
            row[f"{name}_cost"] = f"{cost:.12f}"
    out = io.StringIO()
    writer = csv.DictWriter(out, table[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return files | {"rows.csv": out.getvalue().encode()}


def of_another_month(table: list[dict[str, str]]) -> None:
    for row in table:
        row["booked_at_ms"] = str(at_ms("2026-11-05"))


def at_another_time(table: list[dict[str, str]]) -> None:
    table[0]["booked_at_ms"] = str(int(table[0]["booked_at_ms"]) + 1)


def of_a_closed_month(table: list[dict[str, str]]) -> None:
    table[0]["corrects"] = "2026-08"


def correcting_itself(table: list[dict[str, str]]) -> None:
    table[0]["corrects"] = table[0]["period"]


def nothing_taken_back(table: list[dict[str, str]]) -> None:
    table[:] = [row for row in table if row["posting"] != "-1"]


def taken_back_twice(table: list[dict[str, str]]) -> None:
    back = next(row for row in table if row["posting"] == "-1")
    table.insert(table.index(back) + 1, back | {"line": str(int(back["line"]) + 1)})


def taken_back_cheaper(table: list[dict[str, str]]) -> None:
    back = next(row for row in table if row["posting"] == "-1")
    back.update(price_digest=table[-1]["price_digest"], list_price="0.000000")


def more_corrected(table: list[dict[str, str]]) -> None:
    one = next(row for row in table if row["kind"] == "adjusted")
    one["quantity"] = str(int(one["quantity"]) + 1000)


def counted_backwards(table: list[dict[str, str]]) -> None:
    next(row for row in table if row["kind"] == "adjusted")["posting"] = "-1"


def another_models_correction(table: list[dict[str, str]]) -> None:
    next(row for row in table if row["kind"] == "adjusted")["model"] = "steep"


@pytest.mark.parametrize(
    ("lie", "problem"),
    [
        (of_another_month, "was booked in another month"),
        (at_another_time, "was booked at another time than the entry"),
        (of_a_closed_month, "the entry is not of that month"),
        (correcting_itself, "which was not closed by then"),
        (nothing_taken_back, "takes back as much of line"),
        (taken_back_twice, "taken back before"),
        (taken_back_cheaper, "is not what it takes back"),
        (more_corrected, "do not add up to the difference that it says"),
        (counted_backwards, "do not add up to the difference that it says"),
        (another_models_correction, "it is of another model or kind of token than the call"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_a_lie_that_adds_up_is_found(tmp_path: Path, lie: Callable[[list[dict[str, str]]], None], problem: str) -> None:
    """Though every product and every digest is as it should be."""
    ledgers = Ledgers(tmp_path)
    call = ledgers.call("2026-10-02", usage=tokens(input_tokens=1_001, output_tokens=77))
    ledgers.correction(call, at_ms("2026-10-20"), {"input_tokens": 5})
    ledgers.rate()
    assert ledgers.rate_again(DEARER, at_ms("2026-10-21"))
    path = bundled(ledgers, tmp_path)
    files = files_of(path)
    ledgers.close()
    assert [] == sealed(path, with_rows(files, whole_rows(files))).problems

    table = whole_rows(files)
    lie(table)
    found = sealed(path, with_rows(files, table))

    assert any(problem in one for one in found.problems), found.problems


def test_several_corrections_of_a_call_are_each_counted_once(tmp_path: Path) -> None:
    """What is told of a cache write is told of what is not told yet: counted twice, it is not the same."""
    ledgers = Ledgers(tmp_path)
    call = ledgers.call("2026-10-02", usage=tokens(cache_creation_input_tokens=900))
    for at, name in enumerate(SPLIT):
        ledgers.correction(call, call.booked_at + at, {"cache_creation": {name: 400 + 50 * at}})
    ledgers.rate()

    found = verify_bundle(bundled(ledgers, tmp_path))

    assert ([], [], 5) == (found.problems, found.notes, found.rows)
    ledgers.close()


@pytest.mark.parametrize("prompt", [90_000, 110_000])
def test_several_calls_in_one_entry_verify(tmp_path: Path, prompt: int) -> None:
    """Of a model whose price depends on the length of each prompt; in one tier, by the average, and it is told."""
    ledgers = Ledgers(tmp_path)
    several = tokens(input_tokens=prompt, output_tokens=4, requests=3, cache_creation_input_tokens=7)
    for model in ("steep", "plain", "nobody-knows", "old"):
        ledgers.call("2026-10-02", model, several)
    call = ledgers.call("2026-10-02", "steep", several | {"iterations": [{"type": "compaction", "input_tokens": 9}]})
    ledgers.correction(call, call.booked_at + 1, {"output_tokens": 50})
    ledgers.rate()
    path = bundled(ledgers, tmp_path)

    found = verify_bundle(path)

    assert ([], []) == (found.problems, found.notes)
    files = files_of(path)
    assert files["rows.csv"].count(b"tier_of_average") == 7
    for lie in (b",", b"split_unknown,"):
        changed = sealed(path, files | {"rows.csv": files["rows.csv"].replace(b"tier_of_average", lie[:-1], 1)})
        assert any("flags" in problem for problem in changed.problems)
    ledgers.close()


changes = st.fixed_dictionaries(
    {},
    optional={
        "input_tokens": st.integers(-5, 120_000),
        "output_tokens": st.integers(-5, 5),
        "cache_read_input_tokens": st.integers(0, 120_000),
        "cache_creation_input_tokens": st.integers(-5, 500),
        "cache_creation": st.fixed_dictionaries({}, optional=dict.fromkeys(SPLIT, st.integers(-5, 300))),
        "server_tool_use": st.just({"web_search_requests": 1}),
    },
)
bursts = st.tuples(
    st.lists(entries(), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 30), changes), max_size=3),
    st.sampled_from([BOOK, WIDER, DEARER]),
    st.sampled_from([None, None, BOOK, WIDER]),
)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=st.lists(bursts, max_size=4))
def test_whatever_was_used_verifies(history: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any usage of any kind of call, corrections of any of them, at prices that change and go; all again, too."""
    folder = tmp_path_factory.mktemp("any")
    books = Ledgers(folder)
    for several, corrections, book, anew in history:
        books.add(several)
        for which, change in corrections:
            books.correction(books.entries[which % len(books.entries)], at_ms("2026-11-25"), change)
        books.rate(book)
        if anew is not None:
            books.rate_again(anew)
    added = books.entries
    books.export()

    periods = {row[0] for row in books.query("SELECT DISTINCT period FROM rows")} | {OCTOBER}
    for tenant in ("acme", "globex"):
        for period in periods:
            found = verify_bundle(bundled(books, folder, tenant, period))
            assert [] == found.problems
            assert found.entries <= len(added)
    books.close()


# ── Lies ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_any_one_byte_that_is_another_is_found(books: Ledgers, tmp_path: Path) -> None:
    """In the files, and between them."""
    path = bundled(books, tmp_path)
    whole = path.read_bytes()
    luck = random.Random(5)
    changed = tmp_path / "changed.zip"
    for at in [*range(60), *luck.sample(range(len(whole)), 120), *range(len(whole) - 90, len(whole))]:
        broken = bytearray(whole)
        broken[at] ^= 1 << luck.randrange(8)
        changed.write_bytes(broken)

        assert verify_bundle(changed).problems, f"byte {at} of {len(whole)}"


@pytest.mark.parametrize("change", ["cut", "longer", "before"])
def test_a_file_that_was_cut_or_grew_is_found(books: Ledgers, tmp_path: Path, change: str) -> None:
    """Zip files may have anything before and behind them; bundles may not."""
    whole = bundled(books, tmp_path).read_bytes()
    changed = tmp_path / "changed.zip"
    changed.write_bytes({"cut": whole[:-1], "longer": whole + b"\0", "before": b"\0" + whole}[change])

    assert verify_bundle(changed).problems


NUMBERS = ("quantity", "list_price", "contracted_price", "billed_price", "list_cost", "contracted_cost", "billed_cost")


@pytest.mark.parametrize(
    "column", [*NUMBERS, "token_type", "tenant", "period", "funding", "price_digest", "n", "unpriced"]
)
def test_a_row_that_was_changed_is_found_though_all_digests_were_made_anew(
    books: Ledgers, tmp_path: Path, column: str
) -> None:
    """Whoever changes a number has to change all that follows from it, up to what the ledger said."""
    path = bundled(books, tmp_path)
    files = files_of(path)
    lines = list(csv.reader(io.StringIO(files["rows.csv"].decode())))
    at = lines[0].index(column)
    priced = lines[0].index("unpriced")
    for number, line in list(enumerate(lines))[1::3]:
        if line[priced] and column in NUMBERS[1:]:
            continue
        other = [cell if place != at else _other(column, cell) for place, cell in enumerate(line)]
        rows = [other if one == number else row for one, row in enumerate(lines)]
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(rows)

        found = sealed(path, files | {"rows.csv": out.getvalue().encode()})

        assert found.problems, f"row {number}: {line}"


def _other(column: str, cell: str) -> str:
    if column in (*NUMBERS, "n"):
        return str(int(cell) + 1) if "." not in cell else cell + "1"
    return {"period": NOVEMBER, "tenant": "globex", "funding": "own" if cell == "hosted" else "hosted"}.get(
        column, f"{cell}x"
    )


def _drop_row(files: dict[str, bytes]) -> None:
    files["rows.csv"] = b"".join(files["rows.csv"].splitlines(keepends=True)[:-1])


def _replace(name: str, old: str, new: str) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        assert old.encode() in files[name], files[name][:3000]
        files[name] = files[name].replace(old.encode(), new.encode(), 1)

    return change


def _add_to_total(files: dict[str, bytes]) -> None:
    document = json.loads(files["invoice.json"])
    document["totals"][0]["total"] = "1" + document["totals"][0]["total"]
    files["invoice.json"] = bundle_json(document)


def _hold(**other: Any) -> Callable[[dict[str, bytes]], None]:
    """Prices held for other calls."""

    def change(files: dict[str, bytes]) -> None:
        document = json.loads(files["prices.json"])
        for held in (held for price in document for held in price["held"] if len(held["tiers"]) > 1):
            held.update(other)
        files["prices.json"] = bundle_json(document)

    return change


def _add_to_amount(files: dict[str, bytes]) -> None:
    """A line costs more, and so does the total, but the rows do not."""
    document = json.loads(files["invoice.json"])
    line = next(line for line in document["lines"] if line["exact"])
    line["quantity"] += 1
    files["invoice.json"] = bundle_json(document)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_drop_row, "counts"),
        (_add_to_total, "the total in USD is not what the lines add up to"),
        (_add_to_amount, "is not what the rows add up to"),
        (
            _replace("entries.jsonl", 'output_tokens\\":77', 'output_tokens\\":78'),
            "output: it says quantity 77, the entry 78",
        ),
        (_replace("entries.jsonl", 'tenant\\":\\"acme', 'tenant\\":\\"evil'), "somebody else|another tenant"),
        (_replace("terms.json", '"0.125"', '"0.225"'), "does not follow from the list price by the terms"),
        (_replace("terms.json", '"0.05"', '"0.06"'), "the fee does not follow"),
        (_replace("prices.json", '"3.000000"', '"2.000000"'), "is not the one of that digest"),
        (_hold(tiers=[0, 100_000, 120_000]), "has the price above 100000 tokens, for a prompt of 150000"),
        (_hold(tiers=[0, 160_000]), "has the price above 100000 tokens, for a prompt of 150000"),
        (_hold(from_ms=at_ms("2026-10-04")), "did not hold when the call was made"),
        (_hold(until_ms=at_ms("2026-10-03")), "did not hold when the call was made"),
        (
            _replace("invoice.json", '"closed": true', '"closed": false'),
            "says closed: False, but there is a close.json",
        ),
        (_replace("invoice.json", '"tenant": "acme"', '"tenant": "evil"'), "of another tenant"),
        (_replace("close.json", '"billed_cost": "', '"billed_cost": "1'), "close.json has other totals"),
        (_replace("manifest.json", '"schema": 2', '"schema": 3'), "schema 3"),
    ],
)
def test_a_lie_is_found_and_named_though_all_digests_were_made_anew(
    books: Ledgers, tmp_path: Path, change: Any, problem: str
) -> None:
    """Each part is checked against the others."""
    path = bundled(books, tmp_path)
    files = files_of(path)
    change(files)

    found = sealed(path, files)

    assert any(re.search(problem, one) for one in found.problems), found.problems


# ── Files that are none ───────────────────────────────────────────────────────────────────────────────────────────────


def _zip(path: Path, members: dict[str, bytes], compression: int = 0) -> Path:
    with ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data, compress_type=compression)
    return path


def test_names_that_lead_elsewhere_are_refused_and_nothing_is_unpacked(books: Ledgers, tmp_path: Path) -> None:
    """A bundle is read where it is."""
    files = files_of(bundled(books, tmp_path))
    before = sorted(tmp_path.rglob("*"))
    for name in ("../evil.json", "/etc/evil", "invoice.json/../../evil", "extra.json"):
        found = verify_bundle(_zip(tmp_path / "evil.zip", {name: b"{}", **files}))

        assert any("is no invoice bundle" in problem for problem in found.problems)
    (tmp_path / "evil.zip").unlink()
    assert before == sorted(tmp_path.rglob("*"))


def test_a_bomb_is_refused_before_it_is_unpacked(books: Ledgers, tmp_path: Path) -> None:
    """Files are stored as they are; what is compressed could be of any size."""
    files = files_of(bundled(books, tmp_path)) | {"invoice.json": b" " * 5_000_000}

    found = verify_bundle(_zip(tmp_path / "bomb.zip", files, ZIP_DEFLATED))

    assert [True] == ["is not stored as bundles store files" in problem for problem in found.problems]


@pytest.mark.parametrize("content", [b"", b"PK", b"no zip file at all", b"PK\x05\x06" + b"\0" * 18])
def test_what_is_no_bundle_is_a_problem_and_no_accident(content: bytes, tmp_path: Path) -> None:
    """Any file may be given."""
    path = tmp_path / "file.zip"
    path.write_bytes(content)

    assert verify_bundle(path).problems
