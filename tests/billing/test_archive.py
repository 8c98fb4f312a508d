"""The archive's files: what stands in them, in columns and verbatim, and which of them are read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meterlib import LedgerEntry
from meterlib.billing.archive.archive import Archive
from meterlib.billing.archive.lines import Lines, entries_of
from meterlib.billing.archive.rows import COUNTS, MADE, STORED, VERBATIM, chained, entry_from, fields_of, first_link
from meterlib.billing.archive.segments import Position, Segment
from meterlib.core.ledger import CallFacts, Outcome, encode, entry_of
from meterlib.errors import IntegrityError, UsageError
from tests.billing.exporting import Books

# ── Rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

texts = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12)
names = st.from_regex(r"[A-Za-z][A-Za-z0-9_.-]{0,8}", fullmatch=True)
counts = st.none() | st.integers(-(2**53), 2**53 - 1)
usages = st.fixed_dictionaries(
    {},
    optional={
        "input_tokens": counts,
        "cache_creation_input_tokens": counts,
        "cache_read_input_tokens": counts,
        "output_tokens": counts,
        "cache_creation": st.none()
        | st.dictionaries(st.sampled_from(["ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens"]), counts),
        "output_tokens_details": st.dictionaries(st.just("thinking_tokens"), counts),
        "server_tool_use": st.dictionaries(st.sampled_from(["web_search_requests", "web_fetch_requests"]), counts),
        "service_tier": texts,
        "speed": texts,
        "inference_geo": texts,
        "iterations": st.lists(st.dictionaries(names, counts, max_size=3), max_size=3),
        "amounts": st.dictionaries(st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True), st.integers(0, 2**53 - 1)),
        "speech": st.dictionaries(names, counts, max_size=2),
    },
)
calls = st.builds(
    CallFacts,
    tenant=texts,
    attributes=st.dictionaries(st.sampled_from(["provider", "model"]) | names, texts, max_size=4),
    funding=st.sampled_from(["hosted", "own"]),
)
outcomes = st.builds(
    Outcome,
    usage=usages,
    quality=st.sampled_from(["final", "partial", "estimated", "split_unknown"]),
    facts=st.dictionaries(names, texts, max_size=3),
    adjusts=st.sampled_from(["", "0:17"]),
    reason=st.just("") | texts,
    actor=st.just("") | texts,
)


@st.composite
def stored(draw: st.DrawFn) -> dict[bytes, bytes]:
    """The fields of an entry as they stand in the store, those of a later version included."""
    kind = draw(st.sampled_from(["settled", "cancelled", "expired", "late", "recorded", "adjusted"]))
    fields = {
        "kind": kind,
        "after": draw(st.sampled_from(["", "expired", "cancelled", "unknown"])),
        "id": draw(st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)),
        "reserved_at": str(draw(st.integers(0, 2**53))),
        "booked_at": str(draw(st.integers(0, 2**53))),
        "call": encode(draw(calls)).decode(),
        "estimate": draw(st.just("") | usages.map(lambda usage: encode(usage).decode())),  # type: ignore[arg-type]
        "outcome": "" if kind in ("cancelled", "expired") else encode(draw(outcomes)).decode(),
        "digest": draw(st.sampled_from(["", "0123456789abcdef"])),
        "epoch": "1790000000000",
        **draw(st.dictionaries(st.sampled_from(["region", "v"]), texts, max_size=2)),
    }
    return {name.encode(): value.encode() for name, value in fields.items()}


def archived(folder: Path, page: list[tuple[int, dict[bytes, bytes]]]) -> tuple[Archive, Segment]:
    """An archive of one segment with these entries."""
    archive = Archive(folder, 1000)
    archive.path.mkdir(exist_ok=True)
    draft = archive.draft(0, "1790000000000", page[0][0], Position("", 0, first_link(0)))
    lines = Lines()
    draft.add(lines.of(page), lines.unknown)
    return archive, archive.seal(draft)


@given(entries=st.lists(stored(), min_size=1, max_size=5))
def test_an_entry_comes_back_from_its_row_as_it_went_in(
    entries: list[dict[bytes, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Lossless, as a law: what the ledger can say, the archive can say, fields of a later version included."""
    page = list(enumerate(entries, 1))
    archive, segment = archived(tmp_path_factory.mktemp("rows"), page)

    with archive:
        assert [entry_of(0, n, fields) for n, fields in page] == list(archive.entries(0))
        lines = [line for portion in archive.lines([segment]) for line in portion]

    assert page == [fields_of(line) for line in lines]


def as_sent(n: int, fields: dict[bytes, bytes]) -> tuple[bytes, list[bytes]]:
    """An entry as the server sends it."""
    return b"%d-0" % n, [part for pair in fields.items() for part in pair]


def of_this_version(fields: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """An entry without what only later versions know."""
    kept = {name: fields[name] for name in STORED}
    return kept | ({b"outcome": b"{}"} if b"speech" in fields[b"outcome"] else {})


@pytest.mark.parametrize("what", ["nothing", "value", "name", "order", "less", "more", "id", "epoch"])
@settings(max_examples=20)
@given(entries=st.lists(stored() | stored().map(of_this_version), min_size=1, max_size=3), change=st.data())
def test_a_page_has_the_lines_of_its_entries_or_each_is_looked_at_by_itself(
    what: str, entries: list[dict[bytes, bytes]], change: st.DataObject
) -> None:
    """The quick way says nothing that the thorough one would not, whatever is wrong with one of the entries."""
    page = [as_sent(n, fields) for n, fields in enumerate(entries, 7)]
    at = change.draw(st.integers(0, len(page) - 1))
    sent = page[at][1]
    place = change.draw(st.integers(0, len(sent) - 1))
    junk = change.draw(st.sampled_from([b"", b"x", b"7", b"{}", b'{"tenant":1}', b"\xff", b"[", b"-1", b"007"]))
    if what in ("value", "name"):
        sent[place - place % 2 + (what == "value")] = junk
    elif what == "order":
        sent[:2], sent[2:4] = sent[2:4], sent[:2]
    elif what == "less":
        del sent[place - place % 2 : place - place % 2 + 2]
    elif what == "more":
        sent += [b"kind", b"late"]
    elif what == "id":
        page[at] = (change.draw(st.sampled_from([b"7-1", b"6-0", b"99-0"])), sent)
    epoch = "1790000000001" if what == "epoch" else "1790000000000"

    quick = Lines().plain(page, 7, epoch)

    if quick is not None:
        assert entries_of(page) == [fields_of(line) for line in quick]
        assert all(list(STORED) == told[::2] and epoch.encode() == told[-1] for _, told in page)
        assert [(b"%d-0" % n) for n in range(7, 7 + len(page))] == [sent_id for sent_id, _ in page]
        assert quick == Lines().of(entries_of(page))
    else:
        unknown = any(len(fields) > len(STORED) or b"speech" in fields[b"outcome"] for fields in entries)
        assert what != "nothing" or unknown


def columns_of(entry: LedgerEntry) -> dict[str, Any]:
    """What the columns of an entry should hold, worked out in the plainest way."""
    usage: Any = entry.usage

    def at(place: str) -> Any:
        value = usage
        for name in place.split("."):
            value = (value or {}).get(name)
        return value

    return {
        "tenant": entry.tenant,
        "funding": entry.funding,
        "provider": entry.attributes.get("provider"),
        "model": entry.attributes.get("model"),
        "attributes": dict(entry.attributes),
        "quality": entry.quality,
        **{column: at(place) for column, place in COUNTS.items()},
        **{name: usage.get(name) for name in ("service_tier", "speed", "inference_geo", "iterations", "amounts")},
        "facts": dict(entry.facts) or None,
        "adjusts": entry.adjusts or None,
        "reason": entry.reason or None,
        "actor": entry.actor or None,
    }


@given(entries=st.lists(stored(), min_size=1, max_size=5))
def test_columns_hold_what_the_entry_says_and_null_is_unknown(
    entries: list[dict[bytes, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whoever asks in SQL gets the same numbers as whoever reads entries; signs of corrections included."""
    page = list(enumerate(entries, 1))
    archive, segment = archived(tmp_path_factory.mktemp("rows"), page)

    with archive:
        rows = duckdb.connect().execute(f"SELECT {', '.join(MADE)} FROM read_parquet(?) ORDER BY n", [
            str(archive.file(segment))
        ])  # fmt: skip
        found = [dict(zip(MADE, row, strict=True)) for row in rows.fetchall()]

    for row in found:
        for name in ("attributes", "facts", "iterations", "amounts"):
            row[name] = row[name] and json.loads(row[name])
    assert [columns_of(entry_of(0, n, fields)) for n, fields in page] == found


def test_a_file_can_be_read_without_meterlib(tmp_path: Path) -> None:
    """Finance opens it in any tool that reads Parquet, and asks in SQL."""
    books = Books(tmp_path)
    books.book_all_kinds()
    books.export()

    found = duckdb.connect().execute(
        "SELECT model, sum(input_tokens), max(attributes ->> 'session'), any_value(shard), count(*)"
        f" FROM '{books.path}/**/*.parquet' WHERE tenant = 'acme' GROUP BY model"
    )

    assert [("claude-opus-4-5", 0, "ü≠", 0, 5)] == found.fetchall()
    described = duckdb.connect().execute(f"DESCRIBE FROM '{books.path}/**/*.parquet'").fetchall()
    assert ["shard", *VERBATIM, *MADE] == [name for name, *_ in described]


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_links_do_not_depend_on_how_entries_are_cut_into_files() -> None:
    """Files may be joined at any time, and those that follow still fit."""
    lines = [b"%d" % n for n in range(10)]

    assert chained(chained(first_link(0), lines[:3]), lines[3:]) == chained(first_link(0), lines)
    assert first_link(0) != first_link(1)


def test_a_name_says_what_is_in_the_file() -> None:
    """The listing is the checkpoint."""
    segment = Segment("1790000000000", 3, 1, 50_000, "8c1f09a2b7d4e650")

    assert "1790000000000-0003-000000000001-000000050000-8c1f09a2b7d4e650.parquet" == segment.name
    assert segment == Segment.named(segment.name)
    for name in (".work-x", "x.parquet", segment.name + ".tmp", segment.name.replace("-", "_")):
        assert Segment.named(name) is None


class Cut(Archive):
    """An archive of made-up names, to see which are read."""

    def __init__(self, *ranges: tuple[int, int]) -> None:
        super().__init__(Path("nowhere"), 100)
        self.found = sorted(Segment("1", 0, first, last, f"{at}") for at, (first, last) in enumerate(ranges))

    def listed(self, shard: int) -> list[Segment]:
        return self.found

    def _follows(self, segment: Segment, end: int) -> bool:
        return False

    def _check_begin(self, segment: Segment, before: Segment | None) -> None:
        """Nothing was before the first one."""


@pytest.mark.parametrize(
    ("ranges", "way"),
    [
        ([(1, 9), (10, 20)], [(1, 9), (10, 20)]),
        ([(1, 5), (6, 9), (1, 9), (10, 20)], [(1, 9), (10, 20)]),
        ([(1, 30), (1, 31), (31, 40), (32, 33)], [(1, 30), (31, 40)]),
        ([(1, 30), (1, 31), (31, 40), (32, 45)], [(1, 31), (32, 45)]),
        ([(1, 2), (3, 4), (1, 3), (4, 4), (1, 4), (5, 6)], [(1, 4), (5, 6)]),
        ([(5, 6), (7, 9)], [(5, 6), (7, 9)]),
    ],
    ids=str,
)
def test_each_entry_is_read_once_whatever_files_overlap(ranges: Any, way: Any) -> None:
    """Two exporters, or a compaction that was cut short, leave files that hold the same entries."""
    assert way == [(segment.first, segment.last) for segment in Cut(*ranges).segments(0)]


def test_a_missing_file_is_named() -> None:
    """Reading stops before it, and not at the end."""
    with pytest.raises(IntegrityError, match=r"no segment with entries 0:5-9: it is missing") as caught:
        Cut((1, 4), (10, 20)).segments(0)

    assert ("damaged", ("0:5-9",)) == (caught.value.problem, caught.value.entries)


def test_compacting_joins_the_last_pieces_when_asked(tmp_path: Path) -> None:
    """Many short files become one, and what is in them stays the same."""
    books = Books(tmp_path)
    for _ in range(3):
        books.book()
        books.export()
    assert [(1, 1), (2, 2), (3, 3)] == books.names()
    with books.archive() as archive:
        before = archive.position(0)

        assert 0 == archive.compact(0)
        assert 3 == archive.compact(0, pieces_max=1)

        assert before == archive.position(0)
    assert [(1, 3)] == books.names()
    assert books.booked() == books.archived()
    books.book(2)
    books.export()
    assert [(1, 4), (5, 5)] == books.names()


def test_a_compaction_that_fails_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece that cannot be read, or that somebody else has joined meanwhile: no file of lines stays behind."""
    books = Books(tmp_path)
    for _ in range(3):
        books.book()
        books.export()
    with books.archive() as archive:

        def unreadable(pieces: object) -> Iterator[list[bytes]]:
            yield []
            raise IntegrityError("unreadable", "the disk fails")

        monkeypatch.setattr(archive, "lines", unreadable)
        with pytest.raises(IntegrityError):
            archive.compact(0, pieces_max=1)

        assert [] == list(archive.work().folder.glob("*.csv"))


def test_another_segment_size_holds_from_then_on(tmp_path: Path) -> None:
    """A setting that was changed does not touch what is there, nor the entries."""
    books = Books(tmp_path)
    books.book(9)
    books.export()
    books.block = 6
    books.book(5)
    books.export()
    books.block = 3
    books.book(5)
    books.export()

    assert books.booked() == books.archived()


def test_reading_goes_on_when_files_are_joined_meanwhile(tmp_path: Path) -> None:
    """A compaction takes files away that somebody has listed; each entry is read once all the same."""
    books = Books(tmp_path)
    for _ in range(3):
        books.book()
        books.export()
    with books.archive() as archive, books.archive() as other:
        reading = archive.entries(0)
        assert 1 == next(reading).n

        other.compact(0, pieces_max=1)

        assert [2, 3] == [entry.n for entry in reading]


def test_a_file_that_vanishes_is_looked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between listing and reading, somebody joined it with others."""
    books = Books(tmp_path)
    books.book(2)
    books.export()
    with books.archive() as archive:
        (segment,) = listed = archive.listed(0)
        gone = [Segment(segment.epoch, 0, 1, 1, "0" * 16)]
        answers = [gone, gone, listed]
        monkeypatch.setattr(archive, "listed", lambda shard: answers.pop(0))

        assert 2 == archive.position(0).n


def test_without_duckdb_the_archive_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one thing that is not installed by default is named."""
    monkeypatch.setitem(sys.modules, "duckdb", None)

    with pytest.raises(UsageError, match=r"pip install 'meterlib\[billing\]'"):
        Archive(tmp_path).facts(Segment("1790000000000", 0, 1, 2, "0" * 16))


def test_meterlib_is_imported_without_duckdb() -> None:
    """Whoever does not bill does not pay for it."""
    program = "import sys, meterlib, meterlib.cli, meterlib.billing.export.export; print('duckdb' in sys.modules)"

    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert "False\n" == ran.stdout


def test_an_entry_is_read_from_its_line() -> None:
    """The line is all that is needed."""
    fields = {b"kind": b"expired", b"after": b"", b"id": b"r1", b"reserved_at": b"1", b"booked_at": b"2"}
    fields |= {b"call": b'{"tenant":"acme"}', b"estimate": b'{"input_tokens":5}', b"outcome": b"", b"digest": b""}
    fields |= {b"epoch": b"1790000000000"}
    (line,) = Lines().of([(7, fields)])

    assert entry_of(3, 7, fields) == entry_from(3, line)
