"""An archive that is not what was exported is found out, from its files alone, and what is wrong is named."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pytest

from meterlib import LedgerEntry
from meterlib.billing import duck
from meterlib.billing.archive.archive import Archive
from meterlib.billing.archive.segments import KEY
from meterlib.billing.archive.verify import Known, ShardVerdict, verify
from meterlib.billing.postings.pieces import sums_of
from meterlib.billing.postings.reposts import Manifest, encoded
from meterlib.billing.postings.verify_rated import verify_rated
from meterlib.cli import main
from meterlib.errors import IntegrityError
from tests.billing.exporting import Books
from tests.billing.money import BOOK, at_ms, entry, tokens
from tests.billing.posting import DEARER, Ledgers


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Books:
    """Three full blocks and a short one."""
    books = Books(tmp_path_factory.mktemp("books"))
    books.book_all_kinds()
    books.book(8)
    books.export()
    return books


@pytest.fixture
def copy(exported: Books, tmp_path: Path) -> Path:
    """The archive, to be spoilt."""
    shutil.copytree(exported.path, tmp_path / "archive")
    return tmp_path / "archive"


def verdict(path: Path, *known: Known) -> ShardVerdict:
    with Archive(path) as archive:
        return verify(archive, known)[0]


def files(path: Path) -> list[Path]:
    return sorted((path / "shard-0000").iterdir())


def test_an_archive_is_what_was_exported(exported: Books) -> None:
    """The sums of all entries, and one digest to keep."""
    found = verdict(exported.path)

    assert ([], 4, 14, 14) == (found.problems, found.segments, found.entries, found.last)
    assert sum(range(1, 9)) + 3 - 3 == found.sums["input_tokens"]
    assert 64 == len(found.link)


def test_a_bit_that_flipped_anywhere_is_found(copy: Path) -> None:
    """A disk that forgets is found out, whichever byte it was."""
    chance = random.Random(19)
    for file in files(copy):
        data = file.read_bytes()
        for at in [0, len(data) - 1, *chance.sample(range(len(data)), 20)]:
            spoilt = bytearray(data)
            spoilt[at] ^= 1 << chance.randrange(8)
            file.write_bytes(spoilt)

            problems = verdict(copy).problems

            assert problems
            assert file.name in problems[0]
        file.write_bytes(data)
    assert [] == verdict(copy).problems


def test_a_file_that_was_cut_short_is_named(copy: Path) -> None:
    """At any length, none included."""
    file = files(copy)[1]
    data = file.read_bytes()
    for size in (0, 3, len(data) // 2, len(data) - 4, len(data) - 1):
        file.write_bytes(data[:size])

        assert any(file.name in problem for problem in verdict(copy).problems)


def test_missing_files_are_named_by_their_entries(copy: Path) -> None:
    """In the middle by the numbers that are missing; the newest by what an earlier check found."""
    known = verdict(copy)
    earlier = Known(shard=0, epoch=known.epoch, last=known.last, link=known.link)
    first, second, _, last = files(copy)
    shutil.move(last, copy.parent)
    assert [] == verdict(copy).problems, "files alone cannot tell"
    assert ["entry 0:14 of epoch 1600000000000 was there at an earlier check, and is not"] == [
        *verdict(copy, earlier).problems
    ]
    shutil.move(copy.parent / last.name, last)
    assert [] == verdict(copy, earlier).problems

    second.unlink()
    assert any("0:5-8: it is missing" in problem for problem in verdict(copy).problems)
    first.unlink()
    assert any("does not follow" in problem for problem in verdict(copy).problems)
    shutil.rmtree(copy / "shard-0000")
    assert verdict(copy, earlier).problems


def test_what_is_known_of_an_earlier_check_holds_when_more_was_exported(exported: Books, tmp_path: Path) -> None:
    """Last month's digest is still that of last month's entries, though files were joined since."""
    books = Books(tmp_path)
    books.book(6)
    books.export()
    found = verdict(books.path)
    earlier = Known(shard=0, epoch=found.epoch, last=6, link=found.link)
    books.book(6)
    books.export()

    assert [] == verdict(books.path, earlier).problems
    assert verdict(books.path, Known(shard=0, epoch=found.epoch, last=5, link=found.link)).problems


def swapped(path: Path) -> None:
    one, other, *_ = files(path)
    one.rename(path / "x")
    other.rename(one)
    (path / "x").rename(other)


def renamed(path: Path) -> None:
    file = files(path)[1]
    file.rename(file.with_name(file.name.replace("000000000005", "000000000004")))


def of_another_shard(path: Path) -> None:
    shutil.move(path / "shard-0000", path / "shard-0001")
    for file in (path / "shard-0001").iterdir():
        file.rename(file.with_name(file.name.replace("-0000-", "-0001-", 1)))


def twice(path: Path) -> None:
    shutil.copy(files(path)[0], path / "shard-0000" / "copy of it.parquet")


@pytest.mark.parametrize("spoil", [swapped, renamed, of_another_shard, twice], ids=lambda spoil: spoil.__name__)
def test_a_file_out_of_its_place_is_named(copy: Path, spoil: Callable[[Path], None]) -> None:
    """Names are part of what was exported."""
    spoil(copy)

    assert any(".parquet" in problem for problem in verdict(copy).problems)


def forged(file: Path, change: str, metadata: Callable[[str], str] = str) -> None:
    """Write a segment's file anew with other rows, by whoever knows how names are made."""
    database = duckdb.connect()
    told: Any = database.execute(f"SELECT value FROM parquet_kv_metadata('{file}') WHERE key = '{KEY}'").fetchone()
    database.execute(f"CREATE TABLE rows AS FROM '{file}'")
    database.execute(change)
    scratch = file.with_name("scratch")
    database.execute(
        f"COPY rows TO '{scratch}' (FORMAT parquet, KV_METADATA {{{KEY}: '{metadata(told[0].decode())}'}})"
    )
    digest = sha256(scratch.read_bytes()).hexdigest()[:16]
    file.unlink()
    scratch.rename(file.with_name(f"{file.name[:-24]}{digest}.parquet"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("UPDATE rows SET outcome = replace(outcome::VARCHAR, ':7', ':1')::JSON WHERE n = 10", "digest is another"),
        ("UPDATE rows SET output_tokens = 1 WHERE n = 10", "control totals differ: output_tokens"),
        ("UPDATE rows SET tenant = 'globex' WHERE n = 10", "columns of entry 0:10"),
        ("UPDATE rows SET input_tokens = 21 - input_tokens WHERE n IN (9, 12)", ""),
        ("DELETE FROM rows WHERE n = 10", "another entry where 0:10 belongs"),
        ("DELETE FROM rows WHERE n = 12", "ends before entry 0:12"),
        ("UPDATE rows SET epoch = '1600000000001' WHERE n = 11", "another entry where 0:11 belongs"),
        ("UPDATE rows SET shard = 1", "columns of entry 0:9"),
        ("ALTER TABLE rows DROP COLUMN tenant", "cannot be read"),
    ],
)
def test_a_forged_row_is_found(copy: Path, change: str, told: str) -> None:
    """Whoever changes a number has to change every digest behind it, up to the one that was kept elsewhere."""
    forged(files(copy)[2], change)

    problems = verdict(copy).problems

    assert problems
    assert told in problems[0]


def test_forged_metadata_is_found(copy: Path) -> None:
    """The control totals are checked against the rows, and the links against both."""
    original = {file.name: file.read_bytes() for file in files(copy)}
    for find, put in [('"input_tokens":', '"input_tokens":1'), ('"link":"', '"link":"0'), ('"schema":1', '"schema":2')]:
        for file in files(copy):
            file.unlink()
        for name, data in original.items():
            (copy / "shard-0000" / name).write_bytes(data)
        forged(files(copy)[2], "SELECT 1", lambda told, find=find, put=put: told.replace(find, put))  # type: ignore[misc]

        assert verdict(copy).problems


# ── Rated rows ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Ledgers:
    """Calls of several kinds, a correction, a fee, and a re-rating of most of it."""
    ledgers = Ledgers(tmp_path_factory.mktemp("rated"))
    call = ledgers.call("2026-10-08", "steep", tokens(input_tokens=90_000, output_tokens=7))
    ledgers.call("2026-10-09", usage=tokens(input_tokens=1_000, cache_read_input_tokens=5_000))
    ledgers.call("2026-10-09", usage=tokens(input_tokens=1_000), funding="own")
    ledgers.call("2026-10-09", "nobody's", usage=tokens(input_tokens=1_000))
    ledgers.correction(call, at_ms("2026-10-10"), {"input_tokens": 20_000})
    ledgers.call("2026-10-11", usage=tokens(input_tokens=3), tenant="globex")
    ledgers.rate()
    ledgers.rate_again(DEARER)
    return ledgers


@pytest.fixture
def rated_copy(rated: Ledgers, tmp_path: Path) -> Ledgers:
    """The same, to be spoilt."""
    ledgers = Ledgers(tmp_path, client=rated.client)
    shutil.copytree(rated.path, ledgers.path)
    return ledgers


def rated_files(path: Path, folder: str = "shard-0000") -> list[Path]:
    return sorted((path / "rated" / folder).rglob("*.parquet"))


def forged_rated(file: Path, change: str, facts_too: Callable[[Any], Any] = lambda facts: facts) -> None:
    """Change rows of a file of rated rows, with the sums and the name that go with them."""
    database = duckdb.connect()
    told: Any = database.execute(f"SELECT value FROM parquet_kv_metadata('{file}') WHERE key = '{KEY}'").fetchone()
    database.execute(f"CREATE TABLE rated AS FROM '{file}'")
    database.execute(change)
    facts = facts_too(json.loads(told[0]))
    sums = sums_of(database, "rated")
    if isinstance(facts, dict):
        facts["sums"] = sums
    scratch = file.with_name("scratch")
    database.execute(
        f"COPY rated TO '{scratch}' (FORMAT parquet, KV_METADATA {{{KEY}: {duck.quoted(json.dumps(facts))}}})"
    )
    digest = sha256(scratch.read_bytes()).hexdigest()[:16]
    name = f"{file.name[:-24]}{digest}.parquet"
    scratch.rename(file.with_name(name))
    manifest_file = file.with_name("manifest.json")
    if manifest_file.exists():
        manifest = msgspec.json.decode(manifest_file.read_bytes(), type=Manifest)
        others = {one: held for one, held in manifest.files.items() if one != file.name}
        changed = msgspec.structs.replace(manifest, files=dict(sorted({**others, name: sums}.items())), digest="")
        manifest_file.write_bytes(encoded(changed.sealed()))
    file.unlink()


def test_rated_rows_are_what_they_say(rated: Ledgers) -> None:
    """Every product, every price from its list price, every row from its entry."""
    with rated.archive() as archive:
        found = verify_rated(archive)

    assert ([], 4, 1) == (found.problems, found.files, found.reratings)
    assert (len(rated.rows()), 1) == (found.rows, found.unpriced)


def test_a_bit_of_a_rated_file_that_flipped_anywhere_is_found(rated_copy: Ledgers) -> None:
    """Those of first ratings, of re-ratings, and the manifest."""
    chance = random.Random(23)
    folder = rated_copy.path / "rated"
    for file in [*rated_files(rated_copy.path)[:1], *(folder / "rating-0001").iterdir()]:
        data = file.read_bytes()
        for at in [0, len(data) - 1, *chance.sample(range(len(data)), 2)]:
            spoilt = bytearray(data)
            spoilt[at] ^= 1 << chance.randrange(8)
            file.write_bytes(spoilt)

            assert any(file.name in problem or "rated" in problem for problem in rated_copy.problems())
        file.write_bytes(data)
    assert [] == rated_copy.problems()


COST = "UPDATE rated SET list_cost = list_cost + 0.000000000001 WHERE"
ONE_PRICE = """
UPDATE rated SET list_price = 0.2, contracted_price = 0.18025, billed_price = 0.18025, upstream_price = 0.186,
    list_cost = quantity * 0.0000002, contracted_cost = quantity * 0.00000018025,
    billed_cost = quantity * 0.00000018025, upstream_cost = quantity * 0.000000186
WHERE n = 1 AND token_type = 'input'
"""


AT_TWO = (
    "UPDATE rated SET contracted_price = 2, billed_price = 2, contracted_cost = quantity * 0.000002,"
    " billed_cost = quantity * 0.000002 WHERE"
)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (f"{COST} n = 1 AND token_type = 'output'", "line 1 of entry 0:1 does not cost its price times its quantity"),
        ("UPDATE rated SET per = 1000 WHERE n = 2", "does not cost its price times its quantity"),
        ("UPDATE rated SET quantity = quantity + 1, posting = 1 WHERE n = 4", "entry 0:4 are not of what it used"),
        ("UPDATE rated SET tenant = 'globex' WHERE n = 4", "entry 0:4 are not of what it used"),
        ("UPDATE rated SET model = 'steep' WHERE n = 2", "entry 0:2 are not of what it used"),
        ("UPDATE rated SET at_ms = at_ms + 1 WHERE n = 2", "entry 0:2 are not of what it used"),
        ("UPDATE rated SET quality = 'partial' WHERE n = 3", "entry 0:3 are not of what it used"),
        ("DELETE FROM rated WHERE n = 2 AND token_type = 'cache_read'", "entry 0:2 are not of what it used"),
        ("INSERT INTO rated SELECT * FROM rated WHERE n = 2", "of entry 0:2 is there twice"),
        ("INSERT INTO rated SELECT * REPLACE (line + 64 AS line) FROM rated WHERE n = 4", "not of what it used"),
        ("UPDATE rated SET unpriced = '', currency = 'USD' WHERE n = 4", "is priced and unpriced at once"),
        ("UPDATE rated SET unpriced = 'free' WHERE n = 2", "is priced and unpriced at once"),
        ("UPDATE rated SET posting = -1 WHERE n = 2", "has a line that no rating makes"),
        ("UPDATE rated SET n = 77 WHERE n = 4", "is of an entry that is none of the file's"),
        ("UPDATE rated SET shard = 3 WHERE n = 4", "is of an entry that is none of the file's"),
        ("UPDATE rated SET booked_at_ms = booked_at_ms - 1 WHERE n = 4", "was booked at another time than it says"),
        ("UPDATE rated SET touches_ms = 1 WHERE n = 4", "was booked at another time than it says"),
        (ONE_PRICE, "entry 0:1 do not have the prices that it was rated by"),
        (f"{AT_TWO} n = 2 AND token_type = 'input'", "entry 0:2 do not have the prices that it was rated by"),
        (f"{AT_TWO} charge = 'platform_fee'", "entry 0:3 do not have the prices that it was rated by"),
        ("UPDATE rated SET price_digest = 'x' WHERE n = 2", "entry 0:2 do not have the prices that it was rated by"),
        ("UPDATE rated SET above = 100000 WHERE n = 1", "entry 0:1 do not have the prices that it was rated by"),
        ("UPDATE rated SET billed_price = 3, billed_cost = list_cost WHERE n = 3 AND line = 0", "its funding"),
    ],
)
def test_a_forged_rated_row_is_found(rated_copy: Ledgers, change: str, told: str) -> None:
    """By somebody who knows how names and sums are made; the entry is named."""
    file = rated_files(rated_copy.path)[0]
    forged_rated(file, change)

    problems = rated_copy.problems()

    assert problems
    assert told in problems[0]
    assert "/rated/shard-0000/" in problems[0]


@pytest.mark.parametrize("change", [f"{AT_TWO} n = 5 AND reverses < 0", f"{AT_TWO} n = 5 AND reverses >= 0"])
def test_a_correction_that_does_not_have_the_prices_of_its_call_is_found(rated_copy: Ledgers, change: str) -> None:
    """What it takes back, and what it posts in its place; the call is in another file."""
    forged_rated(rated_files(rated_copy.path)[1], change)

    assert any("entry 0:5 do not have the prices that it was rated by" in one for one in rated_copy.problems())


def test_a_file_that_does_not_say_what_all_of_its_rows_were_made_with_is_found(rated_copy: Ledgers) -> None:
    """By what an entry was rated is known of every one."""
    file = rated_files(rated_copy.path)[0]
    forged_rated(file, "SELECT 1", lambda facts: facts | {"made": [facts["made"][0] | {"last": 3}]})

    assert any("does not say what all of its rows were made with" in one for one in rated_copy.problems())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("DELETE FROM rated WHERE n = 2 AND posting = -1", "entry 0:2 is posted anew with another quantity"),
        ("UPDATE rated SET reverses = 5 WHERE n = 2 AND posting = -1", "does not take back what stood"),
        (
            "UPDATE rated SET quantity = 2 * quantity, list_cost = 2 * list_cost,"
            " contracted_cost = 2 * contracted_cost, billed_cost = 2 * billed_cost,"
            " upstream_cost = 2 * upstream_cost WHERE n = 2 AND posting = -1",
            "does not take back what stood",
        ),
        ("UPDATE rated SET line = line + 16777216 WHERE n = 2", "has a line that no rating makes"),
        (f"{COST} n = 2 AND posting = 1", "does not cost its price times its quantity"),
        (f"{AT_TWO} n = 2 AND token_type = 'input' AND posting = 1", "entry 0:2 do not have the prices"),
    ],
)
def test_a_forged_row_of_a_re_rating_is_found(rated_copy: Ledgers, change: str, told: str) -> None:
    """What is taken back has to have stood, and to be of the same usage."""
    forged_rated(rated_files(rated_copy.path, "rating-0001")[0], change)

    assert any(told in problem for problem in rated_copy.problems()), rated_copy.problems()


def test_what_was_taken_back_cannot_be_taken_back_once_more(rated_copy: Ledgers) -> None:
    """The second re-rating has to take back what the first one posted."""
    rated_copy.rate_again(BOOK)
    assert [] == rated_copy.problems()
    names = ("list", "contracted", "billed", "upstream")
    # What the entry cost at first, which the first re-rating took back.
    as_first = ", ".join(f"{name}_price = p.{name}_price, {name}_cost = -p.{name}_cost" for name in names)
    forged_rated(
        rated_files(rated_copy.path, "rating-0002")[0],
        f"UPDATE rated SET reverses = 0, price_digest = p.price_digest, {as_first}"
        " FROM (SELECT * FROM rated WHERE n = 2 AND posting = 1) p WHERE rated.n = 2 AND rated.posting = -1",
    )

    assert any("entry 0:2 does not take back what stood" in problem for problem in rated_copy.problems())


def test_rated_files_out_of_their_place_are_named(rated_copy: Ledgers) -> None:
    """Missing, doubled, of another archive, or of entries that are gone."""
    first, second = rated_files(rated_copy.path)
    (rated_copy.path / "rated" / "shard-0000" / "a copy.parquet").write_bytes(first.read_bytes())
    assert any("a copy.parquet is not the name of a file" in problem for problem in rated_copy.problems())
    (rated_copy.path / "rated" / "shard-0000" / "a copy.parquet").unlink()

    data = first.read_bytes()
    first.unlink()
    assert any("rated rows up to entry 0:4: it is missing" in problem for problem in rated_copy.problems())
    first.write_bytes(data)

    newest = sorted((rated_copy.path / "shard-0000").iterdir())[-1]
    newest.unlink()
    problems = rated_copy.problems()
    assert any(second.name in problem and "other entries than those up to 0:6" in problem for problem in problems)
    assert any(second.name in problem and "does not have all of its entries 0:5-6" in problem for problem in problems)

    shutil.rmtree(rated_copy.path / "rated" / "rating-0001")
    (rated_copy.path / "rated" / "rating-0002").mkdir()
    assert any("rating-0001 is missing" in problem for problem in rated_copy.problems())


def test_entries_that_were_made_anew_do_not_go_with_the_old_rows(rated_copy: Ledgers) -> None:
    """Rows carry the digest of all entries up to theirs, so an archive with other ones is found out."""
    other = Ledgers(rated_copy.path.parent.parent / f"{rated_copy.path.parent.name}-other")
    other.path.parent.mkdir()
    for one in rated_copy_entries():
        other.add([msgspec.structs.replace(one, reservation_id="another")])
    other.export()
    shutil.rmtree(rated_copy.path / "shard-0000")
    shutil.copytree(other.path / "shard-0000", rated_copy.path / "shard-0000")

    assert any("other entries than those up to 0:4" in problem for problem in rated_copy.problems())


def rated_copy_entries() -> list[LedgerEntry]:
    return [entry("plain", tokens(input_tokens=n), f"2026-10-{n:02}") for n in range(1, 7)]


@pytest.mark.parametrize("schema", [2, 4])
def test_rows_of_another_version_are_told_as_such_and_nothing_is_made_of_them(tmp_path: Path, schema: int) -> None:
    """What they were rated by is not there to be found, so no correction could be: the message says what to do."""
    ledgers = Ledgers(tmp_path)
    rated, kept = ledgers.path / "rated", tmp_path / "kept"

    def refused() -> None:
        ledgers.call("2026-10-12")
        with pytest.raises(IntegrityError, match=rf"is of schema {schema}, .* have all rated anew"):
            ledgers.rate()
        with pytest.raises(IntegrityError, match=rf"is of schema {schema}, "):
            ledgers.rows()
        assert 1 == sum("is of schema" in problem for problem in ledgers.problems())

    ledgers.call("2026-10-08")
    ledgers.rate()
    ledgers.rate_again(DEARER)
    shutil.copytree(rated, kept)
    forged_rated(rated_files(ledgers.path)[0], "SELECT 1", lambda facts: {**facts, "schema": schema})
    refused()

    shutil.rmtree(rated)
    shutil.copytree(kept, rated)
    manifest = rated / "rating-0001" / "manifest.json"
    told = json.loads(manifest.read_bytes())
    del told["scales"]
    manifest.write_text(json.dumps({**told, "schema": schema}))
    refused()

    shutil.rmtree(rated)
    ledgers.rate()
    assert [] == ledgers.problems()


def test_verify_ends_with_5_and_names_what_is_wrong_with_rated_rows(
    rated_copy: Ledgers, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that a customer runs."""
    assert 0 == main(["verify", str(rated_copy.path)])
    told = capsys.readouterr().out
    assert f"rated rows: ok, {len(rated_copy.rows()):,} in 4 files, 1 without a price; 1 re-ratings\n" in told
    forged_rated(rated_files(rated_copy.path)[0], f"{COST} n = 1 AND token_type = 'output'")

    assert 5 == main(["verify", str(rated_copy.path), "--json"])

    ran = capsys.readouterr()
    assert "line 1 of entry 0:1 does not cost its price times its quantity" in ran.err
    assert json.loads(ran.out)["rated"]["problems"]


def test_an_export_does_not_go_on_from_a_damaged_file(exported: Books, tmp_path: Path) -> None:
    """What the next file would follow is not known any more."""
    shutil.copytree(exported.path, tmp_path / "archive")
    books = Books(tmp_path, exported.client)
    files(books.path)[-1].write_bytes(b"PAR1")

    problem = books.export().problem

    assert problem is not None
    assert "damaged" == problem.problem
    assert "cannot be read as a segment" in str(problem)
