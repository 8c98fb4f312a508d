"""What names, ids and amounts may look like; each check raises InvalidInput before anything is sent anywhere."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from meterlib.errors import InvalidInput

AMOUNT_MAX = 2**53 - 1
"""Lua's numbers are doubles: integers are exact up to here."""

NAME_BYTES_MAX = 128
ATTRIBUTES_MAX = 20
ATTRIBUTE_BYTES_MAX = 256
LEASE_MS_MAX = 24 * 3_600_000

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ATTRIBUTE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_SECRETS = ("sk-", "Bearer ", "Token ", "ghp_", "github_pat_", "xoxa-", "xoxb-", "xoxp-", "-----BEGIN ")


def shown(value: object) -> str:
    """A value for a message: short, and never an error of its own (integers may have too many digits to print)."""
    try:
        return f"{value!r:.40}"
    except ValueError:
        return f"an {type(value).__name__} of thousands of digits"


def check_amount(value: object, field: str) -> int:
    """Return `value` if it is an integer from 0 to 2^53 - 1; booleans, floats and digits in strings are none."""
    if type(value) is not int:
        raise InvalidInput(field, f"an integer is needed, not {type(value).__name__}")
    if value < 0:
        raise InvalidInput(field, "must be 0 or more")
    if value > AMOUNT_MAX:
        raise InvalidInput(field, "too large: at most 2^53 - 1")
    return value


def check_text(value: object, field: str, bytes_max: int) -> str:
    """Return `value` if it is printable, normalised (NFC and NFKC agree) text without spaces at its ends."""
    if type(value) is not str:
        raise InvalidInput(field, f"text is needed, not {type(value).__name__}")
    if value.isascii() and value.isprintable() and 0 < len(value) <= bytes_max and value[0] != " " != value[-1]:
        return value
    if not value:
        raise InvalidInput(field, f"must have 1 to {bytes_max} bytes, and is empty")
    if not value.isprintable():
        raise InvalidInput(field, "has a character that cannot be printed (a control, a surrogate, an invisible one)")
    if len(value.encode()) > bytes_max:
        raise InvalidInput(field, f"must have 1 to {bytes_max} bytes in UTF-8, and has {len(value.encode())}")
    if value != value.strip():
        raise InvalidInput(field, "has a space at an end")
    if unicodedata.normalize("NFKC", value) != value:
        raise InvalidInput(field, "is not normalised (NFKC): another spelling looks the same")
    return value


def check_tenant(tenant: object) -> str:
    """Return `tenant` if it may name a customer: 1 to 128 bytes of printable, normalised text."""
    return check_text(tenant, "tenant", NAME_BYTES_MAX)


@lru_cache(maxsize=1024)
def _is_attribute_name(name: str) -> bool:
    return bool(_ATTRIBUTE_NAME.fullmatch(name))


def check_attributes(attributes: Mapping[str, str], field: str = "attributes") -> Mapping[str, str]:
    """Return `attributes` if they are at most 20 short, printable facts and none looks like a secret."""
    if type(attributes) is not dict and not isinstance(attributes, Mapping):
        raise InvalidInput(field, f"a mapping of text to text is needed, not {type(attributes).__name__}")
    if len(attributes) > ATTRIBUTES_MAX:
        raise InvalidInput(field, f"at most {ATTRIBUTES_MAX}, not {len(attributes)}")
    for name, value in attributes.items():
        if type(name) is not str or not _is_attribute_name(name):
            raise InvalidInput(field, f"{shown(name)} is no name: a letter, then up to 63 of A-Z a-z 0-9 _ . -")
        check_text(value, f"{field}.{name}", ATTRIBUTE_BYTES_MAX)
        if value.startswith(_SECRETS):
            raise InvalidInput(f"{field}.{name}", "looks like a credential; those must never reach the store")
    return attributes


def check_id(value: object, field: str = "reservation_id") -> str:
    """Return `value` if it is 1 to 64 characters of A-Z a-z 0-9 _ -."""
    if type(value) is not str or not _ID.fullmatch(value):
        raise InvalidInput(field, "1 to 64 characters of A-Z a-z 0-9 _ - are needed")
    return value


def check_lease_ms(lease_ms: object) -> int:
    """Return `lease_ms` if it is an integer from 1 ms to 24 hours."""
    if type(lease_ms) is not int or not 1 <= lease_ms <= LEASE_MS_MAX:
        raise InvalidInput("lease_ms", f"an integer from 1 to {LEASE_MS_MAX} (24 h) is needed, not {shown(lease_ms)}")
    return lease_ms


def check_choice(value: Any, field: str, choices: tuple[str, ...]) -> None:
    """Pass if `value` is one of the words."""
    if not isinstance(value, str) or value not in choices:
        raise InvalidInput(field, f"{shown(value)} is not one of {', '.join(choices)}")


def check_count(value: Any, field: str, largest: int, least: int = 1) -> int:
    """Return `value` if it is an integer from `least` to `largest`."""
    if type(value) is not int or not least <= value <= largest:
        raise InvalidInput(field, f"an integer from {least} to {largest} is needed, not {shown(value)}")
    return value
