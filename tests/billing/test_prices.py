"""Price books: which price holds for a call, how strictly a book is read, and what the one that ships says."""

from __future__ import annotations

import ast
import decimal
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import meterlib
from meterlib import PolicyError
from meterlib.billing.prices.diff import Change, changes, flat, text_of
from meterlib.billing.prices.files import claude_book, load_book, parse_book
from meterlib.billing.prices.genai import GenaiPrices
from meterlib.billing.prices.prices import TOKEN_TYPES, PriceBook, PriceBooks, Rate, Unpriced
from meterlib.billing.prices.pricing import TermsBook, books_of
from meterlib.core.money import fraction_of, plain
from meterlib.settings import BillingSettings, TenantSettings
from tests.billing.money import BOOK, at_ms, books, claude


def found_of(where: PriceBooks, model: str, **case: Any) -> Rate | Unpriced:
    plainly: dict[str, Any] = {"at_ms": at_ms("2026-11-01"), "variant": "standard", "geo": "global", "prompt": 0}
    return where.rate("anthropic", model, **plainly | case)


def rate_of(where: PriceBooks, model: str, **case: Any) -> Rate:
    found = found_of(where, model, **case)
    assert isinstance(found, Rate), found
    return found


def reason_of(where: PriceBooks, model: str, **case: Any) -> str:
    found = found_of(where, model, **case)
    assert isinstance(found, Unpriced), found
    return found.reason


# ── Which price holds ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("moment", "cache_read"),
    [("2026-10-06T23:59:59.999", "0.2"), ("2026-10-07", "0.1"), ("2026-09-01", "0.2"), ("2030-01-01", "0.1")],
)
def test_a_price_begins_and_ends_at_midnight_utc(moment: str, cache_read: str) -> None:
    """The cut of Sonnet 5.5's cache reads holds from its first millisecond on, and September is as it was."""
    assert plain(rate_of(claude(), "claude-sonnet-5-5", at_ms=at_ms(moment)).prices["cache_read"]) == cache_read


def test_no_time_zone_moves_a_price() -> None:
    """The same moment has the same price, wherever its time was written down, on days when clocks change too."""
    for offset in (-12, -5, 0, 5.5, 14):
        local = datetime(2026, 10, 7, tzinfo=UTC).astimezone(timezone(timedelta(hours=offset)))
        assert rate_of(claude(), "claude-sonnet-5-5", at_ms=at_ms(local.isoformat())).prices["cache_read"] == Decimal(
            "0.1"
        )
        before = at_ms((local - timedelta(milliseconds=1)).isoformat())
        assert rate_of(claude(), "claude-sonnet-5-5", at_ms=before).prices["cache_read"] == Decimal("0.2")


@pytest.mark.parametrize(("prompt", "price"), [(0, "0.1"), (100_000, "0.1"), (100_001, "0.5"), (10**7, "0.5")])
def test_a_tier_is_a_cliff(prompt: int, price: str) -> None:
    """Up to and with the limit a prompt is short; one token more, and all of it is dear."""
    assert rate_of(claude(), "claude-haiku-5-5", prompt=prompt).prices["input"] == Decimal(price)


def test_ways_of_service_have_prices_of_their_own() -> None:
    """Batch and fast are what the book says they are, and place multiplies tokens but no searches."""
    assert rate_of(claude(), "claude-opus-5-5", variant="fast").prices["cache_read"] == Decimal("0.4")
    assert rate_of(claude(), "claude-haiku-5-5", variant="batch", prompt=200_000).prices["input"] == Decimal("0.25")
    us = rate_of(claude(), "claude-sonnet-5-5", geo="us")
    assert (us.prices["input"], us.prices["cache_read"]) == (Decimal("2.2"), Decimal("0.11"))
    assert us.prices["web_search"] == 10


@pytest.mark.parametrize(
    ("model", "case", "reason"),
    [
        ("gpt-x", {}, "no book has a price for model 'gpt-x' of 'anthropic'"),
        ("", {}, "the model is not known"),
        ("old", {}, "no book has a price for model 'old' of 'anthropic' at the time of the call"),
        ("plain", {"variant": "fast"}, "book:test has no price for 'fast' service of 'plain'"),
        ("plain", {"variant": "batch+fast"}, "book:test has no price for 'batch+fast' service of 'plain'"),
        ("plain", {"geo": "eu"}, "book:test has no price for inference in 'eu' by 'plain'"),
        (
            "plain",
            {"geo": "us", "at_ms": at_ms("2026-01-01")},
            "book:test has no price for inference in 'us' by 'plain'",
        ),
    ],
)
def test_what_no_book_states_has_no_price(model: str, case: dict[str, Any], reason: str) -> None:
    """Neither nothing nor the standard price: it is left open, with a reason that says what to add to the book."""
    assert reason_of(books(), model, **case) == reason


@pytest.mark.parametrize(
    ("called", "meant"),
    [
        ("claude-opus-5", "claude-opus-5"),
        ("claude-opus-5-20260724", "claude-opus-5"),
        ("claude-opus-5@20260724", "claude-opus-5"),
        ("claude-opus-5-5", "claude-opus-5-5"),
        ("claude-opus-4-20250514", "claude-opus-4-0"),
        ("claude-haiku-4-5-20251001", "claude-haiku-4-5"),
        ("claude-3-5-haiku-latest", "claude-haiku-3-5"),
    ],
)
def test_dated_names_and_aliases_are_known(called: str, meant: str) -> None:
    """A dated id is its model, and a newer model is never taken for an older one whose name it begins with."""
    found = claude_book().find("anthropic", called)
    assert found is not None
    assert found.name == meant


@pytest.mark.parametrize(
    "called", ["claude-opus-5-6", "claude-opus-5-2026", "claude-opus-5-202607245", "Claude-opus-5", "xclaude-opus-5"]
)
def test_no_name_is_guessed(called: str) -> None:
    """A model that is not in the book has no price, however much its name looks like another."""
    assert claude_book().find("anthropic", called) is None
    assert claude_book().find("bedrock", "claude-opus-5") is None


def test_the_first_source_that_knows_the_model_then_decides() -> None:
    """One's own book goes before the one that ships; where it has no price for the day, the next is asked."""
    own = parse_book(
        'name = "own"\ncurrency = "USD"\nprovider = "anthropic"\n[[model]]\nname = "claude-opus-5-5"\n'
        '[[model.price]]\nsource = "contract"\nvalid_from = 2026-12-01\ninput = 3.9\noutput = 19.5\n'
    )
    both = PriceBooks(own, claude_book())

    assert rate_of(both, "claude-opus-5-5").source == "book:claude"
    assert rate_of(both, "claude-opus-5-5", at_ms=at_ms("2026-12-01")).source == "book:own"
    assert "book:own" in reason_of(both, "claude-opus-5-5", at_ms=at_ms("2026-12-01"), variant="fast")


# ── Digests ───────────────────────────────────────────────────────────────────────────────────────────────────────────

prices = st.decimals(min_value=0, max_value=100, places=6, allow_nan=False)


def one_rate(cents: dict[str, Decimal], source: str = "x") -> Rate:
    lines = "\n".join(f"{kind} = {price:f}" for kind, price in cents.items())
    text = HEAD.replace('"s"', f'"{source}"') + lines
    found = PriceBooks(parse_book(text)).rate("p", "m", at_ms=0, variant="standard", geo="global", prompt=0)
    assert isinstance(found, Rate)
    return found


@given(
    st.fixed_dictionaries(dict.fromkeys(TOKEN_TYPES, prices)), st.fixed_dictionaries(dict.fromkeys(TOKEN_TYPES, prices))
)
def test_a_digest_changes_if_and_only_if_a_price_does(one: dict[str, Decimal], other: dict[str, Decimal]) -> None:
    """How it is written, and where it is said to be from, does not matter: 0.10 is 0.1."""
    assert (one_rate(one).digest == one_rate(other, "elsewhere").digest) == (one == other)
    assert one_rate(one).digest == one_rate({kind: price.normalize() for kind, price in reversed(one.items())}).digest


def test_a_digest_tells_what_the_prices_are_for() -> None:
    """The same numbers for another model, tier, place or way of service are another price."""
    where = books()
    digests = [
        rate_of(where, "plain").digest,
        rate_of(where, "plain", variant="batch").digest,
        rate_of(where, "plain", geo="us").digest,
        rate_of(where, "plain", at_ms=at_ms("2026-01-01")).digest,
        rate_of(where, "steep").digest,
        rate_of(where, "steep", prompt=100_001).digest,
    ]
    assert len(set(digests)) == len(digests)
    assert rate_of(where, "plain-20260101").digest == digests[0]


# ── Reading a book ────────────────────────────────────────────────────────────────────────────────────────────────────

HEAD = 'name = "b"\ncurrency = "USD"\nprovider = "p"\n[[model]]\nname = "m"\n[[model.price]]\nsource = "s"\n'


@pytest.mark.parametrize(
    ("text", "path", "problem"),
    [
        ("", "name", "is missing"),
        ("name = 'b'\ncurrency = 'usd'", "currency", "is no currency"),
        ("name = 'b'\ncurrency = 'USD'\nprovider = 'p'\n", "model", "begin each with [[model]]"),
        ("name = 'b'\nnane = 'b'", "nane", "did you mean 'name'?"),
        (HEAD, "model[0].price[0]", "has no price of a kind of token"),
        (HEAD + "imput = 1", "model[0].price[0].imput", "did you mean 'input'?"),
        (HEAD + "input = '1'", "model[0].price[0].input", "a number is needed, not '1'"),
        (HEAD + "input = true", "model[0].price[0].input", "a number is needed, not True"),
        (HEAD + "input = nan", "model[0].price[0].input", "a number is needed"),
        (HEAD + "input = -0.0", "model[0].price[0].input", "0 to 1000000 are allowed"),
        (HEAD + "input = 1e7", "model[0].price[0].input", "0 to 1000000 are allowed"),
        (HEAD + "input = 1e999999999", "model[0].price[0].input", "0 to 1000000 are allowed"),
        (HEAD + "input = 0.1234567", "model[0].price[0].input", "at most six decimals"),
        (HEAD + "input = 1\nvalid_from = 2026-01-01T00:00:00Z", "model[0].price[0].valid_from", "a day such as"),
        (
            HEAD + "input = 1\nvalid_from = 2026-01-02\nvalid_until = 2026-01-02",
            "model[0].price[0].valid_until",
            "is not after",
        ),
        (
            HEAD + "input = 1\n[[model.price]]\nsource = 's'\ninput = 2",
            "model[0].price[1].valid_from",
            "before the price above ends",
        ),
        (HEAD + "input = 0.333333\ngeo = { us = 1.1 }", "model[0].price[0].geo.us", "more than six decimals"),
        (HEAD + "input = 1\ngeo = { us = 0 }", "model[0].price[0].geo.us", "a multiplier above 0"),
        (
            HEAD + "input = 1\n[[model.price.above]]\ntokens = 0\ninput = 2",
            "model[0].price[0].above[0].tokens",
            "above 0",
        ),
        (
            HEAD + "input = 1\noutput = 1\n[[model.price.above]]\ntokens = 9\ninput = 2",
            "model[0].price[0].above[0].output",
            "is missing",
        ),
        (
            HEAD + "input = 1\n[model.price.variant.standard]\ninput = 2",
            "model[0].price[0].variant.standard",
            "is no name of another way",
        ),
        (
            HEAD + "input = 1\n[model.price.variant.batch]\nweb_search = 2",
            "model[0].price[0].variant.batch.web_search",
            "no such setting",
        ),
        (
            HEAD + "input = 1\n[[model]]\nname = 'n'\nmatch = ['m']\n[[model.price]]\nsource = 's'\ninput = 2",
            "model[1]",
            "is a name of model[0] already",
        ),
        ("name = ", "", "Invalid value"),
    ],
)
def test_a_slip_in_a_book_is_an_error_that_says_where(text: str, path: str, problem: str) -> None:
    """Nothing is passed over, so a misspelt price is never a missing one."""
    with pytest.raises(PolicyError) as caught:
        parse_book(text)

    assert caught.value.path == path
    assert problem in str(caught.value)


def test_a_file_that_is_no_book_is_named(tmp_path: Path) -> None:
    """Missing, binary or wrong: the error says which file."""
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "wrong.toml").write_text(HEAD)
    for name in ("missing.toml", "binary.toml", "wrong.toml"):
        with pytest.raises(PolicyError, match=name):
            load_book(tmp_path / name)


def test_numbers_are_read_digit_by_digit() -> None:
    """A price of 0.1 is a tenth, and not the binary fraction next to it; whatever context the caller computes in."""
    with decimal.localcontext(decimal.Context(prec=2)):
        book = parse_book(HEAD + "input = 0.123456\noutput = 123.45")
    found = book.models[0].prices[0].variants["standard"][0].prices
    assert (str(found["input"]), str(found["output"])) == ("0.123456", "123.450000")


# ── The book that ships, and the package that it is held against ──────────────────────────────────────────────────────


def test_the_book_that_ships_agrees_with_genai_prices() -> None:
    """Two records of the same price list: where they differ, the book says why."""
    package = GenaiPrices()
    differences = set()
    for model in claude_book().models:
        theirs = package.find("anthropic", model.match[0].replace("{date}", "20260101"))
        if theirs is None:
            differences.add((model.name, "model"))
            continue
        one, other = flat(model.prices[-1]), flat(theirs.prices[-1])
        others = {what for what in one.keys() | other.keys() if one.get(what) != other.get(what)}
        differences |= {(model.name, variant or kind) for variant, _, kind in others}

    known = {name for name, what in differences if what not in ("web_fetch", "times in us")}
    assert {what for _, what in differences} == {"model", "batch", "web_fetch", "times in us"}
    assert known == {
        *("claude-mythos-5", "claude-mythos-5-1"),  # of limited availability
        *("claude-opus-4-0", "claude-opus-4-1", "claude-haiku-3-5"),  # retired before it took note of batch
    }


def test_long_prompts_were_dearer_until_march() -> None:
    """History is part of the book: Opus 4.6 and Sonnet 4.6 lost their tiers on 2026-03-13."""
    for model, price in (("claude-opus-4-6", "10"), ("claude-sonnet-4-6", "6")):
        assert rate_of(claude(), model, prompt=200_001, at_ms=at_ms("2026-03-12")).prices["input"] == Decimal(price)
        assert rate_of(claude(), model, prompt=200_001, at_ms=at_ms("2026-03-13")).prices["input"] == Decimal(price) / 2


def test_genai_prices_are_rounded_to_what_they_were_meant_to_be() -> None:
    """Some of its prices are binary fractions written down; a millionth is the finest that a token is sold by."""
    import genai_prices.data

    package = GenaiPrices()
    known = 0
    for provider in genai_prices.data.providers:
        for model in provider.models:
            found = package.find(provider.id, model.id)
            for price in found.prices if found else ():
                known += 1
                for tier in (tier for tiers in price.variants.values() for tier in tiers):
                    assert all(number.as_tuple().exponent == -6 for number in tier.prices.values())
    assert known > 2000


@pytest.mark.parametrize(
    ("provider", "model"), [("perplexity", "sonar"), ("deepseek", "deepseek-chat"), ("nobody", "x")]
)
def test_a_package_price_that_cannot_be_told_here_is_none(provider: str, model: str) -> None:
    """A fee for each request, or a price by the hour of the day, would be left out: such a model has no price."""
    assert GenaiPrices().find(provider, model) is None


def test_the_fallback_serves_the_rest() -> None:
    """A model that neither book has is priced by the package, under its version; unless it is switched off."""
    found = rate_of(books_of(BillingSettings()), "claude-2")
    assert found.source.startswith("genai-prices/")
    assert "no book" in reason_of(books_of(BillingSettings(fallback="none")), "claude-2")


def test_a_book_that_is_configured_and_missing_is_an_error(tmp_path: Path) -> None:
    """Prices never change silently because a file went away."""
    with pytest.raises(PolicyError, match="cannot be read"):
        books_of(BillingSettings(book=str(tmp_path / "prices.toml")))


# ── Terms ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_terms_of_a_tenant_go_before_those_of_all() -> None:
    """What a tenant's table does not say is what `[billing]` says."""
    settings = BillingSettings(discount="10%", markup="2.5%", platform_fee="5%", upstream_discount="7%")
    terms = TermsBook(settings, [TenantSettings(name="acme", discount="0%")])

    assert terms.of("acme").discount == 0
    assert (terms.of("acme").markup, terms.of("acme").upstream_discount) == (Decimal("0.025"), Decimal("0.07"))
    assert terms.of("somebody").discount == Decimal("0.1")


@pytest.mark.parametrize("text", ["10", "0.1", "-1%", "10 %", "1e1%", "", "12.34567%", "99999%"])
def test_a_percentage_is_written_as_one(text: str) -> None:
    """Nobody has to guess whether 10 is ten percent or tenfold."""
    with pytest.raises(ValueError, match="is no percentage"):
        fraction_of(text)
    with pytest.raises(PolicyError, match=r"billing\.discount"):
        BillingSettings(discount=text)


def test_a_discount_never_exceeds_everything() -> None:
    """A price below zero is a slip; a mark-up may be any."""
    with pytest.raises(PolicyError, match="at most 100%"):
        BillingSettings(discount="100.1%")
    BillingSettings(markup="250%")


# ── What differs between books ────────────────────────────────────────────────────────────────────────────────────────


def test_a_diff_names_prices_and_days() -> None:
    """One price changed for some days is one line, however the books cut their time."""
    old = parse_book(HEAD + "input = 1\noutput = 2")
    new = parse_book(
        HEAD
        + "input = 1\noutput = 2\nvalid_until = 2026-01-01\n[[model.price]]\nsource = 's'\nvalid_from = 2026-01-01\n"
        "valid_until = 2026-02-01\ninput = 1\noutput = 3\n[[model.price]]\nsource = 's'\nvalid_from = 2026-02-01\n"
        "input = 1\noutput = 3\n[model.price.variant.batch]\ninput = 0.5\n"
    )
    told = [(c.variant, c.kind, text_of(c), str(c.valid_from), c.valid_until) for c in changes(old, new)]

    assert told == [
        ("batch", "input", "none -> 0.5", "2026-02-01", None),
        ("standard", "output", "2 -> 3", "2026-01-01", None),
    ]
    assert changes(old, old) == []
    assert [(c.old, c.new) for c in changes(new, old)] == [(c.new, c.old) for c in changes(old, new)]


def test_a_new_book_differs_in_everything() -> None:
    """Against no book at all, every price is new."""
    found = changes(None, PriceBook("b", parse_book(BOOK).models))
    assert {change.old for change in found} == {None}
    assert isinstance(found[0], Change)
    assert {change.model for change in found} == {"plain", "steep", "old"}


# ── No binary fractions ───────────────────────────────────────────────────────────────────────────────────────────────

PACKAGE = Path(meterlib.__file__).parent
MONEY = [
    str(path.relative_to(PACKAGE))
    for folder in ("prices", "rating")
    for path in sorted((PACKAGE / "billing" / folder).glob("*.py"))
]


@pytest.mark.parametrize(
    "path", [*MONEY, "billing/reports/invoice.py", "billing/bundle/rows.py", "core/money.py", "cli/prices.py"]
)
def test_no_float_comes_near_money(path: str) -> None:
    """No literal, no name, no true division, and no built-in that would add up in the caller's context unseen."""
    tree = ast.parse((PACKAGE / path).read_text())
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, float)), ast.dump(node)
        assert not (isinstance(node, ast.Name) and node.id in ("float", "round", "pow")), ast.dump(node)
        assert not isinstance(node, ast.Div | ast.Pow), f"{path} divides"
