"""Whether a bundle is right, from itself alone, by whoever got it: every digest, product, price and sum once more.

Nothing is unpacked, files are stored and never compressed, and no name of a file is used as one; so nothing can grow,
or get out. What a bundle cannot tell is whether calls are missing in it, and whether the list price was right: those
are for the customer's own books, and for the price list. What a re-rating takes back of a closed month stands on an
earlier invoice, and is to be compared with that one. What it could tell and is not asked yet: by which of several
prices each part of a correction goes.
"""

from __future__ import annotations

import csv
import filecmp
import io
import struct
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal, InvalidOperation
from errno import EINVAL
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import msgspec

from meterlib.billing.archive.rows import STORED, VERBATIM
from meterlib.billing.bundle.bundle import (
    BUNDLE_SCHEMA,
    CLOSE,
    ENTRIES,
    FILES,
    INVOICE,
    MANIFEST,
    PRICES,
    ROW_COLUMNS,
    ROWS,
    TERMS,
    BundleManifest,
    FileFacts,
    StatedClose,
    StatedPrice,
    StatedTerms,
    put,
    text_of,
)
from meterlib.billing.bundle.rows import Adding, RowCheck
from meterlib.billing.months import month_named
from meterlib.billing.reports.invoice import Invoice
from meterlib.core.ledger import LedgerEntry, entry_of
from meterlib.core.money import ZERO, plus
from meterlib.errors import IntegrityError, MeterError

PROBLEMS_MAX = 100
MEMBER_BYTES_MAX = 64 << 20
LINE_BYTES_MAX = 32 << 20
"""Files that are read as a whole, and lines of those that are not, are no larger than these."""
_READ_BYTES = 1 << 20

_BROKEN = (BadZipFile, NotImplementedError, EOFError, RuntimeError, KeyError, ValueError, struct.error)
"""What reading a zip file raises that is none, or is broken."""


class BundleVerdict(msgspec.Struct, kw_only=True):
    """What was found of a bundle.

    Attributes:
        tenant: whose invoice.
        period: the month.
        closed: whether it is closed.
        rows: how many rated rows were checked.
        entries: how many entries.
        totals: what is owed, by currency.
        digest: of the manifest; who has the same digest has the same bundle.
        notes: what could not be checked, though it is no mistake.
        problems: what is wrong; empty if nothing is.
    """

    tenant: str = ""
    period: str = ""
    closed: bool = False
    rows: int = 0
    entries: int = 0
    totals: dict[str, str] = {}
    digest: str = ""
    notes: list[str] = []
    problems: list[str] = []


def verify_bundle(
    path: Path, advance: Callable[[int], None] = lambda count: None, expect: Callable[[int], None] = lambda count: None
) -> BundleVerdict:
    """Check a bundle; problems are in the verdict.

    Args:
        path: of the file.
        advance: is told how many rows were checked, as it goes.
        expect: is told first how many there are.

    Raises:
        OSError: it cannot be read.
    """
    verdict = BundleVerdict()
    try:
        with ZipFile(path) as archive:
            _Check(path, archive, verdict, advance).run(expect)
    except IntegrityError as error:
        verdict.problems.append(str(error))
    except _BROKEN as error:
        verdict.problems.append(f"{path} is no invoice bundle, or is broken: {error}")
    except OSError as error:
        if error.errno != EINVAL:
            raise
        verdict.problems.append(f"{path} is broken: it names a place before its beginning")
    except ArithmeticError:
        verdict.problems.append(f"{path} has numbers that are larger than any bill's")
    return verdict


class _Check:
    def __init__(self, path: Path, archive: ZipFile, verdict: BundleVerdict, advance: Callable[[int], None]) -> None:
        self._path, self._archive, self._verdict, self._advance = path, archive, verdict, advance

    def run(self, expect: Callable[[int], None]) -> None:
        """Each step needs those before it."""
        self._check_names()
        manifest = self._decoded(MANIFEST, BundleManifest)
        expect(manifest.rows)
        self._check_manifest(manifest)
        self._check_bytes()
        invoice = self._decoded(INVOICE, Invoice)
        self._check_header(manifest, invoice)
        prices = {price.digest: price for price in self._decoded(PRICES, list[StatedPrice])}
        self._check_prices(prices)
        terms = self._decoded(TERMS, list[StatedTerms])
        adding = Adding()
        check = RowCheck(invoice.tenant, invoice.period, invoice.tz, prices, terms, self._problem)
        self._check_rows(manifest, check, adding)
        for problem in adding.differences(invoice):
            self._problem(problem)

    def _problem(self, text: str) -> None:
        if len(self._verdict.problems) < PROBLEMS_MAX:
            self._verdict.problems.append(text)

    # ── The file ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _check_names(self) -> None:
        members = self._archive.infolist()
        names = [member.filename for member in members]
        expected = [name for name in FILES if name in names]
        if names != expected or set(FILES) - set(names) - {CLOSE}:
            raise _wrong(f"{self._path} is no invoice bundle: its files are {', '.join(map(ascii, names[:9]))}")
        for member in members:
            if member.compress_type != ZIP_STORED or member.flag_bits & ~0x800 or member.file_size > self._size():
                raise _wrong(f"{self._path}: {member.filename} is not stored as bundles store files")

    def _size(self) -> int:
        return self._path.stat().st_size

    def _check_manifest(self, manifest: BundleManifest) -> None:
        if manifest.schema != BUNDLE_SCHEMA:
            raise _wrong(f"{MANIFEST} is of schema {manifest.schema}; this version knows {BUNDLE_SCHEMA}")
        if manifest.sealed().digest != manifest.digest:
            self._problem(f"{MANIFEST} is not what it was: its digest is another")
        names = [name for name in self._archive.namelist() if name != MANIFEST]
        if sorted(names) != sorted(manifest.files):
            self._problem(f"{MANIFEST} is of other files than there are")
        for name in names:
            digest, size = sha256(), 0
            with self._opened(name) as file:
                for piece in _pieces(file):
                    digest.update(piece)
                    size += len(piece)
            if manifest.files.get(name) != FileFacts(sha256=digest.hexdigest(), bytes=size):
                self._problem(f"{name} is not what it was: its digest is another")
        self._verdict.digest = manifest.digest

    def _check_bytes(self) -> None:
        """The same files make the same bundle, to the last byte: nothing is hidden between them."""
        with TemporaryDirectory(prefix="meterlib-bundle-") as scratch:
            again = Path(scratch) / "bundle.zip"
            with again.open("wb") as file, ZipFile(file, "w", ZIP_STORED) as archive:
                for name in self._archive.namelist():
                    with self._opened(name) as stored:
                        put(archive, name, _pieces(stored))
            if not filecmp.cmp(self._path, again, shallow=False):
                self._problem(f"{self._path} has other bytes than its files make")

    def _opened(self, name: str) -> IO[bytes]:
        try:
            return self._archive.open(name)
        except (BadZipFile, RuntimeError) as error:
            raise _wrong(f"{name} cannot be read: {error}") from None

    def _decoded(self, name: str, kind: Any) -> Any:
        if self._archive.getinfo(name).file_size > MEMBER_BYTES_MAX:
            raise _wrong(f"{name} is too large")
        with self._opened(name) as file:
            try:
                return msgspec.json.decode(file.read(), type=kind)
            except (msgspec.DecodeError, BadZipFile, InvalidOperation) as error:
                raise _wrong(f"{name} cannot be read: {error}") from None

    # ── What it says ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _check_header(self, manifest: BundleManifest, invoice: Invoice) -> None:
        told = (manifest.tenant, manifest.period, manifest.tz)
        if told != (invoice.tenant, invoice.period, invoice.tz):
            self._problem(f"{INVOICE} is of another tenant or period than {MANIFEST}")
        try:
            month = month_named(invoice.period, invoice.tz)
        except (MeterError, ValueError) as error:
            raise _wrong(f"{INVOICE}: {error}") from None
        if (month.start_ms, month.end_ms) != (invoice.from_ms, invoice.until_ms):
            self._problem(f"{INVOICE} begins or ends at another moment than {invoice.period} in {invoice.tz}")
        closed = CLOSE in self._archive.namelist()
        if closed != invoice.closed:
            self._problem(f"{INVOICE} says closed: {invoice.closed}, but there is {'a' if closed else 'no'} {CLOSE}")
        if closed:
            self._check_close(self._decoded(CLOSE, StatedClose), invoice)
        found = self._verdict
        found.tenant, found.period, found.closed = invoice.tenant, invoice.period, invoice.closed
        found.totals = {total.currency: f"{total.total:f}" for total in invoice.totals}

    def _check_close(self, close: StatedClose, invoice: Invoice) -> None:
        told = (close.period, close.tz, close.from_ms, close.until_ms)
        if told != (invoice.period, invoice.tz, invoice.from_ms, invoice.until_ms):
            self._problem(f"{CLOSE} is of another period than {INVOICE}")
        billed: dict[str, Decimal] = {}
        for total in close.totals:
            if total.get("tenant") != invoice.tenant:
                self._problem(f"{CLOSE} has a total of somebody else")
            currency = str(total.get("currency"))
            billed[currency] = plus(billed.get(currency, ZERO), _number(str(total.get("billed_cost"))))
        invoiced = {total.currency: total.exact for total in invoice.totals}
        # A currency whose rows were all taken back comes to nothing: the close says so, the invoice has no line of it.
        if any(billed.get(currency, ZERO) != invoiced.get(currency, ZERO) for currency in billed.keys() | invoiced):
            self._problem(f"{CLOSE} has other totals than {INVOICE}")

    def _check_prices(self, prices: Mapping[str, StatedPrice]) -> None:
        unknown = [digest for digest, price in prices.items() if not price.found]
        if unknown:
            count = f"{len(unknown)} of {len(prices)} prices"
            self._verdict.notes.append(f"{count} are in no book any more: only what rows say of them was checked")
        for digest, price in prices.items():
            if price.found and price.rate().digest != digest:
                self._problem(f"{PRICES}: the price {digest[:16]} of {price.model} is not the one of that digest")

    # ── Rows and entries ──────────────────────────────────────────────────────────────────────────────────────────────

    def _check_rows(self, manifest: BundleManifest, check: RowCheck, adding: Adding) -> None:
        """Rows beside the entries that they are of; both are in the same order."""
        entries = self._entries()
        entry = next(entries, None)
        for place, rows in groupby(self._rows(), key=lambda row: (row["epoch"], row["shard"], row["n"])):
            while entry is not None and _place(entry) < place:
                check.passed(entry)
                entry = next(entries, None)
            own = entry if entry is not None and _place(entry) == place else None
            mine = list(rows)
            check.rows(place, mine, own)
            if own is not None:
                entry = next(entries, None)
            for row in mine:
                adding.add(row)
            self._verdict.rows += len(mine)
            self._advance(len(mine))
        while entry is not None:
            check.passed(entry)
            entry = next(entries, None)
        found = (self._verdict.rows, self._verdict.entries)
        if found != (manifest.rows, manifest.entries):
            self._problem(f"{MANIFEST} counts {manifest.rows} rows and {manifest.entries} entries; there are {found}")

    def _rows(self) -> Iterator[dict[str, Any]]:
        last: tuple[Any, ...] = ()
        with self._opened(ROWS) as file:
            lines = csv.reader(_lines(file, ROWS), strict=True)
            try:
                for number, cells in enumerate(lines):
                    if number == 0:
                        if cells != list(ROW_COLUMNS):
                            raise _wrong(f"{ROWS} has other columns than bundles have")
                        continue
                    row = _row_of(cells, number)
                    key = (row["epoch"], row["shard"], row["n"], row["line"])
                    if last and key <= last:
                        raise _wrong(f"{ROWS}, row {number}: rows are out of order, or told twice")
                    last = key
                    yield row
            except csv.Error as error:
                raise _wrong(f"{ROWS}, line {lines.line_num}: {error}") from None

    def _entries(self) -> Iterator[LedgerEntry]:
        last: tuple[Any, ...] = ()
        with self._opened(ENTRIES) as file:
            for number, line in enumerate(_lines(file, ENTRIES), 1):
                entry = _entry_of(line, number)
                if last and _place(entry) <= last:
                    raise _wrong(f"{ENTRIES}, line {number}: entries are out of order, or told twice")
                last = _place(entry)
                self._verdict.entries += 1
                yield entry


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    while piece := file.read(_READ_BYTES):
        yield piece


def _lines(file: IO[bytes], name: str) -> Iterator[str]:
    """The lines of a file as text; quoted line breaks make several of one, as `csv` wants it."""
    reader = io.BufferedReader(file)  # type: ignore[type-var]
    while line := reader.readline(LINE_BYTES_MAX):
        if len(line) >= LINE_BYTES_MAX:
            raise _wrong(f"{name} has a line that is too long")
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError:
            raise _wrong(f"{name} is no text") from None


def _row_of(cells: list[str], number: int) -> dict[str, Any]:
    row: dict[str, Any] = {}
    try:
        for (name, kind), cell in zip(ROW_COLUMNS.items(), cells, strict=True):
            if kind == "VARCHAR":
                row[name] = text_of(cell)
            elif kind.startswith("DECIMAL"):
                row[name] = _number(cell) if cell else None
            else:
                row[name] = int(cell)
    except (ValueError, InvalidOperation) as error:
        raise _wrong(f"{ROWS}, row {number} cannot be read: {error}") from None
    return row


def _number(text: str) -> Decimal:
    number = Decimal(text)
    if not number.is_finite():
        raise InvalidOperation(f"{text!r:.40} is no number")
    return number


def _entry_of(line: str, number: int) -> LedgerEntry:
    try:
        told: Any = msgspec.json.decode(line)
        n, *values = (str(told[name]) for name in tuple(VERBATIM)[: len(STORED) + 1])
        fields = {name: value.encode() for name, value in zip(STORED, values, strict=True)}
        if told.keys() != {"shard", *VERBATIM}:
            raise ValueError("it has other fields than entries have")
        if told["more"]:
            fields |= {name.encode(): value.encode() for name, value in msgspec.json.decode(told["more"]).items()}
        return entry_of(int(told["shard"]), int(n), fields)
    except (msgspec.MsgspecError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise _wrong(f"{ENTRIES}, line {number} cannot be read: {error}") from None


def _place(entry: LedgerEntry) -> tuple[str, int, int]:
    return entry.epoch, entry.shard, entry.n


def _wrong(text: str) -> IntegrityError:
    return IntegrityError("damaged", text)
