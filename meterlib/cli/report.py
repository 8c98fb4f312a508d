"""`meterlib report`: usage by whatever it is grouped by, and whether an entry is missing."""

from __future__ import annotations

import argparse
import csv
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeAlias

import msgspec

from meterlib.billing.estimates import Accuracy, Estimates
from meterlib.billing.report import (
    DIMENSIONS,
    Completeness,
    Group,
    Report,
    ShardCheck,
    ShardCompleteness,
    check_zone,
)
from meterlib.cli.exits import INCOMPLETE, OK
from meterlib.cli.options import add_config, moment_ms
from meterlib.cli.progress import Progress
from meterlib.cli.store import Store, opened
from meterlib.cli.tables import Column, print_table
from meterlib.cli.times import at_text, terminal_width
from meterlib.config import Config
from meterlib.core.checks import check_tenant
from meterlib.errors import InvalidInput

HELP = """\
Add up what was used, from the ledger, and say whether an entry is missing.

Rows can be grouped by tenant, provider, model, kind, funding, quality, day and
hour, and by any attribute of the calls (attribute:NAME, or just NAME). A row has

  calls       settled, late or recorded ones, and the sums of their tokens in
              the Claude API's own names; input_tokens is the uncached part.
              Compaction and advisor passes, which the API's numbers of a call
              leave out, are added under the model that did them
  late        calls whose usage came after their reservation had ended
  expired     reservations that were never settled; their usage is not known
  cancelled   reservations freed because nothing was sent
  partial     calls that were cut short, counted as far as they went
  adjusted    corrections; their differences are in the sums

With --estimates, rows say instead how good the estimates before the calls were:

  calls       settled ones of which the estimate and the input are known
  median      of the input tokens they were charged (uncached input and cache
              writes, as limits count them), divided by what was estimated:
              1.000 is as estimated, above is more, and was let through too soon
  p95         the same; 95 of 100 calls are at most this

The last lines say whether the report is complete. Entries of a shard are
numbered without gaps, so a number that is missing shows. In CSV these lines go
to standard error, in JSON they are the object "completeness".
---
examples:
  meterlib report --by tenant,model
  meterlib report --since 2026-03-01 --until 2026-04-01 --tz Europe/Berlin \\
                  --by tenant --by day --format csv --strict > march.csv
  meterlib report --tenant acme --by attribute:session --format json | jq .total
  meterlib report --estimates --by model --since 2026-03-01

exit codes: 0 ok; 1 the store failed; 2 wrong usage or configuration;
3 an entry is missing (only with --strict)
"""
DEFAULT_BY = ("tenant", "model")
GAPS_SHOWN = 10
SHARDS_SHOWN = 16

_HEADINGS = {
    "calls": "calls",
    "input_tokens": "input",
    "cache_creation_input_tokens": "cache write",
    "ephemeral_5m_input_tokens": "write 5m",
    "ephemeral_1h_input_tokens": "write 1h",
    "cache_read_input_tokens": "cache read",
    "output_tokens": "output",
    "thinking_tokens": "thinking",
    "web_search_requests": "web search",
    "web_fetch_requests": "web fetch",
    "code_execution_requests": "code exec",
}
RATIO_DIGITS = 3
_ACCURACY = ("calls", "median", "p95")
_ALWAYS_SHOWN = ("calls", "input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `meterlib report`."""
    parser.add_argument(
        "--by",
        action="append",
        metavar="X",
        help="group by X, or by several: X,Y; may be repeated (default: tenant,model)",
    )
    parser.add_argument("--since", metavar="ISO", help="leave out what was booked before this date or time")
    parser.add_argument("--until", metavar="ISO", help="leave out what was booked at this date or time, or later")
    parser.add_argument(
        "--tz", default="UTC", metavar="IANA", help="zone of days, hours, --since and --until (default: UTC)"
    )
    parser.add_argument("--tenant", metavar="T", help="only this tenant")
    parser.add_argument(
        "--estimates", action="store_true", help="tell how charges compare with their estimates, in place of usage"
    )
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--format", choices=("table", "json", "csv"), default="table", help="default: table")
    formats.add_argument("--json", dest="format", action="store_const", const="json", help="the same as --format json")
    parser.add_argument("--strict", action="store_true", help="exit with 3 if an entry is missing")
    add_config(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print a report; returns the exit code."""
    report = _checked(arguments)
    config = Config.find(arguments.config)
    with opened(config, arguments.config) as store:
        completeness = _read(store, report)
    if arguments.format == "csv":
        _print_csv(report, completeness)
    elif arguments.format == "json":
        _print_json(report, completeness)
    else:
        _print_table(report, completeness)
    _print_hints(report, config)
    return INCOMPLETE if arguments.strict and not completeness.complete else OK


def _checked(arguments: argparse.Namespace) -> Report | Estimates:
    """What is asked for; errors name the option."""
    try:
        return _asked_for(arguments)
    except InvalidInput as error:
        if error.field.startswith("--"):
            raise
        raise InvalidInput(f"--{error.field}", str(error).partition(": ")[2]) from None


def _asked_for(arguments: argparse.Namespace) -> Report | Estimates:
    words = [word.strip() for words in arguments.by or DEFAULT_BY for word in words.split(",")]
    tz: str = check_zone(arguments.tz)
    since_ms = None if arguments.since is None else moment_ms(arguments.since, tz, "--since")
    until_ms = None if arguments.until is None else moment_ms(arguments.until, tz, "--until")
    if since_ms is not None and until_ms is not None and until_ms <= since_ms:
        raise InvalidInput(
            "--until", f"{arguments.until} is not after --since {arguments.since}; nothing is in between"
        )
    if arguments.tenant is not None:
        check_tenant(arguments.tenant)
    kind = Estimates if arguments.estimates else Report
    return kind(words, tz=tz, since_ms=since_ms, until_ms=until_ms, tenant=arguments.tenant)


def _read(store: Store, report: Report | Estimates) -> Completeness:
    """Count all entries asked for; each shard is read from the first that matters to the last."""
    shards = range(store.shards) if report.tenant is None else [store.shard_of(report.tenant)]
    heads = {shard: store.head(shard) for shard in shards}
    starts = {
        shard: 0 if report.since_ms is None else store.start_of(shard, report.since_ms, head)
        for shard, head in heads.items()
    }
    total = sum(max(0, head.ledger_last - max(starts[shard], head.ledger_first - 1)) for shard, head in heads.items())
    checked = []
    with Progress("reading entries", total) as progress:
        for shard in shards:
            check = ShardCheck(shard, since_ms=report.since_ms, until_ms=report.until_ms, after=starts[shard])
            for entry in store.ledger(shard, starts[shard]):
                if not check.see(entry):
                    break
                report.add(entry)
                progress.advance()
            checked.append(check.result(heads[shard], store.head(shard)))
    return Completeness.of(checked)


# ── Formats ───────────────────────────────────────────────────────────────────────────────────────────────────────────


Numbers: TypeAlias = Mapping[str, int | float | None]


def _numbers_of(report: Report | Estimates) -> tuple[Sequence[str], list[tuple[Group, Numbers]], Numbers]:
    """The names of a row's numbers, the numbers of each group, and those of all together."""
    if isinstance(report, Report):
        return report.columns, [(row.group, row.sums) for row in report.rows()], report.total()
    return _ACCURACY, [(row.group, _accuracy(row)) for row in report.rows()], _accuracy(report.total())


def _accuracy(row: Accuracy) -> Numbers:
    rounded = (None if ratio is None else round(ratio, RATIO_DIGITS) for ratio in (row.median, row.p95))
    return dict(zip(_ACCURACY, (row.calls, *rounded), strict=True))


def _print_table(report: Report | Estimates, completeness: Completeness) -> None:
    print(_title(report))
    print()
    columns, rows, total = _numbers_of(report)
    if rows:
        always = _ALWAYS_SHOWN if isinstance(report, Report) else columns
        told = [column for column in columns if any(numbers[column] for _, numbers in rows)]
        shown = [*always, *(column for column in told if column not in always)]
        keys = [Column(name, key=True) for name in report.by]
        headings = [Column(_HEADINGS.get(column, column), number=True) for column in shown]
        lines = [[*map(_cell, group), *(_number(numbers[column]) for column in shown)] for group, numbers in rows]
        last = ["total", *[""] * (len(keys) - 1), *(_number(total[column]) for column in shown)]
        print_table([*keys, *headings], lines, last)
    else:
        print("no entries" if isinstance(report, Report) else "no settled calls with an estimate")
    print()
    for line in _completeness_lines(report, completeness):
        print(line)


def _print_csv(report: Report | Estimates, completeness: Completeness) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    columns, rows, _ = _numbers_of(report)
    writer.writerow([*report.by, *columns])
    for group, numbers in rows:
        writer.writerow([*map(_safe, group), *numbers.values()])
    for line in _completeness_lines(report, completeness):
        print(line, file=sys.stderr)


def _print_json(report: Report | Estimates, completeness: Completeness) -> None:
    _, rows, total = _numbers_of(report)
    document = {
        "by": report.by,
        "tz": report.tz,
        "since": None if report.since_ms is None else at_text(report.since_ms, report.tz),
        "until": None if report.until_ms is None else at_text(report.until_ms, report.tz),
        "tenant": report.tenant,
        "rows": [{**dict(zip(report.by, group, strict=True)), **numbers} for group, numbers in rows],
        "total": total,
        "completeness": msgspec.to_builtins(completeness),
    }
    print(json.dumps(document, indent=2, ensure_ascii=False))


def _safe(value: str | None) -> str:
    """A text cell that no spreadsheet takes for a formula."""
    if value is None:
        return ""
    return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _cell(value: str | None) -> str:
    return "-" if value is None else value


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{RATIO_DIGITS}f}"


def _title(report: Report | Estimates) -> str:
    what = "usage" if isinstance(report, Report) else "charged input tokens / their estimates"
    whose = what if report.tenant is None else f"{what} of {report.tenant}"
    since = "" if report.since_ms is None else f" from {at_text(report.since_ms, report.tz)}"
    until = "" if report.until_ms is None else f" until {at_text(report.until_ms, report.tz)}"
    return f"{whose}{since}{until}, by {', '.join(report.by)} ({report.tz})"


# ── Completeness in words ─────────────────────────────────────────────────────────────────────────────────────────────


def _completeness_lines(report: Report | Estimates, completeness: Completeness) -> list[str]:
    shards = completeness.shards
    whose = f"{len(shards)} shards" if len(shards) > 1 else f"shard {shards[0].shard}"
    count = f"{completeness.entries:,} {'entry' if completeness.entries == 1 else 'entries'}"
    if completeness.complete:
        lines = [f"complete: {count} of {whose}, no gap"]
    else:
        lines = [f"INCOMPLETE: {count} of {whose}; missing: {_gaps_text(shards)}"]
        trimmed = [f"{shard.shard}:{shard.first}" for shard in shards if _begins_late(shard)]
        if trimmed:
            more = f", and {len(trimmed) - SHARDS_SHOWN} shards more" if len(trimmed) > SHARDS_SHOWN else ""
            begins = ", ".join(trimmed[:SHARDS_SHOWN])
            lines.append(f"the store's ledger begins at {begins}{more}; what was trimmed before is in the archive")
    used = [shard for shard in shards if shard.entries]
    if used:
        ranges = [f"{shard.shard}:{shard.first}-{shard.last}" for shard in used[:SHARDS_SHOWN]]
        more = f", and {len(used) - SHARDS_SHOWN} shards more" if len(used) > SHARDS_SHOWN else ""
        lines.append(f"entries by shard: {', '.join(ranges)}{more}")
    for shard in shards:
        if shard.state_last != shard.ledger_last:
            lines.append(
                f"shard {shard.shard}: its state counts {shard.state_last} entries, its ledger ends at"
                f" {shard.ledger_last}; see meterlib doctor"
            )
        if len(shard.epochs) > 1:
            lines.append(f"shard {shard.shard}: the ledger was begun anew, epochs {', '.join(shard.epochs)}")
    counted = ""
    if isinstance(report, Report):
        total = report.total()
        counted = f", late {total['late']:,}, expired {total['expired']:,}, partial {total['partial']:,}"
    lines.append(f"open reservations {completeness.open_reservations:,} (their usage is not in yet){counted}")
    width = terminal_width()
    return [
        part for line in lines for part in textwrap.wrap(line, width, subsequent_indent="  ", break_on_hyphens=False)
    ]


def _begins_late(shard: ShardCompleteness) -> bool:
    """Whether what is missing, first of all, is what came before the store's first entry: it may have been trimmed."""
    return bool(shard.gaps) and shard.gaps[0].first == 1 and shard.gaps[0].last == shard.first - 1


def _gaps_text(shards: Sequence[ShardCompleteness]) -> str:
    gaps = [f"{shard.shard}:{gap}" for shard in shards for gap in shard.gaps]
    more = f" and {len(gaps) - GAPS_SHOWN} gaps more" if len(gaps) > GAPS_SHOWN else ""
    return ", ".join(gaps[:GAPS_SHOWN]) + more


def _print_hints(report: Report | Estimates, config: Config) -> None:
    """A word that was mistyped names an attribute that no call has: say so."""
    rows = report.rows()
    for at, name in enumerate(report.by):
        if rows and name not in DIMENSIONS and all(row.group[at] is None for row in rows):
            print(f"meterlib: no entry has an attribute {name!r}{_hint(name, DIMENSIONS)}", file=sys.stderr)
    if report.tenant is not None and not report.entries:
        names = [tenant.name for tenant in config.tenant]
        known = "" if report.tenant in names else _hint(report.tenant, names)
        print(f"meterlib: there are no entries of tenant {report.tenant!r}{known}", file=sys.stderr)


def _hint(name: str, known: Sequence[Any]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
