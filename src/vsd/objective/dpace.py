"""`dpace`: dynamic position-aware cross-entropy (D-PACE, Wu et al., arXiv:2605.18810).

    L = Σ_j w_j · (-log q_j(x_j)),   w_j = Σ_{k≥j} Π_{i≤k} ã_i,   ã = α + (1 - α) q(x),  detached

The weight is the expected number of accepted tokens that depends on step j. The paper's release smooths with α = 0.5;
its text is quoted with 0.1. The method was made for block drafters; here the steps of the drafter take the place of
block positions.
"""

from dataclasses import dataclass

from torch import Tensor

from vsd.objective.algebra import Objective, Part, Term, Weights
from vsd.objective.divergence import negative_log_likelihood
from vsd.objective.kinds import Recorded
from vsd.objective.rows import PathRows
from vsd.objective.utility import credit, smoothed, survival


@dataclass(frozen=True)
class Credit(Weights):
    """Σ_{k≥j} Π_{i≤k} ã_i with a fixed α."""

    alpha: float = 0.5
    kinds = (Recorded,)

    def __call__(self, rows: PathRows) -> Tensor:
        """Weights [K, C]."""
        return credit(survival(smoothed(rows.label_log_q.exp(), self.alpha) * rows.valid))


def dpace(alpha: float = 0.5) -> Objective:
    """Likelihood of the recorded tokens, weighed by their credit for the accepted length.

    Args:
        alpha: α, smoothing of the acceptance probabilities; 0.5 is the value of the paper's release.
    """
    return Objective((Part(Recorded(), (Term(Credit(alpha), negative_log_likelihood),)),))
