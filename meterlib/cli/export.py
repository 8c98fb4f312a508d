"""`meterlib export`: the ledger into the archive, how far that is, and trimming what is exported."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from meterlib.billing.archive import Archive
from meterlib.billing.export import Accepted, Exported, Exporter
from meterlib.billing.start import Start
from meterlib.billing.trim import trim
from meterlib.cli.exits import INTEGRITY, OK
from meterlib.cli.options import add_config, add_json, whole_number
from meterlib.cli.progress import Progress
from meterlib.cli.store import Store, opened
from meterlib.cli.tables import Column, print_table
from meterlib.config import Config
from meterlib.errors import IntegrityError, InvalidInput, StoreUnavailable
from meterlib.store.commands import ShardHead

HELP = """\
Bring every ledger entry into the archive, exactly once, whatever dies when.

The archive is a folder of Parquet files ([billing] archive, by default
meterlib-archive beside the settings), a folder for each shard. Files are never
changed; each carries the digest of all that was archived before it. Where they
end is where the next export goes on, so a run may be killed or repeated at any
time, and two may run at once.

An entry that is missing, or is another one than was exported, stops the export
of its shard, is named, and exits with 5; the other shards go on.
---
examples:
  meterlib export run                     what was booked since the last time
  meterlib export run --follow            go on until interrupted
  meterlib export status                  how far the archive is behind the ledger
  meterlib export trim                    free the store of what is archived
  meterlib verify meterlib-archive        check the files, without the store

exit codes: 0 ok; 1 the store or the disk failed; 2 wrong usage or
configuration; 5 ledger and archive do not agree
"""
RUN_HELP = """\
Export what was booked since the last run. The last file of a shard may be
short; it is joined with its successors when its block is full, or by
`meterlib export compact`.
"""
STATUS_HELP = """\
Tell for each shard up to which number it is archived and where its ledger ends,
and whether the two still fit together. Changes nothing.
"""
COMPACT_HELP = """\
Join short files. What is in the archive stays the same, and so do its digests.
"""
TRIM_HELP = """\
Remove entries from the store that are in the archive. What was booked within
the store's retention stays, since calls may be repeated so long and are answered
by their entries; so do the last --keep archived entries of each shard. Reports
of a time that was trimmed away need the archive.
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
    _action(actions, "status", "how far the archive is behind the ledger", STATUS_HELP)
    _action(actions, "compact", "join short files", COMPACT_HELP)
    trimming = _action(actions, "trim", "remove archived entries from the store", TRIM_HELP)
    trimming.add_argument(
        "--keep", type=whole_number, default=KEEP, metavar="N",
        help=f"archived entries of each shard that stay (default: {KEEP:,}; at least 1)",
    )  # fmt: skip


def _action(actions: Any, name: str, summary: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(
        name,
        help=summary,
        description=description,
        epilog=HELP.partition("\n---\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--archive", metavar="DIR", help="another archive than that of the settings")
    add_json(parser)
    add_config(parser)
    return parser


def _epoch(text: str) -> tuple[int, str]:
    shard, _, epoch = text.partition(":")
    if not epoch.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r:.80} does not read SHARD:EPOCH")
    return whole_number(shard), epoch


def _gap(text: str) -> tuple[int, int, int]:
    shard, _, numbers = text.partition(":")
    first, dash, last = numbers.partition("-")
    return whole_number(shard), whole_number(first), whole_number(last if dash else first)


def run(arguments: argparse.Namespace) -> int:
    """Do what is asked for; returns the exit code."""
    config = Config.find(arguments.config)
    path = Path(config.billing.archive if arguments.archive is None else arguments.archive)
    acts: dict[str, Callable[[Archive, Config, argparse.Namespace], int]] = {
        "run": _run, "status": _status, "compact": _compact, "trim": _trim,
    }  # fmt: skip
    with Archive(path, config.billing.segment_entries) as archive:
        return acts[arguments.action](archive, config, arguments)


# ── run ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _run(archive: Archive, config: Config, arguments: argparse.Namespace) -> int:
    accepted = Accepted(epochs=dict(arguments.accept_epoch), gaps=frozenset(arguments.accept_gap))
    with opened(config, arguments.config) as store, _stopped_by_signals():
        if not arguments.follow:
            return _export(store, archive, accepted, arguments.json)
        try:
            return _follow(store, archive, accepted, arguments)
        except KeyboardInterrupt:  # which is how it ends
            return OK


def _follow(store: Store, archive: Archive, accepted: Accepted, arguments: argparse.Namespace) -> int:
    while True:
        try:
            code = _export(store, archive, accepted, arguments.json, quiet=True)
        except StoreUnavailable as error:
            print(f"meterlib: {error}; trying again in {arguments.every} s", file=sys.stderr)
            code = OK
        if code != OK:
            return code
        threading.Event().wait(max(1, arguments.every))


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM ends it as Ctrl-C does, so that temporary files are removed."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone may say what a signal does
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _export(store: Store, archive: Archive, accepted: Accepted, as_json: bool, quiet: bool = False) -> int:
    """One export of all shards; the exit code. With `quiet`, nothing is printed where nothing was new."""
    shards = range(store.shards)
    total = sum(_waiting(store, archive, shard) for shard in shards)
    with (
        Progress("exporting entries", total) as progress,
        Exporter(archive, store.run, accepted=accepted, advance=progress.advance) as exporter,
    ):
        exported = [exporter.export(shard) for shard in shards]
    problems = [found.problem for found in exported if found.problem is not None]
    if as_json:
        print(json.dumps(_run_document(archive, exported)), flush=True)
    elif not quiet or any(found.entries for found in exported):
        print(_run_line(archive, exported), flush=True)
    for problem in problems:
        print(f"meterlib: {problem.problem}: {problem}", file=sys.stderr)
    return INTEGRITY if problems else OK


def _waiting(store: Store, archive: Archive, shard: int) -> int:
    """About how many entries an export will read."""
    with suppress(IntegrityError):  # which the export will tell
        return max(0, store.head(shard).ledger_last - archive.position(shard).n)
    return 0


def _run_line(archive: Archive, exported: Sequence[Exported]) -> str:
    count = sum(found.entries for found in exported)
    new = [f"{found.shard}:{found.last}" for found in exported if found.entries]
    upto = f", up to {', '.join(new)}" if new else ""
    return f"exported {count:,} {'entry' if count == 1 else 'entries'} to {archive.path}{upto}"


def _run_document(archive: Archive, exported: Sequence[Exported]) -> dict[str, Any]:
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
    return {"archive": str(archive.path), "entries": sum(found.entries for found in exported), "shards": shards}


def _problem_document(problem: IntegrityError) -> dict[str, Any]:
    return {"problem": problem.problem, "entries": list(problem.entries), "message": str(problem)}


# ── status ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _status(archive: Archive, config: Config, arguments: argparse.Namespace) -> int:
    with opened(config, arguments.config) as store:
        rows = [_status_of(store, archive, shard) for shard in range(store.shards)]
    problems = [row["problem"] for row in rows if row["problem"] is not None]
    if arguments.json:
        print(json.dumps({"archive": str(archive.path), "shards": rows}, indent=2))
    else:
        _print_status(archive, rows)
        for problem in problems:
            print(f"meterlib: {problem['problem']}: {problem['message']}", file=sys.stderr)
    return INTEGRITY if problems else OK


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


def _compact(archive: Archive, config: Config, arguments: argparse.Namespace) -> int:
    removed = {shard: archive.compact(shard, pieces_max=1) for shard in archive.shards()}
    files = sum(len(archive.listed(shard)) for shard in archive.shards())
    if arguments.json:
        print(json.dumps({"archive": str(archive.path), "removed": sum(removed.values()), "files": files}))
    else:
        print(f"{sum(removed.values()):,} files removed, {files:,} are left in {archive.path}")
    return OK


def _trim(archive: Archive, config: Config, arguments: argparse.Namespace) -> int:
    if arguments.keep < 1:
        raise InvalidInput("--keep", "at least 1 is needed: the next export goes on from the last archived entry")
    removed: dict[int, int] = {}
    with opened(config, arguments.config) as store:
        for shard in range(store.shards):
            since_ms = store.clock_ms(shard) - config.store.retention_ms
            younger = store.start_of(shard, since_ms, store.head(shard)) + 1
            removed[shard] = trim(archive, store.run, shard, below=younger, keep=arguments.keep)
    if arguments.json:
        shards = [{"shard": shard, "removed": count} for shard, count in removed.items()]
        print(json.dumps({"removed": sum(removed.values()), "shards": shards}))
    else:
        print(f"{sum(removed.values()):,} entries removed from the store; they are in {archive.path}")
    return OK
