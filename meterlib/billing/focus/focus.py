"""Rated rows as FOCUS Cost and Usage rows, and closes as FOCUS billing periods; as CSV or Parquet, for FinOps tools.

Everything is in UTC. A charge period is an hour or a day of it, cut where a billing period begins or ends: these are
months of the zone that bills go by, and need not begin with a day of UTC. What was booked in a period that was open is
charged when it was booked; what corrects a closed one is charged, as `Correction`, when the corrected call was made,
and billed in the period that it was posted in.

Groups are sorted by everything they differ in, so the same archive gives the same bytes. DuckDB does the grouping and
the sorting, on disk where memory does not suffice.
"""

from __future__ import annotations

import csv
import shutil
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

import msgspec

from meterlib.billing import duck
from meterlib.billing.duck import quoted
from meterlib.billing.focus.columns import VERSIONS, Version, as_text, as_value, columns_of
from meterlib.billing.postings.postings import Postings
from meterlib.billing.reports.answers import Reader
from meterlib.billing.reports.query import TIMES, WORDS, Query, month_of, of_entry
from meterlib.core.checks import check_choice
from meterlib.errors import InvalidInput

_HOUR_MS, _DAY_MS = 3_600_000, 86_400_000
_CURRENCY = "USD"
_CSV, _PARQUET = "FORMAT csv, HEADER true", "FORMAT parquet, COMPRESSION zstd"

_ALIKE = (
    *("epoch", "shard", "tenant", "sub_account", "tags", "funding", "charge", "provider", "model", "token_type"),
    *("per", "currency", "list_price", "contracted_price", "billed_price", "price_source", "price_model"),
    *("price_digest", "price_from", "variant", "geo", "above", "quality", "flags", "unpriced"),
    *("period", "corrects", "bucket_ms"),
)
"""What all rated rows have in common that become one row."""
_ORDER = ("bucket_ms", "tenant", "sub_account", "model", "token_type", "epoch", "shard", "first_line")
"""The last three tell any two groups apart, since no line of an entry is in two."""
_NOT_TOLD = ("kind", "requested_model", "week", "month")
_COSTS = ("billed_cost", "list_cost", "contracted_cost")


class Focus(msgspec.Struct, frozen=True, kw_only=True):
    """What a FOCUS file is to be.

    Attributes:
        version: of the specification.
        issuer: who issues the invoices: the operator's name.
        sub_account: the attribute of calls that is the sub account; none if empty.
    """

    version: Version
    issuer: str
    sub_account: str = "key"

    def __post_init__(self) -> None:
        check_choice(self.version, "version", VERSIONS)
        check_issuer(self.issuer)


def check_issuer(issuer: str | None) -> None:
    """Pass if it names who issues the invoices.

    Raises:
        InvalidInput: nobody is named; a bill without issuer is none.
    """
    if not issuer or not issuer.strip():
        problem = 'FOCUS needs the name of who issues the invoices: set issuer = "Your company" under [billing]'
        raise InvalidInput("billing.issuer", problem)


def check_query(query: Query) -> None:
    """Pass if FOCUS can answer it: by attributes of calls (they become tags), and by hour, in place of by day.

    Raises:
        InvalidInput: it is of another time than bills, or by something that FOCUS rows do not tell apart.
    """
    if query.time_basis != "booked":
        raise InvalidInput("time_basis", "FOCUS is of bills, and these go by when usage was booked")
    for word in query.by:
        if word in _NOT_TOLD:
            raise InvalidInput("by", f"FOCUS has no {word}s: its rows are by hour or day, and by what makes a price")


def write_focus(postings: Postings, query: Query, focus: Focus, out: TextIO | Path) -> int:
    """Write rows as CSV to a stream or a file, or as Parquet to a file whose name ends so; returns how many.

    Raises:
        InvalidInput: FOCUS cannot answer that query.
        OSError: the disk is full, or fails.
    """
    check_query(query)
    if isinstance(out, Path):
        return _write(postings, query, focus, out)
    with TemporaryDirectory(prefix="meterlib-focus-") as scratch:
        file = Path(scratch, "focus.csv")
        count = _write(postings, query, focus, file)
        with file.open(encoding="utf-8", newline="") as stream:
            shutil.copyfileobj(stream, out)
    return count


def _write(postings: Postings, query: Query, focus: Focus, file: Path) -> int:
    parquet = file.suffix == ".parquet"
    as_column, shape = (as_value, _PARQUET) if parquet else (as_text, _CSV)
    with Reader(postings, postings.tz) as reader:
        _make_periods(reader, query)
        run = reader.connection.execute
        columns = ", ".join(f'{as_column(*how)} AS "{name}"' for name, how in columns_of(focus.version).items())
        with duck.disk_errors():
            run(f"CREATE OR REPLACE TEMP TABLE focus_groups AS {_grouped(reader, query, focus)}")
            if parquet:
                run("SET threads = 1")  # else its groups of rows would be cut by whoever is faster
            written: Any = run(f"COPY (SELECT {columns} FROM ({_placed(query, focus)})) TO {quoted(file)} ({shape})")
        return int(written.fetchone()[0])


# ── From rated rows to groups ─────────────────────────────────────────────────────────────────────────────────────────


def _grouped(reader: Reader, query: Query, focus: Focus) -> str:
    """SQL of the groups."""
    grain = _grain_ms(query)
    corrected = (
        "if(booked_at_ms >= corrected_start_ms AND booked_at_ms < corrected_end_ms, booked_at_ms,"
        " greatest(least(touches_ms, corrected_end_ms - 1), corrected_start_ms))"
    )
    sums = ", ".join(f"coalesce(sum({cost}), 0) AS {cost}" for cost in _COSTS)
    return (
        f"SELECT {', '.join(_ALIKE)}, sum(quantity) AS quantity, {sums}, min(n) AS first_n, max(n) AS last_n,"
        " min(n::HUGEINT * 281474976710656 + line) AS first_line"
        f" FROM (SELECT *, if(corrects = '', booked_at_ms, {corrected}) // {grain} * {grain} AS bucket_ms"
        f" FROM ({_attributed(reader, query, focus)}) LEFT JOIN (SELECT name AS corrects,"
        " start_ms AS corrected_start_ms, end_ms AS corrected_end_ms FROM focus_periods) USING (corrects))"
        f" GROUP BY {', '.join(_ALIKE)}"
        # What was taken back before it was billed leaves no trace but in the ledger.
        " HAVING sum(quantity) <> 0 OR sum(posting) <> 0"
    )


def _placed(query: Query, focus: Focus) -> str:
    """SQL of the groups in order, each with who, and from when to when."""
    issuer = quoted(focus.issuer)
    order = ", ".join(f"{name} NULLS FIRST" for name in _ORDER)
    theirs = "funding = 'own' AND charge = 'usage'"
    currency = f"coalesce(nullif(currency, ''), (SELECT any_value(currency) FROM focus_currency), {quoted(_CURRENCY)})"
    return (
        f"SELECT * REPLACE ({currency} AS currency), if({theirs}, provider, {issuer}) AS seller,"
        f" if(charge = 'usage', provider, {issuer}) AS maker,"
        f" if(sub_account IS NULL, NULL, {quoted(focus.sub_account)}) AS sub_account_type,"
        " greatest(bucket_ms, p.start_ms) AS charge_start_ms,"
        f" least(bucket_ms + {_grain_ms(query)}, p.end_ms) AS charge_end_ms,"
        " b.start_ms AS billing_start_ms, b.end_ms AS billing_end_ms"
        " FROM focus_groups g JOIN focus_periods b ON b.name = g.period"
        " JOIN focus_periods p ON p.name = if(g.corrects = '', g.period, g.corrects)"
        f" ORDER BY {order}"
    )


def _grain_ms(query: Query) -> int:
    return _HOUR_MS if "hour" in query.by else _DAY_MS


def _attributed(reader: Reader, query: Query, focus: Focus) -> str:
    """The rated rows asked for, each with what the attributes of its call say."""
    rows = reader.rows_of(query, "*")
    tagged = [word.removeprefix("attribute:") for word in query.by if word not in WORDS and word not in TIMES]
    if not focus.sub_account and not tagged:
        return f"SELECT *, NULL::VARCHAR AS sub_account, NULL::VARCHAR AS tags FROM ({rows})"
    account = of_entry(f"attribute:{focus.sub_account}") if focus.sub_account else "NULL"
    pairs = ", ".join(f"{{key: {quoted(name)}, value: {of_entry(f'attribute:{name}')}}}" for name in tagged)
    told = f"list_filter([{pairs}], lambda pair: pair.value IS NOT NULL)"
    tags = f"if(len({told}) = 0, NULL, to_json(map_from_entries({told}))::VARCHAR)" if tagged else "NULL"
    entries = f"SELECT epoch, shard, n, {account} AS sub_account, {tags} AS tags FROM ({reader.entries})"
    return f"SELECT * FROM ({rows}) JOIN ({entries}) USING (epoch, shard, n)"


def _make_periods(reader: Reader, query: Query) -> None:
    """Tables of the billing periods that occur, and of the one currency that prices are in, if it is one."""
    asked = reader.rows_of(query, "period, corrects, currency")
    found = reader.connection.execute(f"SELECT DISTINCT period, corrects, currency FROM ({asked})").fetchall()
    names = sorted({name for period, corrects, _ in found for name in (period, corrects) if name})
    bounds = [(name, *month_of(name, reader.billing_tz)[1:]) for name in names]
    run = reader.connection.execute
    run("CREATE OR REPLACE TEMP TABLE focus_periods (name VARCHAR, start_ms BIGINT, end_ms BIGINT)")
    if bounds:
        values = ", ".join(f"({quoted(name)}, {start}, {end})" for name, start, end in bounds)
        run(f"INSERT INTO focus_periods VALUES {values}")
    currencies = {currency for *_, currency in found if currency}
    run("CREATE OR REPLACE TEMP TABLE focus_currency (currency VARCHAR)")
    if len(currencies) == 1:
        run(f"INSERT INTO focus_currency VALUES ({quoted(currencies.pop())})")


# ── Billing periods ───────────────────────────────────────────────────────────────────────────────────────────────────

BILLING_PERIOD_COLUMNS = (
    *("BillingPeriodStart", "BillingPeriodEnd", "BillingPeriodStatus", "InvoiceIssuerName"),
    *("BillingPeriodCreated", "BillingPeriodLastUpdated"),
)


def write_billing_periods(postings: Postings, issuer: str, out: TextIO) -> int:
    """Write FOCUS 1.4's Billing Period file as CSV: closed periods, and open ones with usage; returns how many.

    Only the operator's periods are in it: when a customer's own provider closes its periods, nobody here knows.

    Raises:
        InvalidInput: nobody is named as the issuer.
    """
    check_issuer(issuer)
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(BILLING_PERIOD_COLUMNS)
    updated = _last_postings(postings)
    closed = {close.period: close.closed_at_ms for close in postings.closes}
    for name in sorted({*updated, *closed}):
        _, start_ms, end_ms = month_of(name, postings.tz)
        last_ms = max(start_ms, closed.get(name, updated.get(name, 0)))
        start, end, last = (moment_text(ms) for ms in (start_ms, end_ms, last_ms))
        writer.writerow([start, end, "Closed" if name in closed else "Open", issuer, start, last])
    return len({*updated, *closed})


def _last_postings(postings: Postings) -> dict[str, int]:
    """When something was last posted in each period."""
    with Reader(postings, postings.tz) as reader:
        found = reader.connection.execute(f"SELECT period, max(posted_at_ms) FROM ({reader.rows}) GROUP BY period")
        return dict(found.fetchall())


def moment_text(ms: int) -> str:
    """A moment as FOCUS writes it, in whole seconds of UTC."""
    return f"{datetime.fromtimestamp(ms // 1000, UTC):%Y-%m-%dT%H:%M:%SZ}"
