"""Checkpoints of EAGLE-3 and P-EAGLE drafters as SGLang, vLLM and speculators read them, and back.

| format | EAGLE-3 | P-EAGLE | read by |
|---|---|---|---|
| `sglang`, `vllm` | `LlamaForCausalLMEagle3` | the same, with `pard_token`; vLLM alone | SGLang; vLLM's native path |
| `speculators` | `Eagle3DraftModel` | `PEagleDraftModel` | vLLM by way of the speculators library |
| `gguf` | architecture `eagle3` (`vsd.drafters.eagle3.gguf`) | none | llama.cpp |

The tensors are ours. `speculators` says `layers.0.` for `midlayer.` and holds the target's token embeddings, without
which that library drafts from zeros; elsewhere they are left to the target. Feature layers differ silently: SGLang's
`eagle_config.eagle_aux_hidden_state_layer_ids` counts layer *outputs*, vLLM's and speculators' top-level
`eagle_aux_hidden_state_layer_ids` layer *inputs*, one more. Both are written.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

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
from vsd.drafters.eagle3.body import EagleBody
from vsd.drafters.eagle3.gguf import gguf_checkpoint
from vsd.drafters.eagle3.model import Eagle3Drafter
from vsd.drafters.family import Checkpoint, Family, serve_arguments
from vsd.drafters.feature_drafter import default_layers
from vsd.errors import MismatchError
from vsd.targets import TargetInfo

_NATIVE = "LlamaForCausalLMEagle3"  # vLLM renames other classes that it is given as `eagle3`, and then finds none
_LAYER_FIELDS = ("model_type", "num_hidden_layers", *SIZES, "mlp_bias", "rope_parameters")
_UNSUPPORTED = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "attention_bias", "qkv_bias")
_STEPS = 3  # tokens of a draft whose drafter does not say
_MASK_TOKEN = ("pard_token", "mask_token_id", "ptd_token_id")


class Layout(NamedTuple):
    """How checkpoints of one family differ from the other's.

    Attributes:
        kind: class of the drafters.
        speculators, name: class in speculators' format, and speculators' name of the family.
        first: native name of the first layer.
        parallel: whether config.json names the token of places to be drafted, the sign of P-EAGLE.
        read: fields of our configuration that only this family has, from config.json.
        write: fields of config.json that only this family has, from our configuration.
    """

    kind: type[EagleBody]
    speculators: str
    name: str
    first: str
    parallel: bool
    read: Callable[[dict[str, Any], int], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]


def export(layout: Layout, drafter: Any, target: TargetInfo, kind: str) -> Checkpoint:
    """A drafter in one of the formats above.

    Raises:
        MismatchError: a drafter that engines would load wrong.
    """
    config = drafter.config
    if len(config.aux_layers) != 3:
        raise MismatchError(f"engines take features of three layers, this drafter has {len(config.aux_layers)}")
    if min(config.aux_layers) < 1:
        raise MismatchError("a feature of layer 0's input is no layer's output: SGLang cannot name it")
    if kind == "sglang" and config.image_inputs == "placeholder":
        raise MismatchError(
            "SGLang gives a drafter the target's embeddings of images, and this one was trained on their placeholders, "
            "as vLLM serves it: export it for vllm, or train with --set drafter_options.image_inputs=embeddings"
        )
    if kind != "sglang" and config.image_inputs == "embeddings":
        raise MismatchError(
            "only SGLang gives a drafter the target's embeddings of images, on which this one was trained: export it "
            "for sglang, or train without drafter_options.image_inputs"
        )
    tensors = dict(drafter.state_dict())
    if "lm_head.weight" not in tensors:
        raise MismatchError("this drafter's weights are packed for decoding: read it with `read_drafter`")
    tensors = without_map(tensors, config)
    if kind == "gguf":
        return gguf_checkpoint(drafter, tensors)
    if kind != "speculators":
        return Checkpoint(tensors, _native(layout, config, drafter.dtype))
    tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    tensors["embed_tokens.weight"] = target.embedding_weight
    return Checkpoint(tensors, _speculators(layout, drafter, target))


def import_checkpoint(layout: Layout, folder: Path, target: TargetInfo) -> Any:
    """A released drafter, in either format, as ours; every tensor is accounted for.

    Raises:
        MismatchError: no checkpoint, another architecture or target, tensors missing or left over, features unclear.
    """
    raw, tensors = read_checkpoint(folder)
    wrong = [name for name in _UNSUPPORTED if raw.get(name)]
    if wrong:
        raise MismatchError(f"'{folder}' has {', '.join(wrong)}: not the {layout.kind.title} that vsd trains")
    tensors = {
        name.replace("midlayer.", "layers.0.").replace("layers.0.", layout.first): x for name, x in tensors.items()
    }
    check_embeddings(folder, tensors, target)
    count = raw.get("transformer_layer_config", raw).get("num_hidden_layers", 1)
    layers = _aux_layers(folder, raw, target)
    own = {"image_inputs": raw.get("image_inputs")}
    own |= {"aux_layers": layers, "target_fingerprint": target.fingerprint(layers), **layout.read(raw, count)}
    fields = our_fields(folder, raw, tensors, target) | own
    if "lm_head.weight" in tensors:
        complete_vocabulary(folder, tensors, len(tensors["lm_head.weight"]), target.vocab_size)
    if "mask_hidden" in tensors:
        tensors["mask_hidden"] = tensors["mask_hidden"].reshape(1, -1)
    return fill(folder, layout.kind(layout.kind.config_class(**fields)), tensors)


def reads(layout: Layout, config: Mapping[str, Any]) -> bool:
    """Whether config.json is that of a drafter of the family: ours, native, or speculators'."""
    classes = {_NATIVE, "PeagleLlamaForCausalLM"} if layout.parallel else {_NATIVE}
    named, parallel = classes & set(config.get("architectures") or []), named_mask_token(config) is not None
    return is_of(config, layout.kind, layout.name, bool(named) and parallel == layout.parallel)


def named_mask_token(config: Mapping[str, Any]) -> int | None:
    """The token of places to be drafted, by any of its names in config.json."""
    return next((config[name] for name in _MASK_TOKEN if config.get(name) is not None), None)


def _native(layout: Layout, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the native class."""
    return {
        "architectures": [_NATIVE],
        "model_type": "llama",
        "num_hidden_layers": 1,
        **{name: getattr(config, name) for name in (*SIZES, "mlp_bias")},
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size or config.hidden_size,
        **rope_fields(config),
        "attention_bias": False,
        "tie_word_embeddings": False,
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": list(config.aux_layers),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [index - 1 for index in config.aux_layers],
            "use_aux_hidden_state": True,
        },
        "torch_dtype": str(dtype).removeprefix("torch."),
        **({} if config.image_inputs is None else {"image_inputs": config.image_inputs}),
        **layout.write(config),
    }


def _speculators(layout: Layout, drafter: Any, target: TargetInfo) -> dict[str, Any]:
    """config.json of speculators' class."""
    native, own = _native(layout, drafter.config, drafter.dtype), layout.write(drafter.config)
    layer = {name: native[name] for name in _LAYER_FIELDS}
    return {
        "architectures": [layout.speculators],
        "speculators_model_type": layout.name,
        "speculators_version": "0.9.0",
        "draft_vocab_size": native["draft_vocab_size"],
        "target_hidden_size": None if drafter.config.target_hidden_size is None else native["target_hidden_size"],
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": native["eagle_aux_hidden_state_layer_ids"],
        "tie_word_embeddings": False,
        **{name: value for name, value in own.items() if name == "mask_token_id"},
        "transformer_layer_config": {**layer, "attention_bias": False, "tie_word_embeddings": False},
        "speculators_config": speculators_config(layout.name, target, draft_steps(drafter.config, _STEPS)),
        "torch_dtype": native["torch_dtype"],
    }


def _aux_layers(folder: Path, raw: dict[str, Any], target: TargetInfo) -> list[int]:
    """Input indices, from whichever convention the config follows; EAGLE-3's default where it names none."""
    inputs = raw.get("eagle_aux_hidden_state_layer_ids")
    outputs = (raw.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if inputs and outputs and list(inputs) != [index + 1 for index in outputs]:
        raise MismatchError(f"'{folder}' names features {inputs} (inputs) and {outputs} (outputs), which do not agree")
    return list(inputs or [index + 1 for index in outputs or []] or default_layers(target.config.num_hidden_layers))


def family(layout: Layout, formats: tuple[str, ...], serve: Callable[[str, str, int], str], **more: Any) -> Family:
    """The family of drafters whose checkpoints have a layout."""
    return Family(
        title=layout.kind.title,
        new=layout.kind.for_target,  # type: ignore[arg-type]  # a subclass that drafts
        reads=partial(reads, layout),
        load=partial(load, layout.kind, partial(import_checkpoint, layout)),
        export=partial(export, layout),
        formats=formats,
        serve=serve,
        kind=layout.kind,
        **more,
    )


def _one_layer(raw: dict[str, Any], layers: int) -> dict[str, Any]:
    if layers != 1:
        raise MismatchError(f"an EAGLE-3 drafter of {layers} layers: vsd trains drafters of one")
    return {}


def _serve(kind: str, out: str, tokens: int) -> str:
    if kind == "gguf":
        return f"-md {out}/drafter.gguf --spec-type draft-eagle3 --spec-draft-n-max {tokens}"
    return serve_arguments(kind, "EAGLE3", "eagle3", out, tokens)


LAYOUT = Layout(Eagle3Drafter, "Eagle3DraftModel", "eagle3", "midlayer.", False, _one_layer, lambda config: {})
FAMILY = family(LAYOUT, ("sglang", "vllm", "speculators", "gguf"), _serve)
