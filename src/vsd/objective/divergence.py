"""Divergences between the target's p and the drafter's q = softmax(z), with their gradients in z.

p keeps its true mass: it is the target's distribution over its whole vocabulary, cut to the draft vocabulary and not
renormalised, so a position whose mass lies outside counts for less.

Legend: K steps, C positions, Vd draft vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# (draft logits z [K, C, Vd], target p [C, Vd]) -> (loss [K, C], gradient in z [K, C, Vd]). May overwrite z, not .
Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def cross_entropy(z: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """CE(p, q) = -Σ_v p_v log q_v; gradient |p| q - p. EAGLE-3's loss, and forward KL up to p's entropy."""
    mass = p.sum(-1)  # [C]
    log_q = z.log_softmax(-1)
    loss = -torch.einsum("kcv,cv->kc", log_q, p)
    gradient = log_q.exp_().mul_(mass[:, None]).sub_(p)
    return loss, gradient
