"""Which calls were tried again: worked out from an archive, and held against a plain walk through the same entries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from meterlib import LedgerEntry
from meterlib.billing.reports.answers import Reader
from meterlib.billing.reports.query import Query
from meterlib.billing.reports.retries import AGAIN_WITHIN_MS, TOKENS, retries_report
from meterlib.core.ledger import EntryKind
from tests.billing.reporting import Filed

T0 = 1_790_000_000_000


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("retries")


def a_try(
    end: str = "complete",
    *,
    at_s: float = 0,
    took_s: float = 1,
    prompt: str | None = "0123456789abcdef",
    stream: bool = True,
    tenant: str = "acme",
    gone: bool = False,
    model: str = "claude-sonnet-4-5",
    kind: EntryKind = "settled",
    tokens: Sequence[int] = (100, 20, 3000, 7),
) -> LedgerEntry:
    """One call's entry, as a gateway has it written."""
    facts = {"end": end, "status": "200"}
    if prompt is not None:
        facts |= {"prompt": prompt, "stream": "true" if stream else "false"}
    if gone:
        facts["client"] = "gone"
    reserved_at = T0 + round(at_s * 1000)
    return LedgerEntry(
        shard=0, n=1, kind=kind, reservation_id="r", tenant=tenant, attributes={"model": model}, funding="hosted",
        usage=dict(zip(TOKENS, tokens, strict=True)), quality="final", facts=facts, reserved_at=reserved_at,
        booked_at=reserved_at + round(took_s * 1000), epoch="e",
    )  # fmt: skip


def told(folder: Path, entries: Sequence[LedgerEntry], **query: Any) -> list[tuple[Any, ...]]:
    """The rows of the report."""
    numbered = [replace(one, n=n) for n, one in enumerate(sorted(entries, key=lambda one: one.booked_at), 1)]
    with Reader(Filed(folder, numbered, [])) as reader:
        answer = retries_report(reader, Query(**query))
        rows = list(answer.rows())
        if rows and not query.get("by"):
            assert tuple(answer.totals[0].values()) == rows[0]
        return rows


# ── Examples ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_fallback_to_one_piece_is_seen_with_the_streams_before_it(folder: Path) -> None:
    """Claude Code's way: two streams broke, the third call asked for all at once; both were paid for."""
    entries = [
        a_try("cut", at_s=0, tokens=(10, 1, 100, 5)),
        a_try("error_event", at_s=3, tokens=(20, 2, 200, 6)),
        a_try("complete", at_s=5, stream=False, tokens=(30, 3, 300, 7)),
        a_try("complete", at_s=6, prompt="fedcba9876543210", tokens=(1, 1, 1, 1)),
    ]

    assert [(2, 1, 4, 1, 0, 30, 3, 300, 11)] == told(folder, entries)
    assert [("0123456789abcdef", 1, 1, 3, 1, 0, 30, 3, 300, 11), ("fedcba9876543210", 1, 0, 1, 0, 0, 0, 0, 0, 0)] == (
        told(folder, entries, by=("prompt",))
    )


def test_the_same_question_after_an_answer_is_another_call(folder: Path) -> None:
    entries = [a_try(at_s=0), a_try(at_s=5), a_try("cut", at_s=10), a_try(at_s=20, tenant="globex")]

    assert [("acme", 3, 0, 3, 0, 1, 0, 0, 0, 0), ("globex", 1, 0, 1, 0, 0, 0, 0, 0, 0)] == (
        told(folder, entries, by=("tenant",))
    )


def test_an_answer_that_nobody_was_there_to_read_is_no_answer(folder: Path) -> None:
    """Who timed out asks again, though the gateway has read the answer to its end."""
    entries = [a_try(gone=True, took_s=60), a_try(at_s=30, took_s=10)]

    assert [(1, 1, 2, 0, 0, 100, 20, 3000, 7)] == told(folder, entries)


@pytest.mark.parametrize(("ms", "calls"), [(AGAIN_WITHIN_MS - 1, 1), (AGAIN_WITHIN_MS, 2)])
def test_who_comes_back_much_later_asks_anew(folder: Path, ms: int, calls: int) -> None:
    entries = [a_try("cut"), a_try(at_s=1 + ms / 1000)]

    assert calls == told(folder, entries)[0][0]


def test_rows_are_of_the_first_try(folder: Path) -> None:
    """Whatever model a client falls back to."""
    entries = [a_try("refused", model="claude-opus-5", tokens=(0, 0, 0, 0)), a_try(at_s=1, model="claude-haiku-5")]

    assert [("claude-opus-5", 1, 1, 2, 0, 0, 0, 0, 0, 0)] == told(folder, entries, by=("requested_model",))


def test_entries_of_others_are_no_tries(folder: Path) -> None:
    """Those of libraries and older gateways have no digest; denials, expired calls and corrections are none."""
    others = [a_try(prompt=None), a_try(prompt=""), a_try(kind="expired"), a_try(kind="recorded")]

    assert [(1, 0, 1, 0, 0, 0, 0, 0, 0)] == told(folder, [*others, a_try()])
    assert [] == told(folder, others, by=("tenant",))


# ── Any history ───────────────────────────────────────────────────────────────────────────────────────────────────────

tries = st.builds(
    a_try,
    st.sampled_from(["complete", "cut", "refused", "client_gone"]),
    at_s=st.sampled_from([0, 1, 2, 300, 599, 601, 700, 1300]),
    took_s=st.sampled_from([0, 1, 30, 400]),
    prompt=st.sampled_from(["a" * 16, "b" * 16, None]),
    stream=st.booleans(),
    tenant=st.sampled_from(["acme", "globex"]),
    gone=st.booleans(),
    tokens=st.tuples(*[st.integers(0, 9)] * 4),
)


def walked(entries: Sequence[LedgerEntry]) -> tuple[int, ...]:
    """The same by a walk through the entries, one call after the other."""
    calls: list[list[LedgerEntry]] = []
    latest: dict[tuple[str, str], list[LedgerEntry]] = {}
    for one in sorted(entries, key=lambda one: (one.reserved_at, one.booked_at, one.n)):
        prompt = one.facts.get("prompt")
        if prompt is None:
            continue
        before = latest.get((one.tenant, prompt))
        if before and _failed(before[-1]) and one.reserved_at - before[-1].booked_at < AGAIN_WITHIN_MS:
            before.append(one)
        else:
            calls.append([one])
            latest[one.tenant, prompt] = calls[-1]
    extra = [sum(int(str(one.usage[name])) for call in calls for one in call[:-1]) for name in TOKENS]
    streamed = [[one.facts["stream"] == "true" for one in call] for call in calls]
    return (
        len(calls),
        sum(len(call) > 1 for call in calls),
        sum(map(len, calls)),
        sum(any(each) and not each[-1] for each in streamed),
        sum(_failed(call[-1]) for call in calls),
        *extra,
    )


def _failed(one: LedgerEntry) -> bool:
    return one.facts["end"] != "complete" or "client" in one.facts


@settings(max_examples=60)
@given(st.lists(tries, max_size=8))
@example([])
def test_whatever_came_in_whatever_order(folder: Path, entries: list[LedgerEntry]) -> None:
    """Each try belongs to one call; nothing is counted twice."""
    numbered = [replace(one, n=n) for n, one in enumerate(sorted(entries, key=lambda one: one.booked_at), 1)]

    assert [walked(numbered)] == told(folder, entries)
