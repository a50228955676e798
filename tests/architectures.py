"""Tiny random targets of the architectures whose attention, positions or heads differ.

Weights are large enough that greedy text wanders instead of settling on one token, so that a wrong mask or position
changes it.
"""

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen3Config,
)

import tiny
from vsd.targets.target import Target

SIZES = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}


def build(config: PreTrainedConfig, seed: int = 0) -> Target:
    """A random float32 target of any configuration."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # biases and norms, which initialise to a constant
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "embed" in name:
                parameter.mul_(3.0)
    return Target(model, tiny.tiny_tokenizer(), name=config.model_type)


def llama() -> Target:
    return build(LlamaConfig(**SIZES, **GROUPED))


def qwen3() -> Target:
    return build(Qwen3Config(**SIZES, **GROUPED))


def gemma3() -> Target:
    """Full attention after every two sliding layers (window 5), two rotary bases, scaled embeddings, capped logits."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    own = {"sliding_window": 5, "layer_types": kinds, "final_logit_softcapping": 10.0, "query_pre_attn_scalar": 8}
    return build(Gemma3TextConfig(**SIZES, **GROUPED, **own, tie_word_embeddings=False))


def mistral() -> Target:
    """Sliding attention (window 6) in every layer."""
    return build(MistralConfig(**SIZES, **GROUPED, sliding_window=6))


def phi() -> Target:
    """Partial rotary embedding, attention beside the MLP, a head with a bias."""
    return build(PhiConfig(**SIZES, partial_rotary_factor=0.5))  # type: ignore[call-arg]


def gpt_neox() -> Target:
    return build(GPTNeoXConfig(**SIZES))


ARCHITECTURES: dict[str, Callable[[], Target]] = {
    builder.__name__: builder for builder in (llama, qwen3, gemma3, mistral, phi, gpt_neox)
}
