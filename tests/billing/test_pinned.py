"""Prices that are written down with what was rated by them say the same as the books did, and nothing else."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from meterlib.billing.prices.files import parse_book
from meterlib.billing.prices.pinned import PinnedBooks, Scale, scales_of, united
from meterlib.billing.prices.prices import PriceBooks, Unpriced
from meterlib.billing.rating.compiled import cases
from tests.billing.money import BOOK, at_ms, books

DEARER = PriceBooks(parse_book(BOOK.replace("input = 3\n", "input = 4\n").replace("input = 0.1\n", "input = 0.2\n")))
DAYS = [at_ms(day) for day in ("2025-06-01", "2026-01-01", "2026-10-06T23:59:59.999", "2026-10-07", "2026-11-22")]
keys = st.tuples(
    st.just("anthropic"),
    st.sampled_from(["plain", "plain-20260101", "steep", "old", "nobody's"]),
    st.sampled_from(["standard", "batch", "fast"]),
    st.sampled_from(["global", "us", "eu"]),
)
spans = st.lists(st.sampled_from(DAYS), min_size=2, max_size=2).map(sorted)


def through_json(scales: list[Scale]) -> list[Scale]:
    """As they come out of a file."""
    return msgspec.json.decode(msgspec.json.encode(scales), type=list[Scale])


@given(keys, spans, st.integers(0, 200_000))
def test_what_was_written_down_is_what_the_books_said_whatever_they_say_now(
    key: tuple[str, str, str, str], span: list[int], prompt: int
) -> None:
    """For every moment from the first call to the last, and every length of prompt."""
    provider, model, variant, geo = key
    pinned = PinnedBooks(through_json(scales_of(books(), key, *span)), DEARER)
    for at in [day for day in DAYS if span[0] <= day <= span[1]]:
        then = books().rate(provider, model, at_ms=at, variant=variant, geo=geo, prompt=prompt)
        if isinstance(then, Unpriced):
            continue

        assert then == pinned.rate(provider, model, at_ms=at, variant=variant, geo=geo, prompt=prompt)


@given(keys, keys)
def test_of_what_was_not_written_down_the_other_books_are_asked(
    key: tuple[str, str, str, str], other: tuple[str, str, str, str]
) -> None:
    """Of another model, way of service or place."""
    pinned = PinnedBooks(scales_of(books(), key, DAYS[4], DAYS[4]), DEARER)
    provider, model, variant, geo = other
    then = (books() if other == key else DEARER).rates(provider, model, at_ms=DAYS[4], variant=variant, geo=geo)

    assert then == pinned.rates(provider, model, at_ms=DAYS[4], variant=variant, geo=geo)


def test_of_another_time_the_other_books_are_asked() -> None:
    """What held until a day was written down; what holds from then on was not."""
    pinned = PinnedBooks(scales_of(books(), ("anthropic", "plain", "standard", "global"), DAYS[2], DAYS[2]), DEARER)
    told = []
    for at in DAYS[2:4]:
        rate = pinned.rate("anthropic", "plain", at_ms=at, variant="standard", geo="global", prompt=1)
        assert not isinstance(rate, Unpriced)
        told.append(f"{rate.prices['input']:.0f}")

    assert ["3", "4"] == told


@given(keys, spans)
def test_rating_in_sql_finds_the_same_cases(key: tuple[str, str, str, str], span: list[int]) -> None:
    """It asks for all cases of a model at once; those of the time that was written down are there."""
    pinned = PinnedBooks(scales_of(books(), key, *span), PriceBooks())
    for at in [day for day in DAYS if span[0] <= day <= span[1]]:
        then = [case.found for case in cases(books(), *key) if case.from_ms <= at < case.until_ms]
        now = [case.found for case in cases(pinned, *key) if case.from_ms <= at < case.until_ms]

        assert [one for one in then if not isinstance(one, Unpriced)] == [
            one for one in now if not isinstance(one, Unpriced)
        ]


@given(keys, keys, spans)
def test_scales_unite_unless_they_contradict_each_other(
    key: tuple[str, str, str, str], other: tuple[str, str, str, str], span: list[int]
) -> None:
    """A file that is joined of two says of each call what its own file said, or keeps them apart."""
    one, two = scales_of(books(), key, *span), scales_of(books(), other, *span)
    dearer = scales_of(DEARER, key, *span)

    both = united(one, two)

    assert both is not None
    assert {(scale.key, scale.from_ms) for scale in both} == {(scale.key, scale.from_ms) for scale in one + two}
    assert united(one, one) == sorted(one, key=lambda scale: (scale.key, scale.from_ms))
    assert (united(one, dearer) is None) == (
        [[rate.digest for rate in scale.rates] for scale in one]
        != [[rate.digest for rate in scale.rates] for scale in dearer]
    )
