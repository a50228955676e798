"""Acceptance of the tokens of training paths, and the probability that verification reaches a step.

Legend: K steps, C paths.
"""

from dataclasses import dataclass

from torch import Tensor

from vsd.objective.algebra import Rule, Weights
from vsd.objective.rows import PathRows
from vsd.objective.utility import reached, smoothed
from vsd.verification.rejection import acceptance


def path_acceptance(rows: PathRows, rule: Rule) -> Tensor:
    """a [K, C]: the probability that verification accepts the path's token, given that it reached the step.

    A token of the drafter is accepted with probability p(x), or min(1, p/q) by `rejection`. A token of the target is
    its choice already, and accepted if it was drafted: with probability q(x), or min(1, q/p) by `rejection` (drafted
    and accepted, divided by the probability p that the target emits it).
    """
    if rule == "rejection":
        log_p, log_q = rows.label_p.log(), rows.label_log_q
        a = acceptance(log_q, log_p) if rows.written else acceptance(log_p, log_q)
        return a.masked_fill(~rows.known, 0.0)  # outside the draft vocabulary p and q are both given as 0
    return rows.label_log_q.exp() if rows.written else rows.label_p


def smoothed_acceptance(rows: PathRows, rule: Rule, alpha: float | None) -> Tensor:
    """ã = α + (1 - α) a [K, C]; `alpha` None: α is the running share of rejected first draft tokens."""
    return smoothed(path_acceptance(rows, rule), 1 - rows.acceptance if alpha is None else alpha)


@dataclass(frozen=True)
class Reached(Weights):
    """κ_{t-1} on smoothed acceptances: the probability that verification reaches the step."""

    rule: Rule
    alpha: float | None = None

    def __call__(self, rows: PathRows) -> Tensor:
        """Weights [K, C]."""
        return reached(smoothed_acceptance(rows, self.rule, self.alpha)) * rows.valid
