"""How often limits denied calls, as far as a gateway has told: counts that it books once a minute."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from meterlib.billing.reports.answers import Reader
from meterlib.billing.reports.query import Query

UNIT = "denied_"
"""What units that count denials begin with, before the name of the limit."""


class Denied(msgspec.Struct, frozen=True, order=True):
    """How often a limit said no to a tenant."""

    tenant: str
    limit: str
    count: int


def denied(reader: Reader, query: Query) -> Sequence[Denied]:
    """By tenant and limit, the most frequent first."""
    told = reader.entries_of(query, "tenant, amounts", f"contains(amounts::VARCHAR, '\"{UNIT}')")
    pairs = (
        f"""SELECT tenant, unnest(map_entries(from_json(amounts, '"MAP(VARCHAR, BIGINT)"'))) AS pair FROM ({told})"""
    )
    found = reader.connection.execute(
        f"SELECT tenant, substr(pair.key, {len(UNIT) + 1}) AS name, sum(pair.value)::BIGINT AS count FROM ({pairs})"
        f" WHERE starts_with(pair.key, '{UNIT}') GROUP BY ALL ORDER BY count DESC, tenant, name"
    ).fetchall()
    return [Denied(*row) for row in found]
