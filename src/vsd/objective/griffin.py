"""`griffin`: token-alignable training (GRIFFIN, arXiv:2502.11018).

    L = Σ_k m_k (CE(p_k, q_k) + 5 CE_10(p_k, q_k)),   m_k = 1 if at every earlier step x was among the drafter's 3 best

CE_10 sums over the target's ten best tokens alone. The published training weighs CE 0.1 and CE_10 0.5 beside a
regression on features, which an EAGLE-3 drafter does not have.
"""

from dataclasses import dataclass

from torch import Tensor

from vsd.objective.algebra import Objective, Part, Recorded, Term, Weights
from vsd.objective.divergence import cross_entropy
from vsd.objective.rows import PathRows
from vsd.objective.utility import reached


@dataclass(frozen=True)
class Alignable(Weights):
    """Whether decoding could come here: every earlier token was among the drafter's `best`."""

    best: int = 3
    on = (Recorded,)

    def __call__(self, rows: PathRows) -> Tensor:
        """[K, C]."""
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
    """The whole objective."""
    weights = Alignable(best)
    return Objective((Part(Recorded(), (Term(weights, cross_entropy), Term(weights, TopCrossEntropy(), 5.0))),))
