"""EAGLE-3 checkpoints as SGLang, vLLM and speculators read them.

| format | class | who loads it |
|---|---|---|
| `sglang`, `vllm` | `LlamaForCausalLMEagle3` | SGLang; vLLM's native path; the EAGLE repository |
| `speculators` | `Eagle3DraftModel` | vLLM by way of the speculators library |

The tensors are ours. `speculators` says `layers.0.` for `midlayer.` and holds the target's token embeddings, without
which that library drafts from zeros; elsewhere they are left to the target. What differs silently are the features:
SGLang's `eagle_config.eagle_aux_hidden_state_layer_ids` counts layer *outputs*, vLLM's and speculators' top-level
`eagle_aux_hidden_state_layer_ids` layer *inputs*, one more. Both are written.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vsd.drafters import Eagle3Config, Eagle3Drafter
from vsd.errors import VSDError
from vsd.targets import Target
from vsd.targets.load import resolve

FORMATS = ("sglang", "vllm", "speculators")
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


def export_drafter(drafter: Eagle3Drafter, target: Target, out: str | Path, kind: str) -> Path:
    """Write `drafter` to the folder `out` in one of `FORMATS`; returns the folder.

    Raises:
        VSDError: an unknown format, a folder that is not empty, or a drafter the engines would load wrong.
    """
    out = Path(out)
    if kind not in FORMATS:
        raise VSDError(f"unknown format '{kind}': choose {', '.join(FORMATS)}")
    check_new(out)
    drafter.check_target(target)
    _check(drafter.config)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in drafter.state_dict().items()}
    if "lm_head.weight" not in tensors:
        raise VSDError("this drafter's weights are packed for decoding: read it with Eagle3Drafter.from_pretrained")
    if drafter.config.draft_vocab_size == drafter.config.vocab_size:  # no map: vLLM refuses one that maps nothing
        tensors = {name: tensor for name, tensor in tensors.items() if name not in ("d2t", "t2d")}
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise VSDError(f"{broken[0]} holds NaN or infinity: an engine would serve it without a word")
    config = _speculators(drafter, target) if kind == "speculators" else _native(drafter.config, drafter.dtype)
    if kind == "speculators":
        tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
        tensors["embed_tokens.weight"] = target.embedding_weight.detach().cpu().contiguous()
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return out


def import_drafter(checkpoint: str | Path, target: Target) -> Eagle3Drafter:
    """A released EAGLE-3 drafter of `target`, in either format, as ours; every tensor is accounted for.

    The target is set to yield the features it takes.

    Raises:
        VSDError: no checkpoint, another architecture or target, tensors missing or left over, features unclear.
    """
    folder = Path(checkpoint)
    raw, tensors = _read(folder)
    wrong = [name for name in _UNSUPPORTED if raw.get(name)]
    if wrong:
        raise VSDError(f"'{folder}' has {', '.join(wrong)}: not EAGLE-3 as vsd trains it")
    layer = raw.get("transformer_layer_config", raw)
    if layer.get("num_hidden_layers", 1) != 1:
        raise VSDError(f"'{folder}' has {layer['num_hidden_layers']} layers; vsd trains drafters of one")
    tensors = {_our_name(name): tensor for name, tensor in tensors.items()}
    own = tensors.pop("embed_tokens.weight", None)
    theirs = target.embedding_weight.detach().cpu()
    if own is not None and not (own.shape == theirs.shape and torch.equal(own.to(theirs.dtype), theirs)):
        raise VSDError(f"'{folder}' has token embeddings of its own, other than the target's: not supported")
    drafter = Eagle3Drafter(_our_config(folder, raw, layer, tensors, target))
    wanted = drafter.state_dict()
    if "lm_head.weight" in tensors:
        _complete_vocabulary(folder, tensors, target.vocab_size)
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        raise VSDError(f"'{folder}' lacks {missing or 'nothing'} and has unknown tensors {extra or 'none'}")
    shapes = [name for name in wanted if wanted[name].shape != tensors[name].shape]
    if shapes:
        name = shapes[0]
        raise VSDError(f"{name} is {list(tensors[name].shape)}, the config says {list(wanted[name].shape)}")
    drafter.to(dtype=tensors["fc.weight"].dtype)  # type: ignore[call-arg]
    drafter.load_state_dict(tensors)
    drafter.check_target(target)
    return drafter


def check_new(folder: Path) -> None:
    """Refuse to write over something.

    Raises:
        VSDError: the folder holds files.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise VSDError(f"'{folder}' is not empty: give another folder")


def serve_line(kind: str, target: str, out: str | Path, tokens: int = 3) -> str:
    """The command that serves the target, named as `--target` takes it, with an exported drafter."""
    target = resolve(target)
    if kind == "sglang":
        return (
            f"python -m sglang.launch_server --model-path {target} --speculative-algorithm EAGLE3 "
            f"--speculative-draft-model-path {out} --speculative-num-steps {tokens} "
            f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {tokens + 1}"
        )
    options = json.dumps({"method": "eagle3", "model": str(out), "num_speculative_tokens": tokens})
    return f"vllm serve {target} --speculative-config '{options}'"


def _check(config: Eagle3Config) -> None:
    """What engines take for granted."""
    if len(config.aux_layers) != 3:
        raise VSDError(f"engines take features of three layers, this drafter has {len(config.aux_layers)}")
    if min(config.aux_layers) < 1:
        raise VSDError("a feature of layer 0's input is no layer's output: SGLang cannot name it")


def _native(config: Eagle3Config, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a `LlamaForCausalLMEagle3`."""
    rope = dict(config.rope_parameters or {})
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
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


def _speculators(drafter: Eagle3Drafter, target: Target) -> dict[str, Any]:
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
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise VSDError(f"no checkpoint at '{folder}': a folder with config.json and model.safetensors") from None
    except ValueError as error:
        raise VSDError(f"'{folder / 'config.json'}' is not JSON: {error}") from error
    native = "LlamaForCausalLMEagle3" in config.get("architectures", [])
    if not native and config.get("speculators_model_type") != "eagle3":
        raise VSDError(f"'{folder}' is a {config.get('architectures')}, not an EAGLE-3 drafter")
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise VSDError(f"'{folder}' has no .safetensors: weights in pickles are not read, convert them first")
    try:
        return config, {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    except SafetensorError as error:
        raise VSDError(f"cannot read the weights in '{folder}': {error}") from error


def _our_name(name: str) -> str:
    return name.removeprefix("model.").replace("layers.0.", "midlayer.")


def _our_config(
    folder: Path, raw: dict[str, Any], layer: dict[str, Any], tensors: dict[str, Tensor], target: Target
) -> Eagle3Config:
    head = tensors.get("lm_head.weight")
    rope = layer.get("rope_parameters") or {
        **(layer.get("rope_scaling") or {"rope_type": "default"}),
        "rope_theta": layer.get("rope_theta", 10000.0),
    }
    missing = [name for name in ("hidden_size", "intermediate_size", "num_attention_heads") if name not in layer]
    if missing:
        raise VSDError(f"'{folder / 'config.json'}' lacks {', '.join(missing)}")
    sizes = {name: layer[name] for name in _SIZES if layer.get(name) is not None}
    heads = sizes["num_attention_heads"]
    sizes.setdefault("num_key_value_heads", heads)
    sizes.setdefault("head_dim", sizes["hidden_size"] // heads)
    target.take_features(_aux_layers(folder, raw, target))
    width = raw.get("target_hidden_size")
    return Eagle3Config(
        **{**sizes, "vocab_size": target.vocab_size},
        draft_vocab_size=raw.get("draft_vocab_size") or (target.vocab_size if head is None else len(head)),
        rope_parameters=rope,
        aux_layers=list(target.aux_layers),
        target_hidden_size=None if width in (None, sizes["hidden_size"]) else width,
        target_fingerprint=target.fingerprint(),
    )


def _aux_layers(folder: Path, raw: dict[str, Any], target: Target) -> list[int]:
    """Input indices, from whichever convention the config follows; the target's default where it is silent."""
    inputs = raw.get("eagle_aux_hidden_state_layer_ids")
    outputs = (raw.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if inputs and outputs and list(inputs) != [index + 1 for index in outputs]:
        raise VSDError(f"'{folder}' names features {inputs} (inputs) and {outputs} (outputs), which do not agree")
    return list(inputs or [index + 1 for index in outputs or []] or target.aux_layers)


def _complete_vocabulary(folder: Path, tensors: dict[str, Tensor], vocab_size: int) -> None:
    """d2t and t2d of a checkpoint that drafts the whole vocabulary, or carries only one of them."""
    rows = len(tensors["lm_head.weight"])
    if "d2t" not in tensors:
        if rows != vocab_size:
            raise VSDError(f"'{folder}' drafts {rows} of {vocab_size} tokens and does not say which: d2t is missing")
        tensors["d2t"] = torch.zeros(rows, dtype=torch.long)
    ids = torch.arange(rows) + tensors["d2t"].long()
    if ids.min() < 0 or ids.max() >= vocab_size or (ids.diff() <= 0).any():
        raise VSDError(f"d2t of '{folder}' is no ascending map into {vocab_size} tokens: another target's?")
    t2d = torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    if "t2d" in tensors and not torch.equal(tensors["t2d"].bool(), t2d):
        raise VSDError(f"t2d and d2t of '{folder}' do not agree")
    tensors["t2d"], tensors["d2t"] = t2d, tensors["d2t"].long()
