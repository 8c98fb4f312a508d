"""`meterlib export`: the ledger into archive and PostgreSQL, how far that is, and trimming what is exported."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from meterlib.billing.archive.archive import Archive
from meterlib.billing.archive.sinks import Sink
from meterlib.billing.export.export import Accepted, Export, Exported
from meterlib.billing.export.postgres_schema import ddl
from meterlib.billing.export.start import Start
from meterlib.billing.export.trim import trim
from meterlib.billing.postings.rater import Rated
from meterlib.cli.exits import FAILURE, INTEGRITY, OK
from meterlib.cli.options import add_archive, add_config, add_json, whole_number
from meterlib.cli.progress import Phases, Progress
from meterlib.cli.rate import document_of, line_of, rate_archive
from meterlib.cli.sinks import check_none_is_missing, opened_sinks
from meterlib.cli.stopping import Stopping
from meterlib.cli.store import Store, opened
from meterlib.cli.tables import Column, print_table
from meterlib.config import Config
from meterlib.errors import IntegrityError, InvalidInput, MeterError, SinkError, StoreUnavailable
from meterlib.store import flows
from meterlib.store.commands import ShardHead

HELP = """\
Bring every ledger entry into the archive, exactly once, whatever dies when.

The archive is a folder of Parquet files ([billing] archive, by default
meterlib-archive beside the settings), a folder for each shard. Files are never
changed; each carries the digest of all that was archived before it. Where they
end is where the next export goes on, so a run may be killed or repeated at any
time, and two may run at once.

With [billing] postgres (or postgres_env: the variable that holds the URL),
entries go to PostgreSQL as well: rows and checkpoint in one transaction. Each
has its own checkpoint, and one that is down does not stop the other. What the
store has no more, it takes over from the archive, so it can be added later.

An entry that is missing, or is another one than was exported, stops the export
of its shard, is named, and exits with 5; the other shards go on.
---
examples:
  meterlib export run                     what was booked since the last time
  meterlib export run --follow            go on until interrupted
  meterlib export status                  how far the archive is behind the ledger
  meterlib export trim                    free the store of what every sink has
  meterlib export schema | psql -d bills  for a role that may not make it itself
  meterlib verify meterlib-archive        check the files, without the store

exit codes: 0 ok; 1 the store, the disk or PostgreSQL failed; 2 wrong usage or
configuration; 5 ledger and archive do not agree
"""
RUN_HELP = """\
Export what was booked since the last run, and rate it by the price books in
force. The last file of a shard may be short; it is joined with its successors
when its block is full, or by `meterlib export compact`.
"""
STATUS_HELP = """\
Tell for each shard up to which number it is archived and where its ledger ends,
and whether the two still fit together. Changes nothing.
"""
COMPACT_HELP = """\
Join short files. What is in the archive stays the same, and so do its digests.
"""
TRIM_HELP = """\
Remove entries from the store that are in the archive, and in PostgreSQL if that
was ever exported to. What was booked within the store's retention stays, since
calls may be repeated so long and are answered by their entries; so do the last
--keep exported entries of each shard. Reports of a time that was trimmed away
need the archive.
"""
FORGET_HELP = """\
Have the store forget an archive or a database that was once exported to, and is
not any more: `trim` removes only what every one of them has. Without a NAME,
tell which the store knows.
"""
SCHEMA_HELP = """\
Print the SQL that makes the schema in PostgreSQL. Not needed where the exporter's
role may make it: then the first run does.
"""
KEEP = 10_000
EVERY_S = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `meterlib export`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    run = _action(actions, "run", "export what was booked since the last run", RUN_HELP)
    run.add_argument("--follow", action="store_true", help="go on exporting until interrupted")
    run.add_argument(
        "--every", type=whole_number, default=EVERY_S, metavar="S", help=f"seconds between exports (default: {EVERY_S})"
    )
    run.add_argument(
        "--accept-epoch", action="append", type=_epoch, default=[], metavar="SHARD:EPOCH",
        help="a ledger that was begun anew may go on under this epoch; may be repeated",
    )  # fmt: skip
    run.add_argument(
        "--accept-gap", action="append", type=_gap, default=[], metavar="SHARD:N-M",
        help="these entries are lost for good; may be repeated",
    )  # fmt: skip
    run.add_argument(
        "--set-aside", action="append", type=_entry, default=[], metavar="SHARD:N",
        help="keep this entry, which cannot be exported, apart from the others, until one behind it is exported",
    )  # fmt: skip
    run.add_argument("--no-rate", action="store_true", help="leave rating what was exported to `meterlib rate`")
    _action(actions, "status", "how far the archive is behind the ledger", STATUS_HELP)
    _action(actions, "compact", "join short files", COMPACT_HELP)
    trimming = _action(actions, "trim", "remove archived entries from the store", TRIM_HELP)
    trimming.add_argument(
        "--keep", type=whole_number, default=KEEP, metavar="N",
        help=f"archived entries of each shard that stay (default: {KEEP:,}; at least 1)",
    )  # fmt: skip
    forgetting = _action(actions, "forget", "have the store forget a sink that is no more", FORGET_HELP)
    forgetting.add_argument("name", nargs="?", metavar="NAME", help="as the message of `export trim` has it")
    _action(actions, "schema", "print the SQL that makes the schema in PostgreSQL", SCHEMA_HELP)


def _action(actions: Any, name: str, summary: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(
        name,
        help=summary,
        description=description,
        epilog=HELP.partition("\n---\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_archive(parser)
    add_json(parser)
    add_config(parser)
    return parser


def _epoch(text: str) -> tuple[int, str]:
    shard, _, epoch = text.partition(":")
    if not epoch.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r:.80} does not read SHARD:EPOCH")
    return whole_number(shard), epoch


def _entry(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"[0-9]+:[0-9]+", text):
        raise argparse.ArgumentTypeError(f"{text!r:.80} does not read SHARD:N")
    shard, _, n = text.partition(":")
    return whole_number(shard), whole_number(n)


def _gap(text: str) -> tuple[int, int, int]:
    if not re.fullmatch(r"[0-9]+:[0-9]+(-[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r:.80} does not read SHARD:N-M")
    shard, _, numbers = text.partition(":")
    first, _, last = numbers.partition("-")
    return whole_number(shard), whole_number(first), whole_number(last or first)


def run(arguments: argparse.Namespace) -> int:
    """Do what is asked for; returns the exit code."""
    config = Config.find(arguments.config)
    if arguments.action == "schema":
        print(ddl(config.billing.postgres_schema), end="")
        return OK
    acts: dict[str, Callable[[Archive, list[Sink[Any]], Config, argparse.Namespace], int]] = {
        "run": _run, "status": _status, "compact": _compact, "trim": _trim, "forget": _forget,
    }  # fmt: skip
    with opened_sinks(config, arguments.archive) as (archive, sinks):
        return acts[arguments.action](archive, sinks, config, arguments)


# ── run ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _run(archive: Archive, sinks: list[Sink[Any]], config: Config, arguments: argparse.Namespace) -> int:
    accepted = Accepted(
        epochs=dict(arguments.accept_epoch),
        gaps=frozenset(arguments.accept_gap),
        aside=frozenset(arguments.set_aside),
    )
    with opened(config, arguments.config) as store, Stopping() as stopping:

        def rate() -> Rated:
            return Rated() if arguments.no_rate else rate_archive(archive, config, stopping.check)

        run = _Run(store, sinks, accepted, rate, arguments.json, stopping.check)
        if not arguments.follow:
            return _export(run)
        try:
            return _follow(run, stopping, max(1, arguments.every))
        except KeyboardInterrupt:  # which is how it ends
            return OK


class _Run(NamedTuple):
    """What an export needs; `check` raises KeyboardInterrupt once somebody wants it to end."""

    store: Store
    sinks: list[Sink[Any]]
    accepted: Accepted
    rate: Callable[[], Rated]
    as_json: bool
    check: Callable[[], None]


def _follow(run: _Run, stopping: Stopping, pause_s: int) -> int:
    """Export again and again, whoever is down meanwhile; until ledger and sinks do not agree."""
    while True:
        try:
            code = _export(run, quiet=True)
        except StoreUnavailable as error:
            print(f"meterlib: {error}", file=sys.stderr)
            code = FAILURE
        if code not in (OK, FAILURE):
            return code
        if code == FAILURE:
            print(f"meterlib: trying again in {pause_s} s", file=sys.stderr)
        stopping.sleep(pause_s)


def _export(run: _Run, quiet: bool = False) -> int:
    """One export of all shards, and the rating; the exit code. With `quiet`, only what was new is printed."""
    store, sinks, as_json = run.store, run.sinks, run.as_json
    shards = range(store.shards)
    total = sum(_waiting(store, sink, shard) for sink in sinks for shard in shards)
    with (
        Progress("exporting entries", total, run.check) as progress,
        Export(sinks, store.run, accepted=run.accepted, advance=progress.advance) as export,
    ):
        by_shard = []
        for shard in shards:
            run.check()
            by_shard.append(export.export(shard))
    by_sink = [list(exported) for exported in zip(*by_shard, strict=True)]
    rated, trouble = _rated(run.rate)
    if as_json:
        print(json.dumps(_run_document(by_sink) | document_of(rated)), flush=True)
    for exported in by_sink:
        if not as_json and (not quiet or any(found.entries or found.aside for found in exported)):
            print(_run_line(exported), flush=True)
    if rated.entries and not as_json:
        print(line_of(rated), flush=True)
    everything = [found for exported in by_sink for found in exported]
    found_out = [found.problem for found in everything if found.problem]
    if isinstance(trouble, IntegrityError) and not found_out:
        found_out.append(trouble)
    elif trouble and not quiet and not found_out:
        raise trouble
    problems = dict.fromkeys(f"{problem.problem}: {problem}" for problem in found_out)
    failures = dict.fromkeys(str(found.failure) for found in everything if found.failure)
    if trouble and not isinstance(trouble, IntegrityError):
        failures[f"not rated: {trouble}"] = None
    for told in (*problems, *failures):
        print(f"meterlib: {told}", file=sys.stderr)
    if problems:
        return INTEGRITY
    return FAILURE if failures else OK


def _rated(rate: Callable[[], Rated]) -> tuple[Rated, MeterError | OSError | None]:
    """What was rated, and why no more was."""
    try:
        return rate(), None
    except (MeterError, OSError) as error:
        return Rated(), error


def _waiting(store: Store, sink: Sink[Any], shard: int) -> int:
    """About how many entries an export will read."""
    with suppress(IntegrityError, SinkError):  # which the export will tell
        return max(0, store.head(shard).ledger_last - sink.end(shard)[0].n)
    return 0


def _run_line(exported: Sequence[Exported]) -> str:
    count, aside = sum(found.entries for found in exported), sum(found.aside for found in exported)
    new = [f"{found.shard}:{found.last}" for found in exported if found.entries]
    upto = f", up to {', '.join(new)}" if new else ""
    kept = f"; {aside:,} set aside" if aside else ""
    return f"exported {count:,} {'entry' if count == 1 else 'entries'} to {exported[0].sink}{upto}{kept}"


def _run_document(by_sink: Sequence[Sequence[Exported]]) -> dict[str, Any]:
    """What the archive has come to, and each further sink under `sinks`."""
    documents = [_sink_document(exported) for exported in by_sink]
    first = documents[0]
    archive = {"archive": first["sink"], **{name: first[name] for name in ("entries", "failure", "shards")}}
    return archive | {"sinks": documents[1:]}


def _sink_document(exported: Sequence[Exported]) -> dict[str, Any]:
    failures = [str(found.failure) for found in exported if found.failure]
    shards = [
        {
            "shard": found.shard,
            "entries": found.entries,
            "epoch": found.epoch,
            "last": found.last,
            "problem": None if found.problem is None else _problem_document(found.problem),
        }
        for found in exported
    ]
    return {
        "sink": exported[0].sink,
        "entries": sum(found.entries for found in exported),
        "set_aside": sum(found.aside for found in exported),
        "failure": failures[0] if failures else None,
        "shards": shards,
    }


def _problem_document(problem: IntegrityError) -> dict[str, Any]:
    return {"problem": problem.problem, "entries": list(problem.entries), "message": str(problem)}


# ── status ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _status(archive: Archive, sinks: list[Sink[Any]], config: Config, arguments: argparse.Namespace) -> int:
    with opened(config, arguments.config) as store:
        rows = [_status_of(store, archive, shard) for shard in range(store.shards)]
        others = [_sink_status(store, sink) for sink in sinks if sink is not archive]
    everything = [*rows, *(row for other in others for row in other["shards"])]
    problems = {row["problem"]["message"]: row["problem"] for row in everything if row["problem"] is not None}
    failures = [other["failure"] for other in others if other["failure"]]
    if arguments.json:
        print(json.dumps({"archive": str(archive.path), "shards": rows, "sinks": others}, indent=2))
    else:
        _print_status(archive, rows)
        for other in others:
            _print_sink(other)
        for problem in problems.values():
            print(f"meterlib: {problem['problem']}: {problem['message']}", file=sys.stderr)
        for failure in failures:
            print(f"meterlib: {failure}", file=sys.stderr)
    if problems:
        return INTEGRITY
    return FAILURE if failures else OK


def _sink_status(store: Store, sink: Sink[Any]) -> dict[str, Any]:
    """How far a sink is; it is not made if it is not there."""
    rows: list[dict[str, Any]] = []
    failure = None
    for shard in range(store.shards):
        row: dict[str, Any] = {"shard": shard, "exported": 0, "ledger_last": 0, "waiting": 0, "problem": None}
        try:
            position, known = sink.end(shard)
            head = store.head(shard)
            row |= {"exported": position.n, "ledger_last": max(head.last_number, head.ledger_last)}
            _, after = Start(shard, position, known, head, store.run).found(None)
            row["waiting"] = max(0, row["ledger_last"] - after)
        except IntegrityError as error:
            row["problem"] = _problem_document(error)
        except SinkError as error:
            failure = str(error)
            break
        rows.append(row)
    return {"sink": sink.place, "failure": failure, "shards": rows}


def _print_sink(status: dict[str, Any]) -> None:
    print()
    print(status["sink"])
    print()
    headings = ("exported to", "ledger to", "waiting")
    columns = [Column("shard", key=True), *(Column(heading, number=True) for heading in headings)]
    shown = [row for row in status["shards"] if row["ledger_last"] or row["exported"]]
    print_table(columns, [[str(row["shard"]), *(f"{row[name]:,}" for name in _SINK_COLUMNS)] for row in shown])


_SINK_COLUMNS = ("exported", "ledger_last", "waiting")


def _ledger_of(head: ShardHead) -> dict[str, int]:
    return {"ledger_first": head.ledger_first, "ledger_last": max(head.last_number, head.ledger_last)}


def _status_of(store: Store, archive: Archive, shard: int) -> dict[str, Any]:
    row: dict[str, Any] = {"shard": shard, "archived": 0, "ledger_first": 0, "ledger_last": 0, "waiting": 0}
    row |= {"files": 0, "bytes": 0, "link": "", "unknown": [], "problem": None}
    try:
        segments = archive.segments(shard)
        position, known = archive.end(shard)
    except IntegrityError as error:
        return row | _ledger_of(store.head(shard)) | {"problem": _problem_document(error)}
    head = store.head(shard)  # after the archive, which another export may be extending
    row |= _ledger_of(head)
    try:
        row |= {"archived": position.n, "files": len(segments), "link": position.link.hex() if position.n else ""}
        row["bytes"] = sum(archive.file(segment).stat().st_size for segment in segments)
        row["unknown"] = sorted({name for segment in segments for name in archive.facts(segment).unknown})
        _, after = Start(shard, position, known, head, store.run).found(None)
        row["waiting"] = max(0, row["ledger_last"] - after)
    except IntegrityError as error:
        row["problem"] = _problem_document(error)
    return row


def _print_status(archive: Archive, rows: Sequence[dict[str, Any]]) -> None:
    print(f"archive {archive.path}")
    print()
    headings = ("archived to", "ledger from", "ledger to", "waiting", "files", "MB")
    columns = [Column("shard", key=True), *(Column(heading, number=True) for heading in headings)]
    names = ("archived", "ledger_first", "ledger_last", "waiting", "files")
    shown = [row for row in rows if row["ledger_last"] or row["archived"]]
    lines = [[str(row["shard"]), *(f"{row[name]:,}" for name in names), f"{row['bytes'] / 1e6:,.1f}"] for row in shown]
    print_table(columns, lines)
    waiting = sum(row["waiting"] for row in rows)
    print()
    print("nothing waits to be exported" if not waiting else f"{waiting:,} entries wait to be exported")
    unknown = sorted({name for row in rows for name in row["unknown"]})
    if unknown:
        print(f"no column is made of: {', '.join(unknown)}; a later meterlib may know them")


# ── compact and trim ──────────────────────────────────────────────────────────────────────────────────────────────────


def _compact(archive: Archive, sinks: list[Sink[Any]], config: Config, arguments: argparse.Namespace) -> int:
    removed = {}
    with Phases() as phases:
        for shard in archive.shards():
            phases(f"joining files of shard {shard}")
            removed[shard] = archive.compact(shard, pieces_max=1)
    files = sum(len(archive.listed(shard)) for shard in archive.shards())
    if arguments.json:
        print(json.dumps({"archive": str(archive.path), "removed": sum(removed.values()), "files": files}))
    else:
        print(f"{sum(removed.values()):,} files removed, {files:,} are left in {archive.path}")
    return OK


def _trim(archive: Archive, sinks: list[Sink[Any]], config: Config, arguments: argparse.Namespace) -> int:
    if arguments.keep < 1:
        raise InvalidInput("--keep", "at least 1 is needed: the next export goes on from the last archived entry")
    removed: dict[int, int] = {}
    with opened(config, arguments.config) as store:
        check_none_is_missing(store, sinks)
        for shard in range(store.shards):
            since_ms = store.clock_ms(shard) - config.store.retention_ms
            younger = store.start_of(shard, since_ms, store.head(shard)) + 1
            removed[shard] = trim(sinks, store.run, shard, below=younger, keep=arguments.keep)
    if arguments.json:
        shards = [{"shard": shard, "removed": count} for shard, count in removed.items()]
        print(json.dumps({"removed": sum(removed.values()), "shards": shards}))
    else:
        places = " and ".join(sink.place for sink in sinks)
        print(f"{sum(removed.values()):,} entries removed from the store; they are in {places}")
    return OK


def _forget(archive: Archive, sinks: list[Sink[Any]], config: Config, arguments: argparse.Namespace) -> int:
    with opened(config, arguments.config) as store:
        known = store.run(flows.known_sinks())
        if arguments.name is not None and arguments.name not in known:
            told = ", ".join(map(repr, known)) or "none"
            raise InvalidInput("NAME", f"the store knows of no {arguments.name!r:.80}, but of {told}")
        left = known if arguments.name is None else store.run(flows.known_sinks(drop=arguments.name))
    if arguments.json:
        print(json.dumps({"known": left}))
    elif arguments.name is not None:
        print(f"forgotten: {arguments.name}")
    else:
        print("\n".join(left) or "nothing was exported yet")
    return OK
