"""What the doctor finds: each finding is ok, a warning or a failure, and says what to do about it."""

from __future__ import annotations

from typing import Literal

import msgspec


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at.

    Attributes:
        check: what was looked at, such as `eviction` or `limit requests`.
        status: `ok`; `warning`: works, but something can be lost or is not as it should be; `failure`: does not work.
        found: what was found.
        advice: what to do about it; empty if nothing.
    """

    check: str
    status: Literal["ok", "warning", "failure"]
    found: str
    advice: str = ""


def ok(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(check=check, status="ok", found=found)


def warning(check: str, found: str, advice: str) -> Finding:
    """It works, but not as well as it should."""
    return Finding(check=check, status="warning", found=found, advice=advice)


def failure(check: str, found: str, advice: str = "") -> Finding:
    """It does not work, or will lose what it promised to keep."""
    return Finding(check=check, status="failure", found=found, advice=advice)
