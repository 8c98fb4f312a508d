"""What a failure of the store means: try again within the deadline, or which error the caller gets."""

from __future__ import annotations

import random
import re
import time
from copy import copy
from socket import gaierror

from redis import exceptions
from redis.sentinel import MasterNotFoundError

from meterlib.core.frames import without_frames
from meterlib.errors import MeterError, StoreCorrupt, StoreError, StoreRefused, StoreUnavailable

_PASSING = ("TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "LOADING", "BUSY ", "READONLY", "UNBLOCKED")
_REFUSALS = {
    "OOM": "it is out of memory (maxmemory reached)",
    "MISCONF": "it cannot persist to disk",
    "NOREPLICAS": "too few replicas are in reach (min-replicas-to-write)",
    "NOPERM": "its user lacks a permission",
    "NOAUTH": "it wants a password",
    "WRONGPASS": "the password is wrong",
}
SERVERS = "Redis 7.0 or newer, or Valkey,"
_CLUSTER = "it is a node of a cluster: write redis+cluster:// in place of redis://, or give a RedisCluster client"
_GONE = (AttributeError, TypeError, RuntimeError)
"""What redis-py stumbles over on a connection that is gone: its own one that it has hung up, the streams of Python 3.12
and 3.13, and those of uvloop."""

FAILURES = (exceptions.RedisError, exceptions.RedisClusterException, OSError, *_GONE)
"""Why a command may have no answer."""

FIRST_WAIT_S = 0.005
LONGEST_WAIT_S = 0.25


class Attempts:
    """The tries of one call within one deadline.

    Each try carries the same operations, which are idempotent under their ids, so repeating one that was executed is
    harmless.
    """

    def __init__(self, operation: str, deadline_ms: float, began_s: float | None = None) -> None:
        self._operation = operation
        self._ends_at_s = (time.monotonic() if began_s is None else began_s) + deadline_ms / 1000
        self._wait_s = FIRST_WAIT_S

    def pause_s(self, error: Exception) -> float:
        """How long to wait before the next try; raises what the caller gets if there is to be none."""
        without_frames(error)
        final = verdict(self._operation, error)
        if final is not None:
            raise final from error
        wait_s = self._wait_s * (0.5 + random.random() / 2)
        if time.monotonic() + wait_s >= self._ends_at_s:
            raise StoreUnavailable(self._operation, in_short(error)) from error
        self._wait_s = min(LONGEST_WAIT_S, self._wait_s * 2)
        return wait_s

    def over(self, cause: str) -> StoreUnavailable:
        """What the caller gets where there is to be no other try, whatever the time."""
        return StoreUnavailable(self._operation, cause)

    def left_s(self) -> float:
        """How much of the deadline is left."""
        return max(0.0, self._ends_at_s - time.monotonic())


def verdict(operation: str, error: Exception) -> MeterError | None:
    """The error a failure amounts to; None if it passes and the call is worth repeating."""
    text = str(error)
    if isinstance(error, StoreError):
        return error
    if isinstance(error, (exceptions.AuthenticationError, exceptions.NoPermissionError)):
        return StoreRefused(operation, f"it refused our credentials or lacks a permission ({in_short(error)})")
    if isinstance(error, exceptions.ReadOnlyError | exceptions.TryAgainError | exceptions.ClusterError):
        return None
    if isinstance(error, exceptions.AskError):  # or MovedError, which is one
        return StoreRefused(operation, _CLUSTER)
    if isinstance(error, exceptions.OutOfMemoryError):
        return StoreRefused(operation, _REFUSALS["OOM"])
    if isinstance(error, exceptions.ResponseError):
        for word, meaning in _REFUSALS.items():
            if text.startswith(word) or f" {word} " in text[:200]:
                return StoreRefused(operation, meaning)
        if any(text.startswith(word) for word in _PASSING):
            return None
        return corrupt(operation, text)
    return None  # connection lost, time-out, failover under way: the outcome is unknown


def told_for(operation: str, error: MeterError) -> MeterError:
    """The error of an operation that failed together with others."""
    return StoreUnavailable(operation, error.cause) if type(error) is StoreUnavailable else copy(error)


def out_of_reach(error: BaseException) -> str:
    """Why nobody can be there to answer, in words; empty if somebody may be, who is slow or says no."""
    if isinstance(error, MasterNotFoundError):
        return "no sentinel there knows its master"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionRefusedError | FileNotFoundError | gaierror):
            return cause.strerror or type(cause).__name__
        cause = cause.__cause__ or cause.__context__
    return ""


def corrupt(operation: str, text: str) -> MeterError:
    """The error for a reply that says the store's data are not what meterlib wrote."""
    if "METERLIB_LAYOUT" in text:
        return StoreCorrupt(f"{operation}: {text.partition('METERLIB_LAYOUT ')[2]} {_layout_advice(text)}")
    if "METERLIB_LEDGER" in text:
        return StoreCorrupt(
            f"{operation}: {text.partition('METERLIB_LEDGER ')[2]}, so the state was lost or replaced while the ledger"
            " was kept; nothing was written. Restore both from one backup, or use another prefix"
        )
    if "WRONGTYPE" in text:
        return StoreCorrupt(
            f"{operation}: a key of this prefix is of a foreign type; nothing was written ({text[:200]})"
        )
    if "compiling script" in text:  # older servers take `#!lua` for an error
        return StoreRefused(operation, f"it is too old: {SERVERS} is needed ({text[:100]})")
    if "script" in text:
        return StoreCorrupt(f"{operation}: the script failed on what it found in the store ({text[:200]})")
    return StoreRefused(operation, text[:300])


def _layout_advice(text: str) -> str:
    """What to do about two layouts that differ: a version and the number of shards, both chosen once."""
    versions = re.findall(r"(\d+)/\d+", text)
    if len(set(versions)) == 1:
        return "(its version and the number of shards): set [store] shards to the store's, or use another prefix"
    return (
        "(its version and the number of shards): another version of meterlib wrote it, and this one cannot go on with"
        " it; use that version, or another prefix or folder. Nothing was changed"
    )


def in_short(error: Exception) -> str:
    """A failure in the client's words."""
    return f"{type(error).__name__}: {error}"[:200]
