"""`meterlib report`: usage, cost, invoices and limits, grouped by anything, and whether anything is missing."""

from __future__ import annotations

import argparse

from meterlib.cli import reconcile, report_archive, report_live, report_options
from meterlib.errors import InvalidInput

HELP = """\
Add up what was used, from the ledger, and say whether an entry is missing.

Without a word behind it, `meterlib report` asks the store. The reports below ask
the archive that `meterlib export run` fills, and what they say does not change
any more: the same archive gives the same bytes.

  usage       what was used
  cost        what that costs: list, contracted, billed and upstream, and margin
  invoice     what one tenant owes for a month, line by line
  limits      how good estimates were, and what was reserved and never settled
  retries     which calls took several tries, and what the failed ones used
  reconcile   where the provider's own numbers differ, and why

From the store, rows can be grouped by tenant, provider, model, kind, funding,
quality, day and hour, and by any attribute of the calls (attribute:NAME, or just
NAME). A row has

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
  meterlib report cost --period 2026-10 --by tenant,model
  meterlib report invoice --tenant acme --period 2026-10

exit codes: 0 ok; 1 the store failed; 2 wrong usage or configuration;
3 an entry or a price is missing (only with --strict); 5 the archive is damaged
"""


REPORTS = {
    "usage": "what was used, from the archive",
    "cost": "what it costs, from the archive",
    "invoice": "what a tenant owes for a month",
    "limits": "how good estimates were, from the archive",
    "retries": "what was tried again, and what that used, from the archive",
    "reconcile": "where the provider's numbers differ, and why",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `meterlib report`, and those of each report that has a name of its own."""
    report_live.add_arguments(parser)
    reports = parser.add_subparsers(dest="report", metavar="REPORT", title="reports")
    for name, summary in REPORTS.items():
        text = reconcile.HELP if name == "reconcile" else report_options.HELPS[name]
        description, _, epilog = (part.strip("\n") for part in text.partition("\n---\n"))
        own = reports.add_parser(
            name,
            help=summary,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name == "reconcile":
            reconcile.add_arguments(own)
        else:
            report_options.add_arguments(own, name)


def run(arguments: argparse.Namespace) -> int:
    """Print a report; returns the exit code."""
    if arguments.report is None:
        return report_live.run(report_live.own(arguments))
    misplaced = report_live.given(arguments)
    if misplaced:
        problem = f"it goes behind the report's name: meterlib report {arguments.report} {misplaced[0]} …"
        raise InvalidInput(misplaced[0], problem)
    return reconcile.run(arguments) if arguments.report == "reconcile" else report_archive.run(arguments)
