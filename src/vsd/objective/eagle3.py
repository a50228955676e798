"""`eagle3`: EAGLE-3's training-time test (Li et al., arXiv:2503.01840, §3.2).

    L = Σ_k 0.8^k CE(p_k, q_k)      on the recorded continuation

The baseline everything else is measured against.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vsd.objective.algebra import Objective, Part, Recorded, Term, Weights
from vsd.objective.divergence import cross_entropy
from vsd.objective.rows import PathRows

DECAY = 0.8


@dataclass(frozen=True)
class Decay(Weights):
    """rate^k: later steps count less, whatever the drafter does."""

    rate: float = DECAY

    def __call__(self, rows: PathRows) -> Tensor:
        """[K, C]."""
        steps = torch.arange(len(rows.valid), device=rows.valid.device, dtype=rows.log_q.dtype)
        return self.rate ** steps[:, None] * rows.valid


def eagle3(decay: float = DECAY, smoothing: float | None = None) -> Objective:
    """The whole objective; `smoothing`, which is ours, cuts paths where drafts are rejected (see `Recorded`)."""
    return Objective((Part(Recorded(smoothing), (Term(Decay(decay), cross_entropy),)),))
