"""The loss of a drafter's confidence c_t: the probability that its token t is accepted if all tokens before it are.

    L = Σ_t κ_{t-1} BCE(c_t, α_t)

α_t is the exact acceptance of what the drafter proposes at the state: of its likeliest token by `greedy` (whether the
argmax of q and p agree) and by `target` (its p), of a token drawn from q by `rejection` (Σ_v min(p_v, q_v)). κ_{t-1} is
the probability that verification reaches the state. So Π_{s≤t} c_s estimates the acceptance of t tokens without bias,
whatever part of the state c depends on. BCE to α is DSpark's; the weight κ is ours.

A pruned draft vocabulary may hide the target's argmax: `greedy` agrees where p of the best drafted token is at least
the mass outside.

Legend: K steps, C paths.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from vsd.objective.acceptance import path_acceptance
from vsd.objective.algebra import Rule
from vsd.objective.rows import PathRows
from vsd.objective.utility import reached


class Confidence(NamedTuple):
    """Logits of c at every step of some paths, [K, C], and the rule that the drafter is served with."""

    logits: Tensor
    rule: Rule


def confidence_loss(confidence: Confidence, rows: PathRows) -> tuple[Tensor, Tensor]:
    """Loss [] and gradient [K, C] in the logits; paths of negative share have none."""
    logits, alpha = confidence.logits.to(rows.log_q.dtype), acceptance_of_proposals(rows, confidence.rule)
    weights = reach(rows, confidence.rule) * rows.share.clamp(min=0) * rows.valid
    loss = F.binary_cross_entropy_with_logits(logits, alpha, weights, reduction="sum")
    return loss, weights * (logits.sigmoid() - alpha)


def acceptance_of_proposals(rows: PathRows, rule: Rule) -> Tensor:
    """α [K, C]."""
    if rule == "rejection":
        return rows.overlap
    p = rows.p.gather(-1, rows.proposed[..., None])[..., 0]
    if rule == "target":
        return p
    outside = 1 - rows.p.sum(-1)
    return ((p == rows.p.amax(-1)) & (p >= outside)).to(p.dtype)


def reach(rows: PathRows, rule: Rule) -> Tensor:
    """κ_{t-1} [K, C]: by `greedy` and `target` the target's tokens are accepted where the drafter proposes them."""
    if rule == "rejection" or not rows.written:
        return reached(path_acceptance(rows, rule) * rows.valid)
    return reached(((rows.proposed == rows.labels) & rows.valid).to(rows.log_q.dtype))
