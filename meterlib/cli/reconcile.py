"""`meterlib report reconcile`: the provider's own reports beside the archive, each difference with its cause."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from meterlib.billing import duck
from meterlib.billing.archive.archive import Archive
from meterlib.billing.postings.postings import Postings
from meterlib.billing.reconcile.cells import MEASURES, Cell, CostCell, moment_text
from meterlib.billing.reconcile.files import read_reports
from meterlib.billing.reconcile.ids import IdMap, Scope
from meterlib.billing.reconcile.money import MoneyDifference
from meterlib.billing.reconcile.reconcile import CAUSES, Cause, Difference, Evidence
from meterlib.billing.reconcile.reconciliation import HARMLESS, Reconciliation, Sides, reconcile
from meterlib.cli.exits import OK, OUTSIDE_TOLERANCE
from meterlib.cli.options import add_archive, add_config, archive_folder, moment_ms, whole_number
from meterlib.cli.progress import Phases
from meterlib.cli.tables import Column, print_table
from meterlib.config import Config
from meterlib.core.money import EXACT, ZERO, plain

HELP = """\
Compare the archive with the provider's usage and cost reports, from files, and
say why they differ. Anthropic's reports are read in both shapes: the Usage &
Cost Admin API's (buckets with results) and the Usage & Cost Analytics API's
(rows with a group). A file has pages one behind the other, a list of them, or a
bucket or row a line; give --provider-file for each file.

Tokens are compared first, by bucket and whatever the report tells apart (model,
service tier, speed, inference geo); then money, where the report has any. Calls
count in the bucket in which they began. Each difference has a cause:

  timing              counted in a neighbouring bucket; it cancels out there
  aborted             calls cut short, or never settled: the provider knows more
  missing_iterations  passes within calls that one side does not have
  cache_split         cache writes of another time to live than was known
  outside_gateway     usage that did not go through the gateway
  priority_tier       cost reports leave the priority tier out
  code_execution      charged by the provider, and not in usage reports
  unpriced            no book has a price for it
  price               the same tokens at another price than the book's
  unknown             nothing in the ledger explains it

Hosted calls count. With --map, those that it assigns to the provider's keys or
workspaces count instead, and only these keys and workspaces of the report:

  [api_keys]                      # the report needs group_by[]=api_key_id
  apikey_01AbC = ["acme", "initech"]           # tenants
  apikey_01DeF = { tenant = "globex", funding = "own" }
  [workspaces]                    # the report needs group_by[]=workspace_id
  default = { key = "9f86d081" }  # as calls' attribute `key` has it
---
examples:
  meterlib report reconcile --provider-file usage.json
  meterlib report reconcile --provider-file usage.json --provider-file cost.json
  meterlib report reconcile --provider-file u.jsonl --tolerance-percent 0.1
  meterlib report reconcile --provider-file u.jsonl --format json

exit codes: 0 both sides agree within the tolerance; 1 a file cannot be read;
2 wrong usage, or a file is no such report; 4 they do not; 5 the archive's files
do not fit together
"""
SHOWN = 3
TOLERANCE_CENTS = Decimal(1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `meterlib report reconcile`."""
    parser.add_argument(
        "--provider-file", action="append", required=True, metavar="FILE",
        help="a usage or cost report of the provider; may be repeated",
    )  # fmt: skip
    parser.add_argument("--map", metavar="FILE", help="which calls go out with which of the provider's keys (TOML)")
    parser.add_argument(
        "--provider", default="anthropic", metavar="NAME", help="whose calls count (default: anthropic)"
    )
    parser.add_argument(
        "--funding", choices=("hosted", "own", "all"), default="hosted", help="whose calls count without a map"
    )
    parser.add_argument(
        "--since", metavar="TIME", help="from when the report was asked for, if its first hours are quiet"
    )
    parser.add_argument("--until", metavar="TIME", help="until when, likewise; excluded")
    parser.add_argument(
        "--tolerance-tokens", type=whole_number, default=0, metavar="N", help="tokens that may differ (default: 0)"
    )
    parser.add_argument(
        "--tolerance-cents", type=_decimal, default=TOLERANCE_CENTS, metavar="N",
        help=f"hundredths of the currency that may differ (default: {TOLERANCE_CENTS})",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance-percent", type=_decimal, default=ZERO, metavar="P",
        help="or so much of the provider's total, of tokens and of money (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--accept", action="append", choices=sorted(CAUSES), default=[], metavar="CAUSE",
        help="differences of this cause do not count against the tolerance, as timing never does; may be repeated",
    )  # fmt: skip
    parser.add_argument("--format", choices=("table", "json", "csv"), default="table", help="default: table")
    add_archive(parser)
    add_config(parser)


def _decimal(text: str) -> Decimal:
    try:
        number = Decimal(text)
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite() or number < 0:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no number of 0 or more")
    return number


def run(arguments: argparse.Namespace) -> int:
    """Compare and print; returns the exit code."""
    config = Config.find(arguments.config)
    path = archive_folder(arguments, config)
    with Phases() as phases, Archive(path, config.billing.segment_entries) as archive:
        phases("reading the provider's reports")
        sides = _sides(arguments)
        phases("looking at the archive's files")
        postings = Postings(archive, config.billing.tz)
        found = postings.steady(lambda: _reconciled(postings, sides, phases))
        behind = sum(postings.unrated().values())
    if behind:
        print(f"meterlib: {behind:,} archived entries are not rated yet: run `meterlib rate` first", file=sys.stderr)
    verdict = _Verdict(found, arguments)
    print_as = {"table": _print_table, "json": _print_json, "csv": _print_csv}
    print_as[arguments.format](found, verdict)
    return OK if verdict.agrees else OUTSIDE_TOLERANCE


def _sides(arguments: argparse.Namespace) -> Sides:
    ids = IdMap({}, {}) if arguments.map is None else IdMap.load(Path(arguments.map))
    return Sides(
        told=read_reports(map(Path, arguments.provider_file)),
        scope=Scope(provider=arguments.provider, payer=arguments.funding, ids=ids),
        since_ms=None if arguments.since is None else moment_ms(arguments.since, "UTC", "--since"),
        until_ms=None if arguments.until is None else moment_ms(arguments.until, "UTC", "--until"),
    )


def _reconciled(postings: Postings, sides: Sides, phases: Phases) -> Reconciliation:
    """Both sides compared, in one look at the archive."""
    phases(f"going through {postings.count():,} entries")
    with TemporaryDirectory(prefix="meterlib-reconcile-") as scratch:
        database = duck.connect(Path(scratch))
        try:
            return reconcile(database, postings.entries_sql(), postings.rows_sql(), sides, phases)
        finally:
            database.close()


class _Verdict:
    """Whether what differs is within the tolerance."""

    def __init__(self, found: Reconciliation, arguments: argparse.Namespace) -> None:
        self.accepted: set[Cause] = {*HARMLESS, *arguments.accept}
        self.tokens = found.tokens_off(self.accepted)
        self.cents = found.cents_off(self.accepted)
        share = EXACT.scaleb(arguments.tolerance_percent, -2)
        self.tokens_max = max(Decimal(arguments.tolerance_tokens), share * sum(found.told or ()))
        self.cents_max = max(arguments.tolerance_cents, share * abs(found.told_cents or ZERO))

    @property
    def agrees(self) -> bool:
        """Whether both do."""
        return self.tokens <= self.tokens_max and self.cents <= self.cents_max


# ── Output ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _print_table(found: Reconciliation, verdict: _Verdict) -> None:
    span = f"{moment_text(found.start_ms)} until {moment_text(found.end_ms)}"
    print(f"the provider's report less the archive, {span}, by {', '.join(found.by) or 'time alone'} (UTC)\n")
    if found.tokens:
        columns = [Column("from", key=True), *(Column(name, key=True) for name in found.by), Column("cause", key=True)]
        columns += [*(Column(name.replace("_", " "), number=True) for name in MEASURES), Column("entries")]
        print_table(columns, [_token_row(found, one) for one in found.tokens])
        print()
    if found.money:
        columns = [Column("from", key=True), *(Column(name, key=True) for name in found.by), Column("of", key=True)]
        columns += [
            Column("cause", key=True),
            Column(f"{found.currency} cents", number=True),
            Column("why"),
            Column("entries"),
        ]
        print_table(columns, [_money_row(found, one) for one in found.money])
        print()
    for line in _summary(found, verdict):
        print(line)
    for note in found.notes:
        print(f"meterlib: {note}", file=sys.stderr)


def _token_row(found: Reconciliation, one: Difference) -> list[str]:
    counts = [f"{count:+,}" if count else "" for count in one.counts]
    return [*_where(found, one.cell), one.cause, *counts, _entries(one.evidence)]


def _money_row(found: Reconciliation, one: MoneyDifference) -> list[str]:
    kind = one.cell.kind or "all"
    return [*_where(found, one.cell), kind, one.cause, f"{one.amount:+,.4f}", one.how, _entries(one.evidence)]


def _where(found: Reconciliation, cell: Cell | CostCell) -> list[str]:
    return [moment_text(cell.start_ms), *(getattr(cell.group, name) or "-" for name in found.by)]


def _entries(evidence: Sequence[Evidence]) -> str:
    shown = [f"{call.shard}:{call.n} {call.request_id or call.reservation_id}".strip() for call, _ in evidence[:SHOWN]]
    more = f" and {len(evidence) - SHOWN:,} more" if len(evidence) > SHOWN else ""
    return ", ".join(shown) + more


def _summary(found: Reconciliation, verdict: _Verdict) -> list[str]:
    lines = []
    if found.told is not None:
        told, ours = sum(found.told[:5]), sum(found.ours[:5])
        lines.append(f"tokens: the provider {told:,}, the archive {ours:,}, difference {told - ours:+,}")
    if found.told_cents is not None:
        off = found.told_cents - found.our_cents
        lines.append(
            f"money in {found.currency} cents: the provider {plain(found.told_cents)}, the archive"
            f" {plain(found.our_cents)}, difference {plain(off)}"
        )
    for cause in CAUSES:
        tokens = sum(one.size for one in found.tokens if one.cause == cause)
        cents = sum((abs(one.amount) for one in found.money if one.cause == cause), ZERO)
        if tokens or cents:
            counted = "" if cause not in verdict.accepted else "; not counted"
            lines.append(f"  {cause}: {tokens:,} tokens, {plain(cents)} cents ({CAUSES[cause]}{counted})")
    state = "agree" if verdict.agrees else "DO NOT AGREE"
    lines.append(
        f"both sides {state}: {verdict.tokens:,} tokens and {plain(verdict.cents)} cents count, within"
        f" {plain(verdict.tokens_max)} and {plain(verdict.cents_max)} is tolerated"
    )
    return lines


def _print_json(found: Reconciliation, verdict: _Verdict) -> None:
    document = {
        "since": moment_text(found.start_ms),
        "until": moment_text(found.end_ms),
        "by": found.by,
        "agrees": verdict.agrees,
        "tokens": {
            "provider": None if found.told is None else _counts(found.told),
            "archive": _counts(found.ours),
            "counted": verdict.tokens,
            "tolerated": plain(verdict.tokens_max),
            "differences": [
                _cell(found, one.cell)
                | {
                    "cause": one.cause,
                    "counts": _counts(one.counts),
                    "how": one.how,
                    "entries": _evidence(one.evidence),
                }
                for one in found.tokens
            ],
        },
        "money": {
            "currency": found.currency,
            "provider_cents": None if found.told_cents is None else plain(found.told_cents),
            "archive_cents": plain(found.our_cents),
            "counted_cents": plain(verdict.cents),
            "tolerated_cents": plain(verdict.cents_max),
            "differences": [
                _cell(found, one.cell)
                | {"of": one.cell.kind or "all", "cause": one.cause, "cents": plain(one.amount), "how": one.how}
                | {"entries": _evidence(one.evidence)}
                for one in found.money
            ],
        },
        "notes": list(found.notes),
    }
    print(json.dumps(document, indent=2, ensure_ascii=False))


def _cell(found: Reconciliation, cell: Cell | CostCell) -> dict[str, Any]:
    span = {"since": moment_text(cell.start_ms), "until": moment_text(cell.end_ms)}
    return span | {name: getattr(cell.group, name) or None for name in found.by}


def _counts(counts: Sequence[int]) -> dict[str, int]:
    return dict(zip(MEASURES, counts, strict=True))


def _evidence(evidence: Sequence[Evidence]) -> list[dict[str, Any]]:
    return [
        {
            "entry": f"{call.shard}:{call.n}",
            "epoch": call.epoch,
            "reservation_id": call.reservation_id,
            "request_id": call.request_id or None,
            "tenant": call.tenant,
            "explains": None if counts is None else _counts(counts),
        }
        for call, counts in evidence
    ]


def _print_csv(found: Reconciliation, verdict: _Verdict) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["what", "since", "until", *found.by, "of", "cause", *MEASURES, "cents", "how", "entries"])
    for one in found.tokens:
        cell = _cell(found, one.cell)
        row = ["tokens", *cell.values(), "", one.cause, *one.counts, "", one.how, _all_entries(one.evidence)]
        writer.writerow(map(_safe, row))
    for money in found.money:
        cell = _cell(found, money.cell)
        row = ["money", *cell.values(), money.cell.kind or "all", money.cause, *[""] * len(MEASURES)]
        writer.writerow(map(_safe, [*row, plain(money.amount), money.how, _all_entries(money.evidence)]))
    for line in [*_summary(found, verdict), *found.notes]:
        print(line, file=sys.stderr)


def _all_entries(evidence: Sequence[Evidence]) -> str:
    return " ".join(f"{call.shard}:{call.n}" for call, _ in evidence)


def _safe(value: object) -> object:
    """A text cell that no spreadsheet takes for a formula."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        try:
            Decimal(value)
        except InvalidOperation:
            return f"'{value}"
    return "" if value is None else value
