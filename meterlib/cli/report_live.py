"""`meterlib report` without a word behind it: usage from the store's own ledger, and whether an entry is missing."""

from __future__ import annotations

import argparse
import csv
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from meterlib.billing.reports.estimates import Accuracy, Estimates
from meterlib.billing.reports.report import (
    DIMENSIONS,
    Completeness,
    Group,
    Report,
    ShardCheck,
    ShardCompleteness,
    check_zone,
)
from meterlib.cli.exits import INCOMPLETE, OK
from meterlib.cli.options import moment_ms
from meterlib.cli.progress import Progress
from meterlib.cli.report_formats import hint, safe_cell
from meterlib.cli.store import Store, opened
from meterlib.cli.tables import Column, print_table
from meterlib.cli.times import at_text, terminal_width
from meterlib.config import Config
from meterlib.core.checks import check_tenant
from meterlib.errors import InvalidInput

DEFAULT_BY = ("tenant", "model")
GAPS_SHOWN = 10
SHARDS_SHOWN = 16

HEADINGS = {
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
ALWAYS_SHOWN = ("calls", "input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens")


_OWN = "live_"
"""Before the names of this report's options, which stand beside those of the reports that have a name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a report from the store; none has a default, so that one that is given shows."""

    def add(to: Any, option: str, **how: Any) -> None:
        to.add_argument(option, dest=_OWN + how.pop("dest", option.strip("-")), **how)

    add(
        parser, "--by", action="append", metavar="X",
        help="group by X, or by several: X,Y; may be repeated (default: tenant,model)",
    )  # fmt: skip
    add(parser, "--since", metavar="ISO", help="leave out what was booked before this date or time")
    add(parser, "--until", metavar="ISO", help="leave out what was booked at this date or time, or later")
    add(parser, "--tz", metavar="IANA", help="zone of days, hours, --since and --until (default: UTC)")
    add(parser, "--tenant", metavar="T", help="only this tenant")
    add(
        parser, "--estimates", action="store_true",
        help="tell how charges compare with their estimates, in place of usage",
    )  # fmt: skip
    formats = parser.add_mutually_exclusive_group()
    add(formats, "--format", choices=("table", "json", "csv"), help="default: table")
    add(formats, "--json", dest="format", action="store_const", const="json", help="the same as --format json")
    add(parser, "--strict", action="store_true", help="exit with 3 if an entry is missing")
    add(
        parser, "--config", metavar="FILE",
        help="the settings; by default meterlib.toml in this folder, if there is one",
    )  # fmt: skip


def given(arguments: argparse.Namespace) -> list[str]:
    """The options of this report that were given."""
    found = [name for name, value in vars(arguments).items() if value and name.startswith(_OWN)]
    return [f"--{name.removeprefix(_OWN)}" for name in found]


def own(arguments: argparse.Namespace) -> argparse.Namespace:
    """The options of this report by their names."""
    told = {name.removeprefix(_OWN): value for name, value in vars(arguments).items() if name.startswith(_OWN)}
    return argparse.Namespace(**told)


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
    tz: str = check_zone(arguments.tz or "UTC")
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
        always = ALWAYS_SHOWN if isinstance(report, Report) else columns
        told = [column for column in columns if any(numbers[column] for _, numbers in rows)]
        shown = [*always, *(column for column in told if column not in always)]
        keys = [Column(name, key=True) for name in report.by]
        headings = [Column(HEADINGS.get(column, column), number=True) for column in shown]
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
        writer.writerow([*map(safe_cell, group), *numbers.values()])
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
            print(f"meterlib: no entry has an attribute {name!r}{hint(name, DIMENSIONS)}", file=sys.stderr)
    if report.tenant is not None and not report.entries:
        names = [tenant.name for tenant in config.tenant]
        known = "" if report.tenant in names else hint(report.tenant, names)
        print(f"meterlib: there are no entries of tenant {report.tenant!r}{known}", file=sys.stderr)
