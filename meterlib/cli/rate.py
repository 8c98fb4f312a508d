"""`meterlib rate`: what is archived and not rated yet is rated; or all is rated again by other prices."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import msgspec

from meterlib.billing.archive.archive import Archive
from meterlib.billing.postings.postings import Postings
from meterlib.billing.postings.rater import Prices, Rated, Rater
from meterlib.billing.postings.reratings import Rerating
from meterlib.billing.prices.files import claude_book
from meterlib.billing.prices.genai import GenaiPrices
from meterlib.billing.prices.prices import PriceBooks
from meterlib.billing.prices.pricing import TermsBook, books_of
from meterlib.billing.rating.rated import COSTS
from meterlib.cli.exits import FAILURE, OK
from meterlib.cli.options import add_archive, add_config, add_json, archive_folder, moment_ms
from meterlib.cli.progress import Progress
from meterlib.cli.tables import Column, print_table
from meterlib.config import Config
from meterlib.core.money import ZERO, plain, plus
from meterlib.errors import InvalidInput

HELP = """\
Rate the entries of the archive that are not rated yet. `meterlib export run` does
the same at its end, so this is for what was exported with --no-rate.

An entry is rated once: the rows that say what it costs, with the prices they were
made with, are put beside the archive's files and never changed. A later price
book changes nothing about them. What no book has a price for is rated as
unpriced, counted, and never taken for free.

With --book, entries that were rated are rated again, by that book in the place of
yours, and the difference is shown by model. Once it is confirmed, rows are posted
that take back what cost something else and post it anew; all of them or none.
Periods that are closed stay as they are: the difference to them is posted in the
next one.
---
examples:
  meterlib rate                                     what is not rated yet
  meterlib rate --book my-prices.toml               the difference; asks before it posts
  meterlib rate --book my-prices.toml --dry-run     the difference alone
  meterlib rate --book my-prices.toml --since 2026-10-01 --until 2026-11-01 --yes

exit codes: 0 ok; 1 the disk failed, or another re-rating came first; 2 wrong
usage or configuration; 5 the archive's files do not fit together
"""
CLAUDE, GENAI = "claude", "genai-prices"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `meterlib rate`."""
    add_archive(parser)
    parser.add_argument(
        "--book", metavar="FILE|NAME",
        help=f"rate again by this book in the place of yours; {CLAUDE} and {GENAI} mean these alone",
    )  # fmt: skip
    parser.add_argument("--since", metavar="TIME", help="with --book: only calls made from then on ([billing] tz)")
    parser.add_argument("--until", metavar="TIME", help="with --book: only calls made before then")
    parser.add_argument("--yes", action="store_true", help="with --book: post without asking")
    parser.add_argument("--dry-run", action="store_true", help="with --book: post nothing")
    add_json(parser)
    add_config(parser)


def run(arguments: argparse.Namespace) -> int:
    """Rate, or rate again; returns the exit code."""
    config = Config.find(arguments.config)
    if arguments.book is None:
        for option in ("since", "until", "yes", "dry_run"):
            if getattr(arguments, option):
                raise InvalidInput(f"--{option.replace('_', '-')}", "goes with --book")
    path = archive_folder(arguments, config)
    with Archive(path, config.billing.segment_entries) as archive:
        return _rate(archive, config, arguments) if arguments.book is None else _rate_again(archive, config, arguments)


# ── What is not rated yet ─────────────────────────────────────────────────────────────────────────────────────────────


def _rate(archive: Archive, config: Config, arguments: argparse.Namespace) -> int:
    rated = rate_archive(archive, config)
    if arguments.json:
        print(json.dumps({"archive": str(archive.path), **document_of(rated)}))
    else:
        print(line_of(rated))
    return OK


def rate_archive(archive: Archive, config: Config, check: Callable[[], None] = lambda: None) -> Rated:
    """Rate what of an archive is not rated yet, by the settings; `check` is called as it goes, and may end it."""
    done = Rated()
    waiting = sum(Postings(archive, config.billing.tz).unrated().values())
    if not waiting:
        return done
    prices = prices_of(config, books_of(config.billing))
    with (
        Progress("rating entries", waiting, check) as progress,
        Rater(archive, prices, advance=progress.advance) as rater,
    ):
        for shard in archive.shards():
            done = done.plus(rater.rate(shard))
    return done


def prices_of(config: Config, books: PriceBooks) -> Prices:
    """What usage is rated by."""
    return Prices(books=books, terms_of=TermsBook(config.billing, config.tenant).of)


def line_of(rated: Rated) -> str:
    """What was rated, in words."""
    line = f"rated {rated.entries:,} {'entry' if rated.entries == 1 else 'entries'}"
    if rated.unpriced:
        models = ", ".join(f"{model or 'unknown model'} ({rows:,})" for model, rows in rated.unpriced.items())
        line += f"; rows without a price: {models}"
    return line


def document_of(rated: Rated) -> dict[str, Any]:
    """The same, for programs."""
    return {"rated": rated.entries, "unpriced": dict(rated.unpriced)}


# ── Rating again ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _rate_again(archive: Archive, config: Config, arguments: argparse.Namespace) -> int:
    since_ms, until_ms = (
        None if (text := getattr(arguments, name)) is None else moment_ms(text, config.billing.tz, f"--{name}")
        for name in ("since", "until")
    )
    if since_ms is not None and until_ms is not None and until_ms <= since_ms:
        raise InvalidInput("--until", f"{arguments.until} is not after --since {arguments.since}")
    prices = prices_of(config, _books(config, arguments.book))
    postings = Postings(archive, config.billing.tz)
    total = sum(file.segment.last - file.segment.first + 1 for files in postings.rated.values() for file in files)
    with Rerating(archive, prices, arguments.book, since_ms=since_ms, until_ms=until_ms) as rerating:
        with Progress("rating entries again", total) as progress:
            rerating.work_out(progress.advance)
        if not arguments.json:
            _print_changes(rerating)
        wanted = _is_wanted(rerating, arguments)
        posted = rerating.post(time.time_ns() // 1_000_000) if wanted else 0
        missed = rerating.missed() if posted else 0
    if wanted and not posted:
        print("meterlib: another re-rating was posted meanwhile: look at the difference anew", file=sys.stderr)
        return FAILURE
    if missed:
        what = f"{missed:,} {'entry was' if missed == 1 else 'entries were'} rated by the prices before, in the moment"
        print(f"meterlib: {what} before this was posted: run the same again for those", file=sys.stderr)
    if arguments.json:
        print(json.dumps(_document(rerating, posted), indent=2))
    elif posted:
        print(f"posted {rerating.rows:,} rows as re-rating {posted}")
    elif rerating.rows:
        print("nothing was posted" + ("" if arguments.dry_run else "; --yes posts it"))
    return OK


def _books(config: Config, name: str) -> PriceBooks:
    if name == CLAUDE:
        return PriceBooks(claude_book())
    if name == GENAI:
        try:
            return PriceBooks(GenaiPrices())
        except ImportError:
            raise InvalidInput("--book", f"{GENAI} is not installed: pip install 'meterlib[prices]'") from None
    return books_of(msgspec.structs.replace(config.billing, book=name))


def _is_wanted(rerating: Rerating, arguments: argparse.Namespace) -> bool:
    if not rerating.rows or arguments.dry_run:
        return False
    return arguments.yes or (not arguments.json and _confirmed(rerating))


def _confirmed(rerating: Rerating) -> bool:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    try:
        return input(f"post {rerating.rows:,} rows as re-rating {rerating.number}? [y/N] ").strip().lower() == "y"
    except EOFError:
        return False


def _print_changes(rerating: Rerating) -> None:
    if not rerating.rows:
        print("nothing changes: all that was rated costs the same by these prices")
        return
    columns = [Column("model", key=True), Column("currency")]
    columns += [Column(word, number=True) for word in ("lines", "priced now", "unpriced now", "list", "billed")]
    columns.append(Column("upstream", number=True))
    lines = []
    totals: dict[str, dict[str, Decimal]] = {}
    for model, change in rerating.changes.items():
        counts = [f"{number:,}" for number in (change.lines, change.priced, change.unpriced)]
        for currency, costs in sorted(change.costs.items()) or [("-", dict.fromkeys(COSTS, ZERO))]:
            lines.append([model or "unknown model", currency, *counts, *_amounts(costs)])
            known = totals.setdefault(currency, dict.fromkeys(COSTS, ZERO))
            totals[currency] = {name: plus(known[name], costs[name]) for name in COSTS}
    print_table(columns, lines)
    print()
    for currency, costs in sorted(totals.items()):
        names = zip(("list", "billed", "upstream"), _amounts(costs), strict=True)
        told = ", ".join(f"{name} {amount}" for name, amount in names)
        print(f"in all {told}{'' if currency == '-' else f' {currency}'}")


def _amounts(costs: dict[str, Decimal]) -> list[str]:
    return [_signed(costs[name]) for name in ("list_cost", "billed_cost", "upstream_cost")]


def _signed(amount: Decimal) -> str:
    return f"+{plain(amount)}" if amount > 0 else plain(amount)


def _document(rerating: Rerating, posted: int) -> dict[str, Any]:
    models = [
        {
            "model": model,
            "lines": change.lines,
            "priced": change.priced,
            "unpriced": change.unpriced,
            "costs": [
                {"currency": currency, **{name: plain(cost) for name, cost in costs.items()}}
                for currency, costs in sorted(change.costs.items())
            ],
        }
        for model, change in rerating.changes.items()
    ]
    return {"rows": rerating.rows, "posted": posted or None, "models": models}
