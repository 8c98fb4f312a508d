"""`meterlib report usage | cost | limits | invoice`: reports from the archive, which never say another thing later."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TextIO, get_args

import msgspec

from meterlib.billing.archive.archive import Archive
from meterlib.billing.focus.columns import Version
from meterlib.billing.focus.focus import Focus, check_issuer, write_billing_periods, write_focus
from meterlib.billing.page.facts import facts
from meterlib.billing.page.invoice import invoice_page
from meterlib.billing.page.page import page
from meterlib.billing.postings.postings import Postings
from meterlib.billing.reports.answers import Answer, Reader
from meterlib.billing.reports.cost import cost_report
from meterlib.billing.reports.denied import Denied, denied
from meterlib.billing.reports.evidence import Evidence, evidence, unknown_names
from meterlib.billing.reports.invoice import Invoice, invoice
from meterlib.billing.reports.limits import limits_report
from meterlib.billing.reports.query import BASES, TIMES, WORDS, Query, name_of
from meterlib.billing.reports.usage import usage_report
from meterlib.cli import bundles, report_live
from meterlib.cli.exits import INCOMPLETE, OK
from meterlib.cli.options import add_config, moment_ms
from meterlib.cli.report_evidence import asked, evidence_lines
from meterlib.cli.report_formats import dumped, hint, json_object, output, put, write_csv, write_jsonl
from meterlib.cli.report_invoice import invoice_csv, invoice_document, print_invoice
from meterlib.cli.report_tables import print_answer, print_denials
from meterlib.cli.times import at_text
from meterlib.config import Config
from meterlib.core.checks import check_tenant
from meterlib.errors import InvalidInput

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
  funding, tier, speed, variant (both), geo, token_type, hour, day, week, month,
  and any attribute of calls: attribute:NAME, or just NAME"""
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
"""
    ),
}
_PLAIN = ("table", "json", "jsonl", "csv", "parquet")
_PERIODS = "focus-1.4-periods"
_FOCUS = (*(f"focus-{version}" for version in get_args(Version)), _PERIODS)
FORMATS = {
    "usage": (*_PLAIN, "html"),
    "cost": (*_PLAIN, "html", *_FOCUS),
    "invoice": ("table", "json", "csv", "html"),
    "limits": _PLAIN,
}
DEFAULT_BY = ("tenant", "model")


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the options of a report."""
    parser.add_argument("--archive", metavar="DIR", help="another archive than that of the settings")
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


def run(arguments: argparse.Namespace) -> int:
    """Print a report; returns the exit code."""
    if arguments.report == "usage" and arguments.live:
        return _live(arguments)
    config = Config.find(arguments.config)
    if arguments.format == "parquet" and arguments.output is None and sys.stdout.isatty():
        raise InvalidInput("--output", "Parquet is nothing to look at: name a file")
    path = Path(config.billing.archive if arguments.archive is None else arguments.archive)
    if not path.is_dir():
        problem = f"there is no archive {path}: `meterlib export run` makes it, `meterlib report` asks the store"
        raise InvalidInput("--archive", problem)
    with (
        _errors_of_options(),
        Archive(path) as archive,
        TemporaryDirectory(prefix="meterlib-report-") as scratch,
    ):
        postings = Postings(archive, config.billing.tz)
        asked_for = Asked(arguments, config, _query(arguments, config), Path(scratch))
        told = postings.steady(lambda: _look(asked_for, postings))
        with told.reader:
            _write(asked_for, told)
    return INCOMPLETE if arguments.strict and not told.evidence.sound else OK


@contextmanager
def _errors_of_options() -> Iterator[None]:
    """Errors about what is asked for name the option that asked; Ctrl-C is Ctrl-C, whoever noticed it."""
    try:
        yield
    except InvalidInput as error:
        if error.field in Query.__struct_fields__ or error.field in ("since", "until"):
            raise InvalidInput(f"--{error.field.replace('_', '-')}", str(error).partition(": ")[2]) from None
        raise
    except RuntimeError as error:
        if "interrupted" in str(error).lower():  # as DuckDB calls Ctrl-C
            raise KeyboardInterrupt from None
        raise


def _live(arguments: argparse.Namespace) -> int:
    """The report that the store makes, from the options that it knows."""
    for option, default in (("period", None), ("archive", None), ("output", None), ("time_basis", "booked")):
        if getattr(arguments, option) != default or arguments.offline:
            name = "offline" if arguments.offline else option.replace("_", "-")
            raise InvalidInput(f"--{name}", "is about the archive, and --live is not")
    if arguments.format not in ("table", "json", "csv"):
        raise InvalidInput("--format", f"{arguments.format} is made from the archive, and --live is not")
    arguments.estimates = False
    return report_live.run(arguments)


def _query(arguments: argparse.Namespace, config: Config) -> Query:
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


# ── Working it out ────────────────────────────────────────────────────────────────────────────────────────────────────


class Asked(NamedTuple):
    """What is asked for, and a folder for what is temporary."""

    arguments: argparse.Namespace
    config: Config
    query: Query
    scratch: Path


class Told(NamedTuple):
    """A report, ready to be written down. What `answer` says is still in the reader; `file` is written already."""

    reader: Reader
    evidence: Evidence
    answer: Answer | None = None
    invoice: Invoice | None = None
    file: Path | None = None
    denials: Sequence[Denied] = ()


def _look(asked_for: Asked, postings: Postings) -> Told:
    """Work a report out, from one look at the archive."""
    tails, store = asked(asked_for.config, asked_for.arguments, postings, asked_for.query)
    reader = Reader(postings, postings.tz)
    try:
        told, unpriced = _told(asked_for, postings, reader)
        found = evidence(reader, postings, asked_for.query, tails=tails, store=store, unpriced=unpriced)
        if asked_for.arguments.format == "html":
            told["file"].write_text(_page(asked_for, reader, found, told.get("invoice")), encoding="utf-8")
        return Told(reader, found, **told)
    except BaseException:
        reader.close()
        raise


def _told(asked_for: Asked, postings: Postings, reader: Reader) -> tuple[dict[str, Any], int | None]:
    """The report itself, and how many of its lines have no price; None of a report without costs."""
    arguments, _, query, scratch = asked_for
    if arguments.report == "invoice":
        closed = query.period in {close.period for close in postings.closes}
        bill = invoice(reader, str(query.tenant), str(query.period), closed)
        if arguments.bundle is not None:
            bundles.write(Path(arguments.bundle), postings, bill, asked_for.config)
        page_file = {"file": scratch / "invoice.html"} if arguments.format == "html" else {}
        return {"invoice": bill, **page_file}, bill.unpriced
    if arguments.format in _FOCUS or arguments.format == "html":
        cost = cost_report(reader, msgspec.structs.replace(query, by=()))
        file = scratch / f"report{'.html' if arguments.format == 'html' else Path(arguments.output or '').suffix}"
        if arguments.format in _FOCUS:
            _write_focus(asked_for, postings, file)
        return {"file": file}, _unpriced(cost)
    if arguments.report == "usage":
        return {"answer": usage_report(reader, query, unknown_names(postings))}, None
    if arguments.report == "limits":
        return {"answer": limits_report(reader, query), "denials": denied(reader, query)}, None
    cost = cost_report(reader, query)
    return {"answer": cost}, _unpriced(cost)


def _unpriced(answer: Answer) -> int:
    return sum(int(str(totals["unpriced"])) for totals in answer.totals)


def _write_focus(asked_for: Asked, postings: Postings, file: Path) -> None:
    issuer = asked_for.config.billing.issuer
    check_issuer(issuer)
    if asked_for.arguments.format == _PERIODS:
        if file.suffix == ".parquet":
            raise InvalidInput("--output", "billing periods are written as CSV")
        with file.open("w", encoding="utf-8", newline="") as out:
            write_billing_periods(postings, str(issuer), out)
        return
    version: Any = asked_for.arguments.format.removeprefix("focus-")
    write_focus(postings, asked_for.query, Focus(version=version, issuer=str(issuer)), file)


def _page(asked_for: Asked, reader: Reader, found: Evidence, bill: Invoice | None) -> str:
    issuer, footer = asked_for.config.billing.issuer or "", evidence_lines(found)
    if bill is not None:
        return invoice_page(bill, issuer, footer)
    return page(facts(reader, asked_for.query, issuer=issuer, complete=found.complete, footer=footer))


# ── Writing it down ───────────────────────────────────────────────────────────────────────────────────────────────────


def _write(asked_for: Asked, told: Told) -> None:
    arguments = asked_for.arguments
    lines = evidence_lines(told.evidence)
    if arguments.format == "parquet" and told.answer is not None:
        file = asked_for.scratch / "report.parquet"
        told.answer.write_parquet(file, dumped(_document(asked_for, told, rows=False)))
        told = told._replace(file=file)
    if told.file is not None:
        put(told.file, arguments.output)
    else:
        with output(arguments.output) as out:
            _print(out, asked_for, told, lines)
    if arguments.format in ("csv", "parquet", *_FOCUS):
        for line in lines:
            print(line, file=sys.stderr)
    if told.answer is not None:
        _print_hints(asked_for, told.answer, told.evidence)


def _print(out: TextIO, asked_for: Asked, told: Told, lines: Sequence[str]) -> None:
    shape = asked_for.arguments.format
    if shape == "json":
        print(dumped(_document(asked_for, told), indent=2), file=out)
    elif told.invoice is not None:
        (print_invoice if shape == "table" else invoice_csv)(out, told.invoice)
    elif told.answer is not None:
        if shape == "table":
            print_answer(out, asked_for.arguments.report, told.answer)
            print_denials(out, told.denials)
        elif shape == "csv":
            write_csv(out, told.answer.columns, told.answer.rows())
        else:
            last = _document(asked_for, told, rows=False)
            write_jsonl(out, told.answer, [{name: last[name]} for name in last if name not in _head(asked_for)])
    if shape == "table":
        print("", *lines, sep="\n", file=out)


def _document(asked_for: Asked, told: Told, rows: bool = True) -> dict[str, Any]:
    """A report as JSON has it; of costs there is a total for each currency."""
    completeness = {"completeness": msgspec.to_builtins(told.evidence)}
    if told.invoice is not None:
        return invoice_document(told.invoice) | completeness
    document = _head(asked_for)
    if told.answer is not None:
        names = [column.name for column in told.answer.columns]
        if rows:
            document["rows"] = [json_object(names, row) for row in told.answer.rows()]
        totals = [json_object(one, one.values()) for one in told.answer.totals]
        document |= {"totals": totals} if asked_for.arguments.report == "cost" else {"total": totals[0]}
    if asked_for.arguments.report == "limits":
        document["denials"] = msgspec.to_builtins(told.denials)
    return document | completeness


def _head(asked_for: Asked) -> dict[str, Any]:
    query = asked_for.query
    since_ms, until_ms = query.bounds(asked_for.config.billing.tz)
    return {
        "report": asked_for.arguments.report,
        "by": [name_of(word) for word in query.by],
        "tz": query.tz,
        "time_basis": query.time_basis,
        "period": query.period,
        "since": None if since_ms is None else at_text(since_ms, query.tz),
        "until": None if until_ms is None else at_text(until_ms, query.tz),
        "tenant": query.tenant,
    }


def _print_hints(asked_for: Asked, answer: Answer, found: Evidence) -> None:
    """A word that was mistyped names an attribute that no call has: say so."""
    for name in answer.never_told():
        print(f"meterlib: no entry has an attribute {name!r}{hint(name, [*WORDS, *TIMES])}", file=sys.stderr)
    tenant = asked_for.query.tenant
    if tenant is not None and not answer.count():
        names = [told.name for told in asked_for.config.tenant]
        known = "" if tenant in names else hint(tenant, names)
        print(f"meterlib: there is nothing of tenant {tenant!r}{known}", file=sys.stderr)
