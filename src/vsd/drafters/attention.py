"""Attention of drafters: rotary embedding, and queries that see entries of a text and a block of their own.

Legend: B batch, E entries, P paths, J queries of a path, M own keys of a path, H heads, D head dimension.
"""

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x [B, H, Q, D] with cos, sin [B or 1, Q or 1, D]."""
    cos, sin = rotary
    rotated: Tensor = x * cos[:, None] + rotate_half(x) * sin[:, None]
    return rotated


def attend_block(
    queries: Tensor, shared: tuple[Tensor, Tensor], seen: Tensor, own: tuple[Tensor, Tensor], own_seen: Tensor
) -> Tensor:
    """Attention of the J queries of every path over entries that all of them see and over keys of their path.

    Args:
        queries: [B, H, P J, D].
        shared: keys and values of the entries, [B, Hkv, E, D].
        seen: which entries a path sees, [B, P, E] bool.
        own: keys and values of the paths, [B, Hkv, P M, D].
        own_seen: which of its path's keys a query sees, [J, M] bool.

    Returns:
        [B, H, P J, D].
    """
    (H, _, D), P, (J, M) = queries.shape[1:], seen.shape[1], own_seen.shape
    keys, values = shared
    G, E = H // keys.shape[1], keys.shape[2]  # queries per key/value head
    own_keys, own_values = (x.unflatten(2, (P, M)) for x in own)  # [B, Hkv, P, M, D]
    grouped = (queries * D**-0.5).unflatten(1, (-1, G)).unflatten(3, (P, J))  # [B, Hkv, G, P, J, D]
    whole = (grouped.flatten(2, 4) @ keys.transpose(-1, -2)).unflatten(2, (G, P, J))  # [B, Hkv, G, P, J, E]
    whole = whole.masked_fill(~seen[:, None, None, :, None], float("-inf"))
    block = grouped @ own_keys[:, :, None].transpose(-1, -2)  # [B, Hkv, G, P, J, M]
    block = block.masked_fill(~own_seen, float("-inf"))
    scores = torch.cat([whole, block], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
    to_entries, to_own = weights.split([E, M], dim=-1)
    out: Tensor = (to_entries.flatten(2, 4) @ values).unflatten(2, (G, P, J)) + to_own @ own_values[:, :, None]
    return out.flatten(1, 2).flatten(2, 3)
