"""A brute-force judge of histories: a list of timed amounts and the promises in prose, sharing no code with the engine.

It believes a reply's status and times, and works out from them what every limit should count, what may be admitted and
what the ledger must hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SUM_MAX = 2**53 - 1


@dataclass
class Rule:
    """A limit as the judge sees it."""

    window: str
    unit: str
    quota: int
    span: str  # "sliding", "period" or "open"
    length_ms: int = 0
    step_ms: int = 0
    period: tuple[int, int] = (0, 0)
    frees: bool = False
    rejects: bool = False


@dataclass
class Charge:
    """An amount that some call counts for in a window, as of its own time."""

    rule: Rule
    at_ms: int
    held: int = 0
    settled: int = 0
    lease_ms: int = 0  # end of the lease while it is held


@dataclass
class Call:
    """One id's life."""

    status: str
    at_ms: int = 0
    lease_end_ms: int = 0
    charges: list[Charge] = field(default_factory=list)


class Judge:
    """Follows a history through its replies and says what must be true of each."""

    def __init__(self) -> None:
        self.calls: dict[str, Call] = {}
        self.charges: list[Charge] = []
        self.terminal: dict[str, list[str]] = {}
        self.entries: list[tuple[str, str]] = []
        self.full: set[str] = set()  # windows that may hold less than is told here: see `_charged`
        self.now_ms = 0

    # what counts

    def counts(self, charge: Charge, now_ms: int) -> tuple[int, int]:
        """What a charge adds to settled and held now."""
        rule = charge.rule
        if rule.span == "sliding":
            last_of_step = charge.at_ms - charge.at_ms % rule.step_ms + rule.step_ms - 1
            alive = now_ms < last_of_step + rule.length_ms
            return (charge.settled, charge.held) if alive else (0, 0)
        if rule.span == "open":
            return 0, charge.held if now_ms < charge.lease_ms else 0
        if now_ms >= rule.period[1]:
            return 0, 0
        held = charge.held if not rule.frees or now_ms < charge.lease_ms else 0
        return charge.settled, held

    def used(self, window: str, now_ms: int) -> tuple[int, int]:
        pairs = [self.counts(charge, now_ms) for charge in self.charges if charge.rule.window == window]
        return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)

    def counted(self, window: str, settled: int, held: int, now_ms: int, written_ms: int) -> None:
        """What the store says a window counts must be what its calls make it count.

        Args:
            window: which.
            settled: what the store says; so `held`.
            now_ms: when it was asked. Asking alone does not keep its time from being set back.
            written_ms: when it wrote last, and so a time that is over for good.
        """
        self.now_ms = written_ms
        told = self.used(window, now_ms)
        if told == (settled, held) == (0, 0) == self.used(window, written_ms):
            self.full.discard(window)

        assert window in self.full or told == (settled, held)

    def _charged(self, charges: list[Charge]) -> None:
        """Sums saturate: what finds no room is not counted, also when there is room later.

        Until it is empty, such a window admits and denies by what it holds, which is not known here.
        """
        for window in {charge.rule.window for charge in charges}:
            if sum(self.used(window, self.now_ms)) > SUM_MAX:
                self.full.add(window)

    def exact_log(self, rule: Rule, now_ms: int, length_ms: int) -> int:
        """What an exact log of this length would count, to the ms."""
        return sum(
            charge.settled + charge.held
            for charge in self.charges
            if charge.rule.window == rule.window and charge.at_ms > now_ms - length_ms
        )

    # what may happen

    def expire_due(self, now_ms: int, only: str | None = None) -> None:
        """What the store says has expired must have been overdue."""
        for call_id, call in self.calls.items():
            if call.status == "open" and call.lease_end_ms <= now_ms and only in (None, call_id):
                self.expired(call_id, now_ms)

    def expired(self, call_id: str, now_ms: int) -> None:
        call = self.calls[call_id]

        assert call.status == "open"
        assert call.lease_end_ms <= now_ms

        call.status = "expired"
        for charge in call.charges:
            kept = charge.rule.span == "sliding" or (charge.rule.span == "period" and not charge.rule.frees)
            if charge.rule.span == "period" and charge.rule.frees and charge.lease_ms >= charge.rule.period[1]:
                kept = True  # the period ended before the lease did
            charge.settled, charge.held = (charge.held if kept else 0), 0
        self.terminal.setdefault(call_id, []).append("expired")
        self.entries.append(("expired", call_id))

    def reserved(self, call_id: str, wanted: list[tuple[Rule, int]], now_ms: int, lease_ms: int) -> None:
        for rule, amount in wanted:
            if rule.window in self.full:
                continue
            settled, held = self.used(rule.window, now_ms)
            assert rule.quota > 0, "a quota of nothing let a call pass"
            if amount > rule.quota:
                assert not rule.rejects
                assert settled + held == 0, "an oversize call passed a partition that was not idle"
            else:
                assert settled + held + amount <= rule.quota, "admitted beyond the quota"
                if rule.span == "sliding":
                    assert self.exact_log(rule, now_ms, rule.length_ms) + amount <= rule.quota
        call = Call("open", now_ms, now_ms + lease_ms)
        for rule, amount in wanted:
            call.charges.append(Charge(rule, now_ms, held=amount, lease_ms=now_ms + lease_ms))
        self.calls[call_id] = call
        self.charges += call.charges
        self._charged(call.charges)

    def denied(self, wanted: list[tuple[Rule, int]], verdicts: list[str], now_ms: int) -> None:
        assert any(verdict != "passes" for verdict in verdicts)

        for (rule, amount), verdict in zip(wanted, verdicts, strict=True):
            if rule.window in self.full:
                continue
            settled, held = self.used(rule.window, now_ms)
            fits = settled + held + amount <= rule.quota and rule.quota > 0
            if verdict == "passes":
                assert fits or (amount > rule.quota > 0 and settled + held == 0)
            elif verdict == "oversize":
                assert rule.quota == 0 or (amount > rule.quota and rule.rejects)
            else:
                assert not fits, "denied although it fits"
                if rule.span == "sliding" and amount <= rule.quota:
                    longer = self.exact_log(rule, now_ms, rule.length_ms + rule.step_ms)
                    assert longer + amount > rule.quota, "a log only one step longer would have admitted it"

    def revised(self, call_id: str, amounts: dict[str, int], lease_end_ms: int) -> None:
        call = self.calls[call_id]
        call.lease_end_ms = lease_end_ms
        for charge in call.charges:
            charge.held = amounts.get(charge.rule.unit, charge.held)
            charge.lease_ms = lease_end_ms
        self._charged(call.charges)

    def ended(self, call_id: str, kind: str) -> None:
        """The first end of an open call."""
        self.calls[call_id].status = kind
        self.terminal.setdefault(call_id, []).append(kind)
        self.entries.append((kind, call_id))

    def settled(self, call_id: str, amounts: dict[str, int]) -> None:
        for charge in self.calls[call_id].charges:
            amount = amounts.get(charge.rule.unit, charge.held)
            charge.settled, charge.held = (0 if charge.rule.span == "open" else amount), 0
        self._charged(self.calls[call_id].charges)
        self.ended(call_id, "settled")

    def cancelled(self, call_id: str) -> None:
        for charge in self.calls[call_id].charges:
            charge.settled = charge.held = 0
        self.ended(call_id, "cancelled")

    def late(self, call_id: str, amounts: dict[str, int]) -> None:
        """Usage of a call that had ended already, and had left something behind."""
        for charge in self.calls[call_id].charges:
            if charge.rule.span != "open":
                charge.settled = amounts.get(charge.rule.unit, charge.settled)
        self._charged(self.calls[call_id].charges)
        self.calls[call_id].status = "late"
        self.entries.append(("late", call_id))

    def charged(self, call_id: str, kind: str, wanted: list[tuple[Rule, int]], now_ms: int) -> None:
        """Usage that nobody reserved."""
        call = Call(kind, now_ms)
        for rule, amount in wanted:
            if rule.span != "open":
                call.charges.append(Charge(rule, now_ms, settled=amount))
        self.calls[call_id] = call
        self.charges += call.charges
        self._charged(call.charges)
        self.entries.append((kind, call_id))
