"""JSON objects in a file, one behind the other or in a list, found without reading the file as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

from meterlib.errors import InvalidInput

_READ_BYTES = 1 << 20
_OPTION = "--provider-file"
_TOKENS = re.compile(rb'[{}\[\]]|"(?:[^"\\]|\\.)*+"|"', re.DOTALL)
_BETWEEN = b" \t\r\n,"
_BOM = b"\xef\xbb\xbf"


def objects_of(file: BinaryIO, name: str) -> Iterator[bytes]:
    """The JSON objects of a file: one behind the other, or elements of a list, as bytes; one is held at a time.

    Raises:
        InvalidInput: there is something else between them, or the file ends within one.
    """
    buffer, start, scanned, depth, base = b"", 0, 0, 0, 0
    first = True
    while chunk := file.read(_READ_BYTES):
        buffer, scanned, start = buffer[start:] + chunk, scanned - start, 0
        if first:
            buffer, first = buffer.removeprefix(_BOM), False
        while token := _TOKENS.search(buffer, scanned):
            found = token[0]
            if found == b'"':  # a text that goes on in the next piece; or the end of an escape does
                break
            if depth == base and buffer[start : token.start()].strip(_BETWEEN):
                raise _not_json(name)
            if found == b"[" and depth == base == 0:
                depth = base = 1
                start = token.end()
            elif found in (b"{", b"["):
                if depth == base and found == b"[":
                    raise _not_json(name)
                start = token.start() if depth == base else start
                depth += 1
            elif found in (b"}", b"]"):
                if depth == 0 or (depth == base and found == b"}"):
                    raise _not_json(name)
                depth -= 1
                if depth == base and found == b"}":
                    yield buffer[start : token.end()]
                    start = token.end()
                elif depth < base:
                    base, depth, start = 0, 0, token.end()
            elif depth == base:
                raise _not_json(name)
            scanned = token.end()
    if depth or buffer[start:].strip(_BETWEEN):
        raise _not_json(name) if not depth else InvalidInput(_OPTION, f"{name} ends in the middle of a value")


def _not_json(name: str) -> InvalidInput:
    return InvalidInput(_OPTION, f"{name} is no JSON of reports: objects are needed, one behind the other or in a list")
