"""The family `vispec`: released checkpoints as the paper's code writes them. No engine serves them.

Their config.json has the sizes of one layer under the *target's* class. The tensors are ours, without a draft
vocabulary and a head, and with the target's token embeddings. Those of Qwen2.5-VL have biases in attention, which our
layer does not have.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from vsd.drafters.checkpoints import check_embeddings, complete_vocabulary, fill, load, our_fields, read_checkpoint
from vsd.drafters.family import Family
from vsd.drafters.vispec.model import ViSpecConfig, ViSpecDrafter
from vsd.errors import ConfigurationError, MismatchError
from vsd.targets import TargetInfo


def import_checkpoint(folder: Path, target: TargetInfo) -> ViSpecDrafter:
    """A released drafter as ours; every tensor is accounted for.

    Raises:
        MismatchError: another architecture or target, tensors missing or left over.
    """
    raw, tensors = read_checkpoint(folder)
    if raw.get("qkv_bias") or "imadpt.q" not in tensors:
        what = "attention with biases" if raw.get("qkv_bias") else "no queries for images (imadpt.q)"
        raise MismatchError(f"'{folder}' has {what}: not the ViSpec drafter that vsd trains")
    if target.images is None:
        raise MismatchError(f"'{folder}' holds a ViSpec drafter, and the target reads no images: give its own target")
    check_embeddings(folder, tensors, target)
    layers = [0, target.config.num_hidden_layers]
    fields = our_fields(folder, raw, tensors, target)
    complete_vocabulary(folder, tensors, fields["draft_vocab_size"], target.vocab_size)
    own: dict[str, Any] = {"image_token_id": target.images.placeholder, "image_queries": len(tensors["imadpt.q"])}
    own |= {"aux_layers": layers, "target_fingerprint": target.fingerprint(layers)}
    drafter: ViSpecDrafter = fill(folder, ViSpecDrafter(ViSpecConfig(**fields, **own)), tensors)
    return drafter


def reads(config: Mapping[str, Any]) -> bool:
    """Whether config.json is that of a ViSpec drafter: ours, or one layer under the class of a multimodal target."""
    if config.get("model_type") == ViSpecConfig.model_type:
        return True
    seeing = any(name.endswith("ForConditionalGeneration") for name in config.get("architectures") or [])
    return seeing and config.get("num_hidden_layers") == 1


def _unserved(*_: object) -> NoReturn:
    raise ConfigurationError(f"no engine serves a {ViSpecDrafter.title}")


FAMILY = Family(
    title=ViSpecDrafter.title,
    new=ViSpecDrafter.for_target,
    reads=reads,
    load=partial(load, ViSpecDrafter, import_checkpoint),
    export=_unserved,
    formats=(),
    serve=_unserved,
    kind=ViSpecDrafter,
)
