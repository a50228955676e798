"""Block drafters on vocabularies of three tokens: q is a product of marginals, or a Markov chain; all 27 paths.

The same objectives as for autoregressive drafters; only the states are fewer: one for every step (product), or one for
every step and token before (Markov chain).
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from exact.test_tabular import (
    INDEX,
    PATHS,
    PREFIXES,
    ROWS,
    K,
    V,
    accepted,
    expected_length,
    greedy_path,
    table,
    tabular_loss,
    token_log_probs,
)
from vsd.objective import objective
from vsd.objective.utility import utility

PRODUCT = torch.tensor([len(prefix) for prefix in PREFIXES])  # [13], of K states
MARKOV = torch.tensor([0 if not prefix else 1 + (len(prefix) - 1) * V + prefix[-1] for prefix in PREFIXES])  # of 7
FAMILIES = pytest.mark.parametrize("states", [PRODUCT, MARKOV], ids=["product", "markov"])


def parameters(states: Tensor, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(int(states.max()) + 1, V, generator=g, dtype=torch.float64).requires_grad_()


@FAMILIES
@pytest.mark.parametrize("source", ["drafter", "target"])
@pytest.mark.parametrize("seed", range(3))
def test_the_m_step_of_rejection_follows_the_exact_gradient(seed: int, source: str, states: Tensor) -> None:
    """All 27 paths, weighed by the law that they are drawn from: the loss has the gradient of -E_q[accepted length]."""
    log_p, weights = table(seed + 10), parameters(states, seed + 200)
    logits = weights[states]  # [13, V]
    p, q = token_log_probs(log_p), token_log_probs(logits.log_softmax(-1))
    exact = (q.sum(0).exp() * utility(accepted("rejection", p, q))).sum()
    (wanted,) = torch.autograd.grad(exact, weights, retain_graph=True)
    law = (q.detach() if source == "drafter" else p).sum(0).exp()
    terms = objective("vsd", {"rule": "rejection", "arw": True, "alpha": 0.0, "eta": 1e9}).parts[0].terms
    drawn = {"share": law, "written": source == "target"}
    loss = tabular_loss(logits, log_p, ROWS, PATHS, **drawn)(terms)
    (found,) = torch.autograd.grad(loss, weights)
    torch.testing.assert_close(found, -wanted)


@FAMILIES
@pytest.mark.parametrize("seed", range(3))
def test_arw_with_hard_labels_follows_the_exact_gradient_at_temperature_0(seed: int, states: Tensor) -> None:
    log_p, weights = table(seed + 20, 2.0), parameters(states, seed + 300)
    logits, path = weights[states], greedy_path(log_p)
    exact = (token_log_probs(logits.log_softmax(-1)).sum(0).exp() * utility((path == PATHS).double())).sum()
    (wanted,) = torch.autograd.grad(exact, weights, retain_graph=True)
    terms = objective("vsd", {"arw": True, "hard": True, "alpha": 0.0}).parts[0].terms
    rows = torch.tensor([[INDEX[tuple(path[:k, 0].tolist())]] for k in range(K)])
    (found,) = torch.autograd.grad(tabular_loss(logits, log_p, rows, path)(terms), weights)
    torch.testing.assert_close(found, -wanted)


def trained(states: Tensor, loss: Callable[[Tensor], Tensor], start: Tensor, steps: int = 400) -> Tensor:
    """Logits [13, V] after minimising a loss of them."""
    weights = start.detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([weights], lr=0.05)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(weights[states]).backward()
        optimiser.step()
    return weights.detach()


def over_paths(log_p: Tensor, name: str, options: dict[str, object]) -> Callable[[Tensor], Tensor]:
    """The objective's loss on all 27 paths of the target, weighed by p."""
    terms, law = objective(name, options).parts[0].terms, token_log_probs(log_p).sum(0).exp()
    return lambda logits: tabular_loss(logits, log_p, ROWS, PATHS, share=law, written=True)(terms)


@pytest.mark.parametrize("seed", [0, 3])
def test_by_rejection_the_likeliest_marginals_are_not_those_accepted_longest(seed: int) -> None:
    """From the optimum of cross-entropy VSD's M-step raises E[accepted length] of a product, not of a table."""
    log_p, free = table(seed, 2.0), torch.arange(len(PREFIXES))
    path_level = ("vsd", {"rule": "rejection", "arw": True, "alpha": 0.0, "eta": 1e9})
    lengths = {}
    for name, states in (("product", PRODUCT), ("free", free)):
        likely = trained(states, over_paths(log_p, "eagle3", {}), parameters(states, seed))
        further = [trained(states, over_paths(log_p, *one), likely) for one in (path_level, ("lk_lambda", {}))]
        lengths[name] = [expected_length("rejection", log_p, x[states].log_softmax(-1)) for x in (likely, *further)]
    marginal, whole, lk = lengths["product"]
    assert whole > 1.05 * marginal and whole > 1.01 * lk
    assert all(abs(length / K - 1) < 0.02 for length in lengths["free"])
