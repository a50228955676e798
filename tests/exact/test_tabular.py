"""Vocabularies of three tokens and paths of three: all 27 paths enumerated in float64.

A tabular drafter has free logits at every prefix, a tabular target fixed probabilities.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from vsd.objective import HeadTarget, PathTarget, fused_loss, objective
from vsd.objective.acceptance import path_acceptance
from vsd.objective.algebra import Rule
from vsd.objective.cut_paths import TokensLeft
from vsd.objective.elbo import Advantage
from vsd.objective.gto import Clipped, draft_tree_reward, standardised
from vsd.objective.rows import PathRows
from vsd.objective.utility import credit, effective_sample_size, elbo, reached, self_normalised, survival, utility
from vsd.paths import Chain, Tree
from vsd.verification import Law, follow, verify
from vsd.verification.rejection import acceptance

V, K = 3, 3
PATHS = torch.tensor(list(itertools.product(range(V), repeat=K))).T  # [K, 27]
PREFIXES = [prefix for k in range(K) for prefix in itertools.product(range(V), repeat=k)]
INDEX = {prefix: i for i, prefix in enumerate(PREFIXES)}
ROWS = torch.tensor([[INDEX[tuple(path[:k])] for path in PATHS.T.tolist()] for k in range(K)])  # [K, 27]
RULES: list[Rule] = ["target", "rejection"]


def table(seed: int, sharpness: float = 1.5) -> Tensor:
    """Log-probabilities at every prefix, [13, V]."""
    g = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(len(PREFIXES), V, generator=g, dtype=torch.float64)).log_softmax(-1)


def token_log_probs(log_table: Tensor, rows: Tensor = ROWS, paths: Tensor = PATHS) -> Tensor:
    """Log-probability of every token of every path, [K, R]."""
    return log_table[rows].gather(-1, paths[..., None])[..., 0]


def accepted(rule: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """a of every drafted token."""
    return log_p.exp() if rule == "target" else acceptance(log_p, log_q)


def bound(rule: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The exact ELBO of a tabular drafter."""
    p, q = token_log_probs(log_p), token_log_probs(log_q)
    return (q.sum(0).exp() * elbo(q, p, accepted(rule, p, q).log())).sum()


def path_rows(log_p: Tensor, log_q: Tensor, paths: Tensor, valid: Tensor | None = None, **fields: object) -> PathRows:
    """Drafter and target along paths [K, R] of a table."""
    rows = torch.tensor([[INDEX[tuple(path[:k])] for path in paths.T.tolist()] for k in range(K)])
    exists = torch.ones_like(paths, dtype=torch.bool) if valid is None else valid
    return PathRows(log_q[rows].detach().clone(), log_p[rows].exp(), paths, exists, **fields)  # type: ignore[arg-type]


def greedy_path(log_p: Tensor) -> Tensor:
    """The target's path at temperature 0, [K, 1]."""
    best: tuple[int, ...] = ()
    while len(best) < K:
        best = (*best, int(log_p[INDEX[best]].argmax()))
    return torch.tensor(best)[:, None]


# ---- the bound


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(5))
def test_the_elbo_is_a_bound_and_loose_below_the_accepted_length(rule: str, seed: int) -> None:
    log_p, log_q = table(seed), table(seed + 100)
    p, q = token_log_probs(log_p), token_log_probs(log_q)
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
    p = token_log_probs(table(seed)).sum(0)
    log_kappa = token_log_probs(table(seed + 50)).sum(0)
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
    p, q = token_log_probs(log_p), token_log_probs(log_q)
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


@pytest.mark.parametrize("seed", range(5))
def test_at_temperature_0_the_recorded_path_has_the_survival_of_all_drafted_paths(seed: int) -> None:
    """A drafted path, cut at its first rejection, is a prefix of the greedy path."""
    log_p, log_q = table(seed, 2.0), table(seed + 100)
    kept = (greedy_path(log_p) == PATHS).double().cumprod(0)  # [K, 27]
    p = token_log_probs(log_p)
    torch.testing.assert_close(kept, (p == log_p[ROWS].amax(-1)).double().cumprod(0))
    drafted = (token_log_probs(log_q).sum(0).exp() * kept).sum(-1)
    recorded = path_rows(log_p, log_q, greedy_path(log_p))
    torch.testing.assert_close(survival(path_acceptance(recorded, "greedy"))[:, 0], drafted)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(5))
def test_survival_is_the_same_on_paths_of_drafter_and_target(seed: int, rule: Rule) -> None:
    """E_q[κ_k] with the acceptance of drafted tokens = E_p[κ_k] with the acceptance of the target's tokens."""
    log_p, log_q = table(seed), table(seed + 100)
    p, q = token_log_probs(log_p), token_log_probs(log_q)
    drafted = path_acceptance(path_rows(log_p, log_q, PATHS, share=torch.ones(K, 27)), rule)
    torch.testing.assert_close(drafted, accepted(rule, p, q))
    written = path_acceptance(path_rows(log_p, log_q, PATHS, share=torch.ones(K, 27), written=True), rule)
    by_drafter = (q.sum(0).exp() * survival(drafted)).sum(-1)
    by_target = (p.sum(0).exp() * survival(written)).sum(-1)
    torch.testing.assert_close(by_drafter, by_target)
    assert (written - drafted).abs().max() > 0.1


def test_path_shares_are_unbiased_importance_weights() -> None:
    """Self-normalised p κ / q over 200,000 draws estimates the posterior's mean utility within 5 standard errors."""
    log_p, log_q = table(5), table(105)
    p, q = token_log_probs(log_p).sum(0), token_log_probs(log_q).sum(0)
    log_kappa = token_log_probs(log_p).sum(0)
    value = utility(token_log_probs(log_p).exp())
    exact = ((p + log_kappa).softmax(0) * value).sum()
    drawn = torch.multinomial(q.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(1))
    share = self_normalised((p + log_kappa - q)[drawn])
    spread = (share.square() * (value[drawn] - exact).square()).sum().sqrt()
    assert abs((share * value[drawn]).sum() - exact) < 5 * spread
    assert effective_sample_size(share) < 0.9 * 200_000
    impossible = self_normalised(torch.full((2, 4), float("-inf")))
    torch.testing.assert_close(impossible, torch.full((2, 4), 0.25))
    torch.testing.assert_close(effective_sample_size(impossible), torch.full((2,), 4.0))


# ---- gradients


def tabular_loss(logits: Tensor, log_p: Tensor, rows: Tensor, tokens: Tensor, **paths: object) -> Callable[..., Tensor]:
    """The fused loss of a drafter whose state at a prefix is the prefix's one-hot index: its LM head is the table."""
    hidden = torch.eye(len(PREFIXES), dtype=torch.float64)[rows]
    eye = torch.eye(V, dtype=torch.float64)
    target = HeadTarget(log_p, eye, None, torch.zeros(len(PREFIXES), dtype=torch.float64), lambda x: x)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    target_of_paths = PathTarget(tokens, rows, valid, **paths)  # type: ignore[arg-type]
    return lambda terms, acceptance=0.0: fused_loss(hidden, logits.T, target, target_of_paths, terms, acceptance).loss


@pytest.mark.parametrize("rule", RULES)
def test_the_elbo_objective_follows_the_exact_gradient(rule: str) -> None:
    """Expectation over all 27 × 27 pairs of paths (S = 2) of the loss's gradient = -∇ELBO."""
    log_p, logits = table(7), table(107).requires_grad_()
    (exact,) = torch.autograd.grad(bound(rule, log_p, logits.log_softmax(-1)), logits)
    first, second = (index.flatten() for index in torch.meshgrid(torch.arange(27), torch.arange(27), indexing="ij"))
    pairs = torch.stack([first, second], 1).flatten()
    law = token_log_probs(logits.detach().log_softmax(-1)).sum(0).exp()
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
    """All 27 paths, weighed by the law that they are drawn from: the loss has the gradient of -E_q[accepted length]."""
    log_p, logits = table(seed + 10), table(seed + 200).requires_grad_()
    p, q = token_log_probs(log_p), token_log_probs(logits.log_softmax(-1))
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


@pytest.mark.parametrize("seed", range(3))
def test_arw_with_hard_labels_follows_the_exact_gradient_at_temperature_0(seed: int) -> None:
    """α = 0 on the greedy path alone: the loss has the gradient of -E_q[accepted length] over all 27 drafted paths."""
    log_p, logits = table(seed + 20, 2.0), table(seed + 300).requires_grad_()
    kept = (greedy_path(log_p) == PATHS).double()
    exact = (token_log_probs(logits.log_softmax(-1)).sum(0).exp() * utility(kept)).sum()
    (wanted,) = torch.autograd.grad(exact, logits)
    terms = objective("vsd", {"arw": True, "hard": True, "alpha": 0.0}).parts[0].terms
    path = greedy_path(log_p)
    rows = torch.tensor([[INDEX[tuple(path[:k, 0].tolist())]] for k in range(K)])
    (found,) = torch.autograd.grad(tabular_loss(logits, log_p, rows, path)(terms), logits)
    torch.testing.assert_close(found, -wanted)


@pytest.mark.parametrize("seed", range(3))
def test_the_tokens_left_in_a_cut_path_estimate_its_survival(seed: int) -> None:
    """All K lengths: P(step t is trained) = κ_{t-1}, and E[tokens left at t] = Σ_{k≥t} κ_{k-1} / κ_{t-1}."""
    go_on = torch.rand(K, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)  # ã of each token
    kappa = reached(go_on)  # [K, 1]
    ends = torch.cat([1 - go_on[:-1], torch.ones(1, 1, dtype=torch.float64)])
    law = (kappa * ends)[:, 0]  # of the lengths 1 … K
    valid = torch.arange(K)[:, None] < torch.arange(1, K + 1)  # [K, lengths]
    log_p, log_q = table(seed), table(seed + 100)
    rows = path_rows(log_p, log_q, PATHS[:, :1].expand(-1, K).contiguous(), valid)
    torch.testing.assert_close((law * valid).sum(-1), kappa[:, 0])
    left = (law * TokensLeft()(rows)).sum(-1) / kappa[:, 0]
    torch.testing.assert_close(left, torch.stack([kappa[t:].sum() / kappa[t, 0] for t in range(K)]))


def expected_length(rule: str, log_p: Tensor, log_q: Tensor) -> float:
    """E_q[U], exactly."""
    p, q = token_log_probs(log_p), token_log_probs(log_q)
    a = (p == log_p[ROWS].amax(-1)).double() if rule == "greedy" else accepted(rule, p, q)
    return float((q.sum(0).exp() * utility(a)).sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("greedy", {"arw": True, "hard": True, "e_step": None}),
        ("rejection", {"arw": True, "e_step": "drafted"}),
        ("rejection", {"e_step": "drafted"}),
    ],
)
def test_em_reaches_the_longest_accepted_paths(rule: Rule, options: dict, seed: int) -> None:
    """A free table can be accepted whole: at temperature 0 on the target's path, by rejection at q = p."""
    log_p, logits = table(seed, 2.0), table(seed + 100).requires_grad_()
    tokens = greedy_path(log_p)
    optimiser = torch.optim.Adam([logits], lr=0.05)
    terms = objective("vsd", {"rule": rule, **options}).parts[-1].terms
    g = torch.Generator().manual_seed(seed)
    lengths = [expected_length(rule, log_p, logits.detach().log_softmax(-1))]
    for _ in range(300):
        if rule == "greedy":
            paths = {}
        else:
            law = token_log_probs(logits.detach().log_softmax(-1)).sum(0).exp()
            drawn = torch.multinomial(law, 16, replacement=True, generator=g)
            tokens = PATHS[:, drawn]
            a = accepted(
                rule, token_log_probs(log_p)[:, drawn], token_log_probs(logits.detach().log_softmax(-1))[:, drawn]
            )
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
    """A tree of eight nodes, given by the paths to its leaves, against all 27 continuations of the target."""
    log_p = table(seed)
    p = token_log_probs(log_p)
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


@pytest.mark.parametrize("seed", range(4))
def test_states_of_a_tree_are_weighed_by_the_probability_that_verification_reaches_them(seed: int) -> None:
    """Paths to four leaves, against the share of all 27 continuations of the target that begin with a node's parent."""
    log_p, log_q = table(seed), table(seed + 100)
    leaves = torch.tensor([(0, 1, 0), (0, 2, 1), (2, 0, 0), (2, 0, 1)]).T  # [K, 4]
    law = token_log_probs(log_p).sum(0).exp()
    (term,) = objective("vsd", {"rule": "target", "arw": True, "e_step": "trees"}).parts[1].terms
    weights = term.weights(path_rows(log_p, log_q, leaves, share=torch.ones(K, 4), group=4))
    for k, s in itertools.product(range(K), range(4)):
        begins = (PATHS[:k] == leaves[:k, s : s + 1]).all(0)
        torch.testing.assert_close(weights[k, s], law[begins].sum())


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
