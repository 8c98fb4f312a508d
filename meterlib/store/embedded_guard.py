"""The process between an owner and its Valkey server: when the owner is gone, the server stops with its data flushed.

    python -I -S embedded_guard.py LOCK_FD SERVER [ARGUMENT ...]  <  a pipe whose other end only the owner holds

It runs on its own, without meterlib: nothing but the standard library, and little of that, so that it starts at once.
"""

import os
import select
import signal
import sys
import time
from collections.abc import Callable

STOP_SECONDS = 10.0
"""How long a server may take to flush and leave before it is killed."""

_OWNER = 0
_PR_SET_PDEATHSIG = 1


def main(lock: int, command: list[str]) -> int:
    """Run `command` until it ends or the owner is gone; says with 0 that the owner is, else with 1.

    The server inherits `lock` and is the only one that keeps it: the lock is held exactly as long as the server lives.
    """
    wake = _listen_to_signals()
    server = _start(lock, command)
    os.close(lock)
    # Not before the fork: a stop sent to a child that has not become the server yet would be swallowed.
    signal.signal(signal.SIGTERM, _wake_up)
    while not _has_ended(server):
        ready, _, _ = select.select([_OWNER, wake], [], [])
        owner_gone = _OWNER in ready and not os.read(_OWNER, 64)
        told_to_stop = wake in ready and signal.SIGTERM in os.read(wake, 64)
        if owner_gone or told_to_stop:
            _stop(server, wake)
            return 0
    return 1


def _listen_to_signals() -> int:
    """Ctrl-C and a closed terminal pass by; a child that ends, and SIGTERM, can be read from the returned pipe."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, _wake_up)
    return wake


def _wake_up(_number: int, _frame: object) -> None:
    """Nothing to do: that the signal came is written to the pipe."""


def _start(lock: int, command: list[str]) -> int:
    guard = os.getpid()
    end_with_guard = _prepare_end_with_guard()
    child = os.fork()
    if child:
        return child
    try:
        end_with_guard()
        if os.getppid() == guard:  # else the guard died before the line above
            os.dup2(os.open(os.devnull, os.O_RDONLY), _OWNER)
            os.set_inheritable(lock, True)
            os.umask(0o077)
            os.execv(command[0], command)
    except OSError as error:
        os.write(2, f"cannot run {command[0]}: {error.strerror}\n".encode(errors="backslashreplace"))
    finally:
        os._exit(127)


def _prepare_end_with_guard() -> Callable[[], object]:
    """What the child calls to be told to stop when the guard is killed; does nothing where there is no way to."""
    if sys.platform == "linux":
        try:
            import ctypes

            prctl = ctypes.CDLL(None).prctl
            arguments = [ctypes.c_ulong(number) for number in (int(signal.SIGTERM), 0, 0, 0)]
        except (ImportError, OSError, AttributeError):  # a Python built without ctypes
            return lambda: None
        return lambda: prctl(_PR_SET_PDEATHSIG, *arguments)
    return lambda: None


def _stop(server: int, wake: int) -> None:
    os.kill(server, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while not _has_ended(server):
        left = deadline - time.monotonic()
        if left <= 0:
            os.kill(server, signal.SIGKILL)
            os.waitpid(server, 0)
            return
        if select.select([wake], [], [], left)[0]:
            os.read(wake, 64)


def _has_ended(server: int) -> bool:
    return os.waitpid(server, os.WNOHANG)[0] == server


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
