"""The reports from the archive as they are asked for: what they tell, their options, and the query made of them."""

from __future__ import annotations

import argparse
from typing import get_args

from meterlib.billing.focus.columns import Version
from meterlib.billing.reports.query import BASES, Query
from meterlib.cli.options import add_archive, add_config, moment_ms
from meterlib.config import Config
from meterlib.core.checks import check_tenant

_COMMON = """
Entries are put into times by when they were booked, as bills go; with
--time-basis event by when the call was made. --since is included, --until is
not. Days, weeks and months are those of --tz, on days of 23 and 25 hours too.

The last lines say what the report was made of, whether anything is missing from
it, and the digest of what was read: the same archive gives the same bytes. In
CSV, Parquet and FOCUS they go to standard error.
---
examples:
{examples}
exit codes: 0 ok; 1 the disk failed; 2 wrong usage or configuration; 3 an entry or
a price is missing (only with --strict); 5 the archive is damaged
"""
_WORDS = """\
  tenant, provider, model (that was billed), requested_model, kind, quality,
  funding, tier, speed, variant (both), geo, token_type, prompt (a digest of it),
  hour, day, week, month, and any attribute of calls: attribute:NAME, or just NAME"""
HELPS = {
    "usage": f"""\
Add up what was used, from the archive. Rows have the columns of `meterlib report`,
and how much was written to caches of which nobody told how long they last. They
are grouped by

{_WORDS}

With --live the store is asked, as `meterlib report` does.
"""
    + _COMMON.format(
        examples="""\
  meterlib report usage --by tenant,model --period 2026-10
  meterlib report usage --by tenant --by day --tz Europe/Berlin --format csv
  meterlib report usage --by model,token_type --since 2026-10-01 --format jsonl
"""
    ),
    "cost": f"""\
Add up what usage costs, exactly, at the prices that it was rated at once:

  list_cost         by the price book
  contracted_cost   by the customer's terms
  billed_cost       what the customer owes; 0 where its own key paid
  upstream_cost     what is owed to the provider
  margin            billed less upstream
  unpriced          lines without a price: costs are at least what is said then,
                    and none is told where no line has a price
  at_least          of a total: whether any line of the report has no price

Rows are grouped by

{_WORDS};
  charge (usage, platform_fee), price_source, period, corrects
"""
    + _COMMON.format(
        examples="""\
  meterlib report cost --by tenant --period 2026-10 --strict
  meterlib report cost --by tenant,model,day --tz Europe/Berlin --format parquet --output cost.parquet
  meterlib report cost --format focus-1.2 --period 2026-10 --output october.csv
  meterlib report cost --format focus-1.4-periods
  meterlib report cost --format html --output october.html
"""
    ),
    "invoice": """\
What one tenant owes for a month: a line for each model, type of token and price,
with quantity, unit price and amount; platform fees and corrections of closed
months apart; and what its own key paid for, at list price and billed 0.

Amounts are exact until here. Each line is rounded half to even to what can be
paid, and so is the exact sum; a line `rounding` makes them agree.
"""
    + _COMMON.format(
        examples="""\
  meterlib report invoice --tenant acme --period 2026-10
  meterlib report invoice --tenant acme --period 2026-10 --format json --strict
  meterlib report invoice --tenant acme --period 2026-10 --format html --output invoice.html
  meterlib report invoice --tenant acme --period 2026-10 --format parquet --output invoice.parquet
  meterlib report invoice --tenant acme --period 2026-10 --bundle invoice.zip
"""
    ),
    "limits": """\
Tell how good the estimates before the calls were, and what became of what was
held:

  calls             settled ones of which the estimate and the input are known
  over              those that were charged more input than was estimated
  overrun_percent   how much more, of all that was estimated
  median, p95       charged input divided by its estimate, as --estimates says
  expired           reservations that were never settled
  tokens_at_risk    what was estimated of those
  late, partial     calls that were settled too late, or cut short
"""
    + _COMMON.format(
        examples="""\
  meterlib report limits --by model
  meterlib report limits --by tenant,day --since 2026-10-01
  meterlib report limits --by tenant --format html --output limits.html
"""
    ),
    "retries": """\
Tell how often calls were made again because their answer did not come, by the
digests of prompts that the gateway notes:

  calls              those that somebody wanted an answer to
  retried            those of them that took several tries
  tries              how many all of them took
  gave_up_streaming  those whose stream broke, and that were made in one piece then
  unanswered         those whose last try failed, too
  extra_…            what was used by all tries of a call but the last

A try counts as another of the same call if the one before failed its caller, and
ended less than 10 minutes before. Denied calls are none: nothing was sent.
"""
    + _COMMON.format(
        examples="""\
  meterlib report retries --by model
  meterlib report retries --by tenant,session,prompt --since 2026-10-01
"""
    ),
}
_PLAIN = ("table", "json", "jsonl", "csv", "parquet")
PERIODS = "focus-1.4-periods"
FOCUS = (*(f"focus-{version}" for version in get_args(Version)), PERIODS)
FORMATS = {
    "usage": (*_PLAIN, "html"),
    "cost": (*_PLAIN, "html", *FOCUS),
    "invoice": (*_PLAIN, "html"),
    "limits": (*_PLAIN, "html"),
    "retries": (*_PLAIN, "html"),
}
DEFAULT_BY = ("tenant", "model")


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the options of a report."""
    add_archive(parser)
    if name == "invoice":
        parser.add_argument("--tenant", metavar="T", required=True, help="whose invoice")
        parser.add_argument("--period", metavar="YYYY-MM", required=True, help="of which month")
        parser.add_argument("--bundle", metavar="FILE", help="write what is needed to check the invoice, as a zip file")
    else:
        _add_query(parser)
    if name == "usage":
        parser.add_argument("--live", action="store_true", help="ask the store in place of the archive")
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--format", choices=FORMATS[name], default="table", help="default: table")
    formats.add_argument("--json", dest="format", action="store_const", const="json", help="the same as --format json")
    parser.add_argument("--output", metavar="FILE", help="write there, in place of standard output")
    parser.add_argument("--offline", action="store_true", help="do not ask the store what is not exported yet")
    parser.add_argument("--strict", action="store_true", help="exit with 3 if an entry or a price is missing")
    add_config(parser)


def _add_query(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--by",
        action="append",
        metavar="X",
        help="group by X, or by several: X,Y; may be repeated (default: tenant,model)",
    )
    parser.add_argument("--since", metavar="ISO", help="leave out what came before this date or time")
    parser.add_argument("--until", metavar="ISO", help="leave out what came at this date or time, or later")
    parser.add_argument("--period", metavar="YYYY-MM", help="a billing period, in place of --since and --until")
    parser.add_argument(
        "--tz", metavar="IANA", help="zone of days, hours, --since and --until (default: that of billing periods)"
    )
    parser.add_argument("--time-basis", choices=BASES, default="booked", help="default: booked")
    parser.add_argument("--tenant", metavar="T", help="only this tenant")


def query_of(arguments: argparse.Namespace, config: Config) -> Query:
    """What is asked for.

    Raises:
        InvalidInput: an option says something that cannot be.
    """
    if arguments.tenant is not None:
        check_tenant(arguments.tenant)
    if arguments.report == "invoice":
        return Query(tenant=arguments.tenant, period=arguments.period, tz=config.billing.tz)
    tz = Query(tz=config.billing.tz if arguments.tz is None else arguments.tz).tz
    return Query(
        since_ms=None if arguments.since is None else moment_ms(arguments.since, tz, "--since"),
        until_ms=None if arguments.until is None else moment_ms(arguments.until, tz, "--until"),
        tenant=arguments.tenant,
        by=tuple(word.strip() for words in arguments.by or DEFAULT_BY for word in words.split(",")),
        tz=tz,
        time_basis=arguments.time_basis,
        period=arguments.period,
    )
