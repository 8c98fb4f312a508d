"""Limits, tenants and the policy they make up: what a caller may use, checked in full before it is used."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Literal
from urllib.parse import quote

import msgspec

from meterlib.core.checks import AMOUNT_MAX, check_tenant, shown
from meterlib.core.operations import LimitArguments
from meterlib.core.periods import PeriodName, period_at, zone
from meterlib.core.usage import FORMULAS
from meterlib.errors import InvalidInput, PolicyError

LIMITS_PER_CALL_MAX = 16
WINDOW_MS_MAX = 31 * 86_400_000
SUB_WINDOWS = 60
"""A sliding window forgets in steps of a 60th of its length, unless a limit asks for another resolution."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_UNIT = re.compile(r"[a-z][a-z0-9_]{0,63}")
_MISTAKEN = ("tokens", "rpm", "tpm", "itpm", "otpm", "calls")
_DURATION = re.compile(r"([0-9]{1,12})(ms|s|m|h|d)")
_UNIT_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}

Funding = Literal["hosted", "own"]


class Limit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A quota of one unit, over one span, for each partition.

    Exactly one span: `window` (any last so many ms), `period` (calendar, in `tz`), or `open` (reservations that are
    open at the same time).

    Attributes:
        name: how denials, headers and overrides call it.
        quota: how much may count at any time, in the unit; 0 denies every call, whatever it takes.
        unit: `requests`, `input_tokens`, `output_tokens`, `total_tokens`, or any unit in `Usage.amounts`.
        window: length of a sliding window, such as `"1m"`, `"30s"`, `"500ms"`, `"5h"`, `"7d"`.
        period: `hour`, `day`, `week` (from Monday) or `month`.
        tz: IANA name of the zone that a period is worked out in.
        open: counts only what is reserved and not yet settled: concurrency.
        per: attributes whose values partition the quota; the tenant always does, unless `shared`.
        match: the calls it applies to: each attribute's value, a list of values, or patterns with `*`.
        shared: one quota for all tenants together; needs a store with one shard.
        oversize: what happens to a call that asks for more than the quota. `admit_when_idle`: passes when the partition
            is empty, and goes into debt; `reject`: denied for good, never "try later".
        on_expiry: what a period counts of a reservation that was never settled: `keep` the hold, or `free` it.
        sub_windows: resolution of a sliding window; by default 60, and exact to the ms for at most 60 requests.
        retry_hint_ms: what to tell callers whom an `open` limit denied; nobody knows when a slot frees.
    """

    name: str
    quota: int
    unit: str = "requests"
    window: str | None = None
    period: PeriodName | None = None
    tz: str = "UTC"
    open: bool = False
    per: Sequence[str] = ()
    match: Mapping[str, str | Sequence[str]] = {}
    shared: bool = False
    oversize: Literal["admit_when_idle", "reject"] = "admit_when_idle"
    on_expiry: Literal["keep", "free"] = "keep"
    sub_windows: int | None = None
    retry_hint_ms: int = 1000

    @property
    def window_ms(self) -> int:
        """Length of the sliding window; 0 for another span."""
        return 0 if self.window is None else duration_ms(self.window)

    def sub_window_ms(self, quota: int) -> int:
        """Resolution of the sliding window for a tenant with this quota."""
        if self.sub_windows is None and self.unit == "requests" and quota <= SUB_WINDOWS:
            return 1  # each request is one entry, so the log is no longer than one with sub-windows
        return max(1, self.window_ms // (self.sub_windows or SUB_WINDOWS))

    def applies_to(self, attributes: Mapping[str, str]) -> bool:
        """Whether a call with these attributes counts."""
        for name, patterns in self.match.items():
            value = attributes.get(name)
            wanted = (patterns,) if isinstance(patterns, str) else patterns
            if value is None or not any(fits(value, pattern) for pattern in wanted):
                return False
        return True


class Tenant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A customer with settings of its own; tenants without any need not be listed.

    Attributes:
        name: as calls name it.
        quotas: quotas by limit name, in place of the limit's own.
        funding: who pays the provider: `hosted` (the operator, who bills it on) or `own` (the tenant's own key).
    """

    name: str
    quotas: Mapping[str, int] = {}
    funding: Funding = "hosted"


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All limits and tenants; checked when made.

    Raises:
        PolicyError: with the path of the setting, what was found, and what is allowed.
    """

    limits: Sequence[Limit] = ()
    tenants: Sequence[Tenant] = ()

    def __post_init__(self) -> None:
        # Lists are as welcome as tuples in code; frozen records are compared and compiled as tuples.
        for name in ("limits", "tenants"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise PolicyError(name.removesuffix("s"), f"a list is needed, not {type(value).__name__}")
            msgspec.structs.force_setattr(self, name, tuple(value))
        _check_policy(self)
        # Copies, since what was checked must not be changed by whoever goes on using its dicts and lists.
        msgspec.structs.force_setattr(self, "limits", tuple([_own_limit(limit) for limit in self.limits]))
        msgspec.structs.force_setattr(self, "tenants", tuple([_own_tenant(tenant) for tenant in self.tenants]))

    @classmethod
    def preset(cls, name: str) -> Policy:
        """A policy known by name.

        `buildkite-anthropic`: 50 requests and 50,000 input tokens in any minute, for each provider and tenant, where
        input tokens are `cache_creation_input_tokens + input_tokens`.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise PolicyError("preset", f"{shown(name)} is not one of {', '.join(sorted(PRESETS))}")
        return PRESETS[name]

    @classmethod
    def load(cls, path: str) -> Policy:
        """The limits and tenants of a `meterlib.toml`; see `meterlib.config` for its other settings."""
        from meterlib.config import Config

        return Config.load(path).policy


def _own_limit(limit: Limit) -> Limit:
    """With tuples for lists, so that limits written in code and in a file are equal."""
    match = {name: told if isinstance(told, str) else tuple(told) for name, told in limit.match.items()}
    return msgspec.structs.replace(limit, per=tuple(limit.per), match=match)


def _own_tenant(tenant: Tenant) -> Tenant:
    return msgspec.structs.replace(tenant, quotas=dict(tenant.quotas))


_ITSELF = str.maketrans({"?": "[?]", "[": "[[]"})


def fits(value: str, pattern: str) -> bool:
    """Whether a value is what a pattern says, where `*` stands for any text, and every other character for itself.

    Names of models have brackets, such as `claude-sonnet-4-5[1m]`: they are no sets of characters.
    """
    return fnmatchcase(value, pattern.translate(_ITSELF))


def duration_ms(text: str) -> int:
    """Milliseconds of `"500ms"`, `"30s"`, `"1m"`, `"5h"` or `"7d"`. Raises ValueError on anything else."""
    found = _DURATION.fullmatch(text) if isinstance(text, str) else None
    if not found:
        raise ValueError(f"{text!r} is no duration; write a whole number and ms, s, m, h or d, such as '1m'")
    return int(found[1]) * _UNIT_MS[found[2]]


def _check_policy(policy: Policy) -> None:
    names: list[str] = []
    for at, limit in enumerate(policy.limits):
        path = f"limit[{at}]"
        _check_limit(limit, path)
        if limit.name in names:
            raise PolicyError(f"{path}.name", f"{limit.name!r} is the name of limit[{names.index(limit.name)}] already")
        names.append(limit.name)
    if len(policy.limits) > LIMITS_PER_CALL_MAX:
        raise PolicyError("limit", f"at most {LIMITS_PER_CALL_MAX} limits, not {len(policy.limits)}")
    tenants: set[str] = set()
    for at, tenant in enumerate(policy.tenants):
        path = f"tenant[{at}]"
        _check_tenant(tenant, path, names)
        if tenant.name in tenants:
            raise PolicyError(f"{path}.name", f"{tenant.name!r} is listed twice")
        tenants.add(tenant.name)


def _check_limit(limit: Limit, path: str) -> None:
    if not isinstance(limit, Limit):
        raise PolicyError(path, f"a Limit is needed, not {type(limit).__name__}")
    if not isinstance(limit.name, str) or not _NAME.fullmatch(limit.name):
        raise PolicyError(
            f"{path}.name", f"{shown(limit.name)} is no name: a letter, then up to 63 of A-Z a-z 0-9 _ . -"
        )
    _check_quota(limit.quota, f"{path}.quota")
    _check_unit(limit.unit, f"{path}.unit")
    _check_span(limit, path)
    _check_per(limit.per, f"{path}.per")
    _check_match(limit.match, f"{path}.match")
    _check_boolean(limit.shared, f"{path}.shared")
    _check_choice(limit.oversize, ("admit_when_idle", "reject"), f"{path}.oversize")
    _check_choice(limit.on_expiry, ("keep", "free"), f"{path}.on_expiry")
    if limit.on_expiry == "free" and limit.period is None:
        raise PolicyError(f"{path}.on_expiry", "only a period can free a hold that was never settled")
    if type(limit.retry_hint_ms) is not int or not 1 <= limit.retry_hint_ms <= 3_600_000:
        raise PolicyError(f"{path}.retry_hint_ms", f"1 to 3600000 are allowed, not {shown(limit.retry_hint_ms)}")


def _check_unit(unit: object, path: str) -> None:
    if not isinstance(unit, str) or not _UNIT.fullmatch(unit):
        raise PolicyError(path, f"{shown(unit)} is no unit: lower-case letters, digits and _")
    if unit not in FORMULAS and (unit in _MISTAKEN or get_close_matches(unit, FORMULAS, n=1, cutoff=0.8)):
        problem = f"{unit!r} would be a unit of your own{nearest(unit, tuple(FORMULAS))}"
        raise PolicyError(path, problem)


def _check_per(per: object, path: str) -> None:
    if isinstance(per, str):
        raise PolicyError(path, f"a list of attribute names is needed, such as [{per!r}]")
    if not isinstance(per, list | tuple):
        raise PolicyError(path, f"a list of attribute names is needed, not {type(per).__name__}")
    for name in per:
        _check_attribute_name(name, path)
    if len(set(per)) != len(per):
        raise PolicyError(path, f"names an attribute twice: {list(per)}")
    if "tenant" in per:
        raise PolicyError(path, "the tenant is part of the partition anyway, unless shared = true")


def _check_match(match: object, path: str) -> None:
    if not isinstance(match, Mapping):
        raise PolicyError(path, f"a table of attributes and what they match is needed, not {type(match).__name__}")
    for name, patterns in match.items():
        _check_attribute_name(name, path)
        if name == "tenant":
            raise PolicyError(path, "the tenant is no attribute; its own quotas stand in [[tenant]]")
        listed = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(listed, list | tuple) or not listed or not all(isinstance(p, str) and p for p in listed):
            raise PolicyError(f"{path}.{name}", f"text or a list of texts is needed, not {shown(patterns)}")


def _check_attribute_name(name: object, path: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise PolicyError(path, f"{shown(name)} is no attribute name")


def _check_boolean(value: object, path: str) -> None:
    if type(value) is not bool:
        raise PolicyError(path, f"true or false is needed, not {shown(value)}")


def _check_span(limit: Limit, path: str) -> None:
    _check_boolean(limit.open, f"{path}.open")
    spans = [name for name in ("window", "period", "open") if getattr(limit, name)]
    if len(spans) != 1:
        found = " and ".join(spans) or "none"
        raise PolicyError(path, f"exactly one of window, period and open = true is needed; found {found}")
    if limit.window is not None:
        try:
            window_ms = duration_ms(limit.window)
        except ValueError as error:
            raise PolicyError(f"{path}.window", str(error)) from None
        if not 1 <= window_ms <= WINDOW_MS_MAX:
            raise PolicyError(f"{path}.window", f"{limit.window!r} is not within 1ms and 31d")
    if limit.sub_windows is not None and (type(limit.sub_windows) is not int or not 1 <= limit.sub_windows <= 1000):
        raise PolicyError(f"{path}.sub_windows", f"1 to 1000 are allowed, not {shown(limit.sub_windows)}")
    if limit.sub_windows is not None and limit.window is None:
        raise PolicyError(f"{path}.sub_windows", "only a sliding window has sub-windows")
    if limit.period is None and limit.tz != "UTC":
        raise PolicyError(f"{path}.tz", "only a calendar period is worked out in a time zone")
    if limit.period is not None:
        _check_choice(limit.period, ("hour", "day", "week", "month"), f"{path}.period")
        try:
            zone(limit.tz)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise PolicyError(
                f"{path}.tz", f"{shown(limit.tz)} is no IANA time zone, such as 'Europe/Berlin'"
            ) from None


def _check_tenant(tenant: Tenant, path: str, limit_names: Sequence[str]) -> None:
    if not isinstance(tenant, Tenant):
        raise PolicyError(path, f"a Tenant is needed, not {type(tenant).__name__}")
    if not isinstance(tenant.quotas, Mapping):
        raise PolicyError(f"{path}.quotas", f"a table of limit names and quotas is needed, not {shown(tenant.quotas)}")
    try:
        check_tenant(tenant.name)
    except InvalidInput as error:
        raise PolicyError(f"{path}.name", str(error)) from None
    for name, amount in tenant.quotas.items():
        if name not in limit_names:
            raise PolicyError(f"{path}.quotas.{name}", f"no limit has this name{nearest(name, limit_names)}")
        _check_quota(amount, f"{path}.quotas.{name}")
    _check_choice(tenant.funding, ("hosted", "own"), f"{path}.funding")


def _check_quota(quota: object, path: str) -> None:
    if type(quota) is not int or not 0 <= quota <= AMOUNT_MAX:
        raise PolicyError(path, f"an integer from 0 to 2^53 - 1 is needed, not {shown(quota)}")


def _check_choice(value: object, allowed: Sequence[str], path: str) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise PolicyError(path, f"{shown(value)} is not one of {', '.join(allowed)}")


def nearest(name: str, valid: Sequence[str]) -> str:
    """The ending of an error that names what was probably meant, and all that is valid."""
    close = get_close_matches(name, valid, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (valid: {', '.join(sorted(valid)) or 'none'})"


PRESETS: Mapping[str, Policy] = {
    "buildkite-anthropic": Policy(
        limits=(
            Limit(name="requests", unit="requests", quota=50, window="1m", per=("provider",)),
            Limit(name="input_tokens", unit="input_tokens", quota=50_000, window="1m", per=("provider",)),
        )
    )
}


class BoundLimit:
    """A limit as it stands for one tenant and one set of attributes: its window and all that never changes of it."""

    __slots__ = (
        "_made",
        "_period",
        "_rest",
        "limit",
        "name",
        "quota",
        "sub_window_ms",
        "unit",
        "window_field",
        "window_ms",
    )

    def __init__(self, limit: Limit, quota: int, window_field: str) -> None:
        self.limit = limit
        self.name = limit.name
        self.unit = limit.unit
        self.quota = quota
        self.window_field = window_field
        self.window_ms = limit.window_ms
        self.sub_window_ms = limit.sub_window_ms(quota) if limit.window else 0
        self._period = period_at(limit.period, limit.tz, 0) if limit.period else None
        oversize = "reject" if limit.oversize == "reject" else "admit"
        self._rest = (quota, oversize, self.window_ms, self.sub_window_ms)
        self._made: LimitArguments | None = None

    def arguments(self, amount: int, now_ms: int) -> LimitArguments:
        """What a script needs to know of this limit to take `amount` at about `now_ms`."""
        period = self._period
        if period is None:
            made = self._made
            if made is None or made.amount != amount:  # mostly it is one request again
                made = LimitArguments._make((self.window_field, self.unit, amount, *self._rest, 0, 0, "keep"))
                self._made = made
            return made
        limit = self.limit
        if not period.start_ms <= now_ms < period.end_ms:
            period = self._period = period_at(limit.period, limit.tz, now_ms)  # type: ignore[arg-type]
        field = f"{self.window_field}/{period.label}"
        return LimitArguments(field, limit.unit, amount, *self._rest, period.start_ms, period.end_ms, limit.on_expiry)


class CompiledPolicy:
    """A policy made ready for calls: which limits a call touches is worked out once per tenant and attributes."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._tenants = {tenant.name: tenant for tenant in policy.tenants}
        self._bound: dict[tuple[str, frozenset[tuple[str, str]]], tuple[BoundLimit, ...]] = {}

    def funding_of(self, tenant: str) -> Funding:
        """Who pays the provider for this tenant's calls."""
        found = self._tenants.get(tenant)
        return found.funding if found else "hosted"

    def limits_of(self, tenant: str, attributes: Mapping[str, str]) -> tuple[BoundLimit, ...]:
        """The limits that a call touches, in the policy's order."""
        key = (tenant, frozenset(attributes.items()))
        bound = self._bound.get(key)
        if bound is None:
            if len(self._bound) >= 20_000:
                self._bound.clear()  # callers may invent attributes without end; the work is small, the memory is not
            bound = self._bound[key] = tuple(
                self._bind(limit, tenant, attributes) for limit in self.policy.limits if limit.applies_to(attributes)
            )
        return bound

    def _bind(self, limit: Limit, tenant: str, attributes: Mapping[str, str]) -> BoundLimit:
        settings = self._tenants.get(tenant)
        quota = limit.quota if settings is None else settings.quotas.get(limit.name, limit.quota)
        return BoundLimit(limit, quota, window_field(limit, tenant, attributes))


@lru_cache(maxsize=20_000)
def encoded(text: str) -> str:
    """`text` with all but letters, digits and `-._~@` as %XX: no separator or brace is left, and none collide."""
    return quote(text, safe="-._~@")


def window_field(limit: Limit, tenant: str, attributes: Mapping[str, str]) -> str:
    """The name of a partition's window in the store; an attribute that a call lacks makes a partition of its own."""
    owner = "*" if limit.shared else encoded(tenant)
    values = [encoded(attributes.get(name, "")) for name in limit.per]
    return "/".join(["w", owner, limit.name, *values])


def reservation_field(tenant: str, reservation_id: str) -> str:
    """The name of a reservation's record in the store."""
    return f"r/{encoded(tenant)}/{reservation_id}"
