"""What all tests share: deterministic Hypothesis, and one real server a session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.support.servers import Server, available, start_server

settings.register_profile(
    "default", derandomize=True, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Valkey of this session's own; tests flush it before they use it."""
    reason = available("valkey")
    if reason:
        pytest.skip(reason)
    with start_server(tmp_path_factory.mktemp("valkey"), "valkey") as server:
        yield server


@pytest.fixture(scope="session")
def redis7(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The machine's Redis, where it has one."""
    reason = available("redis")
    if reason:
        pytest.skip(reason)
    with start_server(tmp_path_factory.mktemp("redis"), "redis") as server:
        yield server


def soak_seconds() -> float:
    """How long a soak may run."""
    return float(os.environ.get("METERLIB_SOAK_SECONDS", "10"))
