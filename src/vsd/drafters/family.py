"""A family of drafters: how a drafter is made, recognised, read, and written as engines serve it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsd.drafters.base import Drafter
from vsd.targets import TargetInfo


class Checkpoint(NamedTuple):
    """Contents of an engine's checkpoint: tensors by name and config.json."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]


class Family(NamedTuple):
    """One family.

    Attributes:
        title: for people, as on a model card.
        new: a new drafter for a target, with fields of its configuration by name.
        reads: whether a checkpoint with this config.json belongs to the family.
        load: read such a folder, in a dtype (None: the checkpoint's) and on the target's device.
        export: the checkpoint in a format of `formats`.
        formats: names of the formats that engines read.
        serve: given a format, the exported folder and a number of drafted tokens, the engine's arguments.
        kind: class of the family's drafters.
        needs_tokenizer: whether engines want the target's tokenizer beside the drafter.
    """

    title: str
    new: Callable[..., Drafter]
    reads: Callable[[Mapping[str, Any]], bool]
    load: Callable[[Path, TargetInfo, torch.dtype | None], Drafter]
    export: Callable[[Any, TargetInfo, str], Checkpoint]
    formats: tuple[str, ...]
    serve: Callable[[str, str, int], str]
    kind: type
    needs_tokenizer: bool = False
