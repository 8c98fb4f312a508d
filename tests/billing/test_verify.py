"""An archive that is not what was exported is found out, from its files alone, and what is wrong is named."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import duckdb
import pytest

from meterlib.billing.archive import Archive
from meterlib.billing.segments import KEY
from meterlib.billing.verify import Known, ShardVerdict, verify
from tests.billing.exporting import Books


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


def test_an_export_does_not_go_on_from_a_damaged_file(exported: Books, tmp_path: Path) -> None:
    """What the next file would follow is not known any more."""
    shutil.copytree(exported.path, tmp_path / "archive")
    books = Books(tmp_path, exported.client)
    files(books.path)[-1].write_bytes(b"PAR1")

    problem = books.export().problem

    assert problem is not None
    assert "damaged" == problem.problem
    assert "cannot be read as a segment" in str(problem)
