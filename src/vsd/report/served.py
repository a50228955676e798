"""A served engine beside this one: acceptance by position, speed, and the answers that differ."""

from collections.abc import Sequence

from vsd.report.entries import Difference, EngineComparison, Side
from vsd.report.html import Html, folded, table, tag
from vsd.report.layout import Section, figures, section
from vsd.report.position import INTERVALS, by_position
from vsd.report.read import Bench
from vsd.report.series import Series, legend, short_names

_DIFFERENCES = 50  # rows of differing answers
_TIE = "A margin near 0, with the second best token on the server, is a floating-point tie."


def served(benches: Sequence[Bench]) -> list[Section]:
    """A section for every file of `vsd bench --server`."""
    found = [(bench, bench.served) for bench in benches if bench.served is not None]
    names = short_names(str(bench.path) for bench, _ in found)
    return [
        _section(one, f"served-{n}", f": {names[str(bench.path)]}" if len(found) > 1 else "")
        for n, (bench, one) in enumerate(found)
    ]


def beside(one: EngineComparison) -> str:
    """The comparison in short."""
    return f"{one.engine} beside vsd"


def _section(one: EngineComparison, name: str, file: str) -> Section:
    sides = [(Series(one.engine, 0), one.there)]
    sides += [] if one.here is None else [(Series("vsd", 1), one.here)]
    chains = f"chains of {one.depth} drafted tokens"
    what = f"{one.engine} and vsd draft {chains} with the same drafter" if one.here else f"{one.engine} drafts {chains}"
    intro = f"{what}, at temperature 0, one request at a time. {INTERVALS}"
    verdict = tag("p", tag("b", f"{one.verdict[:1].upper()}{one.verdict[1:]}.")) if one.verdict else ""
    shares = by_position(
        [(s, side.acceptance) for s, side in sides], "Acceptance by position", ", also those behind an answer's end"
    )
    drawn = figures(shares, tag("div", _engines(sides), *_answers(one)))
    return section(name, f"A served engine{file}", intro, verdict, legend(series for series, _ in sides), drawn)


def _engines(sides: Sequence[tuple[Series, Side]]) -> Html:
    head = ["engine", "target passes", "1 + accepted a pass", "tokens/s"]
    cells = [(s.name, side.passes, side.length, f"{side.tokens_per_second:.1f}") for s, side in sides]
    return table(head, cells, class_="wide")


def _answers(one: EngineComparison) -> list[Html]:
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
