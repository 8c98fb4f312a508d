"""Content encodings undone piece by piece, so that a copy of what passes can be read. What passes stays as it is."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from contextlib import suppress
from importlib import import_module
from typing import Any, Protocol

PIECE_BYTES = 1 << 16
"""How much is decompressed at a time, so that a small piece of input cannot fill the memory."""

ZLIB_HEAD_BYTES = 2
MEMBER_BYTES = 4096
"""What a further gzip member or zstd frame counts as at least: millions of empty ones are no answer either."""


class TooLarge(Exception):
    """What comes out is more than was allowed."""


class Unreadable(Exception):
    """The bytes are not of the encoding that they claim to be, or of one that is not known here."""


class Decoder(Protocol):
    """Undoes one encoding."""

    def feed(self, data: bytes) -> bytes:
        """The decoded bytes that this piece yields.

        Raises:
            TooLarge: they would be more than allowed, all together.
            Unreadable: this is no such encoding.
        """


def decoder_for(encoding: str | None, bytes_max: int) -> Decoder:
    """A decoder for the value of `content-encoding`; at most so many bytes come out of it, all together.

    Raises:
        Unreadable: several encodings, or one that is not known here.
    """
    name = (encoding or "identity").strip().lower()
    match name:
        case "identity" | "":
            return _Identity(bytes_max)
        case "gzip" | "x-gzip" | "deflate":
            return _Zlib(name == "deflate", bytes_max)
        case "br":
            return _Brotli(bytes_max)
        case "zstd":
            return _Zstandard(bytes_max)
    raise Unreadable(f"the encoding {name!r:.40} is not known")


class _Counted:
    """Keeps count of what comes out."""

    def __init__(self, bytes_max: int) -> None:
        self._left = bytes_max

    def _count(self, data: bytes, size: int = 0) -> bytes:
        self._left -= size or len(data)
        if self._left < 0:
            raise TooLarge
        return data


class _InPieces(_Counted, ABC):
    """Takes its input in pieces, since what a piece leaves over is copied for each step that is made with it."""

    def feed(self, data: bytes) -> bytes:
        return b"".join([self._fed(data[at : at + PIECE_BYTES]) for at in range(0, len(data) or 1, PIECE_BYTES)])

    @abstractmethod
    def _fed(self, data: bytes) -> bytes:
        """The decoded bytes of at most PIECE_BYTES."""


class _Identity(_Counted):
    def feed(self, data: bytes) -> bytes:
        return self._count(data)


class _Zlib(_InPieces):
    """gzip with any number of members, and deflate with or without zlib's own frame."""

    def __init__(self, deflate: bool, bytes_max: int) -> None:
        super().__init__(bytes_max)
        self._bits = 15 if deflate else 31
        self._undo = zlib.decompressobj(self._bits)
        self._may_be_raw = deflate
        self._begin = b""

    def _fed(self, data: bytes) -> bytes:
        if self._may_be_raw:
            data = self._begin = self._begin + data
            if len(data) < ZLIB_HEAD_BYTES:
                return b""  # it takes that much to see which of the two it is
        found, more = [], True
        while data or more:
            piece, data = self._take(data)
            found.append(self._count(piece))
            more = len(piece) == PIECE_BYTES  # there may be output left that needs no further input
        return b"".join(found)

    def _take(self, data: bytes) -> tuple[bytes, bytes]:
        if self._undo.eof and data:
            self._count(b"", MEMBER_BYTES)
            self._undo = zlib.decompressobj(self._bits)
        try:
            piece = self._undo.decompress(data, PIECE_BYTES)
        except zlib.error as error:
            if not self._may_be_raw:
                raise Unreadable(str(error)) from None
            self._bits, self._may_be_raw = -15, False
            self._undo = zlib.decompressobj(self._bits)
            return b"", data
        self._may_be_raw = False
        return piece, self._undo.unconsumed_tail or self._undo.unused_data


class _Brotli(_InPieces):
    def __init__(self, bytes_max: int) -> None:
        super().__init__(bytes_max)
        library = _imported("brotli")
        self._undo: Any = library.Decompressor()
        self._error: type[Exception] = library.error

    def _fed(self, data: bytes) -> bytes:
        found = []
        try:
            while piece := self._undo.process(data, output_buffer_limit=PIECE_BYTES):
                found.append(self._count(piece))
                data = b""  # it keeps what it has not come to, also where it would accept more
        except self._error as error:
            raise Unreadable(str(error)) from None
        return b"".join(found)


class _Zstandard(_InPieces):
    """Any number of frames."""

    def __init__(self, bytes_max: int) -> None:
        super().__init__(bytes_max)
        self._library = _imported("compression.zstd", "backports.zstd")
        self._undo: Any = self._library.ZstdDecompressor()

    def _fed(self, data: bytes) -> bytes:
        found = []
        try:
            while data or not self._undo.needs_input:
                if self._undo.eof:
                    data = self._undo.unused_data + data
                    if not data:
                        break
                    self._count(b"", MEMBER_BYTES)
                    self._undo = self._library.ZstdDecompressor()
                found.append(self._count(self._undo.decompress(data, PIECE_BYTES)))
                data = b""
        except self._library.ZstdError as error:
            raise Unreadable(str(error)) from None
        return b"".join(found)


def _imported(*names: str) -> Any:
    for name in names:
        with suppress(ImportError):
            return import_module(name)
    raise Unreadable(f"{names[-1]} is not installed; install meterlib[gateway]")
