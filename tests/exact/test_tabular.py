"""Vocabularies of three tokens and paths of three: everything enumerated in float64.

A tabular drafter has free logits at every prefix, a tabular target fixed probabilities; 27 paths are all there is.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from vsd.objective import HeadTarget, PathTarget, fused_loss, objective
from vsd.objective.elbo import Advantage
from vsd.objective.gto import Clipped, draft_tree_reward, standardised
from vsd.objective.rows import PathRows
from vsd.objective.utility import credit, effective_sample_size, elbo, self_normalised, survival, utility
from vsd.paths import Chain, Tree
from vsd.verification import Law, follow, verify
from vsd.verification.rejection import acceptance

V, K = 3, 3
PATHS = torch.tensor(list(itertools.product(range(V), repeat=K))).T  # [K, 27]
PREFIXES = [prefix for k in range(K) for prefix in itertools.product(range(V), repeat=k)]
INDEX = {prefix: i for i, prefix in enumerate(PREFIXES)}
ROWS = torch.tensor([[INDEX[tuple(path[:k])] for path in PATHS.T.tolist()] for k in range(K)])  # [K, 27]
RULES = ["target", "rejection"]


def table(seed: int, sharpness: float = 1.5) -> Tensor:
    """Log-probabilities at every prefix, [13, V]."""
    g = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(len(PREFIXES), V, generator=g, dtype=torch.float64)).log_softmax(-1)


def along(log_table: Tensor, rows: Tensor = ROWS, paths: Tensor = PATHS) -> Tensor:
    """Log-probability of every token of every path, [K, R]."""
    return log_table[rows].gather(-1, paths[..., None])[..., 0]


def accepted(rule: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """a of every drafted token."""
    return log_p.exp() if rule == "target" else acceptance(log_p, log_q)


def bound(rule: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The exact ELBO of a tabular drafter."""
    p, q = along(log_p), along(log_q)
    return (q.sum(0).exp() * elbo(q, p, accepted(rule, p, q).log())).sum()


# ---- the bound


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(5))
def test_the_elbo_is_a_bound_and_loose_below_the_accepted_length(rule: str, seed: int) -> None:
    log_p, log_q = table(seed), table(seed + 100)
    p, q = along(log_p), along(log_q)
    kappa = accepted(rule, p, q).prod(0)
    evidence = (p.sum(0).exp() * kappa).sum().log()
    value = bound(rule, log_p, log_q)
    assert value < evidence - 1e-3
    law = q.sum(0).exp()
    full = (law * kappa).sum()
    length = (law * utility(accepted(rule, p, q))).sum()
    assert length > K * full > K * value.exp()


@pytest.mark.parametrize("seed", range(5))
def test_the_elbo_is_tight_at_the_valid_path_posterior(seed: int) -> None:
    """κ held fixed: r ∝ p κ reaches log Σ p κ, and any other law of paths stays below."""
    p = along(table(seed)).sum(0)
    log_kappa = along(table(seed + 50)).sum(0)
    log_r = (p + log_kappa).log_softmax(0)
    evidence = (p + log_kappa).logsumexp(0)

    def value(log_law: Tensor) -> Tensor:
        return (log_law.exp() * elbo(log_law[None], p[None], log_kappa[None])).sum()

    torch.testing.assert_close(value(log_r), evidence)
    other = log_r + 0.3 * torch.randn(27, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert value(other.log_softmax(0)) < evidence - 1e-4


def test_credit_is_the_slope_of_the_utility() -> None:
    log_a = (-torch.rand(5, 4, dtype=torch.float64)).requires_grad_()
    (slope,) = torch.autograd.grad(utility(log_a.exp()).sum(), log_a)
    torch.testing.assert_close(credit(survival(log_a.detach().exp())), slope)


# ---- the oracle is the verifier


def chains(log_q: Tensor, count: int, generator: torch.Generator) -> Chain:
    """`count` chains sampled from a tabular drafter."""
    tokens, laws = torch.zeros(count, 1, dtype=torch.long), []
    rows = torch.zeros(count, dtype=torch.long)
    for _ in range(K):
        laws.append(log_q[rows])
        drawn = torch.multinomial(laws[-1].exp(), 1, generator=generator)
        tokens = torch.cat([tokens, drawn], 1)
        rows = torch.tensor([INDEX.get(tuple(path[1:]), 0) for path in tokens.tolist()])
    nodes = torch.arange(K + 1)
    tree = Tree(tokens, (nodes - 1).clamp(min=0).expand(count, -1), nodes.expand(count, -1), torch.zeros(count, K + 1))
    return Chain(tree, torch.stack(laws, 1).float(), torch.arange(V))


@pytest.mark.parametrize("rule", ["greedy", *RULES])
def test_expected_utility_is_what_the_decoder_accepts(rule: str) -> None:
    """20,000 verified chains against the exact mean; 5 standard errors, a false alarm in two million runs."""
    log_p, log_q, n = table(3, 2.0), table(103), 20_000
    p, q = along(log_p), along(log_q)
    a = (p == log_p[ROWS].amax(-1)).double() if rule == "greedy" else accepted(rule, p, q)
    exact = (q.sum(0).exp() * utility(a)).sum()
    g = torch.Generator().manual_seed(0)
    chain = chains(log_q, n, g)
    rows = torch.tensor(
        [[INDEX.get(tuple(path[1 : k + 1]), 0) for k in range(K + 1)] for path in chain.tree.tokens.tolist()]
    )
    logits = log_p[rows]
    if rule == "rejection":
        law = Law(LogitsProcessorList(), 1.0, g, frozenset())
        verdict = verify(chain.tree, logits, [law] * n, lambda b: [], chain)
    elif rule == "greedy":
        verdict = follow(chain.tree, logits.argmax(-1))
    else:
        verdict = follow(chain.tree, torch.multinomial(logits.exp().flatten(0, 1), 1, generator=g).view(n, K + 1))
    kept = verdict.counts.double() - 1
    assert abs(kept.mean() - exact) < 5 * kept.std() / n**0.5
    assert kept.std() > 0.1


def test_path_shares_are_unbiased_importance_weights() -> None:
    """Self-normalised p κ / q over many draws finds the posterior's mean utility; the sample size is what it is."""
    log_p, log_q = table(5), table(105)
    p, q = along(log_p).sum(0), along(log_q).sum(0)
    log_kappa = along(log_p).sum(0)
    value = utility(along(log_p).exp())
    exact = ((p + log_kappa).softmax(0) * value).sum()
    drawn = torch.multinomial(q.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(1))
    share = self_normalised((p + log_kappa - q)[drawn])
    spread = (share.square() * (value[drawn] - exact).square()).sum().sqrt()
    assert abs((share * value[drawn]).sum() - exact) < 5 * spread
    assert effective_sample_size(share) < 0.9 * 200_000
    hopeless = self_normalised(torch.full((2, 4), float("-inf")))
    torch.testing.assert_close(hopeless, torch.full((2, 4), 0.25))
    torch.testing.assert_close(effective_sample_size(hopeless), torch.full((2,), 4.0))


# ---- gradients


def tabular_loss(logits: Tensor, log_p: Tensor, rows: Tensor, tokens: Tensor, **paths: object) -> Callable[..., Tensor]:
    """The fused loss of paths whose drafter state at a prefix is its one-hot index, so that the head is the table."""
    hidden = torch.eye(len(PREFIXES), dtype=torch.float64)[rows]
    eye = torch.eye(V, dtype=torch.float64)
    target = HeadTarget(log_p, eye, None, torch.zeros(len(PREFIXES), dtype=torch.float64), lambda x: x)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    along_paths = PathTarget(tokens, rows, valid, **paths)  # type: ignore[arg-type]
    return lambda terms, acceptance=0.0: fused_loss(hidden, logits.T, target, along_paths, terms, acceptance).loss


@pytest.mark.parametrize("rule", RULES)
def test_the_elbo_objective_follows_the_exact_gradient(rule: str) -> None:
    """Expectation over all 27 × 27 pairs of paths (S = 2) of the loss's gradient = -∇ELBO."""
    log_p, logits = table(7), table(107).requires_grad_()
    (exact,) = torch.autograd.grad(bound(rule, log_p, logits.log_softmax(-1)), logits)
    first, second = (index.flatten() for index in torch.meshgrid(torch.arange(27), torch.arange(27), indexing="ij"))
    pairs = torch.stack([first, second], 1).flatten()
    law = along(logits.detach().log_softmax(-1)).sum(0).exp()
    chance = (law[first] * law[second]).repeat_interleave(2)
    term = objective("elbo", {"rule": rule, "samples": 2}).parts[0].terms[0]
    assert isinstance(term.weights, Advantage)
    log_q = logits.log_softmax(-1)[ROWS[:, pairs]]
    rows = PathRows(
        log_q.detach().clone(),
        log_p[ROWS[:, pairs]].exp(),
        PATHS[:, pairs],
        torch.ones(K, len(pairs), dtype=torch.bool),
        share=torch.full((len(pairs),), 0.5, dtype=torch.float64),
        group=2,
    )
    surrogate = (chance / 2 * term.weights(rows) * -log_q.gather(-1, PATHS[:, pairs][..., None])[..., 0]).sum()
    (found,) = torch.autograd.grad(surrogate, logits)
    torch.testing.assert_close(found, -exact)


@pytest.mark.parametrize("source", ["drafter", "target"])
@pytest.mark.parametrize("seed", range(3))
def test_the_m_step_of_rejection_follows_the_exact_gradient_of_the_utility(seed: int, source: str) -> None:
    """All 27 paths, weighed by the law they are drawn from: the loss's gradient is -∇ E_q[accepted length]."""
    log_p, logits = table(seed + 10), table(seed + 200).requires_grad_()
    p, q = along(log_p), along(logits.log_softmax(-1))
    exact = (q.sum(0).exp() * utility(accepted("rejection", p, q))).sum()
    (wanted,) = torch.autograd.grad(exact, logits)
    law = (q.detach() if source == "drafter" else p).sum(0).exp()
    terms = objective("vsd", {"rule": "rejection", "arw": True, "alpha": 0.0, "eta": 1e9}).parts[0].terms
    loss = torch.zeros((), dtype=torch.float64)
    for r in range(27):  # one at a time: recorded paths have no shares
        drawn = {"share": torch.ones(1, dtype=torch.float64)} if source == "drafter" else {}
        loss = loss + law[r] * tabular_loss(logits, log_p, ROWS[:, r : r + 1], PATHS[:, r : r + 1], **drawn)(terms)
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found, -wanted)


def expected_length(rule: str, log_p: Tensor, log_q: Tensor) -> float:
    """E_q[U], exactly."""
    p, q = along(log_p), along(log_q)
    a = (p == log_p[ROWS].amax(-1)).double() if rule == "greedy" else accepted(rule, p, q)
    return float((q.sum(0).exp() * utility(a)).sum())


@pytest.mark.parametrize(("rule", "seed"), itertools.product(["greedy", "rejection"], range(3)))
def test_em_climbs_to_the_longest_accepted_path(rule: str, seed: int) -> None:
    """A free table can be accepted whole: at temperature 0 on the target's path, by rejection as q = p."""
    log_p, logits = table(seed, 2.0), table(seed + 100).requires_grad_()
    if rule == "greedy":
        best: tuple[int, ...] = ()
        while len(best) < K:
            best = (*best, int(log_p[INDEX[best]].argmax()))
        tokens = torch.tensor(best)[:, None]
    optimiser = torch.optim.Adam([logits], lr=0.05)
    options = {"greedy": {"hard": True, "e_step": None}, "rejection": {"e_step": "drafted"}}[rule]
    terms = objective("vsd", {"rule": rule, "arw": True, **options}).parts[-1].terms
    g = torch.Generator().manual_seed(seed)
    lengths = [expected_length(rule, log_p, logits.detach().log_softmax(-1))]
    for _ in range(300):
        if rule == "greedy":
            paths = {}
        else:
            law = along(logits.detach().log_softmax(-1)).sum(0).exp()
            drawn = torch.multinomial(law, 16, replacement=True, generator=g)
            tokens = PATHS[:, drawn]
            a = accepted(rule, along(log_p)[:, drawn], along(logits.detach().log_softmax(-1))[:, drawn])
            paths = {"share": self_normalised(utility(a)), "group": 16}
        rows = torch.tensor([[INDEX[tuple(path[:k])] for path in tokens.T.tolist()] for k in range(K)])
        optimiser.zero_grad()
        tabular_loss(logits, log_p, rows, tokens, **paths)(terms, acceptance=0.5).backward()
        optimiser.step()
        lengths.append(expected_length(rule, log_p, logits.detach().log_softmax(-1)))
    assert lengths[0] < 0.75 * K
    assert lengths[-1] > 0.97 * K
    assert sum(lengths[150:200]) > sum(lengths[50:100]) > sum(lengths[:50])


# ---- trees


@pytest.mark.parametrize("seed", range(4))
def test_the_draft_tree_reward_is_the_expected_accepted_length(seed: int) -> None:
    """A tree of six nodes, as its leaves' paths, against all 27 continuations of the target."""
    log_p = table(seed)
    p = along(log_p)
    leaves = [(0, 1), (0, 2, 1), (2, 0, 0), (2, 0, 1)]
    nodes = {leaf[:k] for leaf in leaves for k in range(1, len(leaf) + 1)}
    law = p.sum(0).exp()
    kept = torch.tensor(
        [sum(all(tuple(path[: j + 1]) in nodes for j in range(k + 1)) for k in range(K)) for path in PATHS.T.tolist()]
    )
    acceptance_of = torch.zeros(K, len(leaves), dtype=torch.float64)
    fresh, seen = torch.zeros(K, len(leaves), dtype=torch.bool), set()
    for s, leaf in enumerate(leaves):
        for k in range(len(leaf)):
            acceptance_of[k, s] = log_p[INDEX[leaf[:k]], leaf[k]].exp()
            fresh[k, s] = leaf[: k + 1] not in seen
            seen.add(leaf[: k + 1])
    torch.testing.assert_close(draft_tree_reward(acceptance_of, fresh), (law * kept).sum())


def test_the_clipped_surrogate_has_ppos_gradient() -> None:
    """min(r A, clip(r) A) by autograd, for ratios on both sides of the trust region and both signs of A."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(K, 40, V, generator=g, dtype=torch.float64).requires_grad_()
    tokens = torch.randint(0, V, (K, 40), generator=g)
    valid = torch.arange(K)[:, None] < torch.randint(1, K + 1, (40,), generator=g)
    advantage = torch.randn(40, generator=g, dtype=torch.float64)
    log_q = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    old = (log_q + 0.6 * torch.randn(K, 40, generator=g, dtype=torch.float64)).detach()
    ratio = (((log_q - old) * valid).sum(0) / valid.sum(0)).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
    (wanted,) = torch.autograd.grad(-surrogate, logits)
    rows = PathRows(
        logits.detach().clone(),
        torch.full((K, 40, V), 1 / V, dtype=torch.float64),
        tokens,
        valid,
        share=advantage.expand(K, -1),
        old_log_q=old,
    )
    weights = rows.share * Clipped(0.2)(rows)
    assert ((weights == 0) & valid).any() and (weights > 0).any() and (weights < 0).any()
    again = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    (found,) = torch.autograd.grad((weights * -again).sum(), logits)
    torch.testing.assert_close(found, wanted)


def test_advantages_are_standardised_within_their_group() -> None:
    found = standardised(torch.tensor([[1.0, 2.0, 6.0], [2.0, 2.0, 2.0]]))
    torch.testing.assert_close(found.mean(-1), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.std(-1), torch.tensor([1.0, 0.0]))
