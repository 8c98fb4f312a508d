"""Every case is tried on both faces of the meter."""

from __future__ import annotations

import pytest

from tests.bad_input.support import Face


@pytest.fixture(params=["sync", "async"])
def face(request: pytest.FixtureRequest) -> Face:
    """A Meter or an AsyncMeter on a wire that keeps what would be sent."""
    return Face(request.param)
