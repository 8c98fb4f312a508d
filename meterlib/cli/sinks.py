"""Where the settings say that entries are exported to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from meterlib.billing.archive.archive import Archive
from meterlib.billing.archive.sinks import Sink
from meterlib.billing.export.postgres import Postgres
from meterlib.cli.store import Store
from meterlib.config import Config
from meterlib.errors import PolicyError
from meterlib.settings import BillingSettings
from meterlib.store import flows


@contextmanager
def opened_sinks(config: Config, archive_path: str | None = None) -> Iterator[tuple[Archive, list[Sink[Any]]]]:
    """The archive, and all sinks, it among them; nothing was asked of them yet.

    Args:
        config: the settings.
        archive_path: another archive than that of the settings.

    Raises:
        PolicyError: the settings name a variable that is not set, or what is no URL.
        UsageError: psycopg is not installed.
    """
    path = Path(config.billing.archive if archive_path is None else archive_path)
    postgres = postgres_of(config.billing)
    archive = Archive(path, config.billing.segment_entries)
    sinks: list[Sink[Any]] = [archive] if postgres is None else [archive, postgres]
    try:
        yield archive, sinks
    finally:
        for sink in sinks:
            sink.close()


def postgres_of(settings: BillingSettings) -> Postgres | None:
    """The PostgreSQL of the settings; None if they name none."""
    url = settings.postgres
    if settings.postgres_env is not None:
        url = os.environ.get(settings.postgres_env)
        if not url:
            raise PolicyError("billing.postgres_env", f"the environment has no variable {settings.postgres_env}")
    return None if url is None else Postgres(url, settings.postgres_schema)


def check_none_is_missing(store: Store, sinks: list[Sink[Any]]) -> None:
    """Pass if every sink that the ledger was ever exported to is among these.

    The store remembers them, since settings forget: what a sink lacks that nobody names any more must neither be
    trimmed nor taken for lost.

    Raises:
        PolicyError: one is missing; it says how to have it forgotten.
    """
    names = [sink.name for sink in sinks]
    for known in store.run(flows.known_sinks()):
        if known not in names:
            raise PolicyError(
                "billing",
                f"entries are exported to {known!r} as well, which the settings do not name. Name it there; or, if"
                f" nobody needs anything from it any more: meterlib export forget {known!r}",
            )
