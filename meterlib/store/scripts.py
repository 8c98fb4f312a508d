"""The scripts of `lua/`: read once, their includes resolved, their headers checked against what Python sends."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from hashlib import sha1
from pathlib import Path
from typing import NamedTuple

from meterlib.core import operations
from meterlib.core.operations import LimitArguments, PeekLimit, Renumbered, Reserve

CALL_ARGUMENTS = ("layout", "test_now_ms", "sweep_max", "retention_ms")
KEYS = ("state_key", "leases_key", "ended_key", "ledger_key", "windows_key")

_INCLUDE = re.compile(r"^[ ]*-- @include (\w+)\n", re.MULTILINE)
_FLAGS = re.compile(r"^-- flags: ([a-z, -]+)$", re.MULTILINE)
_KEY = re.compile(r"^local (?P<name>\w+) *= KEYS\[(?P<index>\d+)\] +-- (?P<kind>\w+) +(?P<meaning>\S.*)$", re.MULTILINE)
_RECORD = re.compile(
    r"^ *local (?P<record>CALL|OPERATION|LIMIT|PAYLOAD|UNIT|RENUMBERED)(?:, \w+)? = '>(?P<format>[sd]+)'.*\n"
    r"(?P<values>(?: *--   \w+ +\w+ +\S.*\n)+)",
    re.MULTILINE,
)
_VALUE = re.compile(r"^ *--   (?P<name>\w+) +(?P<kind>\w+) +(?P<meaning>\S.*)$", re.MULTILINE)
_UNPACKING = re.compile(r"local ([\w,\s]+?)\s*=\s+from_bytes\((CALL|OPERATION|LIMIT|PAYLOAD|UNIT|RENUMBERED),")
_FORMATS = {"str": "s", "hex": "s", "json": "s", "int": "d", "ms": "d"}
_REPEATED = {
    "limits": ("LIMIT", "limit_count"),
    "used": ("UNIT", "unit_count"),
    "amounts": ("UNIT", "unit_count"),
    "renumbered": ("RENUMBERED", "run_count"),
}
_FIELDS = {"UNIT": ("unit", "amount"), "RENUMBERED": Renumbered._fields}
_KEPT = {"LIMIT": ("limit_size", *LimitArguments._fields), "PAYLOAD": Reserve._fields[3:]}
"""What records of reservations have, whatever the operation at hand names."""


class ContractError(Exception):
    """A script's header and the record that Python sends do not agree: a mistake in meterlib itself."""


class Script(NamedTuple):
    """A script ready to be sent: with the flags line that real servers read; plain: with what fakeredis lacks."""

    name: str
    text: str
    plain_text: str
    sha: str
    plain_sha: str


def lua_folder() -> Path:
    """Where the scripts are: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "lua"
    return inside if inside.is_dir() else package.parent / "lua"


@cache
def script(name: str) -> Script:
    """The script of a verb.

    Raises:
        ContractError: its header names other arguments than Python sends.
    """
    body = expand(name)
    check_contract(name, body)
    flags = _FLAGS.search(body)
    text = f"#!lua flags={flags[1]}\n{body}" if flags else f"#!lua\n{body}"
    plain = included("struct") + body
    return Script(name, text, plain, sha1(text.encode()).hexdigest(), sha1(plain.encode()).hexdigest())


def expand(name: str) -> str:
    """A script's text with its includes in place."""
    return _INCLUDE.sub(lambda found: included(found[1]), (lua_folder() / f"{name}.lua").read_text())


def included(name: str) -> str:
    """The text of an include, with its own includes in place."""
    text = (lua_folder() / "include" / f"{name}.lua").read_text()
    return _INCLUDE.sub(lambda found: included(found[1]), text)


def check_contract(name: str, text: str) -> None:
    """Hold the header of a script against the names that Python sends, position by position."""
    fields = getattr(operations, name.capitalize())._fields
    named = tuple(_REPEATED[field][1] if field in _REPEATED else field for field in fields)
    expected = {"KEYS": KEYS, "CALL": CALL_ARGUMENTS, "OPERATION": named}
    if name == "reserve":  # what its record keeps comes last
        expected |= {"OPERATION": named[:3], "PAYLOAD": named[3:]}
    for repeated in {_REPEATED[field][0] for field in fields if field in _REPEATED}:
        expected[repeated] = _FIELDS.get(repeated) or _limit_fields(name)
    documented: dict[str, list[str]] = {group: [] for group in expected}
    for group, index, found in bindings(text):
        names = expected.get(group) or _KEPT[group]
        if index > len(names) or names[index - 1] != found:
            sent = names[index - 1] if index <= len(names) else "nothing"
            raise ContractError(f"{name}.lua takes {found!r} as {group} {index}, where {sent!r} is sent")
        documented.setdefault(group, []).append(found)
    for group, names in expected.items():
        if documented[group] != list(names):
            raise ContractError(f"{name}.lua documents {group} as {documented[group]}, where {names} are sent")
    for group, taken in unpackings(text):
        for index, found in enumerate(taken[: len(documented[group])]):
            if found not in ("_", documented[group][index]):
                raise ContractError(f"{name}.lua takes {documented[group][index]!r} of {group} for {found!r}")


def _limit_fields(name: str) -> tuple[str, ...]:
    return PeekLimit._fields if name == "peek" else _KEPT["LIMIT"]


def bindings(text: str) -> Iterator[tuple[str, int, str]]:
    """(group, position, name) of each key and each value that a script's header names."""
    for key in _KEY.finditer(text):
        yield "KEYS", int(key["index"]), key["name"]
    for record in _RECORD.finditer(text):
        values = list(_VALUE.finditer(record["values"]))
        if record["format"] != "".join(_FORMATS[value["kind"]] for value in values):
            raise ContractError(f"{record['record']} is not packed as its values are: {record['format']}")
        for index, value in enumerate(values, 1):
            yield record["record"], index, value["name"]


def unpackings(text: str) -> Iterator[tuple[str, list[str]]]:
    """(group, names) wherever a script takes a record of its arguments apart; a name behind the record's is a place."""
    for found in _UNPACKING.finditer(text):
        yield found[2], [name.strip() for name in found[1].split(",")]
