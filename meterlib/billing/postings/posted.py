"""The rows of some entries as they were posted, re-ratings included: where corrections find their calls' prices."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from meterlib.billing import duck
from meterlib.billing.postings.pieces import RatedFiles, unreadable_one
from meterlib.billing.postings.reposts import reposts_of
from meterlib.billing.rating.corrections import Place
from meterlib.billing.rating.rated import RatedRow
from meterlib.billing.rating.rating_sql import COLUMNS

_AT_ONCE = 5_000


def posted_rows(files: RatedFiles, database: Any, shard: int, places: Collection[Place]) -> dict[Place, list[RatedRow]]:
    """What stands of these entries of a shard, by entry: each one's rows in the order in which they were posted.

    Raises:
        IntegrityError: a file is damaged or missing.
    """
    return files.steady(lambda: _read(files, database, shard, places)) if places else {}


def _read(files: RatedFiles, database: Any, shard: int, places: Collection[Place]) -> dict[Place, list[RatedRow]]:
    held = [
        file.path
        for file in files.way(shard)
        if any(e == file.segment.epoch and file.segment.first <= n <= file.segment.last for e, n in places)
    ]
    found: dict[Place, list[RatedRow]] = {}
    numbers = sorted({n for _, n in places})
    for path in [*held, *(path for repost in reposts_of(files.path) for path in repost.paths())]:
        for at in range(0, len(numbers), _AT_ONCE):
            listed = ", ".join(map(str, numbers[at : at + _AT_ONCE]))
            query = (
                f"SELECT {', '.join(COLUMNS)} FROM read_parquet({duck.quoted(path)})"
                f" WHERE shard = {shard} AND n IN ({listed}) ORDER BY n, line"
            )
            try:
                rows = database.execute(query).fetchall()
            except duck.failure() as error:
                raise unreadable_one([path], error) from None
            for row in (RatedRow(**dict(zip(COLUMNS, told, strict=True))) for told in rows):
                if (row.epoch, row.n) in places:
                    found.setdefault((row.epoch, row.n), []).append(row)
    return found
