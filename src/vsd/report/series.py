"""The compared runs: their names, and the colour, dash and marker that each has in all figures."""

from collections.abc import Iterable
from itertools import combinations
from pathlib import PurePath
from typing import NamedTuple

from vsd.report.html import Html, join, tag

COLOURS = 6  # of style.css; dashes and markers tell runs apart without colours
_MARKERS = (
    "M-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0 -7.2 0z",  # circle
    "M-3.2 -3.2h6.4v6.4h-6.4z",  # square
    "M0 -4.6l4.6 4.6l-4.6 4.6l-4.6 -4.6z",  # diamond
    "M0 -4.4l4.4 7.4h-8.8z",  # triangle
)


class Series(NamedTuple):
    """A compared run."""

    name: str
    number: int

    @property
    def class_(self) -> str:
        """Class of its colour and dash in style.css."""
        return f"s{self.number % COLOURS}"

    def marker(self, x: float, y: float) -> Html:
        """Its marker at a point of a figure."""
        return tag("path", d=_MARKERS[self.number % len(_MARKERS)], transform=f"translate({x:.1f} {y:.1f})")


def numbered(names: Iterable[str]) -> dict[str, Series]:
    """One series for every distinct name, in order."""
    return {name: Series(name, number) for number, name in enumerate(dict.fromkeys(names))}


def legend(series: Iterable[Series]) -> Html:
    """The names with line and marker, if there is more than one."""
    entries = [tag("li", _key(one), one.name) for one in series]
    return tag("ul", *entries, class_="legend") if len(entries) > 1 else join([])


def _key(one: Series) -> Html:
    drawn = tag("g", tag("path", d="M0 7h26", class_="line"), one.marker(13, 7), class_=one.class_)
    return tag("svg", drawn, viewBox="0 0 26 14", aria_hidden="true")


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Every path's last parts, as many as tell different paths apart.

    A drafter is named by its run's folder. A relative path is the same as an absolute one that ends with it.
    """
    parts = {path: _parts(path) for path in paths}
    for count in range(1, 1 + max(map(len, parts.values()), default=0)):
        short = {path: part[-count:] for path, part in parts.items()}
        if all(_same(parts[a], parts[b]) for a, b in combinations(parts, 2) if short[a] == short[b]):
            return {path: "/".join(part) for path, part in short.items()}
    return {path: path for path in parts}


def _parts(path: str) -> tuple[str, ...]:
    parts = PurePath(path).parts
    return parts[:-1] if len(parts) > 1 and parts[-1] == "drafter" else parts or (path,)


def _same(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    shared = min(len(one), len(other))
    return one[-shared:] == other[-shared:]
