"""`meterlib report usage | cost | limits | invoice`: reports from the archive, which never say another thing later."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, NamedTuple, TextIO

import msgspec

from meterlib.billing import duck
from meterlib.billing.archive.archive import Archive
from meterlib.billing.focus.focus import Focus, check_issuer, write_billing_periods, write_focus
from meterlib.billing.page.answer import answer_page
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
from meterlib.billing.reports.query import TIMES, WORDS, Query, name_of
from meterlib.billing.reports.retries import retries_report
from meterlib.billing.reports.usage import usage_report
from meterlib.cli import bundles, report_live
from meterlib.cli.exits import INCOMPLETE, OK
from meterlib.cli.options import archive_folder
from meterlib.cli.progress import Phases
from meterlib.cli.report_evidence import asked, evidence_lines
from meterlib.cli.report_formats import check_place, dumped, hint, json_object, output, put, write_csv, write_jsonl
from meterlib.cli.report_invoice import (
    invoice_csv,
    invoice_document,
    invoice_jsonl,
    invoice_parquet,
    print_invoice,
)
from meterlib.cli.report_options import FOCUS, PERIODS, query_of
from meterlib.cli.report_tables import is_floor, print_answer, print_denials, shown
from meterlib.cli.times import at_text
from meterlib.config import Config
from meterlib.errors import InvalidInput


def run(arguments: argparse.Namespace) -> int:
    """Print a report; returns the exit code."""
    if arguments.report == "usage" and arguments.live:
        return _live(arguments)
    config = Config.find(arguments.config)
    if arguments.format == "parquet" and arguments.output is None and sys.stdout.isatty():
        raise InvalidInput("--output", "Parquet is nothing to look at: name a file")
    path = archive_folder(arguments, config)
    if arguments.output is not None:
        check_place("--output", Path(arguments.output))
    if arguments.report == "invoice" and arguments.bundle is not None:
        bundles.check_place_of(Path(arguments.bundle))
    with (
        _errors_of_options(),
        _ctrl_c_ends_queries(),
        Archive(path) as archive,
        TemporaryDirectory(prefix="meterlib-report-") as scratch,
        Phases() as phases,
    ):
        asked_for = Asked(arguments, config, query_of(arguments, config), Path(scratch), phases)
        phases("looking at the archive's files")
        postings = Postings(archive, config.billing.tz)
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


@contextmanager
def _ctrl_c_ends_queries() -> Iterator[None]:
    """Whichever of DuckDB's threads is at it. A process that runs this inside, and handles Ctrl-C itself, does that."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        duck.interrupt()
        signal.default_int_handler(number, frame)

    in_front = threading.current_thread() is threading.main_thread()  # which alone may say what a signal does
    if not in_front or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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


# ── Working it out ────────────────────────────────────────────────────────────────────────────────────────────────────


class Asked(NamedTuple):
    """What is asked for, and a folder for what is temporary."""

    arguments: argparse.Namespace
    config: Config
    query: Query
    scratch: Path
    phases: Phases


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
    asked_for.phases("asking the store what is not exported yet")
    tails, store = asked(asked_for.config, asked_for.arguments, postings, asked_for.query)
    reader = Reader(postings, postings.tz)
    try:
        asked_for.phases(f"going through {postings.count():,} entries")
        told, unpriced = _told(asked_for, postings, reader)
        asked_for.phases("looking for what is missing")
        found = evidence(reader, postings, asked_for.query, tails=tails, store=store, unpriced=unpriced)
        result = Told(reader, found, **told)
        if asked_for.arguments.format == "html":
            asked_for.phases("drawing the page")
            page_file = asked_for.scratch / "page.html"
            page_file.write_text(_page(asked_for, result), encoding="utf-8")
            return result._replace(file=page_file)
        return result
    except BaseException:
        reader.close()
        raise


def _told(asked_for: Asked, postings: Postings, reader: Reader) -> tuple[dict[str, Any], int | None]:
    """The report itself, and how many of its lines have no price; None of a report without costs."""
    arguments, query, scratch = asked_for.arguments, asked_for.query, asked_for.scratch
    if arguments.report == "invoice":
        closed = query.period in {close.period for close in postings.closes}
        bill = invoice(reader, str(query.tenant), str(query.period), closed)
        if arguments.bundle is not None:
            asked_for.phases("gathering what the bundle needs")
            bundles.write(Path(arguments.bundle), postings, bill)
        return {"invoice": bill}, bill.unpriced
    if arguments.format in FOCUS or (arguments.format == "html" and arguments.report in ("usage", "cost")):
        cost = cost_report(reader, msgspec.structs.replace(query, by=()))
        if arguments.format == "html":
            return {}, _unpriced(cost)
        asked_for.phases("making FOCUS rows")
        file = scratch / f"report{Path(arguments.output or '').suffix}"
        _write_focus(asked_for, postings, file)
        return {"file": file}, _unpriced(cost)
    if arguments.report == "usage":
        return {"answer": usage_report(reader, query, unknown_names(postings))}, None
    if arguments.report == "limits":
        return {"answer": limits_report(reader, query), "denials": denied(reader, query)}, None
    if arguments.report == "retries":
        return {"answer": retries_report(reader, query)}, None
    cost = cost_report(reader, query)
    return {"answer": cost}, _unpriced(cost)


def _unpriced(answer: Answer) -> int:
    return sum(int(str(totals["unpriced"])) for totals in answer.totals)


def _write_focus(asked_for: Asked, postings: Postings, file: Path) -> None:
    issuer = asked_for.config.billing.issuer
    check_issuer(issuer)
    if asked_for.arguments.format == PERIODS:
        if file.suffix == ".parquet":
            raise InvalidInput("--output", "billing periods are written as CSV")
        with file.open("w", encoding="utf-8", newline="") as out:
            write_billing_periods(postings, str(issuer), out)
        return
    version: Any = asked_for.arguments.format.removeprefix("focus-")
    write_focus(postings, asked_for.query, Focus(version=version, issuer=str(issuer)), file)


def _page(asked_for: Asked, told: Told) -> str:
    issuer, footer = asked_for.config.billing.issuer or "", evidence_lines(told.evidence)
    if told.invoice is not None:
        return invoice_page(told.invoice, issuer, footer)
    if told.answer is not None:
        return answer_page(shown(asked_for.arguments.report, told.answer, told.denials, footer))
    complete = told.evidence.complete
    return page(facts(told.reader, asked_for.query, issuer=issuer, complete=complete, footer=footer))


# ── Writing it down ───────────────────────────────────────────────────────────────────────────────────────────────────


def _write(asked_for: Asked, told: Told) -> None:
    arguments = asked_for.arguments
    lines = evidence_lines(told.evidence)
    asked_for.phases("writing")
    if arguments.format == "parquet":
        file = asked_for.scratch / "report.parquet"
        metadata = dumped(_document(asked_for, told, rows=False))
        if told.answer is not None:
            told.answer.write_parquet(file, metadata)
        elif told.invoice is not None:
            invoice_parquet(file, told.reader.connection, told.invoice, metadata)
        told = told._replace(file=file)
    if arguments.output is None:
        asked_for.phases.done()
    if told.file is not None:
        put(told.file, arguments.output)
    else:
        with output(arguments.output) as out:
            _print(out, asked_for, told, lines)
    asked_for.phases.done()
    if arguments.format in ("csv", "parquet", *FOCUS):
        for line in lines:
            print(line, file=sys.stderr)
    _print_hints(asked_for, told)


def _print(out: TextIO, asked_for: Asked, told: Told, lines: Sequence[str]) -> None:
    shape = asked_for.arguments.format
    if shape == "json":
        print(dumped(_document(asked_for, told), indent=2), file=out)
    elif told.invoice is not None:
        if shape == "jsonl":
            invoice_jsonl(out, _document(asked_for, told))
        else:
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
        whole = invoice_document(told.invoice) | completeness
        return {name: whole[name] for name in whole if rows or name != "lines"}
    document = _head(asked_for)
    if told.answer is not None:
        names = [column.name for column in told.answer.columns]
        if rows:
            document["rows"] = [json_object(names, row) for row in told.answer.rows()]
        totals = [json_object(one, one.values()) for one in told.answer.totals]
        if asked_for.arguments.report == "cost":
            document["totals"] = [{**one, "at_least": is_floor(told.answer)} for one in totals]
        else:
            document["total"] = totals[0]
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


def _print_hints(asked_for: Asked, told: Told) -> None:
    """A word that was mistyped names an attribute that no call has, or a tenant that has no calls: say so."""
    for name in () if told.answer is None else told.answer.never_told():
        print(f"meterlib: no entry has an attribute {name!r}{hint(name, [*WORDS, *TIMES])}", file=sys.stderr)
    tenant = asked_for.query.tenant
    empty = (told.answer is not None and not told.answer.count()) or (
        told.invoice is not None and not told.invoice.lines
    )
    if tenant is not None and empty:
        names = [one.name for one in asked_for.config.tenant]
        known = "" if tenant in names else hint(tenant, names)
        print(f"meterlib: there is nothing of tenant {tenant!r}{known}", file=sys.stderr)
