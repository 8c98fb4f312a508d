"""Whose calls go out with which of the provider's keys: what of the archive a report is to be compared with.

Which key a call went out with is not in its entry, which knows the tenant, who pays, and a short name of the credential
that the caller showed (`key`); a map says which of those belong to which of the provider's ids.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from meterlib.billing.duck import quoted
from meterlib.billing.rating.measures import PROVIDER
from meterlib.errors import InvalidInput

Payer: TypeAlias = Literal["hosted", "own", "all"]


class Selector(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Calls of an id of the provider: all that is given holds, and one of a list does; `*` stands for anything."""

    tenant: list[str] | str = "*"
    key: list[str] | str = "*"
    funding: Literal["hosted", "own"] | None = None


class _MapFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    api_keys: dict[str, Selector | str | list[str]] = {}
    workspaces: dict[str, Selector | str | list[str]] = {}


class IdMap(NamedTuple):
    """Whose calls go out with which of the provider's keys, and in which workspace; the first that fits holds."""

    keys: Mapping[str, Selector]
    workspaces: Mapping[str, Selector]

    @classmethod
    def load(cls, path: Path) -> IdMap:
        """The map of a file.

        Raises:
            InvalidInput: it cannot be read, or is no such map.
        """
        try:
            found = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), _MapFile)
        except OSError as error:
            raise InvalidInput("--map", f"{path} cannot be read: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
            raise InvalidInput("--map", f"{path} is no map of the provider's ids: {error}") from None
        if not found.api_keys and not found.workspaces:
            raise InvalidInput("--map", f"{path} has neither [api_keys] nor [workspaces]")
        return cls(
            *({one: _selector(told) for one, told in part.items()} for part in (found.api_keys, found.workspaces))
        )


def _selector(told: Selector | str | list[str]) -> Selector:
    return told if isinstance(told, Selector) else Selector(tenant=told)


class Scope(NamedTuple):
    """Which calls count: of this provider, paid by these; or those of a map, whoever pays."""

    provider: str = PROVIDER
    payer: Payer = "hosted"
    ids: IdMap = IdMap({}, {})


def selects(one: Selector) -> str:
    """SQL for whether a call is meant."""
    parts = [_any_of(column, told) for column, told in (("tenant", one.tenant), ("caller", one.key)) if told != "*"]
    if one.funding:
        parts.append(f"funding = {quoted(one.funding)}")
    return " AND ".join(parts) or "true"


def _any_of(column: str, told: list[str] | str) -> str:
    names = [told] if isinstance(told, str) else told
    return "(" + (" OR ".join(f"{column} GLOB {quoted(_glob(name))}" for name in names) or "false") + ")"


def _glob(name: str) -> str:
    """Only `*` stands for something else."""
    return "".join(f"[{sign}]" if sign in "?[" else sign for sign in name)


def id_of(name: str) -> str:
    """An id as reports have it; the default workspace has none."""
    return "" if name == "default" else name
