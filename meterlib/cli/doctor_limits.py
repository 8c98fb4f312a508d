"""Proof that each configured limit can deny: its quota is filled on the real server, and one more must be refused.

It happens under a prefix of its own, with the limit's real quota, and at one frozen moment, so that a short window
cannot slide and a period cannot end in between. What was written is deleted afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import msgspec

from meterlib.cli.doctor_findings import Finding, failure, ok, warning
from meterlib.cli.times import span_text
from meterlib.config import Config
from meterlib.core.checks import AMOUNT_MAX, check_attributes
from meterlib.core.decisions import quota_exceeded
from meterlib.core.ledger import CallFacts, encode
from meterlib.core.operations import Reply, Reserve
from meterlib.core.policy import BoundLimit, CompiledPolicy, Limit, Policy, reservation_field
from meterlib.core.usage import FORMULAS, Usage
from meterlib.errors import InvalidInput, MeterError
from meterlib.store.commands import Batch
from meterlib.store.connect import client_of, driver_for_url
from meterlib.store.faults import FAILURES
from meterlib.store.keys import layout_key, shard_keys
from meterlib.testing import Clock

TENANT = "selftest"
LEASE_MS = 60_000


class CannotDeny(Exception):
    """Why a limit will never deny a call."""


def prove(config: Config, now_ms: int) -> Iterator[Finding]:
    """One finding for each limit of the configuration."""
    with closing(_Bench(config, now_ms)) as bench:
        for limit in config.policy.limits:
            yield _proven(bench, limit)
        if not bench.cleared():
            found = f"keys that begin with {bench.prefix} could not be deleted again"
            yield warning("limits", found, "delete them by hand; nobody else uses them")


def _proven(bench: _Bench, limit: Limit) -> Finding:
    check = f"limit {limit.name}"
    try:
        return _noted(limit, ok(check, bench.proof(limit)))
    except CannotDeny as reason:
        return failure(check, f"can never deny: {reason}", "change the limit, or remove it")
    except MeterError as error:
        return failure(check, str(error), "not proven, since the scripts could not run; see the other findings")


def _noted(limit: Limit, finding: Finding) -> Finding:
    if limit.unit in FORMULAS:
        return finding
    found = f"{finding.found}; calls count only what they pass in Usage(amounts={{{limit.unit!r}: …}})"
    return msgspec.structs.replace(finding, found=found)


class _Bench:
    """A place on the server where limits can be filled without anybody noticing."""

    def __init__(self, config: Config, now_ms: int) -> None:
        self.prefix = f"{config.store.prefix[:32]}-selftest-{os.urandom(6).hex()}"
        options = msgspec.structs.replace(config.store.options, prefix=self.prefix, shards=1)
        self._driver: Any = driver_for_url(config.store.url, options, Clock(now_ms), "sync")
        self._now_ms = now_ms
        self._made = False

    def cleared(self) -> bool:
        """Whether all that was written is deleted."""
        if not self._made:
            return True
        try:
            client = client_of(self._driver)
            if client is None:
                return True
            for key in (*shard_keys(self.prefix, 0), layout_key(self.prefix)):
                if client.exists(key):
                    client.delete(key)
        except FAILURES:
            return False
        return True

    def close(self) -> None:
        """Close the connections."""
        self._driver.close()

    def proof(self, limit: Limit) -> str:
        """How the limit denied, in words. Raises CannotDeny if it did not."""
        attributes = _attributes_for(limit)
        (bound,) = CompiledPolicy(Policy(limits=(limit,))).limits_of(TENANT, attributes)
        if limit.quota == 0:
            self._must_deny(bound, 1, "oversize")
            return "quota 0: every call is denied, for good"
        if limit.oversize == "reject" and limit.quota < AMOUNT_MAX:
            self._must_deny(bound, limit.quota + 1, "oversize")
        if self._reserve(bound, limit.quota)[0] not in (b"reserved", "reserved"):
            raise CannotDeny(f"even {limit.quota:,} {limit.unit} are not let through, which the quota allows")
        wait_ms = self._must_deny(bound, 1, "quota")
        until = "until a call ends" if limit.open else f"for up to {span_text(wait_ms)}"
        if limit.on_expiry == "free":  # the wait is that for the proof's own lease; usage stays to the end
            until = f"until the {limit.period} ends"
        return f"{limit.quota:,} {limit.unit} pass, one more is denied {until}"

    def _must_deny(self, bound: BoundLimit, amount: int, reason: str) -> int:
        reply = self._reserve(bound, amount)
        if reply[0] not in (b"denied", "denied"):
            raise CannotDeny(f"{amount:,} {bound.limit.unit} above the quota of {bound.quota:,} were let through")
        arguments = bound.arguments(amount, self._now_ms)
        denial = quota_exceeded(TENANT, (bound,), (arguments,), reply).denials[0]
        if denial.reason != reason:
            raise CannotDeny(f"{amount:,} {bound.limit.unit} were denied as {denial.reason}, not as {reason}")
        return denial.retry_after_ms or 0

    def _reserve(self, bound: BoundLimit, amount: int) -> Reply:
        """A reserve of any amount, whatever the unit; a call of its own always counts as one request."""
        call_facts, estimate = encode(CallFacts(tenant=TENANT)), encode(Usage())
        field = reservation_field(TENANT, f"selftest-{os.urandom(8).hex()}")
        arguments = bound.arguments(amount, self._now_ms)
        operation = Reserve(field, LEASE_MS, (arguments,), "selftest", call_facts, estimate)
        self._made = True
        reply: Reply = self._driver.call(Batch("reserve", 0, None, (operation,)))[0]
        return reply


def _attributes_for(limit: Limit) -> Mapping[str, str]:
    """Attributes of a call that the limit applies to. Raises CannotDeny if no call can have such attributes."""
    attributes = dict.fromkeys(limit.per, TENANT)
    for name, patterns in limit.match.items():
        wanted = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        value = _example(name, wanted)
        if value is None:
            raise CannotDeny(f"no attribute {name!r} can match {list(wanted)}")
        attributes[name] = value
    return attributes


def _example(name: str, patterns: Sequence[str]) -> str | None:
    """A value that calls may have and that matches one of the patterns."""
    for pattern in patterns:
        for filler in ("x", "", "1", "-"):
            value = pattern.replace("*", filler)
            try:
                check_attributes({name: value})
            except InvalidInput:
                continue
            return value
    return None
