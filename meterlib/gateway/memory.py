"""What an estimator remembers of earlier calls: cached prefixes, ratios of tokens to text, and not too many of them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, NamedTuple, TypeVar

PACE = 0.12
"""How far one more call moves a ratio that is known well."""


class Prefix(NamedTuple):
    """The beginning of a prompt, of so many tokens, that the provider has cached.

    Attributes:
        tokens: how many it has.
        exact: they are the provider's own number, and no estimate.
        ttl_s: how long it is kept after each use.
        expires_s: when it will be gone if nobody uses it again, by the estimator's clock.
    """

    tokens: int
    exact: bool
    ttl_s: int
    expires_s: float

    def used_at(self, at_s: float) -> Prefix:
        """It lives on from then."""
        return self._replace(expires_s=max(self.expires_s, at_s + self.ttl_s))

    def joined(self, known: Prefix | None) -> Prefix:
        """The same prefix as told by another call: the longer life counts, and the better number."""
        if known is None:
            return self
        told = self if self.exact or not known.exact else known
        return Prefix(told.tokens, told.exact, max(self.ttl_s, known.ttl_s), max(self.expires_s, known.expires_s))


class Ratio(NamedTuple):
    """Tokens for each byte of weighed text, and how much has told so, in calls of much text."""

    tokens_per_byte: float
    seen: float

    def towards(self, found: float, trust: float) -> Ratio:
        """At first the mean of all that was found, later an average in which the latest counts most.

        `trust` is 1 for a call of much text, and less for one of little.
        """
        step = max(PACE * trust, trust / (self.seen + trust + 0.5))
        return Ratio(self.tokens_per_byte + step * (found - self.tokens_per_byte), self.seen + trust)


Key = TypeVar("Key")
Value = TypeVar("Value")


class Latest(Generic[Key, Value]):
    """A mapping that forgets what was put longest ago."""

    def __init__(self, size_max: int) -> None:
        self._size_max = size_max
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Key) -> Value | None:
        """What was put under the key, if it is not forgotten."""
        return self._values.get(key)

    def put(self, key: Key, value: Value) -> None:
        """The value is the latest; the oldest is forgotten if there are too many."""
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._size_max:
            self._values.popitem(last=False)

    def drop(self, key: Key) -> None:
        """The key is forgotten."""
        self._values.pop(key, None)
