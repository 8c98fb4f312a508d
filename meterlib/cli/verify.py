"""`meterlib verify`: whether an archive is what was exported, without store or settings."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from meterlib.billing.archive.archive import Archive
from meterlib.billing.archive.verify import Known, ShardVerdict, verify
from meterlib.billing.postings.pieces import RatedFiles
from meterlib.billing.postings.verify_rated import RatedVerdict, marks_of, verify_rated
from meterlib.cli import bundles
from meterlib.cli.exits import INTEGRITY, OK
from meterlib.cli.options import add_json
from meterlib.cli.progress import Progress
from meterlib.errors import InvalidInput

HELP = """\
Check an archive from its files alone: that no file is damaged, missing, renamed
or out of place, that entries follow each other without a gap, that each is the
one that was exported, and that sums and columns are what the entries say. Then
that rated rows are of what these entries used, each price times its quantity is
its cost, customers' prices follow from the list price by the terms, what was
rated again takes back what stood, and closed periods still come to the same.

Of a bundle (`meterlib report invoice --bundle`), who got it checks its invoice:
every digest, product, price and sum, from the one file alone.

It prints the digest of each shard's entries. Files alone cannot tell that the
newest of them were taken away, or that all were made anew; whoever keeps what
--json prints can tell both, by --known, at any later time.
---
examples:
  meterlib verify meterlib-archive
  meterlib verify invoice.zip                              the bill adds up
  meterlib verify meterlib-archive --json > october.json
  meterlib verify meterlib-archive --known october.json    all of October is there

exit codes: 0 ok; 1 a file cannot be read; 2 wrong usage; 5 something is wrong
with the archive, and named
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `meterlib verify`."""
    parser.add_argument("archive", metavar="ARCHIVE", help="the archive's folder, or an invoice bundle")
    parser.add_argument("--known", metavar="FILE", help="what an earlier check printed with --json")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check an archive; returns the exit code."""
    path = Path(arguments.archive)
    if path.is_file():
        if arguments.known is not None:
            raise InvalidInput("--known", f"is about archives, and {path} is an invoice bundle")
        return bundles.check(path, arguments.json)
    if not path.is_dir():
        raise InvalidInput("ARCHIVE", f"there is no folder {path}")
    known = _known(arguments.known)
    with Archive(path) as archive:
        total = sum(segment.last - segment.first + 1 for shard in archive.shards() for segment in archive.listed(shard))
        with Progress("checking entries", total) as progress:
            verdicts = verify(archive, known, progress.advance, marks_of(archive))
        rated_files = RatedFiles(archive)
        listed = [file.segment for shard in rated_files.shards() for file in rated_files.listed(shard)]
        with Progress("checking rated entries", sum(one.last - one.first + 1 for one in listed)) as progress:
            rated = verify_rated(archive, progress.advance)
    if not verdicts:
        raise InvalidInput("ARCHIVE", f"{path} is no archive: it has no shard-0000 or the like")
    problems = [*(problem for verdict in verdicts for problem in verdict.problems), *rated.problems]
    if arguments.json:
        document = {"archive": str(path), "ok": not problems, "shards": msgspec.to_builtins(verdicts)}
        document["rated"] = msgspec.to_builtins(rated)
        print(json.dumps(document, indent=2))
    else:
        _print(path, verdicts, rated)
    for problem in problems:
        print(f"meterlib: {problem}", file=sys.stderr)
    return INTEGRITY if problems else OK


def _known(file: str | None) -> list[Known]:
    if file is None:
        return []
    try:
        document: Any = json.loads(Path(file).read_text(encoding="utf-8"))
        return [msgspec.convert(shard, Known) for shard in document["shards"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput("--known", f"{file} is not what `meterlib verify --json` prints: {error}") from None


def _print(path: Path, verdicts: Sequence[ShardVerdict], rated: RatedVerdict) -> None:
    for verdict in verdicts:
        state = f"{len(verdict.problems)} problems" if verdict.problems else "ok"
        print(
            f"shard {verdict.shard}: {state}, {verdict.entries:,} entries up to {verdict.shard}:{verdict.last}"
            f" in {verdict.segments} files, digest {verdict.link[:16] or '-'}"
        )
        if len(verdict.epochs) > 1:
            print(f"  the ledger was begun anew: epochs {', '.join(verdict.epochs)}")
        if verdict.gaps:
            print(f"  lost for good, by decision of whoever exported: {', '.join(verdict.gaps)}")
        if verdict.unknown:
            print(f"  no column is made of: {', '.join(verdict.unknown)}")
    if rated.files:
        state = f"{len(rated.problems)} problems" if rated.problems else "ok"
        unpriced = f", {rated.unpriced:,} without a price" if rated.unpriced else ""
        print(f"rated rows: {state}, {rated.rows:,} in {rated.files} files{unpriced}; {rated.reratings} re-ratings")
    if rated.closes:
        print(f"closed periods: {', '.join(rated.closes)}")
    wrong = sum(len(verdict.problems) for verdict in verdicts) + len(rated.problems)
    entries = sum(verdict.entries for verdict in verdicts)
    print(f"{'PROBLEMS: ' + str(wrong) if wrong else 'ok'}: {entries:,} entries of {len(verdicts)} shards in {path}")
