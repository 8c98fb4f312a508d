"""Foreign data under our keys, no memory left, keys evicted: a clear error, and nothing half written."""

from __future__ import annotations

import importlib.util
import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from meterlib import Meter, StoreCorrupt, StoreError, StoreRefused
from meterlib.core.operations import Fork
from meterlib.store.commands import Call
from meterlib.store.keys import LAYOUT_VERSION
from meterlib.testing import Clock
from tests.faults.world import (
    ENDED,
    LEASES,
    LEDGER,
    STATE,
    TENANT,
    USED,
    VERBS,
    Verb,
    ask,
    build,
    check_books,
    contents,
    everything,
    hold,
    raw,
    restore,
    standing,
)
from tests.support.servers import Server

ROOT = Path(__file__).parents[2]
each_verb = pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
FOREIGN: dict[str, tuple[str | int, ...]] = {
    "string": ("SET", "junk"),
    "list": ("RPUSH", "junk"),
    "set": ("SADD", "junk"),
    "hash": ("HSET", "junk", "junk"),
    "zset": ("ZADD", 1, "junk"),
    "stream": ("XADD", "*", "junk", "junk"),
}
TYPES = {STATE: "hash", LEASES: "zset", ENDED: "list", LEDGER: "stream"}
JUNK: tuple[str | bytes, ...] = (
    *("", "junk", "1", "9" * 12, "settled", "open\n\n", "\x1e\x1f\x1e", "XADD\x1f"),
    *(
        b"\0" * 7,
        b"\0" * 56,
        b"\xff" * 56,
        b"settled\0" + b"\0" * 30,
        b"open\0" + b"\xff" * 80,
        b"open\0" + b"\x7f" * 80,
    ),
    *(b"open\0" + struct.pack(">4d", *numbers) + b"\0" * 80 for numbers in ((1, 2**53, 0, 1e300), (1, 2**53, 0, -1))),
    *(struct.pack(">7d", *[number] * 7) for number in (float("nan"), float("inf"), -1.0, 0.5)),
)
"""What may stand in a field by mistake: text, cut-off bytes, and bytes that are numbers but none of ours."""


@pytest.mark.parametrize("key", TYPES, ids=lambda key: key.rpartition(":")[2])
@each_verb
def test_a_key_of_a_foreign_type_is_reported_and_nothing_is_written(
    verb: Verb, key: str, meter: Meter, direct: redis.Redis, clock: Clock
) -> None:
    """Operator: a key that somebody else has overwritten is named as the trouble, and no other key is touched."""
    build(meter, clock)
    saved = raw(direct)
    for kind, (command, *words) in FOREIGN.items():
        if kind == TYPES[key]:
            continue
        restore(direct, saved)
        ask(direct, "DEL", key)
        ask(direct, command, key, *words)
        before = everything(direct)
        with pytest.raises(StoreError, match="foreign type") as refusal:
            verb.act(meter)
        assert isinstance(refusal.value, StoreCorrupt)
        assert everything(direct) == before


def test_a_fork_finds_a_key_of_a_foreign_type_before_it_writes(meter: Meter, direct: redis.Redis, clock: Clock) -> None:
    """Operator: once the key is put right, the fork is made as if nothing had been."""
    build(meter, clock)
    head = meter.head(0)
    epoch, last = int(head.epoch), head.ledger_last
    entry = next(entry for entry in meter.ledger(0) if entry.n == last)
    seen = (entry.reservation_id, last, entry.booked_at, clock.now_ms)
    again = Call("fork", 0, Fork(*seen, epoch, epoch, last, last - 1))
    saved = raw(direct)
    ask(direct, "DEL", ENDED)
    ask(direct, "SET", ENDED, "junk")
    before = everything(direct)

    with pytest.raises(StoreCorrupt, match="foreign type"):
        meter._driver.execute(again)

    assert everything(direct) == before
    restore(direct, saved)
    assert b"forked" == meter._driver.execute(again)[0]


@pytest.mark.parametrize("field", ["head", "pending", "r/acme/mine", "r/acme/stale-1", "w/acme/hour"])
@each_verb
def test_a_field_of_foreign_content_never_leads_to_half_a_write(
    verb: Verb, field: str, meter: Meter, direct: redis.Redis, clock: Clock
) -> None:
    """Operator: a record that was tampered with fails the calls that read it, and they change nothing."""
    build(meter, clock)
    saved = raw(direct)
    failed = 0
    for junk in JUNK:
        restore(direct, saved)
        direct.hset(STATE, field, junk)
        before = everything(direct)
        try:
            verb.act(meter)
        except StoreError:
            failed += 1
            assert everything(direct) == before, junk
    assert failed or field not in ("head", "pending")


def test_another_number_of_shards_is_refused_before_anything_is_written(
    meter: Meter, direct: redis.Redis, clock: Clock
) -> None:
    """Operator: a state of another layout is told from ours, and both layouts are named."""
    build(meter, clock)
    head = ask(direct, "HGET", STATE, "head")
    direct.hset(STATE, "head", head[:-1] + b"7")
    before = everything(direct)
    for verb in VERBS:
        with pytest.raises(StoreCorrupt, match=f"{LAYOUT_VERSION}/7 .* not {LAYOUT_VERSION}/1"):
            verb.act(meter)
        assert everything(direct) == before


def test_a_lease_that_is_listed_too_early_is_put_right_in_passing(
    meter: Meter, direct: redis.Redis, clock: Clock
) -> None:
    """Operator: the list of leases is only an index; what a reservation's own record says is what happens."""
    lease_end_ms = hold(meter, "mine", lease_ms=2000).expires_at_ms
    head = ask(direct, "HGET", STATE, "head")
    ask(direct, "ZADD", LEASES, clock.now_ms, "r/acme/mine")
    direct.hset(STATE, "head", head[:32] + struct.pack(">d", clock.now_ms) + head[40:])
    hold(meter, "another")
    assert lease_end_ms == int(ask(direct, "ZSCORE", LEASES, "r/acme/mine"))

    clock.set(lease_end_ms)
    hold(meter, "one-more")
    assert "mine" in [entry.reservation_id for entry in meter.ledger(0) if entry.kind == "expired"]


def test_a_sweep_looks_for_itself_whatever_the_head_says(meter: Meter, direct: redis.Redis, clock: Clock) -> None:
    """Operator: a head that was restored from somewhere hides neither overdue leases nor what may be forgotten."""
    build(meter, clock)
    head = ask(direct, "HGET", STATE, "head")
    direct.hset(STATE, "head", head[:32] + struct.pack(">2d", 2**53 - 1, 2**53 - 1) + head[48:])
    assert 3 == meter.sweep().expired
    assert "r/acme/old" not in str(ask(direct, "LRANGE", ENDED, 0, -1))


def test_a_state_restored_from_an_older_backup_than_the_ledger_books_nothing(
    meter: Meter, direct: redis.Redis, clock: Clock
) -> None:
    """Finance: an entry number is never given twice, even if the state was set back behind the ledger."""
    build(meter, clock)
    older = ask(direct, "DUMP", STATE)
    meter.settle(TENANT, "mine", USED)
    direct.restore(STATE, 0, older, replace=True)
    before = everything(direct)
    with pytest.raises(StoreCorrupt, match="in the ledger already"):
        meter.settle(TENANT, "other", USED)
    assert everything(direct) == before


# ── Memory ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def out_of_memory(direct: redis.Redis) -> Iterator[Callable[[], None]]:
    """Lets the server be out of memory from when it is called."""

    def fill() -> None:
        direct.config_set("maxmemory", 1000)

    yield fill
    direct.config_set("maxmemory", 0)


def test_out_of_memory_reserves_are_refused_and_nothing_is_written(
    out_of_memory: Callable[[], None], meter: Meter, direct: redis.Redis, clock: Clock
) -> None:
    """Operator: a full store takes no new calls, says why, and is left as it was."""
    build(meter, clock)
    before = everything(direct)
    out_of_memory()
    for name in ("new", "mine"):
        with pytest.raises(StoreRefused, match="memory"):
            hold(meter, name)
    assert everything(direct) == before


def test_out_of_memory_running_calls_are_still_booked(
    out_of_memory: Callable[[], None], meter: Meter, direct: redis.Redis, clock: Clock
) -> None:
    """Finance: usage is written even if the store takes no new calls: settle, cancel, record, revise all succeed."""
    others = [verb for verb in VERBS if verb.name != "reserve"]
    build(meter, clock)
    expected = [verb.answer(meter) for verb in others], contents(direct)
    direct.flushall()
    build(meter, clock)
    out_of_memory()
    assert ([verb.answer(meter) for verb in others], contents(direct)) == expected
    assert meter.find(TENANT, "mine").status == "settled"
    assert standing(meter)["open"] == (1, 1)
    check_books(meter)


def test_out_of_memory_a_gateway_that_has_just_started_books_as_well(
    out_of_memory: Callable[[], None], meter: Meter, direct: redis.Redis, clock: Clock
) -> None:
    """Finance: even with scripts that the server has never seen, a settle gets through."""
    build(meter, clock)
    direct.script_flush()
    out_of_memory()
    assert meter.settle(TENANT, "mine", USED).kind == "settled"


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-lru", "allkeys-random"])
def test_a_policy_that_evicts_keys_is_seen_by_the_doctor(
    policy: str, server: Server, direct: redis.Redis, tmp_path: Path
) -> None:
    """Operator: a server that may throw limits and ledger away is reported before it does."""
    if importlib.util.find_spec("meterlib.__main__") is None or importlib.util.find_spec("meterlib.cli.doctor") is None:
        pytest.skip("there is no meterlib doctor yet")
    settings = tmp_path / "meterlib.toml"
    settings.write_text(f'[store]\nurl = "{server.url}"\nshards = 1\n')
    direct.config_set("maxmemory-policy", policy)
    try:
        command = [sys.executable, "-m", "meterlib", "doctor", "--config", str(settings), "--json"]
        examined = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    finally:
        direct.config_set("maxmemory-policy", "noeviction")
    found = {finding["check"]: finding for finding in json.loads(examined.stdout)["findings"]}
    assert examined.returncode == 1
    assert found["eviction"]["status"] == "failure"
    assert policy in found["eviction"]["found"]
