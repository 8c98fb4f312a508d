"""`meterlib token`: a new token for a tenant's callers, and the hash of it that settings hold."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime

from meterlib.cli.exits import OK
from meterlib.cli.options import add_json, moment_ms
from meterlib.core.policy import duration_ms
from meterlib.errors import InvalidInput

HELP = """\
Make a token for the callers of a tenant. It is shown once and kept nowhere: give
it to whoever calls, and put its hash into meterlib.toml.
---
examples:
  meterlib token new                       a token, and the line for [[tenant]]
  meterlib token new --expires 90d         one that is refused from then on
  meterlib token hash < token.txt          the hash of a token that there is already

A caller shows it as x-api-key, or as Authorization: Bearer or Token:

  export ANTHROPIC_BASE_URL=http://127.0.0.1:8787 ANTHROPIC_API_KEY=ml_…

exit codes: 0 ok; 1 standard output failed; 2 wrong usage
"""

_MS_MAX = 253_402_300_799_000
"""The last second of the year 9999; settings can name none behind it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("action", choices=("new", "hash"), help="make one, or hash the one on standard input")
    parser.add_argument(
        "--expires", metavar="WHEN", help="from when on it is refused: 90d, or a date or time in ISO 8601 (UTC)"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the token and its hash; returns the exit code."""
    from meterlib.gateway.tokens import hash_of, new_token

    token = new_token() if arguments.action == "new" else sys.stdin.readline().strip()
    if not token or not token.isascii() or not token.isprintable():
        raise InvalidInput("token", "one line of printable ASCII is needed on standard input")
    told = {"token": token, "hash": hash_of(token)} if arguments.action == "new" else {"hash": hash_of(token)}
    if arguments.expires is not None:
        told["expires"] = _expiry(arguments.expires, time.time_ns() // 1_000_000)
    if arguments.json:
        print(json.dumps(told))
    elif arguments.action == "new":
        print(f"token  {token}\n\nIts callers show it; it is not shown again. In meterlib.toml:\n")
        print(f'[[tenant]]\nname = "…"\ntokens = [{_in_settings(told)}]')
    else:
        print(_in_settings(told) if "expires" in told else told["hash"])
    return OK


def _expiry(when: str, now_ms: int) -> str:
    """The moment that is meant, as settings have it; in whole seconds.

    Raises:
        InvalidInput: it is none, or over already.
    """
    try:
        ms = now_ms + duration_ms(when)
    except ValueError:
        ms = _moment_ms(when)
    if not now_ms < ms <= _MS_MAX:
        raise InvalidInput("--expires", f"{when!r:.40} is not ahead, or too far; a time from now such as 90d is needed")
    return datetime.fromtimestamp(-(-ms // 1000), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _moment_ms(when: str) -> int:
    try:
        return moment_ms(when, "UTC", "--expires")
    except InvalidInput as error:
        raise InvalidInput("--expires", f"{str(error).partition(': ')[2]}; or a time from now: 90d, 12h") from None


def _in_settings(told: Mapping[str, str]) -> str:
    """One of `tokens`, as TOML."""
    if "expires" not in told:
        return f'"{told["hash"]}"'
    return f'{{ hash = "{told["hash"]}", expires = {told["expires"]} }}'
