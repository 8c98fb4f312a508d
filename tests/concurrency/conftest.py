"""Real servers, one of each kind a module, emptied for each test."""

from __future__ import annotations

import pytest

from tests.support.servers import Server


@pytest.fixture
def emptied(server: Server) -> Server:
    """A server that many processes use at the same time, without anything in it."""
    with server.client() as client:
        client.flushall()
    return server
