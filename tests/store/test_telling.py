"""The library's words never get among an embedding program's results, and go where its own go if it has said where."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import structlog

import meterlib
from meterlib import AsyncMeter, Meter, Policy, StoreUnavailable, Usage
from meterlib.store import forgetful
from meterlib.store.telling import Log


def leave_one_open() -> None:
    with Meter.connect("memory://", Policy()) as meter, meter.reservation("acme") as held:
        held.dispatched()


def test_nothing_is_written_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    """A program that sets up no logs finds our rare warnings on standard error."""
    leave_one_open()
    forgetful.tell({"maxmemory_policy": "allkeys-lru"})
    Log("meterlib.gateway").info("call.denied", tenant="acme")

    out, err = capsys.readouterr()
    assert "" == out
    assert all(event in err for event in ("reservation.left_open", "store.may_evict", "call.denied"))


def test_a_failed_slice_is_told_on_standard_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is what local leases have to say."""

    async def main() -> None:
        async with AsyncMeter.connect("memory://", Policy()) as meter:
            lease = meter.local("acme", None, Usage(requests=5))

            async def away(*_: object, **__: object) -> None:
                raise StoreUnavailable("reserve", "made up by a test")

            monkeypatch.setattr(meter, "reserve", away)
            with pytest.raises(StoreUnavailable):
                await lease.admit()

    asyncio.run(main())

    out, err = capsys.readouterr()
    assert ("", True) == (out, "slice.failed" in err)


def test_logs_that_a_program_has_set_up_are_used(capsys: pytest.CaptureFixture[str]) -> None:
    """Also if it does so after it has imported us and made its meters."""
    leave_one_open()
    capsys.readouterr()
    with structlog.testing.capture_logs() as logs:
        leave_one_open()

    assert ["reservation.left_open"] == [event["event"] for event in logs]
    assert ("", "") == tuple(capsys.readouterr())


def test_every_module_tells_by_that_rule() -> None:
    """Nobody takes a logger elsewhere, or prints, but the commands."""
    root = Path(meterlib.__file__).parent
    for path in root.rglob("*.py"):
        name, text = path.relative_to(root).as_posix(), path.read_text()
        if name != "store/telling.py":
            assert "get_logger" not in text, name
        if not name.startswith(("cli/", "demo/")):
            assert "print(" not in text.replace("_print(", ""), name
