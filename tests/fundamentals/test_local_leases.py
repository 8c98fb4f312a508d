"""Slices of a quota, handed out in a process: never more than the quota, whatever the processes do."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterlib import (
    AsyncMeter,
    InvalidInput,
    LedgerEntry,
    Limit,
    Policy,
    QuotaExceeded,
    StoreOptions,
    StoreUnavailable,
    Usage,
    UsageError,
)
from meterlib.local import LATE_MAX
from meterlib.testing import Clock

WINDOW_MS = 6_000
QUOTA = 100
POLICY = Policy(
    limits=[
        Limit(name="requests", quota=QUOTA, window="6s"),
        Limit(name="input_tokens", unit="input_tokens", quota=10 * QUOTA, window="6s"),
    ]
)
ONE_SHARD = StoreOptions(shards=1)
SLICE = Usage(requests=20, input_tokens=150)


def run(use: Any, policy: Policy = POLICY) -> Any:
    async def main() -> Any:
        clock = Clock()
        async with AsyncMeter.connect("memory://", policy, clock=clock, options=ONE_SHARD) as meter:
            async with asyncio.timeout(20):
                return await use(meter, clock)

    return asyncio.run(main())


async def ledger_of(meter: AsyncMeter) -> list[LedgerEntry]:
    return [entry async for entry in meter.ledger(0)]


def test_a_slice_is_used_up_and_booked_as_what_was_admitted() -> None:
    """The limits count what was admitted, and one entry stands for all of it."""

    async def use(meter: AsyncMeter, clock: Clock) -> None:
        async with meter.local("acme", None, SLICE) as lease:
            for _ in range(7):
                await lease.admit(input_tokens=5)
            assert [20, 150] == [state.used for state in await meter.peek("acme")]

        assert [7, 35] == [state.used for state in await meter.peek("acme")]
        (entry,) = await ledger_of(meter)
        assert {"requests": 7, "input_tokens": 35, "output_tokens": 0} == entry.usage

    run(use)


def test_nothing_used_is_nothing_booked() -> None:
    """A slice that was not needed is as if it had never been taken."""

    async def use(meter: AsyncMeter, clock: Clock) -> None:
        async with meter.local("acme", None, SLICE) as lease:
            with pytest.raises(InvalidInput, match="larger"):
                await lease.admit(input_tokens=151)
            await lease.admit(input_tokens=150)
            clock.advance(ms=100)
            assert not lease.take()
        assert [1, 150] == [state.used for state in await meter.peek("acme")]

    run(use)


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from([0, 0, 0, 1, 40, 99, 100, 500, 5_900]), st.integers(0, 40)),
        max_size=250,
    )
)
def test_processes_together_never_admit_beyond_a_quota(steps: list[tuple[int, int, int]]) -> None:
    """In no span of a window's length, of whatever slices, clocks and sizes."""

    async def use(meter: AsyncMeter, clock: Clock) -> None:
        leases = [meter.local("acme", None, SLICE), meter.local("acme", None, Usage(requests=90, input_tokens=900))]
        admitted: list[tuple[int, int]] = []
        for which, passed_ms, tokens in steps:
            clock.advance(ms=passed_ms)
            try:
                if which < 2:
                    await leases[which].admit(input_tokens=tokens)
                else:
                    await (await meter.reserve("acme", {}, Usage(input_tokens=tokens))).settle(
                        Usage(input_tokens=tokens)
                    )
            except QuotaExceeded:
                continue
            admitted.append((clock.now_ms, tokens))
        for lease in leases:
            await lease.aclose()
        for end_ms, _ in admitted:
            within = [tokens for at_ms, tokens in admitted if end_ms - WINDOW_MS < at_ms <= end_ms]
            assert len(within) <= QUOTA
            assert sum(within) <= 10 * QUOTA
        booked = [entry.usage for entry in await ledger_of(meter)]
        assert len(admitted) == sum(int(str(usage.get("requests", 1))) for usage in booked)
        assert sum(tokens for _, tokens in admitted) == sum(int(str(usage["input_tokens"])) for usage in booked)

    run(use)


def test_a_slice_is_over_with_its_sub_window() -> None:
    """What would count for less than a window is not admitted out of it."""

    async def use(meter: AsyncMeter, clock: Clock) -> None:
        lease = meter.local("acme", None, SLICE)
        clock.set(1_790_000_000_000 + 60)
        await lease.admit()
        clock.advance(ms=39)
        assert lease.take()
        clock.advance(ms=1)
        assert not lease.take()
        await lease.aclose()

    run(use)


def test_a_slice_that_nobody_needs_any_more_is_given_back_by_itself() -> None:
    """A process that falls silent keeps nothing from the others."""

    async def main() -> None:
        policy = Policy(limits=[Limit(name="requests", quota=1000, window="6s")])
        async with AsyncMeter.connect("memory://", policy, options=ONE_SHARD) as meter, asyncio.timeout(20):
            lease = meter.local("acme", None, SLICE)
            await lease.admit()
            while (await meter.peek("acme"))[0].used == 20:
                await asyncio.sleep(0.005)
            assert 1 == (await meter.peek("acme"))[0].used
            await lease.aclose()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("limit", "problem"),
    [
        (Limit(name="open", quota=5, open=True), "concurrency"),
        (Limit(name="few", quota=5, window="1m"), "sub_windows"),
        (Limit(name="budget", quota=5, unit="cost_nanousd", period="day"), "cost_nanousd"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_limits_that_cannot_be_handed_out_are_refused_at_once(limit: Limit, problem: str) -> None:
    """An engineer learns it when writing the code, not under load."""

    async def use(meter: AsyncMeter, clock: Clock) -> None:
        with pytest.raises(InvalidInput, match=problem):
            meter.local("acme", {}, SLICE)

    run(use, Policy(limits=[limit]))


@pytest.mark.parametrize("amount", [-1, -100_000, 1.5, float("nan"), True, "7", None, 2**53])
def test_an_amount_that_is_none_admits_nothing(amount: Any) -> None:
    """A negative or odd number must not mint quota."""

    async def use(meter: AsyncMeter, clock: Clock) -> None:
        async with meter.local("acme", None, SLICE) as lease:
            await lease.admit(input_tokens=10)
            for told in ({"input_tokens": amount}, {"output_tokens": amount}):
                with pytest.raises(InvalidInput):
                    await lease.admit(**told)
                if amount != 2**53:
                    with pytest.raises(InvalidInput):
                        lease.take(**told)
        assert [1, 10] == [state.used for state in await meter.peek("acme")]

    run(use)


def test_a_closed_lease_admits_nothing() -> None:
    """What is admitted after the end would be booked by nobody."""

    async def use(meter: AsyncMeter, clock: Clock) -> None:
        lease = meter.local("acme", None, SLICE)
        await lease.admit()
        await lease.aclose()

        with pytest.raises(UsageError, match="closed"):
            await lease.admit()

    run(use)


def test_a_slice_that_could_not_be_booked_is_booked_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Usage is not forgotten because the store was away for a moment."""

    async def use(meter: AsyncMeter, clock: Clock) -> None:
        lease = meter.local("acme", None, SLICE)
        await lease.admit(input_tokens=5)
        assert lease._held is not None
        settle = lease._held.settle
        monkeypatch.setattr(lease._held, "settle", unreachable)
        with pytest.raises(StoreUnavailable):
            await lease.aclose()
        monkeypatch.setattr(lease._held, "settle", settle)
        await lease.aclose()

        (entry,) = await ledger_of(meter)
        assert 5 == entry.usage["input_tokens"]

    run(use)


async def unreachable(*arguments: Any, **named: Any) -> None:
    raise StoreUnavailable("settle", "made up by a test")


def test_a_slice_must_say_of_how_many_calls_it_is() -> None:
    """One call at a time would be no slice."""

    async def use(meter: AsyncMeter, clock: Clock) -> None:
        with pytest.raises(InvalidInput, match="requests"):
            meter.local("acme", {}, Usage(input_tokens=1000))
        with pytest.raises(InvalidInput, match="Usage"):
            meter.local("acme", {}, {"requests": 5})  # type: ignore[arg-type]

    run(use)


def test_what_is_left_below_a_slice_is_admitted_call_by_call() -> None:
    """The end of a quota is not lost because slices are larger."""

    async def use(meter: AsyncMeter, clock: Clock) -> None:
        async with meter.local("acme", None, Usage(requests=30, input_tokens=300)) as lease:
            for _ in range(QUOTA):
                await lease.admit(input_tokens=1)
            with pytest.raises(QuotaExceeded):
                await lease.admit(input_tokens=1)

    run(use)


@pytest.mark.parametrize("answers_late_ms", [100, 5_000])
def test_slices_that_are_over_before_they_come_are_not_taken_for_ever(
    monkeypatch: pytest.MonkeyPatch, answers_late_ms: int
) -> None:
    """Gateway: a store that answers too slowly for slices is an error after so many, and nothing stays held."""

    async def use(meter: AsyncMeter, clock: Clock) -> None:
        reserve, taken = meter.reserve, []

        async def late(*arguments: Any, **named: Any) -> Any:
            held = await reserve(*arguments, **named)
            clock.advance(ms=answers_late_ms)
            taken.append(held.id)
            return held

        monkeypatch.setattr(meter, "reserve", late)
        async with meter.local("acme", None, SLICE) as lease:
            with pytest.raises(StoreUnavailable, match="longer to answer than a slice lasts"):
                await lease.admit()

        assert LATE_MAX + 1 == len(taken)
        assert [0, 0] == [state.used for state in await meter.peek("acme")]
        assert {"cancelled"} == {entry.kind for entry in await ledger_of(meter)}

    run(use)


@pytest.mark.parametrize(("tasks", "calls"), [(256, 100), (30, 1), (100, 100)])
def test_tasks_wait_for_slices_in_the_order_in_which_they_came(tasks: int, calls: int) -> None:
    """However small the slices are beside them: none is ever two calls ahead of another."""

    async def use(meter: AsyncMeter, clock: Clock) -> None:
        made = [0] * tasks

        async def some(number: int) -> None:
            for _ in range(20):
                await lease.admit(input_tokens=1)
                made[number] += 1
                await asyncio.sleep(0)  # and others, who were admitted with it, tell so
                assert max(made) <= min(made) + 1

        async with meter.local("acme", None, Usage(requests=calls, input_tokens=calls)) as lease:
            await asyncio.gather(*map(some, range(tasks)))

        assert [20 * tasks, 20 * tasks] == [state.used for state in await meter.peek("acme")]
        assert -(-20 * tasks // calls) == len(await ledger_of(meter))

    run(use, Policy(limits=[limit.__replace__(quota=10**6) for limit in POLICY.limits]))


def test_a_denial_is_that_of_all_who_ask_for_no_less() -> None:
    """Who waits behind a call that is too large for what is left is admitted, if it fits; nobody asks in vain."""

    async def use(meter: AsyncMeter, clock: Clock) -> None:
        await meter.reserve("acme", {}, Usage(input_tokens=10 * QUOTA - 60), reservation_id="others")
        async with meter.local("acme", None, Usage(requests=5, input_tokens=900)) as lease:
            asked = (61, 30, 61, 80, 30, 1)
            got = await asyncio.gather(*(lease.admit(input_tokens=one) for one in asked), return_exceptions=True)

            assert [QuotaExceeded, None, QuotaExceeded, QuotaExceeded, None, QuotaExceeded] == [
                type(one) if one else None for one in got
            ]
            assert len({id(one) for one in got if one}) == 4

    run(use)


@pytest.mark.parametrize("when", ["before", "after"])
def test_who_is_cancelled_while_it_waits_takes_nothing_from_the_slice(when: str) -> None:
    """Neither before it was admitted, nor in the moment between that and its own turn to run."""

    async def use(meter: AsyncMeter, clock: Clock) -> None:
        async with meter.local("acme", None, SLICE) as lease:
            tasks = [asyncio.ensure_future(lease.admit(input_tokens=5)) for _ in range(3)]
            while not (lease._waiting if when == "before" else lease._held):
                await asyncio.sleep(0)
            tasks[1].cancel()
            got = await asyncio.gather(*tasks, return_exceptions=True)

            assert [type(None), asyncio.CancelledError, type(None)] == [type(one) for one in got]
        assert [2, 10] == [state.used for state in await meter.peek("acme")]

    run(use)


def test_who_waits_when_a_lease_is_closed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is everybody, if the store is away: nobody waits for ever, and nothing is held."""

    async def use(meter: AsyncMeter, clock: Clock) -> None:
        lease, reserve, asked, answers = (
            meter.local("acme", None, SLICE),
            meter.reserve,
            asyncio.Event(),
            asyncio.Event(),
        )

        async def later(*arguments: Any, **named: Any) -> Any:
            asked.set()
            await answers.wait()
            return await reserve(*arguments, **named)

        monkeypatch.setattr(meter, "reserve", later)
        tasks = [asyncio.ensure_future(lease.admit(input_tokens=140)) for _ in range(3)]
        await asked.wait()
        closing = asyncio.ensure_future(lease.aclose())
        await asyncio.sleep(0)
        answers.set()
        got = await asyncio.gather(*tasks, return_exceptions=True)
        await closing

        assert [type(None), UsageError, UsageError] == [type(one) for one in got]
        assert [1, 140] == [state.used for state in await meter.peek("acme")]

        other = meter.local("acme", None, SLICE)
        monkeypatch.setattr(meter, "reserve", unreachable)
        got = await asyncio.gather(*(other.admit() for _ in range(3)), return_exceptions=True)

        assert [StoreUnavailable] * 3 == [type(one) for one in got]

    run(use)


def test_many_tasks_share_a_slice_and_one_refill() -> None:
    """A thousand tasks that find the slice empty ask the store once, not a thousand times."""

    async def use(meter: AsyncMeter, clock: Clock) -> None:
        async with meter.local("acme", None, Usage(requests=100, input_tokens=1000)) as lease:
            await asyncio.gather(*(lease.admit(input_tokens=1) for _ in range(100)))
            with pytest.raises(QuotaExceeded):
                await lease.admit()
        assert 1 == len(await ledger_of(meter))

    run(use)
