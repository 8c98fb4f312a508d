"""`meterlib token`: a new token for a tenant's callers, and the hash of it that settings hold."""

from __future__ import annotations

import argparse
import json
import sys

from meterlib.cli.exits import OK
from meterlib.cli.options import add_json
from meterlib.errors import InvalidInput

HELP = """\
Make a token for the callers of a tenant. It is shown once and kept nowhere: give
it to whoever calls, and put its hash into meterlib.toml.
---
examples:
  meterlib token new                       a token, and the line for [[tenant]]
  meterlib token hash < token.txt          the hash of a token that there is already

A caller shows it as x-api-key, or as Authorization: Bearer or Token:

  export ANTHROPIC_BASE_URL=http://127.0.0.1:8787 ANTHROPIC_API_KEY=ml_…

exit codes: 0 ok; 1 standard output failed; 2 wrong usage
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("action", choices=("new", "hash"), help="make one, or hash the one on standard input")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the token and its hash; returns the exit code."""
    from meterlib.gateway.tokens import hash_of, new_token

    token = new_token() if arguments.action == "new" else sys.stdin.readline().strip()
    if not token or not token.isascii() or not token.isprintable():
        raise InvalidInput("token", "one line of printable ASCII is needed on standard input")
    told = {"token": token, "hash": hash_of(token)} if arguments.action == "new" else {"hash": hash_of(token)}
    if arguments.json:
        print(json.dumps(told))
    elif arguments.action == "new":
        print(f"token  {token}\n\nIts callers show it; it is not shown again. In meterlib.toml:\n")
        print(f'[[tenant]]\nname = "…"\ntokens = ["{told["hash"]}"]')
    else:
        print(told["hash"])
    return OK
