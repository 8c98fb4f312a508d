"""A service is told to end by a signal, and does, whatever Python was at when that came."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from meterlib.cli.stopping import Stopping

BOTH = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Whatever goes wrong, later tests get the signals that they expect."""
    before = [signal.getsignal(number) for number in BOTH]
    yield
    for number, handler in zip(BOTH, before, strict=True):
        signal.signal(number, handler)


class Finalized:
    """Something that Python lets go of when a signal comes."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self._number)


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_that_comes_in_a_finalizer_is_not_lost(number: int) -> None:
    """Python would print that KeyboardInterrupt was ignored, and the service would go on for ever."""
    with Stopping() as stopping:
        stopping.check()
        Finalized(number)
        with pytest.raises(KeyboardInterrupt):
            stopping.check()


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_pause_ends_with_a_signal(when: str) -> None:
    """Nobody waits for the next round."""
    main = threading.main_thread().ident
    assert main is not None
    tell = threading.Timer(0.05 if when == "meanwhile" else 0, signal.pthread_kill, [main, signal.SIGTERM])
    with Stopping() as stopping:
        tell.start()
        if when == "before":
            tell.join()
        with pytest.raises(KeyboardInterrupt):
            stopping.sleep(3600)
    tell.join()


def test_a_pause_without_a_signal_is_over_in_time() -> None:
    began_s = time.monotonic()
    with Stopping() as stopping:
        stopping.sleep(0.05)
    assert time.monotonic() - began_s >= 0.05


def test_a_second_signal_ends_it_at_once() -> None:
    """Somebody does not want to wait until something is done."""
    with Stopping():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_signals_do_afterwards_what_they_did_before() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    before = [signal.getsignal(number) for number in BOTH]
    with Stopping():
        assert signal.SIG_IGN is signal.getsignal(signal.SIGINT), "as nohup has it"
        assert before[1] is not signal.getsignal(signal.SIGTERM)
    assert before == [signal.getsignal(number) for number in BOTH]


def test_a_thread_leaves_signals_to_the_program_that_it_is_in() -> None:
    """A program that runs a command inside has handlers of its own."""
    seen: list[object] = []

    def work() -> None:
        with Stopping() as stopping:
            stopping.check()
            seen.extend(signal.getsignal(number) for number in BOTH)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [signal.getsignal(number) for number in BOTH] == seen
