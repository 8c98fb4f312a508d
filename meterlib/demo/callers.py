"""Made-up tenants: what they are allowed, and what each of them asks for."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any, NamedTuple

import msgspec

from meterlib import Limit, Policy, Tenant, Usage
from meterlib.demo.provider import prose

PRESET = "buildkite-anthropic"
MINUTE = "5s"
"""How long a minute of the preset lasts here, so that limits fill, deny and free while one watches."""

TURNS_MAX = 8
"""After so many turns an agent begins another conversation, with the same context."""

PROVIDER = {"provider": "anthropic"}


def demo_policy() -> Policy:
    """The preset with short minutes, and a limit of open calls, which one tenant has less of than the others."""
    limits = (msgspec.structs.replace(limit, window=MINUTE) for limit in Policy.preset(PRESET).limits)
    open_calls = Limit(name="open_calls", open=True, quota=16, retry_hint_ms=250)
    hooli = Tenant(name="hooli", quotas={"open_calls": 3})
    return Policy(limits=(*limits, open_calls), tenants=(hooli,))


class Caller(NamedTuple):
    """One tenant's appetite.

    Attributes:
        tenant: its name.
        story: what to know of it.
        model: which model it asks.
        calls_per_s: how often it would call if nobody stopped it.
        characters: length of what each call adds: at least, at most.
        context_characters: length of what all its calls begin with, marked to be cached.
        patience_s: how long a denied call is tried again.
        streamed: the part of its calls that ask for a stream.
        one_at_a_time: whether it waits for an answer before it asks the next.

    """

    tenant: str
    story: str
    model: str
    calls_per_s: float
    characters: tuple[int, int]
    context_characters: int = 0
    patience_s: float = 1.0
    streamed: float = 1.0
    one_at_a_time: bool = False


CALLERS = (
    Caller("acme", "a CI fleet, wants far more requests than it has", "claude-haiku-4-5", 20, (400, 1600)),
    Caller("initech", "reads long documents, runs out of input tokens", "claude-opus-4-5", 3.5, (16_000, 30_000), 0, 3),
    Caller("hooli", "runs many calls at once, may have three open", "claude-sonnet-4-5", 7, (800, 4000)),
    Caller(
        "globex",
        "an agent: a huge context read from the cache, which counts nothing",
        "claude-sonnet-4-5",
        calls_per_s=4,
        characters=(1500, 4000),
        context_characters=90_000,
        patience_s=3,
        one_at_a_time=True,
    ),
    Caller("ada", "one person with small questions", "claude-haiku-4-5", 1.5, (100, 600), streamed=0.3),
)


class Call(NamedTuple):
    """One call that a tenant means to make, `after_s` after the one before."""

    tenant: str
    after_s: float
    body: dict[str, Any]
    estimate: Usage
    patience_s: float
    changes_its_mind: bool

    @property
    def attributes(self) -> dict[str, str]:
        """What limits and reports tell calls apart by."""
        return {**PROVIDER, "model": self.body["model"]}


def calls_of(caller: Caller, seed: int) -> Iterator[Call]:
    """All that a tenant ever asks; the same for the same seed."""
    rng = Random(f"{seed}/{caller.tenant}")
    context = new = prose(rng, caller.context_characters)
    turns: list[str] = []
    while True:
        turn = prose(rng, rng.randint(*caller.characters))
        turns = [*turns, turn] if context and len(turns) < TURNS_MAX else [turn]
        yield Call(
            tenant=caller.tenant,
            after_s=rng.expovariate(caller.calls_per_s),
            body=_body(caller, context, turns, rng.random() < caller.streamed),
            estimate=Usage(input_tokens=_estimated_tokens(new + turn)),
            patience_s=caller.patience_s,
            changes_its_mind=rng.random() < 0.02,
        )
        new = ""


def _body(caller: Caller, context: str, turns: list[str], streamed: bool) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": caller.model,
        "max_tokens": 1024,
        "stream": streamed,
        "metadata": {"user_id": caller.tenant},
        "messages": [{"role": "user", "content": [{"type": "text", "text": turn}]} for turn in turns],
    }
    if context:
        hour, minutes = {"type": "ephemeral", "ttl": "1h"}, {"type": "ephemeral"}
        body["system"] = [{"type": "text", "text": context, "cache_control": hour}]
        body["messages"][-1]["content"][-1]["cache_control"] = minutes
    return body


def _estimated_tokens(text: str) -> int:
    # Without the provider's tokenizer this is a guess, and rather too much than too little.
    return -(-len(text.encode()) * 2 // 7)
