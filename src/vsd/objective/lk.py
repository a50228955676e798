"""`lk_alpha`, `lk_lambda`: losses on the acceptance rate (LK losses, Samarin et al., arXiv:2602.23881).

With α = Σ_v min(p_v, q_v), the probability that rejection sampling accepts a drafted token:

    lk_alpha:   -log α
    lk_lambda:  λ KL(p ‖ q) + (1 - λ) TV(p, q),   λ = exp(-η α), α detached, η = 3

Ours: α and λ of each token, as in the losses of vLLM's speculators (other code averages α over a batch); the decay
over the steps is EAGLE-3's, as the paper leaves it open.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vsd.objective.algebra import Objective, Part, Term
from vsd.objective.divergence import cross_entropy, through_softmax, total_variation
from vsd.objective.eagle3 import DECAY, Decay
from vsd.objective.kinds import Recorded
from vsd.objective.rows import PathRows

ETA = 3.0


def negative_log_acceptance(rows: PathRows) -> tuple[Tensor, Tensor]:
    """-log α, with gradient -∇α / α."""
    alpha = rows.overlap.clamp(min=torch.finfo(rows.q.dtype).tiny)
    slope = -(rows.q < rows.p).to(rows.q.dtype) / alpha[..., None]
    return -alpha.log(), through_softmax(rows.q, slope)


@dataclass(frozen=True)
class Hybrid:
    """λ KL + (1 - λ) TV: close to KL where p and q overlap little, close to TV where they overlap much."""

    eta: float = ETA

    def __call__(self, rows: PathRows) -> tuple[Tensor, Tensor]:
        """Loss [K, C] and gradient [K, C, Vd]."""
        mix = (-self.eta * rows.overlap).exp()
        entropy = torch.special.entr(rows.p).sum(-1)
        (ce, ce_slope), (tv, tv_slope) = cross_entropy(rows), total_variation(rows)
        return mix * (ce - entropy) + (1 - mix) * tv, torch.lerp(tv_slope, ce_slope, mix[..., None])


def lk_alpha(decay: float = DECAY) -> Objective:
    """-log α on the recorded continuation.

    Args:
        decay: weight of a step relative to the step before.
    """
    return Objective((Part(Recorded(), (Term(Decay(decay), negative_log_acceptance),)),), rule="rejection")


def lk_lambda(eta: float = ETA, decay: float = DECAY) -> Objective:
    """The hybrid of KL and TV on the recorded continuation.

    Args:
        eta: η, how fast λ falls from KL to TV as the acceptance rate α rises.
        decay: weight of a step relative to the step before.
    """
    return Objective((Part(Recorded(), (Term(Decay(decay), Hybrid(eta)),)),), rule="rejection")
