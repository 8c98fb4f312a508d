"""Leases: a whole number of ms, from 1 to a day."""

from __future__ import annotations

from typing import Any

import pytest

from tests.bad_input.support import HUGE, Face

HOURS_24_MS = 24 * 3_600_000
NO_LEASES: list[Any] = [
    -1,
    1.0,
    600_000.0,
    float("nan"),
    float("inf"),
    True,
    "600000",
    None,
    HOURS_24_MS + 1,
    2**53,
    pytest.param(HUGE, id="5000 digits"),
]


@pytest.mark.parametrize("lease_ms", [0, False, 0.0, *NO_LEASES])
def test_a_reservation_has_a_lease_of_up_to_a_day(face: Face, lease_ms: Any) -> None:
    """A hold that ends before it began, or hardly ever, is refused; the error says from where to where."""
    error = face.refusal("reserve", "acme", lease_ms=lease_ms)

    assert "lease_ms" == error.field
    assert "an integer from 1 to 86400000" in str(error)


@pytest.mark.parametrize(
    "lease_ms",
    [
        *(none for none in (0, False, 0.0)),
        None,
        *(lease_ms for lease_ms in NO_LEASES if lease_ms is not None),
    ],
)
def test_a_lease_is_renewed_by_up_to_a_day(face: Face, lease_ms: Any) -> None:
    """What a reservation may not begin with, it may not be prolonged to either."""
    assert "lease_ms" == face.refusal("renew", "acme", "call-1", lease_ms).field


@pytest.mark.parametrize("lease_ms", [1, HOURS_24_MS])
def test_a_lease_may_be_as_short_as_a_millisecond_and_as_long_as_a_day(face: Face, lease_ms: int) -> None:
    """Both ends of the range belong to it."""
    assert face.accepts("reserve", "acme", lease_ms=lease_ms)
    assert Face(face.kind).accepts("renew", "acme", "call-1", lease_ms)
