"""An append-only file that ends in the middle of a write: each decision is there as a whole, or not at all."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import redis

from meterlib import Limit, Meter, Policy, StoreOptions, Usage
from meterlib.core.operations import packed
from meterlib.testing import Clock
from tests.conftest import soak_seconds
from tests.faults.world import ask, check_books
from tests.support.servers import available, start_server, wait_until

OPTIONS = StoreOptions(shards=1)
POLICY = Policy(
    limits=(
        Limit(name="hour", unit="input_tokens", quota=1000, window="1h"),
        Limit(name="open", quota=5, open=True),
    )
)
ESTIMATE, USED = Usage(input_tokens=100), Usage(input_tokens=30)
FILE = Path("appendonlydir") / "appendonly.aof.1.incr.aof"


class Recorded(NamedTuple):
    """The folder of a server that was killed, and where in its file the last two scripts begin."""

    folder: Path
    kind: str
    data: bytes
    reserve_from: int
    settle_from: int


@pytest.fixture(scope="module", params=["valkey", "redis"])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """One reservation was settled; then another was made, and settled: those two scripts are the file's end."""
    kind = str(request.param)
    reason = available(kind)
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp(kind)
    with start_server(folder, kind, append_only=True) as server:
        file = folder / FILE
        with Meter.connect(server.url, POLICY, options=OPTIONS, clock=Clock()) as meter:
            meter.reserve("acme", {}, ESTIMATE, reservation_id="before").settle(USED)
            reserve_from = file.stat().st_size
            mine = meter.reserve("acme", {}, ESTIMATE, reservation_id="mine")
            settle_from = file.stat().st_size
            mine.settle(USED)
        server.kill()
    return Recorded(folder, kind, file.read_bytes(), reserve_from, settle_from)


@contextmanager
def cut_at(recorded: Recorded, size: int, scratch: Path) -> Iterator[tuple[Meter, redis.Redis]]:
    """A server that was started on a copy of the file that ends after so many bytes."""
    folder = scratch / f"cut-{size}"
    shutil.copytree(recorded.folder, folder)
    (folder / FILE).write_bytes(recorded.data[:size])
    with start_server(folder, recorded.kind, append_only=True) as server, server.client() as client:
        with Meter.connect(server.url, POLICY, options=OPTIONS, clock=Clock()) as meter:
            yield meter, client
        server.kill()
    shutil.rmtree(folder)


def check_cut(recorded: Recorded, size: int, scratch: Path) -> None:
    """Whatever is left of the file, entry, reservation and windows tell the same story, and it can go on."""
    with cut_at(recorded, size, scratch) as (meter, client):
        ended = check_books(meter)
        hour, slots = meter.peek("acme")
        state = ask(client, "HGETALL", "meterlib:{0}:state")
        assert b"pending" not in state
        record = state.get(b"r/acme/mine")
        opened = ask(client, "ZSCORE", "meterlib:{0}:leases", "r/acme/mine") is not None
        if size < recorded.settle_from:
            assert ended == [("before", "settled")]
            assert (record is not None) == opened == (slots.used == 1)
            assert (hour.used, hour.held) == ((130, 100) if opened else (30, 0))
            assert not opened or size > recorded.reserve_from
        elif ended == [("before", "settled")]:
            assert size < len(recorded.data)
            assert opened
            assert (hour.used, hour.held, slots.used) == (130, 100, 1)
            assert record is not None
            assert not record.startswith(b"settled")
        else:
            assert ended == [("before", "settled"), ("mine", "settled")]
            assert not opened
            assert (hour.used, hour.held, slots.used) == (60, 0, 0)
            assert record is not None
            assert record.startswith(packed(("settled", 2)))
        if record is None:
            meter.reserve("acme", {}, ESTIMATE, reservation_id="mine")
        entry = meter.settle("acme", "mine", USED, attributes={})
        assert (entry.n, entry.kind) == (2, "settled")
        assert check_books(meter) == [("before", "settled"), ("mine", "settled")]
        assert [limit.used for limit in meter.peek("acme")] == [60, 0]


def edges(data: bytes, begin: int) -> list[int]:
    """Where the file's lines end, from `begin` on."""
    found, at = [], begin
    while (at := data.find(b"\r\n", at) + 2) > 1:
        found.append(at)
    return found


def test_a_file_cut_at_the_ends_of_its_writes_holds_whole_decisions(recorded: Recorded, tmp_path: Path) -> None:
    """Finance: after a crash an entry is there if, and only if, its reservation ended and its windows are charged."""
    begin, settle, end = recorded.reserve_from, recorded.settle_from, len(recorded.data)
    execs = [recorded.data.index(b"EXEC\r\n", at) for at in (begin, settle)]
    chance = random.Random(22)
    cuts = {begin, begin + 1, settle - 1, settle, settle + 1, end - 1, end}
    cuts |= {at + step for at in execs for step in (-1, 0, 2, 4, 5)}
    cuts |= set(chance.sample(edges(recorded.data, begin), 14)) | set(chance.sample(range(begin, end), 14))
    for size in sorted(cuts):
        check_cut(recorded, size, tmp_path)


@pytest.mark.soak
def test_a_file_cut_at_every_byte_holds_whole_decisions(recorded: Recorded, tmp_path: Path) -> None:
    """Finance: there is no byte at which a crash could leave half a decision."""
    sizes = list(range(recorded.reserve_from, len(recorded.data) + 1))
    random.Random(os.urandom(8)).shuffle(sizes)
    ends_at = time.monotonic() + soak_seconds()
    while sizes and time.monotonic() < ends_at:
        check_cut(recorded, sizes.pop(), tmp_path)


def test_a_whole_file_is_read_back_as_it_was(recorded: Recorded, tmp_path: Path) -> None:
    """Operator: a restart changes nothing."""
    with cut_at(recorded, len(recorded.data), tmp_path) as (meter, _):
        wait_until(lambda: meter.head(0).last_number == 2, "the entries")
        assert [entry.usage for entry in meter.ledger(0)] == [{"input_tokens": 30}] * 2
