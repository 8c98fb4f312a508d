"""A page of a ledger is asked for before it is wanted, so that the server works while the last one is looked at."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from meterlib.core.operations import Value
from meterlib.store.commands import ReadPage
from meterlib.store.faults import FAILURES


class Ahead:
    """What was asked for and not fetched yet, one page at most, each on a connection of its own.

    Whatever fails is forgotten: who wants the page then asks for it anew, and is told what is wrong.
    """

    def __init__(self, client: Any) -> None:
        self._pool = client.connection_pool
        self._asked: dict[ReadPage, Any] = {}
        self._pid = os.getpid()

    def ask(self, page: ReadPage, *words: Value) -> None:
        """Ask for a page, unless that would leave no connection to anybody else."""
        if self._pool.max_connections < 2:
            return
        with suppress(*FAILURES):
            connection = self._pool.get_connection()
            try:
                connection.send_command(*words)
            except BaseException:
                self._drop(connection)
                raise
            if self._asked.setdefault(page, connection) is not connection:  # another thread reads the same
                self._drop(connection)

    def fetched(self, page: ReadPage) -> Any:
        """A page that was asked for; None if it was not, or failed."""
        self._see_fork()
        connection = self._asked.pop(page, None)
        self.forget()
        if connection is None:
            return None
        try:
            answer = connection.read_response(disable_decoding=True)
        except FAILURES:
            self._drop(connection)
            return None
        except BaseException:
            self._drop(connection)
            raise
        self._pool.release(connection)
        return answer

    def forget(self) -> None:
        """Let go of what nobody has fetched."""
        self._see_fork()
        with suppress(KeyError):  # not `while self._asked`: another thread may let go of the last one
            while True:
                self._drop(self._asked.popitem()[1])

    def _see_fork(self) -> None:
        """What was asked for in the process that this one was forked from is that one's to fetch."""
        if self._pid != os.getpid():
            self._asked, self._pid = {}, os.getpid()

    def _drop(self, connection: Any) -> None:
        connection.disconnect()  # or the next to use it would take this answer for its own
        self._pool.release(connection)
