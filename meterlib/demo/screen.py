"""What people see of the demo: limits that fill and deny while it runs, and its totals at the end."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from meterlib import LedgerEntry, LimitState
from meterlib.billing.reports.report import Report, fold
from meterlib.demo.audit import Audit
from meterlib.demo.callers import CALLERS, MINUTE, PRESET
from meterlib.demo.traffic import Event, EventKind, Traffic, spoken

WIDTH_MIN, HEIGHT_MIN = 80, 20
"""A terminal smaller than this gets plain lines."""

States = Mapping[str, Sequence[LimitState]]


class Screen(Protocol):
    """Shows how a run goes on; entered before its first picture, left after its last."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def show(self, traffic: Traffic, states: States) -> None:
        """Take notice of how it stands now."""


class SilentScreen:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def show(self, traffic: Traffic, states: States) -> None:
        """Nothing happens."""


class PlainScreen(SilentScreen):
    """Writes a line for each second."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next_s = 1.0

    def __enter__(self) -> Self:
        self._console.print(f"meterlib demo: preset {PRESET}, a minute lasts {MINUTE}", soft_wrap=True)
        return self

    def show(self, traffic: Traffic, states: States) -> None:
        """Write the line, if its second has come."""
        if traffic.elapsed_s < self._next_s:
            return
        self._next_s = int(traffic.elapsed_s) + 1.0
        total = traffic.total
        fullest = sorted((s.used / max(1, s.quota), t, s) for t, of in states.items() for s in [_fullest(of)])[::-1]
        limits = ", ".join(f"{tenant} {spoken(s.name)} {used:.0%}" for used, tenant, s in fullest[:3])
        self._console.print(
            f"{int(traffic.elapsed_s):4} s  admitted {total.admitted}  denied {total.denied}  settled {total.settled}"
            f"  open {total.open}  fullest: {limits}",
            soft_wrap=True,
        )


class LiveScreen:
    """Draws the limits of all tenants as bars, over a log of what happens, and leaves the last picture standing."""

    def __init__(self, console: Console, seconds: float) -> None:
        self._console = console
        self._seconds = seconds
        self._log = _Log()
        self._lines_drawn = 0

    def __enter__(self) -> Self:
        self._console.show_cursor(False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._console.show_cursor(True)

    def show(self, traffic: Traffic, states: States) -> None:
        """Draw the picture anew, over the one before."""
        self._log.take(traffic)
        with self._console.capture() as drawing:
            self._console.print(self._picture(traffic, states))
        drawn = drawing.get()
        # Overwritten in one go and never erased first: nothing flickers.
        back = f"\x1b[{self._lines_drawn}F" if self._lines_drawn else ""
        self._console.file.write(back + drawn.replace("\n", "\x1b[K\n") + "\x1b[J")
        self._console.file.flush()
        self._lines_drawn = drawn.count("\n")

    def _picture(self, traffic: Traffic, states: States) -> RenderableType:
        width, height = min(self._console.width, 120) - 1, self._console.height - 2
        columns = _columns(width)
        rows: list[Text] = []
        for caller in CALLERS:
            rows.append(_row(columns, caller.tenant, traffic, states.get(caller.tenant, ())))
            if height >= _HEIGHT_WITH_STORIES:
                rows.append(Text(f"   {caller.story}", "dim"))
        log_lines = max(3, min(16, height - len(rows) - 5))
        return Group(
            _title(traffic, self._seconds, width),
            Text(),
            _joined((Text(name, "dim"), column) for name, column in columns.items()),
            *rows,
            Text(),
            *self._log.lines(log_lines, width),
            _legend(traffic, width),
        )


# ── Parts of the picture ──────────────────────────────────────────────────────────────────────────────────────────────

_HEIGHT_WITH_STORIES = 21
_LIMITS = {"requests": 6, "input tokens": 10, "open calls": 6}
"""The columns of limits, and how much room their figures take."""

_COUNTERS = {"admitted": "green", "denied": "red", "settled": ""}
_FULL, _HALF, _FREE = "━", "╸", "─"
_HELD_COLOUR = "cyan"


def _columns(width: int) -> dict[str, int]:
    """How wide each column is."""
    spare = max(0, width - 79)
    bars = {"requests": 7 + spare // 4, "input tokens": 8 + spare // 3, "open calls": 4 + spare // 8}
    return {
        " tenant": 9,
        **{name: bars[name] + figures + 2 for name, figures in _LIMITS.items()},
        **dict.fromkeys(_COUNTERS if spare >= 20 else ("admitted", "denied"), 9),
    }


def _row(columns: Mapping[str, int], tenant: str, traffic: Traffic, states: Sequence[LimitState]) -> Text:
    of_name = {spoken(state.name): state for state in states}
    cells = [Text(f" {tenant}", "bold")]
    for name in list(columns)[1:]:
        if name in of_name:
            bar = columns[name] - _LIMITS[name] - 2
            cells.append(_bar(of_name[name], bar, traffic.is_denying(tenant, of_name[name].name)))
        elif name in _COUNTERS:
            count = getattr(traffic.tallies[tenant], name)
            cells.append(Text(f"{count:,}".rjust(len(name)), _COUNTERS[name] if count else "dim"))
    return _joined(zip(cells, columns.values(), strict=True))


def _joined(cells: Iterable[tuple[Text, int]]) -> Text:
    """Cells side by side, each cut or filled to its width."""
    line = Text(no_wrap=True)
    for cell, width in cells:
        cell.truncate(width, pad=True)
        line.append_text(cell)
    return line


def _title(traffic: Traffic, seconds: float, width: int) -> Text:
    if not traffic.stopping:
        state = Text(f"{min(traffic.elapsed_s, seconds):.1f} of {seconds:g} s")
    elif traffic.total.open:
        state = Text(f"{traffic.total.open} calls still open", "yellow")
    else:
        state = Text("done", "green")
    title = Text.assemble((" meterlib demo ", "bold reverse"), (f"  {PRESET}, a minute lasts {MINUTE}", "dim"))
    return _joined([(title, width - 20), (Text(" " * (20 - len(state))) + state, 20)])


def _bar(state: LimitState, cells: int, denying: bool) -> Text:
    """Settled use, then what open calls hold, then what is free; and the sum in figures. Red while it denies."""
    colour = "red" if denying else "yellow" if state.used >= 0.8 * state.quota else "green"
    settled, used = (_half_cells(amount, state.quota, cells) for amount in (state.used - state.held, state.used))
    bar = Text()
    for right_half in range(1, 2 * cells, 2):
        if right_half > used:
            bar.append(_FREE, "bright_black")
        else:
            bar.append(_FULL if right_half < used else _HALF, colour if right_half <= settled else _HELD_COLOUR)
    return bar.append(f" {_short(state.used)}/{_short(state.quota)}", "bold red" if denying else "default")


def _half_cells(amount: int, quota: int, cells: int) -> int:
    """Half cells for an amount; all of them only if it is all of the quota."""
    return min(2 * cells, amount * 2 * cells // quota) if quota else 2 * cells


def _short(amount: int) -> str:
    return f"{amount / 1000:.0f}k" if amount >= 10_000 else f"{amount / 1000:.1f}k" if amount >= 1000 else str(amount)


def _legend(traffic: Traffic, width: int) -> Text:
    total = traffic.total
    sums = f"{total.admitted:,} admitted   {total.denied:,} denied   {total.settled:,} settled"
    legend = Text.assemble(
        (f" {_FULL}", "green"),
        (" settled  ", "dim"),
        (_FULL, _HELD_COLOUR),
        (" held  ", "dim"),
        (_FREE, "bright_black"),
        (" free", "dim"),
    )
    return _joined([(legend, width - len(sums)), (Text(sums, "bold"), len(sums))])


class _Log:
    """What happened last, no faster than one can read: what was shown least recently comes first."""

    _GAP_S = 0.3
    _STYLES: Mapping[EventKind, tuple[str, str]] = {
        "settled": ("✓", "green"),
        "denied": ("✗", "red"),
        "partial": ("↯", "magenta"),
        "refused": ("!", "yellow"),
        "cancelled": ("↩", "blue"),
    }

    def __init__(self) -> None:
        self._shown: deque[Event] = deque(maxlen=40)
        self._shown_at_s: dict[tuple[str, str], float] = {}
        self._next_s = 0.0

    def take(self, traffic: Traffic) -> None:
        """Choose from what happened since the last time."""
        if traffic.elapsed_s < self._next_s or not traffic.events:
            return
        self._next_s = traffic.elapsed_s + self._GAP_S
        chosen = min(traffic.events, key=lambda event: self._shown_at_s.get((event.tenant, event.kind), 0.0))
        self._shown_at_s[chosen.tenant, chosen.kind] = chosen.at_s
        self._shown.append(chosen)
        traffic.events.clear()

    def lines(self, count: int, width: int) -> list[Text]:
        """The last events, as many lines as asked for."""
        lines = [self._line(event, width) for event in list(self._shown)[-count:]]
        return lines + [Text()] * (count - len(lines))

    def _line(self, event: Event, width: int) -> Text:
        glyph, style = self._STYLES[event.kind]
        line = Text.assemble(
            (f" {event.at_s:4.1f} s  ", "dim"),
            (f"{event.tenant:8}", "bold"),
            (f"{glyph} {event.kind:10}", style),
            event.text,
        )
        line.truncate(width, overflow="ellipsis")
        return line


def _fullest(states: Sequence[LimitState]) -> LimitState:
    return max(states, key=lambda state: state.used / max(1, state.quota))


# ── At the end ────────────────────────────────────────────────────────────────────────────────────────────────────────


def print_report(console: Console, entries: Iterable[LedgerEntry]) -> None:
    """What each tenant used, by the ledger."""
    report = fold(entries, Report(by=("tenant",)))
    columns = {
        "calls": "calls",
        "input": "input_tokens",
        "cache writes": "cache_creation_input_tokens",
        "cache reads": "cache_read_input_tokens",
        "output": "output_tokens",
    }
    table = Table("tenant", box=SIMPLE, pad_edge=False)
    for title in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for row in report.rows():
        table.add_row(row.group[0], *(f"{row.sums[column]:,}" for column in columns.values()))
    table.add_section()
    table.add_row("all", *(f"{report.total()[column]:,}" for column in columns.values()), style="bold")
    console.print(table)


def print_totals(console: Console, traffic: Traffic) -> None:
    """What became of the calls."""
    total = traffic.total
    whole = total.settled - total.partial - total.refused
    rows = (
        (total.admitted, "calls admitted", f"after {total.denied} denials; {total.gave_up} more were given up"),
        (whole, "answered in full", "settled with what the provider told"),
        (total.partial, "broke off", "settled with the input told at the start, the output seen"),
        (total.refused, "refused upstream", "settled with no tokens"),
        (total.cancelled, "never sent", "cancelled: nothing counts"),
    )
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", style="bold")
    for row in rows:
        table.add_row(f"{row[0]:,}", row[1], Text(row[2], "dim"))
    console.print(table)


def print_audit(console: Console, audit: Audit) -> None:
    """Whether the ledger and the provider agree."""
    if audit.agrees:
        verdict = Text("ledger = provider", "bold green")
        sums = f": {audit.calls_served} calls served, {audit.entries_settled} settled, one entry each, with the same"
        console.print(verdict.append(f"{sums} token counts.", "default"))
        return
    console.print(Text("The ledger and the provider do not agree:", "bold red"))
    for difference in audit.differences[:20]:
        console.print(f"  {difference}", soft_wrap=True)


def print_whereabouts(console: Console, data: Path, configuration: Path) -> None:
    """Where the ledger is, and how to look further."""
    console.print(Text.assemble("The ledger is in ", (str(data), "bold"), ". To look further:"), soft_wrap=True)
    for command in ("report --by tenant,model", "limits acme", "ledger show --json"):
        console.print(f"  meterlib {command} --config {configuration}", soft_wrap=True)
