"""Invoice bundles on the command line: written by `meterlib report invoice --bundle`, checked by `meterlib verify`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from meterlib.billing import duck
from meterlib.billing.bundle.bundle import BundleManifest, write_bundle
from meterlib.billing.bundle.check import BundleVerdict, verify_bundle
from meterlib.billing.bundle.gather import gather
from meterlib.billing.postings.postings import Postings
from meterlib.billing.reports.invoice import Invoice
from meterlib.cli.exits import INTEGRITY, OK
from meterlib.cli.progress import Progress
from meterlib.cli.report_formats import check_place
from meterlib.errors import InvalidInput


def check_place_of(path: Path) -> None:
    """Raise InvalidInput unless a bundle can be written there."""
    check_place("--bundle", path)
    if path.exists() and not path.is_file():
        raise InvalidInput("--bundle", f"{path} is no file")


def write(path: Path, postings: Postings, invoice: Invoice) -> BundleManifest:
    """Write an invoice with all that is needed to check it."""
    with TemporaryDirectory(prefix="meterlib-bundle-") as scratch:
        database = duck.connect(Path(scratch))
        try:
            return write_bundle(path, gather(database, postings, invoice))
        finally:
            database.close()


def check(path: Path, as_json: bool) -> int:
    """Check a bundle and say what was found; returns the exit code."""
    with Progress("checking rows") as progress:
        found = verify_bundle(path, progress.advance, progress.expect)
    if as_json:
        print(json.dumps({"bundle": str(path), "ok": not found.problems, **msgspec.to_builtins(found)}, indent=2))
    else:
        _print(path, found)
    for problem in found.problems:
        print(f"meterlib: {problem}", file=sys.stderr)
    return INTEGRITY if found.problems else OK


def _print(path: Path, found: BundleVerdict) -> None:
    if found.tenant:
        owed = ", ".join(f"{total} {currency}" for currency, total in found.totals.items()) or "nothing"
        state = "closed" if found.closed else "open"
        print(f"invoice {found.period} for {found.tenant} ({state}): {owed}")
        print(f"digest of the bundle: {found.digest}")
    for note in found.notes:
        print(f"not checked: {note}")
    state = f"PROBLEMS: {len(found.problems)}" if found.problems else "ok"
    print(f"{state}: {found.rows:,} rated rows of {found.entries:,} entries in {path}")
