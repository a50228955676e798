"""Adaptive rejection weighting (ARW), option `arw` of `vsd` (Zou et al., arXiv:2602.05774).

[paper] The M-step weighs the tokens of a path, and the weights adapt to rejection.
[ours] The formula: credit for the path utility U = Σ_k κ_k on smoothed acceptances,

    ω_t = (Σ_{k≥t} κ_k) / ã_t,   Σ_{k≥t} κ_k = ∂U/∂log a_t,   κ_k = Π_{i≤k} ã_i,   ã = α + (1 - α) a

- α is the running share of rejected first draft tokens. For a weak drafter (α → 1) ω_t → K - t + 1, independent of its
  drafts; a strong one (α → 0) is trained where survival is decided. ã > 0 keeps a signal after a rejection.
- The label is p, so the step's own ã_t is divided out: the acceptance of one sampled token must not decide whether its
  state is trained. With hard labels (`vsd.objective.hard_labels`) it stays in: at α = 0 the loss then has the gradient
  of -E_q[accepted length] at T = 0 (tests/exact).
- For `rejection` ARW is that gradient in closed form (`vsd.objective.accepted_length`); with `cut` survival is that of
  a draft tree (`vsd.objective.tree_survival`).

Measured (docs/results.md), from a drafter that has memorised its text, three minutes, one seed, T = 0: 1.030 × `eagle3`
with ARW, 1.036 without. So ARW is off by default.

Legend: K steps, C paths.
"""

from dataclasses import dataclass

from torch import Tensor

from vsd.objective.acceptance import smoothed_acceptance
from vsd.objective.accepted_length import accepted_length
from vsd.objective.algebra import Rule, Term, Weights
from vsd.objective.divergence import cross_entropy
from vsd.objective.rows import PathRows
from vsd.objective.tree_survival import TreeSurvival
from vsd.objective.utility import credit, survival


@dataclass(frozen=True)
class RejectionWeights(Weights):
    """ω of a chain; `alpha` None adapts α.

    Attributes:
        own: keep the step's own acceptance, for labels that are the token itself.
    """

    rule: Rule = "greedy"
    alpha: float | None = None
    own: bool = False

    def __call__(self, rows: PathRows) -> Tensor:
        """Weights [K, C]."""
        a = smoothed_acceptance(rows, self.rule, self.alpha) * rows.valid
        whole = credit(survival(a))
        return whole if self.own else whole / a.clamp(min=1e-6)


def arw(rule: Rule, alpha: float | None, cut: float | None, width: float, eta: float) -> tuple[Term, ...]:
    """The terms that take the place of 0.8^k; arguments as in `vsd.objective.vsd.vsd`."""
    if rule == "rejection":
        return accepted_length(alpha, eta)
    weights = RejectionWeights(rule, alpha) if cut is None else TreeSurvival(cut, width, alpha)
    return (Term(weights, cross_entropy),)
