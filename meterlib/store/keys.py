"""Every key meterlib uses, and which shard a tenant belongs to.

All keys of a shard carry its number as their hash tag, so that one script call stays within one slot of a cluster. No
key expires by itself: the ledger must not, and what else a shard holds is dropped by its sweep when it has slid out.
"""

from __future__ import annotations

from zlib import crc32

LAYOUT_VERSION = 3


def shard_of(tenant: str, shards: int) -> int:
    """The shard that all state and entries of a tenant are in."""
    return crc32(tenant.encode()) % shards


def layout(shards: int) -> str:
    """What the store remembers of its layout; a caller with another one is refused."""
    return f"{LAYOUT_VERSION}/{shards}"


def layout_key(prefix: str) -> str:
    """The key that remembers the layout, for who comes first to say and the others to find."""
    return f"{prefix}:layout"


def sinks_key(prefix: str) -> str:
    """The key that remembers which sinks the ledgers are exported to: what one of them lacks must not be trimmed."""
    return f"{prefix}:sinks"


def shard_keys(prefix: str, shard: int) -> tuple[str, str, str, str, str]:
    """State, leases, ended reservations, ledger and the windows' ends of a shard, in the scripts' order."""
    tag = f"{prefix}:{{{shard}}}"
    return f"{tag}:state", f"{tag}:leases", f"{tag}:ended", f"{tag}:ledger", f"{tag}:windows"
