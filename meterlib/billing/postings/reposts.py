"""Re-ratings as they stand in an archive: a folder of rows for each, that take back and post anew, and a manifest.

    archive/rated/rating-0001/manifest.json
                              1790000000000-0003-000000000001-000000050000-8c1f….parquet    rows of these entries

A re-rating is there as a whole or not at all: its folder is renamed into place, and its number can be taken once.
"""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path

import msgspec

from meterlib.billing.postings.pieces import TermsOf, of_another_version
from meterlib.billing.prices.pinned import Scale
from meterlib.errors import IntegrityError

MANIFEST = "manifest.json"
REPOST_SCHEMA = 3
_FOLDER = re.compile(r"rating-([0-9]{4,})")


class _Version(msgspec.Struct):
    schema: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a re-rating is.

    Attributes:
        schema: version of this record.
        number: which re-rating it is, from 1.
        posted_at_ms: when it was posted, in ms since 1970 UTC.
        library: the version of meterlib.
        book: what prices were asked for.
        since_ms: calls from this moment on were rated again; None for all.
        until_ms: calls before this moment; None for all.
        terms: of the tenants that were rated again.
        scales: what the books said of all that was rated again.
        files: the files of rows, each with its control totals.
        digest: of all else.
    """

    schema: int
    number: int
    posted_at_ms: int
    library: str
    book: str
    since_ms: int | None
    until_ms: int | None
    terms: list[TermsOf]
    scales: list[Scale]
    files: dict[str, dict[str, str]]
    digest: str = ""

    def sealed(self) -> Manifest:
        """The manifest with its digest."""
        return msgspec.structs.replace(self, digest=digest_of(self))


class Repost(msgspec.Struct, frozen=True):
    """A re-rating in its folder."""

    folder: Path
    manifest: Manifest

    @property
    def number(self) -> int:
        """Which re-rating it is."""
        return self.manifest.number

    @property
    def posted_at_ms(self) -> int:
        """When it was posted."""
        return self.manifest.posted_at_ms

    @property
    def files(self) -> list[str]:
        """The names of its files."""
        return sorted(self.manifest.files)

    def paths(self) -> list[Path]:
        """Where they are."""
        return [self.folder / name for name in self.files]


def digest_of(manifest: Manifest) -> str:
    """SHA-256 over the manifest without its digest."""
    return sha256(encoded(msgspec.structs.replace(manifest, digest=""))).hexdigest()


def encoded(manifest: Manifest) -> bytes:
    """The bytes of a manifest's file."""
    text = msgspec.json.encode(manifest, order="deterministic")
    return msgspec.json.format(text, indent=1) + b"\n"


def folder_of(number: int) -> str:
    """The name of a re-rating's folder."""
    return f"rating-{number:04d}"


def reposts_of(rated: Path) -> list[Repost]:
    """All re-ratings, in order.

    Raises:
        IntegrityError: one is damaged or missing.
    """
    names = [folder.name for folder in rated.iterdir()] if rated.is_dir() else []
    numbers = sorted(int(match[1]) for name in names if (match := _FOLDER.fullmatch(name)))
    if numbers != list(range(1, len(numbers) + 1)):
        lacks = next(at for at in range(1, len(numbers) + 1) if at not in numbers)
        raise IntegrityError("damaged", f"{rated / folder_of(lacks)} is missing: there are later re-ratings")
    return [_read(rated / folder_of(number), number) for number in numbers]


def _read(folder: Path, number: int) -> Repost:
    file = folder / MANIFEST
    try:
        data = file.read_bytes()
        schema = msgspec.json.decode(data, type=_Version).schema
        if schema != REPOST_SCHEMA:
            raise of_another_version(file, schema, REPOST_SCHEMA)
        manifest = msgspec.json.decode(data, type=Manifest)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise IntegrityError("damaged", f"{file} cannot be read: {error}") from None
    if manifest.number != number or manifest.digest != digest_of(manifest) or encoded(manifest) != data:
        raise IntegrityError("damaged", f"{file} is not what was written: its digest is another")
    for name in manifest.files:
        if not (folder / name).is_file():
            raise IntegrityError("damaged", f"{folder / name} is missing")
    return Repost(folder, manifest)
