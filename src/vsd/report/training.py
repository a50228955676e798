"""What the trainer logged: curves of loss, accuracy and held-out τ."""

from collections.abc import Callable, Sequence

import numpy as np

from vsd.report.charts import Line, Point, plane
from vsd.report.entries import Estimate
from vsd.report.html import Html
from vsd.report.layout import Section, figure, figures, numbers_of_lines, section, thinned
from vsd.report.read import Training
from vsd.report.series import Series, legend

_POINTS = 240  # of a drawn line
Runs = Sequence[tuple[Series, Training]]
Clock = Callable[[Training, int], float]


def curves(runs: Runs) -> list[Section]:
    """The section of the curves; none if nothing was logged."""
    clock, x_title = (_minutes, "minutes of training") if all(map(_has_minutes, runs)) else (_steps, "steps")
    drawn = [
        _curve(runs, "eval_tau", clock, x_title, "Held-out τ", "τ", "New tokens per target pass, on held-out prompts."),
        _curve(runs, "loss", clock, x_title, "Training loss", "loss", "Losses of different objectives do not compare."),
        _curve(runs, "accuracy_1", clock, x_title, "First drafted token", "share right", "Share of the target's own "
               "tokens that the drafter proposes first, on training text."),
        _by_draft_step(runs),
    ]  # fmt: skip
    found = [one for one in drawn if one is not None]
    intro = "The drafter while it was trained. τ is measured in the real decoder; training loss is no evidence."
    shown = [series for series, training in runs if training.log]
    return [section("curves", "Training", intro, legend(shown), figures(*found))] if found else []


def _curve(runs: Runs, key: str, clock: Clock, x_title: str, title: str, y_title: str, note: str) -> Html | None:
    """One logged quantity, a line a run."""
    lines = [
        Line(series, [Point(clock(training, step), Estimate(value), f"step {step}") for step, value in points])
        for series, training in runs
        if (points := thinned(training.curve(key), _POINTS))
    ]
    if not lines:
        return None
    return figure(title, note, plane(lines, x_title, y_title), numbers_of_lines(lines, x_title, y_title))


def _by_draft_step(runs: Runs) -> Html | None:
    """Accuracy of every draft step at the end of the training."""
    found = [(series, [training.curve(key) for key in _accuracies(training)]) for series, training in runs]
    lines = [
        Line(series, [Point(k, Estimate(curve[-1][1]), f"draft step {k + 1}") for k, curve in enumerate(curves)])
        for series, curves in found
        if len(curves) > 1
    ]
    if not lines:
        return None
    names = [str(k + 1) for k in range(max(len(line.points) for line in lines))]
    drawn = plane(lines, "draft step", "share right", names=names, zero=True)
    note = "The same share for every draft step, at the end of the training."
    return figure("Every drafted token", note, drawn, numbers_of_lines(lines, "draft step", "share right", names))


def _accuracies(training: Training) -> list[str]:
    """accuracy_1, accuracy_2, …, as far as they were logged."""
    keys = {key for entry in training.log for key in entry if key.startswith("accuracy_")}
    return sorted((key for key in keys if training.curve(key)), key=lambda key: int(key.rpartition("_")[2]))


def _has_minutes(run: tuple[Series, Training]) -> bool:
    return bool(run[1].curve("minutes"))


def _minutes(training: Training, step: int) -> float:
    """Minutes are logged with τ; in between they grow evenly with the steps."""
    steps, minutes = zip((0, 0.0), *training.curve("minutes"))
    return float(np.interp(step, steps, minutes))


def _steps(training: Training, step: int) -> float:
    return float(step)
