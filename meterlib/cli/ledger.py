"""`meterlib ledger show`: the raw entries."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from datetime import UTC, datetime

from meterlib.billing.report import Report
from meterlib.cli.exits import OK
from meterlib.cli.options import add_config, add_json, whole_number
from meterlib.cli.store import Store, opened
from meterlib.config import Config
from meterlib.core.checks import check_tenant
from meterlib.core.ledger import LedgerEntry, encode
from meterlib.errors import InvalidInput

HELP = """\
The raw ledger entries. `meterlib ledger show` prints them, shard by shard and in
the order in which they were booked; they are never edited.
---
examples:
  meterlib ledger show --tenant acme --limit 20
  meterlib ledger show --json | jq -r 'select(.kind == "late").reservation_id'
  meterlib ledger show --json --shard 3 --after 1200      what came since then

exit codes: 0 ok; 1 the store failed; 2 wrong usage or configuration
"""
SHOW_HELP = """\
Print ledger entries: shard:number, when it was booked (UTC), kind, tenant, model,
tokens, and the reservation's id. With --json each is one JSON object a line:
shard, n, kind, reservation_id, tenant, attributes, funding, usage (in the Claude
API's own names), quality, reserved_at and booked_at (ms since 1970), …
"""

_TOKENS = {
    "input_tokens": "in",
    "cache_creation_input_tokens": "cache-write",
    "cache_read_input_tokens": "cache-read",
    "output_tokens": "out",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `meterlib ledger`."""
    actions = parser.add_subparsers(dest="action", metavar="show", required=True)
    show = actions.add_parser(
        "show",
        help="print the entries",
        description=SHOW_HELP,
        epilog=HELP.partition("\n---\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    show.add_argument("--shard", type=whole_number, metavar="N", help="only this shard")
    show.add_argument("--after", type=whole_number, metavar="N", help="only entries behind number N of the shard")
    show.add_argument("--tenant", metavar="T", help="only this tenant")
    show.add_argument("--limit", type=whole_number, metavar="N", help="at most N entries")
    add_json(show, "print one JSON object a line")
    add_config(show)


def run(arguments: argparse.Namespace) -> int:
    """Print entries; returns the exit code."""
    config = Config.find(arguments.config)
    if arguments.tenant is not None:
        check_tenant(arguments.tenant)
    with opened(config, arguments.config) as store:
        shards = _shards(store, arguments)
        entries = _wanted(store, shards, arguments)
        for position, entry in enumerate(entries):
            if arguments.limit is not None and position >= arguments.limit:
                break
            print(encode(entry).decode() if arguments.json else line_of(entry))
    return OK


def _shards(store: Store, arguments: argparse.Namespace) -> list[int]:
    shards = list(range(store.shards))
    if arguments.shard is not None and arguments.shard not in shards:
        raise InvalidInput("--shard", f"the store has shards 0 to {store.shards - 1}, and no {arguments.shard}")
    if arguments.tenant is not None:
        only = store.shard_of(arguments.tenant)
        if arguments.shard not in (None, only):
            raise InvalidInput("--shard", f"the entries of {arguments.tenant!r} are in shard {only}")
        shards = [only]
    elif arguments.shard is not None:
        shards = [arguments.shard]
    if arguments.after is not None and len(shards) > 1:
        raise InvalidInput("--after", "each shard has numbers of its own; say which with --shard or --tenant")
    return shards


def _wanted(store: Store, shards: list[int], arguments: argparse.Namespace) -> Iterator[LedgerEntry]:
    if arguments.limit == 0:
        return
    for shard in shards:
        for entry in store.ledger(shard, arguments.after or 0):
            if arguments.tenant is None or entry.tenant == arguments.tenant:
                yield entry


def line_of(entry: LedgerEntry) -> str:
    """An entry for people, on one line."""
    booked = datetime.fromtimestamp(entry.booked_at / 1000, UTC)
    counted = Report()
    counted.add(entry)
    sums = counted.total()
    tokens = " ".join(f"{short}={sums[name]}" for name, short in _TOKENS.items() if sums[name])
    words = [
        f"{entry.shard}:{entry.n}",
        f"{booked:%Y-%m-%d %H:%M:%S}.{entry.booked_at % 1000:03}",
        entry.kind + (f" after {entry.after}" if entry.after else ""),
        entry.tenant,
        entry.attributes.get("model", "-"),
        tokens or "-",
        "" if entry.quality == "final" else entry.quality,
        f"of {entry.adjusts}: {entry.reason}" if entry.adjusts else "",
        entry.reservation_id,
    ]
    return "  ".join(word for word in words if word)
