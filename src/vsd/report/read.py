"""Read what a page shows: folders of `vsd train`, and JSON files of `vsd bench`, `vsd tune` and `vsd demo`."""

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vsd.errors import ConfigurationError, DataError
from vsd.evaluation.tune import Tuned
from vsd.paths import TreeShape
from vsd.report.entries import EngineComparison, Measured, measured, served

_RECIPE, _STATE = "recipe.json", "trainer_state.json"
_SETTINGS = ("settings", "training", "machine", "versions")  # of a measurement


@dataclass(frozen=True)
class Bench:
    """A JSON file of `vsd bench`, `vsd tune` or `vsd demo`."""

    path: Path
    runs: list[Measured]
    served: EngineComparison | None
    trees: list[Tuned]
    settings: dict[str, Any]
    command: str | None


@dataclass(frozen=True)
class Training:
    """A folder of `vsd train`: its recipe and the trainer's log."""

    path: Path
    recipe: dict[str, Any]
    log: list[dict[str, Any]]

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe without mappings: their entries have dotted names."""
        return flat(self.recipe)

    def curve(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of a logged quantity, where it is a finite number."""
        points = [(int(entry["step"]), float(entry[key])) for entry in self.log if key in entry and "step" in entry]
        return [(step, value) for step, value in points if math.isfinite(value)]


def read(sources: Iterable[str | Path]) -> tuple[list[Training], list[Bench]]:
    """Folders as trainings, files as measurements.

    Raises:
        DataError: nothing is there, or it holds neither.
    """
    trainings, benches = [], []
    for path in map(Path, sources):
        if path.is_dir():
            trainings.append(_training(path))
        elif path.exists():
            benches.append(_bench(path))
        else:
            raise DataError(f"neither a folder nor a file at '{path}': give run folders and JSON files of vsd bench")
    return trainings, benches


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A mapping of mappings as one mapping with dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def runs_of(drafters: Iterable[str | Path]) -> list[Path]:
    """Folders of the runs that trained these drafters, as far as they are there."""
    folders = dict.fromkeys(Path(drafter).parent for drafter in drafters)
    return [folder for folder in folders if (folder / _RECIPE).exists()]


def _training(folder: Path) -> Training:
    recipe, states = folder / _RECIPE, _states(folder)
    if not states and not recipe.exists():
        raise DataError(f"'{folder}' is no run of vsd train: it has neither {_RECIPE} nor {_STATE}")
    values = _json(recipe) if recipe.exists() else {}
    for state in states:
        with suppress(DataError):  # a killed run may leave half a file
            return Training(folder, values, [dict(entry) for entry in _json(state).get("log_history", [])])
    return Training(folder, values, [])


def _states(folder: Path) -> list[Path]:
    """Files of the trainer's state, the last one first: a finished run's lies in the folder itself."""
    step = {path: path.parent.name.rpartition("-")[2] for path in folder.glob(f"checkpoint-*/{_STATE}")}
    newest = sorted((path for path in step if step[path].isdigit()), key=lambda path: -int(step[path]))
    return [path for path in (folder / _STATE, *newest) if path.exists()]


def _bench(path: Path) -> Bench:
    values = _json(path)
    if "runs" not in values and "trees" not in values:
        raise DataError(f"'{path}' is no JSON file of vsd bench or vsd tune: it has neither 'runs' nor 'trees'")
    try:
        server = served(values["server"]) if "server" in values else None
        runs = [measured(run) for run in values.get("runs", [])]
        trees = [_tree(tree) for tree in values.get("trees", [])]
        named: dict[str, Any] = {name: dict(values[name]) for name in _SETTINGS if name in values}
    except (AttributeError, ConfigurationError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"'{path}' is no JSON file of vsd bench or vsd tune: {error!r}") from error
    if isinstance(prompts := named.get("settings", {}).get("prompts"), list):
        named["settings"]["prompts"] = len(prompts)
    return Bench(path, runs, server, trees, flat(named), values.get("command"))


def _tree(tree: dict[str, Any]) -> Tuned:
    return Tuned(TreeShape(**tree["shape"]), *(float(tree[name]) for name in ("tau", "seconds", "speedup")))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"'{path}' must hold a JSON object")
    return found
