"""The store of `memory://`: the pure twin of the scripts, behind the face that a server has."""

from __future__ import annotations

import threading
import time
from typing import Any, TypeVar

from meterlib.core import rules
from meterlib.core.operations import Reply
from meterlib.errors import MeterError, StoreCorrupt
from meterlib.store.answers import answered, forked_of, page_of
from meterlib.store.commands import (
    Batch,
    Call,
    Command,
    Flow,
    KnownSinks,
    ReadHead,
    ReadOwners,
    ReadPage,
    ReadWindows,
    ShardHead,
    TrimLedger,
)
from meterlib.store.keys import layout
from meterlib.store.options import Clock, StoreOptions, swept_by

T = TypeVar("T")


class MemoryStore:
    """All shards of a `memory://` store; meters of one process that share it see the same limits and ledger."""

    def __init__(self, options: StoreOptions) -> None:
        self.options = options
        self.shards = [rules.Shard() for _ in range(options.shards)]
        self.sinks: set[str] = set()
        self.lock = threading.Lock()


class MemoryDriver:
    """Runs flows against the pure twin; the async driver of memory differs by `async` only."""

    def __init__(self, store: MemoryStore, clock: Clock | None = None) -> None:
        self.store = store
        self.options = store.options
        self._clock = clock
        self._layout = layout(store.options.shards)

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
            batch = Batch(command.script, command.shard, command.sweep_max, (command.operation,))
            return MemoryDriver.call(self, batch)[0]
        if isinstance(command, KnownSinks):
            with self.store.lock:
                self.store.sinks |= {command.add}
                self.store.sinks -= {command.drop, ""}
                return sorted(self.store.sinks)
        shard = self.store.shards[command.shard]
        with self.store.lock:
            if isinstance(command, ReadHead):
                numbers = [entry["n"] for entry in shard.ledger] or [0]
                return ShardHead(
                    f"{shard.epoch:013d}" if shard.layout else "",
                    shard.clock_ms,
                    shard.number,
                    numbers[0],
                    numbers[-1],
                    len(shard.ledger),
                    len(shard.leases),
                    forked_of(*shard.fork) if shard.fork else None,
                )
            if isinstance(command, ReadOwners):
                return [field for _, field in shard.leases if field.endswith(f"/{command.reservation_id}")]
            if isinstance(command, ReadWindows):
                return sorted(field for field in shard.windows if field.startswith(f"w/{command.tenant}/"))
            if isinstance(command, TrimLedger):
                before = len(shard.ledger)
                shard.ledger[:] = [entry for entry in shard.ledger if entry["n"] >= command.below]
                return before - len(shard.ledger)
            page = [entry for entry in shard.ledger if entry["n"] > command.after][: command.limit]
            if isinstance(command, ReadPage):
                return page_of([(b"%d-0" % entry["n"], stored_fields(entry)) for entry in page])
            return [(entry["n"], stored_fields(entry)) for entry in page]

    def call(self, batch: Batch) -> list[Reply]:
        """Run operations of one rule on one shard, in one call."""
        name, shard, sweep_max, operations = batch
        server_ms = self._clock.now_ms if self._clock else time.time_ns() // 1_000_000
        most = swept_by(self.options, len(operations)) if sweep_max is None else sweep_max
        with self.store.lock:
            try:
                work = rules.Work(self.store.shards[shard], server_ms, self._layout, most, self.options.retention_ms)
            except rules.LayoutMismatch as error:
                raise StoreCorrupt(str(error)) from None
            return rules.run(name, work, operations)

    def follow(self) -> None:
        """There is but one store."""

    def stop(self) -> None:
        """Nothing is ever on its way."""

    def close(self) -> None:
        """Nothing to close: the store is its owner's."""


class AsyncMemoryDriver(MemoryDriver):
    """The memory driver behind an async face."""

    async def run(self, flow: Flow[T]) -> T:  # type: ignore[override]
        return MemoryDriver.run(self, flow)

    async def call(self, batch: Batch) -> list[Reply]:  # type: ignore[override]
        return MemoryDriver.call(self, batch)

    async def follow(self) -> None:  # type: ignore[override]
        """There is but one store."""

    async def stop(self) -> None:  # type: ignore[override]
        """Nothing is ever on its way."""

    async def aclose(self) -> None:
        """Nothing to close: the store is its owner's."""


def stored_fields(entry: dict[str, Any]) -> dict[bytes, bytes]:
    """An entry of the twin as the store would hold it."""
    words = {name: value for name, value in entry.items() if name != "n"} | {"epoch": f"{entry['epoch']:013d}"}
    return {name.encode(): value if isinstance(value, bytes) else str(value).encode() for name, value in words.items()}
