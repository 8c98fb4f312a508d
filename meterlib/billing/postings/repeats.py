"""Calls that are in the ledger twice: told again when the store did not know any more that it had been told.

A store forgets ended calls after its retention, and one that lost its last entries does not know them. Usage is never
refused, so what is told again then is booked again, as late usage of an unknown call or as another record; a call that
such a loss has opened again is settled again. That is billed twice, until somebody corrects one of the two.
"""

from __future__ import annotations

from typing import NamedTuple

from meterlib.billing import duck
from meterlib.billing.postings.postings import Postings

_USED = "('settled', 'late', 'recorded')"


class Repeat(NamedTuple):
    """A call that is in the ledger twice: whose, its id, and both entries, as `shard:n`."""

    tenant: str
    reservation_id: str
    first: str
    again: str


def repeats_of(postings: Postings, from_ms: int, until_ms: int) -> list[Repeat]:
    """Entries booked from one moment up to another that repeat an earlier one, in order; without those that were
    corrected, or repeat a corrected one.

    Raises:
        IntegrityError: the archive's files do not fit together.
    """
    return postings.steady(lambda: _repeats_of(postings, from_ms, until_ms))


def _repeats_of(postings: Postings, from_ms: int, until_ms: int) -> list[Repeat]:
    if not any(postings.segments.values()):
        return []
    entries = postings.entries_sql()
    told_again = ["kind = 'recorded'", "kind = 'late' AND after = 'unknown'"]
    # Of one epoch, no store settles a call twice. After a loss, what it had settled may be open again; or have expired
    # again, or have been cancelled, so that its settlement is late.
    told_again += [
        f"kind IN ('settled', 'late') AND shard = {shard} AND epoch > {duck.quoted(segments[0].epoch)}"
        for shard, segments in postings.segments.items()
        if segments and segments[0].epoch != segments[-1].epoch
    ]
    query = f"""
        WITH again AS (
            SELECT epoch, shard, n, tenant, reservation_id FROM ({entries})
            WHERE booked_at >= {from_ms} AND booked_at < {until_ms}
            AND ({" OR ".join(told_again)})
        ), used AS (
            SELECT epoch, shard, n, tenant, reservation_id FROM ({entries})
            WHERE kind IN {_USED} AND reservation_id IN (SELECT reservation_id FROM again)
        ), corrected AS (
            SELECT adjusts AS place, coalesce(outcome ->> '$.adjusts_id', '') AS id
            FROM ({entries}) WHERE kind = 'adjusted' AND adjusts <> ''
        )
        SELECT a.tenant, a.reservation_id, concat(u.shard, ':', u.n), concat(a.shard, ':', a.n)
        FROM again a JOIN used u ON u.shard = a.shard AND u.tenant = a.tenant AND u.reservation_id = a.reservation_id
            AND (u.epoch, u.n) < (a.epoch, a.n)
        WHERE NOT EXISTS (
            FROM corrected c WHERE c.place IN (concat(u.shard, ':', u.n), concat(a.shard, ':', a.n))
            AND c.id IN ('', a.reservation_id)
        )
        QUALIFY row_number() OVER (PARTITION BY a.epoch, a.shard, a.n ORDER BY u.epoch DESC, u.n DESC) = 1
        ORDER BY a.shard, a.epoch, a.n
    """
    database = duck.connect(postings.archive.work().folder)  # a month's ids may be more than fits into memory
    try:
        with duck.disk_errors():
            return [Repeat(*row) for row in database.execute(query).fetchall()]
    finally:
        database.close()
