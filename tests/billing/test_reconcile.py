"""Reconciliation: whatever is done to either side is named, with the entries that show it; and nothing else is."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meterlib import LedgerEntry
from meterlib.billing.reconcile.cells import MEASURES
from meterlib.billing.reconcile.files import read_reports
from meterlib.billing.reconcile.ids import IdMap, Scope
from meterlib.billing.reconcile.reconciliation import Reconciliation, Sides, reconcile
from meterlib.errors import InvalidInput
from tests.billing.money import at_ms, books, entry
from tests.billing.provider import (
    HOUR_MS,
    Served,
    admin_cost,
    admin_usage,
    analytics_cost,
    analytics_usage,
    text,
)
from tests.billing.reporting import Filed, rated

DAY_MS = at_ms("2026-11-01")
DAY_END_MS = DAY_MS + 24 * HOUR_MS
ALL_HOSTED = Scope()
EXAMPLES = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class World(NamedTuple):
    """Both sides of the same calls."""

    ours: list[LedgerEntry]
    theirs: list[Served]

    def reconciled(self, folder: Path, *files: str, scope: Scope = ALL_HOSTED, **more: Any) -> Reconciliation:
        paths = []
        for number, content in enumerate(files):
            paths.append(folder / f"report-{number}.json")
            paths[-1].write_text(content)
        filed = Filed(folder, self.ours, rated(self.ours, books()))
        with duckdb.connect() as database:
            sides = Sides(told=read_reports(paths), scope=scope, **more)
            return reconcile(database, filed.entries_sql(), filed.rows_sql(), sides)


def usage_of(served: Served) -> dict[str, Any]:
    """What a call's answer tells of what it used."""
    used = served.used
    five, hour = used.get("cache_write_5m", 0), used.get("cache_write_1h", 0)
    usage: dict[str, Any] = {
        "input_tokens": used.get("input", 0),
        "output_tokens": used.get("output", 0),
        "cache_creation_input_tokens": five + hour,
        "cache_read_input_tokens": used.get("cache_read", 0),
        "cache_creation": {"ephemeral_5m_input_tokens": five, "ephemeral_1h_input_tokens": hour},
        "service_tier": served.tier,
    }
    if served.geo is not None:
        usage["inference_geo"] = served.geo
    return usage


def booked(number: int, served: Served, **fields: Any) -> LedgerEntry:
    """The entry of a call, which took ten seconds."""
    told = {"n": number, "reservation_id": f"r{number}", "booked_at": served.at_ms + 10_000, "usage": usage_of(served)}
    told["facts"] = {"request_id": f"req_{number}"}
    return entry(served.model, at=served.at_ms, **told | fields)


def some_call(luck: random.Random, hour: int | None = None, **fields: Any) -> Served:
    """A call well within an hour of the day."""
    hour = luck.randrange(24) if hour is None else hour
    used = {kind: luck.randrange(1, 30_000) for kind in MEASURES if kind != "web_search"}
    plain: dict[str, Any] = {"at_ms": DAY_MS + hour * HOUR_MS + luck.randrange(200_000, 3_300_000), "used": used}
    return Served(**plain | fields)


# ── Things that happen to a call, each with the difference that it should make ────────────────────────────────────────


class Happening(NamedTuple):
    """What our entries and the provider's records of a call are, and what is found: cause, hour, counts, entry."""

    ours: list[LedgerEntry]
    theirs: list[Served]
    found: list[Any]


def bypassed(number: int, call: Served, luck: random.Random) -> Happening:
    return Happening([], [call], [("outside_gateway", call.at_ms, call.used, ())])


def cut_short(number: int, call: Served, luck: random.Random) -> Happening:
    seen = luck.randrange(1, call.used["output"] + 1) - 1
    ours = booked(number, replace(call, used=call.used | {"output": seen}), quality="partial")
    return Happening(
        [ours], [call], [("aborted", call.at_ms, {"output": call.used["output"] - seen}, (f"0:{number}",))]
    )


def never_settled(number: int, call: Served, luck: random.Random) -> Happening:
    prompt = sum(count for kind, count in call.used.items() if kind != "output")
    ours = booked(number, call, usage={}, kind="expired", estimate={"input_tokens": prompt})
    return Happening([ours], [call], [("aborted", call.at_ms, call.used, (f"0:{number}",))])


def over_the_edge(number: int, call: Served, luck: random.Random) -> Happening:
    """It began in one hour, ended in the next, and is counted there."""
    edge = call.at_ms // HOUR_MS * HOUR_MS + HOUR_MS
    call = replace(call, at_ms=edge - luck.randrange(1, 9_000))
    after = replace(call, at_ms=edge + 1_000)
    negative = {kind: -count for kind, count in call.used.items()}
    who = (f"0:{number}",)
    return Happening(
        [booked(number, call)], [after], [("timing", call.at_ms, negative, who), ("timing", edge, call.used, who)]
    )


def clocks_apart(number: int, call: Served, luck: random.Random) -> Happening:
    """It began and ended just after the full hour, and just before it by the provider's clock."""
    edge = call.at_ms // HOUR_MS * HOUR_MS
    call = replace(call, at_ms=edge + luck.randrange(0, 9_000))
    before = replace(call, at_ms=edge - 1_000)
    negative = {kind: -count for kind, count in call.used.items()}
    who = (f"0:{number}",)
    return Happening(
        [booked(number, call)], [before], [("timing", call.at_ms, negative, who), ("timing", edge - 1, call.used, who)]
    )


def split_unknown(number: int, call: Served, luck: random.Random) -> Happening:
    written = call.used["cache_write_5m"]
    theirs = replace(call, used=call.used | {"cache_write_5m": 0, "cache_write_1h": written})
    usage = usage_of(theirs)
    del usage["cache_creation"]
    ours = booked(number, call, usage=usage, quality="split_unknown")
    counts = {"cache_write_5m": -written, "cache_write_1h": written}
    return Happening([ours], [theirs], [("cache_split", call.at_ms, counts, (f"0:{number}",))])


def priority(number: int, call: Served, luck: random.Random) -> Happening:
    negative = {kind: -count for kind, count in call.used.items()}
    who = (f"0:{number}",)
    found = [("priority_tier", call.at_ms, counts, who) for counts in (call.used, negative)]
    return Happening([booked(number, call)], [replace(call, tier="priority")], found)


def passes_lost(number: int, call: Served, luck: random.Random) -> Happening:
    """A compaction that the answer's own numbers leave out; our side of it does not know of it."""
    used = {"input": luck.randrange(1, 99_999), "output": luck.randrange(1, 999)}
    compaction = replace(call, used=used, requests=0)
    return Happening([booked(number, call)], [call, compaction], [("missing_iterations", call.at_ms, used, ())])


def passes_doubtful(number: int, call: Served, luck: random.Random) -> Happening:
    """The same, where the answer's passes do not add up to its numbers."""
    happened = passes_lost(number, call, luck)
    usage = usage_of(call) | {"iterations": [{"type": "message", "input_tokens": 1, "output_tokens": 1}]}
    (cause, when, counts, _), *_ = happened.found
    ours = [booked(number, call, usage=usage)]
    return happened._replace(ours=ours, found=[(cause, when, counts, (f"0:{number}",))])


def passes_untold(number: int, call: Served, luck: random.Random) -> Happening:
    """A compaction that we have and the provider does not tell."""
    usage = usage_of(call) | {"iterations": [{"type": "compaction", "input_tokens": 70_001, "output_tokens": 7}]}
    counts = {"input": -70_001, "output": -7}
    found = [("missing_iterations", call.at_ms, counts, (f"0:{number}",))]
    return Happening([booked(number, call, usage=usage)], [call], found)


BOTH_SHAPES: list[Callable[..., Happening]] = [
    *(bypassed, cut_short, never_settled, over_the_edge, clocks_apart, split_unknown, priority),
    *(passes_doubtful, passes_untold),
]
COUNTED = [*BOTH_SHAPES, passes_lost]


@st.composite
def worlds(draw: st.DrawFn, happenings: list[Callable[..., Happening]]) -> tuple[World, list[Any], list[str]]:
    """A day of calls, of which to some something happened, each in an hour of its own and beside others."""
    luck = random.Random(draw(st.integers(0, 1 << 32)))  # numbers without a meaning, so that no two add up by chance
    chosen = draw(st.lists(st.sampled_from(happenings), max_size=4)) if happenings else []
    ours: list[LedgerEntry] = []
    theirs: list[Served] = []
    found: list[Any] = []
    for _ in range(draw(st.integers(0, 30))):
        tier = luck.choice(["standard", "batch"])
        call = some_call(luck, tier=tier, geo=luck.choice(["global", "us", None]) if tier == "standard" else "global")
        ours.append(booked(len(ours) + 1, call))
        theirs.append(call)
    for at, happening in enumerate(chosen):
        call = some_call(luck, hour=2 + 5 * at)
        happened = happening(len(ours) + 1000, call, luck)
        ours += happened.ours
        theirs += happened.theirs
        found += happened.found
    return World(ours, theirs), found, [happening.__name__ for happening in chosen]


def shown(found: Reconciliation) -> list[Any]:
    """Cause, hour, counts and entries of each difference."""
    return sorted(
        (
            one.cause,
            (one.cell.start_ms - DAY_MS) // HOUR_MS,
            sorted((kind, count) for kind, count in zip(MEASURES, one.counts, strict=True) if count),
            tuple(f"{call.shard}:{call.n}" for call, _ in one.evidence),
        )
        for one in found.tokens
    )


def expected(found: Iterable[Any]) -> list[Any]:
    return sorted(
        (cause, (when - DAY_MS) // HOUR_MS, sorted(one for one in counts.items() if one[1]), who)
        for cause, when, counts, who in found
    )


@EXAMPLES
@given(made=worlds(COUNTED))
def test_what_happened_is_named_exactly(made: Any, tmp_path: Path) -> None:
    """Analytics reports, which count requests: each cause, where, how much of it, and which entry shows it."""
    world, found, _ = made
    if not world.theirs:
        return

    result = world.reconciled(tmp_path, text(analytics_usage(world.theirs)), since_ms=DAY_MS, until_ms=DAY_END_MS)

    assert expected(found) == shown(result)
    assert result.told is not None
    assert result.told == tuple(
        ours + sum(one.counts[at] for one in result.tokens) for at, ours in enumerate(result.ours)
    )


@EXAMPLES
@given(made=worlds(BOTH_SHAPES))
def test_legacy_reports_tell_as_much(made: Any, tmp_path: Path) -> None:
    """The Admin API's buckets, which do not count requests."""
    world, found, _ = made
    if not world.theirs:
        return

    result = world.reconciled(tmp_path, text(admin_usage(world.theirs, DAY_MS, DAY_END_MS)))

    assert expected(found) == shown(result)


@EXAMPLES
@given(made=worlds([]), shape=st.sampled_from(["admin", "analytics"]))
def test_nothing_happened_is_no_difference(made: Any, shape: str, tmp_path: Path) -> None:
    """Both sides agree to the last token, however calls are spread, in tokens and in money."""
    world, _, _ = made
    calls = [replace(one, tier="standard", geo="global") for one in world.theirs]
    if not calls:
        return
    same = World([booked(number, call) for number, call in enumerate(calls, 1)], calls)
    pages = (
        [analytics_usage(calls), analytics_cost(calls)]
        if shape == "analytics"
        else [admin_usage(calls, DAY_MS, DAY_END_MS), admin_cost(calls, DAY_MS, DAY_END_MS)]
    )

    result = same.reconciled(tmp_path, *(text(page) for page in pages))

    assert [] == [*result.tokens, *result.money]
    assert 0 == result.tokens_off(()) == result.cents_off(())
    assert result.told_cents == result.our_cents > 0


@pytest.mark.parametrize("happening", [over_the_edge])
def test_a_provider_that_counts_by_the_end_of_calls_is_understood(happening: Any, tmp_path: Path) -> None:
    """Every call over an edge is in the next bucket, through the whole day: all timing, nothing else."""
    luck = random.Random(7)
    happened = [happening(number, some_call(luck, hour=number), luck) for number in range(1, 22)]
    world = World([one for each in happened for one in each.ours], [one for each in happened for one in each.theirs])

    result = world.reconciled(tmp_path, text(admin_usage(world.theirs, DAY_MS, DAY_END_MS)))

    assert {"timing"} == {one.cause for one in result.tokens}
    assert 0 == result.tokens_off()
    assert 21 == len({call.n for one in result.tokens for call, _ in one.evidence})


def test_a_call_that_was_counted_before_the_report_begins_is_timing(tmp_path: Path) -> None:
    """The first and the last bucket have neighbours that the report does not show."""
    luck = random.Random(1)
    begun_before = some_call(luck, at_ms=DAY_MS - 5_000)
    counted_after = some_call(luck, at_ms=DAY_END_MS - 5_000)
    between = some_call(luck, hour=9)
    theirs = [replace(begun_before, at_ms=DAY_MS + 1), between]
    world = World([booked(at, call) for at, call in enumerate([begun_before, counted_after, between], 1)], theirs)

    result = world.reconciled(tmp_path, text(admin_usage(theirs, DAY_MS, DAY_END_MS)))

    assert [("timing", 0, ("0:1",)), ("timing", 23, ("0:2",))] == [
        (cause, hour, who) for cause, hour, _, who in shown(result)
    ]


def test_of_many_calls_at_an_edge_those_that_moved_are_named(tmp_path: Path) -> None:
    """The provider counts some of them where they began, and others where they ended or by its own clock."""
    luck = random.Random(11)
    edge = DAY_MS + 9 * HOUR_MS
    over = [some_call(luck, at_ms=edge - luck.randrange(1, 9_000)) for _ in range(8)]
    near = [some_call(luck, at_ms=edge - luck.randrange(11_000, 50_000)) for _ in range(4)]
    calls = [*over, *near]
    moved = {2, 5, 10}
    theirs = [replace(call, at_ms=edge + 1) if at in moved else call for at, call in enumerate(calls)]

    result = World([booked(at + 1, call) for at, call in enumerate(calls)], theirs).reconciled(
        tmp_path, text(admin_usage(theirs, DAY_MS, DAY_END_MS))
    )

    assert [{at + 1 for at in moved}] * 2 == [{call.n for call, _ in one.evidence} for one in result.tokens]
    assert {"timing"} == {one.cause for one in result.tokens}


def test_calls_are_told_apart_by_the_key_that_they_showed(calls: list[Served], tmp_path: Path) -> None:
    """Where one tenant's tokens go out with several keys, or in the default workspace."""
    theirs = [replace(call, workspace="w1" if at else None) for at, call in enumerate(calls)]
    attributes = {"provider": "anthropic", "model": "plain"}
    ours = [
        booked(at, call, attributes=attributes | {"key": "k1" if at > 1 else "k?"}) for at, call in enumerate(calls, 1)
    ]
    (tmp_path / "map.toml").write_text('[workspaces]\ndefault = { key = "k?" }\nw1 = { key = ["k1", "k2"] }\n')
    scope = Scope(ids=IdMap.load(tmp_path / "map.toml"))

    result = World(ours, theirs).reconciled(tmp_path, text(analytics_usage(theirs)), scope=scope)

    assert [] == [*result.tokens, *result.notes]
    assert result.told == result.ours != (0,) * len(MEASURES)


# ── Money ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def causes(result: Reconciliation) -> dict[str, Decimal]:
    """The money of each cause."""
    found: dict[str, Decimal] = {}
    for one in result.money:
        found[one.cause] = found.get(one.cause, Decimal(0)) + one.amount
    return found


def cents(used: dict[str, int]) -> Decimal:
    prices = {"input": "3", "cache_write_5m": "3.75", "cache_write_1h": "6", "cache_read": "0.1", "output": "15"}
    return sum((Decimal(count) * Decimal(prices[kind]) for kind, count in used.items()), Decimal(0)) / 10_000


@pytest.fixture
def calls() -> list[Served]:
    luck = random.Random(3)
    return [some_call(luck, hour=hour) for hour in (3, 3, 9, 20)]


def test_money_of_tokens_that_differ_has_their_cause(calls: list[Served], tmp_path: Path) -> None:
    """Bypassed tokens cost what others of their model cost, and the rest agrees."""
    ours = [booked(number, call) for number, call in enumerate(calls[:3], 1)]
    pages = text(admin_usage(calls, DAY_MS, DAY_END_MS)), text(admin_cost(calls, DAY_MS, DAY_END_MS))

    result = World(ours, calls).reconciled(tmp_path, *pages)

    assert {"outside_gateway": cents(calls[3].used)} == causes(result)
    assert result.told_cents == result.our_cents + cents(calls[3].used)


def test_the_same_tokens_at_another_price_are_the_books_matter(calls: list[Served], tmp_path: Path) -> None:
    """A discount that the book does not know of is told as such."""
    ours = [booked(number, call) for number, call in enumerate(calls, 1)]
    pages = text(analytics_usage(calls)), text(analytics_cost(calls, Decimal("0.1")))

    result = World(ours, calls).reconciled(tmp_path, *pages)

    assert [] == result.tokens
    total = sum((cents(call.used) for call in calls), Decimal(0))
    assert {"price": -total / 10} == causes(result)
    assert all("list prices agree, so it is the discount" in one.how for one in result.money)


def test_what_cost_reports_leave_out_or_add_is_named(calls: list[Served], tmp_path: Path) -> None:
    """Priority tokens are in no cost report, and code execution is in no usage report."""
    calls = [replace(calls[0], tier="priority", model="fast-lane"), *calls[1:]]
    ours = [booked(number, call) for number, call in enumerate(calls, 1)]
    page = admin_cost(calls, DAY_MS, DAY_END_MS)
    page["data"][0]["results"].append({"amount": "123.5", "currency": "USD", "cost_type": "code_execution"})
    pages = text(admin_usage(calls, DAY_MS, DAY_END_MS)), text(page)

    result = World(ours, calls).reconciled(tmp_path, *pages)

    assert [] == result.tokens
    assert Decimal("123.5") == causes(result)["code_execution"]
    assert {"code_execution", "priority_tier"} == causes(result).keys()


def test_what_no_book_has_a_price_for_is_named_with_its_entries(calls: list[Served], tmp_path: Path) -> None:
    """The provider has a price for it."""
    calls = [replace(calls[0], model="nobody-knows"), *calls[1:]]
    ours = [booked(number, call) for number, call in enumerate(calls, 1)]
    pages = text(admin_usage(calls, DAY_MS, DAY_END_MS)), text(admin_cost(calls, DAY_MS, DAY_END_MS))

    result = World(ours, calls).reconciled(tmp_path, *pages)

    assert {"unpriced": cents(calls[0].used)} == causes(result)
    found = {(f"{call.shard}:{call.n}", call.request_id) for one in result.money for call, _ in one.evidence}
    assert {("0:1", "req_1")} == found


def test_money_alone_cannot_tell_tokens_from_prices(calls: list[Served], tmp_path: Path) -> None:
    """Without a usage report a difference stays unexplained, and says what is missing."""
    ours = [booked(number, call) for number, call in enumerate(calls[:3], 1)]

    result = World(ours, calls).reconciled(tmp_path, text(admin_cost(calls, DAY_MS, DAY_END_MS)))

    assert {"unknown": cents(calls[3].used)} == causes(result)
    assert all("no usage report" in one.how for one in result.money)


# ── Whose calls count ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_calls_with_keys_of_their_own_count_only_where_a_map_says_so(calls: list[Served], tmp_path: Path) -> None:
    """Without a map hosted calls count; with one, those of its keys; keys that it does not have are left out."""
    keyed = [replace(call, key=f"apikey_{at}", workspace="w") for at, call in enumerate(calls)]
    ours = [booked(1, keyed[0]), booked(2, keyed[1], tenant="globex", funding="own"), booked(3, keyed[2])]
    world = World([*ours, booked(4, keyed[3], attributes={"provider": "bedrock", "model": "plain"})], keyed)
    usage = text(analytics_usage(keyed))

    hosted = world.reconciled(tmp_path, text(analytics_usage([keyed[0], keyed[2]])))
    (tmp_path / "map.toml").write_text('[api_keys]\napikey_1 = { tenant = "glo*", funding = "own" }\n')
    own = world.reconciled(tmp_path, usage, scope=Scope(ids=IdMap.load(tmp_path / "map.toml")))
    (tmp_path / "map.toml").write_text('[api_keys]\napikey_0 = "acme"\napikey_1 = "globex"\n')
    both = world.reconciled(tmp_path, usage, scope=Scope(ids=IdMap.load(tmp_path / "map.toml")))

    assert [] == hosted.tokens
    assert [] == own.tokens
    assert sum(keyed[1].used.values()) == sum(own.ours)
    assert any("3 ids of the provider" in note for note in own.notes)
    assert {("unknown", "apikey_0")} == {(one.cause, one.cell.group.key) for one in both.tokens}, "two keys are one"


def test_a_report_that_does_not_tell_keys_apart_is_refused(calls: list[Served], tmp_path: Path) -> None:
    """Comparing all keys with some of them would find nothing but differences."""
    (tmp_path / "map.toml").write_text('[api_keys]\napikey_1 = "acme"\n')
    usage = text(analytics_usage(calls, by=("model",)))

    with pytest.raises(InvalidInput, match=r"group_by\[\]=api_key_id"):
        World([], calls).reconciled(tmp_path, usage, scope=Scope(ids=IdMap.load(tmp_path / "map.toml")))


def test_corrections_count_when_the_call_was_made(calls: list[Served], tmp_path: Path) -> None:
    """A late entry of days later belongs to the hour in which the call was made."""
    late = booked(1, calls[0], kind="late", after="expired", booked_at=calls[0].at_ms + 30 * HOUR_MS)

    result = World([late], calls[:1]).reconciled(tmp_path, text(analytics_usage(calls[:1])))

    assert [] == result.tokens


def test_models_by_dated_and_undated_names_are_the_same(calls: list[Served], tmp_path: Path) -> None:
    """Callers name an alias; the provider says which edition served it."""
    dated = [replace(call, model="plain-20260101") for call in calls]
    ours = [booked(number, call) for number, call in enumerate(calls, 1)]

    result = World(ours, dated).reconciled(tmp_path, text(analytics_usage(dated)))

    assert [] == result.tokens


def test_a_map_that_is_none_is_refused(tmp_path: Path) -> None:
    """The file and the place are named."""
    file = tmp_path / "map.toml"
    for content, problem in (
        ("api_keys = 3", r"map.toml is no map of the provider's ids: .*api_keys"),
        ("[api_keys]\na = { tenants = 'x' }", "tenants"),
        ("", "neither"),
        ("=", "map.toml"),
    ):
        file.write_text(content)
        with pytest.raises(InvalidInput, match=problem):
            IdMap.load(file)
