"""What all tests share: deterministic Hypothesis, and one real server a session."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import pytest
import structlog
from hypothesis import HealthCheck, settings

from tests.support.servers import Server, available, start_server

settings.register_profile(
    "default", derandomize=True, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a failed test has left open is told as its own, and not as the fault of whoever happens to collect it."""
    report = yield
    if report.failed:
        gc.collect()
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A soak may take as long as it is told to, and what comes before and behind it."""
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.timeout(300 + 20 * soak_seconds()))


@pytest.fixture(autouse=True)
def logs_set_up_by_nobody() -> Iterator[None]:
    """A test that captures logs leaves structlog set up; the next one finds it as a new process does."""
    yield
    structlog.reset_defaults()


@contextmanager
def server_of(kind: str, folders: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of this kind; without one, whoever needs it is skipped, and says why."""
    reason = available(kind)
    if reason:
        pytest.skip(reason)
    with start_server(folders.mktemp(kind), kind) as server:
        yield server


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Valkey of this session's own; tests flush it before they use it."""
    with server_of("valkey", tmp_path_factory) as server:
        yield server


@pytest.fixture(scope="session")
def redis7(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The machine's Redis, where it has one."""
    with server_of("redis", tmp_path_factory) as server:
        yield server


@pytest.fixture(scope="module", params=["valkey", "redis"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of each kind, a module's own."""
    with server_of(str(request.param), tmp_path_factory) as running:
        yield running


def soak_seconds() -> float:
    """How long a soak may run."""
    return float(os.environ.get("METERLIB_SOAK_SECONDS", "10"))
