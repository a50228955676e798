"""Speed by the number of prompts that are decoded together."""

from collections.abc import Sequence

from vsd.report.charts import Line, Point, plane
from vsd.report.entries import Measured, Together
from vsd.report.html import Html, table
from vsd.report.layout import figure
from vsd.report.scale import brief
from vsd.report.series import Series

_NOTE = (
    "Tokens a second, as a multiple of plain decoding of as many prompts at a time. Intervals are over groups of "
    "prompts that are decoded together. The other speeds are those of the first concurrency that was measured."
)


def by_concurrency(runs: Sequence[tuple[Series, Measured]], plain: Sequence[Measured]) -> list[Html]:
    """The figure; none if only one concurrency was measured."""
    several = [(series, run) for series, run in runs if len(run.by_concurrency) > 1]
    if not several:
        return []
    sizes = sorted({at.concurrency for _, run in several for at in run.by_concurrency})
    lines = [
        Line(s, [Point(sizes.index(at.concurrency), at.speedup, f"{at.concurrency} at a time") for at in _sorted(run)])
        for s, run in several
    ]
    drawn = plane(lines, "prompts at a time", "× plain decoding", names=[str(size) for size in sizes], level=1.0)
    named = [("plain decoding", run) for run in plain] + [(series.name, run) for series, run in several]
    head = ["run", "prompts at a time", "× plain decoding", "tokens/s", "τ", "ms a pass"]
    cells = [(name, *_numbers(at, run)) for name, run in named for at in _sorted(run) if len(run.by_concurrency) > 1]
    return [figure("By concurrency", _NOTE, drawn, table(head, cells, class_="wide"))]


def _sorted(run: Measured) -> list[Together]:
    return sorted(run.by_concurrency)


def _numbers(at: Together, run: Measured) -> tuple[object, ...]:
    drafted = run.drafter is not None
    speedup, tau = (at.speedup, f"{at.tau:.2f}") if drafted else ("1", "1")
    return at.concurrency, speedup, f"{at.tokens_per_second:.1f}", tau, brief(at.milliseconds)
