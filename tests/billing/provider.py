"""The provider as a few lines of plain Python: what it knows of each call, and how its reports tell that."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

HOUR_MS = 3_600_000
NAMES = {
    "input": "uncached_input_tokens",
    "cache_write_5m": "cache_creation.ephemeral_5m_input_tokens",
    "cache_write_1h": "cache_creation.ephemeral_1h_input_tokens",
    "cache_read": "cache_read_input_tokens",
    "output": "output_tokens",
}
PRICES: dict[str, int | Decimal] = {
    "input": 3,
    "cache_write_5m": Decimal("3.75"),
    "cache_write_1h": 6,
    "cache_read": Decimal("0.1"),
    "output": 15,
}
"""Dollars per million tokens; of the model `plain` in the book of `money.py`, whatever the tier."""


@dataclass(frozen=True)
class Served:
    """A call, or a pass of one, as the provider counts it."""

    at_ms: int
    used: dict[str, int]
    model: str = "plain"
    tier: str = "standard"
    geo: str | None = "global"
    speed: str = "standard"
    key: str | None = "apikey_1"
    workspace: str | None = None
    requests: int = 1
    extra: dict[str, Any] = field(default_factory=dict)


def moment(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _groups(served: Iterable[Served], width: int, names: tuple[str, ...]) -> dict[tuple[Any, ...], list[Served]]:
    groups: dict[tuple[Any, ...], list[Served]] = {}
    for one in served:
        groups.setdefault((one.at_ms // width * width, *(getattr(one, name) for name in names)), []).append(one)
    return groups


def _numbers(those: list[Served]) -> dict[str, Any]:
    total = {kind: sum(one.used.get(kind, 0) for one in those) for kind in (*NAMES, "web_search")}
    return {
        "uncached_input_tokens": total["input"],
        "cache_creation": {
            "ephemeral_5m_input_tokens": total["cache_write_5m"],
            "ephemeral_1h_input_tokens": total["cache_write_1h"],
        },
        "cache_read_input_tokens": total["cache_read"],
        "output_tokens": total["output"],
        "server_tool_use": {"web_search_requests": total["web_search"]},
    }


ALL = ("model", "tier", "geo", "speed", "key", "workspace")
_FIELDS = {
    "model": "model",
    "tier": "service_tier",
    "geo": "inference_geo",
    "speed": "speed",
    "key": "api_key_id",
    "workspace": "workspace_id",
}


def admin_usage(
    served: Iterable[Served], start_ms: int, end_ms: int, width: int = HOUR_MS, by: tuple[str, ...] = ALL
) -> dict[str, Any]:
    """A page of the Usage & Cost Admin API: every bucket, empty ones too."""
    groups = _groups(served, width, by)
    data = []
    for start in range(start_ms, end_ms, width):
        results = [
            {**dict.fromkeys(_FIELDS.values()), "context_window": None, "account_id": None}
            | {_FIELDS[name]: value for name, value in zip(by, key[1:], strict=True)}
            | _numbers(those)
            for key, those in groups.items()
            if key[0] == start
        ]
        data.append({"starting_at": moment(start), "ending_at": moment(start + width), "results": results})
    return {"data": data, "has_more": False, "next_page": None}


def analytics_usage(served: Iterable[Served], width: int = HOUR_MS, by: tuple[str, ...] = ALL) -> dict[str, Any]:
    """A page of the Usage & Cost Analytics API: rows with requests, and nothing of empty buckets."""
    data = []
    for (start, *key), those in _groups(served, width, by).items():
        numbers = _numbers(those)
        tokens = sum(one.used.get(kind, 0) for one in those for kind in NAMES)
        data.append(
            {
                "starting_at": moment(start),
                "ending_at": moment(start + width),
                "group": {**dict.fromkeys(_FIELDS.values()), "actor": None}
                | {_FIELDS[name]: value for name, value in zip(by, key, strict=True)},
                "usage": numbers | {"requests": sum(one.requests for one in those), "total_tokens": tokens},
            }
        )
    return {"data": data, "has_more": False, "next_page": None, "data_refreshed_at": None}


def _cents(kind: str, those: list[Served]) -> str:
    return str(sum(one.used.get(kind, 0) for one in those) * Decimal(PRICES[kind]) / 10_000)


def admin_cost(served: Iterable[Served], start_ms: int, end_ms: int) -> dict[str, Any]:
    """A page of the Cost report by description: days, cents, and nothing of the priority tier."""
    day = 24 * HOUR_MS
    by = ("model", "tier", "geo")
    groups = _groups((one for one in served if not one.tier.startswith("priority")), day, by)
    data = []
    for start in range(start_ms, end_ms, day):
        results = []
        for (when, model, tier, geo), those in groups.items():
            for kind in NAMES:
                if when == start and any(one.used.get(kind) for one in those):
                    row = {
                        "amount": _cents(kind, those),
                        "currency": "USD",
                        "cost_type": "tokens",
                        "token_type": NAMES[kind],
                        "description": f"{model} usage - {kind}",
                        "model": model,
                        "service_tier": tier,
                        "inference_geo": geo,
                        "context_window": "0-200k",
                        "workspace_id": None,
                    }
                    results.append(row)
        data.append({"starting_at": moment(start), "ending_at": moment(start + day), "results": results})
    return {"data": data, "has_more": False, "next_page": None}


def analytics_cost(served: Iterable[Served], discount: Decimal = Decimal(0)) -> dict[str, Any]:
    """Rows of cost by token type, with list price and discount."""
    data = []
    for (start, model, tier), those in _groups(served, 24 * HOUR_MS, ("model", "tier")).items():
        for kind in NAMES:
            if not any(one.used.get(kind) for one in those):
                continue
            listed = Decimal(_cents(kind, those))
            data.append(
                {
                    "starting_at": moment(start),
                    "ending_at": moment(start + 24 * HOUR_MS),
                    "group": {"model": model, "service_tier": tier, "cost_type": "tokens", "token_type": NAMES[kind]},
                    "cost": {
                        "amount": str(listed * (1 - discount)),
                        "list_amount": str(listed),
                        "currency": "USD",
                        "requests": None,
                    },
                }
            )
    return {"data": data, "has_more": False, "next_page": None}


def text(*pages: Any) -> str:
    return "\n".join(json.dumps(page, indent=1) for page in pages)


moved = replace
