"""The family `dflash`: its checkpoints as vLLM and speculators read them, and back.

| format | class | read by |
|---|---|---|
| `vllm` | `DFlashDraftModel`, model type `qwen3` | vLLM's native path, method `dflash` |
| `speculators` | `DFlashDraftModel` | vLLM by way of the speculators library |

The tensors are ours. Feature layers differ silently: `dflash_config.target_layer_ids` counts layer *outputs*,
speculators' `aux_hidden_state_layer_ids` layer *inputs*, one more. vLLM reads speculators' `sliding_window_non_causal`
for layers of full attention, too: without it their blocks would be causal.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from vsd.drafters.checkpoints import (
    SIZES,
    check_embeddings,
    complete_vocabulary,
    draft_steps,
    fill,
    is_of,
    load,
    our_fields,
    read_checkpoint,
    rope_fields,
    speculators_config,
    without_map,
)
from vsd.drafters.dflash.model import DFlashDrafter
from vsd.drafters.family import Checkpoint, Family, serve_arguments
from vsd.errors import MismatchError
from vsd.targets import TargetInfo

_CLASS = "DFlashDraftModel"
_STEPS = 7  # tokens of a block whose drafter does not say
_UNSUPPORTED = (
    "attention_bias",
    "attention_value_scale",
    "attention_sink_bias",
    "add_swa_attention_sink_bias",
    "use_swa",
    "final_logit_softcapping",
)
_SCALES = ("logit_scale", "output_multiplier", "input_embedding_scale")


def export(drafter: Any, target: TargetInfo, kind: str) -> Checkpoint:
    """A drafter in one of the formats above.

    Raises:
        MismatchError: a drafter that vLLM would load wrong.
    """
    tensors, layer, common = exported(drafter, _CLASS)
    if kind == "vllm":
        return Checkpoint(tensors, {**layer, **common, "dflash_config": dflash_config(drafter, common["block_size"])})
    return Checkpoint(tensors, {**common, **speculators(drafter, target, "dflash", layer)})


def dflash_config(drafter: Any, block_size: int) -> dict[str, Any]:
    """The field of that name in the native format."""
    config = drafter.config
    layers = [index - 1 for index in config.aux_layers]
    own = {"mask_token_id": config.mask_token_id, "causal": config.causal, "block_size": block_size}
    return {**own, "target_layer_ids": layers}


def exported(
    drafter: Any, name: str, anchored: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors, fields of the layers and fields common to all formats, for class `name`.

    Args:
        anchored: whether vLLM's speculator can predict the first token at the root's place.

    Raises:
        MismatchError: a packed drafter, features that the formats cannot name, or a place that vLLM does not sample.
    """
    config, tensors = drafter.config, dict(drafter.state_dict())
    if config.sample_from_anchor and not anchored:
        raise MismatchError("vLLM's dflash predicts nothing at the root: train with sample_from_anchor: false")
    if "fc.weight" not in tensors:
        raise MismatchError("this drafter's weights are packed for decoding: read it with `read_drafter`")
    if min(config.aux_layers) < 1:
        raise MismatchError("a feature of layer 0's input is no layer's output: the format cannot name it")
    layer = {
        "model_type": "qwen3",
        "num_hidden_layers": config.num_hidden_layers,
        **{size: getattr(config, size) for size in SIZES},
        **rope_fields(config),
        "attention_bias": False,
        "tie_word_embeddings": False,
    }
    steps = draft_steps(config, _STEPS)
    common = {
        "architectures": [name],
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size or config.hidden_size,
        "block_size": steps if config.sample_from_anchor else steps + 1,
        "torch_dtype": str(drafter.dtype).removeprefix("torch."),
    }
    return without_map(tensors, config), layer, common


def speculators(drafter: Any, target: TargetInfo, name: str, layer: dict[str, Any]) -> dict[str, Any]:
    """Fields of speculators' format for its family `name`.

    Raises:
        MismatchError: causal blocks, which the format does not have.
    """
    config = drafter.config
    if config.causal:
        raise MismatchError("speculators' blocks of full attention are never causal: export it as vllm")
    return {
        "speculators_model_type": name,
        "speculators_version": "0.9.0",
        "tie_word_embeddings": False,
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": config.sample_from_anchor,
        "sliding_window_non_causal": True,
        "aux_hidden_state_layer_ids": list(config.aux_layers),
        "transformer_layer_config": layer,
        "speculators_config": speculators_config(name, target, draft_steps(config, _STEPS)),
    }


def import_checkpoint(kind: type[DFlashDrafter], silent: Mapping[str, Any], folder: Path, target: TargetInfo) -> Any:
    """A released drafter, in either format, as ours; every tensor is accounted for.

    Args:
        kind: class of the family's drafters.
        silent: fields of the family's configuration where config.json does not name them.

    Raises:
        MismatchError: no checkpoint, another architecture or target, tensors missing or left over, features unclear.
    """
    raw, tensors = read_checkpoint(folder)
    layer, own = raw.get("transformer_layer_config", raw), {**raw, **(raw.get("dflash_config") or {})}
    wrong = [name for name in _UNSUPPORTED if layer.get(name) or own.get(name)]
    if "sliding_attention" in (layer.get("layer_types") or []):
        wrong.append("layers with a sliding window")
    wrong += [name for name in _SCALES if layer.get(name, 1.0) != 1.0 or own.get(name, 1.0) != 1.0]
    if layer.get("is_neox_style", True) is False:
        wrong.append("another rotation")
    if (folder / "mask_embedding.pt").exists():
        wrong.append("a mask embedding of its own")
    if wrong:
        raise MismatchError(f"'{folder}' has {', '.join(wrong)}: not the {kind.title} that vsd trains")
    inputs = raw.get("aux_hidden_state_layer_ids")
    layers = list(inputs or [index + 1 for index in own.get("target_layer_ids") or []])
    if not layers or own.get("mask_token_id") is None:
        raise MismatchError(f"'{folder / 'config.json'}' names no feature layers, or no mask token")
    check_embeddings(folder, tensors, target)
    fields = our_fields(folder, raw, tensors, target)
    complete_vocabulary(folder, tensors, fields["draft_vocab_size"], target.vocab_size)
    more = {
        "aux_layers": layers,
        "target_fingerprint": target.fingerprint(layers),
        "num_hidden_layers": layer["num_hidden_layers"],
        "mask_token_id": own["mask_token_id"],
        "causal": bool(own.get("causal", layer.get("is_causal") or False)),
    }
    family = ("sample_from_anchor", *kind.config_class.__annotations__)
    more |= {**silent} | {name: own[name] for name in family if name in own and name not in more}
    drafter = kind(kind.config_class(**{**fields, **more}))
    if fields["draft_vocab_size"] == target.vocab_size:
        tensors.pop("lm_head.weight", None)
    return fill(folder, drafter, tensors)


def reads(config: Mapping[str, Any]) -> bool:
    """Whether config.json is that of a DFlash drafter: ours, native, or speculators'."""
    return is_of(config, DFlashDrafter, "dflash", _CLASS in (config.get("architectures") or []))


def _serve(kind: str, out: str, tokens: int) -> str:
    return serve_arguments(kind, "DFLASH", "dflash", out, tokens)


FAMILY = Family(
    title=DFlashDrafter.title,
    new=DFlashDrafter.for_target,
    reads=reads,
    load=partial(load, DFlashDrafter, partial(import_checkpoint, DFlashDrafter, {})),
    export=export,
    formats=("vllm", "speculators"),
    serve=_serve,
    kind=DFlashDrafter,
)
