"""Why the provider's numbers differ from ours: each difference with its cause, and the entries that show it. Pure.

Tokens come first. Both sides are told by cell (a bucket of time and a group), and what is left of a cell is explained
step by step, the most certain cause first: calls that moved to the next bucket, the same tokens under another tier,
cache writes of another time to live, calls whose numbers were cut short, passes that one side lacks, and calls that
did not go through the gateway. A cause takes exactly what it explains, so that the differences add up to the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

from meterlib.billing.reconcile.cells import MEASURES, NOTHING, Cell, Counts, Group, added
from meterlib.core.ledger import EntryKind, Quality

Cause = Literal[
    "timing",
    "aborted",
    "missing_iterations",
    "cache_split",
    "outside_gateway",
    "priority_tier",
    "code_execution",
    "unpriced",
    "price",
    "unknown",
]
CAUSES: Mapping[Cause, str] = {
    "timing": "counted in a neighbouring bucket: the call went over the edge",
    "aborted": "cut short or never settled: what was used in the end is the provider's knowledge",
    "missing_iterations": "passes within calls that one side lacks",
    "cache_split": "cache writes of another time to live than was known",
    "outside_gateway": "usage that did not go through the gateway",
    "priority_tier": "of the priority tier, which cost reports leave out, or under another tier",
    "code_execution": "the provider's charge for code execution, which usage reports leave out",
    "unpriced": "no book has a price for it",
    "price": "the tokens agree, the money does not: the book's price is not the provider's",
    "unknown": "nothing in the ledger explains it",
}
"""What each cause means."""

INPUT, WRITE_5M, WRITE_1H, READ, OUTPUT, SEARCH = range(len(MEASURES))
PROMPT = (INPUT, WRITE_5M, WRITE_1H, READ)
SEARCH_STEPS = 20_000
"""How long a set of calls is looked for that makes up a difference."""
ESTIMATE_TIMES = 2
"""A call that was never settled may have used up to so many times the input that was estimated."""


T = TypeVar("T")


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """What one entry says of one cell, as far as it may explain a difference.

    Attributes:
        epoch: with `shard` and `n`: the entry.
        request_id: the provider's, where it told one.
        group: whose cell it is in; a call of several models has one record for each.
        bucket: from when to when the cell is that it counts in; None outside of the report.
        other: the bucket that the provider may count it in; None if there is none in the report.
        leaves: whether it may be counted before the report begins, or after it has ended.
        ends_elsewhere: whether its end is there, and not just close by.
        counts: what it used, in our cell.
        costs: what that costs, in cents.
        unsplit: cache writes of unknown time to live; they are counted as of five minutes.
        passes: what each pass used that is billed besides the call's own numbers.
        doubtful: whether the passes of the call do not add up to its numbers.
        estimated: prompt tokens that were held for it; of calls that were never settled.
    """

    epoch: str = ""
    shard: int
    n: int
    reservation_id: str = ""
    request_id: str = ""
    tenant: str = ""
    kind: EntryKind = "settled"
    quality: Quality = "final"
    group: Group
    bucket: tuple[int, int] | None = None
    other: tuple[int, int] | None = None
    leaves: bool = False
    ends_elsewhere: bool = False
    counts: Counts = NOTHING
    costs: tuple[Decimal, ...] = ()
    unsplit: int = 0
    passes: tuple[Counts, ...] = ()
    doubtful: bool = False
    estimated: int = 0


class Evidence(NamedTuple):
    """An entry, and how much of a difference it explains; None where only several together do."""

    call: Call
    counts: Counts | None


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A part of what the provider tells more than we do in a cell; negative numbers where it tells less.

    Attributes:
        cell: where.
        cause: why.
        counts: the tokens, and web searches, of this part.
        evidence: the entries that show it, those that explain most first.
        how: in words, what the evidence is.
    """

    cell: Cell
    cause: Cause
    counts: Counts
    evidence: tuple[Evidence, ...] = ()
    how: str = ""

    @property
    def size(self) -> int:
        """How many tokens it is about."""
        return sum(map(abs, self.counts))


def differing(provider: Mapping[Cell, Counts], ours: Mapping[Cell, Counts]) -> dict[Cell, Counts]:
    """What the provider tells more than we do, of each cell where that is not nothing."""
    found = {}
    for cell in sorted(provider.keys() | ours.keys()):
        left = less(provider.get(cell, NOTHING), ours.get(cell, NOTHING))
        if any(left):
            found[cell] = left
    return found


def explain(
    left: Mapping[Cell, Counts], calls: Sequence[Call], requests: Mapping[Cell, int] | None = None
) -> list[Difference]:
    """Why they differ.

    Args:
        left: what the provider tells more than we do, by cell.
        calls: entries of these cells that may explain something.
        requests: how many requests the provider counts more, of any cell; None where it does not count them.
    """
    return _Explaining(left, calls, requests).differences()


class _Explaining:
    def __init__(self, left: Mapping[Cell, Counts], calls: Sequence[Call], requests: Mapping[Cell, int] | None) -> None:
        self._left = {cell: [*counts] for cell, counts in left.items()}
        self._requests = None if requests is None else dict(requests)
        self._calls = calls
        self._in: dict[Cell, list[Call]] = {}
        for call in calls:
            if call.bucket is not None:
                self._in.setdefault(Cell(*call.bucket, call.group), []).append(call)
        self._found: list[Difference] = []

    def differences(self) -> list[Difference]:
        for group in dict.fromkeys(cell.group for cell in self._left):
            self._timing([call for call in self._calls if call.group == group and (call.other or call.leaves)])
        self._tiers()
        for cell in list(self._left):
            for step in (self._split, self._passes, self._aborted, self._iterations, self._outside, self._unknown):
                if any(self._left[cell]):
                    step(cell)
        return sorted(self._found, key=lambda found: (found.cell, found.cause))

    def _take(
        self, cell: Cell, cause: Cause, counts: Iterable[int], evidence: Iterable[Evidence] = (), how: str = ""
    ) -> None:
        """So much of what is left of a cell has this cause."""
        part = tuple(counts)
        known = self._left.setdefault(cell, [*NOTHING])
        for at, count in enumerate(part):
            known[at] -= count
        shown = tuple(sorted(evidence, key=lambda one: -sum(map(abs, one.counts or one.call.counts))))
        self._found.append(Difference(cell=cell, cause=cause, counts=part, evidence=shown, how=how))

    # ── Calls that moved ──────────────────────────────────────────────────────────────────────────────────────────────

    def _timing(self, calls: Sequence[Call]) -> None:
        """First all calls of a group that end elsewhere, if that fits better; then those of each edge by themselves."""
        over = [call for call in calls if call.ends_elsewhere]
        moved = self._moved(over)
        if over and _size(moved.values()) < _size(self._left.get(cell, NOTHING) for cell in moved):
            self._move(over)
            calls = [call for call in calls if not call.ends_elsewhere]
        edges: dict[tuple[Cell | None, Cell | None], list[Call]] = {}
        for call in calls:
            if min(call.counts) >= 0 and any(call.counts):
                edges.setdefault(_way(call), []).append(call)
        for whence, where in sorted(edges, key=str):
            self._edge(whence, where, edges[whence, where])

    def _moved(self, calls: Iterable[Call]) -> dict[Cell, Counts]:
        """What would be left of the cells if these calls were counted elsewhere."""
        left: dict[Cell, Counts] = {}
        for call in calls:
            for cell, sign in zip(_way(call), (1, -1), strict=True):
                if cell is not None:
                    before = left.get(cell, tuple(self._left.get(cell, NOTHING)))
                    left[cell] = added(before, times(call.counts, sign))
        return left

    def _edge(self, whence: Cell | None, where: Cell | None, calls: list[Call]) -> None:
        """The calls at one edge that are missing on one side, and too many on the other."""
        lack = times(self._left.get(whence, NOTHING), -1) if whence else None
        more = tuple(self._left.get(where, NOTHING)) if where else None
        both = [side for side in (lack, more) if side is not None]
        if lack is not None and more is not None:
            both = [tuple(max(0, min(pair)) for pair in zip(lack, more, strict=True)), *both]
        for wanted in both:
            chosen = subset(calls, wanted)
            if chosen and _size(self._moved(chosen).values()) < self._size_of(chosen):
                self._move(chosen)
                return
        if whence is not None and where is not None:
            for call in sorted(calls, key=lambda one: -sum(one.counts)):
                room = (*times(self._left.get(whence, NOTHING), -1), *self._left.get(where, NOTHING))
                if all(count <= place for count, place in zip(call.counts * 2, room, strict=True)):
                    self._move([call])

    def _size_of(self, calls: Iterable[Call]) -> int:
        return _size(self._left.get(cell, NOTHING) for cell in self._moved(calls))

    def _move(self, calls: Iterable[Call]) -> None:
        moved: dict[tuple[Cell, int], list[Call]] = {}
        for call in calls:
            for cell, sign in zip(_way(call), (-1, 1), strict=True):
                if cell is not None:
                    moved.setdefault((cell, sign), []).append(call)
        for (cell, sign), those in sorted(moved.items()):
            total = times(_total(call.counts for call in those), sign)
            whither = (
                "the provider counts them in a neighbouring bucket" if sign < 0 else "ours are in a neighbouring one"
            )
            evidence = [Evidence(call, times(call.counts, sign)) for call in those]
            self._take(cell, "timing", total, evidence, f"{_calls(those)} over the edge; {whither}")

    # ── The same tokens, told otherwise ───────────────────────────────────────────────────────────────────────────────

    def _tiers(self) -> None:
        """The same tokens of the same time and model under another tier, speed or place."""
        alike: dict[tuple[object, ...], list[Cell]] = {}
        for cell in self._left:
            group = cell.group
            alike.setdefault((cell.start_ms, group.model, group.workspace, group.key), []).append(cell)
        for cells in alike.values():
            for one in cells:
                for other in cells:
                    if any(self._left[one]) and self._left[other] == [-count for count in self._left[one]]:
                        self._swap(one, other)

    def _swap(self, one: Cell, other: Cell) -> None:
        """What `one` has more, `other` has less."""
        ours, theirs = (one, other) if sum(self._left[one]) < 0 else (other, one)
        counts = tuple(self._left[theirs])
        calls = subset(self._in.get(ours, ()), counts)
        names = [(cell.group.tier, cell.group.speed, cell.group.geo) for cell in (ours, theirs)]
        cause: Cause = "unknown"
        if any(tier.startswith("priority") for tier, _, _ in names):
            cause = "priority_tier"
        told = ["/".join(word for word in words if word) for words in names]
        for cell, sign, how in (
            (ours, -1, f"the provider tells the same tokens as {told[1]}"),
            (theirs, 1, f"ours are told as {told[0]}"),
        ):
            evidence = [Evidence(call, times(call.counts, sign)) for call in calls]
            self._take(cell, cause, times(counts, sign), evidence, how)

    def _split(self, cell: Cell) -> None:
        """Cache writes that we count as of five minutes, and the provider as of an hour, or the other way round."""
        left = self._left[cell]
        some = min(abs(left[WRITE_5M]), abs(left[WRITE_1H]))
        if not some or left[WRITE_5M] * left[WRITE_1H] > 0:
            return
        sign = 1 if left[WRITE_1H] > 0 else -1
        calls = [call for call in self._in.get(cell, ()) if call.unsplit > 0]
        known = sum(call.unsplit for call in calls)
        if calls and sign > 0:
            some = min(some, known)
        elif abs(left[WRITE_5M]) != abs(left[WRITE_1H]):
            return  # no call's split is in doubt, and not even the sums agree
        chosen = _of_amount(calls, some) if sign > 0 else []
        evidence = [Evidence(call, _split_counts(call.unsplit, sign)) for call in chosen]
        if calls and not chosen and sign > 0:
            evidence = [Evidence(call, None) for call in calls]
        how = (
            f"{_calls(calls)} whose split was not known" if calls else "no call's split is in doubt, yet the sums agree"
        )
        self._take(cell, "cache_split", _split_counts(some, sign), evidence, how)

    # ── What one side does not know ───────────────────────────────────────────────────────────────────────────────────

    def _passes(self, cell: Cell) -> None:
        """Passes that we count and the provider does not."""
        some = [(call, one) for call in self._in.get(cell, ()) for one in call.passes if min(one) >= 0 and any(one)]
        chosen = subset(some, times(self._left[cell], -1), lambda pair: pair[1])
        if chosen:
            evidence = [Evidence(call, times(one, -1)) for call, one in chosen]
            how = "passes besides the call's own numbers, which the provider does not tell"
            self._take(cell, "missing_iterations", self._left[cell], evidence, how)

    def _aborted(self, cell: Cell) -> None:
        """Calls that were cut short, whose output is what was seen of it, and calls that nobody settled."""
        calls, left = self._in.get(cell, ()), self._left[cell]
        guessed = [call for call in calls if call.quality == "estimated"]
        cut = [call for call in calls if call.quality == "partial"]
        more = None if self._requests is None else self._requests.get(cell, 0)
        if guessed and not more:
            self._take(cell, "aborted", left, _each(guessed, left), f"{_calls(guessed)} with estimated numbers")
        elif cut and left[OUTPUT] and (more == 0 or not any(left[at] for at in PROMPT)):
            part = tuple(count if at == OUTPUT else 0 for at, count in enumerate(left))
            self._take(cell, "aborted", part, _each(cut, part), f"{_calls(cut)} cut short")
        else:
            self._unsettled(cell, [call for call in calls if call.kind == "expired"], more)

    def _unsettled(self, cell: Cell, calls: list[Call], more: int | None) -> None:
        left = self._left[cell]
        prompt = sum(left[at] for at in PROMPT)
        few = more is None or 0 < more <= len(calls)
        if calls and few and min(left) >= 0 and prompt <= ESTIMATE_TIMES * sum(call.estimated for call in calls):
            how = f"{_calls(calls)} reserved and never settled"
            self._take(cell, "aborted", left, _each(calls, left), how)

    def _iterations(self, cell: Cell) -> None:
        """Tokens without a request of their own, or beside calls whose passes do not add up: passes that we lack."""
        left = self._left[cell]
        if min(left) < 0:
            return
        doubtful = [call for call in self._in.get(cell, ()) if call.doubtful]
        if self._requests is None:
            if doubtful:
                how = f"{_calls(doubtful)} whose passes do not add up"
                self._take(cell, "missing_iterations", left, _each(doubtful, left), how)
        elif not self._requests.get(cell, 0):
            how = "both sides count as many requests, so these tokens are of passes within them"
            self._take(cell, "missing_iterations", left, _each(doubtful, left), how)

    def _outside(self, cell: Cell) -> None:
        """The provider knows calls that we do not."""
        left = self._left[cell]
        if min(left) < 0:
            return
        more = None if self._requests is None else self._requests.get(cell, 0)
        how = "the provider counts more, and no entry explains it"
        if more:
            how = f"the provider counts {more:,} request{'s' if abs(more) > 1 else ''} more"
        self._take(cell, "outside_gateway", left, (), how)

    def _unknown(self, cell: Cell) -> None:
        self._take(cell, "unknown", self._left[cell], (), "the provider counts less, or some more and some less")


# ── Sets of calls ─────────────────────────────────────────────────────────────────────────────────────────────────────


def subset(
    items: Sequence[T],
    wanted: Sequence[int],
    of: Callable[[T], Sequence[int]] = lambda call: call.counts,  # type: ignore[attr-defined]
) -> list[T]:
    """Items that make up exactly what is wanted; none if there are none, or if it would take too long to tell."""
    if min(wanted, default=0) < 0 or not any(wanted):
        return []
    known = sorted(((tuple(of(item)), item) for item in items), key=lambda pair: -sum(pair[0]))
    known = [(counts, item) for counts, item in known if min(counts) >= 0 and _fits(counts, wanted)]
    rest = [tuple(0 for _ in wanted)]
    for counts, _ in reversed(known):
        rest.append(added(rest[-1], counts))
    rest.reverse()
    # Depth first: what is still wanted before item `at`, with the items that were taken.
    stack: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = [(0, tuple(wanted), ())]
    for _ in range(SEARCH_STEPS):
        if not stack:
            return []
        at, left, taken = stack.pop()
        if not any(left):
            return [known[one][1] for one in taken]
        if at < len(known) and _fits(left, rest[at]):
            stack.append((at + 1, left, taken))
            if _fits(known[at][0], left):
                stack.append((at + 1, less(left, known[at][0]), (*taken, at)))
    return []


def _fits(small: Sequence[int], large: Sequence[int]) -> bool:
    return all(one <= other for one, other in zip(small, large, strict=True))


def less(one: Iterable[int], other: Iterable[int]) -> Counts:
    """The difference."""
    return tuple(a - b for a, b in zip(one, other, strict=True))


def times(counts: Iterable[int], factor: int) -> Counts:
    """Each of them, so many times."""
    return tuple(factor * count for count in counts)


def _total(all_counts: Iterable[Counts]) -> Counts:
    total = NOTHING
    for counts in all_counts:
        total = added(total, counts)
    return total


def _size(all_counts: Iterable[Iterable[int]]) -> int:
    return sum(abs(count) for counts in all_counts for count in counts)


def _way(call: Call) -> tuple[Cell | None, Cell | None]:
    """The cell that a call counts in, and the one that the provider may count it in."""
    whence = None if call.bucket is None else Cell(*call.bucket, call.group)
    return whence, None if call.other is None else Cell(*call.other, call.group)


def _each(calls: Sequence[Call], counts: Sequence[int]) -> list[Evidence]:
    """What a call by itself explains, or several only together."""
    return [Evidence(call, tuple(counts) if len(calls) == 1 else None) for call in calls]


def _of_amount(calls: Sequence[Call], amount: int) -> list[Call]:
    return subset(calls, (amount,), lambda call: (call.unsplit,))


def _split_counts(amount: int, sign: int) -> Counts:
    counts = [*NOTHING]
    counts[WRITE_5M], counts[WRITE_1H] = -sign * amount, sign * amount
    return tuple(counts)


def _calls(calls: Sequence[Any]) -> str:
    return f"{len(calls):,} call{'s' if len(calls) > 1 else ''}"
