"""Settings of the runs: those that differ, all of them folded, and the commands that make the runs again."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vsd.report.html import folded, table, tag
from vsd.report.layout import Section, section
from vsd.report.read import Bench, Training
from vsd.report.series import Series

_PATHS = {"output_dir"}  # differ in all runs


def settings(trainings: Sequence[tuple[Series, Training]], benches: Sequence[Bench]) -> list[Section]:
    """Settings that differ between trainings, and all settings."""
    named = [(series.name, training.settings) for series, training in trainings if training.recipe]
    names = [name for name, _ in named]
    differing = [(key, *values) for key, values in differences([values for _, values in named])]
    everything = named + [(str(bench.path), bench.settings) for bench in benches if bench.settings]
    if not everything:
        return []
    intro = "Settings of the trainings that differ:" if differing else "All settings."
    if len(named) > 1 and not differing:
        intro = "The trainings have the same settings."
    shown = table(["setting", *names], differing, class_="wide") if differing else ""
    lists = [
        folded(
            f"{name}: {len(values)} settings", table(["setting", "value"], [(k, _shown(v)) for k, v in values.items()])
        )
        for name, values in everything
    ]
    return [section("settings", "Settings", intro, shown, *lists)]


def commands(trainings: Sequence[tuple[Series, Training]], benches: Sequence[Bench], out: Path) -> list[Section]:
    """The commands that train, measure and write the page again."""
    lines = [_training_line(training) for _, training in trainings if training.recipe]
    lines += [bench.command for bench in benches if bench.command]
    sources = [training.path for _, training in trainings] + [bench.path for bench in benches]
    lines.append(shlex.join(["vsd", "report", *map(str, sources), "--out", str(out)]))
    intro = "Recipes hold every setting, seeds included."
    return [section("again", "Make it again", intro, tag("pre", "\n".join(lines), tabindex="0"))]


def differences(runs: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """(setting, its value in every run) where values differ; a setting that a run does not have is –."""
    keys = dict.fromkeys(key for run in runs for key in run if key not in _PATHS)
    values = [(key, [_shown(run[key]) if key in run else "–" for run in runs]) for key in keys]
    return [(key, found) for key, found in values if len(set(found)) > 1]


def _training_line(training: Training) -> str:
    again = training.path.with_name(f"{training.path.resolve().name}-again")
    return shlex.join(["vsd", "train", "--config", str(training.path / "recipe.json"), "--output-dir", str(again)])


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
