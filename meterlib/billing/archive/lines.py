"""Lines of entries as they come from the store, and whether this version understands all that is in them."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Annotated, Any, TypeAlias, get_args

import msgspec

from meterlib.billing.archive.rows import CALL, OUTCOME, SEPARATOR, STORED
from meterlib.core.ledger import EntryKind, Quality, entry_of
from meterlib.core.policy import Funding
from meterlib.store.commands import StoredPage

Fields: TypeAlias = Mapping[bytes, bytes]
Page: TypeAlias = Sequence[tuple[int, Fields]]


class OddEntryError(Exception):
    """An entry that this version cannot tell in columns."""

    def __init__(self, n: int, reason: str) -> None:
        super().__init__(reason)
        self.n = n
        self.reason = reason


class Lines:
    """Makes lines of entries, and takes note of names in them that no column is made of.

    Every entry is parsed, strictly: a number in quotes or one that no column can hold must not become null unnoticed.
    msgspec does that in a microsecond, where DuckDB takes four to say what types there are.
    """

    def __init__(self) -> None:
        self.unknown: set[str] = set()

    def plain(self, page: StoredPage, first: int, epoch: str) -> list[bytes] | None:
        """The lines of a page in which nothing is unusual; None if anything is.

        That is nearly always so, so it is what an export's speed depends on: a page is looked at by columns, and no
        entry by itself.

        Args:
            page: as the server sent it.
            first: the number of its first entry, behind which there is no gap.
            epoch: of all its entries.
        """
        ids, entries = zip(*page, strict=True)
        count, numbers = len(ids), [b"%d" % n for n in range(first, first + len(ids))]
        if b",".join(ids) != b"-0,".join(numbers) + b"-0" or {*map(len, entries)} != {2 * len(STORED)}:
            return None
        columns = list(zip(*entries, strict=True))
        names, values = columns[::2], columns[1::2]
        if list(zip(*names, strict=True)).count(STORED) != count:
            return None
        if values[-1].count(epoch.encode()) != count or not _usual(values):
            return None
        return list(map(SEPARATOR.join, zip(numbers, *values, repeat(b""))))

    def of(self, page: Page) -> list[bytes]:
        """The line of each entry of a page; without the line's end.

        Raises:
            OddEntryError: an entry lacks a field, or holds what it should not.
        """
        lines = []
        for n, fields in page:
            if tuple(fields) == STORED and _usual([(value,) for value in fields.values()]):
                lines.append(SEPARATOR.join((b"%d" % n, *fields.values(), b"")))
            else:
                lines.append(_unusual_line(n, fields))
                self._look_closer(n, fields)
        return lines

    def _look_closer(self, n: int, fields: Fields) -> None:
        """Names that nobody knows are noted; whatever else is odd is refused."""
        try:
            entry = entry_of(0, n, fields)
            call, outcome = (json.loads(fields[name] or b"{}") for name in (b"call", b"outcome"))
        except (ValueError, KeyError, TypeError, msgspec.MsgspecError) as error:
            raise OddEntryError(n, f"it cannot be read: {error}") from None
        for word, known in _WORDS.items():
            if getattr(entry, word) not in known:
                raise OddEntryError(n, f"its {word} {getattr(entry, word)!r:.40} is none that this version knows")
        if misfit := _misfit(call, CALL, "call") or _misfit(outcome, OUTCOME, "outcome"):
            raise OddEntryError(n, misfit)
        for name in (b"reserved_at", b"booked_at"):
            if fields[name] != b"%d" % int(fields[name]):
                raise OddEntryError(n, f"its {name.decode()} is {fields[name].decode()!r:.40}")
        self.unknown.update(name.decode() for name in fields if name not in STORED)
        self.unknown.update(_unknown(call, CALL, "call."), _unknown(outcome, OUTCOME, "outcome."))


def entries_of(page: StoredPage) -> list[tuple[int, Fields]]:
    """Number and fields of each entry of a page."""
    return [(int(i.partition(b"-")[0]), dict(zip(told[::2], told[1::2], strict=True))) for i, told in page]


def _usual(values: Sequence[Sequence[bytes]]) -> bool:
    """Whether the values of entries, by column, are all as this version writes them."""
    kinds, _, _, reserved_at, booked_at, calls, estimates, outcomes, _, _ = values
    if not (_KINDS.issuperset(kinds) and _MOMENTS(b",".join((*reserved_at, *booked_at)))):
        return False
    try:
        deque(map(_call.decode, calls), 0)
        deque(map(_json.decode, filter(None, estimates)), 0)
        deque(map(_outcome.decode, filter(None, outcomes)), 0)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False
    return True


def _unusual_line(n: int, fields: Fields) -> bytes:
    """The line of an entry whose fields are in another order, or more than this version knows."""
    missing = [name.decode() for name in STORED if name not in fields]
    if missing:
        raise OddEntryError(n, f"it has no field {missing[0]!r}")
    try:
        more = {name.decode(): value.decode() for name, value in fields.items() if name not in STORED}
    except UnicodeDecodeError:
        raise OddEntryError(n, "it has a field that this version does not know, and that is no text") from None
    text = json.dumps(more, sort_keys=True, separators=(",", ":")) if more else ""
    return SEPARATOR.join((b"%d" % n, *(fields[name] for name in STORED), text.encode()))


def _strict(name: str, shape: Mapping[str, Any]) -> Any:
    """A record of this shape, each field of which may be missing, that refuses anything else."""
    fields: list[Any] = []
    for field, kind in shape.items():
        if kind == "JSON":
            fields.append((field, msgspec.Raw, msgspec.Raw()))
        else:
            inner: Any = _strict(field, kind) if isinstance(kind, Mapping) else _KINDS_OF[kind]
            fields.append((field, inner | None, None))
    return msgspec.defstruct(name, fields, kw_only=True, forbid_unknown_fields=True, gc=False)


_KINDS_OF: Mapping[str, Any] = {
    "BIGINT": Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)],
    "VARCHAR": str,
    "QUALITY": Quality,
}
_MOMENTS = re.compile(rb"(?:(?:0|[1-9][0-9]{0,15})(?:,(?!$)|$))+").fullmatch
_KINDS = frozenset(kind.encode() for kind in get_args(EntryKind))
_WORDS: Mapping[str, Any] = {"kind": get_args(EntryKind), "quality": get_args(Quality), "funding": get_args(Funding)}
_call = msgspec.json.Decoder(
    msgspec.defstruct(
        "Call",
        [("tenant", str), ("funding", Funding, "hosted"), ("attributes", dict[str, str], {})],
        forbid_unknown_fields=True,
        gc=False,
    )
)
_outcome = msgspec.json.Decoder(_strict("Outcome", OUTCOME | {"quality": "QUALITY"}))
_json = msgspec.json.Decoder(msgspec.Raw)


def _misfit(value: Any, wanted: Any, path: str) -> str:
    if value is None or wanted == "JSON":
        return ""
    fits = dict if isinstance(wanted, Mapping) else {"BIGINT": int, "VARCHAR": str}[wanted]
    if type(value) is not fits or (type(value) is int and not -(2**63) <= value < 2**63):
        return f"{path} is {value!r:.40}"
    if not isinstance(value, dict):
        return ""
    return next(filter(None, (_misfit(value.get(name), kind, f"{path}.{name}") for name, kind in wanted.items())), "")


def _unknown(value: Any, known: Any, path: str) -> list[str]:
    """Names that no column is made of; those of attributes are the caller's own."""
    if not isinstance(value, dict) or not isinstance(known, Mapping) or path == "call.attributes.":
        return []
    found = [f"{path}{name}" for name in value if name not in known]
    for name, inner in value.items():
        found += _unknown(inner, known.get(name), f"{path}{name}.")
    return found
