"""Price books as TOML files: read strictly, so that a slip of the pen is an error and never a price."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from meterlib.billing.prices.prices import REQUEST_TYPES, STANDARD, TOKEN_TYPES, Price, PriceBook, PricedModel, Tier
from meterlib.core.checks import shown
from meterlib.core.money import EXACT, PRICE_STEP, ZERO
from meterlib.core.policy import nearest
from meterlib.errors import PolicyError

FILE_BYTES_MAX = 8 << 20
PRICE_MAX = Decimal(1_000_000)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_WORD = re.compile(r"[a-z][a-z0-9_+-]{0,63}")
_CURRENCY = re.compile(r"[A-Z]{3}")

_BOOK = ("name", "edition", "currency", "provider", "model")
_MODEL = ("name", "provider", "match", "price")
_PRICE = ("valid_from", "valid_until", "source", "geo", "above", "variant", *TOKEN_TYPES, *REQUEST_TYPES)
_VARIANT = ("above", *TOKEN_TYPES)
_TIER = ("tokens", *TOKEN_TYPES)


def load_book(path: str | os.PathLike[str]) -> PriceBook:
    """The price book of a file; see `read_book`."""
    return read_book(path)[0]


def read_book(path: str | os.PathLike[str]) -> tuple[PriceBook, bytes]:
    """The price book of a file, and the very bytes that it was read from.

    Raises:
        PolicyError: it cannot be read, is no TOML, or something in it is not acceptable (with its path:
            `model[0].price[1].cache_read`).
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:
            data = stream.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise PolicyError("", f"{file} cannot be read: {error.strerror}") from None
    if len(data) > FILE_BYTES_MAX:
        raise PolicyError("", f"{file} is larger than {FILE_BYTES_MAX} bytes, so it is no price book")
    try:
        return parse_book(data.decode("utf-8-sig")), data
    except UnicodeDecodeError:
        raise PolicyError("", f"{file} is no UTF-8 text") from None
    except PolicyError as error:
        problem = str(error).removeprefix(f"{error.path}: ")
        raise PolicyError(error.path, f"{problem} (in {file})") from None


@lru_cache(maxsize=1)
def claude_book() -> PriceBook:
    """The book that is part of meterlib: Anthropic's list prices of Claude, each with its source."""
    return parse_book(files("meterlib.billing.prices").joinpath("books", "claude.toml").read_text(encoding="utf-8"))


def parse_book(text: str) -> PriceBook:
    """The price book that a text is.

    Numbers are taken as they are written, digit by digit: none of them is ever a binary fraction.

    Raises:
        PolicyError: as `load_book` says, without a file's name.
    """
    try:
        data = tomllib.loads(text, parse_float=Decimal)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError, ArithmeticError) as error:
        raise PolicyError("", str(error) or "this is no TOML") from None
    _known(data, _BOOK, "")
    name = _text(data, "name", "", _NAME)
    currency = _text(data, "currency", "", _CURRENCY)
    provider = _text(data, "provider", "", _NAME)
    edition = _text(data, "edition", "") if "edition" in data else ""
    models = [_model(told, f"model[{at}]", provider, currency) for at, told in enumerate(_tables(data, "model", ""))]
    _check_names(models)
    return PriceBook(name, models, edition)


def _model(told: Mapping[str, Any], path: str, provider: str, currency: str) -> PricedModel:
    _known(told, _MODEL, path)
    name = _text(told, "name", path)
    whose = _text(told, "provider", path, _NAME) if "provider" in told else provider
    prices = [_price(one, f"{path}.price[{at}]", currency) for at, one in enumerate(_tables(told, "price", path))]
    _check_days(prices, path)
    return PricedModel(provider=whose, name=name, match=_patterns(told, path), prices=tuple(prices))


def _patterns(told: Mapping[str, Any], path: str) -> tuple[str, ...]:
    patterns = told.get("match", [])
    if not isinstance(patterns, list) or not all(isinstance(one, str) and one for one in patterns):
        raise PolicyError(f"{path}.match", "a list of names is needed, in which * and {date} stand for more")
    return tuple(patterns)


def _price(told: Mapping[str, Any], path: str, currency: str) -> Price:
    _known(told, _PRICE, path)
    variants = {STANDARD: _tiers(told, path)}
    for name, variant in _table(told, "variant", path).items():
        at = f"{path}.variant.{name:.64}"
        if not _WORD.fullmatch(name) or name == STANDARD:
            raise PolicyError(at, "is no name of another way of service, such as batch or fast")
        if not isinstance(variant, dict):
            raise PolicyError(at, f"a table of prices is needed, not {shown(variant)}")
        _known(variant, _VARIANT, at)
        variants[name] = _tiers(variant, at)
    geo = {place: _times(value, f"{path}.geo.{place:.64}") for place, value in _table(told, "geo", path).items()}
    _check_products(variants, geo, path)
    return Price(
        currency=currency,
        variants=variants,
        requests=_prices(told, path, REQUEST_TYPES),
        geo=geo,
        valid_from=_day(told, "valid_from", path),
        valid_until=_day(told, "valid_until", path),
        source=_text(told, "source", path),
    )


def _tiers(told: Mapping[str, Any], path: str) -> tuple[Tier, ...]:
    """The prices of a table, and those of longer prompts, which have to say anew what every kind of token costs."""
    tiers = [Tier(above=0, prices=_prices(told, path, TOKEN_TYPES))]
    if not tiers[0].prices:
        raise PolicyError(path, f"has no price of a kind of token ({', '.join(TOKEN_TYPES)})")
    for at, one in enumerate(_tables(told, "above", path, least=0)):
        place = f"{path}.above[{at}]"
        _known(one, _TIER, place)
        above = one.get("tokens")
        if type(above) is not int or not tiers[-1].above < above < 1 << 53:
            problem = f"a whole number above {tiers[-1].above} is needed, not {shown(above)}"
            raise PolicyError(f"{place}.tokens", problem)
        prices = _prices(one, place, TOKEN_TYPES)
        for kind in TOKEN_TYPES:
            if (kind in prices) != (kind in tiers[0].prices):
                problem = "is missing" if kind in tiers[0].prices else "has no price for shorter prompts"
                raise PolicyError(f"{place}.{kind}", problem)
        tiers.append(Tier(above=above, prices=prices))
    return tuple(tiers)


def _prices(told: Mapping[str, Any], path: str, kinds: Sequence[str]) -> dict[str, Decimal]:
    return {kind: _number(told[kind], f"{path}.{kind}") for kind in kinds if kind in told}


def _number(value: object, path: str) -> Decimal:
    """A price; `0.1` and `10` are, `"0.1"`, `true`, `nan` and a ten-millionth are not."""
    number = Decimal(value) if type(value) is int else value
    if not isinstance(number, Decimal) or not number.is_finite():
        raise PolicyError(path, f"a number is needed, not {shown(value)}")
    if number.is_signed() or number > PRICE_MAX:
        raise PolicyError(path, f"0 to {PRICE_MAX} are allowed, not {shown(value)}")
    if not _whole(number, PRICE_STEP):
        raise PolicyError(path, f"at most six decimals are allowed, not {shown(value)}")
    return EXACT.quantize(number, PRICE_STEP)


def _times(value: object, path: str) -> Decimal:
    number = _number(value, path)
    if not ZERO < number <= 10 or not _whole(number, Decimal("0.0001")):
        raise PolicyError(path, f"a multiplier above 0, up to 10, with at most four decimals is needed: {shown(value)}")
    return number


def _whole(number: Decimal, step: Decimal) -> bool:
    try:
        EXACT.quantize(number, step)
    except ArithmeticError:
        return False
    return True


def _check_products(variants: Mapping[str, Sequence[Tier]], geo: Mapping[str, Decimal], path: str) -> None:
    for place, times in geo.items():
        for tiers in variants.values():
            for tier in tiers:
                for kind, price in tier.prices.items():
                    if not _whole(EXACT.multiply(price, times), PRICE_STEP):
                        problem = f"{price} for {kind} times {times} has more than six decimals"
                        raise PolicyError(f"{path}.geo.{place}", problem)


def _check_days(prices: Sequence[Price], path: str) -> None:
    for at, price in enumerate(prices):
        if price.from_ms >= price.until_ms:
            raise PolicyError(f"{path}.price[{at}].valid_until", f"{price.valid_until} is not after valid_from")
        if at and price.from_ms < prices[at - 1].until_ms:
            ended = prices[at - 1].valid_until or "never"
            problem = f"{price.valid_from} is before the price above ends: {ended}; write them in order of time"
            raise PolicyError(f"{path}.price[{at}].valid_from", problem)


def _check_names(models: Sequence[PricedModel]) -> None:
    taken: dict[tuple[str, str], int] = {}
    for at, model in enumerate(models):
        for name in dict.fromkeys((model.name, *model.match)):
            before = taken.setdefault((model.provider, name), at)
            if before != at:
                raise PolicyError(f"model[{at}]", f"{name!r:.80} is a name of model[{before}] already")


# ── What TOML says, held against what is wanted ───────────────────────────────────────────────────────────────────────


def _known(told: Mapping[str, Any], names: Sequence[str], path: str) -> None:
    for name in told:
        if name not in names:
            at = f"{path}.{name:.80}" if path else f"{name:.80}"
            raise PolicyError(at, f"there is no such setting{nearest(name, list(names))}")


def _text(told: Mapping[str, Any], name: str, path: str, fits: re.Pattern[str] | None = None) -> str:
    at = f"{path}.{name}" if path else name
    if name not in told:
        raise PolicyError(at, "is missing")
    value = told[name]
    if not isinstance(value, str) or not value.strip() or (fits and not fits.fullmatch(value)):
        raise PolicyError(at, f"{shown(value)} is no {name}")
    return value


def _day(told: Mapping[str, Any], name: str, path: str) -> date | None:
    value = told.get(name)
    if value is not None and (isinstance(value, datetime) or not isinstance(value, date)):
        raise PolicyError(
            f"{path}.{name}", f"a day such as 2026-10-07 is needed (it begins at midnight UTC): {shown(value)}"
        )
    return value


def _table(told: Mapping[str, Any], name: str, path: str) -> Mapping[str, Any]:
    value = told.get(name, {})
    if not isinstance(value, dict):
        raise PolicyError(f"{path}.{name}", f"a table is needed, not {shown(value)}")
    return value


def _tables(told: Mapping[str, Any], name: str, path: str, least: int = 1) -> Sequence[Mapping[str, Any]]:
    value = told.get(name, [])
    at = f"{path}.{name}" if path else name
    if not isinstance(value, list) or len(value) < least or not all(isinstance(one, dict) for one in value):
        header = re.sub(r"\[[0-9]+\]", "", at)
        raise PolicyError(at, f"one or more tables are needed; begin each with [[{header}]]")
    return value
