"""Confidence-aware regularisation (CAR), option `car` of `vsd` (Zou et al., arXiv:2602.05774).

[paper] The M-step is regularised, and the regularisation depends on the target's confidence.
[ours] The formula:

    λ Σ_t c_t KL(p_t ‖ q_t),   c_t = κ_{t-1} max_v p_t(v)      λ = car

with κ_{t-1} on the smoothed acceptances of ARW, the probability that verification reaches the step. It keeps q
calibrated, which EAGLE-2's ranking of tree nodes by cumulative probability needs.

Measured (docs/results.md), from a drafter that has memorised its text, three minutes, one seed, T = 0: 1.035 × `eagle3`
with `car` 0.5, 1.036 without. So CAR is off by default.

Legend: K steps, C paths.
"""

from dataclasses import dataclass

from torch import Tensor

from vsd.objective.acceptance import Reached
from vsd.objective.algebra import Rule, Term, Weights
from vsd.objective.divergence import cross_entropy
from vsd.objective.rows import PathRows


@dataclass(frozen=True)
class Confidence(Weights):
    """c: the target's confidence, where verification is likely to arrive."""

    rule: Rule = "greedy"

    def __call__(self, rows: PathRows) -> Tensor:
        """Weights [K, C]."""
        return rows.p.amax(-1) * Reached(self.rule)(rows)


def car(rule: Rule, scale: float) -> tuple[Term, ...]:
    """The regulariser; no term if `scale` is 0. Cross-entropy has the gradient of KL."""
    return (Term(Confidence(rule), cross_entropy, scale),) if scale else ()
