"""Acceptance by position: how often a pass accepts at least 1, 2, … drafted tokens."""

from collections.abc import Sequence

from vsd.report.charts import Line, Point, plane
from vsd.report.entries import Estimate
from vsd.report.html import Html
from vsd.report.layout import figure, numbers_of_lines
from vsd.report.series import Series

INTERVALS = "[ ] are 95 % bootstrap intervals over prompts."
_NOTE = "Share of target passes that accepted at least so many drafted tokens"
_AXES = "drafted tokens", "share of passes"


def by_position(shares: Sequence[tuple[Series, Sequence[Estimate]]], title: str, more: str = "") -> Html:
    """The figure; `more` continues its note.

    Args:
        shares: of every drafter, the share of passes that accepted at least 1, 2, … drafted tokens.
    """
    lines = [Line(s, [Point(k, e, f"{k + 1} tokens or more") for k, e in enumerate(found)]) for s, found in shares]
    names = [str(k + 1) for k in range(max(len(line.points) for line in lines))]
    drawn = plane(lines, *_AXES, names=names, zero=True)
    return figure(title, f"{_NOTE}{more}.", drawn, numbers_of_lines(lines, *_AXES, names))
