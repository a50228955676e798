"""Checkpoints of EAGLE-3 drafters as SGLang, vLLM and speculators read them, and back.

| format | class | read by |
|---|---|---|
| `sglang`, `vllm` | `LlamaForCausalLMEagle3` | SGLang; vLLM's native path; the EAGLE repository |
| `speculators` | `Eagle3DraftModel` | vLLM by way of the speculators library |

The tensors are ours. `speculators` says `layers.0.` for `midlayer.` and holds the target's token embeddings, without
which that library drafts from zeros; elsewhere they are left to the target. Feature layers differ silently: SGLang's
`eagle_config.eagle_aux_hidden_state_layer_ids` counts layer *outputs*, vLLM's and speculators' top-level
`eagle_aux_hidden_state_layer_ids` layer *inputs*, one more. Both are written.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vsd.drafters.eagle3.model import Eagle3Config, Eagle3Drafter, default_layers
from vsd.drafters.family import Checkpoint, Family, serve_arguments
from vsd.errors import MismatchError
from vsd.targets import TargetInfo
from vsd.targets.load import resolve

_NATIVE = "LlamaForCausalLMEagle3"
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "mlp_bias",
    "rms_norm_eps",
    "max_position_embeddings",
)
_UNSUPPORTED = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "attention_bias", "qkv_bias")


def export(drafter: Eagle3Drafter, target: TargetInfo, kind: str) -> Checkpoint:
    """A drafter in one of the formats above.

    Raises:
        MismatchError: a drafter that engines would load wrong.
    """
    config = drafter.config
    if len(config.aux_layers) != 3:
        raise MismatchError(f"engines take features of three layers, this drafter has {len(config.aux_layers)}")
    if min(config.aux_layers) < 1:
        raise MismatchError("a feature of layer 0's input is no layer's output: SGLang cannot name it")
    tensors = dict(drafter.state_dict())
    if "lm_head.weight" not in tensors:
        raise MismatchError("this drafter's weights are packed for decoding: read it with `read_drafter`")
    if config.draft_vocab_size == config.vocab_size:  # no map: vLLM refuses one that maps nothing
        tensors = {name: tensor for name, tensor in tensors.items() if name not in ("d2t", "t2d")}
    if kind != "speculators":
        return Checkpoint(tensors, _native(config, drafter.dtype))
    tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    return Checkpoint(tensors | {"embed_tokens.weight": target.embedding_weight}, _speculators(drafter, target))


def load(folder: Path, target: TargetInfo, dtype: torch.dtype | None) -> Eagle3Drafter:
    """Our own checkpoint, or a released one, in a dtype (None: its own), on the target's device.

    Raises:
        MismatchError: see `import_checkpoint` and `Eagle3Drafter.from_pretrained`.
    """
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") == Eagle3Config.model_type:
        own: Any = "auto" if dtype is None else dtype
        return Eagle3Drafter.from_pretrained(folder, dtype=own, device_map=target.device)
    return _cast(import_checkpoint(folder, target), target.device, dtype)


def _cast(drafter: Any, device: torch.device, dtype: torch.dtype | None) -> Eagle3Drafter:
    """On a device and in a dtype; rotary frequencies stay float32, as rounding them moves far positions."""
    frequencies = drafter.rotary_emb.inv_freq
    cast: Eagle3Drafter = drafter.to(device, drafter.dtype if dtype is None else dtype)
    cast.rotary_emb.inv_freq = frequencies.to(device)
    return cast


def import_checkpoint(folder: Path, target: TargetInfo) -> Eagle3Drafter:
    """A released drafter, in either format, as ours; every tensor is accounted for.

    Raises:
        MismatchError: no checkpoint, another architecture or target, tensors missing or left over, features unclear.
    """
    raw, tensors = _read(folder)
    wrong = [name for name in _UNSUPPORTED if raw.get(name)]
    if wrong:
        raise MismatchError(f"'{folder}' has {', '.join(wrong)}: not EAGLE-3 as vsd trains it")
    layer = raw.get("transformer_layer_config", raw)
    if layer.get("num_hidden_layers", 1) != 1:
        raise MismatchError(f"'{folder}' has {layer['num_hidden_layers']} layers; vsd trains drafters of one")
    tensors = {_our_name(name): tensor for name, tensor in tensors.items()}
    own = tensors.pop("embed_tokens.weight", None)
    theirs = target.embedding_weight.detach().cpu()
    if own is not None and not (own.shape == theirs.shape and torch.equal(own.to(theirs.dtype), theirs)):
        raise MismatchError(f"'{folder}' has token embeddings of its own, other than the target's: not supported")
    drafter = Eagle3Drafter(_our_config(folder, raw, layer, tensors, target))
    wanted = drafter.state_dict()
    if "lm_head.weight" in tensors:
        _complete_vocabulary(folder, tensors, target.vocab_size)
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        raise MismatchError(f"'{folder}' lacks {missing or 'nothing'} and has unknown tensors {extra or 'none'}")
    shapes = [name for name in wanted if wanted[name].shape != tensors[name].shape]
    if shapes:
        name = shapes[0]
        raise MismatchError(f"{name} is {list(tensors[name].shape)}, the config says {list(wanted[name].shape)}")
    drafter = _cast(drafter, drafter.device, tensors["fc.weight"].dtype)
    drafter.load_state_dict(tensors)
    return drafter


def reads(config: Mapping[str, Any]) -> bool:
    """Whether config.json is that of an EAGLE-3 drafter: ours, native, or speculators'."""
    return (
        config.get("model_type") == Eagle3Config.model_type
        or _NATIVE in (config.get("architectures") or [])
        or config.get("speculators_model_type") == "eagle3"
    )


def serve(kind: str, out: str, tokens: int) -> str:
    """See `serve_arguments`."""
    return serve_arguments(kind, "EAGLE3", "eagle3", out, tokens)


def _native(config: Eagle3Config, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a `LlamaForCausalLMEagle3`."""
    rope = dict(config.rope_parameters or {})
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {
        "architectures": [_NATIVE],
        "model_type": "llama",
        "num_hidden_layers": 1,
        **{name: getattr(config, name) for name in _SIZES},
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size or config.hidden_size,
        "rope_parameters": rope,
        "rope_theta": rope.get("rope_theta", 10000.0),  # for engines on transformers 4
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": list(config.aux_layers),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [index - 1 for index in config.aux_layers],
            "use_aux_hidden_state": True,
        },
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _speculators(drafter: Eagle3Drafter, target: TargetInfo) -> dict[str, Any]:
    """config.json of speculators' `Eagle3DraftModel`."""
    native = _native(drafter.config, drafter.dtype)
    layer = {name: native[name] for name in ("model_type", "num_hidden_layers", *_SIZES, "rope_parameters")}
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "draft_vocab_size": native["draft_vocab_size"],
        "target_hidden_size": None if drafter.config.target_hidden_size is None else native["target_hidden_size"],
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": native["eagle_aux_hidden_state_layer_ids"],
        "tie_word_embeddings": False,
        "transformer_layer_config": {**layer, "attention_bias": False, "tie_word_embeddings": False},
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1}],
            "verifier": {
                "name_or_path": resolve(target.name),
                "architectures": list(target.config.architectures or []),
            },
        },
        "torch_dtype": native["torch_dtype"],
    }


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((folder / "config.json").read_text())
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise MismatchError(f"'{folder}' has no .safetensors: weights in pickles are not read, convert them first")
    try:
        return config, {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    except SafetensorError as error:
        raise MismatchError(f"cannot read the weights in '{folder}': {error}") from error


def _our_name(name: str) -> str:
    return name.removeprefix("model.").replace("layers.0.", "midlayer.")


def _our_config(
    folder: Path, raw: dict[str, Any], layer: dict[str, Any], tensors: dict[str, Tensor], target: TargetInfo
) -> Eagle3Config:
    head = tensors.get("lm_head.weight")
    rope = layer.get("rope_parameters") or {
        **(layer.get("rope_scaling") or {"rope_type": "default"}),
        "rope_theta": layer.get("rope_theta", 10000.0),
    }
    missing = [name for name in ("hidden_size", "intermediate_size", "num_attention_heads") if name not in layer]
    if missing:
        raise MismatchError(f"'{folder / 'config.json'}' lacks {', '.join(missing)}")
    sizes = {name: layer[name] for name in _SIZES if layer.get(name) is not None}
    heads = sizes["num_attention_heads"]
    sizes.setdefault("num_key_value_heads", heads)
    sizes.setdefault("head_dim", sizes["hidden_size"] // heads)
    layers = _aux_layers(folder, raw, target)
    width = raw.get("target_hidden_size")
    return Eagle3Config(
        **{**sizes, "vocab_size": target.vocab_size},
        draft_vocab_size=raw.get("draft_vocab_size") or (target.vocab_size if head is None else len(head)),
        rope_parameters=rope,
        aux_layers=layers,
        target_hidden_size=None if width in (None, sizes["hidden_size"]) else width,
        target_fingerprint=target.fingerprint(layers),
    )


def _aux_layers(folder: Path, raw: dict[str, Any], target: TargetInfo) -> list[int]:
    """Input indices, from whichever convention the config follows; EAGLE-3's default where it names none."""
    inputs = raw.get("eagle_aux_hidden_state_layer_ids")
    outputs = (raw.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if inputs and outputs and list(inputs) != [index + 1 for index in outputs]:
        raise MismatchError(f"'{folder}' names features {inputs} (inputs) and {outputs} (outputs), which do not agree")
    return list(inputs or [index + 1 for index in outputs or []] or default_layers(target.config.num_hidden_layers))


def _complete_vocabulary(folder: Path, tensors: dict[str, Tensor], vocab_size: int) -> None:
    """d2t and t2d of a checkpoint that drafts the whole vocabulary, or carries only one of them."""
    rows = len(tensors["lm_head.weight"])
    if "d2t" not in tensors:
        if rows != vocab_size:
            raise MismatchError(
                f"'{folder}' drafts {rows} of {vocab_size} tokens and does not say which: d2t is missing"
            )
        tensors["d2t"] = torch.zeros(rows, dtype=torch.long)
    ids = torch.arange(rows) + tensors["d2t"].long()
    if ids.min() < 0 or ids.max() >= vocab_size or (ids.diff() <= 0).any():
        raise MismatchError(f"d2t of '{folder}' is no ascending map into {vocab_size} tokens: another target's?")
    t2d = torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    if "t2d" in tensors and not torch.equal(tensors["t2d"].bool(), t2d):
        raise MismatchError(f"t2d and d2t of '{folder}' do not agree")
    tensors["t2d"], tensors["d2t"] = t2d, tensors["d2t"].long()


FAMILY = Family(
    title="EAGLE-3 drafter",
    new=Eagle3Drafter.for_target,
    reads=reads,
    load=load,
    export=export,
    formats=("sglang", "vllm", "speculators"),
    serve=serve,
    kind=Eagle3Drafter,
)
