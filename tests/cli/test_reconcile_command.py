"""`meterlib report reconcile`, `report invoice --bundle` and `verify` of a bundle: what they print and end with."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.billing.money import BOOK, at_ms
from tests.billing.posting import Ledgers
from tests.billing.provider import HOUR_MS, Served, admin_cost, admin_usage
from tests.support.commands import Ran, runner

DAY_MS = at_ms("2026-10-05")
NINE_MS = DAY_MS + 9 * HOUR_MS + 600_000


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ran]]:
    """Commands with an archive of two calls, and the provider's reports of three in `usage.json` and `cost.json`."""
    books = Ledgers(tmp_path)
    for number in (1, 2):
        usage = {"input_tokens": 100 * number, "output_tokens": 10}
        told: dict[str, Any] = {"facts": {"request_id": f"req_{number}"}, "quality": ("final", "partial")[number - 1]}
        books.call(NINE_MS + (number - 1) * HOUR_MS, "plain", usage, reservation_id=f"r{number}", **told)
    books.rate()
    served = [Served(NINE_MS, {"input": 100, "output": 10}), Served(NINE_MS + HOUR_MS, {"input": 200, "output": 35})]
    served.append(Served(NINE_MS + 5 * HOUR_MS, {"input": 1000, "output": 1}))
    span = (DAY_MS, DAY_MS + 24 * HOUR_MS)
    (tmp_path / "usage.json").write_text(json.dumps(admin_usage(served, *span)))
    (tmp_path / "agreeing.json").write_text(json.dumps(admin_usage(served[:1], DAY_MS, DAY_MS + 10 * HOUR_MS)))
    (tmp_path / "cost.json").write_text(json.dumps(admin_cost(served, *span)))
    (tmp_path / "book.toml").write_text(BOOK)
    settings = tmp_path / "meterlib.toml"
    settings.write_text('[billing]\narchive = "archive"\nbook = "book.toml"\nfallback = "none"\n')

    def run(*words: str) -> Ran:
        words = tuple(str(tmp_path / word) if word.endswith((".json", ".zip")) else word for word in words)
        return runner(capsys, settings)(*words)

    yield run
    books.close()


RECONCILE = ("report", "reconcile", "--provider-file")


def test_sides_that_agree_end_with_0(run: Callable[..., Ran]) -> None:
    """Nothing to read but the sums."""
    ran = run(*RECONCILE, "agreeing.json")

    assert (0, "") == (ran.code, ran.err)
    assert "tokens: the provider 110, the archive 110, difference +0" in ran.out
    assert "both sides agree: 0 tokens and 0 cents count" in ran.out


def test_differences_are_listed_with_cause_and_entries_and_end_with_4(run: Callable[..., Ran]) -> None:
    """In words for people."""
    ran = run(*RECONCILE, "usage.json", "--provider-file", "cost.json")

    assert 4 == ran.code
    (cut,) = [line for line in ran.out.splitlines() if "aborted" in line and "T10:00" in line]
    assert ("+25", "0:2", "req_2") == tuple(cut.split()[-3:])
    assert any("outside_gateway" in line and "+1,000" in line for line in ran.out.splitlines())
    assert "both sides DO NOT AGREE: 1,026 tokens" in ran.out


def test_what_is_tolerated_or_accepted_ends_with_0(run: Callable[..., Ran]) -> None:
    """By tokens, by a share of all, or by cause."""
    assert 0 == run(*RECONCILE, "usage.json", "--tolerance-tokens", "1026").code
    assert 4 == run(*RECONCILE, "usage.json", "--tolerance-tokens", "1025").code
    assert 0 == run(*RECONCILE, "usage.json", "--tolerance-percent", "80").code
    assert 4 == run(*RECONCILE, "usage.json", "--tolerance-percent", "70").code
    assert 0 == run(*RECONCILE, "usage.json", "--accept", "aborted", "--accept", "outside_gateway").code
    assert 4 == run(*RECONCILE, "usage.json", "--accept", "aborted").code


def test_programs_read_the_same_in_json_and_csv(run: Callable[..., Ran]) -> None:
    """Numbers of money as texts, evidence with ids, and nothing else on standard output."""
    document = json.loads(run(*RECONCILE, "usage.json", "--provider-file", "cost.json", "--format", "json").out)
    rows = list(csv.DictReader(io.StringIO(run(*RECONCILE, "usage.json", "--format", "csv").out)))

    assert False is document["agrees"]
    cut, bypassed = document["tokens"]["differences"]
    assert ("aborted", 25, "2026-10-05T10:00:00Z") == (cut["cause"], cut["counts"]["output"], cut["since"])
    assert [("0:2", "r2", "req_2")] == [(e["entry"], e["reservation_id"], e["request_id"]) for e in cut["entries"]]
    assert ("outside_gateway", 1000) == (bypassed["cause"], bypassed["counts"]["input"])
    money = {(one["cause"], one["of"]): one["cents"] for one in document["money"]["differences"]}
    discount = {("price", "input"): "0.0273", ("price", "output"): "0.00483"}  # of 7%, which the report has not
    tokens = {("aborted", "output"): "0.034875", ("outside_gateway", "output"): "0.001395"}
    assert {**discount, **tokens, ("outside_gateway", "input"): "0.279"} == money
    assert [("aborted", "25", "0:2"), ("outside_gateway", "1", "")] == [
        (row["cause"], row["output"], row["entries"]) for row in rows
    ]


def test_what_is_no_report_or_not_there_ends_with_2(run: Callable[..., Ran], tmp_path: Path) -> None:
    """The file is named."""
    (tmp_path / "other.json").write_text('{"object": "list", "data": [{"id": 1}]}')

    ran = run(*RECONCILE, "other.json")

    assert 2 == ran.code
    assert "other.json, value 1: $.data[0] is neither a bucket with results" in ran.err
    for words in ((*RECONCILE, "missing.json"), (*RECONCILE, "usage.json", "--map", "missing.json")):
        ran = run(*words)
        assert (2, "", 1) == (ran.code, ran.out, ran.err.count("\n"))
        assert ran.err.endswith("missing.json cannot be read: No such file or directory\n")


def test_a_bundle_is_written_and_verified_by_whoever_gets_it(run: Callable[..., Ran], tmp_path: Path) -> None:
    """The customer has neither settings nor an archive."""
    written = run("report", "invoice", "--tenant", "acme", "--period", "2026-10", "--offline", "--bundle", "bill.zip")
    found = run("verify", "bill.zip")
    document = json.loads(run("verify", "bill.zip", "--json").out)

    assert (0, 0) == (written.code, found.code)
    assert "invoice 2026-10 for acme (open): 0.00 USD" in found.out
    assert "ok: 4 rated rows of 2 entries" in found.out
    assert (True, []) == (document["ok"], document["problems"])


def test_a_bundle_that_was_changed_ends_with_5(run: Callable[..., Ran], tmp_path: Path) -> None:
    """What is wrong is named."""
    run("report", "invoice", "--tenant", "acme", "--period", "2026-10", "--offline", "--bundle", "bill.zip")
    path = tmp_path / "bill.zip"
    path.write_bytes(path.read_bytes().replace(b'"token_type": "input"', b'"token_type": "inqut"', 1))

    ran = run("verify", "bill.zip")

    assert 5 == ran.code
    assert "invoice.json" in ran.err
