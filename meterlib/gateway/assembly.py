"""A gateway out of a configuration: its callers, its meter, and where it keeps what it must not lose."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from msgspec.structs import replace

from meterlib.config import Config
from meterlib.gateway.app import Gateway
from meterlib.gateway.callers import Callers, read_or_make_key
from meterlib.gateway.estimate import Estimator
from meterlib.store.embedded import parse_embedded_url

KEY_FILE = "meterlib-gateway.key"
JOURNAL = "meterlib-settlements.journal"


def gateway_for(
    config: Config, environment: Mapping[str, str] = os.environ, *, estimator: Estimator | None = None
) -> Gateway:
    """A gateway with these settings; opens nothing before the first request.

    Settlements that cannot reach the store go to a journal, by default in the embedded store's folder, or else here.

    Raises:
        PolicyError: a tenant's provider key is not in the environment, or the key file cannot be used.
    """
    callers = callers_for(config, environment)
    journal = config.store.journal or str(_folder(config) / JOURNAL)
    meter = replace(config, store=replace(config.store, journal=journal)).connect_async()
    return Gateway(config.gateway, callers, meter, closes_meter=True, estimator=estimator)


def callers_for(config: Config, environment: Mapping[str, str] = os.environ) -> Callers:
    """Who may call, by these settings.

    Raises:
        PolicyError: see `gateway_for`.
    """
    key_file = Path(config.gateway.key_file) if config.gateway.key_file else _folder(config) / KEY_FILE
    return Callers(config.gateway, config.tenant, environment, read_or_make_key(key_file))


def _folder(config: Config) -> Path:
    """Where files go that no setting names."""
    url = config.store.url
    return Path(parse_embedded_url(url)) if url.startswith("embedded://") else Path()
