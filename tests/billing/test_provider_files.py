"""The provider's files: every wrapping is read; what is none, incomplete or told twice is refused."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meterlib.billing.reconcile.files import read_reports
from meterlib.billing.reconcile.json_objects import objects_of
from meterlib.errors import InvalidInput
from tests.billing.money import at_ms
from tests.billing.provider import HOUR_MS, Served, admin_usage, analytics_cost, analytics_usage, text
from tests.billing.test_reconcile import some_call

DAY_MS = at_ms("2026-11-01")
DAY_END_MS = DAY_MS + 24 * HOUR_MS


@pytest.fixture
def calls() -> list[Served]:
    luck = random.Random(3)
    return [some_call(luck, hour=hour) for hour in (3, 3, 9, 20)]


def read(folder: Path, *contents: str) -> Any:
    paths = [folder / f"file-{number}.json" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(content)
    return read_reports(paths)


@given(values=st.lists(st.dictionaries(st.text(), st.text() | st.lists(st.text())), max_size=5), cut=st.integers(1, 9))
@settings(deadline=None)
@pytest.mark.parametrize("frame", ["{}", "[{}]"])
def test_values_are_found_however_the_file_is_cut(frame: str, values: list[Any], cut: int) -> None:
    """Braces and quotes within texts are no ends, and neither is the end of a piece."""
    separator = ", " if frame == "[{}]" else "\n"
    content = frame.replace("{}", separator.join(json.dumps(one, ensure_ascii=False) for one in values)).encode()

    class Pieces(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(cut)

    assert values == [json.loads(raw) for raw in objects_of(Pieces(content), "file")]


def test_pages_come_in_every_wrapping(calls: list[Served], tmp_path: Path) -> None:
    """One page, pages one behind the other, a list of pages, pages a line, buckets or rows a line: the same report."""
    for page in (admin_usage(calls, DAY_MS, DAY_END_MS), analytics_usage(calls)):
        whole = read(tmp_path, json.dumps(page))
        halves = [{**page, "data": page["data"][:2], "has_more": True}, {**page, "data": page["data"][2:]}]
        for content in (
            text(*halves),
            json.dumps(halves),
            "\n".join(map(json.dumps, halves)),
            "\n".join(map(json.dumps, [one for one in page["data"] if one.get("results", True)])),
        ):
            again = read(tmp_path, content)
            assert (whole.usage, whole.requests, whole.usage_by) == (again.usage, again.requests, again.usage_by)
        assert whole.usage


def test_amounts_are_exact(tmp_path: Path) -> None:
    """Cents with many digits, as texts or as numbers, are not rounded on the way."""
    page = '{"data": [{"starting_at": "2026-11-01T00:00:00Z", "ending_at": "2026-11-02T00:00:00Z", "results": [%s]}]}'
    rows = '{"amount": "0.12345678901234567", "currency": "USD", "model": "a"},'
    rows += '{"amount": 0.1000000000000000055511151231257827, "currency": "USD", "model": "b"}'

    told = read(tmp_path, page % rows)

    assert ["0.1000000000000000055511151231257827", "0.12345678901234567"] == sorted(
        str(cost.amount) for cost in told.costs.values()
    )


def test_tokens_of_an_unknown_kind_are_said_to_be_left_out(calls: list[Served], tmp_path: Path) -> None:
    """Totals of rows tell that there are some."""
    page = analytics_usage(calls)
    whole = read(tmp_path, json.dumps(page))
    page["data"][0]["usage"]["total_tokens"] += 7

    assert [] == whole.notes
    assert ["1 rows of the report have tokens of a kind that this version does not know"] == read(
        tmp_path, json.dumps(page)
    ).notes


def _page(change: Callable[[dict[str, Any]], object]) -> str:
    page = admin_usage([Served(DAY_MS, {"input": 1})], DAY_MS, DAY_MS + HOUR_MS)
    change(page)
    return json.dumps(page)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "no file has a bucket or a row"),
        ("[1]", "file-0.json is no JSON of reports"),
        ('{"data": [{"id": "msg_1"}]}', r"file-0.json, value 1: \$.data\[0\] is neither a bucket"),
        ('{"type": "error", "error": {"message": "no"}}', r"file-0.json, value 1: \$ is neither a bucket"),
        (_page(lambda page: page.update(data={})), r"value 1: \$.data is no list"),
        (_page(lambda page: page.update(has_more=True)), "ends before the report does"),
        (_page(lambda page: page["data"][0].update(starting_at="yesterday")), r"\$.data\[0\].starting_at: "),
        (_page(lambda page: page["data"][0].update(starting_at="2026-11-01T00:00:00")), "without a zone"),
        (_page(lambda page: page["data"][0]["results"].append({"tokens": 3})), r"\$.data\[0\].results\[1\] is neither"),
        (
            _page(lambda page: page["data"][0]["results"][0].update(output_tokens="7")),
            r"file-0.json, value 1: \$.data\[0\].results\[0\].output_tokens: Expected `int`",
        ),
        (
            _page(lambda page: page["data"][0]["results"][0].update(output_tokens=-7)),
            "output_tokens: Expected `int` >= 0",
        ),
        (_page(lambda page: page["data"].append(page["data"][0])), "was a page given twice"),
        (_page(lambda page: None)[:-3], "ends in the middle of a value"),
        (_page(lambda page: None) + "}", "is no JSON"),
    ],
)
def test_what_is_no_report_is_refused_with_file_and_place(content: str, problem: str, tmp_path: Path) -> None:
    """Nothing is skipped in silence."""
    with pytest.raises(InvalidInput, match=problem):
        read(tmp_path, content)


def test_what_would_be_counted_twice_is_refused(calls: list[Served], tmp_path: Path) -> None:
    """The same page again, hours and days of the same time, one report by model and one by key, totals and parts."""
    usage = json.dumps(analytics_usage(calls))
    days = json.dumps(analytics_usage(calls, 24 * HOUR_MS))
    by_model, by_key = (json.dumps(analytics_usage(calls, by=(name,))) for name in ("model", "key"))
    cost = analytics_cost(calls)
    total = {**cost["data"][0], "group": {"model": "plain", "service_tier": "standard"}}

    for contents, problem in (
        ([usage, usage], "was a page given twice"),
        ([usage, days], "give reports of one width"),
        ([by_model, by_key], "file-0.json tells usage from .* apart by model, .*file-1.json by key"),
        ([json.dumps({**cost, "data": [*cost["data"], total]})], "told in total and by kind"),
    ):
        with pytest.raises(InvalidInput, match=problem):
            read(tmp_path, *contents)
