"""Moments and waits as people read them."""

from __future__ import annotations

import shutil
import sys
from datetime import datetime

from meterlib.core.periods import zone


def at_text(ms: int, tz: str) -> str:
    """A moment in a zone, with its offset: `2026-03-29T03:00+02:00`."""
    moment = datetime.fromtimestamp(ms / 1000, zone(tz))
    fine = "milliseconds" if ms % 1000 else "seconds" if ms % 60_000 else "minutes"
    return moment.isoformat(timespec=fine)


def in_text(wait_ms: int) -> str:
    """When that is: `in 12 s`, `in 2 h 5 min`, `now`."""
    return f"in {span_text(wait_ms)}" if wait_ms > 0 else "now"


def span_text(span_ms: int) -> str:
    """How long that is, in one or two units, rounded up: `12 s`, `2 h 5 min`."""
    if span_ms < 1000:
        return f"{span_ms} ms"
    seconds = -(-span_ms // 1000)
    if seconds < 120:
        return f"{seconds} s"
    minutes = -(-seconds // 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours + (minutes > 0), 24)
    return f"{days} d {hours} h" if hours and days < 7 else f"{days + (hours > 0)} d"


def local_text(ms: int, now_ms: int) -> str:
    """A moment on this machine's clock: `14:03:59` if it is today, `Mon 23:00` if it is this week, else the date."""
    moment, now = (datetime.fromtimestamp(at / 1000).astimezone() for at in (ms, now_ms))
    if moment.date() == now.date():
        return f"{moment:%H:%M:%S}"
    return f"{moment:%a %H:%M}" if ms - now_ms < 6 * 86_400_000 else f"{moment:%Y-%m-%d}"


def terminal_width() -> int:
    """Where lines are broken: at the terminal's edge, and nowhere where no terminal is."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 1_000_000
