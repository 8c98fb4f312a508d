"""The command `meterlib`: finds the subcommand, runs it, and turns whatever goes wrong into a line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import structlog

import meterlib
from meterlib.cli.exits import FAILURE, INTEGRITY, INTERRUPTED, OK, USAGE
from meterlib.errors import IntegrityError, InvalidInput, MeterError, PolicyError, UsageError

COMMANDS = {
    "demo": "watch made-up traffic being limited and metered on a real embedded server",
    "gateway": "serve the Claude API within limits, metered; useful with no configuration",
    "token": "make a token for a tenant's callers",
    "report": "what was used, what it costs and who owes it, by anything, and whether an entry is missing",
    "limits": "how every limit of a tenant stands: quota, used, held, remaining, and when it frees",
    "doctor": "check the server, its durability, the clocks, the ledger, and that each limit can deny",
    "ledger": "the raw ledger entries; another epoch for a ledger that lost some",
    "export": "bring the ledger into the archive, exactly once; tell how far it is; trim what is exported",
    "rate": "what the archived entries cost, for good; or again by other prices, as a difference to post",
    "invoice": "what a tenant owes for a month; short for `report invoice`",
    "close": "close a month: what it comes to, written down for good",
    "verify": "check an archive offline: files, sequence, digests, control totals",
    "prices": "the price book that usage is rated at: show it, compare it, import another one",
}

SHORT_FORMS = {"invoice": ("report", "invoice")}
"""Commands that are wanted so often that they go by a shorter name as well."""

DESCRIPTION = """\
Rate limits, token budgets and an exact billing ledger for LLM gateways, decided
atomically in Redis or Valkey.

Settings are read from the file that --config names, else from meterlib.toml in
this folder if there is one; without any, the store is ./meterlib-data.
"""

EPILOG = """\
examples:
  meterlib demo                                  see it work; needs no set-up
  meterlib gateway                               serve it on 127.0.0.1:8787
  meterlib report --by tenant,day --tz Europe/Berlin
  meterlib limits acme
  meterlib doctor && echo fit for service

exit codes:
  0    ok
  1    the command found a failure, or the store failed
  2    wrong usage or configuration; nothing was done
  3    the report is incomplete, or something in it has no price (only with --strict)
  4    the provider's report and the archive differ by more than is tolerated
  5    ledger and archive, an archive and itself, or an invoice and its rows, do not agree
  130  interrupted (Ctrl-C)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Raises:
        SystemExit: argparse has printed its help, or what is wrong with the words; with the exit code for that.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in SHORT_FORMS:
        words[:1] = SHORT_FORMS[words[0]]
    try:
        with _logs_on_stderr():
            code = _run(words)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("meterlib: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _leave_stdout()
        return OK
    except MeterError as error:
        print(f"meterlib: {error}", file=sys.stderr)
        if isinstance(error, IntegrityError):
            return INTEGRITY
        return USAGE if isinstance(error, InvalidInput | PolicyError | UsageError) else FAILURE
    except RuntimeError as error:
        if str(error) != "Query interrupted":  # DuckDB's word for Ctrl-C, if that comes while it answers
            raise
        print("meterlib: interrupted", file=sys.stderr)
        return INTERRUPTED
    except UnicodeEncodeError as error:
        shown = ascii(error.object[error.start : error.end])
        print(f"meterlib: {error.encoding} cannot encode {shown}; set PYTHONIOENCODING=utf-8", file=sys.stderr)
        return FAILURE
    except OSError as error:
        print(f"meterlib: {_said(error)}", file=sys.stderr)
        return FAILURE
    return code


def _said(error: OSError) -> str:
    """What is wrong with which file; in the place of a temporary one, which nobody knows, stands its folder."""
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else Path()
    for made in (path, *path.parents):
        if made.name.startswith(".work-") or (made is path and made.name.startswith(".")):
            return f"[Errno {error.errno}] {error.strerror}: nothing can be written to {str(made.parent)!r}"
    return str(error)


def _run(words: Sequence[str]) -> int:
    parser = _parser(words)
    arguments = parser.parse_args(words)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return USAGE
    code: int = arguments.run(arguments)
    return code


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; only the command that is called is imported, so that none pays for the others."""
    parser = argparse.ArgumentParser(
        prog="meterlib",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"meterlib {meterlib.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    called = next((word for word in words if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        if name == called:
            module = import_module(f"meterlib.cli.{name}")
            command.description, _, command.epilog = (part.strip("\n") for part in module.HELP.partition("\n---\n"))
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


@contextmanager
def _logs_on_stderr() -> Iterator[None]:
    """Standard output is for results. A process that runs this inside, and has set up its logs, keeps them."""
    if structlog.is_configured():
        yield
        return
    # The stream is looked up for each line, since tests and embedders replace it.
    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))
    try:
        yield
    finally:
        structlog.reset_defaults()


def _leave_stdout() -> None:
    """Whoever read our output has seen enough; the interpreter must not complain about that at its exit either."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return
