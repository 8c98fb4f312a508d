"""Every error meterlib raises, drawn as one tree.

    MeterError
    ├── QuotaExceeded          expected: a limit is used up; says when to come back
    ├── ReservationConflict    the caller's: the same id with another payload, or an id of another tenant
    ├── ReservationEnded       the caller's: the reservation was already settled, cancelled or has expired
    ├── ReservationNotFound    the caller's: no such reservation; never made, or forgotten
    ├── InvalidInput(field)    the caller's: a tenant, attribute, id or amount that is not valid; nothing was written
    ├── UsageError             the caller's: a meter used after its close, or by two event loops; a missing package
    ├── PolicyError(path)      the operator's: a setting that is not valid; found when loading, never while serving
    ├── IntegrityError         ledger and archive, or an archive and itself, do not agree: nobody should bill from it
    ├── SinkError              the world's: a database that entries are exported to failed; the next export goes on
    └── StoreError             the world's
        ├── StoreUnavailable   did not answer in time: the outcome is unknown, and every verb is safe to repeat
        │   ├── StoreOverloaded   too many operations wait for it already: nothing was sent
        │   └── EmbeddedError     the embedded server does not answer, or could not be started or joined
        ├── StoreRefused       said no, so nothing was written: out of memory, disk full, no permission
        └── StoreCorrupt       holds something that is not meterlib's, or of another layout; nothing was changed

Errors carry fields, so that nobody has to parse a message, and survive pickling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meterlib.core.decisions import Denial, LimitState


class MeterError(Exception):
    """The root of everything meterlib raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_revive, (type(self), self.args, self.__dict__))


def _revive(kind: type[MeterError], arguments: tuple[Any, ...], fields: dict[str, Any]) -> MeterError:
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    error.__dict__.update(fields)
    return error


class QuotaExceeded(MeterError):
    """The call may not be made now; no counter was changed.

    Attributes:
        tenant: whose call it was.
        denials: every limit that denied; the first one frees last.
        retry_after_ms: the earliest time, from now, at which this very call passes if nobody else runs; None when
            waiting cannot help.
        retryable: False when waiting cannot help: the call is larger than a quota, or the quota is zero.
        hint: True when `retry_after_ms` is a configured guess (nobody knows when an open reservation ends).
        limits: how every limit that the call touches stood, those that would have let it pass included.
    """

    def __init__(
        self,
        tenant: str,
        denials: tuple[Denial, ...],
        retry_after_ms: int | None,
        retryable: bool,
        hint: bool,
        limits: tuple[LimitState, ...] = (),
    ) -> None:
        first = denials[0]
        wait = f"retry after {retry_after_ms} ms" if retryable else "waiting does not help"
        super().__init__(
            f"limit {first.name!r} of tenant {tenant!r} denied {first.requested} {first.unit}:"
            f" {first.used} of {first.quota} used; {wait}"
        )
        self.tenant = tenant
        self.denials = denials
        self.retry_after_ms = retry_after_ms
        self.retryable = retryable
        self.hint = hint
        self.limits = limits


class ReservationConflict(MeterError):
    """The id is taken: by the same tenant with another payload, or by another tenant. Nothing was changed.

    Attributes:
        reservation_id: the id in question.
        existing: what the store holds under the id, where it is known.
        given: what this call wanted to write.
    """

    def __init__(
        self, message: str, reservation_id: str, existing: str | None = None, given: str | None = None
    ) -> None:
        both = "" if existing is None else f"; stored: {existing}; given: {given}"
        super().__init__(message + both)
        self.reservation_id = reservation_id
        self.existing = existing
        self.given = given


class ReservationEnded(MeterError):
    """The reservation is over, so it can be neither revised, renewed, cancelled nor reserved again.

    Attributes:
        reservation_id: the id in question.
        kind: how it ended: `settled`, `cancelled`, `expired` or `late`.
    """

    def __init__(self, reservation_id: str, kind: str) -> None:
        super().__init__(f"reservation {reservation_id!r} has ended already: {kind}")
        self.reservation_id = reservation_id
        self.kind = kind


class ReservationNotFound(MeterError):
    """The tenant has no reservation of this id: it was never made, or it ended so long ago that it is forgotten."""

    def __init__(self, reservation_id: str) -> None:
        super().__init__(f"no reservation {reservation_id!r}")
        self.reservation_id = reservation_id


class InvalidInput(MeterError, ValueError):
    """An argument is not acceptable; nothing was sent to the store.

    Attributes:
        field: the argument's name, such as `tenant` or `usage.input_tokens`.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class UsageError(MeterError, RuntimeError):
    """The meter was used after its `close()` or from another event loop, or a package is needed that is not there."""


class PolicyError(MeterError, ValueError):
    """A setting is not acceptable.

    Attributes:
        path: where the setting stands, such as `limit[0].window`.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}" if path else problem)
        self.path = path


class IntegrityError(MeterError):
    """What was written once and what is found now do not agree. Nothing was changed; somebody has to look.

    Attributes:
        problem: `gap` (numbers that no entry has), `conflict` (the same number, another entry), `regress` (the store's
            ledger ends before what was exported from it), `epoch` (the store's ledger was begun anew), `unreadable` (an
            entry that this version cannot tell in columns) or `damaged` (a file of an archive).
        entries: which entries it is about, as `shard:n` or `shard:first-last`.
    """

    def __init__(self, problem: str, message: str, entries: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problem = problem
        self.entries = entries


class SinkError(MeterError):
    """A database that entries are exported to is out of reach, or refuses; the next export goes on where it is."""


class StoreError(MeterError):
    """The store failed."""


class StoreUnavailable(StoreError):
    """The store did not answer in time; whether the call took effect is unknown, and repeating it is safe.

    Attributes:
        operation: what got no answer: the verb, or what it reads first.
        cause: what went wrong, in the client's words; empty where that is not known.
    """

    cause = ""

    def __init__(self, operation: str, cause: str) -> None:
        super().__init__(f"{operation}: the store did not answer ({cause}); the outcome is unknown, repeating is safe")
        self.operation = operation
        self.cause = cause


class StoreOverloaded(StoreUnavailable):
    """Too many operations wait already, of this tenant or of all: this one was not sent. Fewer at once help, or more
    processes.

    Attributes:
        waiting: how many do.
    """

    def __init__(self, operation: str, waiting: int) -> None:
        StoreError.__init__(self, f"{operation}: {waiting:,} operations wait for the store already; it was not sent")
        self.operation = operation
        self.waiting = waiting


class StoreRefused(StoreError):
    """The store said no: nothing was written, and repeating helps only once its trouble is mended.

    Attributes:
        operation: the verb that was refused.
    """

    def __init__(self, operation: str, cause: str) -> None:
        super().__init__(f"{operation}: the store refused: {cause}; nothing was written")
        self.operation = operation


class StoreCorrupt(StoreError):
    """The store holds something that is not meterlib's or is of another layout; nothing was changed."""


class EmbeddedError(StoreUnavailable):
    """The embedded server does not answer, or could not be found, started or joined; the message names its folder."""

    def __init__(self, message: str) -> None:
        StoreError.__init__(self, message)
        self.operation = "embedded"
