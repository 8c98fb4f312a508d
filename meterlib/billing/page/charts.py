"""Charts as inline SVG: bars over time, a line over time, shares of a whole. Pure.

They are drawn here and by no library: what is needed is little, and it has to come out the same to the last byte, take
its colours from the page (light, dark, print), carry its own description, and run no script. Coordinates are whole
tenths of a unit, worked out in integers; so amounts of money get here as integers too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from meterlib.billing.page.html import Html, tag

WIDTH, HEIGHT = 960, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 8, 12, 26
_LABELS_MAX = 9
_LINES_MAX = 5
_BAR_MAX = 600


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """What is drawn in one colour.

    Attributes:
        name: for the legend.
        colour: which of the page's, from 1.
        values: one for each place on the time axis; None where there is nothing to tell.
    """

    name: str
    colour: int
    values: Sequence[int | None]


class Axis(msgspec.Struct, frozen=True, kw_only=True):
    """The time axis: full names of its places, and short ones for below the chart."""

    names: Sequence[str]
    shorts: Sequence[str]


def bars(
    key: str, title: str, description: str, axis: Axis, series: Sequence[Series], text: Callable[[int], str]
) -> Html:
    """Bars over time, those of a place one above the other; what is negative hangs below the line.

    Args:
        key: unlike that of other charts on the page.
        title: of the chart.
        description: what can be seen in it, for who cannot see it.
        axis: of time.
        series: what is shown.
        text: how a value is written.
    """
    highest = max((_sum(series, at, positive=True) for at in range(len(axis.names))), default=0)
    lowest = min((_sum(series, at, positive=False) for at in range(len(axis.names))), default=0)
    scale = _Scale(lowest, highest)
    drawn = [part for at in range(len(axis.names)) for part in _bar(axis, series, at, scale, text)]
    return _chart(key, title, description, [*scale.lines(text), *_labels(axis), *drawn])


def curve(key: str, title: str, description: str, axis: Axis, series: Series, text: Callable[[int], str]) -> Html:
    """A line over time, broken where there is no value; values are parts of 1,000."""
    scale = _Scale(0, 1000)
    step = _step(axis)
    points = [
        None if value is None else (_LEFT * 10 + at * step // 10 + step // 20, scale.y(value))
        for at, value in enumerate(series.values)
    ]
    drawn: list[Html] = []
    run: list[str] = []
    for point in [*points, None]:
        if point is not None:
            run.append(f"{_unit(point[0])},{_unit(point[1])}")
        elif run:
            drawn.append(tag("polyline", points=" ".join(run), class_=f"l{series.colour}"))
            run = []
    for point, name, value in zip(points, axis.names, series.values, strict=True):
        if point is not None and value is not None:
            dot = {"cx": _unit(point[0]), "cy": _unit(point[1]), "r": "2.5"}
            drawn.append(tag("circle", tag("title", f"{name}: {text(value)}"), **dot, class_=f"c{series.colour}"))
    return _chart(key, title, description, [*scale.lines(text), *_labels(axis), *drawn])


def share(value: int, whole: int, colour: int = 1) -> Html:
    """A small bar: what part of the whole a value is. It says nothing that the numbers beside it do not."""
    part = min(max(value, 0) * 1000 // whole, 1000) if whole > 0 else 0
    return tag(
        "svg",
        tag("rect", x="0", y="0", width="100", height="8", class_="track"),
        tag("rect", x="0", y="0", width=_unit(part), height="8", class_=f"c{colour}") if part else None,
        viewBox="0 0 100 8",
        class_="share",
        aria_hidden="true",
    )


def legend(series: Sequence[Series]) -> Html:
    """Which colour is what."""
    return tag("ul", *(tag("li", _swatch(one.colour), one.name) for one in series), class_="legend")


def short(value: int) -> str:
    """A whole number in few characters: `1.2M`."""
    for power, unit in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            tenths = (abs(value) * 10 + 10**power // 2) // 10**power
            whole, rest = divmod(tenths, 10)
            return f"{'-' if value < 0 else ''}{whole}{f'.{rest}' if rest and whole < 100 else ''}{unit}"
    return str(value)


# ── Parts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Scale:
    """From values to heights, with lines at round numbers."""

    def __init__(self, lowest: int, highest: int) -> None:
        self._step = _round_step(highest - lowest)
        self._low = lowest // self._step * self._step
        self._high = max(-(-highest // self._step) * self._step, self._low + self._step)

    def y(self, value: int) -> int:
        """The height of a value, in tenths of a unit from the top."""
        room = (HEIGHT - _TOP - _BOTTOM) * 10
        return _TOP * 10 + room - (value - self._low) * room // (self._high - self._low)

    def lines(self, text: Callable[[int], str]) -> list[Html]:
        """Lines across the chart, with what they stand for."""
        drawn = []
        for value in range(self._low, self._high + 1, self._step):
            y = _unit(self.y(value))
            kind = "zero" if value == 0 else "grid"
            drawn.append(tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y, class_=kind))
            drawn.append(tag("text", text(value), x=_LEFT - 8, y=y, dy="0.32em", text_anchor="end"))
        return drawn


def _round_step(span: int) -> int:
    """The distance of lines: 1, 2 or 5 times a power of ten."""
    power = 1
    while True:
        for times in (1, 2, 5):
            if span <= power * times * _LINES_MAX:
                return power * times
        power *= 10


def _bar(axis: Axis, series: Sequence[Series], at: int, scale: _Scale, text: Callable[[int], str]) -> list[Html]:
    step = _step(axis)
    width = min(max(step // 10 - step // 35, 4), _BAR_MAX)
    left = _LEFT * 10 + at * step // 10 + (step // 10 - width) // 2
    drawn, above, below = [], 0, 0
    for one in series:
        value = one.values[at]
        if not value:
            continue
        start = above if value > 0 else below
        top, bottom = sorted((scale.y(start), scale.y(start + value)))
        drawn.append(
            tag(
                "rect",
                tag("title", f"{axis.names[at]}, {one.name}: {text(value)}"),
                x=_unit(left),
                y=_unit(top),
                width=_unit(width),
                height=_unit(max(bottom - top, 3)),
                class_=f"c{one.colour}",
            )
        )
        above, below = (above + value, below) if value > 0 else (above, below + value)
    return drawn


def _labels(axis: Axis) -> list[Html]:
    count = len(axis.shorts)
    every = -(-count // _LABELS_MAX) if count else 1
    step = _step(axis)
    return [
        tag(
            "text",
            axis.shorts[at],
            x=_unit(_LEFT * 10 + at * step // 10 + step // 20),
            y=HEIGHT - 8,
            text_anchor="middle",
        )
        for at in range(0, count, every)
    ]


def _step(axis: Axis) -> int:
    """How far places are apart, in hundredths of a unit."""
    return (WIDTH - _LEFT - _RIGHT) * 100 // max(len(axis.names), 1)


def _sum(series: Sequence[Series], at: int, *, positive: bool) -> int:
    values = (one.values[at] or 0 for one in series)
    return sum(value for value in values if (value > 0) == positive)


def _unit(tenths: int) -> str:
    whole, rest = divmod(tenths, 10)
    return f"{whole}.{rest}" if rest else str(whole)


def _chart(key: str, title: str, description: str, drawn: Sequence[Html]) -> Html:
    drawing = tag(
        "svg",
        tag("title", title, id=f"{key}-title"),
        tag("desc", description, id=f"{key}-desc"),
        *drawn,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_labelledby=f"{key}-title {key}-desc",
        class_="chart",
    )
    return tag("div", drawing, class_="scroll")


def _swatch(colour: int) -> Html:
    return tag(
        "svg",
        tag("rect", x="0", y="0", width="10", height="10", rx="2", class_=f"c{colour}"),
        viewBox="0 0 10 10",
        class_="swatch",
        aria_hidden="true",
    )
