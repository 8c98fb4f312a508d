"""A gateway out of a configuration: its callers, its meter, and where it keeps what it must not lose."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from msgspec.structs import replace

from meterlib.config import GATEWAY_JOURNAL, Config
from meterlib.core.usage import FORMULAS
from meterlib.core.usd import COST
from meterlib.gateway.app import Gateway
from meterlib.gateway.callers import Callers, anyone_may_call, read_or_make_key
from meterlib.gateway.estimate import Estimator
from meterlib.gateway.spending import Spending
from meterlib.store.telling import Log

log = Log("meterlib.gateway")

KEY_FILE = "meterlib-gateway.key"


def gateway_for(
    config: Config, environment: Mapping[str, str] = os.environ, *, estimator: Estimator | None = None
) -> Gateway:
    """A gateway with these settings; opens nothing before the first request.

    Settlements that cannot reach the store go to a journal, by default in the embedded store's folder, or else here.

    Raises:
        PolicyError: a tenant's provider key is not in the environment, or the key file or a price book cannot be used.
    """
    spending = spending_for(config)
    for limit in config.policy.limits:
        if limit.unit != COST and limit.unit not in FORMULAS:
            log.warning("limit.counts_nothing", limit=limit.name, unit=limit.unit, known=[*FORMULAS, COST])
    callers = callers_for(config, environment)
    if config.gateway.callers == "known" and not any(tenant.tokens for tenant in config.tenant):
        log.warning("callers.none", setting="gateway.callers", advice="'known' lets only tokens of [[tenant]] in")
    journal = config.store.journal or str(config.gateway_folder / GATEWAY_JOURNAL)
    meter = replace(config, store=replace(config.store, journal=journal)).connect_async()
    return Gateway(config.gateway, callers, meter, closes_meter=True, estimator=estimator, spending=spending)


def spending_for(config: Config) -> Spending | None:
    """What tells what calls cost, by these settings' prices and terms; None where no limit counts that.

    Raises:
        PolicyError: the price book cannot be read, or something in it is not acceptable.
    """
    if not any(limit.unit == COST for limit in config.policy.limits):
        return None
    from meterlib.billing.prices import pricing  # only now: most gateways need no prices
    from meterlib.billing.rating import budget

    terms = pricing.TermsBook(config.billing, config.tenant)
    costs = budget.CostTables(pricing.books_of(config.billing), terms.of, config.billing.budget_basis)
    return Spending(costs, config.billing.unpriced)


def callers_for(config: Config, environment: Mapping[str, str] = os.environ) -> Callers:
    """Who may call, by these settings. Where only those may who are known, no name has to be derived from a key.

    Raises:
        PolicyError: see `gateway_for`.
    """
    key = b""
    if anyone_may_call(config.gateway, config.tenant):
        named = config.gateway.key_file
        file = Path(named) if named else config.gateway_folder / KEY_FILE
        if not file.exists() and not config.store.url.startswith(("embedded:", "memory:")):
            log.info("gateway.key_made", file=str(file), needed="by other gateways of this store, too")
        key = read_or_make_key(file)
    return Callers(config.gateway, config.tenant, environment, key)
