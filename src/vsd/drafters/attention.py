"""Attention of drafters: rotary embedding, and queries that see entries of a text and a block of their own.

Scores are never held for all queries. The forward pass keeps the output and the log-sum-exp of every query's scores,

    l = log Σ_j exp(q·k_j),   o = Σ_j w_j v_j,   w_j = exp(q·k_j - l),

and the backward pass computes the scores again, chunk by chunk of paths. With g the gradient of o,

    ∂v_j = Σ_q w_j g,   s_j = w_j (g·v_j - g·o),   ∂q = Σ_j s_j k_j,   ∂k_j = Σ_q s_j q.

Legend: B batch, E entries, P paths, J queries of a path, M own keys of a path, H heads, N key/value heads, R = J H / N
queries of a path that share a key, C paths of a chunk, D head dimension.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import rotate_half

from vsd.chunks import chunk_size


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x [B, H, Q, D] with cos, sin [B or 1, Q or 1, D]."""
    cos, sin = rotary
    rotated: Tensor = x * cos[:, None] + rotate_half(x) * sin[:, None]
    return rotated


def attend_block(
    queries: Tensor, shared: tuple[Tensor, Tensor], seen: Tensor, own: tuple[Tensor, Tensor], own_seen: Tensor
) -> Tensor:
    """Attention of the J queries of every path over entries that all of them see and over keys of their path.

    The softmax is computed in float32. The output of a query that sees nothing is zero.

    Args:
        queries: [B, H, P J, D].
        shared: keys and values of the entries, [B, N, E, D].
        seen: which entries a path sees, [B, P, E] bool; or numbers that are added to the scores of its queries, minus
            infinity for an entry that it does not see.
        own: keys and values of the paths, [B, N, P M, D].
        own_seen: which of its path's keys a query sees, [J, M] bool.

    Returns:
        [B, H, P J, D].
    """
    N, (_, P, _), (J, M), device = shared[0].shape[1], seen.shape, own_seen.shape, queries.device.type
    G = queries.shape[1] // N  # query heads per key/value head
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else queries.dtype
    grouped = (queries * queries.shape[-1] ** -0.5).unflatten(1, (N, G)).unflatten(3, (P, J))  # [B, N, G, P, J, D]
    rows = grouped.transpose(2, 3).flatten(3, 4)  # [B, N, P, R, D]
    states = [x.to(dtype) for x in (rows, *shared, *(x.unflatten(2, (P, M)) for x in own))]
    attend: Callable[..., Tensor] = _Attention.apply
    out: Tensor = attend(*states, seen, own_seen.repeat(G, 1)).unflatten(3, (G, J))  # [B, N, P, G, J, D]
    return out.transpose(2, 3).flatten(1, 2).flatten(2, 3)


class _Attention(torch.autograd.Function):
    """Queries [B, N, P, R, D], entries [B, N, E, D], own keys [B, N, P, M, D], masks [B, P, E] and [R, M]."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
        seen: Tensor,
        own_seen: Tensor,
    ) -> Tensor:
        out = torch.empty_like(queries)
        log_sums = torch.empty_like(queries[..., :1], dtype=_wide(queries))
        for part in _chunks(queries, keys, own_keys):
            scores = _scores(queries[part], keys, own_keys[part], seen[:, part[-1]], own_seen)
            top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True).clamp(min=1)  # 0 where nothing is seen, else at least 1
            out[part] = _mixed(weights, values, own_values[part]) / total
            log_sums[part] = top + total.log()
        ctx.save_for_backward(queries, keys, values, own_keys, own_values, seen, own_seen, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, own_keys, own_values, seen, own_seen, out, log_sums = ctx.saved_tensors
        grad_queries, grad_own_keys, grad_own_values = (torch.empty_like(x) for x in (queries, own_keys, own_values))
        grad_keys, grad_values = (torch.zeros_like(x, dtype=_wide(x)) for x in (keys, values))
        for part in _chunks(queries, keys, own_keys):
            q, g = queries[part], grad[part]
            scores = _scores(q, keys, own_keys[part], seen[:, part[-1]], own_seen)
            weights = scores.sub_(log_sums[part]).exp_()
            common = (g * out[part]).sum(-1, keepdim=True, dtype=weights.dtype)
            slopes = _products(g, values, own_values[part]).sub_(common).mul_(weights)
            grad_queries[part] = _mixed(slopes, keys, own_keys[part])
            _add_gathered(weights, g, grad_values, grad_own_values[part])
            _add_gathered(slopes, q, grad_keys, grad_own_keys[part])
        whole = grad_keys.to(keys.dtype), grad_values.to(values.dtype)
        return grad_queries, *whole, grad_own_keys, grad_own_values, None, None


def _wide(x: Tensor) -> torch.dtype:
    """Of scores, weights and sums."""
    return torch.promote_types(x.dtype, torch.float32)


def _chunks(queries: Tensor, keys: Tensor, own_keys: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of the paths, for indexing [B, N, P, ...]; the scores of each are a chunk."""
    (B, N, P, R, _), seen = queries.shape, keys.shape[2] + own_keys.shape[3]
    size = chunk_size(B * N * R * seen * _wide(queries).itemsize, queries.device)
    for start in range(0, P, size):
        yield slice(None), slice(None), slice(start, start + size)


def _scores(queries: Tensor, keys: Tensor, own_keys: Tensor, seen: Tensor, own_seen: Tensor) -> Tensor:
    """[B, N, C, R, E + M]; minus infinity where a query does not see a key."""
    scores, E = _products(queries, keys, own_keys), keys.shape[2]
    if seen.dtype is torch.bool:
        scores[..., :E].masked_fill_(~seen[:, None, :, None], float("-inf"))
    else:
        scores[..., :E].add_(seen[:, None, :, None])
    scores[..., E:].masked_fill_(~own_seen, float("-inf"))
    return scores


def _products(x: Tensor, whole: Tensor, own: Tensor) -> Tensor:
    """x [B, N, C, R, D] times whole [B, N, E, D] and own [B, N, C, M, D]: [B, N, C, R, E + M], float32."""
    E, M = whole.shape[2], own.shape[3]
    products = x.new_empty(*x.shape[:-1], E + M, dtype=_wide(x))
    products[..., :E] = (x.flatten(2, 3) @ whole.mT).view(*x.shape[:-1], E)
    products[..., E:] = x @ own.mT
    return products


def _mixed(weights: Tensor, whole: Tensor, own: Tensor) -> Tensor:
    """Weighted sums [B, N, C, R, D] of whole [B, N, E, D] and own [B, N, C, M, D]; weights [B, N, C, R, E + M]."""
    to_whole, to_own = weights.to(whole.dtype).split([whole.shape[2], own.shape[3]], dim=-1)
    mixed: Tensor = (to_whole.flatten(2, 3) @ whole).view(*weights.shape[:-1], -1) + to_own @ own
    return mixed


def _add_gathered(weights: Tensor, x: Tensor, whole: Tensor, own: Tensor) -> None:
    """Weighted sums of x [B, N, C, R, D] over queries: added to whole [B, N, E, D], written to own [B, N, C, M, D]."""
    to_whole, to_own = weights.to(x.dtype).split([whole.shape[2], own.shape[3]], dim=-1)
    whole += to_whole.flatten(2, 3).mT @ x.flatten(2, 3)
    own.copy_(to_own.mT @ x)
