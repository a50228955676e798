"""Tree survival, options `cut` and `width` of `vsd` with `arw`: ARW for EAGLE-2's draft trees. [ours]

The tree holds the token of step k if its cumulative log q is among the best N - 1. Its survival and the weights are

    κ_k = σ((Σ_{i≤k} log q(x_i) - cut) / width),   ω_t = α 0.8^t + (1 - α) Σ_{k≥t} 4 κ_k (1 - κ_k)

with `cut` the lowest score that the tree still takes: credit goes to tokens at the edge of the tree, not to those that
are in the tree in any case. 4 κ (1 - κ) ∝ ∂κ/∂log q is 1 at the edge.

Measured: docs/results.md and docs/log.md have no number of it alone.

Legend: K steps, C paths.
"""

from dataclasses import dataclass

from torch import Tensor

from vsd.objective.algebra import Weights
from vsd.objective.eagle3 import Decay
from vsd.objective.rows import PathRows
from vsd.objective.utility import credit

_FLOOR = -50.0  # log q of a token outside the draft vocabulary: no tree holds it


def tree_survival(log_q: Tensor, cut: float, width: float) -> Tensor:
    """κ [K, C], the probability that the tree holds step k, from log q [K, C] of the path's tokens."""
    return ((log_q.cumsum(0) - cut) / width).sigmoid()


@dataclass(frozen=True)
class TreeSurvival(Weights):
    """ω of a draft tree; `alpha` None adapts α as in `vsd.objective.arw`.

    Attributes:
        cut: cumulative log q, in nats, of the least likely node that the tree takes.
        width: scale of the edge in nats: κ is 0.27 at cut - width and 0.73 at cut + width.
    """

    cut: float
    width: float = 1.0
    alpha: float | None = None

    def __call__(self, rows: PathRows) -> Tensor:
        """Weights [K, C]."""
        alpha = 1 - rows.acceptance if self.alpha is None else self.alpha
        kappa = tree_survival(rows.label_log_q.clamp(min=_FLOOR), self.cut, self.width)
        edge = credit(4 * kappa * (1 - kappa) * rows.valid)
        return alpha * Decay()(rows) + (1 - alpha) * edge * rows.valid
