"""A family of drafters: how a drafter is made, recognised, read, and written as engines serve it."""

import json
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


def serve_arguments(kind: str, algorithm: str, method: str, out: str, tokens: int, **more: Any) -> str:
    """Arguments of an engine's server that make it draft `tokens` tokens with the checkpoint at `out`.

    Args:
        algorithm, method: SGLang's and vLLM's names for drafters of the family.
        more: further fields of vLLM's speculative configuration.
    """
    if kind == "sglang":
        return (
            f"--speculative-algorithm {algorithm} --speculative-draft-model-path {out} "
            f"--speculative-num-steps {tokens} --speculative-eagle-topk 1 --speculative-num-draft-tokens {tokens + 1}"
        )
    options = json.dumps({"method": method, "model": out, "num_speculative_tokens": tokens, **more})
    return f"--speculative-config '{options}'"


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
        drafts_all: whether its drafters can propose every token of the target, and have no draft vocabulary to choose.
        needs_tokenizer: whether engines want the target's tokenizer beside the drafter.
        start: a new drafter from a trained one of another family, with fields of its configuration by name; None where
            the family can take none. Raises ConfigurationError for a family that it does not know, and for fields that
            the trained drafter decides.
        starts_trained: whether the blocks of such a drafter are trained.
    """

    title: str
    new: Callable[..., Drafter]
    reads: Callable[[Mapping[str, Any]], bool]
    load: Callable[[Path, TargetInfo, torch.dtype | None], Drafter]
    export: Callable[[Any, TargetInfo, str], Checkpoint]
    formats: tuple[str, ...]
    serve: Callable[[str, str, int], str]
    kind: type
    drafts_all: bool = False
    needs_tokenizer: bool = False
    start: Callable[..., Drafter] | None = None
    starts_trained: bool = False
