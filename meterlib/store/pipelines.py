"""Several script calls in one round trip: what to send, and what became of each. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from redis.exceptions import NoScriptError

from meterlib.core.operations import Reply, Value
from meterlib.errors import MeterError, StoreUnavailable
from meterlib.store.commands import Batch
from meterlib.store.faults import FAILURES, Attempts, in_short, told_for, verdict


class Wording(Protocol):
    """Puts script calls into words, and reads their answers."""

    def words(self, batch: Batch, *, by_text: bool) -> list[Value]: ...

    def replies(self, name: str, count: int, answer: Any) -> list[Reply]: ...


class Pipeline:
    """Script calls that leave together, each of which succeeds or fails for itself.

    Attributes:
        outcomes: by call, once nothing is left to be sent: the replies to its operations, or the error.
        attempts: the tries, within one deadline.
    """

    def __init__(self, wording: Wording, batches: Sequence[Batch], deadline_s: float) -> None:
        self._wording = wording
        self._batches = batches
        self._left = dict.fromkeys(range(len(batches)), False)
        self._made: dict[int, list[Reply] | MeterError] = {}
        self.attempts = Attempts(batches[0].script, deadline_s * 1000)

    @property
    def outcomes(self) -> list[list[Reply] | MeterError]:
        return [self._made[at] for at in range(len(self._batches))]

    def words(self) -> list[list[Value]]:
        """What is to be sent now; nothing once all is done."""
        return [self._wording.words(self._batches[at], by_text=by_text) for at, by_text in self._left.items()]

    def take(self, answers: Sequence[Any]) -> float:
        """The answers to these words, errors among them; returns how long to wait before the next ones, in seconds."""
        passing: dict[int, Exception] = {}
        for at, answer in zip(list(self._left), answers, strict=True):
            if isinstance(answer, NoScriptError) and not self._left[at]:
                self._left[at] = True
            elif isinstance(answer, FAILURES):
                final = verdict(self._batches[at].script, answer)
                if final is None:
                    passing[at] = answer
                else:
                    self._end(at, final)
            else:
                self._end(at, self._replies(at, answer))
        return self._pause_s(passing) if passing else 0.0

    def give_up(self, error: MeterError) -> None:
        """What is left cannot be sent again; what has its answer keeps it."""
        for at in list(self._left):
            self._end(at, told_for(self._batches[at].script, error))

    def _replies(self, at: int, answer: Any) -> list[Reply] | MeterError:
        batch = self._batches[at]
        try:
            return self._wording.replies(batch.script, len(batch.operations), answer)
        except StoreUnavailable as error:
            return error

    def _pause_s(self, passing: dict[int, Exception]) -> float:
        try:
            return self.attempts.pause_s(next(iter(passing.values())))
        except StoreUnavailable:
            for at, error in passing.items():
                self._end(at, StoreUnavailable(self._batches[at].script, in_short(error)))
            return 0.0

    def _end(self, at: int, outcome: list[Reply] | MeterError) -> None:
        self._made[at] = outcome
        del self._left[at]
