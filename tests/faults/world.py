"""A small world of reservations in every state, the verbs that act on it, and ways to look at all of a store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import redis

from meterlib import Limit, Meter, Policy, Reservation, StoreOptions, Usage
from meterlib.store.keys import layout_key, shard_keys
from meterlib.testing import Clock

START_MS = 1_790_000_000_000
RETENTION_MS = 600_000
ACT_MS = START_MS + RETENTION_MS + 1
HOUR_MS = 3_600_000
TENANT = "acme"
ATTRIBUTES = {"provider": "anthropic"}
ESTIMATE = Usage(input_tokens=100, output_tokens=50)
USED = Usage(input_tokens=130, output_tokens=20)
OTHER_USED = Usage(input_tokens=7, output_tokens=1)

# All that is overdue is swept in passing by one call, so that a call made twice leaves the same as one made once.
OPTIONS = StoreOptions(shards=1, retention_ms=RETENTION_MS, sweep_max=10)
IMPATIENT = StoreOptions(shards=1, retention_ms=RETENTION_MS, sweep_max=10, timeout_ms=150)
POLICY = Policy(
    limits=(
        Limit(name="requests", quota=10_000, window="1h"),
        Limit(name="minute", unit="input_tokens", quota=1_000_000, window="1m", per=("provider",)),
        Limit(name="hour", unit="input_tokens", quota=1_000_000, window="1h"),
        Limit(name="kept", unit="output_tokens", quota=100_000, period="day"),
        Limit(name="freed", unit="total_tokens", quota=100_000, period="month", on_expiry="free"),
        Limit(name="open", quota=20, open=True),
    )
)
STATE, LEASES, ENDED, LEDGER, WINDOWS = shard_keys(OPTIONS.prefix, 0)
KEYS = (STATE, LEASES, ENDED, LEDGER, WINDOWS, layout_key(OPTIONS.prefix))


def build(meter: Meter, clock: Clock) -> None:
    """Make the world, and let it be `ACT_MS`.

    `mine`, `spare` and `other` are open, `stale-1` to `stale-3` are overdue but not swept, `dropped` was cancelled, and
    `old` was settled so long ago that it may be forgotten.
    """
    clock.set(START_MS)
    hold(meter, "old").settle(USED)
    for number in (1, 2, 3):
        hold(meter, f"stale-{number}", lease_ms=1000)
    hold(meter, "mine")
    hold(meter, "spare")
    hold(meter, "other")
    clock.set(START_MS + 500)
    hold(meter, "dropped").cancel()
    clock.set(ACT_MS)


def hold(meter: Meter, reservation_id: str, lease_ms: int = HOUR_MS) -> Reservation:
    """The reservation of this id, as everybody here makes it."""
    return meter.reserve(TENANT, ATTRIBUTES, ESTIMATE, reservation_id=reservation_id, lease_ms=lease_ms)


class Verb(NamedTuple):
    """Something to do in the world; it may be repeated, since it names its ids."""

    name: str
    act: Callable[[Meter], object]

    def answer(self, meter: Meter) -> object:
        """Act, and return what the caller was told, in a form that can be compared."""
        told = self.act(meter)
        if isinstance(told, Reservation):
            return told.id, told.reserved_at_ms, told.expires_at_ms, told.limits
        return told


VERBS = (
    Verb("reserve", lambda meter: hold(meter, "new")),
    Verb("revise", lambda meter: meter.revise(TENANT, "mine", USED, revision=1)),
    Verb("renew", lambda meter: meter.renew(TENANT, "mine", 2 * HOUR_MS, revision=1)),
    Verb("settle", lambda meter: meter.settle(TENANT, "mine", USED)),
    Verb("settle an expired one", lambda meter: meter.settle(TENANT, "stale-3", USED)),
    Verb("settle a cancelled one", lambda meter: meter.settle(TENANT, "dropped", USED)),
    Verb("settle an unknown one", lambda meter: meter.settle(TENANT, "unknown", USED, attributes=ATTRIBUTES)),
    Verb("cancel", lambda meter: meter.cancel(TENANT, "spare")),
    Verb("cancel an unknown one", lambda meter: meter.cancel(TENANT, "never-seen")),
    Verb("record", lambda meter: meter.record(TENANT, ATTRIBUTES, USED, record_id="recorded")),
    Verb(
        "adjust",
        lambda meter: meter.adjust(
            next(meter.ledger(0)), {"input_tokens": -3}, "a mistake of ours", adjust_id="adjusted"
        ),
    ),
    Verb("sweep", lambda meter: meter.sweep().overdue),
)


def ask(client: redis.Redis, *words: str | int | bytes) -> Any:
    """A command's bare answer."""
    execute: Callable[..., Any] = client.execute_command
    return execute(*words, NEVER_DECODE=True)


def restore(client: redis.Redis, saved: dict[bytes, bytes]) -> None:
    """Make the server hold exactly what `raw` found."""
    with client.pipeline(transaction=False) as pipeline:
        pipeline.flushall()
        for key, value in saved.items():
            pipeline.restore(key, 0, value)
        pipeline.execute()


def raw(client: redis.Redis) -> dict[bytes, bytes]:
    """Every key of the server and its bytes, for `restore`."""
    return {key: ask(client, "DUMP", key) for key in sorted(ask(client, "KEYS", "*"))}


def everything(client: redis.Redis) -> dict[bytes, object]:
    """Every key of the server and what it holds; unlike `raw`, the same whatever order a table is in."""
    readers: dict[bytes, tuple[str, tuple[str | int, ...]]] = {
        b"string": ("GET", ()),
        b"hash": ("HGETALL", ()),
        b"set": ("SMEMBERS", ()),
        b"list": ("LRANGE", (0, -1)),
        b"zset": ("ZRANGE", (0, -1, "WITHSCORES")),
        b"stream": ("XRANGE", ("-", "+")),
    }
    found: dict[bytes, object] = {}
    for key in ask(client, "KEYS", "*"):
        kind = ask(client, "TYPE", key)
        command, words = readers[kind]
        found[key] = kind, ask(client, command, key, *words)
    return found


def contents(client: redis.Redis) -> dict[str, object]:
    """What a store of one shard holds, as far as it can matter to anybody.

    The list of ended reservations may name one twice after a failure, which only means that it is looked at twice.
    """
    state = ask(client, "HGETALL", STATE)
    assert b"pending" not in state
    assert set(ask(client, "KEYS", "*")) <= {key.encode() for key in KEYS}
    ends = ask(client, "ZRANGE", WINDOWS, 0, -1)
    assert {field for field in state if field.startswith(b"w/")} <= set(ends)
    return {
        "state": state,
        "ends": ends,
        "open": ask(client, "ZRANGE", LEASES, 0, -1, "WITHSCORES"),
        "ended": set(ask(client, "LRANGE", ENDED, 0, -1)),
        "ledger": ask(client, "XRANGE", LEDGER, "-", "+"),
    }


def standing(meter: Meter, tenant: str = TENANT) -> dict[str, tuple[int, int]]:
    """What is used, and held of that, of every limit."""
    return {limit.name: (limit.used, limit.held) for limit in meter.peek(tenant, ATTRIBUTES)}


def check_books(meter: Meter) -> list[tuple[str, str]]:
    """Numbers have no gap, the head agrees, and nobody ended twice; returns (id, kind) of every entry, in order."""
    entries = list(meter.ledger(0))
    head = meter.head(0)
    assert [entry.n for entry in entries] == list(range(1, len(entries) + 1))
    assert head.last_number == head.ledger_last == head.ledger_length == len(entries)
    assert [entry.booked_at for entry in entries] == sorted(entry.booked_at for entry in entries)
    ends = Counter(e.reservation_id for e in entries if e.kind in ("settled", "cancelled", "expired"))
    assert {ended: times for ended, times in ends.items() if times != 1} == {}
    usages = Counter(e.reservation_id for e in entries if e.kind in ("settled", "late", "recorded"))
    assert {used: times for used, times in usages.items() if times != 1} == {}
    return [(entry.reservation_id, str(entry.kind)) for entry in entries]
