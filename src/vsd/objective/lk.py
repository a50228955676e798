"""`lk_alpha`, `lk_lambda`: losses on the acceptance rate itself (LK losses, arXiv:2602.23881).

With α = Σ_v min(p_v, q_v), the chance that rejection sampling keeps a drafted token:

    lk_alpha:   -log α
    lk_lambda:  λ KL(p ‖ q) + (1 - λ) TV(p, q),   λ = exp(-η α), α detached, η = 3

Ours: α and λ are those of each token, as in the losses of vLLM's speculators; other code averages α over a batch.
Steps decay as in EAGLE-3, which the paper leaves open.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vsd.objective.algebra import Objective, Part, Recorded, Term
from vsd.objective.divergence import cross_entropy, through_softmax, total_variation
from vsd.objective.eagle3 import DECAY, Decay
from vsd.objective.rows import PathRows


def negative_log_acceptance(rows: PathRows) -> tuple[Tensor, Tensor]:
    """-log α; gradient that of -α over α."""
    alpha = rows.overlap.clamp(min=torch.finfo(rows.q.dtype).tiny)
    slope = -(rows.q < rows.p).to(rows.q.dtype) / alpha[..., None]
    return -alpha.log(), through_softmax(rows.q, slope)


@dataclass(frozen=True)
class Hybrid:
    """λ KL + (1 - λ) TV: likelihood while the drafter is far off, acceptance when it is near."""

    eta: float = 3.0

    def __call__(self, rows: PathRows) -> tuple[Tensor, Tensor]:
        """Loss [K, C] and gradient [K, C, Vd]."""
        mix = (-self.eta * rows.overlap).exp()
        entropy = torch.special.entr(rows.p).sum(-1)
        (ce, ce_slope), (tv, tv_slope) = cross_entropy(rows), total_variation(rows)
        return mix * (ce - entropy) + (1 - mix) * tv, torch.lerp(tv_slope, ce_slope, mix[..., None])


def lk_alpha(decay: float = DECAY) -> Objective:
    """-log α on the recorded continuation."""
    return Objective((Part(Recorded(), (Term(Decay(decay), negative_log_acceptance),)),), rule="rejection")


def lk_lambda(eta: float = 3.0, decay: float = DECAY) -> Objective:
    """The hybrid on the recorded continuation."""
    return Objective((Part(Recorded(), (Term(Decay(decay), Hybrid(eta)),)),), rule="rejection")
