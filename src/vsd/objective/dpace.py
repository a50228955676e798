"""`dpace`: dynamic position-aware cross-entropy (D-PACE, arXiv:2605.18810).

    L = Σ_j w_j · (-log q_j(x_j)),   w_j = Σ_{k≥j} Π_{i≤k} ã_i,   ã = α + (1 - α) q(x),  detached

The weight is the expected number of accepted tokens that step j has a part in. The release smooths with α = 0.5, the
paper's text is quoted with 0.1. It was made for block drafters; EAGLE-3's steps take the place of block positions.
"""

from dataclasses import dataclass

from torch import Tensor

from vsd.objective.algebra import Objective, Part, Recorded, Term, Weights
from vsd.objective.divergence import negative_log_likelihood
from vsd.objective.rows import PathRows
from vsd.objective.utility import credit, smoothed, survival


@dataclass(frozen=True)
class Credit(Weights):
    """Σ_{k≥j} Π_{i≤k} ã_i with a fixed α."""

    alpha: float = 0.5
    on = (Recorded,)

    def __call__(self, rows: PathRows) -> Tensor:
        """[K, C]."""
        return credit(survival(smoothed(rows.label_log_q.exp(), self.alpha) * rows.valid))


def dpace(alpha: float = 0.5) -> Objective:
    """The whole objective."""
    return Objective((Part(Recorded(), (Term(Credit(alpha), negative_log_likelihood),)),))
