"""Divergences between the target's p and the drafter's q = softmax(z), with their gradients in the logits z.

p keeps its true mass: it is the target's distribution over its whole vocabulary, restricted to the draft vocabulary and
not renormalised, so a position with mass outside the draft vocabulary weighs less. Every function takes `PathRows` and
returns the loss [K, C] and its gradient in the drafter's logits [K, C, Vd].

Legend: K steps, C paths, Vd draft vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vsd.objective.rows import PathRows

Divergence = Callable[[PathRows], tuple[Tensor, Tensor]]


def cross_entropy(rows: PathRows) -> tuple[Tensor, Tensor]:
    """CE(p, q) = -Σ_v p_v log q_v; gradient (Σ_v p_v) q - p. Forward KL up to the entropy of p."""
    loss = -torch.einsum("kcv,kcv->kc", rows.log_q, rows.p)
    return loss, (rows.q * rows.p.sum(-1, keepdim=True)).sub_(rows.p)


def negative_log_likelihood(rows: PathRows) -> tuple[Tensor, Tensor]:
    """-log q of the path's own token; 0 where the draft vocabulary lacks it."""
    known = rows.labels >= 0
    gradient = rows.q * known[..., None]
    gradient.scatter_add_(-1, rows.labels.clamp(min=0)[..., None], -known[..., None].to(gradient.dtype))
    return -rows.label_log_q.masked_fill(~known, 0.0), gradient


def total_variation(rows: PathRows) -> tuple[Tensor, Tensor]:
    """TV(p, q) = 1 - Σ_v min(p_v, q_v): the probability that rejection sampling rejects a token drawn from q."""
    return 1 - rows.overlap, through_softmax(rows.q, -(rows.q < rows.p).to(rows.q.dtype))


def reverse_kl(rows: PathRows) -> tuple[Tensor, Tensor]:
    """KL(q ‖ p) = Σ_v q_v log(q_v / p_v)."""
    ratio = rows.log_q - _log(rows.p)
    return (rows.q * ratio).sum(-1), through_softmax(rows.q, ratio)


def jensen_shannon(rows: PathRows) -> tuple[Tensor, Tensor]:
    """½ KL(p ‖ m) + ½ KL(q ‖ m), m = (p + q) / 2."""
    log_m = _log((rows.p + rows.q) / 2)
    loss = (torch.xlogy(rows.p, rows.p) - rows.p * log_m + rows.q * (rows.log_q - log_m)).sum(-1) / 2
    return loss, through_softmax(rows.q, (rows.log_q - log_m) / 2)


def through_softmax(q: Tensor, slope: Tensor) -> Tensor:
    """Gradient in the logits, q (slope - Σ q slope), from slope = ∂loss/∂q [..., Vd]."""
    return q * (slope - (q * slope).sum(-1, keepdim=True))


def _log(probability: Tensor) -> Tensor:
    """log, bounded below by -60."""
    return probability.clamp(min=math.exp(-60)).log()
