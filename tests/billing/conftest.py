"""What tests of billing share: one PostgreSQL a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.postgres import PostgresServer, available


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL of this session's own, where the machine has the programs; each test has a schema of its own."""
    if reason := available():
        pytest.skip(reason)
    with PostgresServer() as running:
        yield running
