"""Encodings are undone piece by piece: at once, within bounds, and whatever the bytes are."""

from __future__ import annotations

import contextlib
import importlib
import random
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meterlib.gateway.encodings import PIECE_BYTES, TooLarge, Unreadable, decoder_for
from tests.gateway.answers import Answer, Encoding, encodings

PLENTY = 1 << 24
KNOWN = encodings()
each_encoding = pytest.mark.parametrize("name", KNOWN)
NAMES = ["identity", "gzip", "x-gzip", "deflate", "br", "zstd"]


def encoded(name: Any, *parts: bytes) -> list[bytes]:
    """The parts, each flushed, and the end."""
    answer = Answer(events=list(parts), encoding=name)
    return [piece for piece in answer.pieces() if isinstance(piece, bytes)]


def decoded(name: str | None, data: bytes, every: int | None = None, bytes_max: int = PLENTY) -> bytes:
    decoder = decoder_for(name, bytes_max)
    step = every or len(data) or 1
    return b"".join([decoder.feed(data[at : at + step]) for at in range(0, len(data), step)])


def raw_deflate(data: bytes) -> bytes:
    encoder = zlib.compressobj(wbits=-15)
    return encoder.compress(data) + encoder.flush()


payloads = st.one_of(
    st.binary(max_size=300),
    st.integers(0, 3 * PIECE_BYTES).map(lambda size: b"data: ab\n" * (size // 9)),
    st.integers(0, 2 * PIECE_BYTES).map(lambda size: random.Random(size).randbytes(size)),
)


@given(payload=payloads, name=st.sampled_from(KNOWN), every=st.sampled_from([None, 1, 7, 1000, PIECE_BYTES]))
@settings(max_examples=120)
def test_what_was_encoded_is_decoded_however_it_is_cut(payload: bytes, name: Encoding, every: int | None) -> None:
    """One byte at a time or all at once."""
    data = b"".join(encoded(name, payload))
    if every == 1:
        data, payload = b"".join(encoded(name, payload[:2000])), payload[:2000]

    assert payload == decoded(name, data, every)


@each_encoding
def test_each_flushed_piece_is_there_at_once(name: Encoding) -> None:
    """A stream's events are seen as they come, also those larger than what is decompressed at a time."""
    parts = [b"one\n", "zwei 二\n".encode(), b"x" * (5 * PIECE_BYTES), random.Random(1).randbytes(3 * PIECE_BYTES)]
    decoder = decoder_for(name, PLENTY)

    assert [*parts, b"", b""] == [decoder.feed(piece) for piece in [*encoded(name, *parts), b""]]


@each_encoding
@pytest.mark.parametrize("every", [None, 1, 5])
def test_members_and_frames_may_follow_each_other(name: Encoding, every: int | None) -> None:
    """gzip and zstd allow it; what follows the end in the others is nothing that was ever promised."""
    first, second = b"".join(encoded(name, b"first ")), b"".join(encoded(name, b"second"))
    if name in ("gzip", "zstd"):
        assert b"first second" == decoded(name, first + second, every)
    else:
        with contextlib.suppress(Unreadable):
            assert decoded(name, first + second, every).startswith(b"first ")


@pytest.mark.parametrize("every", [None, 1, 2, 3])
def test_deflate_comes_with_and_without_its_frame(every: int | None) -> None:
    """The standard says with, and many servers went without."""
    payload = b"The same words, the same words, and others." * 50

    assert payload == decoded("deflate", zlib.compress(payload), every)
    assert payload == decoded("deflate", raw_deflate(payload), every)


@each_encoding
def test_a_bomb_is_noticed_before_it_fills_the_memory(name: Encoding) -> None:
    """What a few bytes become is counted as it comes; up to the limit everything passes, and not one byte more."""
    data = b"".join(encoded(name, bytes(1_000_000)))
    assert len(data) < 5000

    assert 1_000_000 == len(decoded(name, data, bytes_max=1_000_000))
    with pytest.raises(TooLarge):
        decoded(name, data, bytes_max=999_999)
    with pytest.raises(TooLarge):
        decoded(name, data, 1, bytes_max=999_999)


@pytest.mark.parametrize("name", [None, "identity", "", " Identity "])
def test_what_is_not_encoded_is_counted_too(name: str | None) -> None:
    """The limit is the same for all."""
    assert b"12345" == decoded(name, b"12345", bytes_max=5)
    with pytest.raises(TooLarge):
        decoded(name, b"123456", bytes_max=5)


@pytest.mark.parametrize(
    "name", ["sdch", "gzip, br", "gzip,gzip", "br;q=1", "*", "compress", "zst d", "\x00", "g" * 999]
)
def test_what_is_not_known_is_not_guessed(name: str) -> None:
    """Several encodings on top of each other are one of the unknown ones."""
    with pytest.raises(Unreadable) as caught:
        decoder_for(name, PLENTY)

    assert len(str(caught.value)) < 120


@given(name=st.sampled_from(NAMES), pieces=st.lists(st.binary(max_size=400), max_size=6))
@settings(max_examples=150)
def test_any_bytes_are_decoded_or_unreadable(name: str, pieces: list[bytes]) -> None:
    """There is no third way: no other exception, and no endless loop."""
    decoder = decoder_for(name, PLENTY)
    with contextlib.suppress(Unreadable):
        for piece in pieces:
            decoder.feed(piece)


@given(name=st.sampled_from(KNOWN), at=st.integers(0, 10_000), bit=st.integers(0, 7), every=st.sampled_from([None, 3]))
@settings(max_examples=150)
def test_one_wrong_bit_harms_nobody(name: Encoding, at: int, bit: int, every: int | None) -> None:
    """Spoilt data ends in another text or in an error, within the same bounds."""
    data = bytearray(b"".join(encoded(name, b"Naive sums drift. " * 40, random.Random(2).randbytes(500))))
    data[at % len(data)] ^= 1 << bit
    with contextlib.suppress(Unreadable, TooLarge):
        assert len(decoded(name, bytes(data), every, bytes_max=100_000)) <= 100_000


@each_encoding
def test_what_is_cut_off_keeps_what_came(name: Encoding) -> None:
    """The end of an encoding is not waited for."""
    first, *_ = encoded(name, b"data: 1\n\n", b"data: 2\n\n")

    assert b"data: 1\n\n" == decoded(name, first)


@pytest.mark.parametrize(("name", "modules"), [("br", ["brotli"]), ("zstd", ["compression.zstd", "backports.zstd"])])
def test_an_encoding_whose_library_is_missing_is_unreadable(
    name: str, modules: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says what to install; it is no reason to fail."""
    import_module: Callable[..., Any] = importlib.import_module

    def without(wanted: str, *rest: Any) -> Any:
        if wanted in modules:
            raise ImportError(wanted)
        return import_module(wanted, *rest)

    monkeypatch.setattr("meterlib.gateway.encodings.import_module", without)
    with pytest.raises(Unreadable, match="meterlib"):
        decoder_for(name, PLENTY)
