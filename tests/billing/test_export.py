"""From the ledger into the archive: every entry once, whatever happens, or a stop that names the entries."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meterlib import Usage
from meterlib.billing.archive import drafts, segments
from meterlib.billing.archive.archive import Archive
from meterlib.billing.export.export import Accepted, Exporter
from meterlib.billing.export.trim import trim
from meterlib.core.usage import Iteration
from meterlib.errors import IntegrityError
from tests.billing.exporting import LEDGER, Books


@pytest.fixture
def books(tmp_path: Path) -> Books:
    return Books(tmp_path)


def stopped(books: Books, accepted: Accepted | None = None) -> IntegrityError:
    """The problem that stopped an export."""
    problem = books.export(accepted).problem
    assert problem is not None
    return problem


# ── What is exported ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_kind_of_entry_comes_out_as_it_was_booked(books: Books) -> None:
    """Finance finds in the archive what the gateway booked, to the last field."""
    books.book_all_kinds()

    exported = books.export()

    assert (6, 6, None) == (exported.entries, exported.last, exported.problem)
    assert books.booked() == books.archived()
    assert ["settled", "cancelled", "expired", "late", "recorded", "adjusted"] == [one.kind for one in books.archived()]


def test_what_was_exported_is_not_exported_again(books: Books) -> None:
    """Operator: run it as often as you like."""
    books.book(3)
    assert 3 == books.export().entries
    before = books.files()

    assert 0 == books.export().entries

    assert before == books.files()
    books.book(2)
    assert 2 == books.export().entries
    assert books.booked() == books.archived()


def test_full_blocks_are_the_same_files_whenever_exports_ran(books: Books, tmp_path: Path) -> None:
    """Finance: an archive does not depend on the timer that filled it."""
    for count in (1, 2, 4, 1, 0, 3):
        books.book(count)
        books.export()
    assert [(1, 4), (5, 8), (9, 11)] == books.names()

    (tmp_path / "other").mkdir()
    at_once = Books(tmp_path / "other", books.client)
    at_once.export()

    assert at_once.files() == books.files()


def test_an_empty_ledger_makes_an_empty_archive(books: Books) -> None:
    """A store that nobody used yet is no trouble."""
    assert (0, 0, None) == tuple(getattr(books.export(), name) for name in ("entries", "last", "problem"))
    assert {} == books.files()


def test_memory_does_not_grow_with_the_backlog(tmp_path: Path) -> None:
    """Operator: a week's backlog is exported by the machine that exports a minute's."""
    books = Books(tmp_path)
    books.book()
    ((_, fields),) = books.client.xrange(LEDGER)
    peaks = []
    for last in (3_000, 9_000):
        with books.client.pipeline(transaction=False) as pipeline:
            for n in range(books.client.xlen(LEDGER) + 1, last + 1):
                pipeline.xadd(LEDGER, fields, id=f"{n}-0")
            pipeline.execute()
        tracemalloc.start()
        assert last == Books(tmp_path / str(last), books.client, block=1000).export().entries
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    assert peaks[1] < 1.2 * peaks[0]


# ── What stops an export ──────────────────────────────────────────────────────────────────────────────────────────────


def test_entries_of_many_megabytes_are_exported_among_others(tmp_path: Path) -> None:
    """A call of a hundred thousand passes is told as it was, and so are those around it."""
    books = Books(tmp_path, block=1000)
    passes = (Iteration(type="compaction", model="claude-opus-4-5", input_tokens=123_456, output_tokens=1),) * 100_000
    books.book(5)
    for number in range(5):
        usage = Usage(input_tokens=number, iterations=passes)
        books.meter.record("acme", {"model": "opus"}, usage, record_id=f"large-{number}")
    books.book(5)

    assert books.export().problem is None

    assert books.booked() == books.archived()


@pytest.mark.parametrize(
    ("deleted", "named", "exported"),
    [([2], "0:2", 1), ([1], "0:1", 0), ([7], "0:7", 6), ([3, 4, 5], "0:3-5", 2), (range(1, 8), "0:1-7", 0)],
    ids=str,
)
def test_a_gap_stops_the_export_and_is_named(books: Books, deleted: list[int], named: str, exported: int) -> None:
    """Finance: an entry that somebody deleted is missed at once, and what was before it is safe."""
    books.book(7)
    booked = books.booked()
    books.client.xdel(LEDGER, *(f"{n}-0" for n in deleted))

    problem = stopped(books)

    assert ("gap", (named,)) == (problem.problem, problem.entries)
    assert named in str(problem)
    assert booked[:exported] == books.archived()
    assert problem.entries == stopped(books).entries


def test_a_gap_between_two_runs_is_named(books: Books) -> None:
    """What went missing while no exporter ran is missed too."""
    books.book(3)
    books.export()
    books.book(3)
    books.client.xdel(LEDGER, "4-0")

    assert ("0:4",) == stopped(books).entries


def test_a_gap_that_somebody_accepts_is_passed_and_stays_visible(books: Books) -> None:
    """Operator: what is lost for good must not stop the billing of what is not."""
    books.book(7)
    booked = books.booked()
    books.client.xdel(LEDGER, "3-0", "4-0")
    accepted = Accepted(gaps=frozenset({(0, 3, 4)}))

    assert books.export(accepted).problem is None

    assert [*booked[:2], *booked[4:]] == books.archived()
    books.book(3)
    assert books.export().problem is None
    assert [*range(1, 3), *range(5, 11)] == [one.n for one in books.archived()]
    with books.archive() as archive:
        archive.compact(0, pieces_max=1)
    assert [*range(1, 3), *range(5, 11)] == [one.n for one in books.archived()]


def test_a_deleted_stream_stops_the_export_if_anything_is_lost(books: Books) -> None:
    """DEL on the ledger: what was exported stays the truth, and what was not is named."""
    books.book(5)
    books.export()
    books.client.delete(LEDGER)

    assert books.export().problem is None, "nothing is lost: all of it was exported"

    books.book(2)
    assert books.export().problem is None
    books.book(2)
    books.client.delete(LEDGER)
    problem = stopped(books)
    assert ("gap", ("0:8-9",)) == (problem.problem, problem.entries)
    assert 7 == len(books.archived())


def test_a_flushed_store_stops_the_export(books: Books) -> None:
    """FLUSHALL: an empty store is not taken for one without news."""
    books.book(5)
    books.export()
    before = books.archived()
    books.client.flushall()

    problem = stopped(books)

    assert ("regress", ("0:1-5",)) == (problem.problem, problem.entries)
    assert before == books.archived()


@pytest.mark.parametrize("count", [1, 5, 9])
def test_a_ledger_that_was_begun_anew_goes_on_when_somebody_says_so(books: Books, count: int) -> None:
    """Finance: entries of before and after are told apart by their epoch, though they have the same numbers."""
    books.book(5)
    books.export()
    before = books.archived()
    books.client.flushall()
    books.clock.advance(ms=1000)
    books.book(count)
    (epoch,) = {one.epoch for one in books.booked()}

    problem = stopped(books)
    assert ("epoch", ("0:1",)) == (problem.problem, problem.entries)
    assert f"--accept-epoch 0:{epoch}" in str(problem)
    assert stopped(books, Accepted(epochs={0: "1"})).problem == "epoch"
    assert before == books.archived()

    assert books.export(Accepted(epochs={0: epoch})).problem is None
    assert [*before, *books.booked()] == books.archived()
    books.book(9)
    assert books.export().problem is None
    assert [*before, *books.booked()] == books.archived()


def test_the_same_number_with_another_entry_stops_the_export(books: Books) -> None:
    """A server that lost its tail and went on: the last exported entry is another one there."""
    books.book(6)
    books.export()
    before = books.archived()
    books.rewrite(6, lambda fields: fields.update({b"digest": b"0" * 16}))
    books.book(3)

    problem = stopped(books)

    assert ("conflict", ("0:6",)) == (problem.problem, problem.entries)
    assert "'r6', booked at 2020-09-13 12:26:40.060+00:00" in str(problem)
    assert before == books.archived()


def test_an_entry_that_is_not_meterlibs_stops_the_export(books: Books) -> None:
    """Somebody's XADD between two entries is not billed, and not passed over."""
    books.book(2)
    books.client.xadd(LEDGER, {"kind": "settled"}, id="2-1")

    problem = stopped(books)

    assert ("conflict", ("0:2",)) == (problem.problem, problem.entries)
    assert 2 == len(books.archived())


# ── Entries of another version ────────────────────────────────────────────────────────────────────────────────────────


def test_fields_of_a_later_version_are_kept_and_told(books: Books) -> None:
    """An exporter that is older than the gateway loses nothing."""
    books.book(3)
    outcome = b'{"usage":{"input_tokens":2,"speech":{"minutes":3}},"mood":"good"}'
    books.rewrite(2, lambda fields: fields.update({b"outcome": outcome, b"region": b"eu\xc3\xa9"}))

    assert books.export().problem is None

    assert books.booked() == books.archived()
    with books.archive() as archive:
        assert ["outcome.mood", "outcome.usage.speech", "region"] == archive.facts(archive.segments(0)[0]).unknown
        (line,) = [line for portion in archive.lines(archive.segments(0)) for line in portion if line[:2] == b"2\x1f"]
        assert b'"speech":{"minutes":3}' in line
        assert rb"eu\u00e9" in line


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("outcome", b'{"usage":{"input_tokens":"12"}}', "input_tokens is '12'"),
        ("outcome", b'{"usage":{"input_tokens":1.5}}', "input_tokens is 1.5"),
        ("outcome", b'{"usage":{"input_tokens":99999999999999999999}}', "input_tokens is 99999999999999999999"),
        ("outcome", b'{"usage":', "cannot be read"),
        ("outcome", b'{"quality":"guessed"}', "cannot be read"),
        ("call", b'{"attributes":{}}', "cannot be read"),
        ("call", b'{"tenant":"acme","funding":"lent"}', "cannot be read"),
        ("kind", b"refunded", "kind 'refunded'"),
        ("kind", b"set\ntled", "kind"),
        ("booked_at", b"12.5", "cannot be read"),
        ("booked_at", b"007", "booked_at is '007'"),
        ("id", b"\xff", "no printable text"),
    ],
)
@pytest.mark.parametrize("exported", [0, 1])
def test_an_entry_that_cannot_be_told_in_columns_stops_the_export(
    books: Books, name: str, value: bytes, told: str, exported: int
) -> None:
    """Nothing is billed wrong because an older exporter took a new number for unknown."""
    books.book(exported)
    books.export()
    books.book(6 - exported)
    booked = books.booked()
    books.rewrite(3, lambda fields: fields.update({name.encode(): value}))

    problem = stopped(books)

    assert ("unreadable", ("0:3",)) == (problem.problem, problem.entries)
    assert told in str(problem)
    assert booked[:2] == books.archived()


def test_an_entry_without_a_field_stops_the_export(books: Books) -> None:
    """The same for what is not there."""
    books.book(3)
    books.rewrite(2, lambda fields: fields.__delitem__(b"call"))

    problem = stopped(books)

    assert ("unreadable", ("0:2",)) == (problem.problem, problem.entries)
    assert 1 == len(books.archived())


# ── Two at once, and interrupted ones ─────────────────────────────────────────────────────────────────────────────────


def test_two_exporters_of_the_same_entries_write_each_once(books: Books) -> None:
    """A second exporter that was started by mistake does no harm."""
    books.book(10)
    with (
        books.archive() as one,
        books.archive() as other,
        Exporter(one, books.run) as first,
        Exporter(other, books.run) as second,
    ):
        assert 10 == first.export(0).entries
        assert second.export(0).problem is None
    assert books.booked() == books.archived()
    assert [(1, 4), (5, 8), (9, 10)] == books.names()


@pytest.mark.parametrize("ahead", [1, 2, 3, 6])
def test_an_exporter_that_is_overtaken_does_no_harm(books: Books, monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    """Two exporters whose files overlap leave each entry once, and compacting removes what is left over."""
    books.book(2)
    publish = segments.publish

    def overtaken(scratch: Path, final: Path) -> None:
        monkeypatch.setattr(segments, "publish", publish)
        books.book(ahead)
        books.export()
        publish(scratch, final)

    monkeypatch.setattr(segments, "publish", overtaken)
    assert books.export().problem is None

    assert books.booked() == books.archived()
    books.book(8)
    books.export()
    assert books.booked() == books.archived()
    with books.archive() as archive:
        archive.compact(0, pieces_max=1)
    last = books.booked()[-1].n
    assert [(first, min(first + 3, last)) for first in range(1, last + 1, 4)] == books.names()


def test_another_exporters_work_in_progress_is_left_alone(books: Books) -> None:
    """Whoever cleans up must not take the files of one that is still writing."""
    books.book(2)
    with books.archive() as busy:
        scratch = busy.work().folder / "1.csv"
        scratch.write_text("x")

        books.export()

        assert scratch.exists()
    assert not scratch.exists()


def test_an_interrupt_leaves_no_temporary_file(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle: the next run finds whole files only."""
    books.book(6)

    def interrupted(draft: Any, lines: Any, unknown: Any = ()) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(drafts.Draft, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            books.export()

    assert {} == books.files()
    assert [books.path / "shard-0000"] == list(books.path.iterdir())
    books.export()
    assert books.booked() == books.archived()


class Killed(BaseException):
    """The process is gone: nothing is cleaned up."""


def dies(patched: pytest.MonkeyPatch, step: str) -> None:
    """Make the exporter die at a step, leaving its temporary files as a killed one does."""

    def die(*_: Any, **__: Any) -> Any:
        raise Killed

    def link_and_die(scratch: Any, final: Any) -> None:
        os_link(scratch, final)
        raise Killed

    os_link = os.link
    if step == "read":
        patched.setattr(drafts.Draft, "add", die)
    elif step == "write":
        patched.setattr(segments, "synced_digest", die)
    elif step == "sync":
        patched.setattr(os, "link", die)
    elif step == "link":
        patched.setattr(os, "link", link_and_die)
    elif step == "compact":
        patched.setattr(Archive, "compact", die)
    elif step == "join":
        patched.setattr(Path, "unlink", die)
    patched.setattr(drafts.Draft, "discard", lambda draft: draft._stream.close())
    patched.setattr(shutil, "rmtree", lambda *_, **__: None)


actions = st.one_of(
    st.integers(1, 6).map(lambda count: ("book", count)),
    st.just(("kinds", 0)),
    st.just(("export", 0)),
    st.just(("compact", 0)),
    st.just(("trim", 0)),
    st.sampled_from(["read", "write", "sync", "link", "compact", "join"]).map(lambda step: (step, 0)),
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=st.lists(actions, min_size=1, max_size=10))
def test_whatever_dies_when_the_archive_has_each_entry_once(
    history: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Exactly once, as a law: any order of bookings, exports, crashes, joins and trims; and always the same files."""
    books = Books(tmp_path_factory.mktemp("history"))
    booked: list[Any] = []
    for action, count in history:
        if action in ("book", "kinds"):
            books.book_all_kinds() if action == "kinds" else books.book(count)
            after = booked[-1].n if booked else 0
            booked += books.meter.ledger(0, after)
        elif action == "export":
            assert books.export().problem is None
        elif action == "compact":
            with books.archive() as archive:
                archive.compact(0, pieces_max=1)
        elif action == "trim":
            with books.archive() as archive:
                trim([archive], books.run, 0, below=2**53 - 1, keep=1)
        else:
            with pytest.MonkeyPatch.context() as patched:
                dies(patched, action)
                with suppress(Killed):
                    books.export()
        assert booked[: len(books.archived())] == books.archived()

    assert books.export().problem is None
    assert booked == books.archived()
    with books.archive() as archive:
        archive.compact(0, pieces_max=1)
    assert booked == books.archived()
    assert not [name for name in books.files() if ".work-" in name]
