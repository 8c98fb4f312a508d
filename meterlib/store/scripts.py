"""The scripts of `lua/`: read once, their includes resolved, their headers checked against what Python sends."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from hashlib import sha1
from pathlib import Path
from typing import NamedTuple

from meterlib.core import operations
from meterlib.core.operations import LimitArguments, PeekLimit

CALL_ARGUMENTS = ("layout", "test_now_ms", "sweep_max", "retention_ms")
KEYS = ("state_key", "leases_key", "ended_key", "ledger_key")

_INCLUDE = re.compile(r"^[ ]*-- @include (\w+)\n", re.MULTILINE)
_FLAGS = re.compile(r"^-- flags: ([a-z, -]+)$", re.MULTILINE)
_BINDING = re.compile(
    r"^[ ]*local (?P<name>\w+) *= (?:tonumber\()?(?P<list>KEYS|ARGV)\[(?:(?P<base>\w+) \+ )?(?P<index>\d+)\]\)?"
    r" +-- (?P<kind>\w+) +(?P<meaning>\S.*)$",
    re.MULTILINE,
)
_COUNTS = {"limits": "limit_count", "used": "unit_count", "amounts": "unit_count"}


class ContractError(Exception):
    """A script's header and the record that Python sends do not agree: a mistake in meterlib itself."""


class Script(NamedTuple):
    """A script ready to be sent: with the flags line that real servers read, and without."""

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
    plain = expand(name)
    check_contract(name, plain)
    flags = _FLAGS.search(plain)
    text = f"#!lua flags={flags[1]}\n{plain}" if flags else f"#!lua\n{plain}"
    return Script(name, text, plain, sha1(text.encode()).hexdigest(), sha1(plain.encode()).hexdigest())


def expand(name: str) -> str:
    """A script's text with its includes in place; an include may not include."""
    folder = lua_folder()

    def included(found: re.Match[str]) -> str:
        text = (folder / "include" / f"{found[1]}.lua").read_text()
        if _INCLUDE.search(text):
            raise ContractError(f"include/{found[1]}.lua has an include of its own")
        return text

    return _INCLUDE.sub(included, (folder / f"{name}.lua").read_text())


def check_contract(name: str, text: str) -> None:
    """Hold the binding lines of a script against the names that Python sends, position by position."""
    record = getattr(operations, name.capitalize())
    expected = {
        "KEYS": KEYS,
        "ARGV": CALL_ARGUMENTS,
        "operation": tuple(_COUNTS.get(field, field) for field in record._fields),
        "limit": PeekLimit._fields if name == "peek" else LimitArguments._fields,
    }
    seen: dict[str, set[int]] = {group: set() for group in expected}
    for group, index, found in bindings(text):
        if group not in expected:
            raise ContractError(f"{name}.lua binds {found!r} from an unknown place, {group}")
        names = expected[group]
        if index > len(names) or names[index - 1] != found:
            sent = names[index - 1] if index <= len(names) else "nothing"
            raise ContractError(f"{name}.lua takes {found!r} as {group} {index}, where {sent!r} is sent")
        seen[group].add(index)
    for group in ("KEYS", "ARGV", "operation"):
        missing = set(range(1, len(expected[group]) + 1)) - seen[group]
        if missing:
            raise ContractError(f"{name}.lua does not bind {group} {sorted(missing)}: {expected[group]}")


def bindings(text: str) -> Iterator[tuple[str, int, str]]:
    """(group, position, name) of each binding line of a script."""
    for found in _BINDING.finditer(text):
        base = found["base"] or found["list"]
        group = {"at": "operation", "OPERATIONS": "operation"}.get(base, base)
        yield group, int(found["index"]), found["name"]
