"""Grouped-query attention with a mask, without copies of keys and values.

With a mask, `sdpa` of transformers copies every key and value once for each query head of its group, in every layer of
every pass. Here the query heads of a group become rows of one head: only the queries are copied.

Legend: B batch, N nodes, L keys, H query heads, G key/value heads, D head dimension.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "vsd_grouped"  # value of `attn_implementation`


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The interface of transformers' attention functions: (output [B, N, H, D], no attention weights).

    Falls back to transformers' `sdpa` without a mask, with a mask per head, with one query head a group, and with
    position biases, soft caps or sinks.

    Args:
        query: [B, H, N, D].
        key, value: [B, G, L, D].
        attention_mask: additive, [B, 1, N, L].
    """
    B, H, N, D = query.shape
    rows = H // key.shape[1]  # query heads per group
    unusual = any(options.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
    if attention_mask is None or attention_mask.shape[1] > 1 or rows == 1 or unusual:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    attended = F.scaled_dot_product_attention(
        query.reshape(B, -1, rows * N, D),
        key,
        value,
        attn_mask=attention_mask[:, :, None].expand(-1, -1, rows, -1, -1).flatten(2, 3),
        dropout_p=options.get("dropout", 0.0),
        scale=options.get("scaling"),
    )
    return attended.reshape(B, H, N, -1).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(NAME, grouped_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
