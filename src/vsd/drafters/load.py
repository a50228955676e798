"""Make, recognise and load drafters. A checkpoint's own `architectures` and `model_type` decide its family."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vsd.drafters import dflash, dflash2, dspark, eagle3, lm, peagle, vispec
from vsd.drafters.family import Family
from vsd.drafters.vocabulary import DraftVocabulary
from vsd.drafters.where import drafter_folder
from vsd.errors import ConfigurationError, MismatchError, VSDError, in_a_line
from vsd.targets import TargetInfo

FAMILIES: dict[str, Family] = {
    "eagle3": eagle3.FAMILY,
    "peagle": peagle.FAMILY,
    "dflash": dflash.FAMILY,
    "dflash2": dflash2.FAMILY,
    "dspark": dspark.FAMILY,
    "vispec": vispec.FAMILY,
    "lm": lm.FAMILY,
}
DEFAULT = "eagle3"


def new_drafter(target: TargetInfo, vocabulary: DraftVocabulary, family: str | None = None, **options: Any) -> Any:
    """A new drafter with random weights.

    Args:
        vocabulary: the target tokens it shall be able to propose; a family may propose all.
        family: name in `FAMILIES`; None takes the default, EAGLE-3.
        options: fields of its configuration.

    Raises:
        ConfigurationError: no such family, or a configuration it does not take.
    """
    name = DEFAULT if family is None else family
    return _made(name, options, lambda: family_named(name).new(target, vocabulary, **options))


def start_drafter(trained: Any, target: TargetInfo, family: str, **options: Any) -> Any:
    """A new drafter of a family that starts from a trained drafter of another one.

    Args:
        options: fields of the new drafter's configuration.

    Raises:
        ConfigurationError: the family takes no such start, or a configuration it does not take.
    """
    wanted = family_named(family)
    start = wanted.start
    if start is None:
        raise ConfigurationError(f"a drafter of family {family} does not start from another family's: leave out family")
    drafter = _made(family, options, lambda: start(trained, target, **options))
    drafter.untrained = not wanted.starts_trained
    return drafter


def family_named(name: str) -> Family:
    """A family of `FAMILIES`.

    Raises:
        ConfigurationError: there is no such family.
    """
    if name not in FAMILIES:
        raise ConfigurationError(f"unknown drafter family '{name}': choose {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _made(family: str, options: dict[str, Any], make: Callable[[], Any]) -> Any:
    try:
        return make()
    except VSDError:
        raise
    except Exception as error:  # options may be any fields of any values
        raise ConfigurationError(f"drafter options {options} do not fit family {family}: {in_a_line(error)}") from error


def adopted_drafter(path: str | Path, target: TargetInfo) -> tuple[Any, bool]:
    """A drafter to train further for a target, and whether it was trained for another one of the same sizes.

    Raises:
        MismatchError: as `load_drafter`, but for weights of the target that differ.
    """
    drafter = _read(path, target, torch.float32)
    before, drafter.config.target_fingerprint = getattr(drafter.config, "target_fingerprint", None), None
    drafter.attach(target)
    return drafter, before not in (None, drafter.config.target_fingerprint)


def load_drafter(path: str | Path, target: TargetInfo, *, trainable: bool = False) -> Any:
    """A saved or released drafter, attached to its target and on its device.

    Args:
        path: folder with config.json and safetensors, or another name (`vsd.drafters.where`).
        trainable: keep float32 weights for training; else the target's precision, frozen, packed where that is faster.

    Raises:
        MismatchError: there is no drafter at `path`, or it belongs to another target.
    """
    drafter = _loaded(path, target, torch.float32 if trainable else target.dtype)
    if not trainable:
        drafter.freeze()
    return drafter


def read_drafter(path: str | Path, target: TargetInfo) -> Any:
    """A drafter in its checkpoint's precision, attached: to be exported or saved, not to decode.

    Raises:
        MismatchError: as `load_drafter`.
    """
    return _loaded(path, target, None)


def _loaded(path: str | Path, target: TargetInfo, dtype: torch.dtype | None) -> Any:
    """A drafter in a dtype (None: its own), attached."""
    drafter = _read(path, target, dtype)
    drafter.attach(target)
    return drafter


def _read(path: str | Path, target: TargetInfo, dtype: torch.dtype | None) -> Any:
    """A drafter in a dtype (None: its own).

    Raises:
        MismatchError: as `load_drafter`; weights that hold NaN or infinity.
    """
    family = family_of(path)
    try:
        drafter: Any = family.load(drafter_folder(path), target, dtype)
    except VSDError:
        raise
    except Exception as error:  # config.json of other hands may hold anything
        raise MismatchError(f"'{path}' holds no {family.title} that can be read: {in_a_line(error)}") from error
    broken = [name for name, x in drafter.state_dict().items() if x.is_floating_point() and not x.isfinite().all()]
    if broken:
        raise MismatchError(f"{broken[0]} in '{path}' holds NaN or infinity: the training failed, or the file broke")
    return drafter


def family_of(path: str | Path) -> Family:
    """The family of the checkpoint in a folder.

    Raises:
        MismatchError: there is no checkpoint, or no family reads it.
    """
    folder = drafter_folder(path)
    try:
        config = json.loads((folder / "config.json").read_text())
    except OSError:
        raise MismatchError(f"cannot load a drafter from '{folder}': it has no config.json") from None
    except ValueError as error:
        raise MismatchError(f"'{folder / 'config.json'}' is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise MismatchError(f"'{folder / 'config.json'}' must hold a JSON object, not {type(config).__name__}")
    classes = config.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise MismatchError(f"'{folder / 'config.json'}': architectures must be a list of names, not {classes!r}")
    for family in FAMILIES.values():
        if family.reads(config):
            return family
    named = config.get("architectures") or config.get("model_type") or "a checkpoint without a model type"
    raise MismatchError(f"'{folder}' holds {named}: no drafter family reads it ({', '.join(FAMILIES)})")


def family_for(drafter: Any) -> Family:
    """The family of a drafter in memory."""
    return next(family for family in FAMILIES.values() if type(drafter) is family.kind)
