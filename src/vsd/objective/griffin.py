"""`griffin`: token-alignable training (GRIFFIN, Hu et al., arXiv:2502.11018).

    L = Σ_k m_k (CE(p_k, q_k) + 5 CE_10(p_k, q_k)),   m_k = Π_{i<k} 1[x_i among the drafter's 3 best tokens]

CE_10 is the sum over the target's ten best tokens only. Ours: the published training weighs CE with 0.1 and CE_10 with
0.5, together with a regression on features that an EAGLE-3 drafter does not have.
"""

from dataclasses import dataclass

from torch import Tensor

from vsd.objective.algebra import Objective, Part, Term, Weights
from vsd.objective.divergence import cross_entropy
from vsd.objective.kinds import Recorded
from vsd.objective.rows import PathRows
from vsd.objective.utility import reached


@dataclass(frozen=True)
class Alignable(Weights):
    """1 while all earlier tokens are among the `best` of the drafter, so that a tree could reach the step; else 0."""

    best: int = 3
    kinds = (Recorded,)

    def __call__(self, rows: PathRows) -> Tensor:
        """Weights [K, C]."""
        hit = (rows.rank < self.best).to(rows.log_q.dtype)
        return reached(hit) * rows.valid


@dataclass(frozen=True)
class TopCrossEntropy:
    """-Σ p_v log q_v over the target's `best` tokens."""

    best: int = 10

    def __call__(self, rows: PathRows) -> tuple[Tensor, Tensor]:
        """Loss [K, C] and gradient [K, C, Vd]."""
        p, index = rows.p.topk(min(self.best, rows.p.shape[-1]), dim=-1)
        gradient = (rows.q * p.sum(-1, keepdim=True)).scatter_add_(-1, index, -p)
        return -(p * rows.log_q.gather(-1, index)).sum(-1), gradient


def griffin(best: int = 3) -> Objective:
    """Cross-entropy to p, over all tokens and over the ten best, on the steps that a tree could reach.

    Args:
        best: a step is trained while every earlier token is among this number of the drafter's best tokens.
    """
    weights = Alignable(best)
    return Objective((Part(Recorded(), (Term(weights, cross_entropy), Term(weights, TopCrossEntropy(), 5.0))),))
