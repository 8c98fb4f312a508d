"""PostgreSQL as a sink: rows and checkpoint go into one transaction, so that neither is ever without the other.

The checkpoint's row is locked while a piece is written, and the piece must begin where it stands. So it does not matter
who writes, nor how often: of two exporters at once one comes too late and begins anew behind the other; and where a
connection is lost while it commits, the checkpoint tells whether it did.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from meterlib.billing.archive.drafts import MemoryDraft, aside_document, odd
from meterlib.billing.archive.lines import Fields
from meterlib.billing.archive.rows import VERBATIM, first_link
from meterlib.billing.archive.segments import Position
from meterlib.billing.archive.sinks import MovedError
from meterlib.billing.export.postgres_schema import VERSION, ddl
from meterlib.errors import IntegrityError, PolicyError, SinkError, UsageError

if TYPE_CHECKING:
    from psycopg import Connection

T = TypeVar("T")

BLOCK_ENTRIES = 10_000
"""Entries of a transaction: some 4 MB in memory."""

SERVER_MIN = 130_000
_LINES = 10_000
_PAUSES_S = (0.1, 0.5, 2.0)
"""Between tries, where trying again may help."""

_PASSING = ("08", "40", "57P01", "57P02", "57P03")
"""States of a server that pass: connection lost, serialization failure or deadlock, shut down, starting up."""

_SETTINGS = """\
SET LOCAL synchronous_commit = on;
SET LOCAL lock_timeout = '60s';
SET LOCAL idle_in_transaction_session_timeout = '60s'"""
"""A commit is on the disk when it is answered, whatever the role's default; a writer that vanished gives way."""

_LINE = "concat_ws(chr(31), " + ", ".join(f"{name}::text" for name in VERBATIM) + ")"
_COPY_LINE = re.compile(r"^COPY \w+, line (\d+)", re.MULTILINE)
_MAKING = 0x6D65_7465_726C_6962  # of the advisory lock under which the schema is made


class _RefusedError(Exception):
    """PostgreSQL cannot hold the entry of this number."""

    def __init__(self, n: int, reason: str) -> None:
        super().__init__(reason)
        self.n = n


class Postgres:
    """The sink in a schema of a PostgreSQL database; nothing is asked of it before it is used.

    Args:
        url: where the database is, `postgresql://user@host/name`, as libpq reads it. It is never shown.
        schema: the schema that everything is in; made on first use, if the role may.
    """

    def __init__(self, url: str, schema: str = "meterlib", block_entries: int = BLOCK_ENTRIES) -> None:
        self._psycopg = _psycopg()
        self._url = url
        self._password = ""
        self._schema = schema
        self._block_entries = block_entries
        self._connection: Connection[Any] | None = None
        self._id = ""
        try:
            told = self._psycopg.conninfo.conninfo_to_dict(url)
        except self._psycopg.Error:  # which repeats what it could not read
            raise PolicyError("billing.postgres", "is no URL such as 'postgresql://user@host:5432/name'") from None
        self._password = str(told.get("password") or "")
        self._place = f"{told.get('dbname') or told.get('user') or ''} at {told.get('host') or 'localhost'}"

    def __repr__(self) -> str:
        return f"Postgres({self._place!r}, {self._schema!r})"

    def __enter__(self) -> Postgres:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the server."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    @property
    def place(self) -> str:
        """Database, host and schema; no secret."""
        return f"PostgreSQL {self._place}, schema {self._schema}"

    @property
    def name(self) -> str:
        """What the store remembers it by: it stays the same if the database moves to another host."""
        if not self._id:
            self.prepare()
        return f"postgres {self._id}"

    # ── The schema ────────────────────────────────────────────────────────────────────────────────────────────────────

    def prepare(self) -> None:
        """Make the schema, if it is not there; check that it is one this version knows.

        Raises:
            SinkError: it cannot be reached, or made, or is of a later version.
        """
        self._attempting(self._prepare)

    def _prepare(self, connection: Connection[Any]) -> None:
        info = connection.info
        if info.server_version < SERVER_MIN:
            raise SinkError(f"{self.place}: PostgreSQL 13 or later is needed")
        if info.parameter_status("server_encoding") != "UTF8":
            raise SinkError(f"{self.place}: the database must be of encoding UTF8, to hold every entry as it is")
        with connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (_MAKING,))
            if self._value(connection, "SELECT to_regclass(%s)", f"{self._schema}.about") is None:
                self._make(connection)
        found = connection.execute(f"SELECT version, id::text FROM {self._schema}.about").fetchone()
        if found is None or found[0] != VERSION:
            told = "none" if found is None else found[0]
            raise SinkError(f"{self.place} is of version {told}; this meterlib knows version {VERSION}")
        self._id = found[1]

    def _make(self, connection: Connection[Any]) -> None:
        try:
            with connection.transaction():
                connection.execute(ddl(self._schema))
        except self._psycopg.errors.InsufficientPrivilege:
            raise SinkError(
                f"{self.place} is not there yet, and the role may not make it. A role that may: meterlib export schema"
                f" | psql; then GRANT USAGE ON SCHEMA {self._schema} and GRANT SELECT, INSERT, UPDATE ON ALL TABLES"
                f" IN SCHEMA {self._schema} to the exporter's"
            ) from None

    def _value(self, connection: Connection[Any], query: str, *values: object) -> Any:
        row = connection.execute(query, values).fetchone()
        return row[0] if row else None

    # ── Reading ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def end(self, shard: int) -> tuple[Position, bytes]:
        """How far a shard is exported, and the line of its last entry, empty if there is none; both of one look."""
        query = (
            f"SELECT epoch, n, link, (SELECT {_LINE} FROM {self._schema}.ledger AS entry WHERE entry.shard ="
            f" checkpoint.shard AND entry.epoch = checkpoint.epoch AND entry.n = checkpoint.n)"
            f" FROM {self._schema}.checkpoints AS checkpoint WHERE shard = %s"
        )
        row = self._attempting(lambda connection: connection.execute(query, (shard,)).fetchone())
        if row is None or not row[1]:
            return Position("", 0, first_link(shard)), b""
        epoch, n, link, line = row
        if line is None:
            entry = f"{shard}:{n}"
            raise IntegrityError("damaged", f"{self.place}: the row of entry {entry} is gone", (entry,))
        return Position(epoch, n, link), line.encode()

    def behind(self, shard: int, epoch: str, n: int) -> Iterator[list[bytes]]:
        """The lines of a shard behind an entry, in order, in portions."""
        query = (
            f"SELECT epoch, n, {_LINE} FROM {self._schema}.ledger WHERE shard = %s AND (epoch, n) > (%s, %s)"
            f" ORDER BY epoch, n LIMIT {_LINES}"
        )
        while rows := self._rows(query, shard, epoch, n):
            epoch, n, _ = rows[-1]
            yield [line.encode() for _, _, line in rows]

    def between(self, shard: int, first: int, last: int) -> Iterator[list[bytes]]:
        """The lines of a shard with numbers from first to last, of whichever epoch."""
        query = f"SELECT {_LINE} FROM {self._schema}.ledger WHERE shard = %s AND n BETWEEN %s AND %s ORDER BY epoch, n"
        yield [line.encode() for (line,) in self._rows(query, shard, first, last)]

    def _rows(self, query: str, *values: object) -> list[Any]:
        return self._attempting(lambda connection: connection.execute(query, values).fetchall())

    # ── Writing ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def block_end(self, n: int) -> int:
        """The last number that goes with entry `n` in one transaction."""
        return -(-n // self._block_entries) * self._block_entries

    def draft(self, shard: int, epoch: str, first: int, position: Position) -> MemoryDraft:
        """Rows that are to follow a position, still none."""
        return MemoryDraft(shard, epoch, first, position)

    def seal(self, draft: MemoryDraft) -> None:
        """Write rows and checkpoint: both are there, and on the disk, when this returns.

        Raises:
            MovedError: the checkpoint is not where the rows begin; nothing was written.
            IntegrityError: a row of that number is there already, or an entry that PostgreSQL cannot hold.
        """
        try:
            self._attempting(lambda connection: self._write(connection, draft))
        except _RefusedError as error:
            before = draft.until(error.n)
            if before.size:
                self.seal(before)
            raise odd(draft.shard, error.n, f"PostgreSQL refuses it: {error}") from None
        finally:
            draft.discard()

    def _write(self, connection: Connection[Any], draft: MemoryDraft) -> None:
        schema, shard, follows = self._schema, draft.shard, draft.follows
        with connection.transaction():
            connection.execute(_SETTINGS)
            connection.execute(
                f"INSERT INTO {schema}.checkpoints VALUES (%s, '', 0, %s) ON CONFLICT DO NOTHING",
                (shard, first_link(shard)),
            )
            found = connection.execute(
                f"SELECT epoch, n, link FROM {schema}.checkpoints WHERE shard = %s FOR UPDATE",
                (shard,),
            ).fetchone()
            if found == (draft.epoch, draft.last, draft.link):
                return  # it was written, and the answer lost; or another exporter was here first
            if found != tuple(follows):
                raise MovedError
            self._copy(connection, draft)
            connection.execute(
                f"UPDATE {schema}.checkpoints SET epoch = %s, n = %s, link = %s WHERE shard = %s",
                (draft.epoch, draft.last, draft.link, shard),
            )

    def _copy(self, connection: Connection[Any], draft: MemoryDraft) -> None:
        columns = ", ".join(VERBATIM)
        copying = f"COPY {self._schema}.ledger (shard, {columns}) FROM STDIN (DELIMITER E'\\x1f')"
        lead = b"%d\x1f" % draft.shard
        try:
            with connection.cursor().copy(copying) as copy:
                for text in draft.texts:
                    escaped = text.replace(b"\\", b"\\\\").replace(b"\r", b"\\r")
                    copy.write(b"%b%b\n" % (lead, escaped.replace(b"\n", b"\n" + lead)))
        except self._psycopg.errors.UniqueViolation:
            entries = f"{draft.shard}:{draft.first}-{draft.last}"
            message = f"{self.place} has rows of entries {entries} already, behind its checkpoint: somebody wrote them"
            raise IntegrityError("conflict", message, (entries,)) from None
        except self._psycopg.DataError as error:
            line = _COPY_LINE.search(error.diag.context or "")
            told = ": ".join(filter(None, (error.diag.message_primary, error.diag.message_detail)))
            raise _RefusedError(draft.first + int(line[1]) - 1 if line else draft.first, told) from None

    def finish(self, shard: int) -> None:
        """Nothing is left to do."""

    def set_aside(self, shard: int, epoch: str, n: int, fields: Fields) -> None:
        """Keep an entry that no bill is to be made of, in a table of its own."""
        entry = aside_document(shard, epoch, n, fields).decode()
        query = f"INSERT INTO {self._schema}.set_aside VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING"
        self._attempting(lambda connection: connection.execute(query, (epoch, shard, n, entry)))

    # ── The connection ────────────────────────────────────────────────────────────────────────────────────────────────

    def _attempting(self, act: Callable[[Connection[Any]], T]) -> T:
        """What an act on a connection gives; tried again, on a new one, where that may help: each can be repeated."""
        for pause_s in (*_PAUSES_S, None):
            try:
                return act(self._connected())
            except self._psycopg.Error as error:
                self.close()
                if pause_s is None or not self._passes(error):
                    raise SinkError(f"{self.place}: {self._told(error)}") from None
                time.sleep(pause_s)
        raise AssertionError

    def _passes(self, error: Any) -> bool:
        if not isinstance(error, self._psycopg.OperationalError | self._psycopg.InterfaceError):
            return False
        return error.sqlstate is None or error.sqlstate.startswith(_PASSING)

    def _connected(self) -> Connection[Any]:
        if self._connection is None or self._connection.closed:
            self._connection = self._psycopg.connect(
                self._url,
                autocommit=True,
                prepare_threshold=None,  # which a pooler in between may not bear
                connect_timeout=10,
                application_name="meterlib export",
                client_encoding="UTF8",
            )
            self._connection.isolation_level = self._psycopg.IsolationLevel.READ_COMMITTED
        return self._connection

    def _told(self, error: Exception) -> str:
        """What went wrong, in the server's words; without the password, should it stand in them."""
        told = _first_line(error)
        return told.replace(self._password, "…") if self._password else told


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _psycopg() -> Any:
    try:
        import psycopg
    except ImportError:
        raise UsageError("PostgreSQL needs psycopg: pip install 'meterlib[postgres]'") from None
    return psycopg
