"""EAGLE-3 drafters as llama.cpp reads them (`--spec-type draft-eagle3`): fields and tensors of a GGUF file.

Tensors have llama.cpp's names. Three conventions differ from ours:

- Feature layers (`eagle3.target_layers`) count layer *inputs*, as ours do, unlike SGLang's.
- `d2t` holds target ids, not offsets, as int64.
- The rotary embedding turns neighbouring channels (2 i, 2 i + 1), ours channels i and i + D / 2: rows of the query and
  key projections are reordered. Scaled frequencies are factors `rope_freqs` [D / 2] that divide the unscaled ones.

Token embeddings are the target's, and the tokenizer is `none`: llama.cpp asks this drafter for no text.

Legend: H heads, D head dimension, r input width.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vsd.drafters.eagle3.model import Eagle3Drafter
from vsd.drafters.family import Checkpoint
from vsd.errors import MismatchError

_NAMES = {
    "fc.weight": "fc.weight",
    "midlayer.input_layernorm.weight": "blk.0.attn_norm.weight",
    "midlayer.hidden_norm.weight": "blk.0.attn_norm_2.weight",
    "midlayer.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "midlayer.self_attn.k_proj.weight": "blk.0.attn_k.weight",
    "midlayer.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "midlayer.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "midlayer.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    "midlayer.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "midlayer.mlp.up_proj.weight": "blk.0.ffn_up.weight",
    "midlayer.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_checkpoint(drafter: Eagle3Drafter, tensors: dict[str, Tensor]) -> Checkpoint:
    """Fields and tensors of the file.

    Args:
        tensors: the drafter's own, by our names; without `d2t` where it drafts the whole vocabulary.

    Raises:
        MismatchError: parts that llama.cpp's EAGLE-3 graph does not have.
    """
    config = drafter.config
    if unknown := sorted(tensors.keys() - _NAMES.keys() - {"d2t", "t2d"}):
        raise MismatchError(f"llama.cpp has no place for {unknown[0]} of an EAGLE-3 drafter: export another format")
    rotary = config.rope_parameters.get("rope_type", "default")
    if config.hidden_act != "silu" or rotary not in ("default", "linear", "llama3"):
        raise MismatchError(
            f"a drafter with {config.hidden_act} and rotary type {rotary} has no GGUF form: it needs silu and one of "
            "default, linear, llama3"
        )
    found = {_NAMES[name]: tensor for name, tensor in tensors.items() if name in _NAMES}
    for name, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        found[f"blk.0.attn_{name}.weight"] = _neighbours(found[f"blk.0.attn_{name}.weight"], heads)
    factors = _frequency_factors(config)
    if not torch.allclose(factors, torch.ones_like(factors), rtol=1e-5):
        found["blk.0.rope_freqs.weight"] = factors
    if "d2t" in tensors:
        found["d2t"] = torch.arange(len(tensors["d2t"]), device=tensors["d2t"].device) + tensors["d2t"]
    return Checkpoint(found, _fields(config))


def _fields(config: Any) -> dict[str, Any]:
    """Key-value fields of the file; the type of a value decides the type of the field."""
    own = {
        "vocab_size": config.vocab_size,
        "block_count": 1,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "target_layers": list(config.aux_layers),
        "target_hidden_size": config.target_hidden_size or config.hidden_size,
        "norm_before_residual": False,
        "norm_before_fc": False,
    }
    fields = {f"eagle3.{name}": value for name, value in own.items()}
    return {"general.architecture": "eagle3", **fields, "tokenizer.ggml.model": "none"}


def _neighbours(weight: Tensor, heads: int) -> Tensor:
    """[H D, r]: rows i and i + D / 2 of every head become rows 2 i and 2 i + 1."""
    halves: Tensor = weight.unflatten(0, (heads, 2, -1))  # [H, 2, D / 2, r]
    return halves.transpose(1, 2).reshape(weight.shape)


def _frequency_factors(config: Any) -> Tensor:
    """Unscaled frequencies over the drafter's, [D / 2] float32; the drafter's own copy may have been rounded."""
    used: Tensor = LlamaRotaryEmbedding(config).inv_freq
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
    unscaled: Tensor = float(config.rope_parameters["rope_theta"]) ** -exponents
    return unscaled / used
