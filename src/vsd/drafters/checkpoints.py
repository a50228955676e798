"""Common to the families' checkpoint formats: sizes, vocabulary maps, and the check of every tensor.

Engines skip tensors and fields that they do not know in silence; here each is accounted for.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vsd.drafters.feature_drafter import FeatureDrafter
from vsd.drafters.vocabulary import draft_ids, looks_absolute
from vsd.errors import MismatchError
from vsd.targets import TargetInfo
from vsd.targets.load import resolve

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
)


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and all tensors of a folder, names without the prefix `model.`.

    Raises:
        MismatchError: there are no safetensors, or they cannot be read.
    """
    config = json.loads((folder / "config.json").read_text())
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise MismatchError(f"'{folder}' has no .safetensors: weights in pickles are not read, convert them first")
    try:
        tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    except SafetensorError as error:
        raise MismatchError(f"cannot read the weights in '{folder}': {error}; copy them again") from error
    return config, {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def is_of(config: Mapping[str, Any], kind: type[FeatureDrafter], speculators: str, native: bool) -> bool:
    """Whether config.json is that of a drafter of a family: ours, speculators', or native.

    Args:
        kind: class of the family's drafters.
        speculators: speculators' name of the family.
        native: whether a config that is neither ours nor speculators' belongs to the family.
    """
    if config.get("model_type") == kind.config_class.model_type:
        return True
    if "speculators_model_type" in config:
        return bool(config["speculators_model_type"] == speculators)
    return native


def load(
    kind: type[FeatureDrafter],
    import_checkpoint: Callable[[Path, TargetInfo], Any],
    folder: Path,
    target: TargetInfo,
    dtype: torch.dtype | None,
) -> Any:
    """Our own checkpoint, or a released one, in a dtype (None: its own), on the target's device.

    Args:
        kind: class of the family's drafters.
        import_checkpoint: reads a released one.

    Raises:
        MismatchError: see `FeatureDrafter.from_pretrained` and the family's `import_checkpoint`.
    """
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") == kind.config_class.model_type:
        own: Any = "auto" if dtype is None else dtype
        return kind.from_pretrained(folder, dtype=own, device_map=target.device)
    return cast(import_checkpoint(folder, target), target.device, dtype)


def our_fields(folder: Path, raw: dict[str, Any], tensors: dict[str, Tensor], target: TargetInfo) -> dict[str, Any]:
    """Fields of `FeatureDrafterConfig` but the feature layers, from config.json of any format.

    Raises:
        MismatchError: a size is missing.
    """
    layer = raw.get("transformer_layer_config", raw)
    missing = [name for name in ("hidden_size", "intermediate_size", "num_attention_heads") if name not in layer]
    if missing:
        raise MismatchError(f"'{folder / 'config.json'}' lacks {', '.join(missing)}")
    sizes = {name: layer[name] for name in (*SIZES, "mlp_bias") if layer.get(name) is not None}
    heads, head = sizes["num_attention_heads"], tensors.get("lm_head.weight")
    sizes.setdefault("num_key_value_heads", heads)
    sizes.setdefault("head_dim", sizes["hidden_size"] // heads)
    rope = layer.get("rope_parameters") or {
        **(layer.get("rope_scaling") or {"rope_type": "default"}),
        "rope_theta": layer.get("rope_theta", 10000.0),
    }
    width = raw.get("target_hidden_size")
    return {
        **sizes,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": raw.get("draft_vocab_size") or (target.vocab_size if head is None else len(head)),
        "rope_parameters": rope,
        "target_hidden_size": None if width in (None, sizes["hidden_size"]) else width,
    }


def rope_fields(config: Any) -> dict[str, Any]:
    """Rotary parameters under the names of transformers 5 and 4."""
    rope = dict(config.rope_parameters or {})
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {
        "rope_parameters": rope,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
    }


def speculators_config(algorithm: str, target: TargetInfo, tokens: int) -> dict[str, Any]:
    """The field of that name in speculators' config.json; vLLM drafts `tokens` tokens unless told otherwise."""
    return {
        "algorithm": algorithm,
        "default_proposal_method": "greedy",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": tokens, "verifier_accept_k": 1}],
        "verifier": {"name_or_path": resolve(target.name), "architectures": list(target.config.architectures or [])},
    }


def draft_steps(config: Any, default: int) -> int:
    """Number of tokens that a drafter was trained to draft; `default` where its configuration does not say."""
    return int(getattr(config, "draft_steps", None) or default)


def check_embeddings(folder: Path, tensors: dict[str, Tensor], target: TargetInfo) -> None:
    """Remove the token embeddings, which must be the target's.

    Raises:
        MismatchError: they are others.
    """
    own = tensors.pop("embed_tokens.weight", None)
    theirs = target.embedding_weight.detach().cpu()
    if own is not None and not (own.shape == theirs.shape and torch.equal(own.to(theirs.dtype), theirs)):
        raise MismatchError(f"'{folder}' has token embeddings of its own, other than the target's: not supported")


def complete_vocabulary(folder: Path, tensors: dict[str, Tensor], rows: int, vocab_size: int) -> None:
    """d2t and t2d of a checkpoint that drafts `rows` tokens; it may hold both, one, or none for a whole vocabulary.

    Raises:
        MismatchError: they are missing, no ascending map into the vocabulary, or do not agree.
    """
    if "d2t" not in tensors:
        if rows != vocab_size:
            raise MismatchError(
                f"'{folder}' drafts {rows} of {vocab_size} tokens and does not say which: d2t is missing"
            )
        tensors["d2t"] = torch.zeros(rows, dtype=torch.long)
    offsets = tensors["d2t"].long()
    if offsets.shape != (rows,):
        raise MismatchError(f"d2t is {list(offsets.shape)}, the config says {[rows]}")
    if "t2d" not in tensors:
        if looks_absolute(offsets, None):
            raise MismatchError(f"d2t of '{folder}' holds token ids, not offsets: subtract 0, 1, 2, … from its entries")
        ids = torch.arange(rows) + offsets
        inside = ids[(ids >= 0) & (ids < vocab_size)]
        tensors["t2d"] = torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, inside, True)
    draft_ids(folder, offsets, tensors["t2d"].bool())
    tensors["t2d"], tensors["d2t"] = tensors["t2d"].bool(), offsets


def without_map(tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Of a whole vocabulary there is no map: vLLM refuses one that maps nothing."""
    maps = ("d2t", "t2d") if config.draft_vocab_size == config.vocab_size else ()
    return {name: tensor for name, tensor in tensors.items() if name not in maps}


def fill(folder: Path, drafter: Any, tensors: dict[str, Tensor]) -> Any:
    """The drafter with these weights, in their precision.

    Raises:
        MismatchError: tensors are missing, left over, or of another shape.
    """
    wanted = drafter.state_dict()
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        raise MismatchError(f"'{folder}' lacks {missing or 'nothing'} and has unknown tensors {extra or 'none'}")
    shapes = [name for name in wanted if wanted[name].shape != tensors[name].shape]
    if shapes:
        name = shapes[0]
        raise MismatchError(f"{name} is {list(tensors[name].shape)}, the config says {list(wanted[name].shape)}")
    drafter = cast(drafter, drafter.device, tensors["fc.weight"].dtype)
    drafter.load_state_dict(tensors)
    return drafter


def cast(drafter: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """On a device and in a dtype; rotary frequencies stay float32, as rounding them moves far positions."""
    frequencies = drafter.rotary_emb.inv_freq
    moved = drafter.to(device, drafter.dtype if dtype is None else dtype)
    moved.rotary_emb.inv_freq = frequencies.to(device)
    return moved
