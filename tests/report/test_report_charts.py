"""Figures: coordinates follow the data, ticks are round numbers in their range, and all of it can be read as text."""

import math
import re
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from vsd.report.charts import WIDTH, Bar, Line, Point, Row, bars, plane, rows
from vsd.report.entries import Estimate
from vsd.report.scale import Scale, brief
from vsd.report.series import Series, numbered, short_names

A, B = Series("a", 0), Series("b <&>", 1)
NUMBERS = st.floats(-1e6, 1e6).map(lambda value: round(value, 4))


def markers(svg: str, class_: str) -> list[tuple[float, float]]:
    """Places of a run's markers, in the order of its points."""
    group = next(g for g in ElementTree.fromstring(svg).iter("g") if g.get("class") == class_)
    places = [re.search(r"translate\((\S+) (\S+)\)", path.get("transform", "")) for path in group.iter("path")]
    return [(float(found[1]), float(found[2])) for found in places if found]


def titles(svg: str) -> list[str]:
    return [title.text or "" for title in ElementTree.fromstring(svg).iter("title")]


@given(st.lists(NUMBERS, min_size=1, max_size=20), st.booleans())
def test_a_scale_keeps_order_and_has_round_ticks(values: list[float], zero: bool) -> None:
    values = [abs(value) for value in values] if zero else values
    scale = Scale.around(values, 40, 340, zero)
    for low, high in zip(sorted(values), sorted(values)[1:]):
        assert scale(low) <= scale(high)
    assert all(40 <= scale(value) <= 340 for value in values)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 6 and all(40 - 1e-6 <= scale(tick) <= 340 + 1e-6 for tick in ticks)
    if len(ticks) > 1:
        step = ticks[1] - ticks[0]
        assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)


@given(st.lists(NUMBERS, min_size=2, max_size=12, unique=True))
def test_points_are_where_their_values_are(values: list[float]) -> None:
    """Right for a larger x, higher for a larger y, by the same share everywhere."""
    lines = [Line(A, [Point(float(n), Estimate(value)) for n, value in enumerate(values)])]
    places = markers(plane(lines, "x", "y"), "s0")
    xs, ys = [x for x, _ in places], [y for _, y in places]
    assert xs == sorted(xs) and len(set(xs)) == len(xs)
    span = max(values) - min(values)
    for value, y in zip(values, ys):
        share = (value - min(values)) / span
        assert abs((max(ys) - y) / (max(ys) - min(ys)) - share) < 0.01


def test_intervals_span_low_to_high() -> None:
    points = [Point(0, Estimate(1.0, 0.5, 2.0)), Point(1, Estimate(2.0, 1.0, 2.5)), Point(2, Estimate(0.5))]
    svg = plane([Line(A, points)], "x", "y", names=["one", "two", "three"])
    whiskers = [p.get("d", "") for p in ElementTree.fromstring(svg).iter("path") if p.get("class") == "interval"]
    (low, high), (low_2, high_2) = [[float(d.split()[n].partition("L")[0]) for n in (1, 2)] for d in whiskers]
    (_, y), (_, y_2), _ = markers(svg, "s0")
    assert high < y < low and high_2 < y_2 < low_2  # pixels grow downwards
    assert abs((low - y) / (y - high) - 0.5) < 0.02 and abs(y - low_2) < 0.11
    assert titles(svg)[0] == "a, 0: 1.00 [0.50, 2.00]"


def test_a_mark_is_a_line_from_top_to_bottom_at_its_position() -> None:
    """Its name is beside it, inside the figure, on the side with more room."""
    points = [Point(n, Estimate(1.0 + n)) for n in range(4)]
    for at, anchor in ((0.5, "start"), (2.25, "end")):
        svg = plane([Line(A, points)], "x", "y", names=["one", "two", "three", "four"], mark=(at, "here"))
        root = ElementTree.fromstring(svg)
        (line,) = [path.get("d", "") for path in root.iter("path") if path.get("class") == "level"]
        xs = [x for x, _ in markers(svg, "s0")]
        assert abs(float(line[1:].split()[0]) - (xs[0] + at * (xs[1] - xs[0]))) < 0.2
        (name,) = [text for text in root.iter("text") if text.text == "here"]
        assert name.get("text-anchor") == anchor and 44 < float(name.get("x", "")) < WIDTH


def test_a_figure_is_told_in_words() -> None:
    svg = plane([Line(B, [Point(10, Estimate(1.25)), Point(12000, Estimate(2.5))])], "steps", "τ")
    assert ElementTree.fromstring(svg).get("aria-label") == "τ by steps. b <&>: 1.25 at 10, 2.5 at 12k."
    svg = rows([Row("mt <b>", [(A, Estimate(1.5, 1.25, 1.75))])], "τ")
    assert ElementTree.fromstring(svg).get("aria-label") == "τ. mt <b>: a 1.50 [1.25, 1.75]."
    assert "<b>" not in svg


@given(st.lists(NUMBERS, min_size=1, max_size=9, unique=True))
def test_rows_lie_below_each_other_and_marks_at_their_values(values: list[float]) -> None:
    svg = rows(
        [Row(f"row {n}", [(A, Estimate(value)), (B, Estimate(value + 1))]) for n, value in enumerate(values)], "τ"
    )
    root = ElementTree.fromstring(svg)
    labels = [float(text.get("y", "")) for text in root.iter("text") if text.get("class") == "label"]
    assert labels == sorted(labels) and labels[-1] < float(root.get("viewBox", "").split()[3])
    places = [re.search(r"translate\((\S+) ", p.get("transform", "")) for p in root.iter("path") if p.get("transform")]
    xs = [float(found[1]) for found in places if found]
    order = sorted(range(len(values)), key=values.__getitem__)
    assert [xs[2 * n] for n in order] == sorted(xs[::2])
    assert all(0 <= x <= WIDTH and x <= right for x, right in zip(xs[::2], xs[1::2]))


def test_parts_of_a_bar_add_up() -> None:
    svg = bars([Bar("a", {"draft": 5.0, "verify": 30.0}), Bar("plain", {"draft": 0.0, "verify": 20.0})], "ms")
    boxes = [(float(r.get("x", "")), float(r.get("width", ""))) for r in ElementTree.fromstring(svg).iter("rect")]
    (x, width), (x_2, width_2), (x_3, width_3), (_, width_4) = boxes
    assert x == x_3 and abs(x + width - x_2) < 0.02 and width_3 == 0
    assert abs(width_2 / width - 6) < 0.01 and abs(width_4 / width_2 - 2 / 3) < 0.01
    assert "a, verify: 30" in titles(svg)


def test_many_points_keep_their_tooltips_without_markers() -> None:
    svg = plane([Line(A, [Point(float(n), Estimate(n * n / 7)) for n in range(100)])], "x", "y")
    assert not markers(svg, "s0") and len(titles(svg)) == 100
    assert svg.count('class="hidden"') == 100


def test_a_single_point_and_equal_values_have_a_scale() -> None:
    for values in ([0.0], [3.0], [2.5, 2.5]):
        svg = plane([Line(A, [Point(float(n), Estimate(value)) for n, value in enumerate(values)])], "x", "y")
        assert "nan" not in svg and "inf" not in svg and len(markers(svg, "s0")) == len(values)


def test_series_look_different() -> None:
    series = list(numbered(["a", "b", "a", "c", "d", "e", "f"]).values())
    assert [one.name for one in series] == ["a", "b", "c", "d", "e", "f"]
    assert len({one.class_ for one in series}) == 6
    assert len({one.marker(0, 0) for one in series[:4]}) == 4


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["runs/a/drafter", "runs/b/drafter"]) == {"runs/a/drafter": "a", "runs/b/drafter": "b"}
    assert set(short_names(["x/run/drafter", "y/run"]).values()) == {"x/run", "y/run"}
    assert set(short_names(["/home/me/runs/a", "runs/a/drafter"]).values()) == {"a"}
    assert short_names(["EAGLE-3", "VSD"]) == {"EAGLE-3": "EAGLE-3", "VSD": "VSD"}


def test_numbers_are_brief() -> None:
    assert [brief(x) for x in (0, 0.01234, 2.5, 150, 1234.4, 12000, -25000)] == [
        *("0", "0.0123", "2.5", "150", "1234", "12k", "-25k")
    ]
