"""Pages for people: everything shown is escaped, stands in a table too, needs nothing from elsewhere, and adds up."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterlib import Usage
from meterlib.billing.page.charts import HEIGHT, WIDTH, Axis, Series, bars, short
from meterlib.billing.page.facts import TOKENS, Cost, Facts, Group, Sums, facts
from meterlib.billing.page.html import Html, joined, tag
from meterlib.billing.page.invoice import invoice_page
from meterlib.billing.page.page import TOP, page
from meterlib.billing.reports.answers import Reader
from meterlib.billing.reports.denied import Denied
from meterlib.billing.reports.invoice import invoice
from meterlib.billing.reports.query import Query
from meterlib.cli import main
from tests.billing.billed import Ledger, ledger_of

pytest.importorskip("duckdb")

MARKUP = "<script>alert('x')</script>\"&amp;<b>"


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    found = ledger_of(tmp_path_factory.mktemp("billed"))
    yield found
    found.close()


def gathered(ledger: Ledger, **asked: Any) -> Facts:
    with ledger.postings() as postings, Reader(postings, postings.tz) as reader:
        return facts(reader, Query(**asked), issuer="Operator Ltd", footer=["complete: no gap"])


def parsed(text: str) -> ElementTree.Element:
    """The page as a tree: whatever is not closed or not escaped is an error."""
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def seen(text: str) -> str:
    """What a reader reads, without the style."""
    return "".join("".join(body.itertext()) for body in parsed(text).iter("body"))


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of the table in a section, the line of headings first."""
    for section in parsed(text).iter("section"):
        title = next(iter(section.iter("h2")))
        if title.text == heading:
            return [["".join(cell.itertext()) for cell in row] for row in section.iter("tr")]
    raise AssertionError(f"no section {heading!r}")


def sums(number: int = 1, currencies: Sequence[str] = ("USD",), **fields: Any) -> Sums:
    cost = Cost(lines=number, billed=Decimal(number), listed=Decimal(number), upstream=Decimal(number) / 2)
    costs = {
        currency: Cost(**{name: getattr(cost, name) for name in cost.__struct_fields__}) for currency in currencies
    }
    return Sums(**{"calls": number, "tokens": dict.fromkeys(TOKENS, number * 1000), "costs": costs, **fields})


def made(tenants: int = 3, days: int = 2, currencies: Sequence[str] = ("USD",), **fields: Any) -> Facts:
    """Facts of so many tenants and days; the total is that of the tenants."""
    groups = [Group(name=f"tenant {at:04}", sums=sums(tenants - at, currencies)) for at in range(tenants)]
    times = [Group(name=f"day {at:03}", short=f"{at:03}", sums=sums(at + 1, currencies)) for at in range(days)]
    return Facts(**{"tenants": groups, "models": groups[:2], "times": times, "since": "a", "until": "b", **fields})


# ── Safe, whole and the same ──────────────────────────────────────────────────────────────────────────────────────────


def test_names_are_never_markup() -> None:
    """A tenant, model or limit may be called anything; the page shows it letter by letter."""
    named = [Group(name=MARKUP, short=MARKUP, sums=sums(unpriced=1))]
    text = page(
        Facts(
            issuer=MARKUP, tenant=None, tz=MARKUP, since=MARKUP, times=named, tenants=named, models=named,
            qualities={MARKUP: 1}, denials=[Denied(tenant=MARKUP, limit=MARKUP, count=1)], footer=[MARKUP],
        )
    )  # fmt: skip

    assert "<script" not in text
    assert "alert('x')" not in text
    shown = "".join(parsed(text).itertext())
    assert shown.count(MARKUP) >= 9
    assert MARKUP in "".join(parsed(page(made(tenant=MARKUP))).itertext())


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C"])))
def test_any_text_survives_as_content_and_as_attribute(text: str) -> None:
    """What goes into an element comes out of a parser as it was."""
    element = ElementTree.fromstring(tag("p", text, ["<i>", Html("<b/>")], title=text))

    assert element.text == f"{text}<i>"
    assert element.get("title") == text
    assert [child.tag for child in element] == ["b"]


def test_a_page_needs_nothing_from_elsewhere(ledger: Ledger) -> None:
    """It can be mailed, archived and opened without a network; nothing in it runs."""
    for text in (page(gathered(ledger)), page(made()), bill(ledger, "acme")):
        tags = {element.tag for element in parsed(text).iter()}

        assert not tags & {"script", "link", "img", "iframe", "object", "foreignObject", "use", "image", "a", "form"}
        assert not re.search(r"url\(|@import|://|javascript:|\son\w+=", text)
        assert "default-src 'none'" in text.replace("&#x27;", "'")


def test_the_same_facts_make_the_same_bytes(ledger: Ledger) -> None:
    """Whoever makes the page again can compare digests."""
    assert page(gathered(ledger)) == page(gathered(ledger))
    assert bill(ledger, "acme") == bill(ledger, "acme")


class Strict(HTMLParser):
    """Takes note of what a browser would have to guess."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert tag == self.open.pop()


@pytest.mark.parametrize("currencies", [("USD",), ("EUR", "USD")])
def test_every_chart_tells_what_it_shows_and_every_table_what_it_is_of(currencies: tuple[str, ...]) -> None:
    """For who cannot see the page: titles, descriptions, captions, scopes, one id each."""
    text = page(made(currencies=currencies, denials=[Denied(tenant="a", limit="b", count=2)], qualities={"final": 1}))
    found, tree = Strict(), parsed(text)
    found.feed(text)
    charts = [element for element in tree.iter("svg") if element.get("role") == "img"]

    assert len(charts) == 2 + len(currencies)
    assert len(found.ids) == len(set(found.ids)) == 2 * len(charts)
    for chart in charts:
        assert set((chart.get("aria-labelledby") or "").split()) <= set(found.ids)
        assert all(chart.find(name) is not None and chart.find(name).text for name in ("title", "desc"))  # type: ignore[union-attr]
    assert all(svg.get("aria-hidden") == "true" for svg in tree.iter("svg") if svg not in charts)
    assert all(one.find("caption") is not None for one in tree.iter("table"))
    assert all(head.get("scope") for head in tree.iter("th"))
    assert tree.get("lang") == "en"


def test_whatever_a_chart_shows_stands_in_a_table() -> None:
    """Hovering is a convenience: the numbers are all there without it, and on paper."""
    text = page(made(days=3))
    usage, cost = table(text, "Usage over time"), table(text, "Cost over time in USD")

    assert ["day 002", "3", "3,000", "3,000", "3,000", "3,000", "0"] == usage[3]
    assert ["day 002", "3.0000", "3.0000", "0", "1.5000"] == cost[3]
    assert ["day 002", "33.3%", "3,000", "9,000"] == table(text, "Cache share")[3]
    assert "@media print" in text
    assert "prefers-color-scheme:dark" in text


# ── Any amount of facts ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_page_of_nothing_says_so() -> None:
    """No chart without bars, no division by zero."""
    text = page(Facts(footer=["complete: 0 entries"]))

    assert "<svg" not in text
    assert "No usage in this time." in text
    assert "complete: 0 entries" in text


@pytest.mark.parametrize(("tenants", "days"), [(1, 1), (TOP, 31), (TOP + 1, 400), (1000, 2)])
def test_those_beyond_the_first_ten_share_a_row_and_nothing_is_lost(tenants: int, days: int) -> None:
    """The rows of a table add up to its last one, however many tenants there are."""
    rows = table(page(made(tenants, days)), "Tenants")
    others = max(0, tenants - TOP)

    assert len(rows) == 1 + min(tenants, TOP) + bool(others) + 1
    assert (rows[-2][0] == f"{others:,} others") == bool(others)
    for column in (1, 2, 4, 5):
        shown = [Decimal(row[column].replace(",", "")) for row in rows[1:]]
        assert sum(shown[:-1]) == shown[-1]


def test_several_currencies_are_never_added_up() -> None:
    """Each has its chart, its column and its tiles."""
    text = page(made(currencies=("EUR", "USD")))

    assert table(text, "Cost over time in EUR")[1:] == table(text, "Cost over time in USD")[1:]
    assert ["tenant", "calls", "prompt", "from cache", "output", "billed EUR", "billed USD", "share"] == table(
        text, "Tenants"
    )[0]


def test_costs_that_are_a_floor_say_so() -> None:
    """Where a price is missing, a cost is at least what is said: in the tenant's row, the sum and the tiles."""
    groups = [Group(name="a", sums=sums(5, unpriced=2)), Group(name="b", sums=sums(4))]
    text = page(Facts(tenants=groups, models=groups, times=groups))
    rows = table(text, "Tenants")

    assert "2 lines have no price" in text
    assert ["≥ 5.0000", "4.0000", "≥ 9.0000"] == [row[5] for row in rows[1:]]
    assert "USD billed, at least" in text
    assert "at least" not in page(made())


def test_an_incomplete_page_says_so_on_top() -> None:
    """Who reads only the first lines knows it."""
    assert "not complete" in page(made(complete=False))
    assert "not complete" not in page(made())


def test_what_the_operator_pays_is_for_the_operator() -> None:
    """A page about one tenant may be meant for that tenant."""
    for text, shown in ((page(made()), True), (page(made(tenant="acme", internal=False)), False)):
        assert ("margin" in seen(text)) == shown
        assert ("upstream" in seen(text)) == shown
    assert "Tenants" not in page(made(tenant="acme", internal=False))


def test_denials_are_shown_by_limit_and_tenant() -> None:
    """The most frequent first, the rest together, and nothing where nobody counted any."""
    many = [Denied(tenant=f"t{at}", limit="rpm", count=100 - at) for at in range(30)]

    assert "Denials" not in page(made())
    rows = table(page(made(denials=many)), "Denials")
    assert ["10 others", "", "755", "29.4%"] == [cell.strip() for cell in rows[-1]]


# ── Charts ────────────────────────────────────────────────────────────────────────────────────────────────────────────

values = st.integers(-(10**24), 10**24) | st.integers(-3, 3) | st.none()


@given(st.integers(1, 60).flatmap(lambda n: st.lists(st.lists(values, min_size=n, max_size=n), min_size=1, max_size=4)))
def test_bars_stay_within_the_chart_and_are_as_high_as_their_values(drawn: list[list[int | None]]) -> None:
    """Whatever the numbers: huge, negative, none at all; heights are to scale, to the tenth of a unit."""
    names = [str(at) for at in range(len(drawn[0]))]
    series = [Series(name=f"s{at}", colour=at + 1, values=one) for at, one in enumerate(drawn)]
    chart = ElementTree.fromstring(bars("k", "t", "d", Axis(names=names, shorts=names), series, str))
    found = [{key: Decimal(rect.get(key, "")) for key in ("x", "y", "width", "height")} for rect in chart.iter("rect")]
    shown = [value for at in range(len(names)) for one in drawn if (value := one[at])]

    assert len(found) == len(shown)
    for rect in found:
        assert 0 <= rect["x"] <= rect["x"] + rect["width"] <= WIDTH
        assert 0 <= rect["y"] <= rect["y"] + rect["height"] <= HEIGHT
    if shown:
        most = max(map(abs, shown))
        highest = found[[abs(value) for value in shown].index(most)]["height"]
        for rect, value in zip(found, shown, strict=True):
            expected = max(highest * abs(value) / most, Decimal("0.3"))
            assert abs(rect["height"] - expected) <= Decimal("0.4")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1k"),
        (-1500, "-1.5k"),
        (1_250_000, "1.3M"),
        (443_099_000, "443M"),
        (10**12, "1T"),
    ],
)
def test_large_numbers_are_short_on_axes(number: int, text: str) -> None:
    """The table has them in full."""
    assert text == short(number)


def test_bars_of_one_place_stand_on_each_other() -> None:
    """What is stacked hides nothing: each bar begins where the one below it ends."""
    series = [Series(name=f"s{at}", colour=at + 1, values=[10 * (at + 1)]) for at in range(4)]
    chart = ElementTree.fromstring(bars("k", "t", "d", Axis(names=["a"], shorts=["a"]), series, str))
    edges = [(Decimal(rect.get("y", "")), Decimal(rect.get("height", ""))) for rect in chart.iter("rect")]

    assert len(edges) == 4
    for (lower, _), (upper, height) in pairwise(edges):
        assert upper + height == lower


def test_corrections_hang_below_the_line() -> None:
    """A day on which more was taken back than used is shown as that."""
    times = [Group(name="1", short="1", sums=sums(5)), Group(name="2", short="2", sums=sums(-2))]
    chart = next(svg for svg in parsed(page(made(times=times))).iter("svg") if svg.get("role") == "img")
    zero = Decimal(next(line.get("y1", "") for line in chart.iter("line") if line.get("class") == "zero"))
    above = [Decimal(rect.get("y", "")) < zero for rect in chart.iter("rect")]

    assert above == [True] * 4 + [False] * 4


# ── From an archive ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_facts_add_up_to_what_was_booked_and_rated(ledger: Ledger) -> None:
    """By tenant, by model and by time: the same calls, tokens and money, to the last digit."""
    found = gathered(ledger)
    rows: dict[str, Any] = {"billed_cost": Decimal(0), "list_cost": Decimal(0), "quantity": 0}
    with ledger.postings() as postings, Reader(postings) as reader:
        asked = "SELECT sum(billed_cost), sum(list_cost), sum(quantity) FILTER (charge = 'usage') FROM"
        rows = dict(zip(rows, reader.connection.execute(f"{asked} ({reader.rows})").fetchone() or (), strict=True))
    calls = sum(one.kind in ("settled", "late", "recorded") for one in ledger.booked())

    for groups in (found.tenants, found.models, found.times):
        total = Sums()
        for group in groups:
            total.add(group.sums)
        cost = total.costs["USD"]
        assert (calls, rows["billed_cost"], rows["list_cost"]) == (total.calls, cost.billed, cost.listed + cost.own)
        assert rows["quantity"] == sum(total.tokens.values()) + total.requests
        assert total.unpriced == 2
    assert sum(found.qualities.values()) == calls
    assert len(ledger.booked()) == sum(found.kinds.values())
    assert {"partial": 4} == {name: count for name, count in found.qualities.items() if name != "final"}


def test_own_keys_are_apart_from_what_is_billed(ledger: Ledger) -> None:
    """They are worth their list price, and owe the fee."""
    (group,) = [group for group in gathered(ledger).tenants if group.name == "own-keys"]
    cost = group.sums.costs["USD"]

    assert (cost.listed, cost.upstream) == (Decimal(0), Decimal(0))
    assert cost.billed == cost.own * Decimal("0.05")


def test_the_axis_of_time_has_no_hole(ledger: Ledger) -> None:
    """Days without a call are days; the step suits the range unless one is asked for."""
    found = gathered(ledger)

    assert ("day", "2026-10-01", "2026-11-03", 34) == (
        found.step, found.times[0].name, found.times[-1].name, len(found.times),
    )  # fmt: skip
    assert ["2026-W40", "2026-W41"] == [group.name for group in gathered(ledger, by=("week",)).times][:2]
    assert ["2026-10", "2026-11"] == [group.name for group in gathered(ledger, by=("tenant", "month")).times]
    berlin = gathered(ledger, tz="Europe/Berlin", by=("hour",))
    assert "2026-10-25T02:00+01:00" in {group.name for group in berlin.times}
    assert "2026-10-25T02:00+02:00" in {group.name for group in berlin.times}


def test_a_page_about_one_tenant_shows_nothing_of_another(ledger: Ledger) -> None:
    """Not a name, not a number, and not what the operator pays."""
    text = page(gathered(ledger, tenant="acme", period="2026-10"))

    assert "2026-10-01 to 2026-11-01" in text
    assert not re.search("globex|own-keys|margin|upstream", seen(text))


def test_an_archive_without_usage_makes_a_page(tmp_path: Path) -> None:
    """A gateway on its first day, and a question about another one."""
    ledger = Ledger(tmp_path, block=50_000)
    ledger.meter.record("acme", {}, Usage())
    ledger.rate()

    assert [("acme", 1)] == [(group.name, group.sums.calls) for group in gathered(ledger).tenants]
    assert "No usage in this time." in page(gathered(ledger, tenant="nobody"))
    ledger.close()


# ── Invoices ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def bill(ledger: Ledger, tenant: str, period: str = "2026-10", closed: bool = True) -> str:
    with ledger.postings() as postings, Reader(postings, postings.tz) as reader:
        return invoice_page(invoice(reader, tenant, period, closed), "Operator Ltd", ["complete: no gap"])


def test_an_invoice_adds_up_line_by_line(ledger: Ledger) -> None:
    """The amounts that are shown, and the rounding, are what is due."""
    text = bill(ledger, "acme")
    lines = table(text, "Usage")[1:]
    rest = dict(table(text, "Total")[1:])
    amounts = [Decimal(row[-1].removesuffix(" USD")) for row in lines]

    assert sum(amounts) + Decimal(rest["rounding"].split()[0]) == Decimal(rest["Due"].split()[0]) > 0
    assert "Invoice 2026-10" in text
    assert "Operator Ltd" in text
    for row in lines:
        quantity, price = (Decimal(cell.replace(",", "")) for cell in row[2:4])
        assert abs(quantity * price / 1_000_000 - Decimal(row[-1].split()[0])) <= Decimal("0.005")


def test_an_invoice_keeps_corrections_and_own_keys_apart(ledger: Ledger) -> None:
    """What corrects October says so, and what the provider bills is not owed."""
    november, own = bill(ledger, "acme", "2026-11", False), bill(ledger, "own-keys")

    assert ["output, of 2026-10", "-700"] in [row[1:3] for row in table(november, "Corrections of closed periods")]
    assert "Draft of an invoice" in november
    assert table(own, "Platform fees")
    assert "nothing of it is owed here" in own


def test_an_invoice_with_usage_without_a_price_is_a_floor(ledger: Ledger) -> None:
    """It says why, and that more may be owed."""
    text = bill(ledger, "globex")

    assert "Due, at least" in text
    assert "no book has a price for model" in text
    assert "Due, at least" not in bill(ledger, "acme")


def test_an_invoice_of_nothing_says_so(ledger: Ledger) -> None:
    """And names are text here too."""
    assert "nothing is owed" in bill(ledger, "nobody")
    assert MARKUP in "".join(parsed(bill(ledger, MARKUP)).itertext())


def test_the_command_makes_both_pages(ledger: Ledger, tmp_path: Path) -> None:
    """`--format html`: a report of all customers, and the invoice of one."""
    settings, file = tmp_path / "meterlib.toml", tmp_path / "page.html"
    settings.write_text(f'[billing]\narchive = "{ledger.path}"\nissuer = "Operator Ltd"\n')
    asked = ["--config", str(settings), "--offline", "--format", "html", "--output", str(file)]

    for report in ("usage", "cost"):
        assert 0 == main(["report", report, *asked])
        assert "complete: 26 entries" in seen(file.read_text())
        assert {"acme", "globex", "own-keys"} < {row[0] for row in table(file.read_text(), "Tenants")}
    assert 0 == main(["report", "invoice", "--tenant", "acme", "--period", "2026-10", *asked])
    assert table(bill(ledger, "acme"), "Usage") == table(file.read_text(), "Usage")


def test_content_that_is_nothing_is_nothing() -> None:
    """Parts of a page may be left out."""
    assert Html("") == joined([None, [], ""])
