"""Figures as pure functions: data → SVG. Sizes are those of a phone; a page sets several side by side.

Every mark has a tooltip (`<title>`), every figure a text alternative, and colours, dashes and markers come from
style.css by class.
"""

from collections.abc import Sequence
from typing import NamedTuple

from vsd.report.entries import Estimate
from vsd.report.html import Html, join, tag
from vsd.report.scale import Scale, brief
from vsd.report.series import Series

WIDTH, HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 350, 22, 190  # the plane of `plane`
_FEW = 16  # points of a line that have visible markers
_ROW, _LINE = 22, 14  # pixels of a row's label, and of every mark below it


class Point(NamedTuple):
    """A point of a plane; `note` begins its tooltip."""

    x: float
    y: Estimate
    note: str = ""


class Line(NamedTuple):
    """The points of one run."""

    series: Series
    points: Sequence[Point]


class Row(NamedTuple):
    """A labelled row of values, one or several runs'."""

    label: str
    marks: Sequence[tuple[Series, Estimate]]


class Bar(NamedTuple):
    """A bar of parts that add up."""

    label: str
    parts: dict[str, float]


def plane(
    lines: Sequence[Line],
    x_title: str,
    y_title: str,
    *,
    names: Sequence[str] = (),
    zero: bool = False,
    joined: bool = True,
    level: float | None = None,
    mark: tuple[float, str] | None = None,
) -> Html:
    """Lines with intervals over an axis.

    Args:
        names: of the positions 0, 1, … on the x axis; without them it has numbers.
        zero: the y axis begins at 0.
        joined: points of a run are joined by a line.
        level: height of a line across.
        mark: a position on the x axis, and its name: a line from top to bottom.
    """
    points = [point for line in lines for point in line.points]
    values = [v for p in points for v in p.y if v is not None] + ([] if level is None else [level])
    y = Scale.around(values, _BOTTOM, _TOP, zero)
    x = (
        Scale(-0.5, len(names) - 0.5, _LEFT, _RIGHT)
        if names
        else Scale.around([p.x for p in points], _LEFT, _RIGHT, zero=min(p.x for p in points) >= 0)
    )
    across = [] if level is None else [tag("path", d=f"M{_LEFT} {y(level):.1f}H{_RIGHT}", class_="level")]
    across += [] if mark is None else [_mark(x(mark[0]), mark[1])]
    drawn = [_line(line, x, y, _shift(n, len(lines)) if names else 0.0, joined) for n, line in enumerate(lines)]
    parts = [_y_axis(y, y_title), _x_axis(x, x_title, names), *across, *drawn]
    told = _summary(lines, x_title, y_title, names) + ("" if mark is None else f" A line marks: {mark[1]}.")
    return _svg(HEIGHT, told, parts)


def rows(items: Sequence[Row], title: str, *, level: tuple[float, str] | None = None) -> Html:
    """Values with intervals, one below the other.

    Args:
        level: a value to compare with, and its name: a line from top to bottom.
    """
    values = [v for row in items for _, estimate in row.marks for v in estimate if v is not None]
    x = Scale.around(values + ([] if level is None else [level[0]]), 10, _RIGHT)
    heights = [_ROW + _LINE * len(row.marks) for row in items]
    tops = [sum(heights[:n]) + 14 for n in range(len(items))]
    bottom = sum(heights) + 20
    across: list[Html] = []
    if level is not None:
        across.append(tag("path", d=f"M{x(level[0]):.1f} 16V{bottom}", class_="level"))
        across.append(tag("text", level[1], x=x(level[0]), y=11, text_anchor=_anchor(x(level[0])), class_="quiet"))
    drawn = [_row(row, x, top) for row, top in zip(items, tops)]
    told = "; ".join(f"{row.label}: " + ", ".join(f"{s.name} {e}" for s, e in row.marks) for row in items)
    return _svg(bottom + 40, f"{title}. {told}.", [*_bottom_axis(x, title, bottom), *across, *drawn])


def bars(items: Sequence[Bar], title: str) -> Html:
    """Stacked bars; the parts' classes are p0, p1, …, in order."""
    x = Scale.around([0.0, *(sum(bar.parts.values()) for bar in items)], 10, _RIGHT, zero=True)
    bottom = 40 * len(items) + 6
    drawn = [_bar(bar, x, 40 * n) for n, bar in enumerate(items)]
    told = "; ".join(f"{b.label}: " + ", ".join(f"{name} {brief(v)}" for name, v in b.parts.items()) for b in items)
    return _svg(bottom + 40, f"{title}. {told}.", [*_bottom_axis(x, title, bottom), *drawn])


def _svg(height: float, summary: str, parts: Sequence[Html]) -> Html:
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=summary)


def _summary(lines: Sequence[Line], x_title: str, y_title: str, names: Sequence[str]) -> str:
    """The figure in words: where every line begins and ends."""

    def at(point: Point) -> str:
        return f"{point.y.value:.3g} at {names[int(point.x)] if names else brief(point.x)}"

    told = [f"{line.series.name}: {at(line.points[0])}, {at(line.points[-1])}" for line in lines if line.points]
    return f"{y_title} by {x_title}. {'; '.join(told)}."


def _shift(number: int, count: int) -> float:
    """Side step of a run at a named position, so that intervals do not cover each other."""
    return (number - (count - 1) / 2) * min(0.16, 0.6 / count)


def _line(line: Line, x: Scale, y: Scale, shift: float, joined: bool) -> Html:
    """One run: line, intervals, and markers; the markers of many points are seen only under the pointer."""
    places = [(x(p.x + shift), y(p.y.value)) for p in line.points]
    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
    drawn = [tag("path", d=path, class_="line")] if joined and len(places) > 1 else []
    for point, (a, b) in zip(line.points, places):
        tip = tag("title", f"{line.series.name}, {point.note or brief(point.x)}: {_told(point.y)}")
        whisker = [] if point.y.low is None else [_whisker(a, y(point.y.low), a, y(point.y.high or 0.0))]
        quiet = len(places) > _FEW
        mark = tag("circle", cx=a, cy=b, r=4, class_="hidden") if quiet else line.series.marker(a, b)
        drawn.append(tag("g", tip, *whisker, mark))
    return tag("g", *drawn, class_=line.series.class_)


def _mark(x: float, name: str) -> Html:
    """A line from top to bottom; its name is beside its top, on the side with more room."""
    side, anchor = (4, "start") if x < (_LEFT + _RIGHT) / 2 else (-4, "end")
    line = tag("path", d=f"M{x:.1f} {_TOP - 18}V{_BOTTOM}", class_="level")
    return join([line, tag("text", name, x=x + side, y=_TOP - 8, text_anchor=anchor, class_="quiet")])


def _told(estimate: Estimate) -> str:
    return str(estimate) if abs(estimate.value) >= 0.1 else f"{estimate.value:.3g}"


def _whisker(x1: float, y1: float, x2: float, y2: float) -> Html:
    return tag("path", d=f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}", class_="interval")


def _y_axis(y: Scale, title: str) -> Html:
    grid = [tag("path", d=f"M{_LEFT} {y(t):.1f}H{_RIGHT}", class_="grid") for t in y.ticks()]
    labels = [tag("text", brief(t), x=_LEFT - 6, y=y(t) + 4, text_anchor="end") for t in y.ticks()]
    return join([*grid, *labels, tag("text", title, x=2, y=10, class_="quiet")])


def _x_axis(x: Scale, title: str, names: Sequence[str]) -> Html:
    """Ticks at round numbers, or names at their positions: every second or third where they would touch."""
    step = 1 + max((len(name) for name in names), default=0) * 7 * len(names) // (_RIGHT - _LEFT)
    ticks = [(x(n), name) for n, name in enumerate(names) if n % step == 0] or [(x(t), brief(t)) for t in x.ticks()]
    labels = [tag("text", name, x=a, y=_BOTTOM + 17, text_anchor="middle") for a, name in ticks]
    centre = (_LEFT + _RIGHT) / 2
    return join([*labels, tag("text", title, x=centre, y=_BOTTOM + 35, text_anchor="middle", class_="quiet")])


def _bottom_axis(x: Scale, title: str, bottom: float) -> list[Html]:
    grid = [tag("path", d=f"M{x(t):.1f} 16V{bottom:g}", class_="grid") for t in x.ticks()]
    labels = [tag("text", brief(t), x=x(t), y=bottom + 16, text_anchor=_anchor(x(t))) for t in x.ticks()]
    return [*grid, *labels, tag("text", title, x=WIDTH / 2, y=bottom + 34, text_anchor="middle", class_="quiet")]


def _anchor(x: float) -> str:
    """Alignment of a label that stays inside the figure."""
    return "start" if x < 20 else "end" if x > WIDTH - 30 else "middle"


def _row(row: Row, x: Scale, top: float) -> Html:
    """Label, the value of a single mark at the right, and marks below."""
    only = str(row.marks[0][1]) if len(row.marks) == 1 else ""
    drawn = [
        tag("text", _fitting(row.label, only), tag("title", row.label), x=10, y=top + 14, class_="label"),
        tag("text", only, x=_RIGHT, y=top + 14, text_anchor="end"),
    ]
    for n, (series, estimate) in enumerate(row.marks):
        y = top + _ROW + 4 + _LINE * n
        tip = tag("title", f"{row.label}, {series.name}: {estimate}")
        whisker = [] if estimate.low is None else [_whisker(x(estimate.low), y, x(estimate.high or 0.0), y)]
        drawn.append(tag("g", tip, *whisker, series.marker(x(estimate.value), y), class_=series.class_))
    return tag("g", *drawn)


def _bar(bar: Bar, x: Scale, top: float) -> Html:
    total = f"{brief(sum(bar.parts.values()))}"
    drawn = [
        tag("text", _fitting(bar.label, total), tag("title", bar.label), x=10, y=top + 15, class_="label"),
        tag("text", total, x=_RIGHT, y=top + 15, text_anchor="end"),
    ]
    start = 0.0
    for n, (name, value) in enumerate(bar.parts.items()):
        tip = tag("title", f"{bar.label}, {name}: {brief(value)}")
        width = x(start + value) - x(start)
        drawn.append(tag("rect", tip, x=x(start), y=top + 21, width=width, height=14, class_=f"p{n}"))
        start += value
    return tag("g", *drawn)


def _fitting(label: str, value: str) -> str:
    """A label that leaves room for the value at the right; its middle is left out if it is long."""
    room = 46 - len(value)
    return label if len(label) <= room else f"{label[: room // 2 - 1]}…{label[-(room - room // 2) :]}"
