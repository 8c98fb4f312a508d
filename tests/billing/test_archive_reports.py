"""Reports that DuckDB works out from an archive, held against plain sums in Python over the same entries and rows."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from meterlib import InvalidInput, LedgerEntry
from meterlib.billing.prices.terms import LIST, Terms
from meterlib.billing.rating.measures import passes_of
from meterlib.billing.rating.rated import RatedRow
from meterlib.billing.rating.rating import rate
from meterlib.billing.rating.rerating import compare
from meterlib.billing.reports.answers import Answer, Reader
from meterlib.billing.reports.cost import cost_report
from meterlib.billing.reports.estimates import Estimates
from meterlib.billing.reports.invoice import Invoice, invoice
from meterlib.billing.reports.limits import limits_report
from meterlib.billing.reports.query import COSTS, Query
from meterlib.billing.reports.report import contributions, fold, hour_text
from meterlib.billing.reports.usage import TOKEN_TYPES, UNSPLIT, usage_report
from meterlib.cli.report_tables import print_answer
from meterlib.core.money import ZERO, plus
from meterlib.core.periods import PeriodName, period_at
from tests.billing.money import at_ms, books, entries, entry, tokens
from tests.billing.reporting import Filed, posting, rated

BERLIN = "Europe/Berlin"
TERMS = {"acme": Terms.of("12.5%", "3%", "5%", "7%"), "o'brien": Terms.of(platform_fee="5%")}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("filed")


# ── Entries of every sort ─────────────────────────────────────────────────────────────────────────────────────────────

ZONES = ["UTC", BERLIN, "America/St_Johns", "Asia/Kathmandu", "Australia/Lord_Howe", "Pacific/Apia"]
EDGES = [
    *("2026-03-29T00:59:59.999", "2026-03-29T01:00", "2026-10-24T22:00", "2026-10-25T00:30", "2026-10-25T01:00"),
    *("2026-10-25T01:30", "2026-10-31T23:00", "2026-12-31T23:59:59.999", "2027-01-01", "2011-12-30T10:00"),
    *("2026-04-04T15:00", "2026-10-03T15:30", "2010-03-14T03:30:30", "2010-11-07T02:30:59", "2028-02-29T12:00"),
]
moments = st.sampled_from(EDGES).map(at_ms) | st.integers(at_ms("2010-01-01"), at_ms("2029-01-01"))
texts = st.sampled_from(["red", "blue", "a'b", 'q"r', "=1+1", "ü≠", "", "\\", "-"])
units = st.dictionaries(st.sampled_from(["cost_nanousd", "pages"]), st.integers(0, 2**53 - 1), max_size=2)
NEW = [{"new_tokens": 5}, {"server_tool_use": {"moon_flights": 2}}, {"requests": 3}, {"requests": 0}]
UNKNOWN = ("outcome.usage.new_tokens", "outcome.usage.server_tool_use.moon_flights", "outcome.usage.requests")


@st.composite
def any_entry(draw: st.DrawFn) -> LedgerEntry:
    one = draw(entries())
    usage = dict(one.usage) | draw(st.just({}) | st.sampled_from(NEW))
    if amounts := draw(units):
        usage["amounts"] = amounts
    kind = draw(st.sampled_from([one.kind, one.kind, "adjusted"]))
    if kind == "adjusted":
        usage = {"input_tokens": draw(st.integers(-5, 5)), "cache_creation_input_tokens": draw(st.integers(-5, 5))}
    if kind in ("cancelled", "expired"):
        usage = {}
    model = dict(one.attributes)["model"]
    attributes = draw(
        st.fixed_dictionaries({}, optional={"model": st.just(model), "provider": texts, "team": texts, "a.b": texts})
    )
    facts = {"model": draw(st.sampled_from(["plain", "steep"]))} if draw(st.booleans()) else {"request_id": "r"}
    if draw(st.booleans()):
        facts["estimated_input_tokens"] = draw(st.sampled_from(["7", "0", "100000", "many"]))
    reserved_at = draw(moments)
    return replace(
        one,
        kind=kind,
        usage=usage,
        attributes=attributes,
        facts=facts if kind in ("settled", "late", "recorded") else {},
        tenant=draw(st.sampled_from(["acme", "globex", "o'brien"])),
        estimate=draw(
            st.sampled_from([{}, {"input_tokens": 10}, {"cache_creation_input_tokens": 9, "output_tokens": 4}])
        ),
        reserved_at=draw(st.sampled_from([0, reserved_at])),
        booked_at=reserved_at + draw(st.sampled_from([0, 1, 999, 3_600_000])),
        shard=draw(st.integers(0, 2)),
    )


def numbered(several: Iterable[LedgerEntry]) -> list[LedgerEntry]:
    return [replace(one, n=n) for n, one in enumerate(several, 1)]


ledgers = st.lists(any_entry(), max_size=8).map(numbered)
WORDS = ["tenant", "provider", "model", "requested_model", "kind", "funding", "quality", "tier", "speed", "variant",
         "geo", "hour", "day", "week", "month", "team", "a.b", "attribute:tenant"]  # fmt: skip
queries = st.builds(
    Query,
    by=st.lists(st.sampled_from(WORDS), unique=True, max_size=3).map(tuple),
    tz=st.sampled_from(ZONES),
    tenant=st.none() | st.sampled_from(["acme", "o'brien"]),
    since_ms=st.none() | st.sampled_from(["2010-01-01", "2026-10-25T00:30"]).map(at_ms),
    until_ms=st.none() | st.sampled_from(["2026-10-25T01:00", "2027-01-01"]).map(at_ms),
    time_basis=st.sampled_from(["booked", "event"]),
)


# ── The same in plain Python ──────────────────────────────────────────────────────────────────────────────────────────


def event_ms(one: LedgerEntry) -> int:
    return one.reserved_at or one.booked_at


def moment_of(query: Query, one: LedgerEntry) -> int:
    return one.booked_at if query.time_basis == "booked" else event_ms(one)


def wanted(query: Query, one: LedgerEntry) -> bool:
    at = moment_of(query, one)
    early = query.since_ms is not None and at < query.since_ms
    late = query.until_ms is not None and at >= query.until_ms
    return not early and not late and query.tenant in (None, one.tenant)


def time_text(word: PeriodName, tz: str, at: int) -> str:
    period = period_at(word, tz, at)
    return hour_text(period.start_ms, tz) if word == "hour" else period.label


def served(one: LedgerEntry) -> tuple[str, str, str, str]:
    tier, speed = (one.usage.get(name) or "standard" for name in ("service_tier", "speed"))
    variant = "+".join(str(word) for word in (tier, speed) if word != "standard") or "standard"
    geo = str(one.usage.get("inference_geo") or "global").replace("not_available", "global")
    return str(tier), str(speed), variant, geo


def billed_model(one: LedgerEntry) -> str:
    passes = passes_of(one)
    return passes[0].model if passes else one.facts.get("model") or one.attributes.get("model", "")


def value_of(word: str, query: Query, one: LedgerEntry, model: str) -> str | None:
    if word in ("hour", "day", "week", "month"):
        return time_text(word, query.tz, moment_of(query, one))  # type: ignore[arg-type]
    if word in ("tier", "speed", "variant", "geo"):
        return served(one)[("tier", "speed", "variant", "geo").index(word)]
    if word in ("tenant", "kind", "funding", "quality"):
        return str(getattr(one, word))
    named: dict[str, str | None] = {
        "provider": one.attributes.get("provider") or "anthropic",
        "model": model or None,
        "requested_model": one.attributes.get("model") or None,
    }
    return named[word] if word in named else one.attributes.get(word.removeprefix("attribute:"))


Groups = dict[tuple[str | None, ...], dict[str, Any]]


def plain_usage(several: Sequence[LedgerEntry], query: Query) -> Groups:
    groups: Groups = {}
    for one in several:
        for own, sums in contributions(one) if wanted(query, one) else ():
            model = str(own) if own else billed_model(one)
            key = tuple(value_of(word, query, one, model) for word in query.by)
            group = groups.setdefault(key, {})
            total = sums.get("cache_creation_input_tokens")
            rest = (
                0
                if total is None
                else total - sum(sums.get(f"ephemeral_{ttl}_input_tokens", 0) for ttl in ("5m", "1h"))
            )
            for name, amount in {**sums, UNSPLIT: rest if one.kind == "adjusted" else max(0, rest)}.items():
                group[name] = group.get(name, 0) + amount
    return groups


def plain_cost(several: Sequence[LedgerEntry], query: Query) -> Groups:
    groups: Groups = {}
    for one in several:
        for row in rate(one, books(), TERMS.get(one.tenant, LIST)) if wanted(query, one) else ():
            key = tuple(value_of_row(word, query, one, row) for word in query.by)
            group = groups.setdefault(key, {"unpriced": 0, "priced": 0, **dict.fromkeys(COSTS, ZERO)})
            group["unpriced" if row.unpriced else "priced"] += 1
            for cost in COSTS:
                group[cost] = plus(group[cost], getattr(row, cost) or ZERO)
    return groups


def value_of_row(word: str, query: Query, one: LedgerEntry, row: RatedRow) -> str | None:
    if word in ("variant", "geo", "provider", "token_type", "charge"):
        return str(getattr(row, word))
    return value_of(word, query, one, row.model)


def found(answer: Answer) -> Groups:
    """The rows of an answer by their keys."""
    names = [column.name for column in answer.columns]
    keys = len(answer.by)
    rows = list(answer.rows())
    groups: Groups = {row[:keys]: dict(zip(names[keys:], row[keys:], strict=True)) for row in rows}  # type: ignore[misc]
    assert len(groups) == len(rows), "a group that comes twice"
    return groups


def without_zeros(groups: Groups) -> Groups:
    return {key: {name: amount for name, amount in sums.items() if amount} for key, sums in groups.items()}


def asked(
    folder: Path,
    report: Callable[[Reader, Query], Answer],
    several: Sequence[LedgerEntry],
    query: Query,
    rows: Iterable[Mapping[str, Any]] | None = None,
    tz: str = "UTC",
) -> Groups:
    made = rated(several, books(), TERMS) if rows is None else rows
    with Reader(Filed(folder, several, made), tz) as reader:
        answer = report(reader, query)
        groups = found(answer)
        check_totals(answer, groups)
        return groups


def check_totals(answer: Answer, groups: Groups) -> None:
    """Whole numbers and costs of all rows add up to those of the totals."""
    for column in answer.columns:
        told = [totals[column.name] for totals in answer.totals if totals.get(column.name) is not None]
        if column.kind == "count" and told and column.name in answer.totals[0]:
            assert sum(sums[column.name] for sums in groups.values()) == sum(told)  # type: ignore[arg-type]
        if column.kind == "cost":
            known = [sums[column.name] for sums in groups.values() if sums[column.name] is not None]
            assert added(known) == added(told)


def added(amounts: Iterable[Any]) -> Decimal:
    return sum(amounts, ZERO)


# ── Sums ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=30)
@given(ledgers, queries)
def test_usage_is_what_a_fold_over_the_entries_says(folder: Path, several: list[LedgerEntry], query: Query) -> None:
    """Whatever it is grouped by, with passes of other models, units of one's own, and names that nobody knows."""
    groups = asked(folder, lambda reader, query: usage_report(reader, query, UNKNOWN), several, query)

    expected = plain_usage(several, query)
    if not query.by:
        expected = expected or {(): {}}
    assert without_zeros(expected) == without_zeros(groups)


def test_an_entry_may_stand_for_many_calls_or_for_none(folder: Path) -> None:
    """It says so itself; a tool's requests are something else."""
    searched = tokens(server_tool_use={"web_search_requests": 9})
    several = [
        entry(usage=tokens(requests=5), n=1, kind="recorded"),
        entry(usage={"requests": 0, "amounts": {"denied_rpm": 7}}, n=2, kind="recorded"),
        entry(usage=searched, n=3),
    ]
    query = Query(by=("tenant",))
    groups = asked(folder, lambda reader, query: usage_report(reader, query, UNKNOWN), several, query)

    assert {("acme",): {"calls": 6, "web_search_requests": 9, "amounts.denied_rpm": 7}} == without_zeros(groups)
    assert without_zeros(groups) == without_zeros(plain_usage(several, query))


@settings(max_examples=30)
@given(ledgers, queries)
def test_costs_are_the_sums_of_the_rated_rows(folder: Path, several: list[LedgerEntry], query: Query) -> None:
    """Exact to the last digit; a group without any price has no cost."""
    groups = asked(folder, cost_report, several, query)

    expected = plain_cost(several, query)
    if query.by or expected:
        assert expected.keys() == groups.keys()
    for key, sums in expected.items():
        known = sums["priced"] or not sums["unpriced"]
        assert [sums[cost] if known else None for cost in COSTS] == [groups[key][cost] for cost in COSTS]
        assert sums["unpriced"] == groups[key]["unpriced"]
        if known:
            assert sums["billed_cost"] - sums["upstream_cost"] == groups[key]["margin"]


@settings(max_examples=30)
@given(ledgers, queries)
def test_by_token_type_each_type_has_its_quantity(folder: Path, several: list[LedgerEntry], query: Query) -> None:
    """The same numbers as in columns, one below the other."""
    by = ("token_type", *query.by)
    query = replace(query, by=by)
    groups = asked(folder, lambda reader, query: usage_report(reader, query, UNKNOWN), several, query)

    wide = plain_usage(several, replace(query, by=by[1:]))
    expected = {
        (kind, *key): sums[name] for key, sums in wide.items() for kind, name in TOKEN_TYPES.items() if sums.get(name)
    }
    assert expected == {key: sums["quantity"] for key, sums in groups.items() if sums["quantity"]}


@settings(max_examples=30)
@given(ledgers, queries)
def test_estimates_are_as_good_as_a_fold_over_the_entries_says(
    folder: Path, several: list[LedgerEntry], query: Query
) -> None:
    """Median and 95th percentile are exact, and only calls of which both numbers are known count."""
    query = replace(query, by=("tenant", "quality"), time_basis="booked")
    groups = asked(folder, limits_report, several, query)

    mine = [one for one in several if wanted(query, one)]
    report = fold(mine, Estimates(query.by))
    told = {key: sums for key, sums in groups.items() if sums["calls"]}
    assert {row.group for row in report.rows()} == told.keys()
    for row in report.rows():
        assert row.calls == told[row.group]["calls"]
        for name, value in (("median", row.median), ("p95", row.p95)):
            assert value is not None
            assert abs(Decimal(value) - told[row.group][name]) <= Decimal("0.0005001") + Decimal(value) * Decimal(
                "1e-12"
            )
    for kind in ("expired", "late"):
        assert sum(one.kind == kind for one in mine) == sum(sums[kind] for sums in groups.values())


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 39, 40, 41, 100])
def test_quantiles_are_the_value_that_so_many_calls_do_not_exceed(folder: Path, count: int) -> None:
    """Of 20 calls, 19 are at most the 95th percentile."""
    several = [
        entry(usage=tokens(input_tokens=n * 10), n=n, estimate={"input_tokens": 10}) for n in range(1, count + 1)
    ]
    (sums,) = asked(folder, limits_report, several, Query(by=("tenant",))).values()

    ratios = range(1, count + 1)
    for name, percent in (("median", 50), ("p95", 95)):
        assert next(r for r in ratios if r * 100 >= count * percent) == sums[name]


def test_the_overrun_is_what_was_charged_beyond_the_estimates(folder: Path) -> None:
    """Calls that stayed below do not make up for the others; what expired may still cost as much as was estimated."""
    several = [
        entry(usage=tokens(input_tokens=150), n=1, estimate={"input_tokens": 100}),
        entry(usage=tokens(input_tokens=10), n=2, estimate={"input_tokens": 100}),
        entry(n=3, kind="expired", estimate={"input_tokens": 70, "output_tokens": 5}),
    ]
    (sums,) = asked(folder, limits_report, several, Query(by=("tenant",))).values()

    assert (2, 1, Decimal(25), 1, 75) == tuple(
        sums[name] for name in ("calls", "over", "overrun_percent", "expired", "tokens_at_risk")
    )


# ── Time ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def booked(*times: str, tz: str = "UTC") -> list[LedgerEntry]:
    """An entry at each of these times of a zone, of one input token."""
    moments = [datetime.fromisoformat(text) for text in times]
    aware = [moment if moment.tzinfo else moment.replace(tzinfo=ZoneInfo(tz)) for moment in moments]
    return [
        entry(usage=tokens(input_tokens=1), n=n, reserved_at=0, booked_at=int(moment.timestamp() * 1000))
        for n, moment in enumerate(aware, 1)
    ]


@pytest.mark.parametrize(("day", "hours"), [("2026-03-29", 23), ("2026-10-25", 25), ("2026-06-01", 24)])
def test_days_have_the_hours_that_the_zone_gives_them(folder: Path, day: str, hours: int) -> None:
    """Clocks are put forward and back; the hour that comes twice is two hours, told apart by the offset."""
    start = int(datetime.fromisoformat(day).replace(tzinfo=ZoneInfo(BERLIN)).timestamp() * 1000)
    quarters = range(start - 3_600_000, start + 27 * 3_600_000, 900_000)
    several = [entry(usage=tokens(input_tokens=1), n=n, booked_at=at) for n, at in enumerate(quarters, 1)]

    by_day = asked(folder, usage_report, several, Query(by=("day",), tz=BERLIN))
    by_hour = asked(folder, usage_report, several, Query(by=("hour",), tz=BERLIN))

    assert hours * 4 == by_day[(day,)]["calls"]
    of_day = [key for (key,) in by_hour if str(key).startswith(day)]
    assert hours == len(of_day) == len(set(of_day))
    assert of_day == sorted(of_day, key=lambda text: datetime.fromisoformat(str(text)))
    assert {4} == {sums["calls"] for sums in by_hour.values()}


@settings(max_examples=30)
@example(at_ms("2010-03-14T03:30:30"), "America/St_Johns")  # whose clocks changed a minute past midnight
@example(at_ms("2010-11-07T02:30:59.999"), "America/St_Johns")
@example(at_ms("2011-12-30T09:59:59.999"), "Pacific/Apia")  # which left out a day
@example(at_ms("1986-01-01T00:00:00"), "Asia/Kathmandu")  # which moved by a quarter of an hour
@given(st.integers(at_ms("1972-01-01"), at_ms("2035-01-01")), st.sampled_from(ZONES))
def test_each_moment_is_in_the_periods_that_limits_would_put_it_in(folder: Path, at: int, tz: str) -> None:
    """Reports and calendar budgets agree on days, whatever the zone's clocks do within a quarter of an hour."""
    around = [at + step for step in (-60_000, -1, 0, 1, 60_000, 900_000)]
    several = [entry(usage=tokens(input_tokens=1), n=n, booked_at=moment) for n, moment in enumerate(around)]
    words: tuple[PeriodName, ...] = ("hour", "day", "week", "month")

    groups = asked(folder, usage_report, several, Query(by=words, tz=tz))

    expected = [tuple(time_text(word, tz, moment) for word in words) for moment in around]
    assert {key: expected.count(key) for key in expected} == {key: sums["calls"] for key, sums in groups.items()}


def test_weeks_begin_on_monday_and_belong_to_the_year_of_their_thursday(folder: Path) -> None:
    """ISO 8601: the first days of January may be in the last week of December."""
    several = booked("2026-12-31", "2027-01-03", "2027-01-04")

    groups = asked(folder, usage_report, several, Query(by=("week",)))

    assert {("2026-W53",): 2, ("2027-W01",): 1} == {key: sums["calls"] for key, sums in groups.items()}


@pytest.mark.parametrize("report", [usage_report, cost_report])
def test_the_first_moment_is_in_and_the_last_is_out(folder: Path, report: Any) -> None:
    """Neighbouring reports count each entry once."""
    edge = at_ms("2026-11-01")
    several = [entry(usage=tokens(input_tokens=10**6), n=n, booked_at=edge + n - 2) for n in (1, 2, 3)]
    column = "calls" if report is usage_report else "list_cost"
    one = 1 if report is usage_report else Decimal(3)

    def count(**bounds: Any) -> Any:
        groups = asked(folder, report, several, Query(by=("tenant",), **bounds))
        return sum(sums[column] for sums in groups.values())

    assert (one, 2 * one) == (count(until_ms=edge), count(since_ms=edge))
    assert one == count(since_ms=edge, until_ms=edge + 1)
    assert (one, 2 * one) == (count(period="2026-10"), count(period="2026-11"))


def test_the_event_time_is_when_the_call_was_made(folder: Path) -> None:
    """A call over midnight is booked on the next day, and was made on the day before; a correction is of its call."""
    over = entry(
        usage=tokens(input_tokens=5), n=1, reserved_at=at_ms("2026-10-31T23:59"), booked_at=at_ms("2026-11-01")
    )
    correction = entry(usage={"input_tokens": -2}, n=2, kind="adjusted", reserved_at=0, booked_at=at_ms("2026-11-20"))
    rows = [
        posting(row, booked_at_ms=one.booked_at)
        for one in (over, correction)
        for row in rate(one, books(), corrects=over if one is correction else None)
    ]

    def days(basis: Any, report: Any, column: str) -> dict[Any, Any]:
        query = Query(by=("day",), time_basis=basis)
        groups = asked(folder, report, [over, correction], query, rows)
        return {key: sums[column] for (key,), sums in groups.items()}

    assert {"2026-11-01": 5, "2026-11-20": -2} == days("booked", usage_report, "input_tokens")
    assert {"2026-10-31": 3} == days("event", usage_report, "input_tokens")
    price = Decimal("0.000003")
    assert {"2026-11-01": 5 * price, "2026-11-20": -2 * price} == days("booked", cost_report, "list_cost")
    assert {"2026-10-31": 3 * price} == days("event", cost_report, "list_cost")


def test_billing_periods_are_months_of_their_own_zone(folder: Path) -> None:
    """Whatever zone the days of a report are in."""
    several = booked("2026-10-31T22:59:59+00:00", "2026-10-31T23:00:00+00:00")
    rows = rated(several, books(), tz=BERLIN)
    for report, column, one in ((usage_report, "calls", 1), (cost_report, "list_cost", Decimal("0.000003"))):
        query = Query(by=("day",), period="2026-11", tz="UTC")

        assert {("2026-10-31",): one} == {
            key: sums[column] for key, sums in asked(folder, report, several, query, rows, tz=BERLIN).items()
        }


# ── What has no price ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_has_no_price_costs_nothing_known_and_not_nothing(folder: Path) -> None:
    """A sum with it is a floor, and one of nothing else is none."""
    several = [
        entry("plain", tokens(input_tokens=10**6), n=1),
        entry("nobody knows", tokens(input_tokens=10**6, output_tokens=1), n=2),
    ]

    groups = asked(folder, cost_report, several, Query(by=("model",)))
    (total,) = asked(folder, cost_report, several, Query(by=("tenant",))).values()

    assert (None, None, 2) == tuple(groups[("nobody knows",)][name] for name in ("list_cost", "margin", "unpriced"))
    assert (Decimal(3), 2) == (total["list_cost"], total["unpriced"])


def rerated(one: LedgerEntry, terms: Terms, **posted: Any) -> list[dict[str, Any]]:
    """What a re-rating at other terms posts."""
    deltas = compare(rate(one, books()), rate(one, books(), terms))
    return [posting(row, booked_at_ms=one.booked_at, rating=1, **posted) for delta in deltas for row in delta.rows]


def test_a_rerating_counts_where_its_entry_does_until_the_period_is_closed(folder: Path) -> None:
    """Afterwards it counts when it was posted, as a correction."""
    one = entry(usage=tokens(input_tokens=10**6), n=1, booked_at=at_ms("2026-10-10"))
    first = rated([one], books())
    half = Terms.of(discount="50%")
    posted = at_ms("2026-11-03")

    def costs(rows: list[dict[str, Any]], **query: Any) -> dict[Any, Any]:
        groups = asked(folder, cost_report, [one], Query(**query), [*first, *rows])
        return {key: sums["billed_cost"] for key, sums in groups.items()}

    before = rerated(one, half, posted_at_ms=posted)
    after = rerated(one, half, posted_at_ms=posted, corrects="2026-10")
    assert {("2026-10-10",): Decimal("1.5")} == costs(before, by=("day",))
    assert {("2026-10-10",): Decimal(3), ("2026-11-03",): Decimal("-1.5")} == costs(after, by=("day",))
    assert {("2026-10",): Decimal("-1.5")} == costs(after, by=("corrects",), period="2026-11")
    assert {(): Decimal(3)} == costs(after, period="2026-10")


def test_prices_that_come_later_make_a_cost_complete(folder: Path) -> None:
    """Rows that were taken back are not counted as unpriced; in a closed period they stay so."""
    one = entry("steep", tokens(input_tokens=5) | {"server_tool_use": {"web_search_requests": 1}}, n=1)
    (unpriced,) = [row for row in rate(one, books()) if row.unpriced]
    back = replace(unpriced, posting=-1, line=unpriced.line + 1, quantity=-1)
    anew = replace(rate(entry(usage=tokens(input_tokens=1)), books()).rows[0], n=1, line=99)
    first = rated([one], books())
    later: dict[str, Any] = {"booked_at_ms": one.booked_at, "rating": 1, "posted_at_ms": at_ms("2026-12-01")}

    def unknown(rows: list[RatedRow]) -> int:
        added = [posting(row, **later) for row in rows]
        groups = asked(folder, cost_report, [one], Query(), [*first, *added])
        return sum(int(sums["unpriced"]) for sums in groups.values())

    assert 1 == unknown([])
    assert 0 == unknown([back, anew])
    corrected = [posting(row, **later, corrects="2026-11") for row in (back, anew)]
    by_period = asked(folder, cost_report, [one], Query(by=("period",)), [*first, *corrected])
    assert {("2026-11",): 1, ("2026-12",): 0} == {key: sums["unpriced"] for key, sums in by_period.items()}
    everything = asked(folder, cost_report, [one], Query(), [*first, *corrected])
    assert 1 == everything[()]["unpriced"], "a correction of October is not set off against November"


def test_amounts_of_several_currencies_are_never_added_up(folder: Path) -> None:
    """Each has rows of its own, and so has what is in none."""
    several = [entry(name, tokens(input_tokens=10**6), n=n) for n, name in enumerate(("plain", "steep", "nobody"), 1)]
    rows = rated(several, books())
    for row in rows:
        if row["model"] == "steep":
            row["currency"] = "EUR"

    with Reader(Filed(folder, several, rows)) as reader:
        answer = cost_report(reader, Query(by=("tenant",)))
        told = [(row[1], row[2], row[-1]) for row in answer.rows()]

        assert [("EUR", Decimal("0.5"), 0), ("USD", Decimal(3), 0), (None, None, 1)] == told
        assert told == [(one["currency"], one["list_cost"], one["unpriced"]) for one in answer.totals]


def test_what_is_in_no_currency_costs_nobody_knows_what(folder: Path) -> None:
    """Not nothing, whatever else of no price was taken back; and the table says of every total that it is a floor."""
    several = [entry(name, tokens(input_tokens=10**6), n=n) for n, name in enumerate(("plain", "steep", "nobody"), 1)]
    known_later = entry("nobody", tokens(input_tokens=7), n=4, tenant="globex")
    rows = rated([*several, known_later], books())
    for row in rows:
        if row["model"] == "steep":
            row["currency"] = "EUR"
    (lacking,) = rate(known_later, books()).rows
    back = posting(replace(lacking, posting=-1, line=99, quantity=-7), booked_at_ms=known_later.booked_at, rating=1)

    with Reader(Filed(folder, [*several, known_later], [*rows, back])) as reader:
        answer = cost_report(reader, Query(by=("tenant",)))
        *_, last = answer.totals
        table = io.StringIO()
        print_answer(table, "cost", answer)

    assert (None, 1, None, None) == tuple(last[name] for name in ("currency", "unpriced", "list_cost", "margin"))
    totals = [line for line in table.getvalue().splitlines() if line.strip().startswith("total")]
    assert [True, True, False] == ["at least" in line for line in totals]


# ── Names ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_names_that_sql_would_mind_do_no_harm(folder: Path) -> None:
    """Tenants, models and attributes are whatever callers say."""
    odd = 'it\'s "x"; DROP TABLE answer; --'
    several = [
        entry(odd, tokens(input_tokens=1), n=1, tenant="o'brien", attributes={"model": odd, "team": odd, "Team": "T"}),
        entry(odd, tokens(input_tokens=2), n=2, tenant="o'brien", attributes={"model": odd}),
    ]
    query = Query(by=("tenant", "model", "team", "Team"), tenant="o'brien")

    for report in (usage_report, cost_report, limits_report):
        groups = asked(folder, report, several, query)
        assert {("o'brien", odd, odd, "T"), ("o'brien", odd, None, None)} == groups.keys()


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"by": ("tenant", "tenant")}, "by"),
        ({"by": ("team", "attribute:team")}, "by"),
        ({"by": ("not a name",)}, "by"),
        ({"tz": "Mars/Olympus"}, "tz"),
        ({"since_ms": 5, "until_ms": 5}, "until"),
        ({"period": "2026-13"}, "period"),
        ({"period": "October"}, "period"),
        ({"period": "2026-10", "since_ms": 5}, "period"),
        ({"period": "2026-10", "time_basis": "event"}, "period"),
    ],
)
def test_a_query_that_nobody_can_answer_is_refused(wrong: dict[str, Any], field: str) -> None:
    """The error names what is wrong."""
    with pytest.raises(InvalidInput) as caught:
        Query(**wrong)

    assert field == caught.value.field


@pytest.mark.parametrize("word", ["charge", "price_source", "corrects", "period"])
def test_what_only_rated_rows_tell_is_nothing_to_group_usage_by(folder: Path, word: str) -> None:
    """The error says where it is told."""
    with pytest.raises(InvalidInput, match="report cost"):
        asked(folder, usage_report, [entry()], Query(by=(word,)))


# ── Invoices ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def billed(folder: Path, several: Sequence[LedgerEntry], period: str, rows: Any = None, tz: str = "UTC") -> Invoice:
    made = rated(several, books(), TERMS, tz) if rows is None else rows
    with Reader(Filed(folder, several, made), tz) as reader:
        return invoice(reader, "acme", period, closed=False)


@settings(max_examples=30)
@given(ledgers, st.sampled_from(["2026-10", "2026-11"]), st.sampled_from(["UTC", BERLIN]))
def test_the_lines_of_an_invoice_add_up_to_its_total(
    folder: Path, several: list[LedgerEntry], period: str, tz: str
) -> None:
    """To the last digit, with the line that says what rounding took or gave; and to the exact sum of the rows."""
    several = [replace(one, booked_at=at_ms("2026-10-31T22:30") + n * 600_000) for n, one in enumerate(several)]
    bill = billed(folder, several, period, tz=tz)

    for total in bill.totals:
        lines = [line.amount for line in bill.lines if line.currency == total.currency]
        assert total.total == added([*lines, total.rounding])
        assert abs(total.total - total.exact) <= Decimal("0.005")
        assert all(amount is not None and amount == round(amount, 2) for amount in lines)
    month = period_at("month", tz, at_ms(f"{period}-15"))
    rows = [
        row
        for one in several
        if one.tenant == "acme" and month.start_ms <= one.booked_at < month.end_ms
        for row in rate(one, books(), TERMS["acme"])
    ]
    assert sum((row.billed_cost or ZERO for row in rows), ZERO) == sum((one.exact for one in bill.totals), ZERO)
    assert sum(bool(row.unpriced) for row in rows) == bill.unpriced
    for line in bill.lines:
        if line.unit_price is not None:
            assert line.exact == line.quantity * line.unit_price / line.per


def test_an_own_key_is_billed_only_the_platform_fee(folder: Path) -> None:
    """Its usage is shown at list price, and costs 0."""
    several = [
        entry(usage=tokens(input_tokens=10**6), n=1, funding="own"),
        entry(usage=tokens(output_tokens=10**6), n=2),
    ]
    bill = billed(folder, several, "2026-11")

    (own,), (fee,), (usage,) = (bill.section(name) for name in ("own_key", "platform_fee", "usage"))
    assert (Decimal(3), Decimal(0), Decimal(0)) == (own.list_cost, own.unit_price, own.amount)
    assert Decimal("0.15") == fee.amount
    assert Decimal("13.52") == usage.amount  # 15 less 12.5 %, and 3 % on that: 13.51875
    (total,) = bill.totals
    assert (Decimal("13.67"), Decimal("13.66875"), Decimal(3)) == (total.total, total.exact, total.own_key_list_cost)


def test_rounding_shows_on_a_line_of_its_own(folder: Path) -> None:
    """A thousand lines of a third of a cent are 3.33 and not nothing."""
    several = [entry(usage=tokens(input_tokens=1000, output_tokens=100), n=1, tenant="acme")]
    rows = rated(several, books())
    bill = billed(folder, several, "2026-11", rows)

    assert [Decimal("0.00"), Decimal("0.00")] == [line.amount for line in bill.lines]
    assert (Decimal("0.0045"), Decimal("0.00"), Decimal("0.00")) == (
        bill.totals[0].exact, bill.totals[0].total, bill.totals[0].rounding,
    )  # fmt: skip
    many = [
        entry(name, tokens(input_tokens=10**6 + 1500), n=n, tenant="acme") for n, name in enumerate(["plain"] * 3, 1)
    ]
    split = [row | {"geo": f"g{at}"} for at, row in enumerate(rated(many, books()))]
    (total,) = billed(folder, many, "2026-11", split).totals
    assert (Decimal("9.0135"), Decimal("9.01"), Decimal("0.01")) == (total.exact, total.total, total.rounding)


def test_what_corrects_a_closed_period_stands_apart(folder: Path) -> None:
    """With the period that it corrects."""
    one = entry(usage=tokens(input_tokens=10**6), n=1, booked_at=at_ms("2026-10-10"), tenant="acme")
    rows = [
        *rated([one], books()),
        *rerated(one, Terms.of(discount="50%"), posted_at_ms=at_ms("2026-11-03"), corrects="2026-10"),
    ]
    bill = billed(folder, [one], "2026-11", rows)

    assert {"corrections"} == {line.section for line in bill.lines}
    assert {"2026-10"} == {line.corrects for line in bill.lines}
    assert [(-(10**6), Decimal(3)), (10**6, Decimal("1.5"))] == sorted(
        (line.quantity, line.unit_price) for line in bill.lines
    )
    assert Decimal("-1.50") == bill.totals[0].total
    assert Decimal("3.00") == billed(folder, [one], "2026-10", rows).totals[0].total


def test_what_is_taken_back_in_an_open_period_leaves_no_line(folder: Path) -> None:
    """The customer sees the price that stands."""
    one = entry(usage=tokens(input_tokens=10**6), n=1, booked_at=at_ms("2026-10-10"), tenant="acme")
    rows = [*rated([one], books()), *rerated(one, Terms.of(discount="50%"), posted_at_ms=at_ms("2026-10-11"))]
    (line,) = billed(folder, [one], "2026-10", rows).lines

    assert (10**6, Decimal("1.5"), Decimal("1.50")) == (line.quantity, line.unit_price, line.amount)


def test_each_price_has_a_line(folder: Path) -> None:
    """A price that changed within the month, and that of long prompts, are lines of their own."""
    several = [
        entry("plain", tokens(cache_read_input_tokens=10**6), "2026-10-06", n=1),
        entry("plain", tokens(cache_read_input_tokens=10**6), "2026-10-07", n=2),
        entry("plain", tokens(cache_read_input_tokens=10**6), "2026-10-08", n=3),
        entry("steep", tokens(input_tokens=10), "2026-10-08", n=4),
        entry("steep", tokens(input_tokens=100_001), "2026-10-08", n=5),
    ]
    bill = billed(folder, several, "2026-10", rated(several, books()))

    assert [("plain", Decimal("0.1"), 2 * 10**6, 0), ("plain", Decimal("0.2"), 10**6, 0),
            ("steep", Decimal("0.1"), 10, 0), ("steep", Decimal("0.5"), 100_001, 100_000)] == [
        (line.model, line.unit_price, line.quantity, line.above) for line in bill.lines
    ]  # fmt: skip


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_parquet_holds_exact_numbers_and_comes_out_the_same_each_time(folder: Path) -> None:
    """No number goes through a double, whoever was faster."""
    duckdb = pytest.importorskip("duckdb")
    several = [
        entry(
            "plain",
            tokens(input_tokens=2**53 - 1, output_tokens=n),
            n=n,
            attributes={"model": "plain", "team": f"{n % 7}"},
        )
        for n in range(1, 60)
    ]
    filed = Filed(folder, several, rated(several, books()))

    def written(name: str) -> bytes:
        with Reader(filed) as reader:
            cost_report(reader, Query(by=("team", "token_type"))).write_parquet(folder / name, "it's")
        return (folder / name).read_bytes()

    assert written("one.parquet") == written("other.parquet")
    relation = f"read_parquet('{folder / 'one.parquet'}')"
    ((cost, quantity),) = duckdb.sql(f"SELECT sum(list_cost), sum(quantity) FROM {relation}").fetchall()
    assert sum((row.list_cost or ZERO for one in several for row in rate(one, books())), ZERO) == cost
    assert 59 * (2**53 - 1) + sum(range(1, 60)) == quantity
    kinds = dict(duckdb.sql(f"SELECT column_name, column_type FROM (DESCRIBE SELECT * FROM {relation})").fetchall())
    assert ("DECIMAL(38,12)", "DECIMAL(38,0)", "VARCHAR") == (kinds["list_cost"], kinds["quantity"], kinds["team"])


def test_utc_is_a_zone_like_any_other(folder: Path) -> None:
    """Times are worked out by the zone's rules, and not by this machine's."""
    several = booked("2026-03-29T00:30+00:00")

    assert [("2026-03-29T00:00+00:00",)] == [*asked(folder, usage_report, several, Query(by=("hour",)))]
    assert datetime(2026, 3, 29, 0, 30, tzinfo=UTC).timestamp() * 1000 == several[0].booked_at
