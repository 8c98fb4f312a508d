"""Blocks: `with meter.reservation(…) as r:` ends the reservation, however the block is left."""

from __future__ import annotations

import pytest

from meterlib import Limit, Meter, Policy, QuotaExceeded, Usage
from tests.fundamentals.conftest import Entries, States

POLICY = Policy(limits=(Limit(name="output", unit="output_tokens", quota=1_000, window="1m"),))
HELD = Usage(output_tokens=400)


class Broken(Exception):
    """What goes wrong in a block."""


def test_a_block_settles_what_it_used(meter: Meter, states: States, entries: Entries) -> None:
    """The usual way: dispatch, then settle."""
    with meter.reservation("acme", usage=HELD) as held:
        assert 400 == states()["output"].held
        held.dispatched()
        held.settle(Usage(output_tokens=150))

    assert (150, 0) == (states()["output"].used, states()["output"].held)
    assert ["settled"] == [entry.kind for entry in entries()]


def test_an_exception_before_dispatch_cancels(meter: Meter, states: States, entries: Entries) -> None:
    """Nothing was sent, so nothing is held, and the exception goes on."""
    with pytest.raises(Broken), meter.reservation("acme", usage=HELD):
        raise Broken

    assert 0 == states()["output"].used
    assert ["cancelled"] == [entry.kind for entry in entries()]


def test_a_block_that_never_dispatched_cancels(meter: Meter, states: States) -> None:
    """Leaving in good order without having sent anything is no usage either."""
    with meter.reservation("acme", usage=HELD):
        pass

    assert 0 == states()["output"].used


def test_an_exception_after_dispatch_leaves_the_hold(meter: Meter, states: States, entries: Entries) -> None:
    """The call is out and may use tokens: an abort never makes them free. A settle ends the hold, or its lease."""

    def lose_the_connection() -> None:
        with meter.reservation("acme", usage=HELD, reservation_id="call-1") as held:
            held.dispatched()
            raise Broken

    with pytest.raises(Broken):
        lose_the_connection()

    assert (400, []) == (states()["output"].held, entries())
    assert "settled" == meter.settle("acme", "call-1", Usage(output_tokens=150)).kind


def test_an_exception_after_the_settlement_changes_nothing(meter: Meter, states: States, entries: Entries) -> None:
    """What is settled is settled."""

    def fail_while_answering() -> None:
        with meter.reservation("acme", usage=HELD) as held:
            held.settle(Usage(output_tokens=150))
            raise Broken

    with pytest.raises(Broken):
        fail_while_answering()

    assert (150, 1) == (states()["output"].used, len(entries()))


def test_a_denied_block_is_not_entered(meter: Meter) -> None:
    """The denial comes before the block's first line."""
    meter.reserve("acme", usage=Usage(output_tokens=1_000))
    entered = False
    with pytest.raises(QuotaExceeded), meter.reservation("acme", usage=HELD):
        entered = True

    assert not entered
