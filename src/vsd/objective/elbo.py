"""`elbo`: the raw variational bound of VSD (arXiv:2602.05774), on paths drawn from the drafter.

    log Σ_z p(z) κ(z)  ≥  E_q[log κ(z)] - KL(q(z) ‖ p(z))

Its gradient is E_q[(R - b) ∇ log q(z) + ∇ log κ(z)] with R = log κ + log p - log q, taken from each token on, and b the
mean of the anchor's other paths (leave-one-out). With `rejection`, log a = min(0, log p - log q) depends on q itself.
At T = 0 log κ is -∞ for nearly every path: the bound cannot be trained on, and is refused. Ours: the baseline,
reward-to-go, and the floor under probabilities.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vsd.errors import VSDError
from vsd.objective.algebra import Drafted, Objective, Part, Term, Weights
from vsd.objective.divergence import negative_log_likelihood
from vsd.objective.rows import PathRows
from vsd.objective.utility import to_go
from vsd.verification.rejection import acceptance

_FLOOR = math.log(1e-4)


@dataclass(frozen=True)
class Advantage(Weights):
    """Reward-to-go of the bound, minus that of the anchor's other paths."""

    rule: str = "rejection"
    on = (Drafted,)
    filters = True

    def __call__(self, rows: PathRows) -> Tensor:
        """[K, C]."""
        log_p = rows.label_p.log().clamp(min=_FLOOR)
        log_q = rows.label_log_q.clamp(min=_FLOOR)
        log_a = log_p if self.rule == "target" else acceptance(log_p, log_q).log()
        reward = (log_a + log_p - log_q) * rows.known
        S = rows.group
        ahead = to_go(reward).unflatten(1, (-1, S))  # [K, A, S]
        others = (ahead.sum(-1, keepdim=True) - ahead) / max(1, S - 1)
        own = log_q > log_p if self.rule == "rejection" else torch.zeros_like(rows.known)  # -∂log a / ∂log q
        return ((ahead - others).flatten(1) - own.to(ahead.dtype)) * rows.known


def elbo(rule: str = "rejection", samples: int = 16, anchors: int = 4) -> Objective:
    """The whole objective.

    Raises:
        VSDError: for rule "greedy", or fewer than two samples.
    """
    if rule == "greedy":
        raise VSDError(
            "the raw ELBO is -inf at temperature 0 (log κ): train it for rule target or rejection, or use vsd"
        )
    if samples < 2:
        raise VSDError("the ELBO's baseline is the mean of an anchor's other paths: samples must be at least 2")
    paths = Drafted(samples, anchors)
    return Objective((Part(paths, (Term(Advantage(rule), negative_log_likelihood),)),), rule)
