"""`meterlib ledger`: the raw entries, and another epoch for a ledger that lost some."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from meterlib.billing.export.fork import Loss, Side, fork, loss_of
from meterlib.billing.reports.report import Report
from meterlib.cli.exits import FAILURE, OK
from meterlib.cli.options import add_config, add_json, whole_number
from meterlib.cli.sinks import check_none_is_missing, opened_sinks
from meterlib.cli.store import Store, opened
from meterlib.config import Config
from meterlib.core.checks import check_tenant
from meterlib.core.ledger import LedgerEntry, encode
from meterlib.errors import InvalidInput
from meterlib.store.flows import NewEpoch

HELP = """\
The raw ledger entries. `meterlib ledger show` prints them, shard by shard and in
the order in which they were booked; they are never edited. `meterlib ledger fork`
lets the export go on after a server lost entries that were exported from it.
---
examples:
  meterlib ledger show --tenant acme --limit 20
  meterlib ledger show --json | jq -r 'select(.kind == "late").reservation_id'
  meterlib ledger show --json --shard 3 --after 1200      what came since then
  meterlib ledger fork --shard 3                          what is lost, and a question

exit codes: 0 ok; 1 the store or a sink failed; 2 wrong usage or configuration;
5 what was exported does not agree with itself
"""
SHOW_HELP = """\
Print ledger entries: shard:number, when it was booked (UTC), kind, tenant, model,
tokens, and the reservation's id. With --json each is one JSON object a line:
shard, n, kind, reservation_id, tenant, attributes, funding, usage (in the Claude
API's own names), quality, reserved_at and booked_at (ms since 1970), …
"""
TOLD_FROM_MS = 500
"""A fork that keeps the server busy for longer is told beforehand."""

FORK_HELP = """\
When a server lost its last entries (a crash, a failover, a restored backup), the
export of that shard stops: the archive has entries that the store has not, and
their numbers would be given again. This shows what is only in the archive and
what is only in the store, and asks; then it begins another epoch of the ledger.

What was exported stays true, and is billed as it is. Entries that are only in
the store get new numbers, behind all that were ever given, and are exported by
the next `meterlib export run`, which needs no further option. Nothing is dropped
but what was exported already, under the numbers of a fork that was lost as well.
"""

_TOKENS = {
    "input_tokens": "in",
    "cache_creation_input_tokens": "cache-write",
    "cache_read_input_tokens": "cache-read",
    "output_tokens": "out",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `meterlib ledger`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_show(actions)
    forking = actions.add_parser(
        "fork",
        help="begin another epoch of a ledger that lost exported entries",
        description=FORK_HELP,
        epilog=HELP.partition("\n---\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    forking.add_argument("--shard", type=whole_number, metavar="N", required=True, help="whose ledger")
    forking.add_argument("--archive", metavar="DIR", help="another archive than that of the settings")
    forking.add_argument("--yes", action="store_true", help="do not ask")
    add_json(forking)
    add_config(forking)


def _add_show(actions: Any) -> None:
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
    """Do what is asked for; returns the exit code."""
    config = Config.find(arguments.config)
    return _fork(config, arguments) if arguments.action == "fork" else _show(config, arguments)


def _show(config: Config, arguments: argparse.Namespace) -> int:
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


# ── fork ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _fork(config: Config, arguments: argparse.Namespace) -> int:
    shard = arguments.shard
    with opened(config, arguments.config) as store, opened_sinks(config, arguments.archive) as (_, sinks):
        if shard >= store.shards:
            raise InvalidInput("--shard", f"the store has shards 0 to {store.shards - 1}, and no {shard}")
        check_none_is_missing(store, sinks)
        loss = loss_of(sinks, store.run, shard)
        if loss is None:
            raise InvalidInput("--shard", f"nothing is lost: the ledger of shard {shard} continues what was exported")
        if not arguments.json:
            _print_loss(loss)
        if not arguments.yes and not _confirmed(loss):
            print("meterlib: nothing was changed", file=sys.stderr)
            return FAILURE
        begun = fork(loss, store.run)
    print(json.dumps(_fork_document(loss, begun)) if arguments.json else _fork_line(loss, begun))
    return OK


def _confirmed(loss: Loss) -> bool:
    if not sys.stdin.isatty():
        raise InvalidInput("--yes", "is needed where there is no terminal to ask at; nothing was changed")
    print(f"Begin another epoch of shard {loss.shard}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _print_loss(loss: Loss) -> None:
    print(f"{loss.problem.problem}: {loss.problem}")
    kept = f"{loss.shard}:{loss.kept.n}" if loss.kept.n else "none"
    if loss.kept.n != loss.kept.stored_n:
        kept += f", which is {loss.shard}:{loss.kept.stored_n} in the store"
    print(f"\nlast entry that is the same on both sides: {kept}")
    _print_side("exported, and not in the store any more; they stay as they are", loss.shard, loss.lost)
    _print_side("in the store, and never exported; they get new numbers", loss.shard, loss.unexported)
    if loss.twice:
        told = ", ".join(loss.twice[:5]) + (", …" if len(loss.twice) > 5 else "")
        print(f"\n{len(loss.twice):,} reservations are on either side, and would be billed twice: {told}")
        print("look at them once this is done, and book a correction (adjust) of one entry of each")
    if loss.move_ms >= TOLD_FROM_MS:
        print(f"\nmeanwhile the server answers nobody else: for about {loss.move_ms / 1000:.0f} s")
    print()


def _print_side(what: str, shard: int, side: Side) -> None:
    numbers = f", {shard}:{side.first}-{side.last}" if side.count else ""
    print(f"\n{side.count:,} {_entries(side.count)} {what}{numbers}")
    for entry in side.shown:
        print(f"  {line_of(entry)}")
    if side.count > len(side.shown):
        print("  …")


def _entries(count: int) -> str:
    return "entry" if count == 1 else "entries"


def _fork_line(loss: Loss, begun: NewEpoch) -> str:
    numbers = f"{loss.shard}:{begun.first}-{begun.first + begun.moved - 1}"
    moved = f"; moved to {numbers}: {begun.moved:,} {_entries(begun.moved)}" if begun.moved else ""
    return f"shard {loss.shard} goes on as epoch {begun.epoch}, from number {begun.first} on{moved}"


def _fork_document(loss: Loss, begun: NewEpoch) -> dict[str, Any]:
    sides = {
        name: {"count": side.count, "first": side.first, "last": side.last}
        for name, side in (("lost", loss.lost), ("unexported", loss.unexported))
    }
    return {
        "shard": loss.shard,
        "problem": loss.problem.problem,
        "exported": {"epoch": loss.exported.epoch, "n": loss.exported.n},
        "kept": loss.kept.n,
        **sides,
        "twice": loss.twice,
        "epoch": begun.epoch,
        "first": begun.first,
        "moved": begun.moved,
    }
