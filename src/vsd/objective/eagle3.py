"""`eagle3`: the training-time test of EAGLE-3 (Li et al., arXiv:2503.01840, §3.2).

    L = Σ_k 0.8^k CE(p_k, q_k)      on the recorded continuation

The baseline of all comparisons.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vsd.objective.algebra import Objective, Part, Term, Weights
from vsd.objective.divergence import cross_entropy
from vsd.objective.kinds import Recorded
from vsd.objective.rows import PathRows

DECAY = 0.8


@dataclass(frozen=True)
class Decay(Weights):
    """rate^k: geometric decay over the steps, independent of the drafter."""

    rate: float = DECAY

    def __call__(self, rows: PathRows) -> Tensor:
        """Weights [K, C]."""
        steps = torch.arange(len(rows.valid), device=rows.valid.device, dtype=rows.log_q.dtype)
        return self.rate ** steps[:, None] * rows.valid


def eagle3(decay: float = DECAY, smoothing: float | None = None) -> Objective:
    """Cross-entropy to p on the recorded continuation.

    Args:
        decay: weight of a step relative to the step before.
        smoothing: [ours] α of cut paths, in (0, 1]; null trains whole paths (see vsd.objective.cut_paths).

    Raises:
        ConfigurationError: smoothing is outside (0, 1].
    """
    return Objective((Part(Recorded(smoothing), (Term(Decay(decay), cross_entropy),)),))
