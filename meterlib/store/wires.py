"""Wires carry script calls to a server and bring back its answers; for sync and for async drivers.

Where meterlib itself made the client, for one server, its wire speaks to redis-py's connections directly: they dial,
log in and encrypt, and the client's own way to them, which takes longer than the call, is left out. Clients that were
given, and those of clusters and sentinels, know better where a call has to go, and who wants to see it: it goes by
them.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from hiredis import Reader, pack_command
from redis import exceptions
from redis.asyncio.connection import DefaultParser
from redis.exceptions import InvalidResponse, RedisError, ResponseError

from meterlib.core.operations import Value
from meterlib.store.faults import FAILURES

Words = Sequence[Value]
"""A command and its arguments."""

_NO_ANSWER_YET = object()


class Wire(Protocol):
    """How a driver reaches its server."""

    def ask(self, words: Words) -> Any:
        """The answer to a command; raises what redis-py raises."""
        ...

    def ask_all(self, commands: Sequence[Words]) -> list[Any]:
        """The answers to commands that leave together; a failure takes the place of its answer."""
        ...

    def drop(self) -> None:
        """Nobody is to be asked by the connections that there are now."""
        ...

    def close(self) -> None: ...


class AsyncWire(Protocol):
    """A Wire whose methods are awaited."""

    async def ask(self, words: Words) -> Any: ...

    async def ask_all(self, commands: Sequence[Words]) -> list[Any]: ...

    async def drop(self) -> None: ...

    async def aclose(self) -> None: ...


class ClientWire:
    """By a redis-py client's own methods."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def ask(self, words: Words) -> Any:
        try:
            return self._client.execute_command(*words, NEVER_DECODE=True)
        except Exception:
            raise
        except BaseException:
            # An interrupt may strike between a request and its answer; the next call must not take that for its own.
            self.drop()
            raise

    def ask_all(self, commands: Sequence[Words]) -> list[Any]:
        pipe = self._client.pipeline(transaction=False)
        for words in commands:
            pipe.execute_command(*words, NEVER_DECODE=True)
        try:
            answers: list[Any] = pipe.execute(raise_on_error=False)
        except FAILURES as error:
            return [error] * len(commands)
        except BaseException:
            self.drop()  # see ask
            raise
        return answers

    def drop(self) -> None:
        pool = getattr(self._client, "connection_pool", None)
        if pool is not None:
            pool.disconnect(inuse_connections=False)

    def close(self) -> None:
        """The client is its owner's."""


class DirectWire:
    """By connections of its own, as many as there are calls at once; they are made as those of `pool` would be."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._idle: list[Any] = []
        self._pid = os.getpid()

    def ask(self, words: Words) -> Any:
        connection = self._take()
        try:
            connection.send_packed_command((_packed(words),), check_health=False)
            answer = connection.read_response(disable_decoding=True)
        except ResponseError:
            self._idle.append(connection)
            raise
        except BaseException:
            connection.disconnect()  # its answer may still come, and is nobody's
            raise
        self._idle.append(connection)
        return answer

    def ask_all(self, commands: Sequence[Words]) -> list[Any]:
        connection = self._take()
        try:
            packed = b"".join([_packed(words) for words in commands])
            connection.send_packed_command((packed,), check_health=False)
            answers = [_answer_of(connection) for _ in commands]
        except FAILURES as error:
            connection.disconnect()
            return [error] * len(commands)
        except BaseException:
            connection.disconnect()
            raise
        self._idle.append(connection)
        return answers

    def _take(self) -> Any:
        if self._pid != os.getpid():  # the connections are those of the process that this one was forked from
            self._idle, self._pid = [], os.getpid()
        try:
            return self._idle.pop()
        except IndexError:
            return self._pool.connection_class(**self._pool.connection_kwargs)

    def drop(self) -> None:
        with suppress(IndexError):
            while True:
                self._idle.pop().disconnect()

    def close(self) -> None:
        self.drop()


def _packed(words: Words) -> bytes:
    packed: bytes = pack_command(tuple(words))  # type: ignore[arg-type]
    return packed


def _answer_of(connection: Any) -> Any:
    try:
        return connection.read_response(disable_decoding=True)
    except ResponseError as error:
        return error


class AsyncClientWire:
    """By a redis.asyncio client's own methods."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def ask(self, words: Words) -> Any:
        return await self._client.execute_command(*words, NEVER_DECODE=True)

    async def ask_all(self, commands: Sequence[Words]) -> list[Any]:
        pipe = self._client.pipeline(transaction=False)
        for words in commands:
            pipe.execute_command(*words, NEVER_DECODE=True)
        try:
            answers: list[Any] = await pipe.execute(raise_on_error=False)
        except FAILURES as error:
            return [error] * len(commands)
        return answers

    async def drop(self) -> None:
        """redis.asyncio drops a connection whose call was cancelled by itself."""

    async def aclose(self) -> None:
        """The client is its owner's."""


class AsyncDirectWire:
    """By one connection, made as those of `pool` would be: what is asked first is answered first.

    A caller that is cancelled leaves its answer to be passed over; nobody else notices.
    """

    def __init__(self, pool: Any, timeout_ms: int) -> None:
        self._pool = pool
        self._timeout_s = timeout_ms / 1000
        self._line: _Line | None = None
        self._dialling = asyncio.Lock()

    async def ask(self, words: Words) -> Any:
        line = self._line
        if line is None or line.is_closed:
            line = await self._dial()
        answer = (await line.ask(_packed(words), 1))[0]
        if isinstance(answer, RedisError):
            raise answer
        return answer

    async def ask_all(self, commands: Sequence[Words]) -> list[Any]:
        try:
            line = self._line
            if line is None or line.is_closed:
                line = await self._dial()
            return await line.ask(b"".join([_packed(words) for words in commands]), len(commands))
        except FAILURES as error:
            return [error] * len(commands)

    async def _dial(self) -> _Line:
        async with self._dialling:
            if self._line and not self._line.is_closed:
                return self._line
            await self.aclose()
            connection = self._pool.connection_class(**self._pool.connection_kwargs)
            try:
                await connection.connect()
            except BaseException:
                await connection.disconnect(nowait=True)
                raise
            self._line = _Line(connection, self._timeout_s)
            return self._line

    async def drop(self) -> None:
        if self._line:
            self._line.hang_up()

    async def aclose(self) -> None:
        line, self._line = self._line, None
        if line:
            line.hang_up()
            with suppress(*FAILURES):
                await line.connection.disconnect(nowait=True)


class _Asked(NamedTuple):
    """How many answers somebody waits for, and since when by the loop's clock, in seconds."""

    caller: asyncio.Future[list[Any]]
    answers: int
    since_s: float


class _Line(asyncio.Protocol):
    """Takes the place of redis-py's stream on a connection that redis-py has opened and logged in on."""

    def __init__(self, connection: Any, timeout_s: float) -> None:
        self.connection = connection
        self.is_closed = False
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._transport = connection._writer.transport
        self._stream = self._transport.get_protocol()
        self._reader = Reader(InvalidResponse, DefaultParser.parse_error, notEnoughData=_NO_ANSWER_YET)
        self._asked: deque[_Asked] = deque()
        self._answers: list[Any] = []
        self._alarm: asyncio.TimerHandle | None = None
        self._transport.set_protocol(self)

    def ask(self, packed: bytes, count: int) -> asyncio.Future[list[Any]]:
        caller: asyncio.Future[list[Any]] = self._loop.create_future()
        now_s = self._loop.time()
        self._asked.append(_Asked(caller, count, now_s))
        if self._alarm is None:
            self._alarm = self._loop.call_at(now_s + self._timeout_s, self._look)
        self._transport.write(packed)
        return caller

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while (answer := self._reader.gets()) is not _NO_ANSWER_YET:
                self._take(answer)
        except RedisError as error:
            self._break(error)

    def _take(self, answer: Any) -> None:
        if not self._asked:
            raise InvalidResponse("an answer that nobody asked for")
        self._answers.append(answer)
        caller, count, _ = self._asked[0]
        if len(self._answers) == count:
            answers, self._answers = self._answers, []
            self._asked.popleft()
            if not caller.done():
                caller.set_result(answers)

    def _look(self) -> None:
        """One timer for all that is asked: set anew as long as somebody waits."""
        self._alarm = None
        if self._asked:
            ends_at_s = self._asked[0].since_s + self._timeout_s
            if ends_at_s <= self._loop.time():
                self._break(exceptions.TimeoutError("Timeout reading from socket"))
            else:
                self._alarm = self._loop.call_at(ends_at_s, self._look)

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(exceptions.ConnectionError(str(error or "Connection closed by server.")))
        self._stream.connection_lost(error)

    def hang_up(self) -> None:
        self._break(exceptions.ConnectionError("Connection closed."))

    def _break(self, error: RedisError) -> None:
        self._fail(error)
        self._transport.abort()

    def _fail(self, error: RedisError) -> None:
        self.is_closed = True
        if self._alarm:
            self._alarm.cancel()
            self._alarm = None
        while self._asked:
            caller = self._asked.popleft().caller
            if not caller.done():
                caller.set_exception(error)
