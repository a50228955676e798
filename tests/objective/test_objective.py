"""The fused loss against the plain formula, and which (root, step) pairs are trained with which weight."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vsd.drafters import Eagle3Drafter, draft_vocabulary
from vsd.objective import FusedLoss, HeadTarget, cross_entropy, fused_loss, step_weights
from vsd.objective.eagle3 import DECAY, align
from vsd.targets import Target

V, VD, H = 30, 12, 6


class Case(NamedTuple):
    """A drafter's side, the target's side and the weights of one loss; `logits` are the target's, uncapped [R, V]."""

    hidden: Tensor
    head: Tensor
    target: HeadTarget
    weights: Tensor
    logits: Tensor


def case(steps: int, rows: int, cap: float | None = None, dtype: torch.dtype = torch.float64, seed: int = 0) -> Case:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randperm(V, generator=g)[:VD].sort().values
    full_head = torch.randn(V, H, generator=g, dtype=dtype) * 2
    states = torch.randn(rows, H, generator=g, dtype=dtype)
    bias = torch.randn(V, generator=g, dtype=dtype)
    logits = states @ full_head.T + bias

    def capped(x: Tensor) -> Tensor:
        return x if cap is None else cap * torch.tanh(x / cap)

    weights = torch.rand(steps, rows, generator=g, dtype=dtype)
    weights[torch.rand(steps, rows, generator=g) < 0.3] = 0.0
    weights[:, 1] = 0.0  # a row that no step trains
    labels = torch.randint(-1, VD, (rows,), generator=g)
    return Case(
        torch.randn(steps, rows, H, generator=g, dtype=dtype).requires_grad_(),
        torch.randn(VD, H, generator=g, dtype=dtype).requires_grad_(),
        HeadTarget(states, full_head[ids], bias[ids], capped(logits).logsumexp(-1), capped, labels),
        weights,
        capped(logits)[:, ids] - capped(logits).logsumexp(-1, keepdim=True),
    )


def plain(hidden: Tensor, head: Tensor, log_p: Tensor, weights: Tensor) -> Tensor:
    """-Σ w Σ_v p_v log q_v, with p softmax over the full vocabulary, cut and not renormalised."""
    log_q = torch.log_softmax(hidden @ head.T, dim=-1)  # [K, R, Vd]
    return -(weights * (log_p.exp() * log_q).sum(-1)).sum()


@pytest.mark.parametrize("chunk_rows", [1, 7, 64, 256])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_value_and_gradients_equal_the_plain_formula(chunk_rows: int, steps: int, cap: float | None) -> None:
    hidden, head, target, weights, log_p = case(steps, 17, cap)
    wanted = plain(hidden, head, log_p, weights)
    wanted_grads = torch.autograd.grad(3.0 * wanted, [hidden, head])
    found = fused_loss(hidden, head, target, weights, chunk_rows=chunk_rows)
    torch.testing.assert_close(found.loss, wanted)
    for mine, theirs in zip(torch.autograd.grad(3.0 * found.loss, [hidden, head]), wanted_grads):
        torch.testing.assert_close(mine, theirs)


def test_a_pruned_vocabulary_keeps_the_true_mass() -> None:
    """Renormalised p would give another value here: half of the mass is outside."""
    hidden, head, target, weights, log_p = case(2, 9)
    mass = log_p.exp().sum(-1)
    assert mass.min() < 0.5
    renormalised = plain(hidden, head, log_p - mass.log()[:, None], weights)
    assert abs(fused_loss(hidden, head, target, weights).loss - renormalised) > 0.1 * renormalised


def test_gradcheck() -> None:
    hidden, head, target, weights, _ = case(2, 5, cap=4.0)
    assert torch.autograd.gradcheck(
        lambda hidden, head: fused_loss(hidden, head, target, weights, chunk_rows=3).loss, (hidden, head)
    )


def test_counters_count_trained_rows_and_right_proposals() -> None:
    hidden, head, target, weights, _ = case(3, 40)
    found = fused_loss(hidden, head, target, weights, chunk_rows=8)
    best = (hidden @ head.T).argmax(-1)
    for k in range(3):
        rows = [r for r in range(40) if weights[k, r] != 0]
        assert found.rows[k] == len(rows)
        assert found.correct[k] == sum(int(best[k, r]) == int(target.labels[r]) for r in rows)
    assert found.correct.sum() > 0
    assert not found.correct.requires_grad and not found.rows.requires_grad


def test_nothing_to_train_is_zero() -> None:
    hidden, head, target, weights, _ = case(2, 5)
    found = fused_loss(hidden, head, target, torch.zeros_like(weights))
    found.loss.backward()
    assert found.loss == 0 and not hidden.grad.any() and not head.grad.any()


def test_autocast_bfloat16_is_close_to_float32() -> None:
    hidden, head, target, weights, _ = case(3, 64, dtype=torch.float32)
    exact = fused_loss(hidden, head, target, weights)
    exact_grads = torch.autograd.grad(exact.loss, [hidden, head])
    with torch.autocast("cpu", torch.bfloat16):
        rough = fused_loss(hidden, head, target, weights)
    assert rough.loss.dtype == torch.float32
    torch.testing.assert_close(rough.loss, exact.loss, rtol=1e-2, atol=0)
    assert rough.loss != exact.loss  # it did compute in bfloat16
    for mine, theirs in zip(torch.autograd.grad(rough.loss, [hidden, head]), exact_grads):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 4e-2 * theirs.norm()


def test_cross_entropy_and_its_gradient() -> None:
    g = torch.Generator().manual_seed(3)
    z = torch.randn(2, 4, 7, generator=g, dtype=torch.float64, requires_grad=True)
    p = torch.rand(4, 7, generator=g, dtype=torch.float64) / 7
    wanted = -(p * z.log_softmax(-1)).sum(-1)
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), z)
    kept = p.clone()
    loss, gradient = cross_entropy(z.detach().clone(), p)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradient, wanted_gradient)
    assert torch.equal(p, kept)


# ---- which root and step predict which token

masks = st.lists(
    st.lists(st.booleans(), min_size=1, max_size=14).map(lambda mask: [False, False, *mask]).filter(any),
    min_size=1,
    max_size=3,
)


def laid_out(rows: list[list[bool]]) -> tuple[Tensor, Tensor]:
    """Positions of drafted tokens and which are real, [B, Q] each; padding is 2, as the collator has it."""
    positions = [[t for t, drafted in enumerate(row) if drafted] for row in rows]
    Q = max(map(len, positions))
    drafted = torch.tensor([row + [2] * (Q - len(row)) for row in positions])
    return drafted, torch.tensor([[True] * len(row) + [False] * (Q - len(row)) for row in positions])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(masks, st.integers(1, 6))
def test_step_weights_by_hand(rows: list[list[bool]], steps: int) -> None:
    """Root r drafts r + 2, r + 3, …; step k counts if all of its tokens so far are drafted when served."""
    drafted, valid = laid_out(rows)
    found = step_weights(drafted, valid, steps)
    wanted = torch.zeros_like(found)
    for b, row in enumerate(rows):
        for root in range(len(row)):
            for k in range(steps):
                if root + 2 + k < len(row) and all(row[root + 2 : root + 3 + k]):
                    q = drafted[b, valid[b]].tolist().index(root + 2 + k)
                    wanted[k, b, q] += DECAY**k
    torch.testing.assert_close(found, wanted)


def test_align_shifts_step_k_by_k() -> None:
    hidden = torch.randn(3, 2, 5, 4)
    found = align(hidden)
    for k in range(3):
        for q in range(5):
            wanted = hidden[k, :, q - k] if q >= k else torch.zeros(2, 4)
            assert torch.equal(found[k, :, q], wanted)


@pytest.fixture
def drafter(tiny_target: Target) -> Eagle3Drafter:
    torch.manual_seed(2)
    drafter = Eagle3Drafter.for_target(
        tiny_target, draft_vocabulary(torch.arange(15, 90), tiny_target.vocab_size, 50), initializer_range=0.2
    )
    return drafter


def naive_loss(target: Target, drafter: Eagle3Drafter, ids: Tensor, drafted: list[bool], steps: int) -> Tensor:
    """EAGLE-3's loss of one sequence ids [T], one root and one step at a time."""
    features = target.features(ids[None])
    log_p = target.logits(features.hidden[0]).log_softmax(-1)[:, drafter.draft_ids()]  # [T, Vd]
    loss = torch.zeros(())
    for root in range(len(ids) - 2):
        steps_here = 0
        while steps_here < steps and root + 2 + steps_here < len(ids) and drafted[root + 2 + steps_here]:
            steps_here += 1
        if steps_here == 0:
            continue
        path = target.embed(ids[root + 1 : root + 1 + steps_here])[:, None, None]
        hidden = drafter(features.aux, target.embed(ids.roll(-1))[None], torch.tensor([[root]]), path)[:, 0, 0]
        log_q = drafter.lm_head(hidden).log_softmax(-1)
        for k in range(steps_here):
            loss = loss - 0.8**k * (log_p[root + 1 + k].exp() * log_q[k]).sum()
    return loss


def test_the_whole_loss_equals_eagle3_root_by_root(tiny_target: Target, drafter: Eagle3Drafter) -> None:
    steps, T = 4, 22
    ids = torch.randint(tiny_target.vocab_size, (2, T), generator=torch.Generator().manual_seed(4))
    rows = [[False] * T for _ in range(2)]
    for b, spans in enumerate([[(2, 9), (13, 14), (17, 22)], [(5, 12)]]):  # three answers, one of a single token
        for start, end in spans:
            rows[b][start:end] = [True] * (end - start)
    wanted = sum((naive_loss(tiny_target, drafter, ids[b], rows[b], steps) for b in range(2)), torch.zeros(()))
    wanted.backward()
    wanted_grads = {name: weight.grad.clone() for name, weight in drafter.named_parameters()}
    drafter.zero_grad()

    drafted, valid = laid_out(rows)
    features = tiny_target.features(ids)
    before = features.hidden.gather(1, (drafted - 1)[..., None].expand(-1, -1, 32))
    rows_of = HeadTarget(
        before.flatten(0, 1),
        tiny_target.head_weight[drafter.draft_ids()],
        None,
        tiny_target.logits(before).logsumexp(-1).flatten(),
        tiny_target.cap,
        torch.zeros(drafted.numel(), dtype=torch.long),
    )
    weights = step_weights(drafted, valid, steps)
    consumed = (drafted - 1 + torch.arange(steps)[:, None, None]).clamp(max=T - 1)
    path = torch.stack([tiny_target.embed(ids.gather(1, c)) for c in consumed])

    def objective(hidden: Tensor, head: Tensor) -> FusedLoss:
        return fused_loss(align(hidden).flatten(1, 2), head, rows_of, weights.flatten(1))

    found = drafter(features.aux, tiny_target.embed(ids.roll(-1, 1)), drafted - 2, path, objective)
    torch.testing.assert_close(found.loss, wanted, rtol=1e-5, atol=1e-5)
    found.loss.backward()
    for name, weight in drafter.named_parameters():
        torch.testing.assert_close(weight.grad, wanted_grads[name], rtol=1e-3, atol=1e-4, msg=name)
