"""Rate limits, token budgets and an exact billing ledger for LLM gateways, decided atomically in Redis or Valkey."""

from typing import TYPE_CHECKING, Any

from meterlib.core.decisions import Denial, LimitState
from meterlib.core.ledger import LedgerEntry
from meterlib.core.policy import Limit, Policy, Tenant
from meterlib.core.usage import CacheCreation, Iteration, OutputTokensDetails, ServerToolUse, Usage
from meterlib.errors import (
    EmbeddedError,
    IntegrityError,
    InvalidInput,
    MeterError,
    PolicyError,
    QuotaExceeded,
    ReservationConflict,
    ReservationEnded,
    ReservationNotFound,
    StoreCorrupt,
    StoreError,
    StoreOverloaded,
    StoreRefused,
    StoreUnavailable,
    UsageError,
)
from meterlib.meter import AsyncMeter, AsyncReservation, Meter, Reservation
from meterlib.store.options import StoreOptions

if TYPE_CHECKING:
    from meterlib import testing as testing

__version__ = "0.1.0"

__all__ = [
    "AsyncMeter",
    "AsyncReservation",
    "CacheCreation",
    "Denial",
    "EmbeddedError",
    "IntegrityError",
    "InvalidInput",
    "Iteration",
    "LedgerEntry",
    "Limit",
    "LimitState",
    "Meter",
    "MeterError",
    "OutputTokensDetails",
    "Policy",
    "PolicyError",
    "QuotaExceeded",
    "Reservation",
    "ReservationConflict",
    "ReservationEnded",
    "ReservationNotFound",
    "ServerToolUse",
    "StoreCorrupt",
    "StoreError",
    "StoreOptions",
    "StoreOverloaded",
    "StoreRefused",
    "StoreUnavailable",
    "Tenant",
    "Usage",
    "UsageError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """`meterlib.testing`, which is loaded by whoever uses it."""
    if name != "testing":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return import_module("meterlib.testing")
