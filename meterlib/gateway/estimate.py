"""What a call is going to be charged, told from its prompt before it is sent.

Most of what an agent sends is read from the provider's prompt cache and not charged, so an estimate by size alone
would refuse every later turn of a conversation. The estimator therefore remembers which beginnings of prompts the
provider has cached, and how many tokens they turned out to be.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import msgspec

from meterlib.core.usage import Usage
from meterlib.gateway.content import Model, Weight, model_of, weigh
from meterlib.gateway.memory import Latest, Prefix, Ratio
from meterlib.gateway.prompt import Prompt

RATIO = 1 / 3.5
"""Tokens for each byte of average text, until calls have told better."""
PREFIXES_MAX = 50_000
RATIOS_MAX = 10_000
LOOKBACK_BLOCKS = 20
"""How many blocks the provider tries for a cached prefix at each breakpoint, the breakpoint's own included."""


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What a call is expected to use.

    Attributes:
        usage: the three counts of the input, in tokens; the output is not known.
        basis: what the estimator that made it needs to learn from the outcome; nobody else's business.
    """

    usage: Usage
    basis: Any = None


class Estimator(Protocol):
    """Tells what calls are going to use. Anything with these two methods can stand in for meterlib's own.

    Both are called within every request, so they must neither fail nor wait for anything.
    """

    def estimate(self, tenant: str, prompt: Prompt) -> Estimate:
        """What a call of this tenant is going to use. It may yet be refused, and never be made."""

    def learn(self, estimate: Estimate, usage: Usage) -> None:
        """Take note of what the call did use. Called once, and only with numbers that the provider told in full."""


class CacheAwareEstimator:
    """Expects the provider's prompt cache to work as documented, and learns from every call.

    The beginning of a prompt is expected to be read from the cache if the same tenant had it cached by an earlier call
    with the same model and speed, if it was last used no longer ago than its time to live, and if this prompt has a
    breakpoint from which the provider will find it. Its tokens are known from that call's usage. What follows is
    weighed, with a ratio of tokens to text that is learnt for each tenant and model; as long as nothing is known of a
    tenant, what was learnt from others with that model serves, and before that `RATIO`.

    What is remembered is digests and numbers, no text: the latest `prefixes_max` prefixes, of which a call has up to
    four, and `ratios_max` ratios; about 20 MB when both are full. Each process learns on its own. An estimator is for
    one thread.

    Args:
        now_s: a clock that never goes back, in seconds.
        prefixes_max: how many cached prefixes to remember.
        ratios_max: how many pairs of tenant and model to remember ratios of.
    """

    def __init__(
        self,
        now_s: Callable[[], float] = time.monotonic,
        *,
        prefixes_max: int = PREFIXES_MAX,
        ratios_max: int = RATIOS_MAX,
    ) -> None:
        self._now_s = now_s
        self._prefixes: Latest[bytes, Prefix] = Latest(prefixes_max)
        self._ratios: Latest[tuple[str, str], Ratio] = Latest(ratios_max)

    def estimate(self, tenant: str, prompt: Prompt) -> Estimate:
        """What this call is going to use; nothing is remembered of it until it is settled."""
        model = model_of(prompt.model)
        now_s = self._now_s()
        digests = _digests(tenant, prompt)
        at, read = self._cached(prompt, digests, now_s)
        count = _Count(read.tokens if read else 0, self._ratio(tenant, prompt.model).tokens_per_byte)
        if at < 0 and prompt.system_at:
            count.add(Weight(0.0, model.forced_tool_tokens if prompt.must_use_tool else model.tool_tokens))
        marks = []
        start = at + 1
        for point in prompt.breakpoints:
            if point.at > at:
                count.add(weigh(prompt.blocks[start : point.at + 1], model))
                marks.append(_Mark(digests[point.at], point.ttl_s, count.tokens))
                start = point.at + 1
        count.add(weigh(prompt.blocks[start:], model))
        basis = _Basis(
            tenant=tenant,
            model=prompt.model,
            at_s=now_s,
            used=_used(prompt, digests, at),
            read=read,
            marks=tuple(marks),
            fresh=Weight(count.text, count.others),
        )
        return Estimate(usage=_usage(read, marks, count.tokens, model), basis=basis)

    def learn(self, estimate: Estimate, usage: Usage) -> None:
        """Take note of which prefixes are cached now, how long they are, and what the text's ratio was.

        A call's prefixes are taken for cached from its settlement on, though they are so when its answer begins, and
        though many calls that are never settled in full have them cached too. A call that comes in between is
        estimated too high. To trust in a prefix earlier would be to trust in calls that wait, or were refused: those
        that follow them would be let through for next to nothing, and be charged in full.
        """
        basis: _Basis = estimate.basis
        if usage.input_tokens is None:
            return
        read, written = usage.cache_read_input_tokens or 0, usage.cache_creation_input_tokens or 0
        exact = _is_one_pass(usage)
        base = _base(basis, read) if exact else None
        if exact and base is not None:
            self._learn_ratio(basis, usage.input_tokens + read + written - base)
        if basis.read:
            self._learn_reading(basis, basis.read, read, cached=bool(read + written))
        if read + written:
            self._learn_writing(basis, base, read + written if exact else None)

    def _cached(self, prompt: Prompt, digests: dict[int, bytes], now_s: float) -> tuple[int, Prefix | None]:
        """The longest prefix to be read from the cache, and at which block it ends; -1 if there is none."""
        for point in reversed(prompt.breakpoints):
            for at in _looked_at(point.at):
                prefix = self._prefixes.get(digests[at])
                if prefix and prefix.expires_s > now_s:
                    return at, prefix
        return -1, None

    def _ratio(self, tenant: str, model: str) -> Ratio:
        known = self._ratios.get((tenant, model))
        if known:
            return known
        return (self._ratios.get((_ANY_TENANT, model)) or Ratio(RATIO, 0.0))._replace(seen=0.0)

    def _learn_ratio(self, basis: _Basis, fresh_tokens: int) -> None:
        weight = basis.fresh.text
        if weight < TEXT_LEARNT_FROM_MIN:
            return
        found = (fresh_tokens - basis.fresh.tokens) / weight
        if not RATIO / 5 < found < RATIO * 5:
            return  # something else went on than was weighed
        trust = min(1.0, weight / TEXT_TRUSTED)
        for tenant in (basis.tenant, _ANY_TENANT):
            self._ratios.put((tenant, basis.model), self._ratio(tenant, basis.model).towards(found, trust))

    def _learn_reading(self, basis: _Basis, expected: Prefix, read_tokens: int, cached: bool) -> None:
        """The prefixes that were used live on; the one that was to be read and was not is gone."""
        for digest in basis.used if cached else ():
            known = self._prefixes.get(digest)
            if known:
                self._prefixes.put(digest, known.used_at(basis.at_s))
        if read_tokens < expected.tokens * (1.0 if expected.exact else 0.8):
            self._prefixes.drop(basis.used[0])

    def _learn_writing(self, basis: _Basis, base: int | None, cached_tokens: int | None) -> None:
        """The prefixes that end at a breakpoint are cached; of the last one the provider told the tokens.

        Those of the others lie in between in proportion.
        """
        model = model_of(basis.model)
        first = basis.read.tokens if basis.read else 0
        last = basis.marks[-1].tokens if basis.marks else first
        for mark in basis.marks:
            tokens, exact = mark.tokens, False
            if cached_tokens is not None:
                exact = mark is basis.marks[-1]
                begin = first if base is None else base
                part = (mark.tokens - first) / (last - first) if last > first else 1.0
                tokens = round(begin + part * (cached_tokens - begin))
            if exact or tokens >= model.cached_tokens_min:
                prefix = Prefix(tokens, exact, mark.ttl_s, basis.at_s + mark.ttl_s)
                self._prefixes.put(mark.digest, prefix.joined(self._prefixes.get(mark.digest)))


# ── What is remembered ────────────────────────────────────────────────────────────────────────────────────────────────

_ANY_TENANT = ""
"""No tenant is called so."""

TEXT_LEARNT_FROM_MIN = 40
"""Less text than this tells nothing of its ratio, in bytes."""
TEXT_TRUSTED = 4_000
"""So much text tells as much of the ratio as any more."""


class _Mark(NamedTuple):
    """A prefix to be cached, and its estimated tokens."""

    digest: bytes
    ttl_s: int
    tokens: int


class _Basis(msgspec.Struct, frozen=True, kw_only=True):
    """What an estimate was made from.

    Attributes:
        at_s: when.
        used: prefixes the call uses if all goes as expected; the one that it reads comes first.
        read: what is known of that one.
        marks: those that it has written, in order.
        fresh: all that is not read.
    """

    tenant: str
    model: str
    at_s: float
    used: tuple[bytes, ...]
    read: Prefix | None
    marks: tuple[_Mark, ...]
    fresh: Weight


# ── Prompts ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_encoder = msgspec.json.Encoder()


def _looked_at(at: int) -> range:
    """The blocks at which the provider looks for a cached prefix, from a breakpoint at block `at`."""
    return range(at, max(at - LOOKBACK_BLOCKS, -1), -1)


def _digests(tenant: str, prompt: Prompt) -> dict[int, bytes]:
    """A digest of the prompt's beginning up to and including each block where the provider may look for it."""
    wanted = {at for point in prompt.breakpoints for at in _looked_at(point.at)}
    if not wanted:
        return {}
    digest = blake2b(_encoder.encode((tenant, prompt.model)), digest_size=16)
    # Another speed leaves cached tools as they are, other settings leave the system too.
    seams = ((prompt.system_at, (prompt.speed or "").encode()), (prompt.messages_at, prompt.settings))
    ends = sorted({at + 1 for at in wanted} | {at for at, _ in seams if 0 < at <= max(wanted)})
    found = {}
    start = 0
    for end in ends:
        for at, setting in seams:
            if at == start:
                digest.update(b"%d:%b" % (at, setting))
        digest.update(_encoder.encode_lines(prompt.blocks[start:end]))
        if end - 1 in wanted:
            found[end - 1] = digest.copy().digest()
        start = end
    return found


def _used(prompt: Prompt, digests: dict[int, bytes], at: int) -> tuple[bytes, ...]:
    """The prefix that ends at block `at`, then those before it that the prompt has a breakpoint for."""
    earlier = [point.at for point in prompt.breakpoints if point.at < at]
    return tuple(digests[place] for place in (at, *earlier)) if at >= 0 else ()


class _Count:
    """Adds weights up, behind a beginning of so many tokens."""

    def __init__(self, base: int, tokens_per_byte: float) -> None:
        self._base = base
        self._tokens_per_byte = tokens_per_byte
        self.text = 0.0
        self.others = 0

    def add(self, weight: Weight) -> None:
        self.text += weight.text
        self.others += weight.tokens

    @property
    def tokens(self) -> int:
        return self._base + self.others + round(self.text * self._tokens_per_byte)


def _usage(read: Prefix | None, marks: list[_Mark], tokens: int, model: Model) -> Usage:
    base = read.tokens if read else 0
    cached = marks[-1].tokens if marks else base
    if cached < model.cached_tokens_min:
        cached = base  # too short to be cached
    return Usage(
        input_tokens=tokens - cached,
        cache_creation_input_tokens=cached - base,
        cache_read_input_tokens=base,
    )


# ── Outcomes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _is_one_pass(usage: Usage) -> bool:
    """The numbers are those of the prompt, and not a sum over what the provider made of it with tools of its own."""
    tools = usage.server_tool_use
    searched = tools and (tools.web_search_requests or tools.web_fetch_requests or tools.code_execution_requests)
    return not searched and len(usage.iterations) <= 1


def _base(basis: _Basis, read_tokens: int) -> int | None:
    """The tokens of what the prompt begins with and was not weighed; None if they cannot be told."""
    if basis.read is None or basis.read.exact:
        return basis.read.tokens if basis.read else 0
    return read_tokens if basis.read.tokens * 0.5 < read_tokens < basis.read.tokens * 2 else None
