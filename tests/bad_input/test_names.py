"""Tenants, attributes and ids: what may name something, and what could be taken for another name."""

from __future__ import annotations

from typing import Any

import pytest

from meterlib import LedgerEntry, Usage
from tests.bad_input.support import Face

ENTRY = LedgerEntry(
    shard=0,
    n=1,
    kind="settled",
    reservation_id="call-1",
    tenant="acme",
    attributes={},
    funding="hosted",
    usage={},
    quality="final",
    reserved_at=0,
    booked_at=0,
)
OF_A_TENANT: list[tuple[str, tuple[Any, ...]]] = [
    ("reserve", ({}, Usage())),
    ("revise", ("call-1", Usage())),
    ("renew", ("call-1",)),
    ("settle", ("call-1", Usage())),
    ("cancel", ("call-1",)),
    ("record", ({}, Usage())),
    ("peek", ()),
    ("find", ("call-1",)),
    ("quotas_of", ({},)),
    ("funding_of", ()),
]
UNFIT_TEXT: list[tuple[Any, str]] = [
    (None, "not NoneType"),
    (5, "not int"),
    (b"acme", "not bytes"),
    (["acme"], "not list"),
    ("", "is empty"),
    ("a\nb", "cannot be printed"),
    ("a\rb", "cannot be printed"),
    ("a\tb", "cannot be printed"),
    ("a\0b", "cannot be printed"),
    ("a\x7fb", "cannot be printed"),
    ("\ud800", "cannot be printed"),
    ("a\u200bb", "cannot be printed"),
    ("\u202eacme", "cannot be printed"),
    ("a\u00a0b", "cannot be printed"),
    ("cafe\u0301", "not normalised"),
    ("\ufb01rm", "not normalised"),
    ("\uff41cme", "not normalised"),
    ("\u212a", "not normalised"),
    (" acme", "a space at an end"),
    ("acme ", "a space at an end"),
]
EMPTY: list[Any] = ["", 0, []]
ODD_BUT_FIT = [
    "a",
    "x" * 128,
    "é" * 64,
    "{acme}",
    "{}",
    "}{",
    "a}:w",
    "acme:eu",
    "acme/eu",
    "acme%2Feu",
    "*",
    "acme?[a-z]*",
    "acme, inc. & sons",
    'a"b\\c',
    "東京",
    "\u0430cme",
    "🙂",
]


@pytest.mark.parametrize(("verb", "rest"), OF_A_TENANT, ids=[verb for verb, _ in OF_A_TENANT])
@pytest.mark.parametrize(("tenant", "problem"), [*UNFIT_TEXT, ("x" * 129, "1 to 128 bytes"), ("é" * 65, "has 130")])
def test_a_tenant_that_is_no_clean_name_is_refused(
    face: Face, verb: str, rest: tuple[Any, ...], tenant: Any, problem: str
) -> None:
    """Nobody is charged under a name that is empty, too long, invisible, or looks like another one."""
    error = face.refusal(verb, tenant, *rest)

    assert "tenant" == error.field
    assert problem in str(error)


@pytest.mark.parametrize("tenant", ODD_BUT_FIT)
def test_a_tenant_may_have_any_printable_name(face: Face, tenant: str) -> None:
    """Braces, colons, slashes, patterns and scripts of all countries are fine in a name."""
    assert face.accepts("reserve", tenant)


@pytest.mark.parametrize("verb", ["reserve", "record", "peek", "settle", "quotas_of"])
@pytest.mark.parametrize(("value", "problem"), [*UNFIT_TEXT, ("x" * 257, "1 to 256 bytes")])
def test_an_attribute_that_is_no_clean_text_is_refused(face: Face, verb: str, value: Any, problem: str) -> None:
    """An attribute's value is held to the same as a tenant's name, and the error says which attribute it was."""
    attributes = {"provider": "anthropic", "model": value}
    error = (
        face.refusal(verb, "acme", "call-1", Usage(), attributes=attributes)
        if verb == "settle"
        else face.refusal(verb, "acme", attributes, *([Usage()] if verb == "record" else []))
    )

    assert "attributes.model" == error.field
    assert problem in str(error)


@pytest.mark.parametrize("name", ["", "1st", "a b", "a{b}", "a:b", "a/b", "a\nb", "é", "_a", "x" * 65, 5, None, b"a"])
def test_an_attributes_name_is_a_plain_word(face: Face, name: Any) -> None:
    """A name begins with a letter and has up to 64 letters, digits and `_.-`."""
    error = face.refusal("reserve", "acme", {name: "x"})

    assert "attributes" == error.field
    assert "a letter, then up to 63 of A-Z a-z 0-9 _ . -" in str(error)


def test_a_call_has_at_most_twenty_attributes(face: Face) -> None:
    """Facts of a call are few; the twenty-first is refused."""
    error = face.refusal("reserve", "acme", {f"a{n}": "x" for n in range(21)})

    assert "attributes" == error.field
    assert "at most 20, not 21" in str(error)
    assert face.accepts("reserve", "acme", {f"a{n}": "x" for n in range(20)})


@pytest.mark.parametrize("attributes", ["provider", b"x", 5, [("provider", "anthropic")], {"provider"}, Usage()])
def test_attributes_are_a_mapping(face: Face, attributes: Any) -> None:
    """A list of pairs or a lone word is no set of attributes."""
    error = face.refusal("reserve", "acme", attributes)

    assert "attributes" == error.field
    assert "a mapping of text to text is needed" in str(error)


@pytest.mark.parametrize(
    "attributes",
    list(EMPTY),
)
def test_what_is_empty_is_not_therefore_a_mapping(face: Face, attributes: Any) -> None:
    """An empty text or list in the place of attributes is a mistake as well."""
    assert "attributes" == face.refusal("reserve", "acme", attributes).field


@pytest.mark.parametrize(
    "secret", ["sk-ant-api03-x", "Bearer abc", "Token abc", "ghp_abc", "github_pat_abc", "xoxb-1", "-----BEGIN KEY"]
)
def test_what_looks_like_a_credential_never_reaches_the_store(face: Face, secret: str) -> None:
    """A key put into an attribute by mistake is refused, and the error does not repeat it."""
    error = face.refusal("reserve", "acme", {"key": secret})

    assert "attributes.key" == error.field
    assert secret not in str(error)


IDS: list[Any] = ["", "x" * 65, "a b", "a/b", "a:b", "a{b", "a\n", "é", "a.b", "*", "\ud800", 5, b"id", ["id"]]
OF_AN_ID: list[tuple[str, tuple[Any, ...]]] = [
    ("revise", (Usage(),)),
    ("renew", ()),
    ("settle", (Usage(),)),
    ("cancel", ()),
    ("find", ()),
]


@pytest.mark.parametrize(("verb", "rest"), OF_AN_ID, ids=[verb for verb, _ in OF_AN_ID])
@pytest.mark.parametrize("reservation_id", [*IDS, None])
def test_an_id_that_is_no_plain_word_is_refused(
    face: Face, verb: str, rest: tuple[Any, ...], reservation_id: Any
) -> None:
    """An id has 1 to 64 letters, digits, `_` and `-`."""
    error = face.refusal(verb, "acme", reservation_id, *rest)

    assert "reservation_id" == error.field
    assert "1 to 64 characters of A-Z a-z 0-9 _ -" in str(error)


@pytest.mark.parametrize("chosen", IDS)
def test_an_id_of_ones_own_is_held_to_the_same(face: Face, chosen: Any) -> None:
    """Whoever chooses ids for reservations, records and corrections learns which one was wrong."""
    reserving = face.refusal("reserve", "acme", reservation_id=chosen)
    recording = face.refusal("record", "acme", {}, Usage(), record_id=chosen)
    adjusting = face.refusal("adjust", ENTRY, {"input_tokens": -1}, "a test", adjust_id=chosen)

    assert "reservation_id" == reserving.field
    assert "record_id" == recording.field
    assert "adjust_id" == adjusting.field


@pytest.mark.parametrize(
    "facts",
    [
        5,
        {"request_id": 7},
        {"request_id": "a\nb"},
        {f"a{n}": "x" for n in range(21)},
    ],
    ids=["no mapping", "no text", "a control character", "too many"],
)
def test_facts_of_a_settlement_are_held_to_the_same_as_attributes(face: Face, facts: Any) -> None:
    """What else is kept in an entry is short, printable text, and an error about it says `facts`."""
    error = face.refusal("settle", "acme", "call-1", Usage(), facts=facts)

    assert error.field.startswith("facts")


@pytest.mark.parametrize("quality", ["", "FINAL", "exact", None, 5, []])
def test_a_quality_is_one_of_four(face: Face, quality: Any) -> None:
    """How far numbers are to be trusted has four words, and the error names them."""
    error = face.refusal("settle", "acme", "call-1", Usage(), quality=quality)

    assert "quality" == error.field
    assert "final, partial, estimated, split_unknown" in str(error)


@pytest.mark.parametrize("verb", ["reserve", "record"])
def test_a_funding_is_hosted_or_own(face: Face, verb: str) -> None:
    """Who pays is one of two words: a misspelt one must not get into an entry that bills are made from."""
    usage = [Usage()] if verb == "record" else []

    assert "funding" == face.refusal(verb, "acme", {}, *usage, funding="owned").field


@pytest.mark.parametrize("reason", ["", " ", "a\nb", "x" * 257, None, 5, b"why"])
def test_a_correction_has_a_reason(face: Face, reason: Any) -> None:
    """Nobody corrects an entry without a word why."""
    assert "reason" == face.refusal("adjust", ENTRY, {"input_tokens": -1}, reason).field


@pytest.mark.parametrize("actor", ["a\nb", "x" * 129, 5, b"me"])
def test_who_corrects_has_a_printable_name(face: Face, actor: Any) -> None:
    """The one who says so is named in clean text."""
    assert "actor" == face.refusal("adjust", ENTRY, {"input_tokens": -1}, "a test", actor=actor).field


@pytest.mark.parametrize("entry", [None, "3:7", 7, {}])
def test_what_is_corrected_is_an_entry(face: Face, entry: Any) -> None:
    """A correction names the entry it corrects, as `ledger()` or a settlement gave it."""
    assert "entry" == face.refusal("adjust", entry, {"input_tokens": -1}, "a test").field


@pytest.mark.parametrize("shard", [-1, 16, 1.0, "0", None])
@pytest.mark.parametrize("verb", ["ledger", "head"])
def test_a_shard_is_one_that_the_store_has(face: Face, verb: str, shard: Any) -> None:
    """Ledgers are numbered from 0; reading one that there is not says so."""
    assert "shard" == face.refusal(verb, shard).field


@pytest.mark.parametrize("after", [-1, 1.0, "0", None])
def test_a_reader_goes_on_from_an_entrys_number(face: Face, after: Any) -> None:
    """What was read last is a number from 0 up."""
    assert "after" == face.refusal("ledger", 0, after).field
