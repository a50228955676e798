"""Properties of utilities, divergences and weights on any input, and of the weights of single kinds by hand."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vsd.objective.accepted_length import FollowingTokens
from vsd.objective.algebra import Weights
from vsd.objective.arw import RejectionWeights
from vsd.objective.car import Confidence
from vsd.objective.cut_paths import TokensLeft
from vsd.objective.divergence import Divergence, jensen_shannon, reverse_kl, total_variation
from vsd.objective.dpace import Credit
from vsd.objective.eagle3 import Decay
from vsd.objective.griffin import Alignable, TopCrossEntropy
from vsd.objective.lk import Hybrid, negative_log_acceptance
from vsd.objective.rows import PathRows
from vsd.objective.tree_survival import TreeSurvival, tree_survival
from vsd.objective.utility import (
    credit,
    effective_sample_size,
    reached,
    self_normalised,
    smoothed,
    survival,
    to_go,
    utility,
)
from vsd.objective.vat import Anchored
from vsd.objective.vispec import PlackettLuce

SEEDS = st.integers(0, 10**6)
reproducible = settings(deadline=None, derandomize=True)
WEIGHTS = [
    *(Decay(), Credit(), Anchored(), Alignable(), TokensLeft()),
    *(RejectionWeights(rule) for rule in ("greedy", "target", "rejection")),
    *(Confidence(rule) for rule in ("greedy", "target", "rejection")),
    *(RejectionWeights(own=True), FollowingTokens(), TreeSurvival(-3.0)),
]


def random_rows(seed: int, steps: int, paths: int = 6, size: int = 7, mass: float = 0.8) -> PathRows:
    g = torch.Generator().manual_seed(seed)
    return PathRows(
        3 * torch.randn(steps, paths, size, generator=g, dtype=torch.float64),
        mass * (3 * torch.randn(steps, paths, size, generator=g, dtype=torch.float64)).softmax(-1),
        torch.randint(-1, size, (steps, paths), generator=g),
        torch.arange(steps)[:, None] < torch.randint(0, steps + 1, (paths,), generator=g),
        acceptance=float(torch.rand((), generator=g)),
    )


# ---- utility


@reproducible
@given(SEEDS, st.integers(1, 6), st.floats(0, 1))
def test_survival_utility_and_credit_are_consistent(seed: int, steps: int, alpha: float) -> None:
    a = torch.rand(steps, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kappa, length = survival(a), utility(a)
    assert (kappa >= 0).all() and (kappa <= 1).all() and (kappa.diff(dim=0) <= 0).all()
    assert (length <= steps).all()
    torch.testing.assert_close(credit(kappa)[0], length)
    torch.testing.assert_close(credit(kappa), to_go(kappa))
    assert (reached(a)[0] == 1).all()
    torch.testing.assert_close(reached(a) * a, kappa)
    softer = smoothed(a, alpha)
    assert (softer >= a).all() and (softer >= alpha).all() and (softer <= 1 + 1e-12).all()


@reproducible
@given(SEEDS, st.integers(1, 8), st.floats(-50, 50))
def test_shares_sum_to_one_and_ignore_a_common_factor(seed: int, samples: int, shift: float) -> None:
    log_weights = 5 * torch.randn(3, samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    share = self_normalised(log_weights)
    torch.testing.assert_close(share.sum(-1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(self_normalised(log_weights + shift), share)
    size = effective_sample_size(share)
    assert (size > 1 - 1e-9).all() and (size < samples + 1e-9).all()


# ---- divergences


@reproducible
@given(SEEDS, st.sampled_from([total_variation, jensen_shannon, reverse_kl, Hybrid(), negative_log_acceptance]))
def test_divergences_are_zero_at_p_and_positive_elsewhere(seed: int, divergence: Divergence) -> None:
    """With all of p's mass in the draft vocabulary; the gradient vanishes there, but for the kink of min(p, q)."""
    rows = random_rows(seed, 2, mass=1.0)
    assert (divergence(rows)[0] > 0).all()
    loss, gradient = divergence(PathRows(rows.p.log(), rows.p, rows.labels, rows.valid))
    torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-12, rtol=0)
    if divergence in (jensen_shannon, reverse_kl):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "divergence",
    [total_variation, jensen_shannon, reverse_kl, negative_log_acceptance, TopCrossEntropy(3), PlackettLuce(4)],
)
@reproducible
@given(SEEDS)
def test_gradients_are_those_of_finite_differences(divergence: Divergence, seed: int) -> None:
    """A step of 1e-6 along a random direction in the logits, in float64."""
    rows = random_rows(seed, 2)
    direction = torch.randn(rows.log_q.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def value(step: float) -> Tensor:
        return divergence(PathRows(rows.log_q + step * direction, rows.p, rows.labels, rows.valid))[0]

    slope = (value(1e-6) - value(-1e-6)) / 2e-6
    found = (divergence(rows)[1] * direction).sum(-1)
    near_tie = (rows.q - rows.p).abs().amin(-1) < 1e-4  # min(p, q) has a kink at q = p
    torch.testing.assert_close(found[~near_tie], slope[~near_tie], atol=1e-7, rtol=1e-5)


def ordered(log_q: Tensor, order: tuple[int, ...]) -> PathRows:
    """One step where the target ranks the tokens of an order first, in it; q = softmax(log_q [Vd])."""
    p = torch.full_like(log_q, 1e-3)
    p[list(order)] = 0.1 * torch.arange(len(order), 0, -1, dtype=log_q.dtype)
    return PathRows(log_q.clone()[None, None], p[None, None], torch.zeros(1, 1).long(), torch.ones(1, 1).bool())


@reproducible
@given(SEEDS)
def test_plackett_luce_is_the_law_of_draws_without_replacement(seed: int) -> None:
    """Of every order of four tokens among seven: draw by draw; all orders together have probability 1."""
    log_q = 2 * torch.randn(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    total = 0.0
    for order in itertools.permutations((1, 2, 4, 6)):
        chance, left = 1.0, list(order)
        while left:
            chance *= float(log_q[left[0]].exp() / log_q[left].exp().sum())
            left = left[1:]
        loss, _ = PlackettLuce(4)(ordered(log_q, order))
        assert float((-loss).exp()) == pytest.approx(chance)
        total += chance
    assert total == pytest.approx(1)


def test_plackett_luce_moves_tokens_towards_the_targets_order() -> None:
    """From equal logits the best token rises most, the last one falls most; tokens outside the ten keep theirs."""
    order = (3, 0, 5, 1)
    _, gradient = PlackettLuce(4)(ordered(torch.zeros(7, dtype=torch.float64), order))
    moves = (-gradient[0, 0]).tolist()
    assert moves[3] > moves[0] > moves[5] > moves[1] and moves[3] > 0 > moves[1]
    assert [moves[i] for i in (2, 4, 6)] == [0, 0, 0] and sum(moves) == pytest.approx(0)


# ---- weights


@reproducible
@given(SEEDS, st.integers(1, 5), st.sampled_from(WEIGHTS))
def test_weights_are_finite_not_negative_and_zero_after_the_end(seed: int, steps: int, weights: Weights) -> None:
    rows = random_rows(seed, steps)
    found = weights(rows)
    assert found.shape == rows.valid.shape and found.isfinite().all() and (found >= 0).all()
    assert not found[~rows.valid].any()


@reproducible
@given(SEEDS, st.integers(1, 5), st.sampled_from(WEIGHTS))
def test_weights_do_not_depend_on_steps_after_the_end(seed: int, steps: int, weights: Weights) -> None:
    rows, other = random_rows(seed, steps), random_rows(seed + 1, steps)
    mixed = PathRows(
        torch.where(rows.valid[..., None], rows.log_q, other.log_q),
        torch.where(rows.valid[..., None], rows.p, other.p),
        torch.where(rows.valid, rows.labels, other.labels),
        rows.valid,
        acceptance=rows.acceptance,
    )
    torch.testing.assert_close(weights(mixed), weights(rows))


@reproducible
@given(SEEDS, st.integers(1, 6))
def test_arw_of_a_weak_drafter_is_the_number_of_steps_left(seed: int, steps: int) -> None:
    """All first draft tokens are rejected now (α = 1), or α is set to 1."""
    rows = random_rows(seed, steps)
    rows.acceptance = 0.0
    left = TokensLeft()(rows)
    for rule in ("greedy", "target", "rejection"):
        torch.testing.assert_close(RejectionWeights(rule)(rows), left)
    torch.testing.assert_close(RejectionWeights(alpha=1.0, own=True)(rows), left)


def test_tree_survival_by_hand() -> None:
    """Cumulative log q of -1, -3, -7 around an edge at -3 nats: in the tree, at its edge, out of it."""
    log_q = torch.tensor([[-1.0], [-2.0], [-4.0]], dtype=torch.float64)
    kappa = tree_survival(log_q, cut=-3.0, width=0.5)[:, 0]
    torch.testing.assert_close(kappa, torch.tensor([4.0, 0.0, -8.0], dtype=torch.float64).sigmoid())
    assert kappa[1] == 0.5
    sharp = PathRows(
        log_q.expand(-1, 1)[..., None].clone(), log_q.exp()[..., None], torch.zeros(3, 1).long(), log_q < 0
    )
    sharp.label_log_q = log_q  # a vocabulary of one token would be normalised to log q = 0
    edge = TreeSurvival(-3.0, 1e-3, alpha=0.0)(sharp)[:, 0]
    torch.testing.assert_close(edge, torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
