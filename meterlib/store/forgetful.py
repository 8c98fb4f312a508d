"""Whether a server's settings let it lose limits and ledger; told in the log, since few ask the doctor first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meterlib.store.telling import log


def tell(told: object) -> None:
    """Log what an answer to INFO gives reason to; one of a cluster has an answer for each node."""
    if not isinstance(told, Mapping):
        return
    nodes = [node for node in told.values() if isinstance(node, Mapping) and "redis_version" in node]
    for facts in nodes or [told]:
        _tell(facts)


def _tell(facts: Mapping[str, Any]) -> None:
    policy, durable = facts.get("maxmemory_policy", "noeviction"), facts.get("aof_enabled", 1)
    if policy != "noeviction":
        log.warning(
            "store.may_evict",
            policy=policy,
            meaning="when memory is short, the server deletes limits and ledger entries",
            advice="set maxmemory-policy noeviction",
        )
    if not durable:
        log.warning(
            "store.not_durable",
            meaning="the server has no append-only file: a restart loses what came after its last snapshot, if any",
            advice="set appendonly yes and appendfsync everysec (or always)",
        )
