"""A ledger that lost exported entries goes on: what was exported stays, and what came since is exported once."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meterlib import LedgerEntry, Meter, StoreOptions, Usage
from meterlib.billing.archive.archive import Archive
from meterlib.billing.export.export import Accepted, Exporter
from meterlib.billing.export.fork import Loss, fork, loss_of
from meterlib.billing.export.trim import trim
from meterlib.cli import main
from meterlib.core.ledger import encode
from meterlib.errors import IntegrityError, StoreRefused, StoreUnavailable
from meterlib.store.flows import NewEpoch
from tests.billing.exporting import POLICY, Books
from tests.support.servers import Server, available, start_server

IMPATIENT = StoreOptions(shards=1, timeout_ms=50, deadline_ms=60)
AOF = Path("appendonlydir") / "appendonly.aof.1.incr.aof"


class ForgetfulBooks(Books):
    """A store that can lose everything it was told since a moment, as one does that comes back from an old file."""

    def remember(self) -> None:
        """The moment."""
        self.kept = {key: self.client.dump(key) for key in self.client.scan_iter()}

    def lose(self) -> None:
        """All of it since."""
        self.client.flushall()
        for key, value in self.kept.items():
            self.client.restore(key, 0, value)

    def loss(self) -> Loss | None:
        """What a look finds."""
        with self.archive() as archive:
            return loss_of([archive], self.run, 0)

    def fork(self) -> NewEpoch:
        """Begin another epoch."""
        loss = self.loss()
        assert loss is not None
        return fork(loss, self.run)


@pytest.fixture
def books(valkey: Server, tmp_path: Path) -> Iterator[ForgetfulBooks]:
    with valkey.client() as client:
        client.flushall()
        books = ForgetfulBooks(tmp_path, client, valkey.url)
        yield books
        books.close()


def content(entry: LedgerEntry) -> bytes:
    """All of an entry but where it stands."""
    return encode(msgspec.structs.replace(entry, n=0, epoch=""))


@pytest.mark.parametrize("since", [0, 1, 2, 5])
def test_after_a_fork_the_export_goes_on_by_itself(books: ForgetfulBooks, since: int) -> None:
    """However many entries came since the loss: each is exported once, under a number that no other ever had."""
    books.book(4)
    books.remember()
    books.book(2)
    books.export()
    exported = books.archived()
    books.lose()
    books.book(since)
    came = books.booked()[4:]
    problem = books.export().problem
    assert problem is not None
    assert "meterlib ledger fork --shard 0" in str(problem)

    begun = books.fork()

    last = max(6, 4 + since)
    assert (last + 1, since) == (begun.first, begun.moved)
    assert books.export().problem is None
    books.book(3)
    again = books.export()
    assert (None, begun.epoch, last + since + 3) == (again.problem, again.epoch, again.last)
    archived = books.archived()
    assert exported == archived[:6]
    assert [content(entry) for entry in came] == [content(entry) for entry in archived[6 : 6 + since]]
    assert [*range(1, 7), *range(last + 1, last + since + 4)] == [entry.n for entry in archived]
    assert {begun.epoch} == {entry.epoch for entry in archived[6:]}
    assert books.booked() == exported[:4] + archived[6:]


def test_what_is_only_here_or_only_there_is_told_before(books: ForgetfulBooks) -> None:
    """Whoever decides sees what is at stake, and whose usage would be billed twice."""
    books.book(4)
    books.remember()
    books.book(3)
    books.export()
    books.lose()
    books.meter.record("acme", {"model": "opus"}, Usage(input_tokens=6), record_id="r6")
    books.meter.record("acme", {}, Usage(input_tokens=1), record_id="new")

    loss = books.loss()

    assert loss is not None
    assert "regress" == loss.problem.problem
    assert (4, (7, 3, 5, 7), (2, 5, 6)) == (
        loss.kept.n,
        (loss.exported.n, loss.lost.count, loss.lost.first, loss.lost.last),
        (loss.unexported.count, loss.unexported.first, loss.unexported.last),
    )
    assert ["r5", "r6", "r7"] == [entry.reservation_id for entry in loss.lost.shown]
    assert ["r6", "new"] == [entry.reservation_id for entry in loss.unexported.shown]
    assert ["r6"] == loss.twice


def test_a_call_that_is_repeated_is_told_its_entrys_new_number(books: ForgetfulBooks) -> None:
    """A correction names the entry by number: the old one is another's."""
    books.book(2)
    books.remember()
    books.book(3)
    books.export()
    books.lose()
    usage = Usage(input_tokens=4)
    held = books.meter.reserve("acme", {"model": "opus"})
    before = books.meter.settle("acme", held.id, usage)
    assert 3 == before.n

    begun = books.fork()

    after = books.meter.settle("acme", held.id, usage)
    assert begun.first == after.n == 6
    assert (before.booked_at, before.attributes) == (after.booked_at, after.attributes)
    assert 6 == books.meter.find("acme", held.id).n
    books.meter.adjust(after, {"input_tokens": -1}, "test")
    assert books.export().problem is None
    assert "0:6" == books.archived()[-1].adjusts


def test_a_flushed_store_goes_on_behind_what_was_exported(books: ForgetfulBooks) -> None:
    """Nothing is left, or a ledger begun anew by itself: no number is given twice."""
    books.book(5)
    books.export()
    books.client.flushall()
    assert (6, 0) == (books.fork().first, 0)
    books.book(2)
    assert books.export().problem is None
    books.client.flushall()
    books.clock.advance(ms=1000)
    books.book(3)
    came = [content(entry) for entry in books.booked()]

    begun = books.fork()

    assert (8, 3) == (begun.first, begun.moved)
    assert books.export().problem is None
    assert [*range(1, 11)] == [entry.n for entry in books.archived()]
    assert came == [content(entry) for entry in books.archived()[7:]]


def test_a_fork_that_is_lost_itself_is_made_again(books: ForgetfulBooks) -> None:
    """A server that goes back behind its own fork: its epoch comes after every one that was exported."""
    forgetful(books)
    first = books.fork()
    books.book(2)
    assert books.export().problem is None
    exported = books.archived()
    books.lose()
    books.book(1)

    second = books.fork()

    assert second.epoch > first.epoch
    assert second.first == exported[-1].n + 1
    assert books.export().problem is None
    assert exported == books.archived()[:-1]
    assert len(exported) + 1 == len({entry.n for entry in books.archived()})


def test_what_a_lost_fork_had_moved_is_not_exported_again(books: ForgetfulBooks) -> None:
    """A server that goes back behind a fork, to entries that were exported under their new numbers: they are known."""
    books.book(4)
    books.remember()
    books.book(2)
    books.export()
    books.lose()
    books.book(3)
    books.remember()
    first = books.fork()
    books.book(2)
    assert books.export().problem is None
    exported = books.archived()
    books.lose()
    held = books.booked()[-1]
    books.book(2)
    books.meter.adjust(held, {"input_tokens": -1}, "counted twice")
    loss = books.loss()
    assert loss is not None
    assert ((7, first.first + 2), (2, 3), []) == (
        (loss.kept.stored_n, loss.kept.n),
        (loss.lost.count, loss.unexported.count),
        loss.twice,
    )

    second = books.fork()

    assert (exported[-1].n + 1, 3) == (second.first, second.moved)
    assert books.export().problem is None
    archived = books.archived()
    assert exported == archived[:-3]
    assert f"0:{first.first + 2}" == archived[-1].adjusts
    assert held.reservation_id == archived[8].reservation_id
    assert books.booked() == archived[:4] + archived[-3:]


def test_a_call_that_a_lost_fork_had_moved_keeps_its_exported_number(books: ForgetfulBooks) -> None:
    """Whoever repeats it, or corrects it, names the entry that is in the archive."""
    books.book(2)
    books.export()
    books.client.flushall()
    books.clock.advance(ms=1000)
    held = books.meter.reserve("acme", {"model": "opus"})
    books.meter.settle("acme", held.id, Usage(input_tokens=4))
    books.remember()
    first = books.fork()
    assert (None, 3) == (books.export().problem, first.first)
    books.lose()

    books.fork()

    assert 3 == books.meter.settle("acme", held.id, Usage(input_tokens=4)).n
    assert (None, 3) == (books.export().problem, len(books.archived()))


def test_entries_that_two_lost_forks_had_moved_are_known_by_both_numbers(books: ForgetfulBooks) -> None:
    """In a row in the store, they are apart in the archive."""
    books.book(4)
    books.export()
    books.client.flushall()
    books.clock.advance(ms=1000)
    books.book(1)
    books.meter.adjust(books.booked()[0], {"input_tokens": -1}, "test", adjust_id="corrected")
    books.remember()
    books.fork()
    books.book(2)
    assert books.export().problem is None
    books.lose()
    books.meter.record("acme", {}, Usage(input_tokens=3), record_id="later")
    books.remember()
    books.fork()
    assert books.export().problem is None
    exported = books.archived()
    assert [1, 2, 3, 4, 5, 6, 7, 8, 9] == [entry.n for entry in exported]
    assert ("0:5", "corrected", "later") == (
        exported[5].adjusts,
        exported[5].reservation_id,
        exported[8].reservation_id,
    )
    books.lose()

    assert 0 == books.fork().moved

    assert books.export().problem is None
    assert exported == books.archived()
    assert 9 == books.meter.record("acme", {}, Usage(input_tokens=3), record_id="later").n
    assert (
        6
        == books.meter.adjust(
            msgspec.structs.replace(exported[4], n=1), {"input_tokens": -1}, "test", adjust_id="corrected"
        ).n
    )


@pytest.mark.parametrize("corrected", [4, 3])
def test_a_correction_moves_with_the_entry_that_it_corrects(books: ForgetfulBooks, corrected: int) -> None:
    """It is booked by the number that its entry has in the store; one that stays where it is stays named as it is."""
    books.book(3)
    books.remember()
    books.book(2)
    books.export()
    books.lose()
    books.book(1)
    books.meter.adjust(books.booked()[corrected - 1], {"input_tokens": -1}, 'not "adjusts":"0:4"')
    first = books.meter.adjust(books.booked()[-1], {"input_tokens": 1}, "after all")
    assert "0:5" == first.adjusts

    books.fork()

    assert books.export().problem is None
    archived = {entry.n: entry for entry in books.archived()}
    assert (f"0:{ {4: 7, 3: 3}[corrected] }", "0:8") == (archived[8].adjusts, archived[9].adjusts)
    assert 'not "adjusts":"0:4"' == archived[8].reason


@pytest.mark.parametrize("model", ["opus", "another"])
def test_a_correction_of_what_was_lost_goes_on_naming_it(books: ForgetfulBooks, model: str) -> None:
    """The entry that has its number in the store meanwhile is another call's, however like it."""
    books.book(3)
    books.remember()
    books.book(1)
    lost = books.booked()[-1]
    books.export()
    books.lose()
    books.meter.record("acme", {"model": model}, Usage(input_tokens=1))
    books.meter.adjust(lost, {"input_tokens": -1}, "counted twice")

    books.fork()

    assert books.export().problem is None
    assert ("0:4", lost.reservation_id) == (books.archived()[-1].adjusts, books.archived()[-1].adjusts_id)


def test_a_ledger_that_lost_nothing_is_not_forked(books: ForgetfulBooks) -> None:
    """Neither one that fits, nor one whose trouble is another."""
    books.book(3)
    assert books.loss() is None
    books.export()
    books.book(2)

    assert books.loss() is None


def test_two_who_decide_at_once_begin_one_epoch(books: ForgetfulBooks) -> None:
    """The second is told what the first did; one who looked before another loss is refused."""
    books.book(2)
    books.remember()
    books.book(2)
    books.export()
    books.lose()
    books.book(1)
    loss = books.loss()
    assert loss is not None

    assert fork(loss, books.run) == fork(loss, books.run)

    loss.exported = loss.exported._replace(n=9)
    with pytest.raises(StoreRefused):
        fork(loss, books.run)
    assert books.export().problem is None
    assert 5 == len(books.archived())


def test_a_fork_of_many_entries_is_waited_for(books: ForgetfulBooks, valkey: Server) -> None:
    """Operator: the server answers nobody while it moves them, and then says that it was done."""
    books.block = 5000
    books.book(2)
    books.export()
    books.client.flushall()
    books.clock.advance(ms=1000)
    books.book(3000)
    loss = books.loss()
    assert loss is not None
    assert 180 == loss.move_ms

    before = books.client.config_get("lua-time-limit")
    books.client.config_set("lua-time-limit", 1)  # from when on others are told that it is busy
    try:
        with Meter.connect(valkey.url, POLICY, options=IMPATIENT, clock=books.clock, sweep_interval_ms=0) as meter:
            assert 3000 == fork(loss, meter._driver.run).moved
    finally:
        books.client.config_set("lua-time-limit", before["lua-time-limit"])
    assert (None, 3002) == (books.export().problem, len(books.archived()))


def test_a_fork_that_is_told_of_no_answer_for_too_long_says_so(books: ForgetfulBooks) -> None:
    """Operator: a server that is down is not taken for a busy one."""
    forgetful(books)
    loss = books.loss()
    assert loss is not None
    tries = []

    def down(flow: Any) -> Any:
        tries.append(flow)
        raise StoreUnavailable("fork", "nobody there")

    with pytest.raises(StoreUnavailable):
        fork(loss, down)
    assert 1 == len(tries)


def test_an_exporter_that_is_behind_the_fork_takes_over_what_it_lacks(books: ForgetfulBooks, tmp_path: Path) -> None:
    """An archive without the lost entries does not go on as if there had been none."""
    books.book(4)
    books.export()
    (tmp_path / "behind").mkdir()
    behind = ForgetfulBooks(tmp_path / "behind", books.client)
    behind.meter = books.meter
    behind.export()
    books.remember()
    books.book(2)
    books.export()
    books.lose()
    books.book(1)
    books.fork()
    books.export()

    problem = behind.export().problem

    assert problem is not None
    assert "epoch" == problem.problem
    assert 4 == len(behind.archived())
    with (
        books.archive() as archive,
        behind.archive() as late,
        Exporter(late, books.run, others=[archive]) as exporter,
    ):
        assert exporter.export(0).problem is None
    assert books.archived() == behind.archived()


def test_an_archive_that_is_begun_after_a_fork_has_what_the_store_lost(books: ForgetfulBooks, tmp_path: Path) -> None:
    """Even where the store still has the first entries, those that it lost come from the other archive, at once."""
    forgetful(books)
    books.fork()
    assert books.export().problem is None

    with (
        books.archive() as archive,
        Archive(tmp_path / "new", 4) as new,
        Exporter(new, books.run, others=[archive]) as exporter,
    ):
        assert exporter.export(0).problem is None
        assert list(archive.entries(0)) == list(new.entries(0))


def test_sinks_that_disagree_are_not_forked(books: ForgetfulBooks, tmp_path: Path) -> None:
    """Which of them is right is nobody's guess."""
    books.book(3)
    (tmp_path / "other").mkdir()
    other = Books(tmp_path / "other", books.client)
    other.meter = books.meter
    books.remember()
    books.book(1)
    books.export()
    books.lose()
    books.meter.record("acme", {}, Usage(input_tokens=99), record_id="another")
    other.export()

    with books.archive() as one, other.archive() as two, pytest.raises(IntegrityError, match="0:4"):
        loss_of([one, two], books.run, 0)


@pytest.mark.parametrize("kind", ["valkey", "redis"])
def test_a_server_whose_file_was_cut_goes_on_after_a_fork(tmp_path: Path, kind: str) -> None:
    """The append-only file cut at bytes of its last scripts: whatever is left, no usage is lost or billed twice."""
    if reason := available(kind):
        pytest.skip(reason)
    for cut in (0, 1, 90, 400):
        folder = tmp_path / str(cut)
        with start_server(folder / "server", kind, append_only=True) as server, server.client() as client:
            books = ForgetfulBooks(folder, client, server.url)
            books.book(4)
            size = (server.folder / AOF).stat().st_size
            books.book(2)
            books.export()
            exported = books.archived()
            server.kill()
            with (server.folder / AOF).open("r+b") as file:
                file.truncate(size + cut)
            server.start()
            books.book(3)
            came = [content(entry) for entry in books.booked() if entry not in exported]

            books.fork()

            assert books.export().problem is None
            books.book(2)
            assert books.export().problem is None
            archived = books.archived()
            assert exported == archived[:6]
            assert came == [content(entry) for entry in archived[6:9]]
            assert 11 == len(archived) == len({entry.n for entry in archived})
            books.close()


histories = st.lists(
    st.one_of(
        st.integers(1, 4).map(lambda count: ("book", count)),
        st.sampled_from(["kinds", "export", "export", "trim", "remember", "lose", "flush"]).map(lambda name: (name, 0)),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=histories)
def test_whatever_is_lost_each_entry_is_exported_once_or_was_never_seen(
    history: list[tuple[str, int]], valkey: Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As a law: what was exported stays, what is in the store gets there once, and each number is one entry's."""
    with valkey.client() as client:
        client.flushall()
        books = ForgetfulBooks(tmp_path_factory.mktemp("history"), client, valkey.url)
        books.kept = {}
        exported: list[LedgerEntry] = []
        for action, number in history:
            if action in ("book", "kinds"):
                books.book_all_kinds() if action == "kinds" else books.book(number)
            elif action == "remember":
                books.remember()
            elif action == "trim":
                with books.archive() as archive:
                    if books.loss() is None:
                        trim([archive], books.run, 0, below=2**53 - 1, keep=1)
            elif action == "export":
                exported = exported_once(books, exported)
            else:
                books.clock.advance(ms=5)
                books.lose() if action == "lose" else client.flushall()
        exported_once(books, exported)
        books.close()


def exported_once(books: ForgetfulBooks, exported: list[LedgerEntry]) -> list[LedgerEntry]:
    """Export, with a fork if one is needed; what is archived then."""
    known = {content(entry) for entry in exported}
    new = [content(entry) for entry in books.booked() if content(entry) not in known]
    if books.export().problem is not None:
        books.fork()
        assert books.export().problem is None
    archived = books.archived()

    assert exported == archived[: len(exported)]
    assert new == [content(entry) for entry in archived[len(exported) :]]
    numbers = [entry.n for entry in archived]
    assert numbers == sorted(set(numbers))
    return archived


def test_the_accepted_epoch_still_serves_who_wants_the_numbers_as_they_are(books: ForgetfulBooks) -> None:
    """Both ways out of a ledger that was begun anew are told."""
    books.book(2)
    books.export()
    books.client.flushall()
    books.clock.advance(ms=1000)
    books.book(1)
    (epoch,) = {entry.epoch for entry in books.booked()}
    problem = books.export().problem
    assert problem is not None
    assert f"--accept-epoch 0:{epoch}" in str(problem)
    assert "meterlib ledger fork --shard 0" in str(problem)

    assert books.export(Accepted(epochs={0: epoch})).problem is None


class Terminal(io.StringIO):
    """Standard input with somebody at it."""

    def isatty(self) -> bool:
        return True


def forgetful(books: ForgetfulBooks) -> None:
    """A loss of two entries, with one booked since."""
    books.book(4)
    books.remember()
    books.book(2)
    books.export()
    books.lose()
    books.book(1)


def test_the_command_shows_what_is_lost_and_asks(
    books: ForgetfulBooks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is done before somebody said yes, and a script has to say so beforehand."""
    forgetful(books)
    words = ["ledger", "fork", "--shard", "0", "--config", str(books.settings)]

    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert 2 == main(words)
    shown = capsys.readouterr()
    assert "--yes" in shown.err
    assert "2 entries exported, and not in the store any more; they stay as they are, 0:5-6" in shown.out
    assert "1 entry in the store, and never exported; they get new numbers, 0:5-5" in shown.out
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    assert 1 == main(words)
    assert books.export().problem is not None
    monkeypatch.setattr(sys, "stdin", Terminal("yes\n"))
    assert 0 == main(words)

    assert "from number 7 on; moved to 0:7-7: 1 entry" in capsys.readouterr().out
    assert books.export().problem is None
    assert 2 == main(words), "there is nothing to be forked any more"


def test_what_is_lost_while_somebody_reads_has_to_be_looked_at(
    books: ForgetfulBooks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finance: by what was seen before, entries of the second loss's time would have been taken for exported ones."""
    books.book(2)
    books.remember()
    far = books.kept
    forgetful(books)

    class Slow(Terminal):
        def readline(self, *_: Any) -> Any:
            books.kept = far
            books.lose()
            books.book(3)
            return "yes\n"

    words = ["ledger", "fork", "--shard", "0", "--config", str(books.settings)]
    monkeypatch.setattr(sys, "stdin", Slow())
    assert 1 == main(words)
    assert "look again" in capsys.readouterr().err
    came = [content(one) for one in books.booked()[2:]]
    monkeypatch.setattr(sys, "stdin", Terminal("yes\n"))
    assert 0 == main(words)
    assert books.export().problem is None
    assert came == [content(one) for one in books.archived()[8:]]


@pytest.mark.parametrize("again", [False, True])
def test_what_is_lost_between_look_and_fork_is_noticed_by_the_store(books: ForgetfulBooks, again: bool) -> None:
    """Finance: however briefly before; also of entries that are kept under other numbers."""
    books.book(2)
    books.remember()
    far, books.kept = books.kept, {}
    books.book(2)
    if again:
        books.export()
        books.kept = far
        books.lose()
        books.book(2)
    books.remember()
    if again:
        books.fork()
        books.export()
    else:
        books.book(2)
        books.export()
    books.lose()
    loss = books.loss()
    assert loss is not None
    assert again == bool(loss.kept.renumbered)
    books.kept = far
    books.lose()
    books.book(4)
    came = [content(one) for one in books.booked()[2:]]
    before = [content(one) for one in books.archived()]

    with pytest.raises(StoreRefused, match="not what it was"):
        fork(loss, books.run)

    assert came == [content(one) for one in books.booked()[2:]]
    books.fork()
    assert books.export().problem is None
    assert [*before, *came] == [content(one) for one in books.archived()]


@pytest.mark.parametrize("again", [False, True])
def test_what_comes_back_between_look_and_fork_is_noticed_by_the_store(books: ForgetfulBooks, again: bool) -> None:
    """Finance: a better copy is put in place. Its entries are exported, under their numbers or under others."""
    books.book(2)
    books.remember()
    worse, books.kept = books.kept, {}
    books.book(2)
    books.remember()
    if again:
        books.export()
        books.kept = worse
        books.lose()
        books.book(2)
        books.remember()
        books.fork()
    else:
        books.book(1)
    books.export()
    better, books.kept = books.kept, worse
    books.lose()
    loss = books.loss()
    assert loss is not None
    before = [content(one) for one in books.archived()]
    books.kept = better
    books.lose()

    with pytest.raises(StoreRefused, match="got some back"):
        fork(loss, books.run)

    books.fork()
    books.book(1)
    assert books.export().problem is None
    assert [*before, content(books.booked()[-1])] == [content(one) for one in books.archived()]


def test_what_is_booked_between_look_and_fork_is_moved_along(books: ForgetfulBooks) -> None:
    """A gateway that books all the time can be forked: that is no reason to look again."""
    forgetful(books)
    loss = books.loss()
    assert loss is not None
    books.book(2)

    assert 3 == fork(loss, books.run).moved

    assert books.export().problem is None
    assert 4 + 2 + 3 == len(books.archived())


def test_another_entry_of_the_same_moment_is_not_the_one_that_was_seen(books: ForgetfulBooks) -> None:
    """The last entry was lost, and what was booked since has its number and its time."""
    books.book(2)
    books.remember()
    far, books.kept = books.kept, {}
    books.book(1)
    seen_at_ms = books.clock.now_ms
    books.remember()
    books.book(2)
    books.export()
    books.lose()
    loss = books.loss()
    assert loss is not None
    books.kept = far
    books.lose()
    books.clock.set(seen_at_ms)
    books.meter.record("acme", {"model": "opus"}, Usage(input_tokens=999), record_id="other")

    with pytest.raises(StoreRefused, match="look again"):
        fork(loss, books.run)

    books.fork()
    assert books.export().problem is None
    assert "other" in [one.reservation_id for one in books.archived()]


@pytest.mark.parametrize("kind", ["valkey", "redis"])
def test_a_full_store_is_forked(tmp_path: Path, kind: str) -> None:
    """Operator: until it is, nothing is exported, and so nothing can be trimmed to make room."""
    if reason := available(kind):
        pytest.skip(reason)
    with start_server(tmp_path / "server", kind) as server, server.client() as client:
        books = ForgetfulBooks(tmp_path, client, server.url)
        forgetful(books)
        client.config_set("maxmemory", 1)
        assert 1 == books.fork().moved
        assert books.export().problem is None
        books.close()


def test_a_script_forks_with_yes_and_reads_json(books: ForgetfulBooks, capsys: pytest.CaptureFixture[str]) -> None:
    """The outcome, for programs."""
    forgetful(books)

    code = main(["ledger", "fork", "--shard", "0", "--yes", "--json", "--config", str(books.settings)])

    document = json.loads(capsys.readouterr().out)
    assert (0, 4, 7, 1) == (code, *(document[name] for name in ("kept", "first", "moved")))
    assert {"count": 2, "first": 5, "last": 6} == document["lost"]
