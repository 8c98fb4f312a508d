"""PostgreSQL as a sink: every entry once, beside its checkpoint, whatever dies; or a stop that names the entries."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meterlib import LedgerEntry
from meterlib.billing.archive.rows import MADE, entry_from
from meterlib.billing.archive.sinks import Sink
from meterlib.billing.export.export import Accepted, Export, Exported, Exporter
from meterlib.billing.export.postgres import Postgres
from meterlib.billing.export.postgres_schema import ddl
from meterlib.billing.export.trim import trim
from meterlib.errors import IntegrityError, PolicyError, SinkError
from meterlib.store import flows
from tests.billing.exporting import LEDGER, Books
from tests.support.postgres import PASSWORD, CommitProxy, PostgresServer
from tests.support.proxy import FaultProxy
from tests.support.servers import Server

BLOCK = 4
_schemas = count(1)


class PostgresBooks(Books):
    """A store of one shard, an archive and a schema beside it."""

    def __init__(self, folder: Path, server: PostgresServer, **options: Any) -> None:
        super().__init__(folder, **options)
        self.server = server
        self.schema = f"test_{next(_schemas)}"

    def postgres(self, url: str | None = None) -> Postgres:
        """The sink, opened anew."""
        return Postgres(url or self.server.secret_url, self.schema, BLOCK)

    def load(self, accepted: Accepted | None = None, url: str | None = None) -> Exported:
        """One export of the shard into PostgreSQL alone."""
        with self.postgres(url) as sink, Exporter(sink, self.run, accepted=accepted) as exporter:
            return exporter.export(0)

    def export_all(self, accepted: Accepted | None = None, url: str | None = None) -> list[Exported]:
        """One export of the shard into both."""
        with self.archive() as archive, self.postgres(url) as sink:
            sinks: list[Sink[Any]] = [archive, sink]
            with Export(sinks, self.run, accepted=accepted) as export:
                return export.export(0)

    def loaded(self) -> list[LedgerEntry]:
        """What PostgreSQL has, from the text of its rows; its checkpoint is at the last of them."""
        with self.postgres() as sink:
            lines = [line for portion in sink.behind(0, "", 0) for line in portion]
            position, known = sink.end(0)

        assert (known or None) == (lines[-1] if lines else None)
        entries = [entry_from(0, line) for line in lines]
        assert (entries[-1].epoch, entries[-1].n) == position[:2] if entries else position.n == 0
        return entries

    def sql(self, query: str) -> list[Any]:
        """What PostgreSQL answers; `@` stands for the schema."""
        with self.server.connect() as connection:
            cursor = connection.execute(query.replace("@", self.schema))
            return cursor.fetchall() if cursor.description else []


@pytest.fixture
def books(tmp_path: Path, postgres_server: PostgresServer) -> PostgresBooks:
    return PostgresBooks(tmp_path, postgres_server)


# ── What is exported ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_kind_of_entry_is_loaded_as_it_was_booked(books: PostgresBooks) -> None:
    """Byte for byte, what JSON escapes and what COPY would take for its own included."""
    books.book_all_kinds()
    outcome = rb'{"usage":{"input_tokens":2},"reason":"back\\slash \"quoted\" \\N tab\\t \u00e9 e"}'
    books.rewrite(2, lambda fields: fields.update({b"outcome": outcome, b"id": b"a\\N\rb"}))

    loaded = books.load()

    assert (6, 6, None) == (loaded.entries, loaded.last, loaded.problem)
    assert books.booked() == books.loaded()
    assert [(outcome.decode(), "a\\N\rb")] == books.sql("SELECT outcome, reservation_id FROM @.ledger WHERE n = 2")


def test_columns_are_those_of_the_archive(books: PostgresBooks) -> None:
    """A query that was written for the archive's files means the same in PostgreSQL."""
    books.book_all_kinds()
    books.export_all()
    columns = [name for name in MADE if name not in ("attributes", "iterations", "amounts", "facts")]
    wanted = ", ".join(columns)

    query = f"SELECT n, {wanted} FROM '{books.path}/*/*.parquet' ORDER BY n"
    archived = duckdb.connect().execute(query).fetchall()

    assert archived == books.sql(f"SELECT n, {wanted} FROM @.entries ORDER BY n")
    assert [({"cost_nanousd": 12}, {"request_id": "req_1"}, "claude-opus-4-5")] == books.sql(
        "SELECT amounts, facts, attributes ->> 'model' FROM @.entries WHERE n = 1"
    )
    assert [("numeric",)] == books.sql("SELECT pg_typeof(sum(input_tokens))::text FROM @.entries")


def test_what_was_loaded_is_not_loaded_again(books: PostgresBooks) -> None:
    """Operator: run it as often as you like."""
    for new in (3, 0, 7, 1):
        books.book(new)

        assert new == books.load().entries
        assert books.booked() == books.loaded()


def test_both_sinks_have_the_same_links(books: PostgresBooks) -> None:
    """The digest of all entries up to one is the same wherever it is asked for."""
    books.book(7)
    books.export_all()

    with books.archive() as archive, books.postgres() as sink:
        assert archive.end(0) == sink.end(0)


# ── What stops an export ──────────────────────────────────────────────────────────────────────────────────────────────


def flushed(books: PostgresBooks) -> None:
    books.client.flushall()


def begun_anew(books: PostgresBooks) -> None:
    books.client.flushall()
    books.clock.advance(ms=1000)
    books.book(3)


def other_tail(books: PostgresBooks) -> None:
    books.rewrite(6, lambda fields: fields.update({b"digest": b"0" * 16}))
    books.book(2)


def deleted(books: PostgresBooks) -> None:
    books.book(3)
    books.client.xdel(LEDGER, "8-0")


def poisoned(books: PostgresBooks) -> None:
    books.book(3)
    books.rewrite(8, lambda fields: fields.update({b"kind": b"refunded"}))


@pytest.mark.parametrize(
    ("harm", "problem", "named", "more"),
    [
        (flushed, "regress", "0:1-6", 0),
        (begun_anew, "epoch", "0:1", 0),
        (other_tail, "conflict", "0:6", 0),
        (deleted, "gap", "0:8", 1),
        (poisoned, "unreadable", "0:8", 1),
    ],
)
def test_what_does_not_fit_stops_both_and_is_named(
    books: PostgresBooks, harm: Callable[[PostgresBooks], None], problem: str, named: str, more: int
) -> None:
    """Whatever happened to the store, what was exported stays the truth in both, and what precedes the harm goes on."""
    books.book(6)
    books.export_all()
    before = books.booked()
    harm(books)

    for exported in books.export_all():
        assert exported.problem is not None
        assert (problem, (named,)) == (exported.problem.problem, exported.problem.entries)
    assert (
        [one.n for one in before] + [7][:more]
        == [one.n for one in books.loaded()]
        == [one.n for one in books.archived()]
    )
    assert before == books.loaded()[:6]
    alone = books.load().problem
    assert alone is not None
    assert (problem, (named,)) == (alone.problem, alone.entries)


def test_a_sink_that_is_behind_does_not_go_on_where_another_knows_of_a_loss(books: PostgresBooks) -> None:
    """The server lost 5 and 6, which only the archive has: PostgreSQL must not take what has their numbers now."""
    books.book(4)
    books.load()
    books.book(2)
    books.export()
    for n in (5, 6):
        books.rewrite(n, lambda fields: fields.update({b"id": b"another"}))

    archived, loaded = books.export_all()

    assert archived.problem is not None
    assert archived.problem == loaded.problem
    assert [1, 2, 3, 4] == [one.n for one in books.loaded()]


def test_a_gap_and_another_epoch_can_be_accepted(books: PostgresBooks) -> None:
    """The same decisions hold for both."""
    books.book(7)
    booked = books.booked()
    books.client.xdel(LEDGER, "3-0", "4-0")
    books.export_all(Accepted(gaps=frozenset({(0, 3, 4)})))
    assert [*booked[:2], *booked[4:]] == books.loaded() == books.archived()
    begun_anew(books)
    (epoch,) = {one.epoch for one in books.booked()}

    assert [None, None] == [one.problem for one in books.export_all(Accepted(epochs={0: epoch}))]

    assert books.loaded() == books.archived()
    assert books.booked() == books.loaded()[-3:]


def test_rows_that_somebody_else_wrote_stop_the_export(books: PostgresBooks) -> None:
    """A row behind the checkpoint is nobody's of ours; nothing is written over it."""
    books.book(2)
    books.load()
    books.book(4)
    books.sql("INSERT INTO @.ledger SELECT shard, 5, kind, after, reservation_id, 0, 0, call, estimate, outcome,"
              " digest, epoch, more FROM @.ledger WHERE n = 1")  # fmt: skip

    problem = books.load().problem

    assert problem is not None
    assert ("conflict", ("0:5-6",)) == (problem.problem, problem.entries)
    assert [1, 2, 3, 4, 5] == [n for (n,) in books.sql("SELECT n FROM @.ledger ORDER BY n")]


def test_a_row_that_somebody_deleted_stops_the_export(books: PostgresBooks) -> None:
    """A checkpoint without its entry is not gone on from."""
    books.book(3)
    books.load()
    books.sql("DELETE FROM @.ledger WHERE n = 3")

    problem = books.load().problem

    assert problem is not None
    assert ("damaged", ("0:3",)) == (problem.problem, problem.entries)


# ── Entries that cannot be exported ───────────────────────────────────────────────────────────────────────────────────

ZERO = b'{"usage":{"input_tokens":1},"facts":{"note":"\\u0000"}}'


def test_an_entry_that_only_postgresql_refuses_stops_it_alone(books: PostgresBooks) -> None:
    """The archive holds what PostgreSQL cannot, and goes on; what is before it goes on in both."""
    books.book(8)
    books.rewrite(6, lambda fields: fields.update({b"outcome": ZERO}))

    archived, loaded = books.export_all()

    assert archived.problem is None
    assert loaded.problem is not None
    assert ("unreadable", ("0:6",)) == (loaded.problem.problem, loaded.problem.entries)
    assert "\\u0000" in str(loaded.problem)
    assert 5 == loaded.last == len(books.loaded())
    assert loaded.problem.entries == (books.load().problem or loaded.problem).entries


def test_an_entry_that_is_set_aside_is_kept_and_lets_the_others_pass(books: PostgresBooks) -> None:
    """A poison entry is neither billed nor lost, and stops the rest only until somebody has looked."""
    books.book(5)
    booked = books.booked()
    books.rewrite(3, lambda fields: fields.update({b"kind": b"refunded", b"id": b"\xff\x00"}))
    assert {"unreadable"} == {one.problem.problem for one in books.export_all() if one.problem}

    exported = books.export_all(Accepted(aside=frozenset({(0, 3)})))

    assert [(2, 1, None), (2, 1, None)] == [(one.entries, one.aside, one.problem) for one in exported]
    assert [*booked[:2], *booked[3:]] == books.loaded() == books.archived()
    assert [None, None] == [one.problem for one in books.export_all()]
    ((kept,),) = books.sql("SELECT entry FROM @.set_aside WHERE n = 3")
    (file,) = (books.path / "set-aside").iterdir()
    assert kept == file.read_text()
    assert '"kind":"cmVmdW5kZWQ="' in kept
    assert '"id":"/wA="' in kept


# ── What one sink has and the store has no more ───────────────────────────────────────────────────────────────────────


def test_postgresql_can_be_added_when_the_store_was_trimmed_long_ago(books: PostgresBooks) -> None:
    """It takes over from the archive what the store has no more, gaps and epochs included, and goes on from there."""
    books.book(9)
    books.client.xdel(LEDGER, "5-0")
    books.export(Accepted(gaps=frozenset({(0, 5, 5)})))
    begun_anew(books)
    (epoch,) = {one.epoch for one in books.booked()}
    books.export(Accepted(epochs={0: epoch}))
    with books.archive() as archive:
        assert 2 == trim([archive], books.run, 0, below=100, keep=1)
    books.book(2)

    archived, loaded = books.export_all()

    assert (2, 13, None) == (archived.entries, loaded.entries, loaded.problem)
    assert books.archived() == books.loaded()


def test_a_database_that_was_restored_from_a_backup_catches_up(books: PostgresBooks) -> None:
    """Rows and checkpoint are of one moment, so a restored database is merely behind."""
    books.book(5)
    books.export_all()
    backup = books.sql("SELECT epoch, n, encode(link, 'hex') FROM @.checkpoints")
    books.book(4)
    books.export_all()
    with books.archive() as archive, books.postgres() as sink:
        assert 8 == trim([archive, sink], books.run, 0, below=100, keep=1)
    ((epoch, n, link),) = backup
    books.sql(f"UPDATE @.checkpoints SET epoch = '{epoch}', n = {n}, link = decode('{link}', 'hex')")
    books.sql("DELETE FROM @.ledger WHERE n > 5")

    assert [(0, None), (4, None)] == [(one.entries, one.problem) for one in books.export_all()]
    assert books.archived() == books.loaded()


@pytest.mark.parametrize(
    ("harm", "named"),
    [("UPDATE @.ledger SET digest = 'another' WHERE n = 4", "0:4"), ("UPDATE @.checkpoints SET link = 'x'", "0:1-7")],
)
def test_sinks_that_do_not_hold_the_same_are_not_joined(books: PostgresBooks, harm: str, named: str) -> None:
    """A database of another ledger is not filled up from this archive."""
    books.book(4)
    books.export_all()
    books.book(3)
    books.export()
    with books.archive() as archive:
        trim([archive], books.run, 0, below=100, keep=1)
    books.sql(harm)

    loaded = books.export_all()[1]

    assert loaded.problem is not None
    assert ("conflict", (named,)) == (loaded.problem.problem, loaded.problem.entries)


def test_nothing_is_trimmed_that_one_of_the_sinks_lacks(books: PostgresBooks) -> None:
    """The sink that is furthest behind says what may go."""
    books.book(4)
    books.export_all()
    books.book(5)
    books.export()

    with books.archive() as archive, books.postgres() as sink:
        assert 3 == trim([sink, archive], books.run, 0, below=100, keep=1)
        assert 0 == trim([archive, sink], books.run, 0, below=100, keep=1)
    assert [4, 5, 6, 7, 8, 9] == [one.n for one in books.booked()]
    assert 5 == books.export_all()[1].entries
    gone = books.postgres("postgresql://nobody@127.0.0.1:1/x")
    with books.archive() as archive, pytest.raises(SinkError):
        trim([archive, gone], books.run, 0, below=100, keep=1)
    assert 6 == len(books.booked())


# ── Faults ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("order", ["lose", "lose the answer"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_connection_lost_in_a_commit_loses_and_doubles_nothing(
    books: PostgresBooks, postgres_server: PostgresServer, order: str, which: int
) -> None:
    """Nobody knows whether it was done; the checkpoint does."""
    with books.postgres() as sink:
        sink.prepare()
    books.book(11)
    with CommitProxy(postgres_server.port) as proxy:
        url = postgres_server.secret_url.replace(f":{postgres_server.port}/", f":{proxy.port}/")
        with books.postgres(url) as sink, Exporter(sink, books.run) as exporter:
            proxy.orders += [*["pass"] * which, order]

            exported = exporter.export(0)

    assert 1 == proxy.spoilt
    assert (11, None) == (exported.entries, exported.problem)
    assert books.booked() == books.loaded()


def test_two_exporters_at_once_write_each_entry_once(books: PostgresBooks) -> None:
    """They take turns on the checkpoint: whoever comes too late begins anew behind the other."""
    books.book(60)
    results: list[Exported] = []
    both = [threading.Thread(target=lambda: results.append(books.load())) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join(60)

    assert [None, None] == [one.problem for one in results]
    assert [60, 60] == [one.last for one in results]
    assert books.booked() == books.loaded()


@pytest.mark.parametrize("ahead", [1, 2, 3, 6])
def test_an_exporter_that_is_overtaken_goes_on_behind_the_other(
    books: PostgresBooks, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    """Whatever the other has written meanwhile: part of the same block, just that, or more."""
    books.book(2)
    write = Postgres._write

    def overtaken(sink: Postgres, connection: Any, draft: Any) -> None:
        monkeypatch.setattr(Postgres, "_write", write)
        books.book(ahead)
        books.load()
        write(sink, connection, draft)

    monkeypatch.setattr(Postgres, "_write", overtaken)

    assert books.load().problem is None
    assert books.booked() == books.loaded()


FAILING = """
CREATE SEQUENCE @.tries;
CREATE FUNCTION @.fail() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    try bigint := nextval('@.tries');
BEGIN
    IF try BETWEEN 6 AND {until} THEN
        RAISE EXCEPTION 'made up' USING ERRCODE = '{state}';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER fails BEFORE INSERT ON @.ledger FOR EACH ROW EXECUTE FUNCTION @.fail();
"""


@pytest.mark.parametrize("state", ["40001", "40P01", "57P03"])
def test_failures_that_pass_are_tried_again(books: PostgresBooks, state: str) -> None:
    """A serialization failure, a deadlock and a server that is starting are nobody's business but the exporter's."""
    with books.postgres() as sink:
        sink.prepare()
    books.sql(FAILING.format(until=7, state=state))
    books.book(9)

    loaded = books.load()

    assert (9, None) == (loaded.entries, loaded.problem)
    assert [(12,)] == books.sql("SELECT last_value FROM @.tries")
    assert books.booked() == books.loaded()


@pytest.mark.parametrize(("state", "times"), [("53100", 1), ("40001", 4), ("55P03", 1)])
def test_a_failure_that_stays_ends_the_export_and_the_next_goes_on(
    books: PostgresBooks, state: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, a conflict without end: whole blocks are there, and once it is mended the rest follows."""
    monkeypatch.setattr("meterlib.billing.export.postgres._PAUSES_S", (0, 0, 0))
    with books.postgres() as sink:
        sink.prepare()
    books.sql(FAILING.format(until=5 + times, state=state))
    books.book(9)

    archived, loaded = books.export_all()

    assert (9, None, None) == (archived.entries, archived.problem, archived.failure)
    assert "made up" in str(loaded.failure)
    assert 4 == len(books.loaded())
    assert 5 == books.load().entries
    assert books.booked() == books.loaded()


def test_a_server_that_restarts_is_found_again(books: PostgresBooks, tmp_path: Path) -> None:
    """An exporter that follows the ledger need not be restarted with its database, nor the archive wait for it."""
    with PostgresServer() as server:
        books.server = server
        books.book(3)
        with books.archive() as archive, books.postgres() as sink:
            sinks: list[Sink[Any]] = [archive, sink]
            with Export(sinks, books.run) as export:
                assert [3, 3] == [one.entries for one in export.export(0)]
            server.stop()
            books.book(2)
            with Export(sinks, books.run) as export:
                archived, loaded = export.export(0)
            assert (2, None) == (archived.entries, archived.failure)
            assert isinstance(loaded.failure, SinkError)
            server.start()
            books.book(1)
            with Export(sinks, books.run) as export:
                assert [1, 3] == [one.entries for one in export.export(0)]
        assert books.booked() == books.loaded()


def test_answers_of_the_store_that_get_lost_are_asked_for_again(
    postgres_server: PostgresServer, valkey: Server, tmp_path: Path
) -> None:
    """Clients repeat what they got no answer to; an export only reads, and registers its sinks by name."""
    with FaultProxy(valkey.port) as proxy, valkey.client() as client:
        client.flushall()
        books = PostgresBooks(tmp_path, postgres_server, client=client, url=proxy.url)
        books.book(9)
        for word in (b"XRANGE", b"SADD", b"HMGET", b"SMEMBERS"):
            proxy.drop_replies(2, matching=word)

        assert [(9, None), (9, None)] == [(one.entries, one.problem) for one in books.export_all()]

        assert 6 <= proxy.faults
        assert books.booked() == books.archived() == books.loaded()
        books.close()


class Killed(BaseException):
    """The process is gone: its connection ends, and nothing is said."""


actions = st.one_of(
    st.integers(1, 6).map(lambda count: ("book", count)),
    st.sampled_from(["kinds", "both", "archive", "postgres", "trim", "flush scripts"]).map(lambda name: (name, 0)),
    st.sampled_from(["begin", "copy", "commit"]).map(lambda step: (step, 0)),
)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=st.lists(actions, min_size=1, max_size=10))
def test_whatever_dies_when_both_have_each_entry_once(
    history: list[tuple[str, int]], postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Exactly once, as a law: any order of bookings, exports of either or both, crashes and trims."""
    books = PostgresBooks(tmp_path_factory.mktemp("history"), postgres_server)
    booked: list[LedgerEntry] = []
    for action, number in history:
        if action in ("book", "kinds"):
            books.book_all_kinds() if action == "kinds" else books.book(number)
            booked += books.meter.ledger(0, booked[-1].n if booked else 0)
        elif action == "both":
            assert [None, None] == [one.problem for one in books.export_all()]
        elif action == "archive":
            assert books.export().problem is None
        elif action == "postgres":
            books.export_all()
        elif action == "flush scripts":
            books.client.script_flush()
        elif action == "trim":
            with books.archive() as archive, books.postgres() as sink:
                sink.prepare()
                trim([archive, sink], books.run, 0, below=2**53 - 1, keep=1)
        else:
            with pytest.MonkeyPatch.context() as patched:
                dies(patched, action)
                with suppress(Killed):
                    books.export_all()
        assert booked[: len(books.archived())] == books.archived()

    assert [None, None] == [one.problem for one in books.export_all()]
    assert booked == books.archived() == books.loaded()


def dies(patched: pytest.MonkeyPatch, step: str) -> None:
    """Make PostgreSQL's writer die before it begins, before the rows are committed, or right behind that."""
    write, copy = Postgres._write, Postgres._copy

    def die(sink: Postgres, connection: Any, draft: Any) -> None:
        if step == "commit":
            write(sink, connection, draft)
        elif step == "copy":
            copy(sink, connection, draft)
        connection.close()
        raise Killed

    patched.setattr(Postgres, "_copy" if step == "copy" else "_write", die)


# ── The database and its roles ────────────────────────────────────────────────────────────────────────────────────────


def test_a_role_without_rights_is_told_what_to_do_and_serves_once_it_is_done(
    books: PostgresBooks, postgres_server: PostgresServer
) -> None:
    """Where the exporter may write rows and nothing else, somebody else makes the schema."""
    role = f"writer_{books.schema}"
    books.sql(f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'")
    url = postgres_server.secret_url.replace("//owner:", f"//{role}:")
    books.book(5)

    with pytest.raises(SinkError, match="meterlib export schema") as refused:
        books.load(url=url)

    grants = str(refused.value).partition("then ")[2].replace(" and GRANT", "; GRANT").partition(" to the")[0]
    books.sql(ddl(books.schema))
    for grant in grants.split("; "):
        books.sql(f"{grant} TO {role}")
    assert (5, None) == (books.load(url=url).entries, books.load(url=url).problem)
    assert books.booked() == books.loaded()


def test_the_schema_of_a_later_version_is_left_alone(books: PostgresBooks) -> None:
    """An older exporter does not write where it does not know what it writes."""
    books.book(1)
    books.load()
    books.sql("UPDATE @.about SET version = 9")
    books.book(1)

    with pytest.raises(SinkError, match="version 9"):
        books.load()

    assert [(1,)] == books.sql("SELECT count(*) FROM @.ledger")


def test_two_first_exporters_make_one_schema(books: PostgresBooks) -> None:
    """Nobody has to be first."""
    failures: list[BaseException] = []

    def prepare() -> None:
        try:
            with books.postgres() as sink:
                sink.prepare()
        except BaseException as error:
            failures.append(error)

    both = [threading.Thread(target=prepare) for _ in range(4)]
    for one in both:
        one.start()
    for one in both:
        one.join(60)

    assert [] == failures
    assert [(1,)] == books.sql("SELECT count(*) FROM @.about")


def test_a_database_that_cannot_hold_every_text_is_refused(
    books: PostgresBooks, postgres_server: PostgresServer
) -> None:
    """What cannot be stored byte for byte is not stored at all."""
    books.sql(f"CREATE DATABASE latin_{books.schema} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")

    with pytest.raises(SinkError, match="UTF8"):
        books.load(url=postgres_server.secret_url.replace("/postgres?", f"/latin_{books.schema}?"))


def test_the_password_is_never_told(books: PostgresBooks, postgres_server: PostgresServer) -> None:
    """Neither in errors nor in what a debugger or a log shows."""
    urls = [
        postgres_server.secret_url.replace("owner:", "stranger:"),
        postgres_server.secret_url.replace(f":{postgres_server.port}", ":1"),
        postgres_server.secret_url.replace("/postgres?", "/nowhere?"),
    ]
    for url in urls:
        with books.postgres(url) as sink:
            assert PASSWORD not in repr(sink) + str(sink) + sink.place
            with pytest.raises(SinkError) as failed:
                sink.end(0)
            assert PASSWORD not in repr(failed.value)
            assert failed.value.__suppress_context__
    with pytest.raises(PolicyError) as refused:
        Postgres(f"postgresql://a:{PASSWORD}@b:c:d/{PASSWORD} x=y")
    assert PASSWORD not in str(refused.value)


def test_the_store_remembers_every_sink_that_was_exported_to(books: PostgresBooks) -> None:
    """Settings forget; what must not be trimmed is remembered where it would be."""
    books.book(1)
    books.export_all()

    names = books.run(flows.known_sinks())

    with books.postgres() as sink:
        assert [f"archive {books.path}", sink.name] == names
    assert names[:1] == books.run(flows.known_sinks(drop=names[1]))


def test_an_integrity_problem_survives_pickling_and_says_where(books: PostgresBooks) -> None:
    """A message names the place, and no secret."""
    books.book(1)
    books.load()
    books.sql("DELETE FROM @.ledger")
    problem = books.load().problem

    assert isinstance(problem, IntegrityError)
    assert f"schema {books.schema}" in str(problem)
    assert PASSWORD not in str(problem)
