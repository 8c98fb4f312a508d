"""Drivers run flows against redis-py: sync and async, the same but for `await`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Hashable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from redis.asyncio.cluster import RedisCluster as AsyncRedisCluster
from redis.exceptions import NoScriptError

from meterlib.core.operations import Reply, Value, packed, unpacked
from meterlib.errors import MeterError, StoreRefused, StoreUnavailable, UsageError
from meterlib.store import forgetful
from meterlib.store.ahead import Ahead
from meterlib.store.answers import answered, entries_of, head_of, names_of, page_of
from meterlib.store.batching import STOPPED, AsyncBatching, SyncBatching
from meterlib.store.commands import (
    Batch,
    Call,
    Command,
    Flow,
    KnownSinks,
    ReadLedger,
    ReadOwners,
    ReadPage,
    ReadWindows,
    StoredPage,
    TrimLedger,
)
from meterlib.store.embedded import EmbeddedServer
from meterlib.store.embedded_wait import wait_for, wait_for_async
from meterlib.store.faults import FAILURES, Attempts, corrupt, out_of_reach
from meterlib.store.keys import layout, layout_key, shard_keys, sinks_key
from meterlib.store.options import Clock, StoreOptions, swept_by
from meterlib.store.pipelines import Pipeline
from meterlib.store.scripts import Script, script
from meterlib.store.wires import AsyncClientWire, AsyncWire, ClientWire, Wire

T = TypeVar("T")
READING = ("peek", "find")
_ADD_SINK = "#!lua flags=allow-oom\nreturn redis.call('SADD', KEYS[1], ARGV[1])"
"""A server that is full has to be exported before it can be trimmed, perhaps for the first time of all."""


class _Calls:
    """What both redis drivers send and how they read the answers."""

    def __init__(self, options: StoreOptions, clock: Clock | None, *, plain: bool) -> None:
        self.options = options
        self._clock = clock
        self.real_time = clock is None
        self._plain = plain
        keys = [shard_keys(options.prefix, shard) for shard in range(options.shards)]
        self._names = keys
        self._keys: list[tuple[Value, ...]] = [(len(names), *names) for names in keys]
        self._layout = layout(options.shards)
        self._call = self._call_arguments(options.sweep_max) if clock is None else b""
        self._scripts: dict[str, tuple[Script, str, str]] = {}

    def script(self, name: str) -> tuple[Script, str, str]:
        found = self._scripts.get(name)
        if found is None:
            made = script(name)
            text, sha = (made.plain_text, made.plain_sha) if self._plain else (made.text, made.sha)
            found = self._scripts[name] = (made, text, sha)
        return found

    def words(self, batch: Batch, *, by_text: bool = False) -> list[Value]:
        """A script call: by its digest, or by its text for a server that does not have it."""
        name, shard, sweep_max, operations = batch
        _, text, sha = self.script(name)
        if sweep_max is None:
            sweep_max = swept_by(self.options, len(operations))
        usual = self._clock is None and sweep_max == self.options.sweep_max
        call = self._call if usual else self._call_arguments(sweep_max)
        script = ("EVAL", text) if by_text else ("EVALSHA", sha)
        return [*script, *self._keys[shard], call, *[operation.packed() for operation in operations]]

    def attempts(self, batch: Batch, deadline_s: float | None, began_s: float) -> Attempts:
        """The tries of a call, of what it has to find out first as well."""
        deadline_ms = self.options.deadline_ms if deadline_s is None else deadline_s * 1000
        return Attempts(batch.script, deadline_ms, began_s)

    def _call_arguments(self, sweep_max: int) -> bytes:
        now_ms = self._clock.now_ms if self._clock else 0
        return packed((self._layout, now_ms, sweep_max, self.options.retention_ms))

    def replies(self, name: str, count: int, answer: Any) -> list[Reply]:
        """What a script answers: one text, or a list of them where there were several operations."""
        answers = [answer] if count == 1 else answer
        try:
            if len(answers) == count:
                return [unpacked(one) for one in answers]
        except (AttributeError, TypeError, ValueError):
            pass
        raise StoreUnavailable(name, f"an answer that is none: {answer!r:.80}")

    def ledger_page(self, command: ReadLedger | ReadPage, *, raw: bool = False) -> tuple[Value, ...]:
        # redis-py knows by the command's name, a str, that it is to make a dict of each entry, which takes as long as
        # all else about reading; clients of a cluster need that name to find the node.
        ledger, first = self._names[command.shard][3], f"{command.after + 1}-0"
        return (b"XRANGE" if raw else "XRANGE", ledger, first, "+", "COUNT", command.limit)

    def trim(self, command: TrimLedger) -> tuple[Value, ...]:
        return ("XTRIM", self._names[command.shard][3], "MINID", "=", f"{command.below}-0")

    def owners_page(self, command: ReadOwners, cursor: Value) -> tuple[Value, ...]:
        leases = self._names[command.shard][1]
        return ("ZSCAN", leases, cursor, "MATCH", f"r/*/{command.reservation_id}", "COUNT", 1000)

    def windows_page(self, command: ReadWindows, cursor: Value) -> tuple[Value, ...]:
        owner = command.tenant.replace("*", "\\*")  # the rest of an encoded tenant means itself in a pattern
        return ("HSCAN", self._names[command.shard][0], cursor, "MATCH", f"w/{owner}/*", "COUNT", 1000)

    def sinks_commands(self, command: KnownSinks) -> list[tuple[Value, ...]]:
        key = sinks_key(self.options.prefix)
        told: list[tuple[Value, ...]] = [("SMEMBERS", key)]
        if command.drop:
            told.insert(0, ("SREM", key, command.drop))
        if command.add:
            told.insert(0, ("SADD", key, command.add) if self._plain else ("EVAL", _ADD_SINK, 1, key, command.add))
        return told

    def head_commands(self, shard: int) -> tuple[tuple[Value, ...], ...]:
        state, leases, _, ledger, _ = self._names[shard]
        return (
            ("HMGET", state, "head", "fork"),
            ("XRANGE", ledger, "-", "+", "COUNT", 1),
            ("XREVRANGE", ledger, "+", "-", "COUNT", 1),
            ("XLEN", ledger),
            ("ZCARD", leases),
        )


class SyncDriver:
    """Runs flows against a redis-py client."""

    def __init__(
        self,
        client: Any,
        options: StoreOptions,
        clock: Clock | None = None,
        *,
        wire: Wire | None = None,
        plain: bool = False,
    ) -> None:
        self.client = client
        self.options = options
        self._calls = _Calls(options, clock, plain=plain)
        self._by_client = ClientWire(client)
        self._wire = wire or self._by_client
        self._one_server = hasattr(client, "pipeline") and not hasattr(client, "get_node_from_key")
        self._ahead = Ahead(client) if self._one_server else None
        self.server: EmbeddedServer | None = None
        self._layout_checked = False
        self._ready = False
        self._stopped = False
        self._batching = SyncBatching(self, options.deadline_ms)

    def run(self, flow: Flow[T]) -> T:
        """Run a flow to its result; failures are thrown into it."""
        try:
            command = next(flow)
            while True:
                try:
                    answer = self.execute(command)
                except MeterError as error:
                    command = flow.throw(error)
                else:
                    command = answered(flow, command, answer)
        except StopIteration as done:
            result: T = done.value
            return result

    def execute(self, command: Command) -> Any:
        if isinstance(command, Call):
            return self._batching.run(command)
        if isinstance(command, ReadLedger):
            return entries_of(self._retrying("ledger", *self._calls.ledger_page(command)))
        if isinstance(command, ReadPage):
            return self._page(command)
        if isinstance(command, TrimLedger):
            return self._retrying("trim", *self._calls.trim(command))
        if isinstance(command, ReadOwners):
            owners: list[str] = []
            cursor: Value = 0
            while True:
                cursor, page = self._retrying("owners", *self._calls.owners_page(command, cursor))
                owners += [member[0].decode() for member in page]
                if int(cursor) == 0:
                    return owners
        if isinstance(command, ReadWindows):
            windows: set[str] = set()
            cursor = 0
            while True:
                cursor, found = self._retrying("windows", *self._calls.windows_page(command, cursor))
                windows.update(field.decode() for field in found)
                if int(cursor) == 0:
                    return sorted(windows)
        if isinstance(command, KnownSinks):
            return names_of([self._retrying("sinks", *words) for words in self._calls.sinks_commands(command)][-1])
        if self._ahead is not None:
            self._ahead.forget()  # it is older than the head, and may lack what that tells of
        return head_of(*[self._retrying("head", *words) for words in self._calls.head_commands(command.shard)])

    def _page(self, command: ReadPage) -> StoredPage:
        """A page; where it is full the next one is asked for, so that the server works on that one meanwhile."""
        if self._ahead is None:
            return page_of(self._retrying("ledger", *self._calls.ledger_page(command)))
        answer = self._ahead.fetched(command)
        if answer is None:
            answer = self._retrying("ledger", *self._calls.ledger_page(command, raw=True))
        page = page_of(answer)
        if len(page) == command.limit:
            following = command._replace(after=int(page[-1][0].partition(b"-")[0]))
            self._ahead.ask(following, *self._calls.ledger_page(following, raw=True))
        return page

    def lane_of(self, call: Call) -> Hashable:
        """What one server is asked may leave together; the slots of a cluster may lie on any node."""
        return None if self._one_server else (call.script, call.shard, call.sweep_max)

    def call(self, batch: Batch, deadline_s: float | None = None) -> list[Reply]:
        """Run operations of one script on one shard, in one call, in the time that they have left."""
        attempts: Attempts | None = None
        began_s = time.monotonic()
        if not self._ready:
            attempts = self._calls.attempts(batch, deadline_s, began_s)
            self._prepare(attempts, reads=batch.script in READING)
        while True:
            try:
                try:
                    answer = self._wire.ask(self._calls.words(batch))
                except NoScriptError:
                    answer = self._wire.ask(self._calls.words(batch, by_text=True))
                return self._calls.replies(batch.script, len(batch.operations), answer)
            except StoreUnavailable:
                self._wire.drop()
                raise
            except FAILURES as error:
                attempts = attempts or self._calls.attempts(batch, deadline_s, began_s)
                self._pause(attempts, error)

    def calls(self, batches: Sequence[Batch], deadline_s: float) -> list[list[Reply] | MeterError]:
        """What becomes of several calls, in one round trip if there is one server; one's failure is its own."""
        if len(batches) == 1 or not self._one_server:
            return [self._outcome(batch, deadline_s) for batch in batches]
        pipeline = Pipeline(self._calls, batches, deadline_s)
        try:
            if not self._ready:
                self._prepare(pipeline.attempts, reads=all(batch.script in READING for batch in batches))
        except MeterError as error:
            pipeline.give_up(error)
        while words := pipeline.words():
            wait_s = pipeline.take(self._wire.ask_all(words))
            if not wait_s:
                continue
            try:
                self._wait(pipeline.attempts, wait_s)
            except MeterError as error:
                pipeline.give_up(error)
        if any(isinstance(outcome, StoreUnavailable) for outcome in pipeline.outcomes):
            self._wire.drop()
        return pipeline.outcomes

    def _outcome(self, batch: Batch, deadline_s: float) -> list[Reply] | MeterError:
        try:
            return self.call(batch, deadline_s)
        except MeterError as error:
            return error.with_traceback(None)  # it is raised anew, for each who waits

    def _retrying(self, name: str, *words: Value) -> Any:
        return self._trying(Attempts(name, self.options.deadline_ms), *words)

    def _trying(self, attempts: Attempts, *words: Value) -> Any:
        while True:
            try:
                return self._by_client.ask(words)
            except FAILURES as error:
                self._pause(attempts, error)

    def _prepare(self, attempts: Attempts, *, reads: bool) -> None:
        """What comes before the first call, and before the first that writes; in that call's time."""
        if not self._layout_checked:
            self._check_layout(attempts, reads=reads)
        if reads or not self._layout_checked or self._ready:
            return
        self._ready = True
        if self._calls.real_time:
            with suppress(*FAILURES):  # managed servers may forbid it, and stand-ins not know it
                forgetful.tell(self.client.execute_command("INFO"))

    def _check_layout(self, attempts: Attempts, *, reads: bool) -> None:
        """Tenants are spread over shards by their number: nobody may use the store with another one.

        Who comes first to write says it; looking at a store that is not used yet does not.
        """
        key, own = layout_key(self.options.prefix), layout(self.options.shards)
        stored = self._trying(attempts, "GET", key)
        if stored is None and reads:
            return
        if stored is None:
            try:
                self._trying(attempts, "SETNX", key, own)
            except StoreRefused:
                return  # out of memory: settlements must go on all the same, and the next call asks again
            stored = self._trying(attempts, "GET", key) or own.encode()
        if not isinstance(stored, bytes):
            raise attempts.over(f"an answer that is none: {stored!r:.80}")
        if stored.decode() != own:
            raise corrupt("layout", f"METERLIB_LAYOUT {stored.decode()} is the layout of the store, not {own}")
        self._layout_checked = True

    def _pause(self, attempts: Attempts, error: Exception) -> None:
        self._wait(attempts, attempts.pause_s(error))

    def _wait(self, attempts: Attempts, wait_s: float) -> None:
        if self.server and not self._stopped:
            wait_for(self.server, attempts.left_s())
        if not self._stopped:
            time.sleep(wait_s)
        if self._stopped:
            raise attempts.over(STOPPED)

    def reach(self) -> None:
        """Raise at once if nobody can be there to answer, where a call would go on trying until its deadline."""
        if self.server:
            return
        try:
            self._by_client.ask(("GET", layout_key(self.options.prefix)))
        except FAILURES as error:
            cause = out_of_reach(error)
            if cause:
                raise StoreUnavailable("reach", cause) from error

    def follow(self) -> None:
        """Turn to the primary that the sentinels name by now, if there are sentinels.

        One that was replaced while it was well goes on answering for ten seconds, and all of that is lost.
        """
        named = _primary_named_to(self.client)
        if named:
            with suppress(*FAILURES):
                named()

    def stop(self) -> None:
        """Nothing is tried again: whatever is on its way ends with its answer, or is told that there is none."""
        self._stopped = True

    def close(self) -> None:
        self._wire.close()
        if self._ahead is not None:
            self._ahead.forget()
        for client in (self.client, *_watchers_of(self.client)):
            client.close()


class AsyncDriver:
    """Runs flows against a redis.asyncio client."""

    def __init__(
        self,
        client: Any,
        options: StoreOptions,
        clock: Clock | None = None,
        *,
        wire: AsyncWire | None = None,
        plain: bool = False,
    ) -> None:
        self.client = client
        self.options = options
        self._calls = _Calls(options, clock, plain=plain)
        self._wire = wire or AsyncClientWire(client)
        self._one_server = hasattr(client, "pipeline") and not hasattr(client, "get_node_from_key")
        self.server: EmbeddedServer | None = None
        self._primary: Any = None
        self._layout_checked = False
        self._ready = False
        self._stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._batching = AsyncBatching(self, options.deadline_ms)

    async def run(self, flow: Flow[T]) -> T:
        """Run a flow to its result; failures are thrown into it."""
        try:
            command = next(flow)
            loop = asyncio.get_running_loop()
            if self._loop is not loop:
                self._settle_in(loop)
            while True:
                try:
                    answer = await self.execute(command)
                except MeterError as error:
                    command = flow.throw(error)
                else:
                    command = answered(flow, command, answer)
        except StopIteration as done:
            result: T = done.value
            return result

    def _settle_in(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is not None:
            raise UsageError("this meter belongs to another event loop: make one meter for each")
        self._loop = loop

    async def execute(self, command: Command) -> Any:
        if isinstance(command, Call):
            return await self._batching.run(command)
        if isinstance(command, ReadLedger):
            return entries_of(await self._retrying("ledger", *self._calls.ledger_page(command)))
        if isinstance(command, ReadPage):
            return page_of(await self._retrying("ledger", *self._calls.ledger_page(command, raw=self._one_server)))
        if isinstance(command, TrimLedger):
            return await self._retrying("trim", *self._calls.trim(command))
        if isinstance(command, ReadOwners):
            owners: list[str] = []
            cursor: Value = 0
            while True:
                cursor, page = await self._retrying("owners", *self._calls.owners_page(command, cursor))
                owners += [member[0].decode() for member in page]
                if int(cursor) == 0:
                    return owners
        if isinstance(command, ReadWindows):
            windows: set[str] = set()
            cursor = 0
            while True:
                cursor, found = await self._retrying("windows", *self._calls.windows_page(command, cursor))
                windows.update(field.decode() for field in found)
                if int(cursor) == 0:
                    return sorted(windows)
        if isinstance(command, KnownSinks):
            found = [await self._retrying("sinks", *words) for words in self._calls.sinks_commands(command)]
            return names_of(found[-1])
        return head_of(*[await self._retrying("head", *words) for words in self._calls.head_commands(command.shard)])

    def lane_of(self, call: Call) -> Hashable:
        """What one server is asked may leave together; the slots of a cluster may lie on any node."""
        return None if self._one_server else (call.script, call.shard, call.sweep_max)

    async def call(self, batch: Batch, deadline_s: float | None = None) -> list[Reply]:
        """Run operations of one script on one shard, in one call, in the time that they have left."""
        attempts: Attempts | None = None
        began_s = time.monotonic()
        if not self._ready:
            attempts = self._calls.attempts(batch, deadline_s, began_s)
            await self._prepare(attempts, reads=batch.script in READING)
        while True:
            try:
                try:
                    answer = await self._wire.ask(self._calls.words(batch))
                except NoScriptError:
                    answer = await self._wire.ask(self._calls.words(batch, by_text=True))
                return self._calls.replies(batch.script, len(batch.operations), answer)
            except StoreUnavailable:
                await self._wire.drop()
                raise
            except FAILURES as error:
                attempts = attempts or self._calls.attempts(batch, deadline_s, began_s)
                await self._pause(attempts, error)

    async def calls(self, batches: Sequence[Batch], deadline_s: float) -> list[list[Reply] | MeterError]:
        """What becomes of several calls, in one round trip if there is one server; one's failure is its own."""
        if len(batches) == 1 or not self._one_server:
            return [await self._outcome(batch, deadline_s) for batch in batches]
        pipeline = Pipeline(self._calls, batches, deadline_s)
        try:
            if not self._ready:
                await self._prepare(pipeline.attempts, reads=all(batch.script in READING for batch in batches))
        except MeterError as error:
            pipeline.give_up(error)
        while words := pipeline.words():
            wait_s = pipeline.take(await self._wire.ask_all(words))
            if not wait_s:
                continue
            try:
                await self._wait(pipeline.attempts, wait_s)
            except MeterError as error:
                pipeline.give_up(error)
        if any(isinstance(outcome, StoreUnavailable) for outcome in pipeline.outcomes):
            await self._wire.drop()
        return pipeline.outcomes

    async def _outcome(self, batch: Batch, deadline_s: float) -> list[Reply] | MeterError:
        try:
            return await self.call(batch, deadline_s)
        except MeterError as error:
            return error.with_traceback(None)  # it is raised anew, for each who waits

    async def _retrying(self, name: str, *words: Value) -> Any:
        return await self._trying(Attempts(name, self.options.deadline_ms), *words)

    async def _trying(self, attempts: Attempts, *words: Value) -> Any:
        while True:
            try:
                return await self.client.execute_command(*words, NEVER_DECODE=True)
            except FAILURES as error:
                await self._pause(attempts, error)

    async def _prepare(self, attempts: Attempts, *, reads: bool) -> None:
        """What comes before the first call, and before the first that writes; in that call's time."""
        if isinstance(self.client, AsyncRedisCluster):
            await self._meet_nodes(self.client, attempts)
        if not self._layout_checked:
            await self._check_layout(attempts, reads=reads)
        if reads or not self._layout_checked or self._ready:
            return
        self._ready = True
        if self._calls.real_time:
            with suppress(*FAILURES):  # managed servers may forbid it, and stand-ins not know it
                forgetful.tell(await self.client.execute_command("INFO"))

    async def _meet_nodes(self, client: AsyncRedisCluster, attempts: Attempts) -> None:
        """Left to itself, a client that does not know its nodes yet sends what comes meanwhile to any of them."""
        while True:
            try:
                await client.initialize()
                return
            except FAILURES as error:
                await self._pause(attempts, error)

    async def _check_layout(self, attempts: Attempts, *, reads: bool) -> None:
        """Tenants are spread over shards by their number: nobody may use the store with another one.

        Who comes first to write says it; looking at a store that is not used yet does not.
        """
        key, own = layout_key(self.options.prefix), layout(self.options.shards)
        stored = await self._trying(attempts, "GET", key)
        if stored is None and reads:
            return
        if stored is None:
            try:
                await self._trying(attempts, "SETNX", key, own)
            except StoreRefused:
                return  # out of memory: settlements must go on all the same, and the next call asks again
            stored = await self._trying(attempts, "GET", key) or own.encode()
        if not isinstance(stored, bytes):
            raise attempts.over(f"an answer that is none: {stored!r:.80}")
        if stored.decode() != own:
            raise corrupt("layout", f"METERLIB_LAYOUT {stored.decode()} is the layout of the store, not {own}")
        self._layout_checked = True

    async def _pause(self, attempts: Attempts, error: Exception) -> None:
        await self._wait(attempts, attempts.pause_s(error))

    async def _wait(self, attempts: Attempts, wait_s: float) -> None:
        if self.server and not self._stopped:
            await wait_for_async(self.server, attempts.left_s())
        if not self._stopped:
            await asyncio.sleep(wait_s)
        if self._stopped:
            raise attempts.over(STOPPED)

    async def follow(self) -> None:
        """See SyncDriver."""
        named = _primary_named_to(self.client)
        if named:
            pool = self.client.connection_pool
            with suppress(*FAILURES):
                before, self._primary = self._primary or pool.master_address, await named()
                if before and before != self._primary:
                    # Those in use, too: unlike its sync pool, redis.asyncio's goes on with them once they are free.
                    await pool.disconnect()

    async def stop(self) -> None:
        """See SyncDriver; what is on its way for several callers is given up."""
        self._stopped = True
        await self._batching.stop()

    async def aclose(self) -> None:
        await self._wire.aclose()
        for client in (self.client, *_watchers_of(self.client)):
            await client.aclose()


def _primary_named_to(client: Any) -> Any:
    """What asks the sentinels of a client for the primary, and drops its connections to another one."""
    return getattr(getattr(client, "connection_pool", None), "get_master_address", None)


def _watchers_of(client: Any) -> Sequence[Any]:
    """The clients by which one asks its sentinels, if it does; nobody else closes them."""
    pool = getattr(client, "connection_pool", None)
    return getattr(getattr(pool, "sentinel_manager", None), "sentinels", ())
