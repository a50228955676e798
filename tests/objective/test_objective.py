"""The fused loss of every objective against its plain formula, and the (root, step) pairs that are trained."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import along as helper
from vsd import chunks
from vsd.chunks import chunk_size
from vsd.drafters import draft_vocabulary
from vsd.drafters.eagle3 import Eagle3Drafter
from vsd.objective import (
    OBJECTIVES,
    Continued,
    FusedLoss,
    HeadTarget,
    PathTarget,
    Recorded,
    Term,
    fused,
    fused_loss,
    objective,
)
from vsd.objective.distillspec import distillspec
from vsd.paths import Paths, cut, longest_first, recorded
from vsd.targets import Target

V, VD, H, S = 30, 12, 6, 4
EAGLE3 = objective("eagle3").parts[0].terms


class Case(NamedTuple):
    """Drafter, target and paths of one loss; log_p [U, Vd] are the target's log-probabilities, of true mass."""

    hidden: Tensor
    head: Tensor
    target: HeadTarget
    paths: PathTarget
    log_p: Tensor


def case(
    steps: int,
    count: int,
    cap: float | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    drafted: bool = False,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randperm(V, generator=g)[:VD].sort().values
    full_head = torch.randn(V, H, generator=g, dtype=dtype) * 2
    states = torch.randn(count + 5, H, generator=g, dtype=dtype)
    bias = torch.randn(V, generator=g, dtype=dtype)
    logits = states @ full_head.T + bias
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    lengths = torch.randint(0, steps + 1, (count,), generator=g)  # some paths have no step at all
    if drafted:
        lengths = lengths.clamp(min=1)
    valid = torch.arange(steps)[:, None] < lengths
    labels = torch.randint(0 if drafted else -1, VD, (steps, count), generator=g)
    share = torch.rand(count, generator=g, dtype=dtype) if drafted else None
    return Case(
        torch.randn(steps, count, H, generator=g, dtype=dtype).requires_grad_(),
        torch.randn(VD, H, generator=g, dtype=dtype).requires_grad_(),
        HeadTarget(
            states,
            full_head[ids],
            bias[ids],
            logits.logsumexp(-1),
            lambda x: x if cap is None else cap * torch.tanh(x / cap),
        ),
        PathTarget(labels, torch.randint(count + 5, (steps, count), generator=g), valid, share, S if drafted else 1),
        logits[:, ids] - logits.logsumexp(-1, keepdim=True),
    )


# ---- plain formulas, one path and one step at a time: (log_q [Vd] per step, p [Vd] per step, label per step) -> loss

Path = list[tuple[Tensor, Tensor, int]]


def likelihood(log_q: Tensor, label: int) -> Tensor:
    return -log_q[label] if label >= 0 else log_q.new_zeros(())


def q_of(log_q: Tensor, label: int) -> float:
    return float(log_q[label].detach().exp()) if label >= 0 else 0.0


def ce(log_q: Tensor, p: Tensor) -> Tensor:
    return -(p * log_q).sum()


def overlap(log_q: Tensor, p: Tensor) -> Tensor:
    return torch.minimum(p, log_q.exp()).sum()


def credits(a: list[float]) -> list[float]:
    """Σ_{k≥t} Π_{i≤k} a_i."""
    kappa = [float(torch.tensor(a[: k + 1], dtype=torch.float64).prod()) for k in range(len(a))]
    return [sum(kappa[t:]) for t in range(len(a))]


def plain_eagle3(path: Path) -> Tensor:
    return sum((0.8**k * ce(log_q, p) for k, (log_q, p, _) in enumerate(path)), torch.zeros(()))


def plain_lk_alpha(path: Path) -> Tensor:
    return sum((-(0.8**k) * overlap(log_q, p).log() for k, (log_q, p, _) in enumerate(path)), torch.zeros(()))


def plain_lk_lambda(path: Path) -> Tensor:
    loss = torch.zeros(())
    for k, (log_q, p, _) in enumerate(path):
        alpha = overlap(log_q, p)
        mix = torch.exp(-3 * alpha.detach())
        loss = loss + 0.8**k * (mix * (p * (p.log() - log_q)).sum() + (1 - mix) * (1 - alpha))
    return loss


def plain_dpace(path: Path) -> Tensor:
    weights = credits([0.5 + 0.5 * q_of(log_q, label) for log_q, _, label in path])
    return sum((w * likelihood(log_q, label) for w, (log_q, _, label) in zip(weights, path)), torch.zeros(()))


def plain_vat(path: Path) -> Tensor:
    loss, since = torch.zeros(()), None
    for log_q, p, label in path:
        since = since + 1 if since is not None else 0 if int(log_q.argmax()) != label else None
        loss = loss + 0.8 ** (since or 0) * (ce(log_q, p) + likelihood(log_q, label))
    return loss


def plain_griffin(path: Path) -> Tensor:
    loss = torch.zeros(())
    for log_q, p, label in path:
        best = p.topk(10).indices
        loss = loss + ce(log_q, p) + 5 * ce(log_q[best], p[best])
        if label not in log_q.topk(3).indices.tolist():
            break
    return loss


def plain_vispec(path: Path) -> Tensor:
    """Σ |p - q| over the whole vocabulary: q has nothing outside the draft vocabulary."""
    loss = torch.zeros(())
    for log_q, p, _ in path:
        loss = loss + 10 * ((p - log_q.exp()).abs().sum() + 1 - p.sum())
        left = p.argsort(descending=True).tolist()[:10]
        while left:
            loss = loss - 0.1 * log_q[left].log_softmax(0)[0]
            left = left[1:]
    return loss


def plain_vsd(path: Path, hard: bool = False) -> Tensor:
    """ARW and CAR at temperature 0; the running acceptance is 0.6."""
    a = [0.4 + 0.6 * q_of(log_q, label) for log_q, _, label in path]
    loss, reach = torch.zeros(()), 1.0
    for w, a_t, (log_q, p, label) in zip(credits(a), a, path):
        loss = loss + (w * likelihood(log_q, label) if hard else w / a_t * ce(log_q, p))
        loss = loss + 0.5 * p.max() * reach * ce(log_q, p)
        reach *= a_t
    return loss


def plain_vsd_hard(path: Path) -> Tensor:
    return plain_vsd(path, hard=True)


def plain_vsd_tree(path: Path) -> Tensor:
    """Tree survival with its edge at -3 nats, smoothed by α = 0.2; no CAR."""
    loss, score, edges = torch.zeros(()), 0.0, []
    for log_q, _, label in path:
        score += float(log_q[label].detach()) if label >= 0 else -50.0
        kappa = 1 / (1 + float(torch.tensor(-(score + 3) / 1.5, dtype=torch.float64).exp()))
        edges.append(4 * kappa * (1 - kappa))
    for t, (log_q, _, label) in enumerate(path):
        loss = loss + (0.2 * 0.8**t + 0.8 * sum(edges[t:])) * likelihood(log_q, label)
    return loss


PLAIN: list[tuple[str, dict, Callable[[Path], Tensor]]] = [
    ("eagle3", {}, plain_eagle3),
    ("lk_alpha", {}, plain_lk_alpha),
    ("lk_lambda", {}, plain_lk_lambda),
    ("dpace", {}, plain_dpace),
    ("vat", {}, plain_vat),
    ("griffin", {}, plain_griffin),
    ("vispec", {}, plain_vispec),
    ("vsd", {"arw": True, "car": 0.5}, plain_vsd),
    ("vsd", {"arw": True, "car": 0.5, "hard": True}, plain_vsd_hard),
    ("vsd", {"arw": True, "hard": True, "cut": -3.0, "width": 1.5, "alpha": 0.2}, plain_vsd_tree),
]


def summed(c: Case, formula: Callable[[Path], Tensor]) -> Tensor:
    """Σ over paths of share × a plain formula, differentiable in hidden and head."""
    log_q = torch.log_softmax(c.hidden @ c.head.T, dim=-1)  # [K, R, Vd]
    total = torch.zeros((), dtype=torch.float64)
    for r in range(log_q.shape[1]):
        path = [
            (log_q[k, r], c.log_p[c.paths.rows[k, r]].exp(), int(c.paths.labels[k, r]))
            for k in range(len(log_q))
            if c.paths.valid[k, r]
        ]
        total = total + (1.0 if c.paths.share is None else c.paths.share[r]) * formula(path)
    return total


def assert_formula(
    c: Case, terms: tuple[Term, ...], formula: Callable[[Path], Tensor], acceptance: float = 0.6, chunk_rows: int = 7
) -> None:
    """The fused loss and its gradients are those of the plain formula."""
    wanted = summed(c, formula)
    wanted_grads = torch.autograd.grad(3.0 * wanted, [c.hidden, c.head])
    found = fused_loss(c.hidden, c.head, c.target, c.paths, terms, acceptance, chunk_rows)
    torch.testing.assert_close(found.loss, wanted)
    for mine, theirs in zip(torch.autograd.grad(3.0 * found.loss, [c.hidden, c.head]), wanted_grads):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("name", "options", "formula"), PLAIN, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("chunk_rows", [1, 7, 256])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_value_and_gradients_equal_the_plain_formula(
    name: str, options: dict, formula: Callable[[Path], Tensor], chunk_rows: int, cap: float | None
) -> None:
    assert_formula(case(4, 17, cap), objective(name, options).parts[0].terms, formula, chunk_rows=chunk_rows)


@pytest.mark.parametrize("divergence", ["fkl", "rkl", "jsd", "tv"])
def test_distillation_on_drafted_paths(divergence: str) -> None:
    def formula(path: Path) -> Tensor:
        loss = torch.zeros(())
        for log_q, p, _ in path:
            q, m = log_q.exp(), (p + log_q.exp()) / 2
            if divergence == "fkl":
                loss = loss + ce(log_q, p)
            elif divergence == "rkl":
                loss = loss + (q * (log_q - p.log())).sum()
            elif divergence == "jsd":
                loss = loss + ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
            else:
                loss = loss + 1 - overlap(log_q, p)
        return loss

    assert_formula(case(3, 4 * S, drafted=True), distillspec(divergence, S).parts[0].terms, formula)


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({}, plain_eagle3),
        ({"rule": "target"}, plain_eagle3),
        ({"rule": "rejection"}, plain_lk_lambda),
        ({"arw": True, "car": 0.5}, plain_vsd),
        ({"rule": "target", "arw": True, "car": 0.5}, plain_vsd),
    ],
)
def test_vsd_trains_recorded_paths_and_continuations_by_their_share(
    options: dict, formula: Callable[[Path], Tensor]
) -> None:
    """A continuation counts like recorded text, with acceptances of the target's own tokens, times its share."""
    recorded_part, continued_part = objective("vsd", options).parts
    assert (recorded_part.paths, continued_part.paths) == (Recorded(), Continued(16, 16, 4, weight=2.0))
    assert_formula(case(4, 17), recorded_part.terms, formula)
    c = case(4, 17, drafted=True)
    assert_formula(c._replace(paths=c.paths._replace(group=1, written=True)), continued_part.terms, formula)


def test_arw_of_drafted_paths_under_rule_target() -> None:
    """a = p(z); label p; weight share · Σ_{k≥t} κ_k / a_t on smoothed acceptances."""
    c = case(3, 4 * S, drafted=True)
    part = objective("vsd", {"rule": "target", "arw": True, "alpha": 0.3, "e_step": "drafted"}).parts[1]
    log_q = torch.log_softmax(c.hidden @ c.head.T, dim=-1)
    wanted = torch.zeros((), dtype=torch.float64)
    assert c.paths.share is not None
    for r in range(4 * S):
        steps = [k for k in range(3) if c.paths.valid[k, r]]
        p = [c.log_p[c.paths.rows[k, r]].exp() for k in steps]
        a = [0.3 + 0.7 * float(p[k][c.paths.labels[k, r]]) for k in steps]
        for k in steps:
            wanted = wanted + c.paths.share[r] * credits(a)[k] / a[k] * ce(log_q[k, r], p[k])
    found = fused_loss(c.hidden, c.head, c.target, c.paths, part.terms, chunk_rows=5)
    torch.testing.assert_close(found.loss, wanted)


def plain_vsd_rejection(path: Path) -> Tensor:
    """Reach × LK's hybrid, and likelihood × the tokens ahead where q < p; the running acceptance is 0.6, no CAR."""
    a = [0.4 + 0.6 * min(1.0, q_of(log_q, label) / float(p[label])) if label >= 0 else 0.4 for log_q, p, label in path]
    loss, reach = torch.zeros(()), 1.0
    for t, (log_q, p, label) in enumerate(path):
        alpha = overlap(log_q, p)
        mix = torch.exp(-3 * alpha.detach())
        loss = loss + reach * (mix * (p * (p.log() - log_q)).sum() + (1 - mix) * (1 - alpha))
        reach *= a[t]
        ahead = sum(reach * math.prod(a[t + 1 : k + 1]) for k in range(t + 1, len(a)))
        if label >= 0 and q_of(log_q, label) < float(p[label]):
            loss = loss + ahead * likelihood(log_q, label)
    return loss


def test_arw_for_rejection_equals_the_plain_formula() -> None:
    """With tokens outside the draft vocabulary among the labels."""
    c = case(4, 17)
    assert (c.paths.labels < 0).any()
    assert_formula(c, objective("vsd", {"rule": "rejection", "arw": True}).parts[0].terms, plain_vsd_rejection)


def test_a_pruned_vocabulary_keeps_the_true_mass() -> None:
    """Renormalised p would give another value here: half of the mass is outside."""
    c = case(2, 9)
    mass = c.log_p.exp().sum(-1)
    assert mass.min() < 0.5
    renormalised = summed(c._replace(log_p=c.log_p - mass.log()[:, None]), plain_eagle3)
    assert abs(fused_loss(*c[:4], EAGLE3).loss - renormalised) > 0.1 * renormalised


def test_gradcheck() -> None:
    c = case(2, 5, cap=4.0)
    assert torch.autograd.gradcheck(
        lambda hidden, head: fused_loss(hidden, head, c.target, c.paths, EAGLE3, chunk_rows=3).loss, (c.hidden, c.head)
    )


class Operations(TorchDispatchMode):
    """Name and shape of the result of every operation on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, (tuple, list)) else out
        self.found.append((func.__name__, tuple(first.shape) if isinstance(first, Tensor) else ()))
        return out


def test_a_frozen_head_gets_no_gradient_and_none_is_computed() -> None:
    c = case(3, 13)
    trained, frozen = (fused_loss(c.hidden, head, *c[2:4], EAGLE3, chunk_rows=8) for head in (c.head, c.head.detach()))
    assert torch.equal(trained.loss, frozen.loss)
    mine, theirs = (torch.autograd.grad(found.loss, c.hidden)[0] for found in (frozen, trained))
    assert torch.equal(mine, theirs)
    counts = []
    for head in (c.head, c.head.detach()):
        with Operations() as operations:
            fused_loss(c.hidden, head, *c[2:4], EAGLE3, chunk_rows=8)
        made = ("zeros_like.default", "addmm_.default")  # the gradient, and what every chunk adds
        counts.append(sum(name in made and shape == c.head.shape for name, shape in operations.found))
    assert counts[0] > 2 and counts[1] == 0


def test_the_device_is_not_waited_for_between_chunks() -> None:
    """Operations whose result has a size that depends on values come before all products."""
    c = case(3, 30)
    with Operations() as operations:
        fused_loss(*c[:4], EAGLE3, chunk_rows=8)
    names = [name for name, _ in operations.found]
    sizes = [i for i, name in enumerate(names) if name.startswith(("_unique", "unique", "nonzero", "_local_scalar"))]
    products = [i for i, name in enumerate(names) if name.startswith(("mm", "addmm"))]
    assert len(products) > 6 and max(sizes) < min(products)


def test_chunks_have_as_many_rows_as_the_device_computes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU 256 rows of a vocabulary of 8192; never fewer, as every chunk reads the head."""
    rows: list[int] = []
    real = fused._chunks

    def spy(lengths: list[int], paths: int, group: int, chunk_rows: int) -> Any:
        rows.append(chunk_rows)
        return real(lengths, paths, group, chunk_rows)

    monkeypatch.setattr(fused, "_chunks", spy)
    c = case(2, 5)
    for size in (len(c.head), 4096):
        monkeypatch.setitem(chunks._BYTES, "cpu", size * 4 * 300)
        fused_loss(*c[:4], EAGLE3)
    monkeypatch.setitem(chunks._BYTES, "cpu", 1)
    fused_loss(*c[:4], EAGLE3)
    assert rows == [300, 4096 * 300 // len(c.head), 256]
    monkeypatch.undo()
    assert [chunk_size(4 * 8192, torch.device(name)) for name in ("cpu", "cuda")] == [256, 8192]


def test_counters_count_trained_rows_and_correct_proposals() -> None:
    c = case(3, 40)
    found = fused_loss(*c[:4], EAGLE3, chunk_rows=8)
    best = (c.hidden @ c.head.T).argmax(-1)
    for k in range(3):
        paths = [r for r in range(40) if c.paths.valid[k, r]]
        assert found.rows[k] == len(paths)
        assert found.correct[k] == sum(int(best[k, r]) == int(c.paths.labels[k, r]) for r in paths)
    assert found.correct.sum() > 0
    assert not found.correct.requires_grad and not found.rows.requires_grad


def test_a_loss_without_valid_steps_is_zero() -> None:
    c = case(2, 5)
    found = fused_loss(*c[:3], c.paths._replace(valid=torch.zeros_like(c.paths.valid)), EAGLE3)
    found.loss.backward()
    assert found.loss == 0 and not c.hidden.grad.any() and not c.head.grad.any()


@pytest.mark.parametrize(("name", "options"), [("eagle3", {}), ("vsd", {"arw": True, "car": 0.5})])
def test_autocast_bfloat16_is_close_to_float32(name: str, options: dict) -> None:
    c = case(3, 64, dtype=torch.float32)
    terms = objective(name, options).parts[0].terms
    exact = fused_loss(*c[:4], terms)
    exact_grads = torch.autograd.grad(exact.loss, [c.hidden, c.head])
    with torch.autocast("cpu", torch.bfloat16):
        rough = fused_loss(*c[:4], terms)
    assert rough.loss.dtype == torch.float32
    torch.testing.assert_close(rough.loss, exact.loss, rtol=2e-2, atol=0)
    assert rough.loss != exact.loss  # it did compute in bfloat16
    for mine, theirs in zip(torch.autograd.grad(rough.loss, [c.hidden, c.head]), exact_grads):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 5e-2 * theirs.norm()


EVERY_WAY: list[tuple[str, dict]] = [
    *((name, {}) for name in OBJECTIVES),
    ("vsd", {"arw": True, "car": 0.5}),
    ("vsd", {"arw": True, "hard": True}),
    ("vsd", {"arw": True, "cut": -3.0, "car": 0.5}),
    ("vsd", {"arw": True, "smoothing": 0.3}),
    ("vsd", {"rule": "rejection"}),
    ("vsd", {"rule": "rejection", "arw": True, "car": 0.5}),
    ("vsd", {"rule": "rejection", "arw": True, "e_step": "drafted"}),
    ("vsd", {"rule": "target", "arw": True, "e_step": "drafted"}),
    ("vsd", {"rule": "target", "e_step": "trees", "car": 0.5}),
    ("elbo", {"rule": "target"}),
    *(("distillspec", {"divergence": divergence}) for divergence in ("rkl", "jsd", "tv")),
]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.sampled_from(EVERY_WAY), st.integers(1, 6), st.integers(0, 10**6), st.floats(1, 200))
def test_extreme_logits_give_finite_gradients(way: tuple[str, dict], steps: int, seed: int, scale: float) -> None:
    """Ties, probabilities that underflow to 0, labels outside the vocabulary, certain drafters and targets."""
    for part in objective(*way).parts:
        c = case(steps, 2 * S, dtype=torch.float32, seed=seed, drafted=not isinstance(part.paths, Recorded))
        old_log_q = -torch.rand(c.paths.labels.shape, generator=torch.Generator().manual_seed(seed)) * scale
        hidden = (c.hidden.detach() * scale).requires_grad_()
        hidden.data[:, 0] = 0  # all logits tie
        target = c.target._replace(hidden=c.target.hidden * scale)
        full = target.hidden @ torch.cat([target.head, -target.head]).T
        target = target._replace(log_normaliser=full.logsumexp(-1), bias=None)
        paths = c.paths._replace(old_log_q=old_log_q, written=part.paths.written)
        found = fused_loss(hidden, c.head, target, paths, part.terms, acceptance=0.5)
        grads = torch.autograd.grad(found.loss, [hidden, c.head])
        assert found.loss.isfinite() and all(grad.isfinite().all() for grad in grads)


# ---- the token that each root and step predicts

masks = st.lists(
    st.lists(st.booleans(), min_size=1, max_size=14).map(lambda mask: [False, False, *mask]).filter(any),
    min_size=1,
    max_size=3,
)


def laid_out(rows: list[list[bool]]) -> tuple[Tensor, Tensor]:
    """Positions of drafted tokens [B, Q], padded with 2 as by the collator, and the mask [B, Q] without padding."""
    positions = [[t for t, drafted in enumerate(row) if drafted] for row in rows]
    Q = max(map(len, positions))
    drafted = torch.tensor([row + [2] * (Q - len(row)) for row in positions])
    return drafted, torch.tensor([[True] * len(row) + [False] * (Q - len(row)) for row in positions])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(masks, st.integers(1, 6))
def test_recorded_paths_by_hand(rows: list[list[bool]], steps: int) -> None:
    """Root r drafts r + 2, r + 3, …; step k counts if all of its tokens so far are drafted when served."""
    drafted, real = laid_out(rows)
    ids = torch.arange(3 * 16).view(3, 16)[: len(rows)]
    paths = recorded(ids, drafted, real, steps)
    found = {
        (b, int(paths.roots[b, q]), k, int(paths.tokens[b, q, k]), int(paths.rows[b, q, k]))
        for b, q, k in paths.valid.nonzero().tolist()
    }
    wanted = {
        (b, root, k, int(ids[b, root + 2 + k]), b * drafted.shape[1] + drafted[b].tolist().index(root + 2 + k))
        for b, row in enumerate(rows)
        for root in range(len(row))
        for k in range(steps)
        if root + 2 + k < len(row) and all(row[root + 2 : root + 3 + k])
    }
    assert found == wanted


@settings(max_examples=100, deadline=None, derandomize=True)
@given(masks, st.integers(1, 5), st.integers(0, 10**6))
def test_cut_paths_are_prefixes_longest_first(rows: list[list[bool]], steps: int, seed: int) -> None:
    drafted, real = laid_out(rows)
    ids = torch.arange(3 * 16).view(3, 16)[: len(rows)]
    whole = recorded(ids, drafted, real, steps)
    g = torch.Generator().manual_seed(seed)
    shorter = cut(whole, *torch.rand(2, *whole.valid.shape, generator=g))
    assert torch.equal(shorter.valid[..., 0], whole.valid[..., 0])
    assert not (shorter.valid & ~whole.valid).any()
    ordered = longest_first(shorter)
    assert (ordered.valid.long().diff(dim=-1) <= 0).all()
    assert (ordered.valid.sum(-1).diff(dim=1) <= 0).all()

    def content(paths: Paths) -> set[tuple[int, ...]]:
        found = paths.valid.nonzero().tolist()
        return {
            (b, int(paths.roots[b, p]), k, int(paths.tokens[b, p, k]), int(paths.rows[b, p, k])) for b, p, k in found
        }

    assert content(ordered) == content(shorter)
    for k, width in enumerate(ordered.widths()):
        assert not ordered.valid[:, width:, k:].any()
        assert width == 0 or ordered.valid[:, width - 1, k].any()


def test_cut_paths_survive_with_the_given_probability() -> None:
    ids = torch.arange(10_002)[None]
    drafted = torch.arange(2, 10_002)[None]
    whole = recorded(ids, drafted, torch.ones_like(drafted, dtype=torch.bool), 3)
    shape = whole.valid.shape
    shorter = cut(whole, torch.full(shape, 0.6), torch.rand(shape, generator=torch.Generator().manual_seed(0)))
    reached = shorter.valid[0].double().mean(0)
    for k in range(3):
        assert abs(float(reached[k]) - 0.6**k) < 5 * (0.25 / 10_000) ** 0.5


@pytest.fixture
def drafter(tiny_target: Target) -> Eagle3Drafter:
    torch.manual_seed(2)
    drafter = Eagle3Drafter.for_target(
        tiny_target, draft_vocabulary(torch.arange(15, 90), tiny_target.vocab_size, 50), initializer_range=0.2
    )
    return drafter


def naive_loss(target: Target, drafter: Eagle3Drafter, ids: Tensor, drafted: list[bool], steps: int) -> Tensor:
    """EAGLE-3's loss of one sequence ids [T], one root and one step at a time."""
    features = target.features(helper.text(ids[None]))
    entries = helper.entries(target, ids[None], drafter.needs.layers)
    log_p = target.logits(features.hidden[0]).log_softmax(-1)[:, drafter.vocabulary.ids]  # [T, Vd]
    loss = torch.zeros(())
    for root in range(len(ids) - 2):
        steps_here = 0
        while steps_here < steps and root + 2 + steps_here < len(ids) and drafted[root + 2 + steps_here]:
            steps_here += 1
        if steps_here == 0:
            continue
        path = helper.paths(torch.tensor([[root]]), ids[None, None, root + 2 : root + 2 + steps_here])
        hidden = helper.states(drafter, entries, path)[:, 0, 0]
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
    features = tiny_target.features(helper.text(ids))
    before = features.hidden.gather(1, (drafted - 1)[..., None].expand(-1, -1, 32))
    rows_of = HeadTarget(
        before.flatten(0, 1),
        tiny_target.head_weight[drafter.vocabulary.ids],
        None,
        tiny_target.logits(before).logsumexp(-1).flatten(),
        tiny_target.cap,
    )
    paths = recorded(ids, drafted, valid, steps)
    predicted = PathTarget(
        torch.zeros(steps, drafted.numel(), dtype=torch.long),
        paths.rows.flatten(0, 1).T,
        paths.valid.flatten(0, 1).T,
    )

    def loss(hidden: Tensor, head: Tensor) -> FusedLoss:
        return fused_loss(hidden.flatten(1, 2), head, rows_of, predicted, EAGLE3)

    found = drafter(helper.entries(tiny_target, ids, drafter.needs.layers), paths, loss)
    torch.testing.assert_close(found.loss, wanted, rtol=1e-5, atol=1e-5)
    found.loss.backward()
    for name, weight in drafter.named_parameters():
        torch.testing.assert_close(weight.grad, wanted_grads[name], rtol=1e-3, atol=1e-4, msg=name)
