"""Real servers, one of each kind a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.servers import Server, available, start_server


@pytest.fixture(scope="module", params=["valkey", "redis"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that many processes use at the same time."""
    kind = str(request.param)
    reason = available(kind)
    if reason:
        pytest.skip(reason)
    with start_server(tmp_path_factory.mktemp(kind), kind) as running:
        yield running


@pytest.fixture
def emptied(shared: Server) -> Server:
    """That server without anything in it."""
    with shared.client() as client:
        client.flushall()
    return shared
