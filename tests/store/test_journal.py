"""Settlements that wait on disk survive crashes, other writers and other replayers."""

from __future__ import annotations

from pathlib import Path

import pytest

from meterlib import Meter, Policy, Usage
from meterlib.core.ledger import Settlement
from meterlib.store.journal import Journal


def settlement(number: int) -> Settlement:
    return Settlement(tenant="acme", reservation_id=f"call-{number}", usage=Usage(input_tokens=number))


def waiting(journal: Journal) -> list[str]:
    return [item.settlement.reservation_id for item in journal.waiting()]


def test_two_replayers_drop_only_what_they_made(tmp_path: Path) -> None:
    """What was appended while two processes replayed the same settlements is still there when both are done."""
    journal = Journal(tmp_path / "journal")
    journal.append(settlement(1))
    first, second = journal.waiting(), journal.waiting()
    journal.append(settlement(2))
    journal.done(made=first)
    journal.done(made=second)

    assert ["call-2"] == waiting(journal)


def test_a_line_cut_short_by_a_crash_does_not_spoil_the_next(tmp_path: Path) -> None:
    """A torn line was never acknowledged; those before and behind it were."""
    journal = Journal(tmp_path / "journal")
    journal.append(settlement(1))
    with journal.path.open("ab") as file:
        file.write(b'{"tenant":"ac')
    journal.append(settlement(2))

    assert ["call-1", "call-2"] == waiting(journal)

    journal.done(made=journal.waiting()[:1])

    assert ["call-2"] == waiting(journal)


def test_a_crash_while_lines_are_dropped_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is replaced as a whole: before that moment nothing has changed."""
    journal = Journal(tmp_path / "journal")
    for number in (1, 2):
        journal.append(settlement(number))

    def crash(*paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        journal.done(made=journal.waiting()[:1])

    assert ["call-1", "call-2"] == waiting(journal)


def test_a_settlement_that_the_store_refuses_is_put_aside_with_its_usage(tmp_path: Path) -> None:
    """Usage that contradicts what is booked already is kept for a person to look at, and not only logged."""
    journal = Journal(tmp_path / "journal")
    with Meter.connect("memory://", Policy(), journal=journal.path) as meter:
        meter.reserve("acme", reservation_id="call-1").settle(Usage(input_tokens=7))
        journal.append(settlement(1))
        journal.append(settlement(2))
        meter.replay()

    assert [] == waiting(journal)
    assert [settlement(1)] == [item.settlement for item in Journal(tmp_path / "journal.refused").waiting()]
