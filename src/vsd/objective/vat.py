"""`vat`: anchoring at the first rejection (VAT, arXiv:2608.30135).

    w_k = 1 before the first rejection k*,   0.8^(k - k*) from k* on
    L   = Σ_k w_k (CE(p_k, q_k) - log q_k(x_k))

A step counts as accepted where the drafter's most likely token is the recorded one; the first rejected step weighs 1,
too. Left out: the paper's value head.
"""

from dataclasses import dataclass

from torch import Tensor

from vsd.objective.algebra import Objective, Part, Term, Weights
from vsd.objective.divergence import cross_entropy, negative_log_likelihood
from vsd.objective.eagle3 import DECAY
from vsd.objective.kinds import Recorded
from vsd.objective.rows import PathRows


@dataclass(frozen=True)
class Anchored(Weights):
    """1 up to the first rejection, then geometric decay."""

    rate: float = DECAY
    kinds = (Recorded,)

    def __call__(self, rows: PathRows) -> Tensor:
        """Weights [K, C]."""
        rejected = (rows.proposed != rows.labels).cumsum(0).clamp(max=1)  # [K, C], 1 from k* on
        since = (rejected.cumsum(0) - 1).clamp(min=0)  # k - k*
        return self.rate ** since.to(rows.log_q.dtype) * rows.valid


def vat(decay: float = DECAY) -> Objective:
    """Cross-entropy to p and likelihood of the recorded token, both anchored at the first rejection.

    Args:
        decay: weight of a step after the first rejection relative to the step before.
    """
    weights = Anchored(decay)
    return Objective((Part(Recorded(), (Term(weights, cross_entropy), Term(weights, negative_log_likelihood))),))
