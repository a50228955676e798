"""`vispec`: the loss of ViSpec drafters (Kang et al., arXiv:2509.15235).

    L  = Σ_k 10 ‖p_k - q_k‖₁ + 0.1 PL(p_k, q_k)      on the recorded continuation
    PL = -Σ_i log (q_(i) / Σ_{j≥i} q_(j))            over the target's ten best tokens (1), (2), …, best first

PL is the Plackett-Luce model: exp(-PL) is the probability that tokens drawn from q without replacement, if they are
those ten, come in the target's order.

Numbers and both losses are those of the paper's code, which trains two steps (`draft_steps` 2). There a second step
attends to first outputs at all positions; ours, as in decoding, attends to the target's states and to its own path.
‖p - q‖₁ counts tokens outside the draft vocabulary, PL does not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vsd.errors import ConfigurationError
from vsd.objective.algebra import Objective, Part, Term
from vsd.objective.divergence import total_variation
from vsd.objective.eagle3 import Decay
from vsd.objective.kinds import Recorded
from vsd.objective.rows import PathRows


@dataclass(frozen=True)
class PlackettLuce:
    """PL of the target's `best` tokens."""

    best: int = 10

    def __call__(self, rows: PathRows) -> tuple[Tensor, Tensor]:
        """Loss [K, C] and gradient [K, C, Vd]."""
        order = rows.p.topk(min(self.best, rows.p.shape[-1]), dim=-1).indices
        log_q = rows.log_q.gather(-1, order)
        left = log_q.flip(-1).logcumsumexp(-1).flip(-1)  # log Σ_{j≥i} q_(j)
        slope = (log_q + (-left).logcumsumexp(-1)).exp() - 1  # Σ_{i≤j} q_(j) / Σ_{l≥i} q_(l) - 1
        return (left - log_q).sum(-1), torch.zeros_like(rows.log_q).scatter_(-1, order, slope)


def vispec(best: int = 10) -> Objective:
    """L1 distance of p and q, and the order of the target's best tokens, on the recorded continuation.

    Args:
        best: number of the target's best tokens whose order is trained.

    Raises:
        ConfigurationError: fewer than two tokens have no order.
    """
    if best < 2:
        raise ConfigurationError(f"best must be at least 2, not {best}: fewer tokens have no order")
    distance = Term(Decay(1.0), total_variation, 2 * 10.0)  # ‖p - q‖₁ = 2 TV
    return Objective((Part(Recorded(), (distance, Term(Decay(1.0), PlackettLuce(best), 0.1))),))
