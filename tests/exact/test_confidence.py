"""The confidence head on vocabularies of three tokens: after training, the product of confidences is the acceptance.

Eight contexts, each with tables of p and q at all 13 prefixes. The head sees the depth alone, so that it has to average
over the contexts that verification reaches.
"""

import pytest
import torch
from torch import Tensor

from exact.test_tabular import INDEX, PATHS, PREFIXES, ROWS, K, V, greedy_path, table, token_log_probs
from vsd.objective import Confidence, HeadTarget, PathTarget, Rule, fused_loss, objective
from vsd.objective.utility import survival
from vsd.verification.rejection import acceptance

COUNT = 8
TABLES = [(table(seed, 2.0), table(seed, 2.0) + table(seed + 50)) for seed in range(COUNT)]  # q is like p
TERMS = objective("eagle3").parts[0].terms


def best_path(logits: Tensor) -> Tensor:
    """[K, 1], of the likeliest token at every prefix."""
    return greedy_path(logits)


def rows_of(paths: Tensor) -> Tensor:
    return torch.tensor([[INDEX[tuple(path[:k])] for path in paths.T.tolist()] for k in range(K)])


def exact(rule: str) -> Tensor:
    """E[κ_k] [K] of what is drafted: by rejection a sampled path, else the drafter's likeliest tokens."""
    found = []
    for log_p, logits in TABLES:
        log_q = logits.log_softmax(-1)
        p, q = token_log_probs(log_p), token_log_probs(log_q)
        if rule == "rejection":
            found.append((q.sum(0).exp() * survival(acceptance(p, q))).sum(1))
            continue
        path = best_path(log_q)
        p = token_log_probs(log_p, rows_of(path), path)
        a = p.exp() if rule == "target" else (path == greedy_along(log_p, path)).double()
        found.append(survival(a)[:, 0])
    return torch.stack(found).mean(0)


def greedy_along(log_p: Tensor, path: Tensor) -> Tensor:
    """The target's likeliest token at every prefix of a path, [K, 1]."""
    return log_p[rows_of(path)].argmax(-1)


def paths_of(rule: str, source: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens [K, R], rows [K, R] and shares [R]: greedy text, or every path by its law under target or drafter."""
    tokens, rows, shares = [], [], []
    for i, (log_p, logits) in enumerate(TABLES):
        some = greedy_path(log_p) if rule == "greedy" else PATHS
        tokens.append(some)
        rows.append(len(PREFIXES) * i + (rows_of(some) if rule == "greedy" else ROWS))
        law = log_p if source == "target" else logits.log_softmax(-1)
        shares.append(token_log_probs(law).sum(0).exp())
    return torch.cat(tokens, 1), torch.cat(rows, 1), None if rule == "greedy" else torch.cat(shares)


@pytest.mark.parametrize(
    ("rule", "source"), [("greedy", "target"), ("target", "target"), ("rejection", "target"), ("rejection", "drafter")]
)
def test_the_product_of_trained_confidences_is_the_acceptance(rule: Rule, source: str) -> None:
    tokens, rows, share = paths_of(rule, source)
    log_p, logits = (torch.cat(tables) for tables in zip(*TABLES))
    N = len(log_p)
    target = HeadTarget(log_p, torch.eye(V).double(), None, torch.zeros(N).double(), lambda x: x)
    written = share is not None and source == "target"
    paths = PathTarget(tokens, rows, torch.ones_like(tokens, dtype=torch.bool), share, written=written)
    hidden, depth = torch.eye(N, dtype=torch.float64)[rows], torch.zeros(K, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([depth], max_iter=100, tolerance_grad=1e-12, tolerance_change=0)

    def loss() -> Tensor:
        optimiser.zero_grad()
        confidence = Confidence(depth[:, None].expand_as(tokens), rule)
        value = fused_loss(hidden, logits.T, target, paths, TERMS, chunk_rows=50, confidence=confidence).loss
        value.backward()
        return value

    optimiser.step(loss)
    wanted = exact(rule)
    assert 0.05 < wanted[-1] < wanted[0] < 0.95
    torch.testing.assert_close(depth.detach().sigmoid().cumprod(0), wanted, rtol=1e-5, atol=1e-6)


def test_a_confidence_changes_no_other_gradient() -> None:
    tokens, rows, share = paths_of("target", "target")
    log_p, logits = (torch.cat(tables) for tables in zip(*TABLES))
    N = len(log_p)
    target = HeadTarget(log_p, torch.eye(V).double(), None, torch.zeros(N).double(), lambda x: x)
    paths = PathTarget(tokens, rows, torch.ones_like(tokens, dtype=torch.bool), share, written=True)
    found = []
    for confidence in (None, Confidence(torch.randn(K, tokens.shape[1]).double().requires_grad_(), "target")):
        hidden, head = torch.eye(N).double()[rows].requires_grad_(), logits.T.clone().requires_grad_()
        loss = fused_loss(hidden, head, target, paths, TERMS, confidence=confidence).loss
        found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, head))))
    assert found[1][0] > found[0][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1:], found[1][1:]))
