"""Sections of a page, and figures with their numbers as a table."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from vsd.report.charts import Line, Row
from vsd.report.html import Html, folded, join, table, tag
from vsd.report.scale import brief

Item = TypeVar("Item")

_NUMBERS = 12  # rows of a line in the table of a figure


class Section(NamedTuple):
    """A section that #name leads to."""

    name: str
    title: str
    content: Html

    @property
    def html(self) -> Html:
        """The element."""
        return tag("section", tag("h2", self.title), self.content, id=self.name)


def section(name: str, title: str, intro: object, *content: object) -> Section:
    """A section that begins with a sentence."""
    return Section(name, title, join([tag("p", intro, class_="intro"), *content]))


def figure(title: str, note: object, drawn: Html, numbers: Html) -> Html:
    """A figure with its title, what it shows, and its numbers folded."""
    caption = tag("figcaption", tag("h3", title), tag("p", note) if note else "")
    return tag("figure", caption, drawn, folded("numbers", numbers))


def figures(*drawn: Html) -> Html:
    """Figures side by side, or one below the other on a narrow screen."""
    return tag("div", *drawn, class_="figures")


def numbers_of_lines(lines: Sequence[Line], x_title: str, y_title: str, names: Sequence[str] = ()) -> Html:
    """Some points of every line, the last one included."""
    cells = [
        (line.series.name, names[int(p.x)] if names else brief(p.x), p.y if p.y.low is not None else f"{p.y.value:.3g}")
        for line in lines
        for p in thinned(line.points, _NUMBERS)
    ]
    return table(["run", x_title, y_title], cells)


def numbers_of_rows(rows: Sequence[Row], first: str, value: str) -> Html:
    """Every value of a figure of rows."""
    return table([first, "run", value], [(row.label, s.name, estimate) for row in rows for s, estimate in row.marks])


def thinned(items: Sequence[Item], most: int) -> list[Item]:
    """At most about `most` evenly spread items, the last one included."""
    step = max(1, -(-len(items) // most))
    return list(items[::-1][::step][::-1])
