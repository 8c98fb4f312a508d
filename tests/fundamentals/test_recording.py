"""Record and adjust: write usage that nobody reserved, and correct what is written without ever editing it."""

from __future__ import annotations

import pytest

from meterlib import Limit, Meter, Policy, QuotaExceeded, ReservationConflict, Usage
from meterlib.testing import Clock
from tests.fundamentals.conftest import Entries, States

POLICY = Policy(
    limits=(
        Limit(name="output", unit="output_tokens", quota=1_000, window="1m"),
        Limit(name="few", quota=5, window="1m", match={"kind": "few"}),
    )
)
USED = Usage(output_tokens=1_200)


def test_recorded_usage_is_booked_and_counts_now(meter: Meter, states: States, entries: Entries) -> None:
    """Usage from elsewhere is a fact: it is never denied, and later calls wait for it."""
    entry = meter.record("acme", {"source": "import"}, USED, record_id="import-1")

    assert ("recorded", "import-1", 1) == (entry.kind, entry.reservation_id, entry.n)
    assert [("recorded", {"source": "import"}, {"output_tokens": 1_200})] == [
        (e.kind, e.attributes, e.usage) for e in entries()
    ]
    assert (1_200, 0) == (states()["output"].used, states()["output"].held)
    with pytest.raises(QuotaExceeded):
        meter.reserve("acme", usage=Usage(output_tokens=1))


def test_recording_again_under_an_id_books_once(meter: Meter, states: States, entries: Entries) -> None:
    """An import that is repeated after a time-out does not bill twice; another payload is a conflict."""
    first = meter.record("acme", {}, USED, record_id="import-1")
    again = meter.record("acme", {}, USED, record_id="import-1")
    with pytest.raises(ReservationConflict) as conflict:
        meter.record("acme", {}, Usage(output_tokens=7), record_id="import-1")

    assert "1200" in (conflict.value.existing or "")
    assert "7" in (conflict.value.given or "")
    assert first == again
    assert (1_200, 1) == (states()["output"].used, len(entries()))


def test_recorded_usage_is_no_reservation_to_be_settled(meter: Meter, entries: Entries) -> None:
    """Settling its id is refused for what it is, also with the very same usage."""
    meter.record("acme", {}, USED, record_id="import-1")
    with pytest.raises(ReservationConflict, match="'import-1' is the id of recorded usage, and not of a reservation"):
        meter.settle("acme", "import-1", USED)

    assert 1 == len(entries())


def test_a_correction_is_an_entry_of_its_own(meter: Meter, states: States, entries: Entries) -> None:
    """The entry stays as it is; the difference, the reason and who says so stand beside it. Limits are not touched."""
    wrong = meter.record("acme", {"model": "large"}, USED)
    meter.adjust(wrong, {"output_tokens": -200}, "counted twice", actor="finance")
    booked, adjusted = entries()

    assert {"output_tokens": 1_200} == booked.usage
    assert ("adjusted", {"output_tokens": -200}) == (adjusted.kind, adjusted.usage)
    assert (f"{wrong.shard}:{wrong.n}", "counted twice", "finance") == (
        adjusted.adjusts,
        adjusted.reason,
        adjusted.actor,
    )
    assert ("acme", {"model": "large"}) == (adjusted.tenant, adjusted.attributes)
    assert 1_200 == states()["output"].used


def test_correcting_again_under_an_id_books_once(meter: Meter, entries: Entries) -> None:
    """A correction may be repeated, and is made once."""
    wrong = meter.record("acme", {}, USED)
    first = meter.adjust(wrong, {"output_tokens": -200}, "counted twice", adjust_id="fix-1")
    again = meter.adjust(wrong, {"output_tokens": -200}, "counted twice", adjust_id="fix-1")
    with pytest.raises(ReservationConflict):
        meter.adjust(wrong, {"output_tokens": -300}, "counted twice", adjust_id="fix-1")

    assert first == again
    assert 2 == len(entries())


def test_the_ledger_can_be_read_from_any_place_on(meter: Meter) -> None:
    """A reader remembers the last number it saw, and misses nothing."""
    written = [meter.record("acme", {}, Usage(output_tokens=number)) for number in range(5)]
    shard = written[0].shard

    assert [1, 2, 3, 4, 5] == [entry.n for entry in meter.ledger(shard)]
    assert [4, 5] == [entry.n for entry in meter.ledger(shard, after=3)]
    assert [] == list(meter.ledger(shard, after=5))
    assert (5, 0) == (meter.head(shard).last_number, meter.head(shard).open_reservations)


def test_usage_that_nobody_reserved_does_not_make_a_small_window_grow(meter: Meter, clock: Clock) -> None:
    """A limit of few requests is exact to the ms; what is never denied is kept in sub-windows all the same."""
    call = {"kind": "few"}
    for _ in range(40):
        clock.advance(ms=7)
        meter.record("acme", call, Usage())

    (few,) = [state for state in meter.peek("acme", call) if state.name == "few"]
    assert 40 == few.used
    assert few.frees_at_ms is not None
    assert 0 == (few.frees_at_ms + 1) % 1000
