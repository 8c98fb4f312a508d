"""`meterlib prices`: the price book in force, what differs between two, and another one put in force."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from meterlib.billing.prices.diff import Change, changes, text_of
from meterlib.billing.prices.files import claude_book, load_book, read_book
from meterlib.billing.prices.prices import PER, TOKEN_TYPES, Price, PriceBook, PriceBooks, PricedModel
from meterlib.billing.prices.pricing import books_of
from meterlib.billing.rating.measures import PROVIDER
from meterlib.cli.exits import OK
from meterlib.cli.options import add_config, add_json, moment_ms
from meterlib.cli.tables import Column, print_table
from meterlib.config import Config
from meterlib.core.money import plain
from meterlib.core.policy import fits
from meterlib.errors import InvalidInput, PolicyError

HELP = """\
The prices that usage is rated at. Three sources are asked in this order, and the
first that has a price of a model at the time of the call decides:

  your book       the file that [billing] book names
  claude          comes with meterlib: Anthropic's list prices, each with its source
  genai-prices    if it is installed: pip install 'meterlib[prices]'; switched off
                  with [billing] fallback = "none"

What none of them states is unpriced: it is counted, and never taken for free.
Prices are per 1,000,000 tokens, and per 1,000 requests of the provider's tools;
days begin at midnight UTC.
---
examples:
  meterlib prices show                               in force now
  meterlib prices show 'claude-sonnet-*' --at 2026-10-06
  meterlib prices diff claude my-prices.toml         yours against meterlib's
  meterlib prices import my-prices.toml              what would change
  meterlib prices import my-prices.toml --yes        put it in force

A book in short; other ways of service and long prompts have tables of their own:

  name = "mine"
  currency = "USD"
  provider = "anthropic"
  [[model]]
  name = "claude-sonnet-5-5"
  match = ["claude-sonnet-5-5-{date}"]               names that calls use, too
  [[model.price]]
  valid_from = 2026-12-01
  source = "contract of 2026-11-20"
  input = 1.90
  output = 9.50
  [model.price.variant.batch]
  input = 0.95
  output = 4.75

exit codes: 0 ok; 1 the book could not be written; 2 wrong usage or configuration,
or a book that is not acceptable: nothing was done
"""
CLAUDE = "claude"
_SHORT = {"cache_write_5m": "write 5m", "cache_write_1h": "write 1h", "cache_read": "cache read"}
_HEADINGS = tuple(_SHORT.get(kind, kind) for kind in TOKEN_TYPES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `meterlib prices`."""
    actions = parser.add_subparsers(dest="action", metavar="show|diff|import", required=True)
    show = _action(actions, "show", "the prices in force")
    show.add_argument("model", nargs="*", metavar="MODEL", help="only these; * stands for anything")
    show.add_argument("--provider", default=PROVIDER, metavar="P", help=f"whose (default: {PROVIDER})")
    show.add_argument("--at", metavar="DATE", help="those in force at this date or time (UTC), instead of now")
    diff = _action(actions, "diff", "what differs between two books")
    diff.add_argument("old", metavar="BOOK", help="a file, or claude for the book that comes with meterlib")
    diff.add_argument("new", metavar="BOOK", help="another one")
    take = _action(actions, "import", "put another book in force, at the place that [billing] book names")
    take.add_argument("file", metavar="FILE", help="the book; it is checked in full before anything is written")
    take.add_argument("--yes", action="store_true", help="write it; without this, only show what would change")
    for action in (show, diff, take):
        add_json(action)
        add_config(action)


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str
) -> argparse.ArgumentParser:
    return actions.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=HELP.partition("\n---\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def run(arguments: argparse.Namespace) -> int:
    """Show, compare or import; returns the exit code."""
    if arguments.action == "show":
        return _show(arguments)
    if arguments.action == "diff":
        return _diff(arguments)
    return _import(arguments)


def _named(name: str) -> PriceBook:
    return claude_book() if name == CLAUDE else load_book(name)


# ── show ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _show(arguments: argparse.Namespace) -> int:
    at_ms = time.time_ns() // 1_000_000 if arguments.at is None else moment_ms(arguments.at, "UTC", "--at")
    books = books_of(Config.find(arguments.config).billing)
    found = list(_in_force(books, arguments.provider, arguments.model, at_ms))
    if arguments.json:
        print(json.dumps({"at": _iso(at_ms), "prices": [_json_of(*one) for one in found]}, indent=2))
        return OK
    print(f"prices in force at {_iso(at_ms)}, per 1,000,000 tokens")
    print()
    if found:
        columns = [Column("model", key=True), Column("service", key=True), Column("prompt", key=True)]
        columns += [
            *(Column(heading, number=True) for heading in _HEADINGS),
            Column("from"),
            Column("until"),
            Column("book"),
        ]
        print_table(columns, [line for one in found for line in _lines(*one)])
    else:
        print("no model of this name has a price then: what it uses stays unpriced")
    print()
    for line in _notes([price for _, _, price in found]):
        print(line)
    return OK


def _in_force(
    books: PriceBooks, provider: str, names: Sequence[str], at_ms: int
) -> Iterator[tuple[str, PricedModel, Price]]:
    """What is in force of the models asked for: all of the books, or those of a name, wherever it is known."""
    seen: set[tuple[str, str]] = set()
    for source in books.sources:
        listed = source.models if isinstance(source, PriceBook) else ()
        models = [model for model in listed if model.provider == provider]
        models += [known for name in names if (known := source.find(provider, name)) and known not in models]
        for model in models:
            asked = not names or any(_is_meant(model, name) for name in names)
            position = model.at(at_ms)
            if asked and position is not None and (model.provider, model.name) not in seen:
                seen.add((model.provider, model.name))
                yield source.label, model, model.prices[position]


def _is_meant(model: PricedModel, name: str) -> bool:
    return fits(model.name, name) or PriceBook("one", [model]).find(model.provider, name) is not None


def _lines(label: str, model: PricedModel, price: Price) -> Iterator[list[str]]:
    for variant, tiers in price.variants.items():
        for tier in tiers:
            numbers = [plain(tier.prices[kind]) if kind in tier.prices else "-" for kind in TOKEN_TYPES]
            prompt = f"> {tier.above:,}" if tier.above else f"<= {tiers[1].above:,}" if len(tiers) > 1 else "any"
            days = [str(day) if day else "-" for day in (price.valid_from, price.valid_until)]
            yield [model.name, variant, prompt, *numbers, *days, label]


def _notes(prices: Sequence[Price]) -> Iterator[str]:
    """What holds besides the table."""
    requests = sorted({(kind, plain(number)) for price in prices for kind, number in price.requests.items()})
    for kind, number in requests:
        yield f"{kind.replace('_', ' ')}: {number} per {PER[kind]:,} requests"
    for place, times in sorted({(place, plain(times)) for price in prices for place, times in price.geo.items()}):
        count = sum(place in price.geo for price in prices)
        yield f"inference in {place}: token prices times {times} ({count} of {len(prices)} models have such a price)"


def _json_of(label: str, model: PricedModel, price: Price) -> dict[str, object]:
    return {
        "book": label,
        "provider": model.provider,
        "model": model.name,
        "currency": price.currency,
        "valid_from": None if price.valid_from is None else str(price.valid_from),
        "valid_until": None if price.valid_until is None else str(price.valid_until),
        "source": price.source,
        "variants": {
            variant: [
                {"above": tier.above, **{kind: plain(number) for kind, number in tier.prices.items()}} for tier in tiers
            ]
            for variant, tiers in price.variants.items()
        },
        "requests": {kind: plain(number) for kind, number in price.requests.items()},
        "geo": {place: plain(times) for place, times in price.geo.items()},
    }


def _iso(ms: int) -> str:
    return f"{datetime.fromtimestamp(ms // 1000, UTC):%Y-%m-%dT%H:%M:%SZ}"


# ── diff and import ───────────────────────────────────────────────────────────────────────────────────────────────────


def _diff(arguments: argparse.Namespace) -> int:
    """Prices of models that both books have, and the names of those that only one has: books may be of any extent."""
    books = (_named(arguments.old), _named(arguments.new))
    has = [{(model.provider, model.name) for model in book.models} for book in books]
    both = [change for change in changes(*books) if (change.provider, change.model) in has[0] & has[1]]
    lacks = {"only_old": sorted(has[0] - has[1]), "only_new": sorted(has[1] - has[0])}
    if arguments.json:
        named = {side: [f"{provider}/{name}" for provider, name in models] for side, models in lacks.items()}
        print(json.dumps({"changes": [_json_of_change(change) for change in both], **named}, indent=2))
        return OK
    _print_changes(both, as_json=False)
    for book, models in zip(books, lacks.values(), strict=True):
        if models:
            print(f"only in {book.name}: {', '.join(name for _, name in models)}")
    return OK


def _print_changes(found: Sequence[Change], as_json: bool) -> None:
    if as_json:
        print(json.dumps([_json_of_change(change) for change in found], indent=2))
        return
    if not found:
        print("the same prices")
        return
    columns = [
        Column("model", key=True),
        *(Column(word) for word in ("service", "prompt", "price", "old -> new", "from", "until")),
    ]
    print_table(
        columns,
        [
            [
                change.model,
                change.variant or "any",
                f"> {change.above:,}" if change.above else "-",
                change.kind,
                text_of(change),
                *(str(day) if day else "-" for day in (change.valid_from, change.valid_until)),
            ]
            for change in found
        ],
    )
    print()
    models = len({change.model for change in found})
    print(f"{len(found)} {_plural('price', len(found))} of {models} {_plural('model', models)}")


def _plural(word: str, number: int) -> str:
    return word if number == 1 else f"{word}s"


def _json_of_change(change: Change) -> dict[str, object]:
    return {
        "provider": change.provider,
        "model": change.model,
        "variant": change.variant,
        "above": change.above,
        "kind": change.kind,
        "old": None if change.old is None else plain(change.old),
        "new": None if change.new is None else plain(change.new),
        "valid_from": None if change.valid_from is None else str(change.valid_from),
        "valid_until": None if change.valid_until is None else str(change.valid_until),
    }


def _import(arguments: argparse.Namespace) -> int:
    place = Config.find(arguments.config).billing.book
    if place is None:
        raise PolicyError("billing.book", "is not set: name the file that is to hold your book, such as 'prices.toml'")
    target = Path(place)
    new, data = read_book(arguments.file)
    if new.name == CLAUDE:
        raise InvalidInput("file", "the book that comes with meterlib is called 'claude': give yours another name")
    _print_changes(changes(_standing(target), new), arguments.json)
    if arguments.yes:
        _replace(target, data)
    if not arguments.json:
        print(
            f"in force from now on: {target}" if arguments.yes else f"nothing was written; --yes writes it to {target}"
        )
    return OK


def _standing(target: Path) -> PriceBook | None:
    """The book that is to be replaced; one that is not acceptable is no reason not to."""
    if not target.exists():
        return None
    try:
        return load_book(target)
    except PolicyError as error:
        print(f"the book in force is not acceptable: {error}", file=sys.stderr)
        return None


def _replace(target: Path, data: bytes) -> None:
    """The file has this content, or the one it had before, whatever happens meanwhile."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        Path(name).unlink(missing_ok=True)
