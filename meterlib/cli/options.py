"""The options that commands have in common, and how what they say is read."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime, timedelta
from pathlib import Path

from meterlib.config import Config
from meterlib.core.periods import zone
from meterlib.errors import InvalidInput

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FAR_AWAY = datetime(9999, 1, 1, tzinfo=UTC) - _EPOCH


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add `--config FILE`."""
    parser.add_argument(
        "--config", metavar="FILE", help="the settings; by default meterlib.toml in this folder, if there is one"
    )


def add_archive(parser: argparse.ArgumentParser) -> None:
    """Add `--archive DIR`."""
    parser.add_argument("--archive", metavar="DIR", help="another archive than that of the settings")


def archive_folder(arguments: argparse.Namespace, config: Config) -> Path:
    """The folder of the archive that is asked for. One that was just made, and holds nothing yet, will do.

    Raises:
        InvalidInput: it is none; the message says which option or setting leads there.
    """
    named, folder = "--archive", arguments.archive
    if folder is None:
        named, folder = "[billing] archive", config.billing.archive
    path = Path(folder)
    if not path.is_dir():
        problem = f"there is no archive {path}: `meterlib export run` makes it, `meterlib report` asks the store"
        raise InvalidInput(named, problem)
    if folder == "" or (not any(path.glob("shard-*")) and any(path.iterdir())):
        raise InvalidInput(named, f"{str(folder)!r} is no archive: it has no shard-0000 or the like")
    return path


def add_json(parser: argparse.ArgumentParser, meaning: str = "print JSON for programs") -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help=meaning)


def whole_number(text: str) -> int:
    """The value of an option that counts something, 0 or more."""
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no whole number of 0 or more")
    return int(text)


def pair(text: str) -> tuple[str, str]:
    """The value of an option that reads `name=value`."""
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise argparse.ArgumentTypeError(f"{text!r:.80} does not read name=value")
    return name, value


def moment_ms(text: str, tz: str, option: str) -> int:
    """A moment in ISO 8601, as ms since 1970 UTC; without an offset of its own it is meant in the zone.

    Raises:
        InvalidInput: it is none, or the clocks of the zone skip it.
    """
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        example = "such as 2026-03-01, 2026-03-01T12:00 or 2026-03-01T12:00Z"
        raise InvalidInput(option, f"{text!r:.80} is no date or time in ISO 8601, {example}") from None
    try:
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=zone(tz))
            if moment.astimezone(UTC).astimezone(zone(tz)).replace(tzinfo=None) != moment.replace(tzinfo=None):
                raise InvalidInput(option, f"{text!r:.80} does not exist in {tz}: the clocks are put forward then")
        since_1970 = moment.astimezone(UTC) - _EPOCH
    except OverflowError:
        raise InvalidInput(option, f"{text!r:.80} is too far away") from None
    if not timedelta() <= since_1970 < _FAR_AWAY:
        raise InvalidInput(option, f"{text!r:.80} is too far away")
    return -(-since_1970 // timedelta(milliseconds=1))
