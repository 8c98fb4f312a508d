"""`meterlib close`: a billing period is closed, and what it comes to is written down for good."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from decimal import Decimal

import msgspec

from meterlib.billing.archive.archive import Archive
from meterlib.billing.postings.closes import Close, file_of
from meterlib.billing.postings.closing import Closing, Word, word_of
from meterlib.billing.postings.postings import Postings
from meterlib.billing.postings.repeats import repeats_of
from meterlib.cli.exits import INCOMPLETE, INTEGRITY, OK
from meterlib.cli.options import add_archive, add_config, add_json, archive_folder, whole_number
from meterlib.cli.progress import Phases
from meterlib.cli.store import opened
from meterlib.cli.tables import Column, print_table
from meterlib.cli.times import at_text
from meterlib.config import Config
from meterlib.core.money import ZERO, plain, plus
from meterlib.errors import InvalidInput
from meterlib.store.journal import Journal

SHOWN_MAX = 5
HELP = """\
Close a month: write down, once and for good, how far each shard goes in it and
what its rated rows come to, by tenant and currency. What is booked later about
it (late usage, corrections, another rating) appears as a correction in the next
month that is open.

Months are those of [billing] tz, and an entry is of the month in which it was
booked. Each close carries the digest of the one before it, so they come in order;
the first one may be of any month.

A month can be closed when it is over by the store's clock and all that was booked
in it is exported and rated. With --offline the store is not asked: then every
shard must have an archived entry that was booked after the month, which proves
the same, since times of a ledger never go back. What it cannot prove is that the
store still has the ledger that was archived.

Settlements that wait in the journal of the settings are told of, and calls that are
in the ledger twice, since they were told again when the store had forgotten them;
--strict does not close a month before that is put right. Journals on other machines
are not looked at.
---
examples:
  meterlib close 2026-10
  meterlib close 2026-10 --strict       only if every row of it has a price, no
                                        settlement waits, and no call is billed twice
  meterlib close --list                 the periods that are closed

exit codes: 0 ok, or closed already; 2 wrong usage or configuration; 3 the period
cannot be closed yet, and why; 5 ledger and archive, or an archive and its close,
do not agree
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `meterlib close`."""
    parser.add_argument("period", nargs="?", metavar="PERIOD", help="a month, such as 2026-10")
    parser.add_argument("--list", action="store_true", help="show the periods that are closed")
    parser.add_argument("--offline", action="store_true", help="do not ask the store")
    parser.add_argument(
        "--retired", action="append", type=whole_number, default=[], metavar="SHARD",
        help="nothing of this shard is still to come: it is of a store that had more of them; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--strict", action="store_true",
        help="do not close it while rows have no price, settlements wait, or calls are billed twice",
    )  # fmt: skip
    add_archive(parser)
    add_json(parser)
    add_config(parser)


def run(arguments: argparse.Namespace) -> int:
    """Close a period, or list those that are closed; returns the exit code."""
    config = Config.find(arguments.config)
    if arguments.list == (arguments.period is not None):
        raise InvalidInput("PERIOD", "name one month, such as 2026-10, or give --list")
    for shard in arguments.retired:
        if shard < config.store.shards:
            raise InvalidInput("--retired", f"the store has shard {shard}: [store] shards is {config.store.shards}")
    path = archive_folder(arguments, config)
    with Archive(path, config.billing.segment_entries) as archive:
        if arguments.list:
            return _list(archive, config, arguments)
        with Phases() as phases:
            return _close(archive, config, arguments, phases)


def _close(archive: Archive, config: Config, arguments: argparse.Namespace, phases: Phases) -> int:
    phases("looking at the archive's files")
    closing = Closing(Postings(archive, config.billing.tz), arguments.period)
    for shard in arguments.retired:
        if shard not in closing.postings.segments:
            raise InvalidInput("--retired", f"the archive has nothing of shard {shard}: leave it out")
    if closing.standing is not None:
        phases(f"adding up {closing.standing.period} again")
        differences = closing.differences()
        phases.done()
        return _closed_already(archive, differences, closing.standing, arguments)
    words = None if arguments.offline else _words(archive, config, arguments, phases)
    phases(f"adding up {arguments.period}")
    closing = Closing(Postings(archive, config.billing.tz), arguments.period)  # as it is after the store's word
    hindrances = closing.hindrances(words, config.store.shards, arguments.retired)
    if not hindrances:
        close = closing.drawn_up(time.time_ns() // 1_000_000, "archive" if arguments.offline else "store")
        doubts = _waiting(config) + _twice(closing)
        if not (arguments.strict and (close.unpriced or doubts)):
            close = closing.write(close)
            phases.done()
            for warning in doubts:
                print(f"meterlib: warning: {warning}", file=sys.stderr)
            return _tell(archive, close, arguments)
        hindrances = [f"{close.unpriced:,} rows of it have no price"] if close.unpriced else []
        hindrances += doubts
    phases.done()
    if arguments.json:
        print(json.dumps({"period": arguments.period, "closed": False, "hindrances": hindrances}, indent=2))
    for hindrance in hindrances:
        print(f"meterlib: {arguments.period} cannot be closed: {hindrance}", file=sys.stderr)
    return INCOMPLETE


def _waiting(config: Config) -> list[str]:
    """What is to be said of settlements that no ledger has yet.

    They are booked when they are replayed: in a later month, whether this one is closed before that or after it.
    """
    journal = config.journal
    if journal is None:
        return []
    try:
        count = len(Journal(journal).waiting())
    except OSError as error:
        return [f"the journal {journal} cannot be read: {error.strerror}"]
    told = "it is not in the ledger yet, and will be of a later month; a running meter with this journal books it"
    return [f"usage of {count:,} calls waits in {journal}: {told}"] if count else []


def _twice(closing: Closing) -> list[str]:
    """What is to be said of calls that are billed twice."""
    found = repeats_of(closing.postings, closing.month.start_ms, closing.month.end_ms)
    if not found:
        return []
    shown = ", ".join(
        f"{one.tenant}'s {one.reservation_id} as {one.first} and {one.again}" for one in found[:SHOWN_MAX]
    )
    more = ", …" if len(found) > SHOWN_MAX else ""
    return [
        f"{len(found):,} calls are in the ledger twice, and billed twice: {shown}{more}; they were told again when the"
        " store had forgotten them ([store] retention_ms) or lost them; book a correction (adjust) of one entry of each"
    ]


def _words(archive: Archive, config: Config, arguments: argparse.Namespace, phases: Phases) -> list[Word]:
    phases("asking the store whether anything of it is still to come")
    with opened(config, arguments.config) as store:
        clocks = [store.clock_ms(shard) for shard in range(store.shards)]
        return [word_of(archive, store.run, shard, clock_ms) for shard, clock_ms in enumerate(clocks)]


def _closed_already(archive: Archive, differences: Sequence[str], close: Close, arguments: argparse.Namespace) -> int:
    if differences:
        file = file_of(archive.path, close.period)
        told = ", ".join(differences)
        print(f"meterlib: {file} is not what the archive says now: {told} differ", file=sys.stderr)
        return INTEGRITY
    if arguments.json:
        return _tell(archive, close, arguments)
    print(
        f"{close.period} was closed already, at {at_text(close.closed_at_ms, close.tz)}; its digest is {close.digest}"
    )
    return OK


def _tell(archive: Archive, close: Close, arguments: argparse.Namespace) -> int:
    if arguments.json:
        print(json.dumps({"closed": True, **msgspec.to_builtins(close)}, indent=2))
        return OK
    print(f"closed {close.period} ({at_text(close.from_ms, close.tz)} to {at_text(close.until_ms, close.tz)})")
    entries = sum(sum(shard.entries.values()) for shard in close.shards)
    print(f"{entries:,} entries, up to {', '.join(f'{shard.shard}:{shard.last}' for shard in close.shards) or '-'}")
    for currency, (listed, billed, upstream) in _sums(close).items():
        print(f"list {plain(listed)}, billed {plain(billed)}, upstream {plain(upstream)} {currency}")
    _tell_doubts(close)
    print(f"digest {close.digest}, in {file_of(archive.path, close.period)}")
    return OK


def _tell_doubts(close: Close) -> None:
    if close.unpriced:
        print(f"{close.unpriced:,} rows have no price: the amounts are a floor")
    doubtful = {quality: count for quality, count in close.qualities.items() if quality != "final"}
    if doubtful:
        print(
            "entries whose numbers are not final: " + ", ".join(f"{count:,} {name}" for name, count in doubtful.items())
        )
    if gaps := [gap for shard in close.shards for gap in shard.gaps]:
        print(f"entries that are lost for good: {', '.join(gaps)}")


def _sums(close: Close) -> dict[str, tuple[Decimal, Decimal, Decimal]]:
    sums: dict[str, tuple[Decimal, Decimal, Decimal]] = {}
    for total in close.totals:
        if total.currency:
            listed, billed, upstream = sums.get(total.currency, (ZERO, ZERO, ZERO))
            sums[total.currency] = (
                plus(listed, Decimal(total.list_cost)),
                plus(billed, Decimal(total.billed_cost)),
                plus(upstream, Decimal(total.upstream_cost)),
            )
    return dict(sorted(sums.items()))


def _list(archive: Archive, config: Config, arguments: argparse.Namespace) -> int:
    closes: Sequence[Close] = Postings(archive, config.billing.tz).closes
    if arguments.json:
        print(json.dumps([msgspec.to_builtins(close) for close in closes], indent=2))
        return OK
    if not closes:
        print("no period is closed")
        return OK
    columns = [Column("period", key=True), Column("closed"), Column("currency")]
    columns += [*(Column(word, number=True) for word in ("list", "billed", "upstream", "unpriced")), Column("digest")]
    rows = []
    for close in closes:
        for currency, amounts in (_sums(close) or {"-": (ZERO, ZERO, ZERO)}).items():
            closed = at_text(close.closed_at_ms, close.tz)
            told = [*map(plain, amounts), f"{close.unpriced:,}", close.digest[:16]]
            rows.append([close.period, closed, currency, *told])
    print_table(columns, rows)
    return OK
