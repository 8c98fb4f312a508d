"""The prices that a configuration puts in force: one's own book, the one that comes with meterlib, the fallback."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from meterlib.billing.prices.files import claude_book, load_book
from meterlib.billing.prices.genai import GenaiPrices
from meterlib.billing.prices.prices import PriceBooks, Source
from meterlib.billing.prices.terms import Terms


class PriceSettings(Protocol):
    """What the table `[billing]` says of prices."""

    @property
    def book(self) -> str | None:
        """A file with prices of one's own."""

    @property
    def fallback(self) -> str:
        """`genai-prices` or `none`."""

    @property
    def discount(self) -> str:
        """Of tenants that have none of their own; so the next two."""

    @property
    def markup(self) -> str:
        """A percentage, as all of these."""

    @property
    def platform_fee(self) -> str:
        """On calls with a tenant's own key."""

    @property
    def upstream_discount(self) -> str:
        """What the provider takes off."""


class TenantTerms(Protocol):
    """What a table `[[tenant]]` says of prices; None where `[billing]` holds."""

    @property
    def name(self) -> str:
        """As calls name it."""

    @property
    def discount(self) -> str | None:
        """A percentage, as all of these."""

    @property
    def markup(self) -> str | None:
        """On what the discount left."""

    @property
    def platform_fee(self) -> str | None:
        """On calls with its own key."""


def books_of(settings: PriceSettings) -> PriceBooks:
    """The books in force, in their order.

    Whether genai-prices is installed decides about models that the others do not know, so rated rows name their source.

    Raises:
        PolicyError: one's own book is missing or cannot be read, or something in it is not acceptable.
    """
    own: list[Source] = [] if settings.book is None else [load_book(settings.book)]
    return PriceBooks(*own, claude_book(), *_fallback(settings.fallback))


def _fallback(name: str) -> list[Source]:
    if name == "none":
        return []
    try:
        return [GenaiPrices()]
    except ImportError:
        return []


class TermsBook:
    """The terms of every tenant.

    Args:
        settings: hold for who has no terms of its own.
        tenants: those who may have.
    """

    def __init__(self, settings: PriceSettings, tenants: Iterable[TenantTerms] = ()) -> None:
        self._settings = settings
        self._default = self._terms(None)
        self._own = {tenant.name: self._terms(tenant) for tenant in tenants}

    def of(self, tenant: str) -> Terms:
        """The terms of a tenant, listed in the settings or not."""
        return self._own.get(tenant, self._default)

    def _terms(self, tenant: TenantTerms | None) -> Terms:
        told = {name: getattr(tenant, name, None) for name in ("discount", "markup", "platform_fee")}
        chosen = {name: getattr(self._settings, name) if value is None else value for name, value in told.items()}
        return Terms.of(**chosen, upstream_discount=self._settings.upstream_discount)
