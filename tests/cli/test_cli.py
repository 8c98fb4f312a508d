"""The commands, on a real embedded server that a meter has written to."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis

import meterlib
from meterlib import AsyncMeter, Limit, Meter, Policy, QuotaExceeded, Usage
from meterlib.billing.reports.report import COLUMNS
from meterlib.cli import main
from meterlib.cli.options import moment_ms
from meterlib.cli.tables import Column, print_table
from meterlib.cli.times import in_text, local_text
from meterlib.config import Config
from meterlib.core.ledger import Settlement
from meterlib.errors import InvalidInput
from meterlib.store import flows
from meterlib.store.flows import Context
from meterlib.store.journal import Journal
from meterlib.store.keys import LAYOUT_VERSION, shard_keys, shard_of
from meterlib.testing import Clock
from tests.support.commands import Ran, Run, runner
from tests.support.processes import running
from tests.support.servers import Server

SETTINGS = """\
[store]
url = "embedded://./data"
shards = 4

[[limit]]
name = "requests"
quota = 50
window = "1h"
per = ["provider"]

[[limit]]
name = "opus"
unit = "input_tokens"
quota = 50_000
window = "5h"
match = { model = "claude-opus-*" }

[[limit]]
name = "parallel"
quota = 4
open = true

[[limit]]
name = "budget"
unit = "cost_nanousd"
quota = 1_000_000
period = "month"
tz = "Europe/Berlin"

[[tenant]]
name = "acme"
quotas = { requests = 200 }

[[tenant]]
name = "globex"
funding = "own"
"""
ELSEWHERE = "initech"  # in another shard than acme
OPUS = {"provider": "anthropic", "model": "claude-opus-4-5"}
HAIKU = {"provider": "anthropic", "model": "claude-haiku-4-5", "team": "=red"}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    file = tmp_path / "meterlib.toml"
    file.write_text(SETTINGS)
    return Config.load(file)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command with the settings of this test."""
    return runner(capsys, tmp_path / "meterlib.toml")


@pytest.fixture
def meter(config: Config) -> Iterator[Meter]:
    """A meter at the real time."""
    with config.connect() as meter:
        yield meter


@pytest.fixture
def clock() -> Clock:
    return Clock(at_ms("2026-03-01T12:00+00:00"))


@pytest.fixture
def then(config: Config, clock: Clock) -> Iterator[Meter]:
    """A meter at a time of the test's."""
    with config.connect(clock=clock) as meter:
        yield meter


def at_ms(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp() * 1000)


def call(meter: Meter, tenant: str = "acme", attributes: dict[str, str] = HAIKU, **tokens: int) -> None:
    meter.reserve(tenant, attributes).settle(Usage(**tokens))  # type: ignore[arg-type]


def server(config: Config) -> redis.Redis:
    """A client of one's own, for what no meter would do."""
    return redis.Redis(unix_socket_path=str(Path(config.store.url.removeprefix("embedded://")) / "valkey.sock"))


def delete_entries(config: Config, tenant: str, *numbers: int) -> None:
    ledger = shard_keys("meterlib", shard_of(tenant, 4))[3]
    with server(config) as client:
        assert len(numbers) == client.xdel(ledger, *(f"{n}-0" for n in numbers))


# ── report ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_report_adds_up_what_each_tenant_and_model_used(meter: Meter, run: Run) -> None:
    """The bill of tokens is one command."""
    call(meter, input_tokens=1_000, cache_creation_input_tokens=500, cache_read_input_tokens=9, output_tokens=20)
    call(meter, input_tokens=234, output_tokens=3)
    call(meter, attributes=OPUS, input_tokens=7)
    call(meter, "globex", input_tokens=1)

    ran = run("report")

    assert 0 == ran.code
    rows = [line.split() for line in ran.out.splitlines()]
    assert ["acme", "claude-haiku-4-5", "2", "1,234", "500", "9", "23"] in rows
    assert ["acme", "claude-opus-4-5", "1", "7", "0", "0", "0"] in rows
    assert ["total", "4", "1,242", "500", "9", "23"] in rows
    assert "complete: 4 entries of 4 shards, no gap" in ran.out
    assert "" == ran.err


def test_json_and_csv_have_the_same_columns_and_plain_numbers(meter: Meter, run: Run) -> None:
    """Programs find the API's own names, and numbers without separators."""
    call(meter, input_tokens=1_234_567)
    meter.record("acme", {}, Usage(amounts={"cost_nanousd": 5}))
    by = ["--by", "tenant,model", "--by", "kind"]

    document = run("report", "--json", *by).json
    table = list(csv.reader(io.StringIO(run("report", "--format", "csv", *by).out)))

    assert ["tenant", "model", "kind", *COLUMNS, "amounts.cost_nanousd"] == table[0] == list(document["rows"][0])
    assert ["tenant", "model", "kind"] == document["by"]
    assert ("UTC", None, None, None) == tuple(document[name] for name in ("tz", "since", "until", "tenant"))
    assert [("acme", "claude-haiku-4-5", "settled", 1, 1_234_567), ("acme", None, "recorded", 1, 0)] == [
        tuple(row[name] for name in ("tenant", "model", "kind", "calls", "input_tokens")) for row in document["rows"]
    ]
    assert [["" if cell is None else str(cell) for cell in row.values()] for row in document["rows"]] == table[1:]
    assert 5 == document["total"]["amounts.cost_nanousd"]


def test_csv_cells_are_no_formulas_and_the_completeness_stays_out_of_them(meter: Meter, run: Run) -> None:
    """A tenant cannot make the finance department's spreadsheet run a formula."""
    for team in ("=1+1", "+1", "-1", "@x", "plain"):
        call(meter, attributes={"team": team})
    call(meter, attributes={})

    ran = run("report", "--by", "team", "--format", "csv")

    assert ["'+1", "'-1", "'=1+1", "'@x", "plain", ""] == [row[0] for row in csv.reader(ran.out.splitlines()[1:])]
    assert "complete" not in ran.out
    assert "complete: 6 entries" in ran.err


def test_the_time_range_is_the_zones_and_half_open(then: Meter, clock: Clock, run: Run) -> None:
    """A month in the customer's zone is that month and nothing else."""
    for moment in ("2026-03-28T22:59:59", "2026-03-28T23:00:00", "2026-03-29T21:59:59", "2026-03-29T22:00:00"):
        clock.set(at_ms(f"{moment}+00:00"))
        call(then, output_tokens=1)
    zone = ["--tz", "Europe/Berlin", "--by", "day", "--json"]

    assert {"2026-03-28": 1, "2026-03-29": 2, "2026-03-30": 1} == {
        row["day"]: row["calls"] for row in run("report", *zone).json["rows"]
    }
    asked = run("report", *zone, "--since", "2026-03-29", "--until", "2026-03-30").json
    assert ("2026-03-29T00:00+01:00", "2026-03-30T00:00+02:00") == (asked["since"], asked["until"])
    assert 2 == asked["total"]["calls"] == asked["completeness"]["entries"]


def test_a_report_of_one_tenant_has_nothing_of_the_others(meter: Meter, run: Run) -> None:
    """A customer's bill can be shown to that customer."""
    call(meter, "acme")
    call(meter, "globex")

    document = run("report", "--tenant", "globex", "--json").json

    assert ["globex"] == [row["tenant"] for row in document["rows"]]
    assert [shard_of("globex", 4)] == [shard["shard"] for shard in document["completeness"]["shards"]]


def test_the_report_counts_what_did_not_end_as_it_should(then: Meter, clock: Clock, run: Run) -> None:
    """Late, expired, cancelled, partial and corrected calls are all to be seen, and so is what is still open."""
    then.reserve("acme", OPUS).cancel()
    expired = then.reserve("acme", OPUS, Usage(input_tokens=5), lease_ms=1000)
    clock.advance(ms=2000)
    then.sweep()
    entry = then.settle("acme", expired.id, Usage(output_tokens=9), quality="partial")
    then.adjust(entry, {"output_tokens": -2}, "as the provider counts")
    then.reserve("acme", OPUS)

    ran = run("report", "--json")
    lines = run("report").out

    assert {"calls": 1, "late": 1, "expired": 1, "cancelled": 1, "partial": 1, "adjusted": 1, "output_tokens": 7} == {
        column: amount for column, amount in ran.json["total"].items() if amount
    }
    assert (1, 1, 1) == tuple(ran.json["completeness"][name] for name in ("open_reservations", "late", "expired"))
    assert "open reservations 1 (their usage is not in yet), late 1, expired 1, partial 1" in lines


@pytest.mark.parametrize(
    ("deleted", "named"), [([2, 3], "2-3"), ([1], "1"), ([5], "5"), ([1, 2, 3, 4, 5], "1-5"), ([2, 4], "2, 4")]
)
def test_a_ledger_with_a_hole_is_told_and_fails_a_strict_report(
    meter: Meter, config: Config, run: Run, deleted: list[int], named: str
) -> None:
    """Nobody bills from a ledger that lost an entry without knowing it."""
    for _ in range(5):
        call(meter)
    delete_entries(config, "acme", *deleted)
    shard = shard_of("acme", 4)

    ran = run("report", "--json")

    assert 0 == ran.code
    assert not ran.json["completeness"]["complete"]
    missing = ", ".join(f"{shard}:{part}" for part in named.split(", "))
    assert f"INCOMPLETE: {5 - len(deleted)} entr" in run("report").out
    for output in (["--format", "table"], ["--json"], ["--format", "csv"]):
        strict = run("report", "--strict", *output)
        assert 3 == strict.code
        assert f"missing: {missing}\n" in strict.out + strict.err or output == ["--json"]


def test_a_hole_at_another_time_does_not_spoil_a_report(then: Meter, clock: Clock, config: Config, run: Run) -> None:
    """March is complete, whatever happened to April."""
    for _ in range(6):
        call(then)
        clock.advance(ms=86_400_000)
    delete_entries(config, "acme", 5)

    assert 0 == run("report", "--strict", "--until", "2026-03-04").code
    assert 3 == run("report", "--strict", "--until", "2026-03-06").code
    assert 0 == run("report", "--strict", "--since", "2026-03-06T13:00").code
    assert 3 == run("report", "--strict", "--since", "2026-03-05").code


def test_a_report_of_the_last_days_reads_only_those(then: Meter, clock: Clock, run: Run) -> None:
    """The time range cuts the same whether it begins at an entry, between two, before all or behind all."""
    for _ in range(20):
        call(then)
        clock.advance(ms=1000)

    counted = [
        run("report", "--since", f"2026-03-01T{since}", "--json").json["total"]["calls"]
        for since in ("11:00:00", "12:00:00", "12:00:00.001", "12:00:07", "12:00:18.5", "12:00:19", "12:00:20")
    ]

    assert [20, 20, 19, 13, 1, 1, 0] == counted


def test_an_empty_ledger_is_a_report_without_rows(meter: Meter, run: Run) -> None:
    """Nothing used is an answer, and no error."""
    meter.peek("acme")

    table, document, cells = run("report", "--strict"), run("report", "--json").json, run("report", "--format", "csv")

    assert (0, True) == (table.code, "no entries" in table.out)
    assert "complete: 0 entries of 4 shards, no gap" in table.out
    assert ([], True) == (document["rows"], document["completeness"]["complete"])
    assert [["tenant", "model", *COLUMNS]] == list(csv.reader(io.StringIO(cells.out)))


def test_what_nobody_has_is_answered_with_what_was_probably_meant(meter: Meter, run: Run) -> None:
    """An empty column or report is explained."""
    call(meter)

    assert "no entry has an attribute 'tenat'; did you mean 'tenant'?" in run("report", "--by", "tenat").err
    assert "no entries of tenant 'acne'; did you mean 'acme'?" in run("report", "--tenant", "acne").err


def estimated_call(meter: Meter, estimate: int, tenant: str = "acme", **tokens: int) -> None:
    meter.reserve(tenant, HAIKU, Usage(input_tokens=estimate)).settle(Usage(**tokens))  # type: ignore[arg-type]


def test_the_report_of_estimates_compares_them_with_the_charges(meter: Meter, run: Run) -> None:
    """The operator sees how good the estimates are before trusting them to admit calls."""
    estimated_call(meter, 1_000, input_tokens=100, cache_creation_input_tokens=1_100, cache_read_input_tokens=9_000)
    estimated_call(meter, 1_000, input_tokens=900)
    estimated_call(meter, 1_000, input_tokens=2_000)
    estimated_call(meter, 300, "globex", input_tokens=100)
    call(meter, input_tokens=5)

    table = run("report", "--estimates", "--by", "tenant")
    document = run("report", "--estimates", "--by", "tenant", "--json").json
    cells = list(csv.reader(io.StringIO(run("report", "--estimates", "--by", "tenant", "--format", "csv").out)))

    rows = [line.split() for line in table.out.splitlines()]
    assert ["acme", "3", "1.200", "2.000"] in rows
    assert ["globex", "1", "0.333", "0.333"] in rows
    assert ["total", "4", "0.900", "2.000"] in rows
    assert "complete: 5 entries of 4 shards, no gap" in table.out
    assert {"tenant": "acme", "calls": 3, "median": 1.2, "p95": 2.0} == document["rows"][0]
    assert {"calls": 4, "median": 0.9, "p95": 2.0} == document["total"]
    assert [
        ["tenant", "calls", "median", "p95"],
        ["acme", "3", "1.2", "2.0"],
        ["globex", "1", "0.333", "0.333"],
    ] == cells


def test_a_report_of_estimates_where_there_are_none_says_so(meter: Meter, run: Run) -> None:
    """No calls to compare is an answer, and no error."""
    call(meter)

    table = run("report", "--estimates", "--tenant", "acme")

    assert (0, "") == (table.code, table.err)
    assert "no settled calls with an estimate" in table.out
    assert {"calls": 0, "median": None, "p95": None} == run("report", "--estimates", "--json").json["total"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--since", "yesterday"], "--since: 'yesterday' is no date or time in ISO 8601, such as 2026-03-01"),
        (["--until", "2026-02-30"], "--until: '2026-02-30' is no date"),
        (["--since", "2026-03-02", "--until", "2026-03-01"], "--until: 2026-03-01 is not after --since 2026-03-02"),
        (["--since", "2026-03-02", "--until", "2026-03-02"], "nothing is in between"),
        (["--since", "2026-03-29T02:30", "--tz", "Europe/Berlin"], "does not exist in Europe/Berlin"),
        (["--until", "9999-12-31T23:59", "--tz", "America/New_York"], "is too far away"),
        (["--since", "0001-01-01T00:00+14:00"], "is too far away"),
        (["--since", "0001-01-01T00:00Z", "--tz", "America/New_York"], "is too far away"),
        (["--tz", "Mars/Base"], "--tz: 'Mars/Base' is no IANA time zone"),
        (["--by", "tenant,,model"], "--by: '' is no name"),
        (["--by", "model", "--by", "attribute:model"], "--by: 'model' is named twice"),
        (["--tenant", " acme"], "--tenant: has a space at an end"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(run: Run, config: Config, words: list[str], says: str) -> None:
    """A mistake on the command line is told in one line, before anything is read."""
    ran = run("report", *words)

    assert (2, "") == (ran.code, ran.out)
    assert says in ran.err
    assert 1 == ran.err.count("\n")


def test_a_store_of_another_layout_is_not_read_in_part(meter: Meter, run: Run, tmp_path: Path) -> None:
    """With the wrong number of shards some tenants would be missing from the bill."""
    call(meter)
    other = tmp_path / "other.toml"
    other.write_text(SETTINGS.replace("shards = 4", "shards = 2"))

    ran = run("report", config=other)

    assert (1, "") == (ran.code, ran.out)
    assert f"{LAYOUT_VERSION}/4 is the layout of the store, not {LAYOUT_VERSION}/2" in ran.err


@pytest.mark.parametrize(
    ("moment", "tz", "ms"),
    [
        ("2026-03-01", "UTC", at_ms("2026-03-01T00:00+00:00")),
        ("2026-03-01T00:00Z", "Europe/Berlin", at_ms("2026-03-01T00:00+00:00")),
        ("2026-03-01T12:00", "Asia/Kathmandu", at_ms("2026-03-01T06:15+00:00")),
        ("2026-10-25T02:30", "Europe/Berlin", at_ms("2026-10-25T02:30+02:00")),
        ("2026-03-01T00:00:00.0005", "UTC", at_ms("2026-03-01T00:00+00:00") + 1),
    ],
)
def test_moments_are_meant_in_the_zone_unless_they_name_their_own(moment: str, tz: str, ms: int) -> None:
    """`--since` means what its reader would think."""
    assert ms == moment_ms(moment, tz, "--since")


# ── limits ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_partition_of_a_tenants_limits_is_shown(meter: Meter, run: Run) -> None:
    """Support can tell a customer which limit is used up, without knowing what to ask for."""
    call(meter, attributes=OPUS, input_tokens=40_000)
    meter.reserve("acme", OPUS, Usage(input_tokens=2_000))
    call(meter, attributes={"provider": "bed/rock", "model": "x"})
    call(meter, "acme2", attributes={"provider": "elsewhere"})

    limits = run("limits", "acme", "--json").json["limits"]

    assert [
        ("requests", {"provider": "anthropic"}, 200, 2, 1, 198),
        ("requests", {"provider": "bed/rock"}, 200, 1, 0, 199),
        ("opus", {}, 50_000, 42_000, 2_000, 8_000),
        ("parallel", {}, 4, 1, 1, 3),
        ("budget", {}, 1_000_000, 0, 0, 1_000_000),
    ] == [
        tuple(limit[name] for name in ("name", "partition", "quota", "used", "held", "remaining")) for limit in limits
    ]
    assert 0 < limits[0]["frees_in_ms"] <= limits[0]["resets_in_ms"] <= 3_660_000
    assert limits[0]["resets_at_ms"] - limits[0]["now_ms"] == limits[0]["resets_in_ms"]


def test_the_table_of_limits_says_when_each_is_free_again(meter: Meter, run: Run) -> None:
    """Whoever waits knows how long."""
    call(meter, attributes=OPUS, input_tokens=60_000)
    meter.record("acme", OPUS, Usage(amounts={"cost_nanousd": 1}))

    ran = run("limits", "acme")
    columns = [re.split(r"  +", line) for line in ran.out.splitlines()]

    assert "limits of acme (hosted)" in ran.out
    (opus,) = (line for line in columns if line[0] == "opus (input_tokens)")
    assert ["all", "50,000", "60,000", "0", "0", "all then"] == opus[1:7]
    assert re.fullmatch(r"in [45] h( \d+ min)? \(.*\)", opus[7])
    (budget,) = (line for line in columns if line[0] == "budget (USD)")
    assert ["all", "$0.0010", "$0.000000001", "$0.00", "$0.0010"] == budget[1:6]
    assert "Used above the quota is debt" in ran.out


def test_the_limits_of_a_call_are_those_it_would_touch(meter: Meter, run: Run) -> None:
    """With attributes the question is: may this call be made?"""
    call(meter, attributes=OPUS)

    ran = run("limits", "globex", "--attribute", "provider=anthropic", "--attribute", "model=claude-haiku", "--json")

    assert "own" == ran.json["funding"]
    assert [("requests", {"provider": "anthropic"}, 50, 0), ("parallel", {}, 4, 0), ("budget", {}, 1_000_000, 0)] == [
        tuple(limit[name] for name in ("name", "partition", "quota", "used")) for limit in ran.json["limits"]
    ]


def test_an_unknown_tenant_has_all_its_quota_and_a_hint(meter: Meter, run: Run) -> None:
    """Tenants need not be listed, so a mistyped one is no error; but it is said."""
    meter.peek("acme")

    ran = run("limits", "globx")

    assert 0 == ran.code
    assert re.search(r"requests +any +50 +0 +0 +50 +- +-", ran.out)
    assert "nothing of tenant 'globx' counts now, and the settings do not list it; did you mean 'globex'?" in ran.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a\nb"], "tenant: has a character that cannot be printed"),
        (["acme", "--attribute", "a=1", "--attribute", "a=2"], "--attribute: one name is given two values"),
        (["acme", "--attribute", "key=sk-123"], "looks like a credential"),
    ],
)
def test_limits_of_nonsense_are_refused(run: Run, config: Config, words: list[str], says: str) -> None:
    """What could never be a call is told."""
    ran = run("limits", *words)

    assert (2, "") == (ran.code, ran.out)
    assert says in ran.err


def test_settings_without_limits_are_told(meter: Meter, run: Run, tmp_path: Path) -> None:
    """An empty answer is explained."""
    meter.peek("acme")
    (tmp_path / "none.toml").write_text('[store]\nurl = "embedded://./data"\nshards = 4\n')

    assert "no limits are configured" in run("limits", "acme", config=tmp_path / "none.toml").err


KNOWN = Policy(
    limits=[
        Limit(name="a", quota=5, window="1m", per=("provider", "key")),
        Limit(name="b", quota=6, period="day", match={"provider": "p*"}),
        Limit(name="c", quota=7, open=True, per=("key",)),
        Limit(name="d", quota=8, window="1h", shared=True),
    ]
)


@pytest.mark.parametrize("kind", ["memory", "fakeredis", "embedded", "async"])
def test_every_store_lists_the_same_partitions(kind: str, tmp_path: Path, clock: Clock) -> None:
    """What `meterlib limits` shows does not depend on the store, nor on a tenant's odd name."""
    tenant, options = "we/ird *[a]%2F", meterlib.StoreOptions(shards=1)
    target: Any = {"memory": "memory://", "fakeredis": fakeredis.FakeRedis()}.get(kind, f"embedded://{tmp_path}/data")
    with Meter(target, KNOWN, options=options, clock=clock) as meter:
        meter.reserve(tenant, {"provider": "p/1", "key": "k"})
        meter.reserve(tenant, {"key": "é"})
        meter.reserve("weird", {"provider": "other"})
        meter.reserve("*", {"provider": "star"})

        flow = flows.partitions(Context(KNOWN, options, clock, "deny"), tenant)
        if kind == "async":

            async def ask() -> list[Any]:
                async with AsyncMeter(target, KNOWN, options=options, clock=clock) as other:
                    return await other._run(flow)

            found = asyncio.run(ask())
        else:
            found = meter._run(flow)

    assert [
        ("b", {}, 1, 6),
        ("d", {}, 4, 8),
        ("c", {"key": "k"}, 1, 7),
        ("c", {"key": "é"}, 1, 7),
        ("a", {"key": "é"}, 1, 5),
        ("a", {"provider": "p/1", "key": "k"}, 1, 5),
    ] == sorted(
        ((one.state.name, dict(one.attributes), one.state.used, one.state.quota) for one in found),
        key=lambda one: (len(one[1]), one[0] != "c", str(one)),
    )


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "now"),
        (400, "in 400 ms"),
        (11_001, "in 12 s"),
        (119_000, "in 119 s"),
        (121_000, "in 3 min"),
        (7_200_000, "in 2 h"),
        (3 * 3_600_000 + 60_000, "in 3 h 1 min"),
        (50 * 3_600_000, "in 2 d 2 h"),
        (9 * 86_400_000 - 1, "in 9 d"),
    ],
)
def test_waits_are_told_in_one_or_two_units_and_never_too_short(ms: int, text: str) -> None:
    """After the wait that was told, the time has come."""
    assert text == in_text(ms)


def test_a_moment_is_told_with_as_much_date_as_it_needs() -> None:
    """Today has a clock time, this week a day, and what is further away a date."""
    now = int(datetime(2026, 3, 2, 9).timestamp() * 1000)

    assert ["10:00:00", "Tue 09:00", "2026-03-09"] == [
        local_text(now + hours * 3_600_000, now) for hours in (1, 24, 7 * 24)
    ]


# ── doctor ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def findings(ran: Ran, status: str) -> dict[str, str]:
    return {
        one["check"]: f"{one['found']} > {one['advice']}" for one in ran.json["findings"] if one["status"] == status
    }


def test_a_store_that_is_well_passes_and_is_left_as_it_was(meter: Meter, config: Config, run: Run) -> None:
    """The doctor can be asked at any time, also in production."""
    call(meter)
    meter.reserve(ELSEWHERE, OPUS)
    with server(config) as client:
        keys, before = sorted(client.keys("*")), [meter.peek(tenant, OPUS) for tenant in ("acme", ELSEWHERE)]
        ran = run("doctor", "--json")
        assert keys == sorted(client.keys("*"))

    assert (0, True, {}) == (ran.code, ran.json["healthy"], findings(ran, "failure"))
    good = findings(ran, "ok")
    assert good["server"].startswith("Valkey ")
    assert "noeviction" in good["eviction"]
    assert "can lose the last second or two" in good["durability"]
    assert good["ledger"].startswith("4 shards, 2 in use: 1 entries, none missing; reservations open: 1")
    assert "50 requests pass, one more is denied for up to 60 min" in good["limit requests"]
    assert "4 requests pass, one more is denied until a call ends" in good["limit parallel"]
    assert "Usage(amounts={'cost_nanousd': …})" in good["limit budget"]
    after = [meter.peek(tenant, OPUS) for tenant in ("acme", ELSEWHERE)]
    assert [[limit.used for limit in limits] for limits in before] == [
        [limit.used for limit in limits] for limits in after
    ]


def test_the_doctor_says_for_people_what_it_says_for_programs(meter: Meter, run: Run) -> None:
    """Each finding is a line with its status in front."""
    call(meter)

    ran = run("doctor")

    assert 0 == ran.code
    assert re.search(r"^ok       eviction: maxmemory-policy is noeviction$", ran.out, re.MULTILINE)
    assert "failures: 0" in ran.out


@pytest.mark.parametrize(
    ("limit", "status", "says"),
    [
        ('quota = 0\nwindow = "1m"', "ok", "quota 0: every call is denied, for good"),
        ('quota = 1\nwindow = "1ms"', "ok", "1 requests pass, one more is denied for up to 1 ms"),
        ('quota = 9\nwindow = "1m"\noversize = "reject"', "ok", "9 requests pass"),
        ('quota = 9\nperiod = "hour"\ntz = "Asia/Kathmandu"\non_expiry = "free"', "ok", "until the hour ends"),
        ("quota = 9007199254740991\nopen = true", "ok", "one more is denied until a call ends"),
        ('quota = 9\nwindow = "1m"\nmatch = { model = "*sonnet*[1m]" }\nper = ["key"]', "ok", "9 requests pass"),
        ('quota = 9\nwindow = "1m"\nmatch = { model = ["sk-*", "gpt-?"] }', "ok", "9 requests pass"),
        (
            'quota = 9\nwindow = "1m"\nmatch = { model = "Bearer *" }',
            "failure",
            "can never deny: no attribute 'model' can",
        ),
        ('quota = 9\nwindow = "1m"\nmatch = { model = "sk-*" }', "failure", "can match ['sk-*']"),
        ('quota = 9\nwindow = "1m"\nmatch = { model = " x" }', "failure", "can never deny"),
    ],
)
def test_each_limit_is_proven_able_to_deny_or_said_why_not(
    run: Run, tmp_path: Path, limit: str, status: str, says: str
) -> None:
    """A limit that would never deny is found before the bill is."""
    file = tmp_path / "meterlib.toml"
    file.write_text(f'[store]\nurl = "embedded://./data"\n[[limit]]\nname = "mine"\n{limit}\n')
    (tmp_path / "data").mkdir(mode=0o700)

    ran = run("doctor", "--json")

    assert says in findings(ran, status)["limit mine"]
    assert (1 if status == "failure" else 0) == ran.code


def test_a_ledger_that_lost_entries_fails(meter: Meter, config: Config, run: Run) -> None:
    """Deleted entries are found without reading the ledger."""
    for tenant in ("acme", ELSEWHERE):
        for _ in range(4):
            call(meter, tenant)
    delete_entries(config, "acme", 2)
    delete_entries(config, ELSEWHERE, 4)

    ran = run("doctor", "--json")
    bad = findings(ran, "failure")

    assert 1 == ran.code
    assert "1 entries are missing between 1 and 4" in bad[f"shard {shard_of('acme', 4)}"]
    assert "its state counts 4 entries, but its ledger ends at 3" in bad[f"shard {shard_of(ELSEWHERE, 4)}"]
    assert "ledger" not in findings(ran, "ok")


def test_a_state_older_than_its_ledger_fails(meter: Meter, config: Config, run: Run) -> None:
    """A state that was lost while the ledger was kept is found before a settlement is refused."""
    call(meter)
    shard = shard_of("acme", 4)
    with server(config) as client:
        client.delete(shard_keys("meterlib", shard)[0])

    assert "nothing can be booked" in findings(run("doctor", "--json"), "failure")[f"shard {shard}"]


def test_settings_of_the_server_that_lose_data_are_found(meter: Meter, config: Config, run: Run) -> None:
    """An eviction policy that deletes ledger entries is a failure, and weak durability a warning."""
    call(meter)
    with server(config) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("maxmemory", "2mb")
        client.config_set("appendfsync", "no")
        bad = run("doctor", "--json")
        client.config_set("appendonly", "no")
        worse = run("doctor", "--json")

    assert 1 == bad.code
    assert "set maxmemory-policy noeviction" in findings(bad, "failure")["eviction"]
    assert "never synced" in findings(bad, "warning")["durability"]
    assert re.search(r"of 2\.0 MiB used", str(bad.json))
    assert "no append-only file: a restart loses" in findings(worse, "warning")["durability"]


def test_reservations_that_nobody_sweeps_are_found(then: Meter, clock: Clock, run: Run) -> None:
    """A store whose gateways are all gone does not look healthy."""
    then.reserve("acme", OPUS, lease_ms=1000)
    clock.advance(ms=61_001)
    call(then, "globex")
    then.reserve("acme", HAIKU, lease_ms=1000)

    found = findings(run("doctor", "--json"), "warning")

    assert "1 reservations have been overdue for a minute" in found[f"shard {shard_of('acme', 4)}"]


def test_a_server_clock_that_was_set_back_is_found(config: Config, clock: Clock, run: Run) -> None:
    """Time that goes on at half speed is explained."""
    clock.set(at_ms("2096-01-01T00:00+00:00"))
    with config.connect(clock=clock) as meter:
        call(meter)

        found = findings(run("doctor", "--json"), "warning")

    assert "ahead of the server's, which was set back" in found[f"shard {shard_of('acme', 4)}"]


def test_settlements_that_wait_in_the_journal_are_found(meter: Meter, run: Run, tmp_path: Path) -> None:
    """Usage that is not in the ledger yet is not forgotten."""
    call(meter)
    file = tmp_path / "journalled.toml"
    file.write_text(SETTINGS.replace("shards = 4", 'shards = 4\njournal = "journal"'))
    assert "nothing waits" in findings(run("doctor", "--json", config=file), "ok")["journal"]

    Journal(tmp_path / "journal").append(Settlement(tenant="acme", reservation_id="r", usage=Usage()))

    assert "1 settlements wait" in findings(run("doctor", "--json", config=file), "warning")["journal"]


def test_what_a_managed_server_does_not_tell_is_not_visible(valkey: Server, run: Run, tmp_path: Path) -> None:
    """Without INFO and CONFIG the limits are proven all the same."""
    with valkey.client() as client:
        client.execute_command("ACL", "SETUSER", "guest", "on", ">pw", "~managed*", "+@all", "-info", "-config")
        url = valkey.url.replace("redis://", "redis://guest:pw@")
        file = tmp_path / "managed.toml"
        file.write_text(f'preset = "buildkite-anthropic"\n[store]\nurl = "{url}"\nprefix = "managed"\n')
        ran = run("doctor", "--json", config=file)
        client.execute_command("ACL", "SETUSER", "guest", ">other", "<pw")
        refused, looked = run("doctor", "--json", config=file), run("limits", "acme", config=file)
        client.execute_command("ACL", "DELUSER", "guest")
        left = client.keys("managed*")

    assert 1 == looked.code
    assert "refused our credentials" in looked.err
    assert f"[store] url of {file}" in looked.err
    assert "pw@" not in looked.err
    assert 0 == ran.code
    assert ["server", "eviction", "memory", "durability"] == list(findings(ran, "warning"))
    assert all("not visible" in text for text in findings(ran, "warning").values())
    assert "50,000 input_tokens pass" in findings(ran, "ok")["limit input_tokens"]
    assert 1 == refused.code
    assert "refused our credentials" in findings(refused, "failure")["store"]
    assert "pw@" not in refused.out
    assert [] == left


def test_a_store_that_does_not_answer_is_a_failure(run: Run, tmp_path: Path) -> None:
    """The first thing to look at is said first, and nothing else."""
    file = tmp_path / "down.toml"
    file.write_text('[store]\nurl = "redis://127.0.0.1:1/0"\ntimeout_ms = 50\ndeadline_ms = 50\n')

    ran = run("doctor", "--json", config=file)

    assert 1 == ran.code
    assert "Connection refused" in findings(ran, "failure")["store"]
    assert 1 == run("report", config=file).code


def test_a_memory_store_is_warned_of(run: Run, tmp_path: Path) -> None:
    """Nobody runs a gateway on a store that forgets."""
    file = tmp_path / "memory.toml"
    file.write_text('preset = "buildkite-anthropic"\n[store]\nurl = "memory://"\n')

    assert "gone when it ends" in findings(run("doctor", "--json", config=file), "warning")["store"]


# ── ledger show ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_raw_entries_are_one_json_object_a_line(meter: Meter, run: Run) -> None:
    """The ledger can be read by any program, in the API's own names."""
    call(meter, input_tokens=31, cache_creation_input_tokens=1149, output_tokens=212)
    meter.reserve("globex", OPUS).cancel()

    entries = [json.loads(line) for line in run("ledger", "show", "--json").out.splitlines()]

    assert {"acme", "globex"} == {entry["tenant"] for entry in entries}
    (settled,) = (entry for entry in entries if entry["kind"] == "settled")
    assert {"input_tokens": 31, "cache_creation_input_tokens": 1149, "output_tokens": 212} == settled["usage"]
    assert (shard_of("acme", 4), 1, "hosted", "final", HAIKU) == tuple(
        settled[name] for name in ("shard", "n", "funding", "quality", "attributes")
    )
    assert {"reservation_id", "reserved_at", "booked_at", "epoch"} <= settled.keys()


def test_entries_are_read_on_from_a_number(then: Meter, run: Run) -> None:
    """Whoever keeps up with a shard asks for what came since."""
    for _ in range(5):
        call(then)
    shard = str(shard_of("acme", 4))

    def numbers(*words: str) -> list[str]:
        return [line.split()[0] for line in run("ledger", "show", *words).out.splitlines()]

    assert [f"{shard}:{n}" for n in (4, 5)] == numbers("--shard", shard, "--after", "3")
    assert [f"{shard}:{n}" for n in (2, 3)] == numbers("--tenant", "acme", "--after", "1", "--limit", "2")
    assert [] == numbers("--tenant", "acme", "--limit", "0")
    assert [] == numbers("--shard", shard, "--after", "99")


def test_an_entry_reads_well_on_one_line(then: Meter, run: Run) -> None:
    """What happened can be seen at a glance."""
    entry = then.reserve("acme", OPUS, reservation_id="r1").settle(Usage(input_tokens=1, output_tokens=2))
    then.adjust(entry, {"output_tokens": -1}, "as billed", adjust_id="a1")
    then.settle("acme", "nobody", Usage(), quality="estimated", attributes={})
    shard = shard_of("acme", 4)

    assert [
        f"{shard}:1  2026-03-01 12:00:00.000  settled  acme  claude-opus-4-5  in=1 out=2  r1",
        f"{shard}:2  2026-03-01 12:00:00.000  adjusted  acme  claude-opus-4-5  out=-1  of {shard}:1: as billed  a1",
        f"{shard}:3  2026-03-01 12:00:00.000  late after unknown  acme  -  -  estimated  nobody",
    ] == run("ledger", "show").out.splitlines()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--after", "3"], "--after: each shard has numbers of its own"),
        (["--shard", "4"], "--shard: the store has shards 0 to 3, and no 4"),
        (["--tenant", "acme", "--shard", str((shard_of("acme", 4) + 1) % 4)], "the entries of 'acme' are in shard"),
    ],
)
def test_entries_that_cannot_be_are_not_looked_for(meter: Meter, run: Run, words: list[str], says: str) -> None:
    """A mistaken question has no empty answer."""
    meter.peek("acme")

    ran = run("ledger", "show", *words)

    assert (2, "") == (ran.code, ran.out)
    assert says in ran.err


# ── All commands ──────────────────────────────────────────────────────────────────────────────────────────────────────

COMMANDS = [["report"], ["limits", "acme"], ["doctor"], ["ledger", "show"]]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_settings_that_cannot_be_read_are_told_in_one_line(run: Run, tmp_path: Path, words: list[str]) -> None:
    """Every command says what is wrong with its settings, and how to mend it, and does nothing else."""
    missing = run(*words, config=tmp_path / "absent.toml")
    (tmp_path / "wrong.toml").write_text(SETTINGS.replace("quota = 50\n", "quotta = 50\n"))
    wrong = run(*words, config=tmp_path / "wrong.toml")

    assert (2, "") == (missing.code, missing.out)
    assert f"meterlib: {tmp_path}/absent.toml cannot be read: No such file or directory\n" == missing.err
    assert (2, "") == (wrong.code, wrong.out)
    assert wrong.err.startswith("meterlib: limit[0].quotta: there is no such setting; did you mean 'quota'?")
    assert 1 == wrong.err.count("\n")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_settings_here_are_taken_if_none_are_named(
    meter: Meter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """In the folder of the settings no option is needed."""
    call(meter)
    monkeypatch.chdir(tmp_path)

    assert 0 == main(words)
    assert "" == capsys.readouterr().err


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_looking_at_a_store_that_is_not_there_does_not_make_one(
    run: Run, config: Config, tmp_path: Path, words: list[str]
) -> None:
    """A mistyped folder is told, and no empty one takes its place."""
    ran = run(*words)

    assert (2, "") == (ran.code, ran.out)
    assert f"the embedded store {tmp_path}/data does not exist yet" in ran.err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("words", [[], *COMMANDS, ["demo"], ["ledger"]], ids=" ".join)
def test_help_explains_with_examples_and_exit_codes(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    """No other document is needed to use a command."""
    with pytest.raises(SystemExit) as stopped:
        main([*words[:2], "--help"])

    text = capsys.readouterr().out
    assert 0 == stopped.value.code
    assert "\nexamples:\n  meterlib " in text
    assert "exit codes:" in text
    assert max(len(line) for line in text.splitlines()) <= 90
    for code in ("0", "1", "2"):
        assert re.search(rf"\b{code}\b", text.partition("exit codes:")[2])


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    """A report of a bug can name the version."""
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])

    assert (0, f"meterlib {meterlib.__version__}\n") == (stopped.value.code, capsys.readouterr().out)


@pytest.mark.parametrize(
    "words",
    [
        ["repor"],
        ["report", "--strct"],
        ["report", "--format", "xml"],
        ["report", "--json", "--format", "csv"],
        ["limits"],
        ["limits", "acme", "--attribute", "model"],
        ["ledger"],
        ["ledger", "show", "--limit", "-1"],
        ["ledger", "show", "--after", "1e3"],
        ["demo", "--seconds", "0"],
        ["demo", "--seconds", "soon"],
        ["doctor", "--conf", "x"],
    ],
    ids=" ".join,
)
def test_words_that_are_no_command_are_refused_with_a_usage_line(
    capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """Mistakes end with exit code 2 and nothing done."""
    with pytest.raises(SystemExit) as stopped:
        main(words)

    assert 2 == stopped.value.code
    assert capsys.readouterr().err.startswith("usage: meterlib")


def test_no_command_at_all_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever does not know where to begin is told."""
    assert 2 == main([])
    assert "meterlib demo" in capsys.readouterr().err


def started(
    words: Sequence[str], folder: Path, environment: dict[str, str] | None = None, **options: Any
) -> AbstractContextManager[subprocess.Popen[str]]:
    command = [sys.executable, "-W", "error", "-m", "meterlib", *words]
    root = str(Path(meterlib.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root} | (environment or {})
    return running(command, cwd=folder, env=environment, stderr=subprocess.PIPE, **options)


def test_a_reader_that_has_seen_enough_ends_a_command_quietly(meter: Meter, tmp_path: Path) -> None:
    """`meterlib ledger show | head -1` prints one line, and no complaint."""
    for _ in range(600):
        meter.record("acme", HAIKU, Usage(input_tokens=1))

    with started(["ledger", "show", "--json"], tmp_path, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("{")
        process.stdout.close()
        assert process.stderr is not None
        assert "" == process.stderr.read()

    assert 0 == process.returncode


def test_an_interrupted_command_says_so_and_ends_with_130(meter: Meter, tmp_path: Path) -> None:
    """Ctrl-C ends a long report at once, with one line."""
    for _ in range(600):
        meter.record("acme", HAIKU, Usage(input_tokens=1))

    # Nobody reads its output, so it stops in the middle, when the pipe is full.
    with started(["ledger", "show", "--json"], tmp_path, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1]

    assert (130, "meterlib: interrupted\n") == (process.returncode, said)


def test_names_that_the_terminal_cannot_show_are_told(meter: Meter, tmp_path: Path) -> None:
    """An old terminal gets a clear word, and no traceback."""
    call(meter, "日本")

    environment = {"PYTHONIOENCODING": "ascii"}
    with started(["report"], tmp_path, environment, stdout=subprocess.PIPE) as process:
        said = process.communicate()[1]

    assert (1, "meterlib: ascii cannot encode '日本'".encode("ascii", "backslashreplace").decode()) == (
        process.returncode,
        said.partition(";")[0],
    )


def test_a_full_disk_is_told(meter: Meter, tmp_path: Path) -> None:
    """A report that could not be written does not look like one that was."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    call(meter)

    with Path("/dev/full").open("w") as full, started(["report", "--json"], tmp_path, stdout=full) as process:
        assert process.stderr is not None
        assert "meterlib: [Errno 28] No space left on device" in process.stderr.read()

    assert 1 == process.returncode


def test_the_demo_takes_its_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shortest way to see it work is one command."""
    pytest.importorskip("aiohttp")

    assert 0 == main(["demo", "--seconds", "0.3", "--seed", "2", "--json", "--data", str(tmp_path / "demo")])
    assert json.loads(capsys.readouterr().out)


def test_a_table_without_a_terminal_is_never_broken(capsys: pytest.CaptureFixture[str]) -> None:
    """Each row is one line, aligned, for grep and the like; wide characters included."""
    columns = [Column("name", key=True), *(Column("a number", number=True) for _ in range(30))]

    print_table(columns, [["日本", *["1"] * 30], ["x" * 60, *["1,234"] * 30]])

    lines = capsys.readouterr().out.splitlines()
    assert 5 == len(lines)
    assert len(lines[0]) == len(lines[1]) == len(lines[2]) == len(lines[4]) == len(lines[3]) + 2


def test_names_of_tenants_are_never_taken_for_markup(meter: Meter, run: Run) -> None:
    """A name is shown as it is, whatever it is made of."""
    call(meter, "[red]acme[/red]")

    assert "[red]acme[/red]" in run("report").out


def test_denied_calls_are_seen_in_the_limits(meter: Meter, run: Run) -> None:
    """What the gateway told the caller is what the operator sees."""
    for _ in range(4):
        meter.reserve("acme", HAIKU)
    with pytest.raises(QuotaExceeded, match="'parallel'"):
        meter.reserve("acme", HAIKU)

    (parallel,) = (limit for limit in run("limits", "acme", "--json").json["limits"] if limit["name"] == "parallel")

    assert (4, 4, 0) == (parallel["used"], parallel["held"], parallel["remaining"])


def test_refused_moments_name_their_option() -> None:
    """With two dates on the line, the wrong one is named."""
    with pytest.raises(InvalidInput, match="--until: 'x' is no date"):
        moment_ms("x", "UTC", "--until")
