"""No two names ever share state, and no name leaves its slot, whatever is in them."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from fakeredis import FakeRedis
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from redis.crc import key_slot

from meterlib import InvalidInput, Limit, Meter, Policy, PolicyError, StoreOptions, Usage
from meterlib.core.checks import check_attributes, check_id, check_tenant
from meterlib.core.policy import CompiledPolicy, reservation_field
from meterlib.testing import Clock
from tests.bad_input.support import Face, Sent, Wire

NASTY = st.sampled_from("{}:/%*?[]\\|.-_~@ \n\r\0\x1e\x1f\ud800\u200b'\"aA012FwrW\u00e9e\u0301\ufb01\u0430")
PIECES = st.sampled_from(["{0}", "%2F", "%7B", "..", "w/", "r/", "2026-10", "/2026-W40", "*", "head", "pending", "a"])
TEXT = st.one_of(st.text(), st.text(NASTY), st.lists(st.one_of(PIECES, NASTY)).map("".join))
FIT_TEXT = st.one_of(
    st.text(st.sampled_from("{}:/%*?[]\\|.-_~@'\"aA012FwrW\u00e9\u0430"), min_size=1, max_size=12),
    st.lists(PIECES, min_size=1, max_size=6).map("".join),
    st.text(max_size=30)
    .map(lambda text: unicodedata.normalize("NFKC", text).strip() or "a")
    .filter(lambda text: _fits(check_tenant, text)),
)
IDS = st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True)
MOMENTS = st.integers(1_700_000_000_000, 2_000_000_000_000)

POLICY = Policy(
    limits=(
        Limit(name="plain", quota=1, window="1m"),
        Limit(name="plain.a", quota=1, window="1m"),
        Limit(name="by_a", quota=1, window="1m", per=("a",)),
        Limit(name="by_b", quota=1, window="1m", per=("b",)),
        Limit(name="by_a_and_b", quota=1, window="1m", per=("a", "b")),
        Limit(name="hour", quota=1, period="hour", per=("a",), tz="Asia/Kathmandu"),
        Limit(name="day", quota=1, period="day", per=("a", "b")),
        Limit(name="week", quota=1, period="week"),
        Limit(name="month", quota=1, period="month", per=("b",), tz="America/New_York"),
        Limit(name="open", quota=1, open=True, per=("a",)),
    )
)
COMPILED = CompiledPolicy(POLICY)


def _fits(check: Any, value: Any) -> bool:
    try:
        check(value)
    except InvalidInput:
        return False
    return True


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, dict[str, str], int]:
    """A tenant, attributes with some values, and a moment."""
    return draw(FIT_TEXT), draw(st.dictionaries(st.sampled_from("ab"), FIT_TEXT)), draw(MOMENTS)


def _places(tenant: str, attributes: dict[str, str], now_ms: int) -> dict[tuple[Any, ...], str]:
    """The field of each window that a call touches, by all that makes the window a quota of its own."""
    places: dict[tuple[Any, ...], str] = {}
    for bound in COMPILED.limits_of(tenant, attributes):
        arguments = bound.arguments(1, now_ms)
        values = tuple(attributes.get(name) for name in bound.limit.per)
        places[tenant, bound.limit.name, values, arguments.period_start_ms] = arguments.window_field
    return places


@given(st.lists(calls(), min_size=2, max_size=6))
def test_no_two_quotas_share_a_place(made: list[tuple[str, dict[str, str], int]]) -> None:
    """Tenant, limit, attribute values and period tell windows apart, and nothing within them can blur that."""
    places: dict[tuple[Any, ...], str] = {}
    for tenant, attributes, now_ms in made:
        places |= _places(tenant, attributes, now_ms)

    assert len(places) == len(set(places.values()))


@given(st.lists(st.tuples(FIT_TEXT, IDS), min_size=2, max_size=8, unique=True), calls())
def test_no_two_reservations_share_a_place(names: list[tuple[str, str]], call: tuple[str, dict[str, str], int]) -> None:
    """Tenant and id tell reservations apart, from each other and from all else that is kept."""
    fields = [reservation_field(tenant, reservation_id) for tenant, reservation_id in names]
    others = {*_places(*call).values(), "head", "pending"}

    assert len(names) == len(set(fields))
    assert not others & set(fields)


@given(calls(), IDS)
def test_no_name_breaks_the_text_it_is_kept_in(call: tuple[str, dict[str, str], int], reservation_id: str) -> None:
    """Records are lines of words: no space, line break, brace or separator gets into one by a name."""
    tenant, attributes, now_ms = call
    fields = [*_places(tenant, attributes, now_ms).values(), reservation_field(tenant, reservation_id)]

    for field in fields:
        assert field.isascii()
        assert field.isprintable()
        assert not set(" {}:*?[]\\") & set(field.removeprefix("w/*/"))


@given(st.one_of(TEXT, st.binary(), st.integers(), st.none()), st.one_of(TEXT, st.none()), st.one_of(TEXT, IDS))
def test_any_text_is_refused_or_stays_in_one_slot(tenant: Any, value: Any, reservation_id: str) -> None:
    """Whatever a caller sends as tenant, attribute and id: one clear error, or one call within one slot."""
    face = Face("sync")
    attributes = {} if value is None else {"provider": value}
    fits = _fits(check_tenant, tenant) and _fits(check_attributes, attributes) and _fits(check_id, reservation_id)

    assert fits == face.accepts("reserve", tenant, attributes, Usage(), reservation_id=reservation_id)

    if fits:
        assert 5 == len(face.wire.script_keys)
        assert 1 == len({key_slot(key) for key in face.wire.script_keys})


@pytest.mark.parametrize("verb", ["revise", "renew", "settle", "cancel", "find", "peek", "record"])
@given(tenant=FIT_TEXT)
@settings(max_examples=20)
def test_every_verb_stays_in_its_tenants_slot(verb: str, tenant: str) -> None:
    """All verbs of a tenant go to the same keys, so that they see the same state."""
    rest: dict[str, list[Any]] = {
        "revise": ["call-1", Usage()], "settle": ["call-1", Usage()], "peek": [], "record": [{}, Usage()]
    }  # fmt: skip
    reserving, other = Face("sync"), Face("sync")

    assert reserving.accepts("reserve", tenant)
    assert other.accepts(verb, tenant, *rest.get(verb, ["call-1"]))
    assert reserving.wire.script_keys == other.wire.script_keys


@pytest.mark.parametrize(
    "prefix",
    [
        "{",
        "}",
        "{}",
    ],
)
@pytest.mark.parametrize("shards", [1, 16])
def test_a_prefix_does_not_tear_a_shard_apart(prefix: str, shards: int) -> None:
    """A brace would take the place of the shard as what keys are spread by: it is refused."""
    with pytest.raises(PolicyError) as refused:
        StoreOptions(prefix=prefix, shards=shards)

    assert "store.prefix" == refused.value.path


@pytest.mark.parametrize("prefix", ["meterlib", "prod:eu"])
@pytest.mark.parametrize("shards", [1, 16])
def test_all_keys_of_a_call_are_in_one_slot_whatever_they_begin_with(prefix: str, shards: int) -> None:
    """A prefix that is accepted does not tear a shard apart."""
    wire = Wire(shards)
    meter = Meter(wire, Policy(), options=StoreOptions(prefix=prefix, shards=shards), clock=Clock())
    with pytest.raises(Sent):
        meter.reserve("acme")

    assert 1 == len({key_slot(key) for key in wire.script_keys})


@given(first=calls(), second=calls())
@settings(max_examples=30, deadline=None)
def test_what_one_caller_takes_no_other_one_lacks(
    first: tuple[str, dict[str, str], int], second: tuple[str, dict[str, str], int]
) -> None:
    """Two tenants with a quota of one each pass both, however much their names resemble each other."""
    assume(first[0] != second[0])
    store = FakeRedis()
    clock = Clock()
    meter = Meter(store, Policy(limits=POLICY.limits[:5]), clock=clock)
    meter.reserve(first[0], first[1], reservation_id="same")
    meter.reserve(second[0], second[1], reservation_id="same")

    for tenant, attributes, _ in (first, second):
        assert {1} == {state.held for state in meter.peek(tenant, attributes)}
        assert "open" == meter.find(tenant, "same").status
    store.close()
