"""τ by length of context, and what lies beyond the texts that a drafter was trained with."""

import math
from collections.abc import Sequence

from vsd.report.charts import Line, Point, plane
from vsd.report.entries import Measured
from vsd.report.html import Html
from vsd.report.layout import figure, numbers_of_lines
from vsd.report.series import Series

Runs = Sequence[tuple[Series, Measured]]

_MEANING = "τ by the number of tokens before a pass."
_USUAL = "Drafters accept less behind the length that they were trained with, which is not known here."


def by_context(runs: Runs) -> list[Html]:
    """The figure, with the trained length if all drafters have the same; none if nothing was measured."""
    runs = [(series, run) for series, run in runs if run.by_context]
    starts = sorted({one.start for _, run in runs for one in run.by_context})
    names = list(dict(sorted((one.start, one.name) for _, run in runs for one in run.by_context)).values())
    if not names:
        return []
    lines = [
        Line(s, [Point(starts.index(c.start), c.tau, f"context of {c.name} tokens") for c in run.by_context])
        for s, run in runs
    ]
    lengths = {run.trained_length for _, run in runs}
    at = place(lengths.pop(), starts) if len(lengths) == 1 else None
    mark = None if at is None else (at, f"trained: ≤ {runs[0][1].trained_length} tokens")
    drawn = plane(lines, "tokens of context", "τ", names=names, mark=mark)
    numbers = numbers_of_lines(lines, "tokens of context", "τ", names)
    return [figure("By length of context", _note(runs), drawn, numbers)]


def place(trained: int | None, starts: Sequence[int]) -> float | None:
    """Where a length lies on the axis of the ranges that begin at `starts`, powers of two, and have the places 0, 1, …

    None if it is not known, or lies beside all ranges.
    """
    if trained is None or not starts[0] < trained < 2 * starts[-1]:
        return None
    inside = max(n for n, start in enumerate(starts) if start <= trained)
    return inside - 0.5 + min(1.0, math.log2(trained / starts[inside]))


def _note(runs: Runs) -> str:
    """The trained lengths, and the ranges beyond them in which τ falls."""
    known = [(series.name, run) for series, run in runs if run.trained_length is not None]
    if not known:
        return f"{_MEANING} {_USUAL}"
    lengths = {run.trained_length for _, run in runs}
    each = "; ".join(f"{name}: {run.trained_length}" for name, run in known)
    longest = f"up to {known[0][1].trained_length} tokens" if len(lengths) == 1 else f"at most so many tokens: {each}"
    falls = [
        f"{name} at {', '.join(one.name for one in run.by_context if one.falls)}"
        for name, run in known
        if any(one.falls for one in run.by_context)
    ]
    said = f" Beyond that, τ is lower than within, by more than chance: {'; '.join(falls)}." if falls else ""
    if not falls and any(one.start >= (run.trained_length or 0) for _, run in known for one in run.by_context):
        said = " Beyond that, τ is not lower by more than chance."
    return f"{_MEANING} Trained with texts of {longest}.{said}"
