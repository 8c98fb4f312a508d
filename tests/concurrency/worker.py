"""What a process of these tests does; started with a JSON job as its argument, it answers in JSON lines.

`race`: tasks reserve until not even an amount of 1 passes. `settle`: tasks settle the same reservations. `live`:
seeded lives of reservations, during which the process may kill itself at a chosen script call.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from typing import Any, Literal

import msgspec
import redis

from meterlib import (
    AsyncMeter,
    Meter,
    MeterError,
    Policy,
    QuotaExceeded,
    ReservationConflict,
    StoreOptions,
    Usage,
)
from meterlib.testing import Clock

OPTIONS = StoreOptions(shards=1, deadline_ms=20_000, timeout_ms=10_000)
LEASE_MS = 60_000
TENANT = "acme"


class Job(msgspec.Struct, kw_only=True):
    """What to do, and on which store."""

    verb: Literal["race", "settle", "live"]
    url: str
    policy: Policy
    seed: int = 0
    tasks: int = 8
    amount_max: int = 9
    lives: int = 40
    now_ms: int | None = None
    reservation_ids: list[str] = []
    die_at: int = 0
    die_when: Literal["before", "sent", "after"] = "before"

    def clock(self) -> Clock | None:
        """The scripts' clock, or none for the server's."""
        return None if self.now_ms is None else Clock(self.now_ms)


def say(answer: object) -> None:
    """One line to the parent."""
    print(json.dumps(answer), flush=True)


def wait_for_start() -> None:
    """All processes begin together, and not as they come up."""
    say("ready")
    sys.stdin.readline()


async def race(job: Job) -> None:
    """Reserve and let it be; amounts go down to 1 as the quota runs out."""
    admitted: list[int] = []

    async def compete(meter: AsyncMeter, chance: random.Random) -> None:
        amount = job.amount_max
        while True:
            try:
                reservation = await meter.reserve(TENANT, {}, Usage(amounts={"units": amount}))
            except QuotaExceeded:
                if amount == 1:
                    return
                amount = 1
            else:
                admitted.append(amount)
                assert all(limit.used <= limit.quota for limit in reservation.limits)
                amount = chance.randint(1, amount)

    async with AsyncMeter.connect(
        job.url, job.policy, options=OPTIONS, clock=job.clock(), sweep_interval_ms=0
    ) as meter:
        await meter.peek(TENANT)
        await asyncio.to_thread(wait_for_start)
        await asyncio.gather(*(compete(meter, random.Random(f"{job.seed}-{n}")) for n in range(job.tasks)))
    say(admitted)


async def settle(job: Job) -> None:
    """Settle every reservation from as many tasks, which take turns at so many usages."""
    async with AsyncMeter.connect(
        job.url, job.policy, options=OPTIONS, clock=job.clock(), sweep_interval_ms=0
    ) as meter:
        await meter.peek(TENANT)
        await asyncio.to_thread(wait_for_start)

        async def once(reservation_id: str, amount: int) -> list[object]:
            try:
                entry = await meter.settle(TENANT, reservation_id, Usage(amounts={"units": amount}))
            except ReservationConflict:
                return [reservation_id, "conflict", amount]
            return [reservation_id, entry.n, amount]

        calls = [(name, 1 + n % job.amount_max) for name in job.reservation_ids for n in range(job.tasks)]
        say(await asyncio.gather(*(once(*call) for call in calls)))


class MortalClient(redis.Redis):
    """A client that kills its process at its n-th script call: before it, once it is sent, or once it is answered."""

    calls = 0
    job: Job

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Count script calls, and die when it is time."""
        execute: Callable[..., Any] = super().execute_command
        if args[0] not in ("EVALSHA", "EVAL"):
            return execute(*args, **options)
        self.calls += 1
        doomed = self.calls == self.job.die_at
        if doomed and self.job.die_when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if doomed and self.job.die_when == "sent":
            connection: Any = self.connection_pool.get_connection()
            connection.send_command(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        answer = execute(*args, **options)
        if doomed:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer


def live(job: Job) -> None:
    """Reserve, revise, renew, settle, cancel or forget, as chance has it; say what was acknowledged."""
    chance = random.Random(job.seed)
    with MortalClient.from_url(job.url) as client:
        client.job = job
        meter = Meter(client, job.policy, options=OPTIONS, clock=job.clock(), sweep_interval_ms=0)
        wait_for_start()
        for number in range(job.lives):
            reservation_id = f"life-{job.seed}-{number}"
            estimate, used = chance.randint(1, 20), chance.randint(0, 30)
            try:
                held = meter.reserve(
                    TENANT, {}, Usage(amounts={"units": estimate}), reservation_id=reservation_id, lease_ms=LEASE_MS
                )
                say(["held", reservation_id, estimate])
                if chance.random() < 0.3:
                    held.revise(Usage(amounts={"units": chance.randint(1, 20)}))
                if chance.random() < 0.2:
                    held.renew(LEASE_MS)
                end = chance.choice(["settle", "settle", "settle", "cancel", "leave"])
                if end == "settle":
                    entry = held.settle(Usage(amounts={"units": used}))
                    say(["settled", reservation_id, used, entry.n])
                elif end == "cancel":
                    held.cancel()
                    say(["cancelled", reservation_id])
            except QuotaExceeded:
                pass
            except MeterError as error:
                say(["error", reservation_id, repr(error)])
        meter.close()
    say(["done"])


def main() -> None:
    """Do the job."""
    job = msgspec.json.decode(sys.argv[1], type=Job)
    if job.verb == "race":
        asyncio.run(race(job))
    elif job.verb == "settle":
        asyncio.run(settle(job))
    else:
        live(job)


if __name__ == "__main__":
    main()
