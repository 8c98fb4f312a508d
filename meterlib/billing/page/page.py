"""One page about usage and cost, for people: charts with their numbers beside them, on screen and on paper. Pure.

The page is one file. It loads nothing, runs nothing, and is the same to the last byte whenever it is made of the same
facts. Whatever a chart shows stands in a table too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal

from meterlib.billing.page.charts import Axis, Series, bars, curve, legend, share, short
from meterlib.billing.page.facts import TOKENS, Cost, Facts, Group, Sums
from meterlib.billing.page.html import Content, Html, document, name_of, table, tag
from meterlib.billing.page.style import STYLE
from meterlib.billing.rating.rounding import EXPONENTS
from meterlib.billing.reports.denied import Denied
from meterlib.core.money import ROUNDING, ZERO, minus, plain, plus

TOP = 10
"""Tenants and models that have a row of their own; the others share one."""

_STEP = Decimal("0.0001")
_PICO = 12
_NONE = "-"
_QUALITIES = {
    "final": "as the provider reported at the end",
    "partial": "cut short; counted as far as they went",
    "estimated": "estimates, since nothing was reported",
    "split_unknown": "lifetime of cache writes not known",
}
_KINDS = {
    "late": "usage that came after its reservation had ended",
    "recorded": "usage without a reservation",
    "expired": "reservations never settled; their usage is not known",
    "cancelled": "reservations freed, since nothing was sent",
    "adjusted": "corrections",
}


def page(facts: Facts) -> str:
    """The page, as HTML."""
    total = facts.total
    title = f"{facts.heading}{f' of {facts.tenant}' if facts.tenant is not None else ''}"
    sections = (
        _usage_over_time(facts),
        *(_cost_over_time(facts, currency) for currency in _currencies(total)),
        None if facts.tenant is not None else _top("Tenants", "tenant", facts.tenants, facts),
        _top("Models", "model", facts.models, facts),
        _cache_over_time(facts),
        _quality(facts),
        denials(facts.denials),
    )
    return document(title, STYLE, tag("main", _header(facts, total), *sections), _footer(facts))


# ── Head and foot ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _header(facts: Facts, total: Sums) -> Html:
    whose = [facts.heading, " of ", name_of(facts.tenant)] if facts.tenant is not None else [facts.heading]
    told = [f"{facts.since} to {facts.until}" if facts.since else "no usage", facts.tz, facts.issuer]
    return tag(
        "header",
        tag("h1", whose),
        tag("p", " · ".join(part for part in told if part), class_="meta"),
        *_warnings(facts, total),
        tag("ul", *_tiles(facts, total), class_="tiles"),
    )


def _warnings(facts: Facts, total: Sums) -> list[Html]:
    found = []
    if not facts.complete:
        found.append("This report is not complete; the last lines of the page say what is missing.")
    if total.unpriced > 0:
        lines = "1 line has" if total.unpriced == 1 else f"{total.unpriced:,} lines have"
        found.append(f"{lines} no price, so every cost below is at least what it says, and may be more.")
    return [tag("p", text, class_="warn", role="note") for text in found]


def _tiles(facts: Facts, total: Sums) -> list[Html]:
    told: list[tuple[str, str]] = [
        (f"{total.calls:,}", "calls"),
        (short(total.prompt), "prompt tokens"),
        (short(total.tokens.get("output", 0)), "output tokens"),
        (_permille(total.cached), "of prompts read from cache"),
    ]
    least = ", at least" if total.unpriced > 0 else ""
    for currency, cost in sorted(total.costs.items()):
        told.append((_rounded(cost.billed, currency), f"{currency} billed{least}"))
        told.append((_rounded(cost.listed, currency), f"{currency} at list price{least}"))
        if cost.own:
            told.append((_rounded(cost.own, currency), f"{currency} on own keys, at list price{least}"))
        if facts.internal:
            told.append((_rounded(minus(cost.billed, cost.upstream), currency), f"{currency} margin"))
    return [tag("li", tag("b", value), tag("span", label)) for value, label in told]


def _footer(facts: Facts) -> Html:
    said = "Amounts of money are rounded to four decimals here, half to even; they are added up exactly."
    return tag("footer", *(tag("p", line) for line in facts.footer), tag("p", said))


# ── Over time ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _usage_over_time(facts: Facts) -> Html:
    series = [
        Series(name=kind, colour=colour, values=[group.sums.tokens.get(kind, 0) for group in facts.times])
        for colour, kind in enumerate(TOKENS, 1)
    ]
    head = [facts.step, "calls", *TOKENS, "requests of tools"]
    rows = [
        (group.name, *map(_count, (group.sums.calls, *_by_kind(group.sums), group.sums.requests)))
        for group in facts.times
    ]
    return _charted(
        "Usage over time",
        facts,
        lambda title, axis: bars("usage", title, _most(facts, _tokens, "tokens"), axis, series, short),
        table(f"Tokens by {facts.step} ({facts.tz})", head, rows),
        legend(series),
    )


def _cost_over_time(facts: Facts, currency: str) -> Html:
    costs = [group.sums.costs.get(currency, Cost()) for group in facts.times]
    series = [Series(name="billed", colour=1, values=[_pico(cost.billed) for cost in costs])]
    if any(cost.own for cost in costs):
        series.append(Series(name="own keys, at list price", colour=5, values=[_pico(cost.own) for cost in costs]))
    head = [facts.step, "billed", "at list price", "own keys, at list price", *(["upstream"] if facts.internal else [])]
    rows = [
        [group.name, _amount(cost.billed), _amount(cost.listed), _amount(cost.own)]
        + ([_amount(cost.upstream)] if facts.internal else [])
        for group, cost in zip(facts.times, costs, strict=True)
    ]
    least = ", at least" if any(group.sums.unpriced > 0 for group in facts.times) else ""
    return _charted(
        f"Cost over time in {currency}",
        facts,
        lambda title, axis: bars(
            f"cost-{currency}", title, _most(facts, lambda sums: _cost(sums, currency), currency), axis, series, _money
        ),
        table(f"{currency} by {facts.step} ({facts.tz}){least}", head, rows),
        legend(series) if len(series) > 1 else None,
    )


def _cache_over_time(facts: Facts) -> Html | None:
    if not any(group.sums.prompt > 0 for group in facts.times):
        return None
    series = Series(name="read from cache", colour=3, values=[group.sums.cached for group in facts.times])
    total = _permille(facts.total.cached)
    text = f"Of all prompt tokens, {total} were read from the cache."
    rows = [
        (
            group.name,
            _permille(group.sums.cached),
            _count(group.sums.tokens.get("cache read", 0)),
            _count(group.sums.prompt),
        )
        for group in facts.times
    ]
    return _charted(
        "Cache share",
        facts,
        lambda title, axis: curve("cache", title, text, axis, series, _permille),
        table("Prompt tokens read from the cache", [facts.step, "share", "read from cache", "prompt tokens"], rows),
        tag("p", text, class_="note"),
    )


def _charted(
    title: str, facts: Facts, chart: Callable[[str, Axis], Html], numbers: Html, above: Content = None
) -> Html:
    if not facts.times:
        return tag("section", tag("h2", title), tag("p", "No usage in this time.", class_="note"))
    axis = Axis(names=[group.name for group in facts.times], shorts=[group.short for group in facts.times])
    # A region that scrolls has to be reachable by the keyboard.
    beside = tag("div", numbers, class_="scroll tall", tabindex=0, role="region", aria_label=f"{title}: numbers")
    figure = tag("div", tag("h2", title), above, chart(title, axis), class_="figure")
    return tag("section", figure, beside)


def _most(facts: Facts, measure: Callable[[Sums], int], unit: str) -> str:
    """What a chart shows, in words."""
    first, last = facts.times[0].name, facts.times[-1].name
    most = max(facts.times, key=lambda group: measure(group.sums))
    value = f"{measure(most.sums):,} tokens" if unit == "tokens" else f"{_money(measure(most.sums))} {unit}"
    return (
        f"From {first} to {last}, by {facts.step}; the most in {most.name}: {value}. The table below has all numbers."
    )


# ── Who and what ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _top(title: str, what: str, groups: Sequence[Group], facts: Facts) -> Html:
    total = facts.total
    currencies = _currencies(total)
    shown, others = list(groups[:TOP]), groups[TOP:]
    rows = [_row(name_of(group.name), group.sums, total, currencies) for group in shown]
    if others:
        rest = Sums()
        for group in others:
            rest.add(group.sums)
        rows.append(_row(f"{len(others):,} others", rest, total, currencies))
    kinds = ("billed", "list") if len(currencies) == 1 else ("billed",)  # else the table would be too wide for paper
    costs = [f"{kind} {currency}" for currency in currencies for kind in kinds]
    head = [what, "calls", "prompt", "from cache", "output", *costs, "share"]
    part = "list price" if len(currencies) == 1 else "tokens"
    caption = f"Those that used most; the share is of {part}"
    if not groups:
        return tag("section", tag("h2", title), tag("p", "None.", class_="note"))
    foot = [*_row("all", total, total, currencies)[:-1], None]
    return tag("section", tag("h2", title), table(caption, head, rows, foot))


def _row(name: Content, sums: Sums, total: Sums, currencies: Sequence[str]) -> list[Content]:
    cells: list[Content] = [name, _count(sums.calls), _count(sums.prompt), _permille(sums.cached)]
    cells.append(_count(sums.tokens.get("output", 0)))
    for currency in currencies:
        cost = sums.costs.get(currency, Cost())
        least = "≥ " if sums.unpriced > 0 else ""
        cells.append(f"{least}{_amount(cost.billed)}")
        if len(currencies) == 1:
            cells.append(f"{least}{_amount(plus(cost.listed, cost.own))}")
    measure = (lambda one: _cost(one, currencies[0])) if len(currencies) == 1 else _tokens
    cells.append(_share(measure(sums), measure(total)))
    return cells


def _share(value: int, whole: int, colour: int = 1) -> list[Html]:
    part = _permille(value * 1000 // whole if whole > 0 else None)
    return [share(value, whole, colour), tag("span", part, class_="part")]


# ── Quality and denials ───────────────────────────────────────────────────────────────────────────────────────────────


def _quality(facts: Facts) -> Html:
    calls = sum(facts.qualities.values())
    rows: list[list[Content]] = [
        [word, _count(count), _share(count, calls, 1 if word == "final" else 2), _QUALITIES.get(word, "")]
        for word, count in sorted(facts.qualities.items(), key=lambda item: (item[0] != "final", item))
    ]
    rows += [[word, _count(facts.kinds[word]), None, told] for word, told in _KINDS.items() if facts.kinds.get(word)]
    if not rows:
        return tag("section", tag("h2", "Quality"), tag("p", "No calls in this time.", class_="note"))
    shown = table("How far the numbers are to be trusted", ["", "entries", "of all calls", "meaning"], rows, texts=(3,))
    return tag("section", tag("h2", "Quality"), shown)


def denials(told: Sequence[Denied]) -> Html | None:
    """How often limits denied, the most frequent first; nothing where none did."""
    if not told:
        return None
    total = sum(denied.count for denied in told)
    shown, others = told[: 2 * TOP], told[2 * TOP :]
    rows: list[list[Content]] = [
        [name_of(denied.limit), name_of(denied.tenant), _count(denied.count), _share(denied.count, total)]
        for denied in shown
    ]
    if others:
        rest = sum(denied.count for denied in others)
        rows.append([f"{len(others):,} others", None, _count(rest), _share(rest, total)])
    head = ["limit", "tenant", "denied", "of all"]
    return tag("section", tag("h2", "Denials"), table("Calls that a limit denied", head, rows, texts=(1,)))


# ── Numbers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _currencies(total: Sums) -> list[str]:
    return sorted(total.costs)


def _by_kind(sums: Sums) -> list[int]:
    return [sums.tokens.get(kind, 0) for kind in TOKENS]


def _tokens(sums: Sums) -> int:
    return sum(_by_kind(sums))


def _cost(sums: Sums, currency: str) -> int:
    cost = sums.costs.get(currency, Cost())
    return _pico(plus(cost.listed, cost.own))


def _pico(amount: Decimal) -> int:
    return int(amount.scaleb(_PICO, ROUNDING))


def _money(pico: int) -> str:
    """An amount on an axis, exact."""
    number = plain(Decimal(pico).scaleb(-_PICO, ROUNDING))
    whole, dot, rest = number.partition(".")
    return f"{int(whole):,}{dot}{rest}" if whole != "-0" else number


def _rounded(amount: Decimal, currency: str) -> str:
    """An amount as it can be paid; one that is next to nothing, in full."""
    paid = ROUNDING.quantize(amount, Decimal(1).scaleb(-EXPONENTS.get(currency, 2), ROUNDING))
    return f"{paid:,f}" if abs(amount) >= 1 else _amount(amount)


def _amount(amount: Decimal) -> str:
    if not amount:
        return "0"
    if ZERO < abs(amount) < _STEP / 2:
        return "< 0.0001" if amount > 0 else "> -0.0001"
    return f"{ROUNDING.quantize(amount, _STEP):,f}"


def _count(number: int) -> str:
    return f"{number:,}"


def _permille(part: int | None) -> str:
    return _NONE if part is None else f"{part // 10}.{part % 10}%" if part % 10 else f"{part // 10}%"
