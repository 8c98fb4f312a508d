"""What the doctor asks the server itself: its version, how durable it is, its memory and its clock.

Managed servers forbid some of these questions; then what they would have told is reported as not visible.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from redis.exceptions import ResponseError

from meterlib.cli.doctor_findings import Finding, failure, ok, warning
from meterlib.store.keys import shard_keys

VERSION_MIN = (7, 0)
MEMORY_SHARE_MAX = 0.8
CLOCK_DIFFERENCE_MS_MAX = 1000
OVERDUE_GRACE_MS = 60_000

Facts = Mapping[str, Any]


class Clock(NamedTuple):
    """The server's time, and how far ours is ahead of it, at most as wrong as the question took to be answered."""

    server_ms: int
    ahead_ms: int
    took_ms: int


class Node:
    """One server that keeps keys of ours: the only one, or one primary of a cluster."""

    def __init__(self, name: str, client: Any, target: Any = None) -> None:
        self.name = name
        self._client = client
        self._target = {} if target is None else {"target_nodes": target}

    def facts(self) -> Facts | None:
        """What INFO tells; None if it may not be asked."""
        try:
            facts: Facts = self._client.info("everything", **self._target)
        except ResponseError:
            return None
        return facts

    def setting(self, name: str) -> str | None:
        """A line of the server's configuration; None if it may not be asked."""
        try:
            found = self._client.config_get(name, **self._target).get(name)
        except (ResponseError, AttributeError):
            return None
        return found.decode() if isinstance(found, bytes) else found

    def clock(self) -> Clock:
        """What time it is there."""
        asked_ns = time.time_ns()
        seconds, microseconds = self._client.time(**self._target)
        answered_ns = time.time_ns()
        server_ms = int(seconds) * 1000 + int(microseconds) // 1000
        ours_ms = (asked_ns + answered_ns) // 2_000_000
        return Clock(server_ms, ours_ms - server_ms, (answered_ns - asked_ns) // 1_000_000)


def nodes_of(client: Any) -> list[Node]:
    """All servers behind a client."""
    if hasattr(client, "get_primaries"):
        return [Node(f"{node.host}:{node.port}", client, node) for node in client.get_primaries()]
    return [Node("", client)]


def overdue(client: Any, prefix: str, shard: int, now_ms: int) -> int:
    """How many reservations of a shard should have been expired a minute ago or longer."""
    leases_key = shard_keys(prefix, shard)[1]
    return int(client.execute_command("ZCOUNT", leases_key, "-inf", now_ms - OVERDUE_GRACE_MS))


def examine(node: Node, *, cluster: bool) -> Iterator[Finding]:
    """Everything about one server."""
    facts = node.facts()
    yield from _version(facts, cluster)
    yield _eviction(node, facts)
    yield _memory(node, facts)
    yield from _durability(node, facts)
    yield _clock(node)


def _version(facts: Facts | None, cluster: bool) -> Iterator[Finding]:
    if facts is None:
        advice = f"make sure that it is Redis {VERSION_MIN[0]}.{VERSION_MIN[1]} or Valkey, or newer"
        yield warning("server", "not visible: INFO is forbidden", advice)
        return
    kind = "Valkey" if "valkey_version" in facts else "Dragonfly" if "dragonfly_version" in facts else "Redis"
    version = str(facts.get(f"{kind.lower()}_version", "?"))
    numbers = tuple(int(part) for part in str(facts.get("redis_version", "0")).split(".")[:2] if part.isdigit())
    if kind == "Redis" and numbers < VERSION_MIN:
        yield failure(
            "server", f"{kind} {version}", "Redis 7.0 or newer, or Valkey, is needed: older ones know no #!lua"
        )
    elif kind == "Dragonfly":
        yield warning("server", f"{kind} {version}", "meterlib is not tested on it; use Redis or Valkey")
    else:
        yield ok("server", f"{kind} {version}")
    if facts.get("role", "master") != "master":
        yield failure(
            "role", "this is a replica: nothing can be written to it", "connect to its primary, or by sentinel"
        )
    if facts.get("cluster_enabled") and not cluster:
        yield failure("role", "this is a node of a cluster", "write redis+cluster:// in [store] url")


def _eviction(node: Node, facts: Facts | None) -> Finding:
    policy = (facts or {}).get("maxmemory_policy") or node.setting("maxmemory-policy")
    if policy is None:
        return warning("eviction", "not visible", "make sure that maxmemory-policy is noeviction")
    if policy != "noeviction":
        found = f"maxmemory-policy is {policy}: when memory is short, the server deletes limits and ledger entries"
        return failure("eviction", found, "set maxmemory-policy noeviction")
    return ok("eviction", "maxmemory-policy is noeviction")


def _memory(node: Node, facts: Facts | None) -> Finding:
    facts = facts or {}
    used, limit = facts.get("used_memory"), facts.get("maxmemory", node.setting("maxmemory"))
    if used is None or limit is None:
        return warning("memory", "not visible", "make sure that the ledger has room to grow")
    used, limit = int(used), int(limit)
    if not limit:
        return ok("memory", f"{used / 2**20:,.1f} MiB used, maxmemory is not set")
    found = f"{used / 2**20:,.1f} of {limit / 2**20:,.1f} MiB used ({used / limit:.0%})"
    if used > limit * MEMORY_SHARE_MAX:
        advice = "raise maxmemory: when it is reached, calls are denied; settlements are still booked"
        return warning("memory", found, advice)
    return ok("memory", found)


def _durability(node: Node, facts: Facts | None) -> Iterator[Finding]:
    enabled = (facts or {}).get("aof_enabled")
    if enabled is None:
        told = node.setting("appendonly")
        enabled = None if told is None else told == "yes"
    advice = "set appendonly yes and appendfsync everysec (or always)"
    if enabled is None:
        yield warning("durability", "not visible", f"{advice}, unless replicas or the provider promise as much")
        return
    if not enabled:
        found = "no append-only file: a restart loses all entries and limits since the last snapshot, if there is one"
        yield warning("durability", found, advice)
        return
    yield _fsync(node.setting("appendfsync"))
    if str((facts or {}).get("aof_last_write_status", "ok")) != "ok":
        yield failure(
            "disk", "the last write to the append-only file failed", "see the server's log; is the disk full?"
        )


def _fsync(policy: str | None) -> Finding:
    begin = "append-only file, "
    if policy == "always":
        return ok("durability", f"{begin}synced before each answer: nothing that was answered is lost")
    if policy == "everysec":
        return ok("durability", f"{begin}synced each second: a crash of the machine can lose the last second or two")
    if policy == "no":
        found = f"{begin}never synced: a crash of the machine can lose half a minute or more"
        return warning("durability", found, "set appendfsync everysec (or always)")
    return warning("durability", f"{begin}fsync policy not visible", "make sure that appendfsync is everysec or always")


def _clock(node: Node) -> Finding:
    try:
        clock = node.clock()
    except ResponseError as error:
        return failure("clock", f"TIME is refused: {error}", "allow it: every script asks for the time")
    side = "ahead of" if clock.ahead_ms > 0 else "behind"
    found = f"ours is {abs(clock.ahead_ms):,} ms {side} the server's (answered in {clock.took_ms} ms)"
    if abs(clock.ahead_ms) > CLOCK_DIFFERENCE_MS_MAX + clock.took_ms:
        return warning(
            "clock", found, "synchronise both (NTP); limits go by the server's, so they are right all the same"
        )
    return ok("clock", found)
