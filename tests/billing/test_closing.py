"""A month that is closed stays what it was: to the entry where it ends, and to the last digit of what it comes to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

import meterlib
from meterlib import Usage
from meterlib.billing.export.export import Accepted
from meterlib.billing.export.fork import fork, loss_of
from meterlib.billing.months import month_named
from meterlib.billing.postings.closes import Close, closes_of, digest_of, encoded
from meterlib.billing.postings.closing import Closing, Word
from meterlib.billing.postings.postings import Postings
from meterlib.billing.postings.repeats import Repeat, repeats_of
from meterlib.billing.rating.rating import rate
from meterlib.cli import main
from meterlib.core.ledger import Settlement
from meterlib.errors import IntegrityError, InvalidInput, PolicyError
from meterlib.store.journal import Journal
from tests.billing.exporting import LEDGER
from tests.billing.money import BOOK, at_ms, tokens
from tests.billing.posting import DEARER, TERMS, Ledgers, as_rated, prices

ROOT = Path(meterlib.__file__).parent.parent
MTOK = tokens(input_tokens=1_000_000)


@pytest.fixture
def ledgers(tmp_path: Path) -> Ledgers:
    return Ledgers(tmp_path)


def closed(ledgers: Ledgers, period: str, clock_ms: int = 2_000_000_000_000) -> Close:
    close = ledgers.close_period(period, clock_ms)
    assert isinstance(close, Close), close
    return close


def listed(close: Close) -> Decimal:
    return sum((Decimal(total.list_cost) for total in close.totals), Decimal(0))


def by_period(ledgers: Ledgers) -> dict[tuple[str, str], Decimal]:
    """The list cost of each period, apart for each period that it corrects."""
    query = "SELECT period, corrects, sum(list_cost) FROM rows GROUP BY ALL ORDER BY ALL"
    return {(period, corrects): cost for period, corrects, cost in ledgers.query(query)}


# ── Where a month ends ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("tz", "period", "first", "end"),
    [
        ("UTC", "2026-10", "2026-10-01T00:00+00:00", "2026-11-01T00:00+00:00"),
        ("UTC", "2028-02", "2028-02-01T00:00+00:00", "2028-03-01T00:00+00:00"),
        ("Pacific/Kiritimati", "2026-12", "2026-12-01T00:00+14:00", "2027-01-01T00:00+14:00"),
        ("Etc/GMT+12", "2026-12", "2026-12-01T00:00-12:00", "2027-01-01T00:00-12:00"),
        ("Europe/Berlin", "2026-10", "2026-10-01T00:00+02:00", "2026-11-01T00:00+01:00"),
        ("Europe/Berlin", "2026-03", "2026-03-01T00:00+01:00", "2026-04-01T00:00+02:00"),
        ("America/New_York", "2026-11", "2026-11-01T00:00-04:00", "2026-12-01T00:00-05:00"),
    ],
)
def test_a_month_is_that_of_the_zone_to_the_millisecond(
    tmp_path: Path, tz: str, period: str, first: str, end: str
) -> None:
    """An entry on the boundary is of the month that begins there, whatever the clocks of the zone did within it."""
    ledgers = Ledgers(tmp_path, tz)
    for at in (at_ms(first) - 1, at_ms(first), at_ms(end) - 1, at_ms(end)):
        ledgers.call(at, "steep", MTOK)
    ledgers.rate()
    before = ledgers.query("SELECT n FROM rows WHERE period = '" + period + "' ORDER BY n")

    close = closed(ledgers, period)

    assert [(2,), (3,)] == before
    assert (at_ms(first), at_ms(end), 3) == (close.from_ms, close.until_ms, close.shards[0].last)
    assert (Decimal(1), {"settled": 2}) == (listed(close), close.shards[0].entries)
    assert [] == ledgers.problems()


def test_names_that_are_no_month_are_refused(ledgers: Ledgers) -> None:
    """Nothing is closed by a slip of the finger."""
    for name in ("2026-13", "2026-00", "2026-1", "October", "2026-10-01", "", "0001-01", "9999-12"):
        with pytest.raises(InvalidInput):
            month_named(name, "UTC")


# ── What a close says ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_close_says_what_the_month_comes_to_and_whatever_is_doubtful(ledgers: Ledgers) -> None:
    """Finance: by tenant, with what is not known."""
    ledgers.call("2026-10-02", usage=MTOK)
    ledgers.call("2026-10-03", usage=MTOK, tenant="globex", quality="partial")
    ledgers.call("2026-10-04", "nobody's", MTOK)
    ledgers.call("2026-10-05", kind="expired", usage={})
    ledgers.call("2026-11-05", usage=MTOK)
    ledgers.rate()

    close = closed(ledgers, "2026-10")

    assert ["acme", "acme", "globex"] == [total.tenant for total in close.totals]
    assert ["", "USD", "USD"] == [total.currency for total in close.totals]
    assert [1, 0, 0] == [total.unpriced for total in close.totals]
    expected = [row for row in as_rated(ledgers.entries[:4]) if row.tenant == "acme" and not row.unpriced]
    assert [str(expected[0].billed_cost)] == [t.billed_cost for t in close.totals if t.currency and t.tenant == "acme"]
    assert (1, {"final": 2, "partial": 1}) == (close.unpriced, close.qualities)
    assert {"expired": 1, "settled": 3} == close.shards[0].entries
    with ledgers.archive() as archive:
        link = next(archive.facts(one).link for one in archive.segments(0) if one.last == 4)
    assert (4, link) == (close.shards[0].last, close.shards[0].link)


def test_a_gap_that_was_accepted_is_in_the_close(ledgers: Ledgers) -> None:
    """What is lost for good is said where the bill is made."""
    for day in range(1, 6):
        ledgers.call(f"2026-10-0{day}")
    ledgers.client.xdel(LEDGER, "3-0")
    ledgers.export(Accepted(gaps=frozenset({(0, 3, 3)})))
    ledgers.rate()

    close = closed(ledgers, "2026-10")

    assert (["0:3-3"], {"settled": 4}) == (close.shards[0].gaps, close.shards[0].entries)
    assert [] == ledgers.problems()


def test_closes_follow_each_other_and_the_first_may_be_any(ledgers: Ledgers) -> None:
    """Each carries the digest of the one before it; none is left out, and none comes in between."""
    for month in ("2026-08", "2026-09", "2026-10", "2026-11"):
        ledgers.call(f"{month}-05")
    ledgers.rate()
    first = closed(ledgers, "2026-09")

    for period, told in (("2026-08", "before it"), ("2026-11", "2026-10 is the next")):
        with pytest.raises(InvalidInput, match=told):
            ledgers.close_period(period)
    second = closed(ledgers, "2026-10")

    assert ("", first.digest) == (first.before, second.before)
    assert [first, second] == closes_of(ledgers.path)
    assert {"2026-08", "2026-09", "2026-10", "2026-11"} == {period for period, _ in by_period(ledgers)}
    assert [] == ledgers.problems()


def test_a_month_without_any_entry_can_be_closed(ledgers: Ledgers) -> None:
    """Nothing is a result, too."""
    ledgers.call("2026-10-05")
    ledgers.rate()
    closed(ledgers, "2026-10")

    close = closed(ledgers, "2026-11")

    assert ([], 1, {}) == (close.totals, close.shards[0].last, close.shards[0].entries)
    assert [] == ledgers.problems()


# ── When it can be closed ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_month_that_is_not_over_cannot_be_closed(ledgers: Ledgers) -> None:
    """By the store's clock, to the millisecond."""
    ledgers.call("2026-10-05")
    ledgers.rate()

    refused = ledgers.close_period("2026-10", at_ms("2026-11-01") - 1)

    assert isinstance(refused, list)
    assert ["2026-10 is not over: it ends at 2026-11-01T00:00+00:00 ([billing] tz 'UTC')"] == refused
    closed(ledgers, "2026-10", at_ms("2026-11-01"))


def test_what_is_not_exported_or_not_rated_stands_in_the_way(ledgers: Ledgers) -> None:
    """The entries are named, and what to do."""
    ledgers.call("2026-10-05")
    ledgers.export()
    ledgers.call("2026-10-06")
    assert [
        "entries 0:2-2 are not exported; `meterlib export run` does it",
        "entries 0:1-1 are not rated; `meterlib rate` does it",
    ] == ledgers.close_period("2026-10")

    ledgers.rate()
    ledgers.call("2026-11-02")
    ledgers.export()

    assert 2 == closed(ledgers, "2026-10").shards[0].last, "what is of November may wait"


def test_offline_every_shard_needs_an_entry_from_after_the_month(ledgers: Ledgers) -> None:
    """Times of a ledger never go back, so such an entry proves that nothing of the month is still to come."""
    ledgers.call("2026-10-05")
    ledgers.rate()

    def hindrances(shards: int) -> list[str]:
        with ledgers.archive() as archive:
            return Closing(Postings(archive), "2026-10").hindrances(None, shards)

    assert "shard 0 has no archived entry that was booked after 2026-10" in hindrances(1)[0]
    ledgers.call("2026-11-01")
    ledgers.rate()
    assert [] == hindrances(1)
    assert ["shard 1"] == [problem[:7] for problem in hindrances(2)]
    (beyond,) = hindrances(0)
    assert beyond.startswith("the archive has entries of shard 0, and the store has 0: set [store] shards; or, ")


def test_a_store_that_is_another_one_says_nothing(ledgers: Ledgers) -> None:
    """One that lost its tail, or was begun anew, may book October once more."""
    ledgers.call("2026-10-05")
    ledgers.call("2026-10-06")
    ledgers.rate()
    ledgers.client.xdel(LEDGER, "2-0")

    with pytest.raises(IntegrityError):
        ledgers.close_period("2026-10")
    assert not (ledgers.path / "closes").exists()


def test_times_that_go_back_within_a_ledger_are_refused(ledgers: Ledgers) -> None:
    """Then nobody can say where a month ends."""
    ledgers.call("2026-10-05")
    ledgers.call("2026-10-04")
    ledgers.rate()

    with pytest.raises(IntegrityError, match="entry 0:2 was booked before the one before it"):
        ledgers.close_period("2026-10")


def test_the_zone_cannot_change_once_a_month_is_closed(ledgers: Ledgers) -> None:
    """Hours would be of two months, or of none."""
    ledgers.call("2026-10-05")
    ledgers.rate()
    closed(ledgers, "2026-10")

    ledgers.tz = "Europe/Berlin"
    with pytest.raises(PolicyError, match=r"billing\.tz: 2026-10 was closed in 'UTC'"):
        ledgers.rows()


# ── What comes later ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_booked_about_a_closed_month_is_a_correction_in_the_next(ledgers: Ledgers) -> None:
    """A correction, and usage that came after its call had expired; what is of November itself is none."""
    call = ledgers.call("2026-10-05", "steep", MTOK)
    lost = ledgers.call("2026-10-31T23:50", kind="expired", usage={}, reservation_id="lost")
    ledgers.call("2026-11-01T00:01", kind="expired", usage={}, reservation_id="other")
    ledgers.rate()
    october = closed(ledgers, "2026-10")
    again: dict[str, Any] = {"kind": "late", "after": "expired", "at": lost.reserved_at}
    ledgers.call(model="steep", usage=MTOK, booked_at=at_ms("2026-11-02"), reservation_id="lost", **again)
    again["at"] = at_ms("2026-10-31T23:59")
    ledgers.call(model="steep", usage=MTOK, booked_at=at_ms("2026-11-03"), reservation_id="other", **again)
    ledgers.correction(call, at_ms("2026-11-04"), {"input_tokens": -200_000})
    ledgers.call("2026-11-05", "steep", MTOK)
    ledgers.rate()

    half = Decimal("0.5")
    assert {
        ("2026-10", ""): half,
        ("2026-11", ""): 2 * half,
        ("2026-11", "2026-10"): half - Decimal("0.1"),
    } == by_period(ledgers)
    november = closed(ledgers, "2026-11")
    assert {"": 2 * half, "2026-10": half - Decimal("0.1")} == {
        total.corrects: Decimal(total.list_cost) for total in november.totals
    }
    assert [october, november] == closes_of(ledgers.path)
    assert [] == ledgers.problems()


def test_a_correction_within_an_open_month_is_none(ledgers: Ledgers) -> None:
    """Nobody was billed yet; once the month before is closed, what touches it is one."""
    call = ledgers.call("2026-10-05", "steep", MTOK)
    ledgers.correction(call, at_ms("2026-10-06"), {"input_tokens": -200_000})
    ledgers.correction(call, at_ms("2026-11-02"), {"input_tokens": -200_000})
    ledgers.rate()
    assert {("2026-10", ""), ("2026-11", "")} == set(by_period(ledgers))

    closed(ledgers, "2026-10")

    assert {("2026-10", ""), ("2026-11", "2026-10")} == set(by_period(ledgers))


def test_a_rating_that_is_posted_after_the_close_corrects_it_in_the_month_of_its_posting(ledgers: Ledgers) -> None:
    """And what is not closed yet is simply posted where it belongs."""
    ledgers.call("2026-09-05", usage=MTOK)
    ledgers.call("2026-10-05", usage=MTOK)
    ledgers.call("2026-11-05", usage=MTOK)
    ledgers.rate()
    closed(ledgers, "2026-10")

    ledgers.rate_again(DEARER, at_ms("2026-11-20"))

    one, three = Decimal(1), Decimal(3)
    assert {
        ("2026-09", ""): three + one,
        ("2026-10", ""): three,
        ("2026-11", ""): three + one,
        ("2026-11", "2026-10"): one,
    } == by_period(ledgers)
    assert 8 == listed(closed(ledgers, "2026-11")) + listed(closes_of(ledgers.path)[0])
    ledgers.rate_again(BOOK, at_ms("2026-11-21"))
    assert {
        ("2026-09", ""): three,
        ("2026-10", ""): three,
        ("2026-11", ""): three + one,
        ("2026-11", "2026-10"): one,
        ("2026-12", "2026-10"): -one,
        ("2026-12", "2026-11"): -one,
    } == by_period(ledgers), "a clock that is behind posts nothing into a closed month"
    assert [] == ledgers.problems()


def test_an_entry_that_a_clock_set_back_books_into_a_closed_month_is_of_the_next(ledgers: Ledgers) -> None:
    """It was not there when the month was closed, so it is nowhere in it."""
    ledgers.call("2026-10-05", "steep", MTOK)
    ledgers.rate()
    october = closed(ledgers, "2026-10")
    ledgers.call("2026-10-31T23:59", "steep", MTOK)

    ledgers.rate()

    assert {("2026-10", ""): Decimal("0.5"), ("2026-11", "2026-10"): Decimal("0.5")} == by_period(ledgers)
    assert [(at_ms("2026-11-01"),)] == ledgers.query("SELECT DISTINCT booked_at_ms FROM rows WHERE n = 2")
    assert [october] == closes_of(ledgers.path)
    november = closed(ledgers, "2026-11")
    assert (2, {"settled": 1}) == (november.shards[0].last, november.shards[0].entries)
    assert [] == ledgers.problems()


def test_a_late_usage_belongs_to_the_call_before_it_not_to_one_that_took_its_id_later(ledgers: Ledgers) -> None:
    """Ids are remembered for a day; then a caller may give them again."""
    lost = ledgers.call("2026-10-31T23:50", kind="expired", usage={}, reservation_id="lost")
    late: dict[str, Any] = {"kind": "late", "after": "expired", "reservation_id": "lost", "at": lost.reserved_at}
    ledgers.call(model="steep", usage=MTOK, booked_at=at_ms("2026-11-01"), **late)
    ledgers.call("2026-11-03", kind="expired", usage={}, reservation_id="lost")
    ledgers.rate()

    closed(ledgers, "2026-10")

    assert {("2026-11", "2026-10")} == set(by_period(ledgers))


# ── Once, and never changed ───────────────────────────────────────────────────────────────────────────────────────────


def settings_of(ledgers: Ledgers) -> list[str]:
    ledgers.settings.write_text(
        '[store]\nurl = "redis://127.0.0.1:1/0"\nshards = 1\n[billing]\narchive = "archive"\nsegment_entries = 4\n'
    )
    return ["--config", str(ledgers.settings)]


def test_closing_again_changes_nothing_and_says_so(ledgers: Ledgers, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever repeats it after a crash is told that it is done."""
    ledgers.call("2026-10-05")
    ledgers.call("2026-11-05")
    ledgers.rate()
    words = ["close", "2026-10", "--offline", *settings_of(ledgers)]
    assert 0 == main(words)
    assert "closed 2026-10 (2026-10-01T00:00+00:00 to 2026-11-01T00:00+00:00)" in capsys.readouterr().out
    before = ledgers.files()

    assert 0 == main(words)

    assert "2026-10 was closed already" in capsys.readouterr().out
    assert before == ledgers.files()
    assert 0 == main([*words, "--json"])
    assert json.loads(capsys.readouterr().out)["digest"] == closes_of(ledgers.path)[0].digest
    assert 0 == main(["close", "--list", *settings_of(ledgers)])
    assert closes_of(ledgers.path)[0].digest[:16] in capsys.readouterr().out


def test_hindrances_end_with_3_and_are_told(ledgers: Ledgers, capsys: pytest.CaptureFixture[str]) -> None:
    """A cron job can try again tomorrow."""
    ledgers.call("2026-10-05", "nobody's")
    ledgers.rate()
    words = ["close", "2026-10", "--offline", *settings_of(ledgers)]

    assert 3 == main(words)
    assert "2026-10 cannot be closed: shard 0 has no archived entry" in capsys.readouterr().err
    ledgers.call("2026-11-05", "nobody's")
    ledgers.rate()
    assert 3 == main([*words, "--strict", "--json"])
    assert ["1 rows of it have no price"] == json.loads(capsys.readouterr().out)["hindrances"]
    assert not (ledgers.path / "closes").exists()
    assert 1 == main(["close", "2026-10", *settings_of(ledgers)]), "nobody serves that store"
    assert 2 == main(["close", *settings_of(ledgers)])
    assert 2 == main(["close", "2026-10", "--list", *settings_of(ledgers)])
    assert 0 == main(words)
    assert "have no price: the amounts are a floor" in capsys.readouterr().out


def test_settlements_that_wait_in_the_journal_are_told_of(
    ledgers: Ledgers, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """They will be of a later month whatever is done, so that nothing waits for them unless that is wanted."""
    ledgers.call("2026-10-05")
    ledgers.call("2026-11-05")
    ledgers.rate()
    words = ["close", "2026-10", "--offline", *settings_of(ledgers)]
    text = ledgers.settings.read_text()
    ledgers.settings.write_text(text.replace("shards = 1\n", 'shards = 1\njournal = "waits"\n'))
    journal = Journal(ledgers.settings.parent / "waits")
    for name in ("r1", "r2"):
        journal.append(Settlement(tenant="acme", reservation_id=name, usage=Usage(input_tokens=1)))

    assert 3 == main([*words, "--strict"])

    assert f"2026-10 cannot be closed: usage of 2 calls waits in {journal.path}" in capsys.readouterr().err
    assert not (ledgers.path / "closes").exists()
    assert 0 == main([*words, "--json"])
    ran = capsys.readouterr()
    assert f"warning: usage of 2 calls waits in {journal.path}: it is not in the ledger yet" in ran.err
    assert json.loads(ran.out)["closed"]


def test_nothing_is_said_of_a_journal_in_which_nothing_waits(
    ledgers: Ledgers, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor of one that nobody has needed yet."""
    ledgers.call("2026-10-05")
    ledgers.call("2026-11-05")
    ledgers.rate()
    words = ["close", "2026-10", "--offline", "--strict", *settings_of(ledgers)]
    text = ledgers.settings.read_text()
    ledgers.settings.write_text(text.replace("shards = 1\n", 'shards = 1\njournal = "waits"\n'))

    assert 0 == main(words)
    assert "" == capsys.readouterr().err


def to_october(ledgers: Ledgers) -> list[str]:
    """The clock is in October of 2026; and the words that close that month."""
    ledgers.clock.advance(ms=at_ms("2026-10-05") - ledgers.clock.now_ms)
    return ["close", "2026-10", "--offline", *settings_of(ledgers)]


@pytest.mark.parametrize("told", ["settled", "recorded"])
def test_calls_told_again_after_the_retention_are_told_of_until_they_are_corrected(
    ledgers: Ledgers, capsys: pytest.CaptureFixture[str], told: str
) -> None:
    """The store has forgotten them, and refuses no usage: so they are booked again."""
    words = to_october(ledgers)
    meter, attributes, usage = (
        ledgers.meter,
        {"provider": "anthropic", "model": "plain"},
        Usage(input_tokens=7, output_tokens=0),
    )
    meter.reserve("acme", attributes, reservation_id="twice")

    def tell() -> Any:
        if told == "settled":
            return meter.settle("acme", "twice", usage, attributes=attributes)
        return meter.record("acme", attributes, usage, record_id="noted")

    first = tell()
    assert first.n == tell().n
    meter.record("acme", attributes, usage, record_id="once")
    ledgers.clock.advance(ms=25 * 3_600_000)
    meter.sweep()
    again = tell()
    assert again.n > first.n
    meter.reserve("acme", attributes, reservation_id="expired", lease_ms=1000)
    for _ in range(2):
        ledgers.clock.advance(ms=25 * 3_600_000)
        meter.sweep()
    meter.reserve("acme", attributes, reservation_id="twice", lease_ms=1000)  # the id is used for another call
    ledgers.clock.advance(ms=2000)
    meter.sweep()
    assert "expired" == meter.settle("acme", "twice", usage, attributes=attributes).after
    late = meter.settle("acme", "expired", usage, attributes=attributes)
    assert ("late", "unknown") == (late.kind, late.after), "and it is in it once"
    ledgers.clock.advance(ms=40 * 24 * 3_600_000)
    meter.record("acme", attributes, usage, record_id="once")  # which is for November's close to tell
    ledgers.rate()

    assert 3 == main([*words, "--strict"])

    name = "noted" if told == "recorded" else "twice"
    problem = f"1 calls are in the ledger twice, and billed twice: acme's {name} as 0:{first.n} and 0:{again.n}; they"
    assert f"cannot be closed: {problem}" in capsys.readouterr().err
    meter.adjust(again, {"input_tokens": -7}, "told twice")
    ledgers.rate()
    assert 0 == main([*words, "--strict"])
    assert "twice" not in capsys.readouterr().err


@pytest.mark.parametrize("again", ["settled", "late", "cancelled"])
def test_a_call_that_was_settled_again_after_a_loss_is_told_of(
    ledgers: Ledgers, capsys: pytest.CaptureFixture[str], again: str
) -> None:
    """The store came back with the call still open, where it was settled again, or ended before it was.

    Both settlements are in the archive, and nobody is stopped.
    """
    words = to_october(ledgers)
    attributes, usage = {"provider": "anthropic", "model": "plain"}, Usage(input_tokens=7, output_tokens=0)
    ledgers.meter.record("acme", attributes, usage)
    ledgers.meter.reserve("acme", attributes, reservation_id="twice", lease_ms=60_000)
    kept = {key: ledgers.client.dump(key) for key in ledgers.client.scan_iter()}
    ledgers.meter.settle("acme", "twice", usage)
    ledgers.rate()
    ledgers.client.flushall()
    for key, value in kept.items():
        ledgers.client.restore(key, 0, value)
    ledgers.clock.advance(ms=120_000 if again == "late" else 1000)
    ledgers.meter.sweep()
    if again == "cancelled":
        ledgers.meter.cancel("acme", "twice")
    ledgers.meter.settle("acme", "twice", usage)
    with ledgers.archive() as archive:
        loss = loss_of([archive], ledgers.run, 0)
        assert loss is not None
        fork(loss, ledgers.run)
    ledgers.clock.advance(ms=40 * 24 * 3_600_000)
    ledgers.meter.record("acme", attributes, usage)
    ledgers.rate()

    assert 0 == main(words)

    n = 3 if again == "settled" else 5  # behind that of how it ended, which was moved as well
    assert f"warning: 1 calls are in the ledger twice, and billed twice: acme's twice as 0:2 and 0:{n}" in (
        capsys.readouterr().err
    )


def test_a_correction_of_another_entry_of_the_same_number_does_not_hide_a_call_told_twice(ledgers: Ledgers) -> None:
    """The ledger lost that entry, and went on with its number."""
    at = at_ms("2026-10-05")
    ledgers.call(at, kind="recorded", reservation_id="twice")
    lost = ledgers.call(at, kind="recorded", reservation_id="lost")
    ledgers.rate()
    ledgers.lose(1, "1600000009999")
    ledgers.call(at + 1, kind="recorded", reservation_id="twice")
    assert ledgers.export(Accepted(epochs={0: "1600000009999"})).problem is None
    ledgers.correction(lost, at + 2, {"input_tokens": -5})
    ledgers.rate()

    with ledgers.archive() as archive:
        found = repeats_of(Postings(archive, ledgers.tz), at, at + 10)

    assert [Repeat("acme", "twice", "0:1", "0:2")] == found


def test_a_close_that_was_changed_is_found(ledgers: Ledgers, capsys: pytest.CaptureFixture[str]) -> None:
    """By its digest; and if that was made anew, by what the archive comes to, or by the close behind it."""
    ledgers.call("2026-10-05")
    ledgers.call("2026-11-05")
    ledgers.call("2026-12-05")
    ledgers.rate()
    close = closed(ledgers, "2026-10")
    file = ledgers.path / "closes" / "2026-10.json"
    kept = file.read_bytes()
    file.write_bytes(kept.replace(b"1000000", b"1000001").replace(b'"rows": 1', b'"rows": 2'))
    assert any("2026-10.json is not what was written" in problem for problem in ledgers.problems())
    assert 5 == main(["close", "2026-10", "--offline", *settings_of(ledgers)])

    total = msgspec.structs.replace(close.totals[0], list_cost="1.000000000000")
    forged = msgspec.structs.replace(close, totals=[total]).sealed()
    file.write_bytes(encoded(forged))
    assert [f"{file}: its totals are not what the archive's files come to"] == ledgers.problems()
    assert 5 == main(["close", "2026-10", "--offline", *settings_of(ledgers)])
    assert "totals differ" in capsys.readouterr().err

    shard = msgspec.structs.replace(close.shards[0], link="0" * 64)
    file.write_bytes(encoded(msgspec.structs.replace(close, shards=[shard]).sealed()))
    assert any("entry 0:1 is not in the archive as it was closed" in problem for problem in ledgers.problems())

    file.write_bytes(kept)
    assert [] == ledgers.problems()
    closed(ledgers, "2026-11")
    file.write_bytes(encoded(msgspec.structs.replace(close, closed_at_ms=1).sealed()))
    assert any("2026-11.json does not follow the close before it" in problem for problem in ledgers.problems())
    file.unlink()
    with pytest.raises(IntegrityError, match=r"2026-11\.json does not follow"):
        closes_of(ledgers.path)


# A closer that kills itself at a step.
KILLED = """
import os, signal, sys
from meterlib.billing.postings import closing
from meterlib.cli import main

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

link = os.link
def link_and_die(*arguments):
    link(*arguments)
    die()

step = sys.argv[1]
if step == "before the write":
    closing.Closing.write = die
elif step == "after the write":
    closing.synced_digest = die
elif step == "after the sync":
    os.link = die
elif step == "after the link":
    os.link = link_and_die
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("step", ["before the write", "after the write", "after the sync", "after the link"])
def test_a_closer_that_is_killed_leaves_a_whole_record_or_none(ledgers: Ledgers, step: str) -> None:
    """And the next one finds its work done, or does it."""
    ledgers.call("2026-10-05")
    ledgers.call("2026-11-05")
    ledgers.rate()
    words = ["close", "2026-10", "--offline", *settings_of(ledgers)]

    killed = subprocess.run([sys.executable, "-c", KILLED, step, *words], cwd=ROOT, check=False, timeout=60)

    assert -9 == killed.returncode
    assert (1 if step == "after the link" else 0) == len(closes_of(ledgers.path))
    assert 0 == main(words)
    assert 1 == len(closes_of(ledgers.path))
    assert [] == ledgers.problems()


def test_of_two_closers_one_is_first_and_both_say_the_same(ledgers: Ledgers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second takes the first one's record for its own."""
    ledgers.call("2026-10-05")
    ledgers.rate()
    link = os.link
    firsts: list[Any] = []

    def link_late(*arguments: Any) -> None:
        monkeypatch.setattr(os, "link", link)
        firsts.append(closed(ledgers, "2026-10", 2_000_000_000_001))
        link(*arguments)

    monkeypatch.setattr(os, "link", link_late)

    second = closed(ledgers, "2026-10")

    assert firsts == [second]
    assert 2_000_000_000_001 == second.closed_at_ms
    assert second.digest == digest_of(second)


def test_the_words_of_the_store_are_those_of_each_shard(ledgers: Ledgers) -> None:
    """One shard that lags behind is enough to wait."""
    ledgers.call("2026-10-05")
    ledgers.rate()
    over = at_ms("2026-11-01")
    with ledgers.archive() as archive:
        closing = Closing(Postings(archive), "2026-10")

        assert [] == closing.hindrances([Word(0, over, 1), Word(1, over, 0)], 2)
        assert ["entries 1:1-3 are not exported; `meterlib export run` does it"] == closing.hindrances(
            [Word(0, over, 1), Word(1, over, 3)], 2
        )
        assert "is not over" in closing.hindrances([Word(0, over, 1), Word(1, over - 1, 0)], 2)[0]


def test_totals_of_a_close_are_those_of_its_entries(ledgers: Ledgers) -> None:
    """Whoever adds up `rate` of October's entries finds the same."""
    for day in range(1, 31):
        ledgers.call(f"2026-10-{day:02}", "steep" if day % 3 else "plain", tokens(input_tokens=day * 4_000))
    ledgers.rate()

    close = closed(ledgers, "2026-10")

    rows = [row for one in ledgers.entries for row in rate(one, prices().books, TERMS["acme"])]
    assert [str(sum(row.billed_cost for row in rows if row.billed_cost is not None))] == [
        total.billed_cost for total in close.totals
    ]
