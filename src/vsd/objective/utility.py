"""Utility of a draft path (VSD, arXiv:2602.05774): survival, expected accepted tokens, credit and the bound.

a_t is the probability that the verifier accepts token t, given that it accepted all tokens before. κ_k = Π_{t≤k} a_t is
the probability that the first k tokens are accepted, U = Σ_k κ_k the expected number of accepted tokens.

Legend: K steps of a path, S paths of an anchor; other dimensions are free.
"""

import torch
from torch import Tensor


def survival(acceptance: Tensor) -> Tensor:
    """κ [K, …] from a [K, …]."""
    return acceptance.cumprod(0)


def utility(acceptance: Tensor) -> Tensor:
    """U [...] in tokens, from a [K, …]."""
    return survival(acceptance).sum(0)


def reached(acceptance: Tensor) -> Tensor:
    """κ_{t-1} [K, …] from a [K, …]: the probability that verification reaches step t; 1 for the first."""
    return torch.cat([torch.ones_like(acceptance[:1]), survival(acceptance)[:-1]])


def to_go(values: Tensor) -> Tensor:
    """Σ_{k≥t} values_k, [K, …]: sums over step t and all later ones."""
    return values.flip(0).cumsum(0).flip(0)


def credit(kappa: Tensor) -> Tensor:
    """∂U / ∂log a_t = Σ_{k≥t} κ_k, [K, …] from κ [K, …]: the utility that depends on the acceptance of step t."""
    return to_go(kappa)


def smoothed(acceptance: Tensor, alpha: float) -> Tensor:
    """ã = α + (1 - α) a: never 0 for α > 0, so that steps after a rejection keep a training signal."""
    return alpha + (1 - alpha) * acceptance


def elbo(log_q: Tensor, log_p: Tensor, log_acceptance: Tensor) -> Tensor:
    """log κ + log p - log q of whole paths, [...] from [K, …] per token.

    Its mean over z ~ q is the paper's bound E_q[log κ] - KL(q ‖ p) ≤ log Σ_z p(z) κ(z), tight at q ∝ p κ.
    """
    return (log_acceptance + log_p - log_q).sum(0)


def self_normalised(log_weights: Tensor) -> Tensor:
    """Weights [..., S] that sum to one over the paths of an anchor; uniform where all log-weights are -inf."""
    impossible = log_weights.isneginf().all(-1, keepdim=True)
    return torch.where(impossible, torch.zeros_like(log_weights), log_weights).softmax(-1)


def effective_sample_size(weights: Tensor) -> Tensor:
    """1 / Σ w², between 1 and S, of self-normalised weights [..., S]."""
    return 1 / weights.square().sum(-1)
