"""A served engine beside this one: acceptance by position, speed, and the answers that differ."""

from collections.abc import Sequence

from vsd.report.charts import Line, Point, plane
from vsd.report.entries import Difference, Served, Side
from vsd.report.html import Html, folded, table, tag
from vsd.report.layout import Section, figure, figures, numbers_of_lines, section
from vsd.report.read import Bench
from vsd.report.series import Series, legend, short_names

_DIFFERENCES = 50  # rows of differing answers
_INTERVALS = "[ ] are 95 % bootstrap intervals over prompts."
_TIE = "A margin near 0, with the second best token on the server, is a floating-point tie."


def served(benches: Sequence[Bench]) -> list[Section]:
    """A section for every file of `vsd bench --server`."""
    found = [(bench, bench.served) for bench in benches if bench.served is not None]
    names = short_names(str(bench.path) for bench, _ in found)
    return [
        _section(one, f"served-{n}", f": {names[str(bench.path)]}" if len(found) > 1 else "")
        for n, (bench, one) in enumerate(found)
    ]


def beside(one: Served) -> str:
    """The comparison in short."""
    return f"{one.engine} beside vsd"


def _section(one: Served, name: str, file: str) -> Section:
    sides = [(Series(one.engine, 0), one.there)]
    sides += [] if one.here is None else [(Series("vsd", 1), one.here)]
    chains = f"chains of {one.depth} drafted tokens"
    what = f"{one.engine} and vsd draft {chains} with the same drafter" if one.here else f"{one.engine} drafts {chains}"
    intro = f"{what}, at temperature 0, one request at a time. {_INTERVALS}"
    verdict = tag("p", tag("b", f"{one.verdict[:1].upper()}{one.verdict[1:]}.")) if one.verdict else ""
    drawn = figures(_by_position(sides), tag("div", _engines(sides), *_answers(one)))
    return section(name, f"A served engine{file}", intro, verdict, legend(series for series, _ in sides), drawn)


def _by_position(sides: Sequence[tuple[Series, Side]]) -> Html:
    lines = [
        Line(s, [Point(k, e, f"{k + 1} tokens or more") for k, e in enumerate(side.acceptance)]) for s, side in sides
    ]
    names = [str(k + 1) for k in range(max(len(line.points) for line in lines))]
    axes = "drafted tokens", "share of passes"
    note = "Share of target passes that accepted at least so many drafted tokens, also those behind an answer's end."
    drawn = plane(lines, *axes, names=names, zero=True)
    return figure("Acceptance by position", note, drawn, numbers_of_lines(lines, *axes, names))


def _engines(sides: Sequence[tuple[Series, Side]]) -> Html:
    head = ["engine", "target passes", "1 + accepted a pass", "tokens/s"]
    cells = [(s.name, side.passes, side.length, f"{side.tokens_per_second:.1f}") for s, side in sides]
    return table(head, cells, class_="wide")


def _answers(one: Served) -> list[Html]:
    """How many answers are equal, and those that differ, folded."""
    equal = one.answers - len(one.differences)
    share = f"{equal} of {one.answers} answers ({100 * equal / one.answers:.0f} %)"
    said = tag("p", f"{share} equal those of plain decoding here.")
    if not one.differences:
        return [said]
    head = ["prompt", "turn", "token", "here", "server", "margin of the best two logits"]
    shown = table(head, map(_row, one.differences[:_DIFFERENCES]), class_="wide")
    more = len(one.differences) - _DIFFERENCES
    note = tag("p", f"Where they first differ. {_TIE}{f' {more} more are in the file.' if more > 0 else ''}")
    return [said, folded(f"{len(one.differences)} answers that differ", note, shown)]


def _row(one: Difference) -> tuple[object, ...]:
    here, there = ("end" if token is None else token for token in (one.here, one.there))
    second = ", second best" if one.second else ""
    return one.prompt, one.turn, one.token, here, there, f"{one.margin:.3g}{second}"
