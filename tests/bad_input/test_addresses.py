"""Addresses of stores: what cannot be understood is refused without repeating the password in it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import structlog

from meterlib import AsyncMeter, InvalidInput, Meter, MeterError, Policy, StoreOptions, StoreUnavailable

POLICY = Policy()
HASTY = StoreOptions(timeout_ms=50, deadline_ms=50)


def _sync(url: Any) -> str:
    meter = Meter.connect(url, POLICY, options=HASTY, sweep_interval_ms=0)
    try:
        return f"{meter!r} {meter._driver!r}"
    finally:
        meter.close()


def _async(url: Any) -> str:
    async def connect() -> str:
        meter = AsyncMeter.connect(url, POLICY, options=HASTY, sweep_interval_ms=0)
        try:
            return f"{meter!r} {meter._driver!r}"
        finally:
            await meter.aclose()

    return asyncio.run(connect())


Connect = Callable[[Any], str]


@pytest.fixture(params=[_sync, _async], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Connect:
    """Connects a meter, tells how it and its driver read in a log, and closes it."""
    chosen: Connect = request.param
    return chosen


@pytest.mark.parametrize(
    "url", ["", "redis", "redis:/h", "http://h", "postgres://u:hunter2@h", "REDIS", "127.0.0.1:6379", "//h", "redis//h"]
)
def test_a_scheme_is_one_of_those_known(connect: Connect, url: str) -> None:
    """An address of another kind is refused, with all schemes that there are."""
    with pytest.raises(InvalidInput) as refused:
        connect(url)

    assert "url" == refused.value.field
    assert "redis://" in str(refused.value)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://u:hunter2@h:port/0",
        "redis://u:hunter2@h:-1/0",
        "redis://u:hunter2@h:65536/0",
        "redis://u:hunter2@h:6379x",
        "rediss://u:hunter2@h:port/0",
        "redis+cluster://u:hunter2@h:port/0",
        "redis+sentinel://u:hunter2@h:port/service",
        "redis://h/0?password=hunter2&db=x",
        "redis+cluster://u:hunter2@h:6379/3",
        "redis+cluster://u:hunter2@h:6379/x",
        "redis+sentinel://u:hunter2@h:26379",
        "redis+sentinel://u:hunter2@h:26379/service/x",
        "embedded://u:hunter2@data",
        "embedded:///data?password=hunter2",
        "redis://u:hunter2@[::1",
        "redis://u:hunter2@h/abc",
        "redis://u:hunter2@h/-1",
        "redis://u:hunter2@h/0?nonsense=1",
        "redis://u:hunter2@h:0",
        "redis+cluster://u:hunter2@h/0?nonsense=1",
        "redis+cluster://u:hunter2@h/?socket_timeout=x",
        "redis+sentinel://u:hunter2@h/service?socket_timeout=1",
        "memory://hunter2",
        "unix://",
    ],
)
def test_an_address_that_makes_no_sense_is_refused_without_its_password(connect: Connect, url: str) -> None:
    """A wrong port, a database of a cluster, a missing name: the error can be logged as it is."""
    with pytest.raises(InvalidInput) as refused:
        connect(url)

    assert "url" == refused.value.field
    assert "hunter2" not in str(refused.value)
    assert "hunter2" not in repr(refused.value)


@pytest.mark.parametrize(
    ("scheme", "separator"),
    [
        *(pytest.param(s, c) for s in ("redis", "rediss") for c in "/?#"),
        *(pytest.param("redis+cluster", c) for c in "?#"),
        pytest.param("redis+sentinel", "/"),
        ("redis+cluster", "/"),
        ("redis+sentinel", "?"),
        ("redis+sentinel", "#"),
    ],
)
def test_a_password_with_a_separator_in_it_is_not_repeated_in_parts(
    connect: Connect, scheme: str, separator: str
) -> None:
    """A password that had to be written with %2F is refused, but no half of it gets into a log."""
    with pytest.raises(MeterError) as refused:
        connect(f"{scheme}://:hunter2{separator}swordfish@h:6379/0")

    assert "hunter2" not in str(refused.value)
    assert "swordfish" not in str(refused.value)


@pytest.mark.parametrize("url", [None, 5, b"redis://h", ["redis://h"], {"host": "h"}])
def test_a_store_is_an_address_or_a_client(connect: Connect, url: Any) -> None:
    """Something that is neither is told from both."""
    with pytest.raises(InvalidInput, match="a redis-py client or a URL is needed") as refused:
        connect(url)

    assert "client" == refused.value.field


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:hunter2@127.0.0.1:1/0",
        "rediss://user:hunter2@127.0.0.1:1/0",
        "redis://127.0.0.1:1/0?password=hunter2",
        "redis+sentinel://user:hunter2@127.0.0.1:1/service",
        "unix://user:hunter2@/nowhere",
    ],
)
def test_a_password_is_in_nothing_that_is_printed(connect: Connect, url: str) -> None:
    """Meters and drivers may be logged, and connecting asks nobody."""
    assert "hunter2" not in connect(url)


def test_connecting_to_a_cluster_asks_nobody_yet() -> None:
    """A gateway can start while its cluster cannot be reached, as with any other store."""
    assert "hunter2" not in _sync("redis+cluster://user:hunter2@127.0.0.1:1")


@pytest.mark.parametrize("url", ["redis://user:hunter2@127.0.0.1:1/0", "redis://127.0.0.1:1/0?password=hunter2"])
def test_a_password_is_in_no_error_and_no_log(url: str) -> None:
    """A store that cannot be reached is reported by what was tried, not with what."""
    with structlog.testing.capture_logs() as logs, Meter.connect(url, POLICY, options=HASTY) as meter:
        with pytest.raises(StoreUnavailable) as failed:
            meter.reserve("acme")
        assert "hunter2" not in f"{failed.value} {failed.value!r} {failed.value.__cause__!r} {vars(failed.value)}"

    assert "hunter2" not in str(logs)
