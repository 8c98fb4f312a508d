"""Errors carry fields, cross process boundaries, and tell no secrets."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from redis import Redis

from meterlib import (
    AsyncMeter,
    Denial,
    EmbeddedError,
    IntegrityError,
    InvalidInput,
    Limit,
    Meter,
    MeterError,
    Policy,
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
from meterlib.testing import Clock, MemoryMeter

DENIAL = Denial(
    name="requests",
    unit="requests",
    quota=50,
    used=50,
    requested=1,
    reason="quota",
    retry_after_ms=1200,
    hint=False,
    period=False,
)
ERRORS: list[MeterError] = [
    MeterError("plain"),
    QuotaExceeded("acme", (DENIAL, DENIAL), 1200, True, False),
    QuotaExceeded("acme", (DENIAL,), None, False, False),
    ReservationConflict("the id is taken", "call-1", "stored", "given"),
    ReservationConflict("the id is taken", "call-1"),
    ReservationEnded("call-1", "settled"),
    ReservationNotFound("call-1"),
    InvalidInput("usage.input_tokens", "must be 0 or more"),
    UsageError("this meter is closed"),
    PolicyError("limit[0].window", "is not within 1ms and 31d"),
    PolicyError("", "no path"),
    StoreError("failed"),
    StoreUnavailable("reserve", "TimeoutError"),
    StoreOverloaded("reserve", 20_000),
    StoreRefused("reserve", "out of memory"),
    StoreCorrupt("another layout"),
    IntegrityError("gap", "entries 3:17-19 are missing", ("3:17-19",)),
    EmbeddedError("no server"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_crosses_process_boundaries_with_its_fields(error: MeterError, protocol: int) -> None:
    """A worker's error is as good in its parent as it was in the worker."""
    error.add_note("seen in worker 3")
    for twin in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):
        assert type(error) is type(twin)
        assert str(error) == str(twin)
        assert repr(error) == repr(twin)
        assert vars(error) == vars(twin)


def test_every_error_is_a_meter_error() -> None:
    """One `except MeterError` catches all that meterlib raises on purpose."""
    import meterlib

    exported = [getattr(meterlib, name) for name in meterlib.__all__]
    raised = {kind for kind in exported if isinstance(kind, type) and issubclass(kind, BaseException)}

    assert raised == {type(error) for error in ERRORS}
    assert all(issubclass(kind, MeterError) for kind in raised)


@pytest.mark.parametrize("kind", [InvalidInput, PolicyError])
def test_bad_values_are_value_errors_too(kind: type[MeterError]) -> None:
    """Code that knows nothing of meterlib still sees what kind of mistake it was."""
    assert issubclass(kind, ValueError)


def test_a_denial_needs_no_parsing() -> None:
    """All a caller has to tell its own caller stands in fields."""
    meter = MemoryMeter(Policy(limits=(Limit(name="requests", quota=1, window="1m"),)), clock=Clock())
    meter.reserve("acme")
    with pytest.raises(QuotaExceeded) as denied:
        meter.reserve("acme")

    error = denied.value
    assert ("acme", 60_000, True, False) == (error.tenant, error.retry_after_ms, error.retryable, error.hint)
    assert [("requests", "requests", 1, 1, 1)] == [
        (denial.name, denial.unit, denial.quota, denial.used, denial.requested) for denial in error.denials
    ]


@pytest.mark.parametrize("meter", [Meter, AsyncMeter])
def test_a_meter_is_printed_without_its_password(meter: Any) -> None:
    """What stands in a traceback or a log tells which store, and never how to get into it."""
    made = meter.connect("redis://user:hunter2@127.0.0.1:1/0", Policy(), sweep_interval_ms=0)

    assert "hunter2" not in f"{made!r} {made} {made._driver!r} {made._context!r}"


def test_a_reservation_is_printed_by_its_id() -> None:
    """A reservation reads as what it is, without the facts of the call."""
    held = MemoryMeter(Policy()).reserve("acme", {"session": "private"}, reservation_id="call-1")

    assert "<Reservation call-1 of 'acme'>" == repr(held)


def test_a_ready_made_client_keeps_its_password_to_itself() -> None:
    """Nor does a meter print the client it was given."""
    with Redis(host="127.0.0.1", port=1, password="hunter2") as client:
        assert "hunter2" not in repr(Meter(client, Policy(), sweep_interval_ms=0))
