"""Recipes: a training job and its configuration from a YAML file, and the record of both in the output folder.

`recipe.json` in the output folder holds the whole configuration: `vsd train --config recipe.json` repeats the
training, and `--resume` compares the new settings with the file.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainingArguments

from vsd import __version__
from vsd.errors import ConfigurationError, MismatchError
from vsd.files import write_text
from vsd.options import MeasurementOptions, ObjectiveOptions, OptimisationOptions, TrainJob
from vsd.options.values import checked, read_yaml
from vsd.targets.split import SPLIT
from vsd.training.config import VSDConfig

FILE = "recipe.json"
VERSIONS = "versions"
MEASURED = "measured"  # defaults that are measured on the machine
PROCESSES = "processes"
TEXT = "text_digest"  # of the training text
RECORDED = (VERSIONS, MEASURED, PROCESSES, TEXT)  # in recipe.json, but no options
DIVISION = ("per_device_train_batch_size", "gradient_accumulation_steps")
SECRET = {"hub_token"}
MAY_CHANGE = {
    *("output_dir", "features", "device", "use_cpu", "on_bad_line"),  # paths and devices
    *("max_minutes", "max_steps", "num_train_epochs"),  # length of training
    *(f.name for f in dataclasses.fields(MeasurementOptions)),
    *("eval_strategy", "save_strategy", "logging_strategy", "disable_tqdm", "run_name", "push_to_hub"),
    *("dataloader_num_workers", "dataloader_pin_memory"),
}  # on resume: the drafter of a step does not depend on these settings


def recipe(path: Path | None, overrides: Iterable[str], flags: Mapping[str, Any]) -> tuple[TrainJob, VSDConfig]:
    """A job and its configuration; flags have precedence over KEY=VALUE overrides, overrides over the YAML file.

    Args:
        overrides: values are YAML; a dotted key, as in objective_options.anchors=8, sets one entry of a mapping.
        flags: a mapping, such as objective_options, is merged entry by entry.

    Raises:
        ConfigurationError: an unreadable file, an unknown option, or a value of a wrong type or without meaning.
    """
    found = _read(path) if path else {}
    values = {name: value for name, value in found.items() if name not in RECORDED}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigurationError(f"--set takes KEY=VALUE, not '{override}'")
        _put(values, key, read_yaml(value, f"--set {override}:"))
    for key, value in flags.items():
        entries = {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
        for name, v in entries.items():
            _put(values, name, v)
    kinds = {f.name: f.type for f in (*dataclasses.fields(VSDConfig), *dataclasses.fields(TrainJob)) if f.init}
    if unknown := sorted(values.keys() - kinds.keys()):
        raise ConfigurationError(
            f"unknown option {', '.join(unknown)}: see vsd train --help and transformers.TrainingArguments"
        )
    return _built({name: checked(name, kinds[name], value) for name, value in values.items()})


def write_recipe(folder: Path, job: TrainJob, config: VSDConfig, text: str | None = None) -> None:
    """Write the whole configuration, the measured defaults, the versions of the packages and the digest of the text."""
    versions = {"vsd": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    values = {**_settings(job, config), PROCESSES: config.world_size}
    values |= {MEASURED: {"bf16": config.bf16}, VERSIONS: versions, TEXT: text}
    write_text(folder / FILE, json.dumps(values, indent=1, default=str) + "\n")


def check_resumable(folder: Path, job: TrainJob, config: VSDConfig) -> None:
    """Refuse to resume the run in `folder` with other settings; those in `MAY_CHANGE` may differ.

    The conversations of a step may be divided differently into processes and batches: draws, weights and loss depend on
    the whole step alone.

    Raises:
        MismatchError: settings differ; the message holds the name, the old and the new value of each.
    """
    if not (folder / FILE).exists():
        return
    default = {**_defaults(VSDConfig), **_defaults(TrainJob), PROCESSES: config.world_size}
    old = {**default, **_read(folder / FILE)}
    new = {**default, **json.loads(json.dumps(_settings(job, config), default=str))}
    if job.online or config.train_sampling_strategy == "group_by_length":  # other orders have incomplete steps
        _check_step(folder, old, new)
        old |= {name: new[name] for name in (PROCESSES, *DIVISION)}
    changes = [
        f"{name} was {before!r}, now {now!r}"
        for name in sorted((old.keys() | new.keys()) - {*MAY_CHANGE, MEASURED, VERSIONS, TEXT})
        if (before := old.get(name)) != (now := new.get(name))
    ]
    if changes:
        raise MismatchError(
            f"'{folder}' was trained with other settings: {'; '.join(changes)}: "
            "resume with the old ones, or give another --output-dir"
        )


def _check_step(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse another number of conversations in a step."""
    (size, accumulated), (own, steps) = ([values[name] for name in DIVISION] for values in (old, new))
    before, processes = old[PROCESSES], new[PROCESSES]
    whole = before * size * accumulated
    if whole == processes * own * steps:
        return
    each, rest = divmod(whole, processes * steps)
    remedy = f"give --per-device-train-batch-size {each}"
    if rest:
        remedy = f"processes × --gradient-accumulation-steps must divide {whole}"
    raise MismatchError(
        f"'{folder}' was trained with {before} processes × {size} conversations × {accumulated} batches in a step, not "
        f"{processes} × {own} × {steps}: {remedy}"
    )


def check_same_text(folder: Path, text: str | None) -> None:
    """Refuse to resume the run in `folder` with other text: its order and its held-out part would be others.

    Raises:
        MismatchError: the digest of the text in its recipe is another one.
    """
    before = _recorded(folder).get(TEXT)
    if before is not None and before != text:
        raise MismatchError(
            f"'{folder}' was trained on other text, and --data has changed since: resume with the text as it was, or "
            "give another --output-dir"
        )


def _built(values: dict[str, Any]) -> tuple[TrainJob, VSDConfig]:
    """Job and configuration from checked values."""
    mine = {f.name for f in dataclasses.fields(TrainJob)}
    job = TrainJob(**{name: value for name, value in values.items() if name in mine})
    if not job.data:
        raise ConfigurationError("no training text: give --data FILE (make one with vsd data)")
    own: dict[str, Any] = {"eval_strategy": "steps" if job.held_out else "no"}
    own |= {name: value for name, value in values.items() if name not in mine}
    if job.device == "cpu":
        own["use_cpu"] = True
    try:
        measured = _recorded(Path(job.output_dir)).get(MEASURED, {})  # a resumed run must not measure others
        given = {name: own.get(name) for name in measured}
        own |= {name: value for name, value in measured.items() if given[name] is None}
        config = VSDConfig(**{**own, "output_dir": job.output_dir})
        config.given |= given
    except (TypeError, ValueError) as error:
        named = [name for name, value in own.items() if isinstance(value, str) and value and value in str(error)]
        which = f" {' or '.join(named)}" if named else ""
        raise ConfigurationError(f"bad training option{which}: {' '.join(str(error).split())}") from error
    if job.device not in ("auto", SPLIT, str(config.device), config.device.type):
        raise ConfigurationError(
            f"device '{job.device}': this process would train on {config.device}; "
            "CUDA_VISIBLE_DEVICES chooses the GPU, device: cpu takes none"
        )
    return job, config


def _settings(job: TrainJob, config: VSDConfig) -> dict[str, Any]:
    """All options of this project, and the fields of `TrainingArguments` that differ from their defaults."""
    named = {
        f.name for kind in (ObjectiveOptions, OptimisationOptions, MeasurementOptions) for f in dataclasses.fields(kind)
    }
    default = _defaults(VSDConfig)
    training = {
        name: value
        for name, value in config.given.items()
        if name not in SECRET and (name in named or value != default[name])
    }
    return {**training, **dataclasses.asdict(job)}


def _defaults(kind: type[TrainJob] | type[TrainingArguments]) -> dict[str, Any]:
    """Default of every field."""
    return {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(kind)
    }


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set one entry; a dotted key goes into the mappings, which are copied or created."""
    first, dot, rest = key.partition(".")
    if not dot:
        values[key] = value
        return
    inner = values.get(first)
    values[first] = dict(inner) if isinstance(inner, dict) else {}
    _put(values[first], rest, value)


def _read(path: Path) -> dict[str, Any]:
    """What is in a recipe."""
    try:
        values = read_yaml(path.read_text(), f"'{path}'")
    except FileNotFoundError:
        raise ConfigurationError(f"no recipe at '{path}'") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"'{path}' cannot be read as a recipe: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigurationError(f"'{path}' must hold KEY: VALUE lines")
    return values


def _recorded(folder: Path) -> dict[str, Any]:
    """The whole recipe.json of the run in a folder; empty if there is none."""
    try:
        found: dict[str, Any] = json.loads((folder / FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found
