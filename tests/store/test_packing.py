"""Values on their way to scripts and back: the same bytes for Python, for the servers, and for fakeredis's stand-in."""

from __future__ import annotations

import struct
from typing import Any

import fakeredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterlib.core.operations import LimitArguments, Reply, Value, packed, unpacked
from meterlib.store.scripts import included
from tests.support.servers import Server

numbers = st.one_of(
    st.integers(0, 2**53 - 1),
    st.integers(0, 300),
    st.sampled_from([2**power + off for power in range(53) for off in (0, 1)]),
)
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20).map(str.encode)
values = st.lists(st.one_of(numbers, texts), min_size=1, max_size=12)

REPACK = "return struct.pack(ARGV[1], struct.unpack(ARGV[1], ARGV[2]))"
HAND_BACK = "return struct.pack('>s', string.sub(ARGV[1], 2)) .. struct.pack(ARGV[1], struct.unpack(ARGV[1], ARGV[2]))"


def form_of(found: list[Any]) -> str:
    return ">" + "".join("d" if isinstance(value, int) else "s" for value in found)


@pytest.fixture(scope="module")
def stand_in() -> Any:
    """Runs a script on fakeredis, as a plain driver would."""
    client = fakeredis.FakeRedis()
    return lambda text, *words: client.eval(included("struct") + text, 0, *words)


@given(found=values)
def test_the_stand_in_reads_and_packs_what_python_packs(stand_in: Any, found: list[Value]) -> None:
    """Who tests with fakeredis stores what a server would store."""
    form = form_of(found)

    assert packed(found) == stand_in(REPACK, form, packed(found))


@given(found=values)
def test_the_servers_read_and_pack_what_python_packs(valkey: Server, found: list[Value]) -> None:
    """No number loses a digit on its way."""
    with valkey.client() as client:
        assert packed(found) == client.eval(REPACK, 0, form_of(found), packed(found))


@given(found=values)
def test_an_answer_is_read_as_it_was_packed(stand_in: Any, found: list[Value]) -> None:
    """Answers say their own format."""
    form = form_of(found)

    assert found == unpacked(stand_in(HAND_BACK, form, packed(found)))
    if isinstance(found[-1], int):
        starred = f"{form[1:].rstrip('d')}d*".encode() + b"\0" + packed(found)
        assert found == unpacked(starred)


@given(junk=st.binary(max_size=40), form=st.sampled_from([b"", b"sd\0", b"sd*\0", b"sdsdddsss\0", b"x\0"]))
def test_what_is_no_answer_is_told_from_one(junk: bytes, form: bytes) -> None:
    """A proxy's error page is not taken for a decision, and breaks nothing."""
    try:
        found: Reply = unpacked(form + junk)
    except ValueError:
        return
    assert found


@given(amount=numbers, field=st.sampled_from(["w/acme/requests", "w/*/tokens/ä"]))
def test_a_limit_is_led_by_its_size(amount: int, field: str) -> None:
    """A script finds the next limit without reading this one."""
    limit = LimitArguments(field, "requests", amount, 7, "admit", 60_000, 1000, 0, 0, "keep")
    made = limit.packed()

    assert packed((len(made), *limit)) == made
    assert (len(made),) == struct.unpack_from(">d", made)
