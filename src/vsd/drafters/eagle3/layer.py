"""Decoder layers of EAGLE-3 and P-EAGLE drafters: Llama's, but for the input of the first one.

Legend: B batch, Q queries, T entries, h hidden, H heads, Hkv key/value heads, D head dimension.
"""

from torch import Tensor, cat, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from vsd.drafters.attention import rotate
from vsd.drafters.feature_drafter import FeatureDrafterConfig


class EagleAttention(nn.Module):
    """Grouped-query attention on inputs `width` wide."""

    def __init__(self, config: FeatureDrafterConfig, width: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def queries(self, a: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """[B, Q, width] -> rotated queries [B, H, Q, D]."""
        return rotate(self.q_proj(a).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2), rotary)

    def keys_values(self, a: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[B, T, width] -> rotated keys and values, each [B, Hkv, T, D]."""
        keys = self.k_proj(a).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        values = self.v_proj(a).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        return rotate(keys, rotary), values

    def merge(self, heads: Tensor) -> Tensor:
        """[B, H, Q, D] -> [B, Q, h]."""
        merged: Tensor = self.o_proj(heads.transpose(1, 2).flatten(-2))
        return merged


class EagleLayer(nn.Module):
    """One decoder layer; the first one reads token embeddings beside hidden states."""

    def __init__(self, config: FeatureDrafterConfig, first: bool) -> None:
        super().__init__()
        self.self_attn = EagleAttention(config, config.hidden_size * (2 if first else 1))
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps) if first else None
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def input(self, embeds: Tensor, hidden: Tensor) -> Tensor:
        """Attention input of token embeddings and hidden states [..., h]: both, [..., 2h], or the latter, [..., h]."""
        if self.hidden_norm is None:
            normed: Tensor = self.input_layernorm(hidden)
            return normed
        return cat([self.input_layernorm(embeds), self.hidden_norm(hidden)], dim=-1)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Both residual connections: hidden states [B, Q, h], attention heads [B, H, Q, D] -> [B, Q, h]."""
        residual = hidden + self.self_attn.merge(attended)
        finished: Tensor = residual + self.mlp(self.post_attention_layernorm(residual))
        return finished
