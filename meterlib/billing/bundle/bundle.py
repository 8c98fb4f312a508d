"""An invoice with all that is needed to check it, in one file for the customer: `invoice.zip`.

    invoice.json    the invoice
    rows.csv        the rated rows that it adds up: quantity, list price, the customer's price, cost, and what of
    entries.jsonl   the ledger's words on each of these calls, and on the calls that corrections among them are about
    prices.json     each price that rows name, in full, and for which calls it held: its digest is that of the rows
    terms.json      discount, mark-up and fee, and for which entries they held; corrections have those of their calls
    close.json      what the close of the period says of this customer; not there while the period is open
    manifest.json   what all of this is, and the SHA-256 of each file

Nothing in it is of another customer, nor what the operator itself pays. The same archive gives the same bytes: files
are stored as they are, in this order, under one date, so that each byte of the bundle is either told or known.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, NamedTuple
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import msgspec

import meterlib
from meterlib.billing.archive.rows import VERBATIM
from meterlib.billing.prices.prices import Rate
from meterlib.billing.prices.terms import Terms
from meterlib.billing.rating.rating_sql import COLUMNS
from meterlib.billing.reports.invoice import Invoice
from meterlib.core.money import plain

BUNDLE_SCHEMA = 2
INVOICE, ROWS, ENTRIES, PRICES, TERMS, CLOSE, MANIFEST = (
    *("invoice.json", "rows.csv", "entries.jsonl", "prices.json", "terms.json", "close.json", "manifest.json"),
)
FILES = (INVOICE, ROWS, ENTRIES, PRICES, TERMS, CLOSE, MANIFEST)
"""All files that a bundle may have, in their order."""

ROW_COLUMNS = {
    **{name: kind for name, kind in COLUMNS.items() if not name.startswith("upstream_")},
    "booked_at_ms": "BIGINT",
    "rating": "INTEGER",
    "posted_at_ms": "BIGINT",
    "period": "VARCHAR",
    "corrects": "VARCHAR",
}
"""Columns of `rows.csv`: of a rated row all but what the operator pays, and to which period it belongs."""

_DATE = (1980, 1, 1, 0, 0, 0)
_MODE = 0o644 << 16
_PAGE = 5_000


class StatedTerms(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Terms of the customer, and where they held: for entries of a shard, or for a re-rating.

    Attributes:
        rating: 0, or the number of the re-rating.
        epoch: of the entries; empty for a re-rating, as the next three are.
        shard: of them.
        first: of them; so `last`.
        discount: off the list price, as a fraction; so the next two.
        markup: on what the discount left.
        platform_fee: on the list price of calls with the customer's own key.
        corrects: of a correction, which is `first` and `last`, the call whose terms it has, as `shard:n`; else empty.
        rerated: of a correction: the re-rating by which the call has them, or 0 for its first rating.
    """

    rating: int
    epoch: str = ""
    shard: int = 0
    first: int = 0
    last: int = 0
    discount: Decimal
    markup: Decimal
    platform_fee: Decimal
    corrects: str = ""
    rerated: int = 0

    @property
    def terms(self) -> Terms:
        """As terms."""
        return Terms(discount=self.discount, markup=self.markup, platform_fee=self.platform_fee)


class Held(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """For which calls a price held.

    Attributes:
        from_ms: those from this moment on, in ms since 1970 UTC.
        until_ms: and before this one.
        tiers: of how many tokens a prompt has to be longer for each of the prices that held then, the lowest first.
    """

    from_ms: int
    until_ms: int
    tiers: list[int]

    def tier(self, prompt: int) -> int:
        """The one for a prompt of so many tokens."""
        return max((tier for tier in self.tiers[1:] if prompt > tier), default=self.tiers[0])


class StatedPrice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A price that rows name, as `prices.Rate` has it.

    Attributes:
        digest: by which rows name it.
        found: whether it is known in full; otherwise nothing but the digest is known, and what rows say.
        held: for which calls; not part of what the digest is of.
    """

    digest: str
    found: bool
    source: str = ""
    provider: str = ""
    model: str = ""
    variant: str = ""
    geo: str = ""
    above: int = 0
    currency: str = ""
    valid_from: str = ""
    prices: dict[str, Decimal] = {}
    held: list[Held] = []

    def rate(self) -> Rate:
        """As a rate, whose digest is made of what it says."""
        told = {name: getattr(self, name) for name in Rate.__struct_fields__}
        return Rate(**told)


class StatedClose(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a close says of one customer.

    Attributes:
        digest: of the whole record, which the operator keeps; so `before`, of the one before it.
        totals: what rows of the customer came to, as `closes.ClosedTotal`, without what the operator pays.
    """

    period: str
    tz: str
    from_ms: int
    until_ms: int
    closed_at_ms: int
    digest: str
    before: str
    totals: list[dict[str, str | int]]


class FileFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a file of the bundle is: its SHA-256, and its size."""

    sha256: str
    bytes: int


class BundleManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a bundle is.

    Attributes:
        schema: version of the bundle.
        library: the version of meterlib that wrote it.
        tenant: whose invoice.
        period: the month.
        tz: the zone that it is a month of.
        rows: how many rated rows there are; so `entries`.
        files: the other files.
        digest: SHA-256 of all else here; whoever has it from the operator knows that nothing was exchanged.
    """

    schema: int
    library: str
    tenant: str
    period: str
    tz: str
    rows: int
    entries: int
    files: dict[str, FileFacts]
    digest: str = ""

    def sealed(self) -> BundleManifest:
        """The manifest with its digest."""
        told = msgspec.structs.replace(self, digest="")
        return msgspec.structs.replace(self, digest=sha256(encoded(told)).hexdigest())


def encoded(value: Any) -> bytes:
    """JSON whose bytes depend on nothing but the value, for people too."""
    return msgspec.json.format(msgspec.json.encode(value, order="deterministic"), indent=2) + b"\n"


class Bundle(NamedTuple):
    """What goes into a bundle; rows and entries in order of epoch, shard, number (and line)."""

    invoice: Invoice
    rows: Iterable[Sequence[Any]]
    entries: Iterable[Mapping[str, Any]]
    prices: Sequence[StatedPrice]
    terms: Sequence[StatedTerms]
    close: StatedClose | None = None


# ── Writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_bundle(path: Path, bundle: Bundle) -> BundleManifest:
    """Write a bundle; it is there under its name, whole and on the disk, when this returns, or not at all.

    Raises:
        OSError: the disk is full, or fails.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            manifest = _write(file, bundle)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        draft.unlink(missing_ok=True)
    return manifest


def _write(file: IO[bytes], bundle: Bundle) -> BundleManifest:
    invoice = bundle.invoice
    with ZipFile(file, "w", ZIP_STORED) as archive:
        files = {INVOICE: put(archive, INVOICE, [encoded(invoice)])}
        rows, entries = _Counted(_csv_of(bundle.rows)), _Counted(_lines_of(bundle.entries))
        files[ROWS] = put(archive, ROWS, rows)
        files[ENTRIES] = put(archive, ENTRIES, entries)
        files[PRICES] = put(archive, PRICES, [encoded(bundle.prices)])
        files[TERMS] = put(archive, TERMS, [encoded(bundle.terms)])
        if bundle.close is not None:
            files[CLOSE] = put(archive, CLOSE, [encoded(bundle.close)])
        manifest = BundleManifest(
            schema=BUNDLE_SCHEMA,
            library=meterlib.__version__,
            tenant=invoice.tenant,
            period=invoice.period,
            tz=invoice.tz,
            rows=rows.count - 1,
            entries=entries.count,
            files=files,
        ).sealed()
        put(archive, MANIFEST, [encoded(manifest)])
    return manifest


class _Counted:
    """Pieces that are counted as they pass."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = pieces
        self.count = 0

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            self.count += 1
            yield piece


def put(archive: ZipFile, name: str, pieces: Iterable[bytes]) -> FileFacts:
    """Store a file; nothing of it depends on when or where."""
    info = ZipInfo(name, _DATE)
    info.compress_type = ZIP_STORED
    info.create_system = 3
    info.external_attr = _MODE
    digest, size = sha256(), 0
    with archive.open(info, "w", force_zip64=True) as stored:
        for piece in pieces:
            stored.write(piece)
            digest.update(piece)
            size += len(piece)
    return FileFacts(sha256=digest.hexdigest(), bytes=size)


_TEXTS = [kind == "VARCHAR" for kind in ROW_COLUMNS.values()]


def _csv_of(rows: Iterable[Sequence[Any]]) -> Iterator[bytes]:
    yield csv_line(list(ROW_COLUMNS))
    for row in rows:
        yield csv_line([_cell(value, text) for value, text in zip(row, _TEXTS, strict=True)])


def _cell(value: Any, text: bool) -> str:
    if value is None:
        return ""
    if text:
        return f"'{value}" if str(value).startswith(_FORMULA) else str(value)
    return plain(value) if isinstance(value, Decimal) else str(value)


_FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")


def text_of(cell: str) -> str:
    """The text of a cell, which no spreadsheet takes for a formula."""
    return cell.removeprefix("'")


def csv_line(cells: Sequence[str]) -> bytes:
    """A line of CSV."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().encode()


def _lines_of(entries: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    for entry in entries:
        yield msgspec.json.encode({name: entry[name] for name in ("shard", *VERBATIM)}) + b"\n"
