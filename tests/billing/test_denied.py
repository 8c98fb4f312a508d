"""What gateways counted of denials can be read in an archive, and is taken for nothing else."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meterlib import AsyncMeter, LedgerEntry, Policy, StoreOptions
from meterlib.billing.page.facts import facts
from meterlib.billing.reports.answers import Reader
from meterlib.billing.reports.denied import Denied, denied
from meterlib.billing.reports.query import Query
from meterlib.billing.reports.usage import usage_report
from meterlib.gateway.denials import Denials
from tests.billing.money import books, entry, tokens
from tests.billing.reporting import Filed, rated

moments = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["rpm", "input_tokens", "Ä 1"])), max_size=30)


def counted(denials: list[tuple[str, str]]) -> list[LedgerEntry]:
    """The entries that a gateway makes of these."""

    async def main() -> list[LedgerEntry]:
        async with AsyncMeter.connect("memory://", Policy(), options=StoreOptions(shards=1)) as meter:
            counting = Denials(meter, lambda: 0.0)
            for at, (tenant, limit) in enumerate(denials):
                counting.count(tenant, "anthropic", limit)
                if at % 7 == 6:
                    await counting.flush()
            await counting.flush()
            return [one async for one in meter.ledger(0)]

    return asyncio.run(main())


@settings(max_examples=15)
@given(moments, st.integers(0, 3))
def test_denials_are_told_by_tenant_and_limit_and_are_no_calls(
    tmp_path_factory: pytest.TempPathFactory, denials: list[tuple[str, str]], calls: int
) -> None:
    """Each denial once, however often counts were booked; what was really called is as if there were none."""
    folder = tmp_path_factory.mktemp("denied")
    made = counted(denials)
    used = [entry(usage=tokens(input_tokens=5), n=1000 + at, reservation_id=f"r{at}") for at in range(calls)]
    with Reader(Filed(folder, [*made, *used], rated(used, books()))) as reader:
        told = denied(reader, Query())
        page = facts(reader, Query(by=("tenant",)))
        report = usage_report(reader, Query(by=("tenant",)))
        numbers = report.totals[0]

    known = Counter((tenant, {"Ä 1": "__1"}.get(limit, limit)) for tenant, limit in denials)
    assert sorted(told) == sorted(Denied(*key, count) for key, count in known.items())
    assert [one.count for one in told] == sorted((one.count for one in told), reverse=True)
    assert told == page.denials
    assert calls == page.total.calls == numbers["calls"]
    assert 5 * calls == numbers["input_tokens"]
