"""The report's sums and its word on completeness, held against plainer ways to work them out."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterlib import InvalidInput, LedgerEntry
from meterlib.billing.reports.estimates import Accuracy, Estimates
from meterlib.billing.reports.report import COLUMNS, Completeness, Gap, Report, Row, ShardCheck, fold
from meterlib.core.ledger import counts_of
from meterlib.core.usage import CacheCreation, Iteration, OutputTokensDetails, ServerToolUse, Usage

BERLIN = "Europe/Berlin"


def at_ms(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp() * 1000)


def entry(n: int = 1, booked_at: int | str = "2026-03-01T12:00Z", **fields: Any) -> LedgerEntry:
    plain: dict[str, Any] = {
        "shard": 0,
        "n": n,
        "kind": "settled",
        "reservation_id": f"r{n}",
        "tenant": "acme",
        "attributes": {},
        "funding": "hosted",
        "usage": {},
        "quality": "final",
        "reserved_at": 0,
        "booked_at": booked_at if isinstance(booked_at, int) else at_ms(booked_at),
        "epoch": "0000000000001",
    }
    return LedgerEntry(**plain | fields)


def groups(report: Report, column: str) -> dict[Any, int]:
    return {row.group[0] if len(row.group) == 1 else row.group: row.sums[column] for row in report.rows()}


# ── Sums ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

counts = st.none() | st.integers(0, 10**12)
caches = st.builds(CacheCreation, ephemeral_5m_input_tokens=counts, ephemeral_1h_input_tokens=counts)
passes = st.builds(
    Iteration,
    type=st.sampled_from(["message", "compaction", "advisor_message"]),
    model=st.none() | st.sampled_from(["haiku", "opus"]),
    input_tokens=counts,
    cache_read_input_tokens=counts,
    cache_creation=st.none() | caches,
    output_tokens=counts,
)
usages = st.builds(
    Usage,
    input_tokens=counts,
    cache_creation_input_tokens=counts,
    cache_read_input_tokens=counts,
    output_tokens=counts,
    cache_creation=st.none() | caches,
    output_tokens_details=st.none() | st.builds(OutputTokensDetails, thinking_tokens=counts),
    server_tool_use=st.none()
    | st.builds(ServerToolUse, web_search_requests=counts, web_fetch_requests=counts, code_execution_requests=counts),
    service_tier=st.none() | st.just("standard"),
    iterations=st.lists(passes, max_size=2).map(tuple),
    amounts=st.dictionaries(st.sampled_from(["cost_nanousd", "pages"]), st.integers(0, 10**15), max_size=2),
).map(counts_of)
differences: st.SearchStrategy[dict[str, object]] = st.dictionaries(
    st.sampled_from(["input_tokens", "output_tokens", "new_tokens"]), st.integers(-(10**9), 10**9), min_size=1
)


@st.composite
def entries(draw: st.DrawFn) -> LedgerEntry:
    kind = draw(st.sampled_from(["settled", "cancelled", "expired", "late", "recorded", "adjusted"]))
    used = {} if kind in ("cancelled", "expired") else draw(differences if kind == "adjusted" else usages)
    return entry(
        kind=kind,
        usage=used,
        tenant=draw(st.sampled_from(["acme", "globex"])),
        attributes=draw(
            st.dictionaries(st.sampled_from(["provider", "model", "key", "calls"]), st.sampled_from(["opus", "x"]))
        ),
        funding=draw(st.sampled_from(["hosted", "own"])),
        quality=draw(st.sampled_from(["final", "partial", "estimated"])),
        booked_at=draw(st.integers(at_ms("2026-10-24T20:00Z"), at_ms("2026-10-25T04:00Z"))),
    )


class Item(NamedTuple):
    """An amount, and all that it could be grouped by."""

    labels: dict[str, str | None]
    column: str
    amount: int


PLACES = {
    "cache_creation": ("ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens"),
    "output_tokens_details": ("thinking_tokens",),
    "server_tool_use": ("web_search_requests", "web_fetch_requests", "code_execution_requests"),
}
TOKENS = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens")


def items_of(one: LedgerEntry, tz: str) -> list[Item]:
    """The plain way: every amount of an entry on its own, with every label it has."""
    local = datetime.fromtimestamp(one.booked_at / 1000, UTC).astimezone(ZoneInfo(tz))
    attributes = {name: one.attributes.get(name) for name in ("provider", "model", "key")}
    labels = {
        "tenant": one.tenant, "kind": one.kind, "funding": one.funding, "quality": one.quality, **attributes,
        "attribute:calls": one.attributes.get("calls"), "day": f"{local:%Y-%m-%d}",
        "hour": local.replace(minute=0, second=0, microsecond=0).isoformat(timespec="minutes"),
    }  # fmt: skip
    found: list[tuple[dict[str, str | None], Any]] = [(labels, one.usage)]
    own: Any = one.usage.get("iterations", [])
    found += [
        (labels | {"model": single.get("model", labels["model"])}, single)
        for single in own
        if single.get("type", "message") != "message"
    ]
    items = [
        Item(owner, column, part[column])
        for owner, usage in found
        for part, columns in [(usage, TOKENS), *((usage.get(place, {}), PLACES[place]) for place in PLACES)]
        for column in columns
        if column in part
    ]
    amounts: Any = one.usage.get("amounts", {})
    items += [Item(labels, f"amounts.{unit}", amount) for unit, amount in amounts.items()]
    if "new_tokens" in one.usage:
        items.append(Item(labels, "usage.new_tokens", one.usage["new_tokens"]))  # type: ignore[arg-type]
    called = one.kind in ("settled", "late", "recorded")
    items.append(Item(labels, "calls", int(called)))
    items.append(Item(labels, "partial", int(called and one.quality == "partial")))
    items += [Item(labels, kind, int(one.kind == kind)) for kind in ("late", "expired", "cancelled", "adjusted")]
    return items


WORDS = ["tenant", "provider", "model", "kind", "funding", "quality", "day", "hour", "key", "attribute:calls"]


@given(
    booked=st.lists(entries(), max_size=12),
    by=st.lists(st.sampled_from(WORDS), unique=True, max_size=3),
    tz=st.sampled_from(["UTC", BERLIN, "Asia/Kathmandu"]),
)
def test_every_grouping_sums_up_to_what_the_entries_say(booked: list[LedgerEntry], by: list[str], tz: str) -> None:
    """No token is lost, and none counted twice, however a report is cut."""
    expected: dict[tuple[Any, ...], dict[str, int]] = {}
    for one in booked:
        for item in items_of(one, tz):
            sums = expected.setdefault(tuple(item.labels[name] for name in by), {})
            sums[item.column] = sums.get(item.column, 0) + item.amount

    report = fold(booked, Report(by, tz=tz))

    assert {group: {k: v for k, v in sums.items() if v} for group, sums in expected.items()} == {
        row.group: {column: amount for column, amount in row.sums.items() if amount} for row in report.rows()
    }
    assert report.total() == {column: sum(row.sums[column] for row in report.rows()) for column in report.columns}


@given(booked=st.lists(entries(), max_size=12), cut=st.integers(0, 12))
def test_order_and_portions_do_not_matter(booked: list[LedgerEntry], cut: int) -> None:
    """A report does not depend on which shard is read first."""
    by = ["tenant", "hour"]

    assert fold(booked, Report(by)).rows() == fold([*booked[cut:], *booked[:cut]], Report(by)).rows()


def test_a_report_has_all_columns_in_the_same_order_whatever_was_used() -> None:
    """Programs that read a report need not look for their columns; new ones come behind."""
    used = {"input_tokens": 1, "amounts": {"pages": 2}, "speech": {"minutes": 3}}

    report = fold([entry(usage=used)], Report(["tenant"]))

    assert (*COLUMNS, "amounts.pages", "usage.speech.minutes") == report.columns
    assert [Row(group=("acme",), sums=dict.fromkeys(report.columns, 0) | {
        "calls": 1, "input_tokens": 1, "amounts.pages": 2, "usage.speech.minutes": 3,
    })] == report.rows()  # fmt: skip


def test_a_correction_is_added_with_its_sign() -> None:
    """Adjusting an entry changes the report by the difference, and is visible as such."""
    booked = [
        entry(1, usage={"output_tokens": 100, "server_tool_use": {"web_search_requests": 2}}),
        entry(2, kind="adjusted", usage={"output_tokens": -30, "server_tool_use": {"web_search_requests": -1}}),
    ]

    total = fold(booked, Report()).total()

    assert (1, 1, 70, 1) == (
        total["calls"],
        total["adjusted"],
        total["output_tokens"],
        total["web_search_requests"],
    )


def test_an_advisors_tokens_are_its_own_models() -> None:
    """What another model did within a call is priced as that model's, and is no call of its own."""
    advice = {"type": "advisor_message", "model": "opus", "input_tokens": 70, "output_tokens": 7}
    told = {"type": "message", "input_tokens": 5, "output_tokens": 1}
    used = {"input_tokens": 5, "output_tokens": 1, "iterations": [told, advice]}

    report = fold([entry(attributes={"model": "haiku"}, usage=used)], Report(["model"]))

    assert {"haiku": 5, "opus": 70} == groups(report, "input_tokens")
    assert {"haiku": 1, "opus": 0} == groups(report, "calls")


def test_a_call_without_the_attribute_stands_in_a_row_of_its_own_at_the_end() -> None:
    """Usage that cannot be told apart is shown and not dropped."""
    booked = [entry(1), entry(2, attributes={"team": "red"})]

    assert [(("red",)), (None,)] == [row.group for row in fold(booked, Report(["team"])).rows()]


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("team", "team"),
        ("attribute:team", "team"),
        ("attribute:tenant", "attribute:tenant"),
        ("calls", "attribute:calls"),
        ("a.b", "attribute:a.b"),
    ],
)
def test_an_attribute_never_takes_the_name_of_another_column(word: str, name: str) -> None:
    """The columns of a report have different names, whatever attributes are called."""
    assert (name,) == Report([word]).by


@pytest.mark.parametrize("by", [["tenant", "tenant"], ["team", "attribute:team"], [""], ["a b"], ["attribute:"]])
def test_what_cannot_be_grouped_by_is_refused(by: Sequence[str]) -> None:
    """A mistyped grouping is an error, and no report of something else."""
    with pytest.raises(InvalidInput, match="by: "):
        Report(by)


# ── Time ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_range_is_half_open() -> None:
    """Reports of one month and the next have every entry once."""
    march, april = at_ms("2026-03-01T00:00Z"), at_ms("2026-04-01T00:00Z")
    booked = [entry(n, booked_at) for n, booked_at in enumerate([march - 1, march, april - 1, april], 1)]

    assert 2 == fold(booked, Report(since_ms=march, until_ms=april)).entries
    assert 1 == fold(booked, Report(until_ms=march)).entries
    assert 1 == fold(booked, Report(since_ms=april)).entries


@pytest.mark.parametrize(
    ("moment", "day"),
    [
        ("2026-03-28T23:00+00:00", "2026-03-29"),  # the day of 23 hours: from 00:00+01:00 …
        ("2026-03-29T21:59+00:00", "2026-03-29"),  # … to 24:00+02:00
        ("2026-03-29T22:00+00:00", "2026-03-30"),
        ("2026-10-24T22:00+00:00", "2026-10-25"),  # the day of 25 hours: from 00:00+02:00 …
        ("2026-10-25T22:59+00:00", "2026-10-25"),  # … to 24:00+01:00
        ("2026-10-25T23:00+00:00", "2026-10-26"),
    ],
)
def test_days_are_the_zones_own_when_the_clocks_change(moment: str, day: str) -> None:
    """A day has 23 or 25 hours where the customer's has."""
    assert {day: 1} == groups(fold([entry(booked_at=moment)], Report(["day"], tz=BERLIN)), "calls")


def test_the_hour_that_comes_twice_is_two_rows_in_order() -> None:
    """Nothing of the repeated hour is merged or misplaced."""
    quarters = [entry(n, at_ms("2026-10-24T23:00Z") + n * 900_000) for n in range(16)]

    report = fold(reversed(quarters), Report(["hour"], tz=BERLIN))

    assert [
        "2026-10-25T01:00+02:00",
        "2026-10-25T02:00+02:00",
        "2026-10-25T02:00+01:00",
        "2026-10-25T03:00+01:00",
    ] == [row.group[0] for row in report.rows()]
    assert {4} == set(groups(report, "calls").values())


def test_a_zone_that_is_none_is_refused() -> None:
    """A mistyped zone is an error, and not UTC."""
    with pytest.raises(InvalidInput, match="'Europe/Berlni' is no IANA time zone"):
        Report(tz="Europe/Berlni")


# ── Completeness ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Heads(NamedTuple):
    """A shard's word on its end: the state's, the ledger's, and how many reservations are open."""

    last_number: int
    ledger_last: int
    open_reservations: int = 0


def ledger(numbers: Sequence[int]) -> list[LedgerEntry]:
    """Entries with these numbers, each booked at its number of seconds."""
    return [entry(n, n * 1000, kind="expired" if n % 10 == 0 else "settled") for n in numbers]


def checked(numbers: Sequence[int], before: Heads, after: Heads | None = None, **time_range: Any) -> Any:
    check = ShardCheck(3, **time_range)
    for one in ledger(numbers):
        if not check.see(one):
            break
    return check.result(before, after or before)


def test_a_ledger_without_a_hole_is_complete() -> None:
    """The report says from where to where it has read, and that nothing is missing in between."""
    result = checked(range(1, 13), Heads(12, 12, 4))

    assert (True, 12, 1, 12, (), 12, 12, 4, 1, 0) == (
        result.complete,
        result.entries,
        result.first,
        result.last,
        result.gaps,
        result.state_last,
        result.ledger_last,
        result.open_reservations,
        result.expired,
        result.late,
    )


@pytest.mark.parametrize(
    ("numbers", "gaps"),
    [
        ([1, 2, 5], ["3-4"]),
        ([1, 3, 5], ["2", "4"]),
        ([4, 5], ["1-3"]),
        ([1, 2, 3], ["4-5"]),
        ([], ["1-5"]),
        ([2, 4], ["1", "3", "5"]),
    ],
)
def test_whatever_is_missing_is_named(numbers: list[int], gaps: list[str]) -> None:
    """Entries that were deleted at the front, in the middle or at the end leave a gap that can be seen."""
    result = checked(numbers, Heads(5, numbers[-1] if numbers else 0))

    assert gaps == [str(gap) for gap in result.gaps]
    assert not result.complete
    assert not Completeness.of([checked([1], Heads(1, 1)), result]).complete


@pytest.mark.parametrize(
    ("since", "until", "gaps"),
    [
        (None, None, ["1", "4-5", "8"]),
        (7, None, ["8"]),  # entry 6 stands before 7, and was booked earlier
        (6, None, ["4-5", "8"]),  # what stood between 3 and 6 may have been booked at 6
        (None, 3, ["1"]),  # entry 3 is too late, and so is all behind it
        (None, 4, ["1", "4-5"]),
        (4, 6, ["4-5"]),
        (7, 8, ["8"]),
    ],
)
def test_a_gap_counts_if_it_may_lie_in_the_time_asked_for(
    since: int | None, until: int | None, gaps: list[str]
) -> None:
    """March is complete even if an entry of May is missing; and what may be March's is never passed over."""
    time_range: Any = {"since_ms": since and since * 1000, "until_ms": until and until * 1000}
    found = checked([2, 3, 6, 7], Heads(8, 7), **time_range)

    assert gaps == [str(gap) for gap in found.gaps]


def test_reading_may_begin_at_the_entry_before() -> None:
    """A report of the last hour need not read the years before it."""
    check = ShardCheck(0, since_ms=90_000, after=87)
    for one in ledger([88, 90, 91]):
        check.see(one)
    result = check.result(Heads(91, 91), Heads(91, 91))

    assert ((Gap(first=89, last=89),), 2, 90) == (result.gaps, result.entries, result.first)


def test_a_ledger_that_grows_meanwhile_is_complete() -> None:
    """Reports can be made while calls are served."""
    result = checked(range(1, 8), Heads(5, 6), Heads(9, 9))

    assert (True, 7, 7) == (result.complete, result.state_last, result.ledger_last)


def test_a_state_that_knows_less_than_the_ledger_is_told() -> None:
    """A state that was restored from an older backup than the ledger does not go unnoticed."""
    result = checked(range(1, 8), Heads(3, 7), Heads(3, 7))

    assert (True, 3, 7) == (result.complete, result.state_last, result.ledger_last)


def test_a_ledger_that_was_begun_anew_is_told() -> None:
    """Entries of two epochs are never taken for one unbroken ledger."""
    check = ShardCheck(0)
    for one in [entry(1, epoch="a"), entry(2, epoch="a"), entry(3, epoch="b")]:
        check.see(one)

    assert ("a", "b") == check.result(Heads(3, 3), Heads(3, 3)).epochs


@given(kept=st.sets(st.integers(1, 30)), since=st.integers(0, 31), until=st.integers(0, 31))
def test_every_hole_is_found_for_any_deletion(kept: set[int], since: int, until: int) -> None:
    """Whatever is deleted, an entry of the time asked for is either counted or reported missing."""
    numbers = sorted(kept)
    result = checked(numbers, Heads(30, max(kept, default=0)), since_ms=since * 1000, until_ms=until * 1000)
    missing = {n for gap in result.gaps for n in range(gap.first, gap.last + 1)}

    asked_for = {n for n in range(1, 31) if since <= n < until}
    assert asked_for <= missing | kept
    assert not missing & kept
    assert len(asked_for & kept) == result.entries


# ── Estimates ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def estimated(n: int, estimate: object, charged: object, **fields: Any) -> LedgerEntry:
    """A call of which so many input tokens were estimated and charged; None is not known."""
    plain = {
        "estimate": {} if estimate is None else {"input_tokens": estimate, "cache_read_input_tokens": 7},
        "usage": {} if charged is None else {"cache_creation_input_tokens": charged, "cache_read_input_tokens": 9},
    }
    return entry(n, **plain | fields)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=60), st.randoms())
def test_half_of_all_charges_are_at_most_the_median_of_their_estimates(
    pairs: list[tuple[int, int]], shuffle: Any
) -> None:
    """The quantiles are those of the calls, in whatever order these are read, and cache reads are no part of them."""
    booked = [estimated(n, estimate, charged) for n, (estimate, charged) in enumerate(pairs, 1)]
    shuffle.shuffle(booked)
    found = fold(booked, Estimates()).total()

    ratios = [max(charged, 1) / max(estimate, 1) for estimate, charged in pairs]
    assert len(pairs) == found.calls
    for part, value in ((0.5, found.median), (0.95, found.p95)):
        assert value in ratios
        assert sum(ratio <= value for ratio in ratios) >= part * len(ratios) > sum(ratio < value for ratio in ratios)


def test_groups_have_quantiles_of_their_own() -> None:
    """A model that is estimated badly does not hide behind the others."""
    booked = [
        estimated(n, 100, charged, attributes={"model": model})
        for n, (model, charged) in enumerate([("opus", 110), ("haiku", 90), ("opus", 300), ("opus", 120)], 1)
    ]
    report = fold(booked, Estimates(["model"]))

    assert [
        Accuracy(group=("haiku",), calls=1, median=0.9, p95=0.9),
        Accuracy(group=("opus",), calls=3, median=1.2, p95=3.0),
    ] == report.rows()
    assert Accuracy(group=(), calls=4, median=1.1, p95=3.0) == report.total()


@pytest.mark.parametrize(
    "left_out",
    [
        estimated(1, None, 5),
        estimated(1, 5, None),
        estimated(1, 5, None, usage={"input_tokens": 0, "output_tokens": 0}),
        estimated(1, 5, 5, quality="estimated"),
        estimated(1, 5, 5, kind="late"),
        estimated(1, 5, 5, kind="recorded"),
        estimated(1, 5, -5, kind="adjusted"),
        estimated(1, 5, None, kind="expired"),
        estimated(1, "five", 5),
        estimated(1, 5, 2**60),
    ],
)
def test_only_settled_calls_of_which_both_numbers_are_known_are_compared(left_out: LedgerEntry) -> None:
    """An estimate is never compared with itself, nor with nothing."""
    report = fold([left_out], Estimates(["tenant"]))

    assert (1, [], Accuracy(group=(), calls=0, median=None, p95=None)) == (
        report.entries,
        report.rows(),
        report.total(),
    )


def test_an_estimate_that_was_told_as_a_fact_goes_before_what_was_held() -> None:
    """A stream's hold is revised to the exact input, and a quota caps it; the estimate was another."""
    told = estimated(1, 150, 150, facts={"estimated_input_tokens": "100"})
    nonsense = estimated(2, 150, 150, facts={"estimated_input_tokens": "-1"})

    assert [1.5, 1.0] == [fold([one], Estimates()).total().median for one in (told, nonsense)]


def test_estimates_are_of_the_time_and_the_tenant_asked_for() -> None:
    """As every report."""
    booked = [estimated(1, 1, 1, tenant="globex"), estimated(2, 1, 2), estimated(3, 1, 3, booked_at=5)]

    assert 2.0 == fold(booked, Estimates(since_ms=6, tenant="acme")).total().p95
