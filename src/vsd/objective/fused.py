"""LM head, log-softmax, objective and gradient, fused over chunks of paths: no tensor [K, R, Vd] over all paths.

A chunk holds whole paths, so that the weight of a step may depend on all steps of its path. A target row that several
paths of a chunk share is computed once. The loss is a sum over paths, so the forward pass computes the gradients, too,
and the backward pass only scales them.

Legend: K steps, R paths, C paths of a chunk, k steps of a chunk, U rows of the target, h hidden, V target and Vd draft
vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsd.chunks import chunk_size
from vsd.objective.algebra import Term
from vsd.objective.rows import PathRows

_LEAST_ROWS = 256  # of a chunk: every chunk reads the whole head, and adds to its gradient


class HeadTarget(NamedTuple):
    """The target's distribution at U positions, in the parts that its probabilities are computed from.

    Attributes:
        hidden: final hidden states, [U, h].
        head: rows of the LM head for the draft vocabulary, [Vd, h].
        bias: the same rows of its bias, [Vd], or None.
        log_normaliser: logsumexp of the logits over the *whole* vocabulary, at the temperature, [U].
        cap: soft cap of the logits, or the identity.
        temperature: of serving.
    """

    hidden: Tensor
    head: Tensor
    bias: Tensor | None
    log_normaliser: Tensor
    cap: Callable[[Tensor], Tensor]
    temperature: float = 1.0


class PathTarget(NamedTuple):
    """The tokens of R paths, and the target's row that predicts each.

    Attributes:
        labels: draft id of every token, [K, R]; -1 where the draft vocabulary lacks it.
        rows: index of the target's row that predicts the token, [K, R].
        valid: the steps that exist, [K, R] bool; all steps of a path before the first invalid one.
        share: the E-step's weight of every path, [R], or step, [K, R]; None for recorded paths: 1.
        group: paths of one anchor are adjacent, `group` at a time.
        old_log_q: log-probability of every token for the drafter at the start of training, [K, R]; None if unused.
        temperature: of the drafter's distribution q.
        written: whether the tokens are the target's own although paths have shares; recorded ones always are.
    """

    labels: Tensor
    rows: Tensor
    valid: Tensor
    share: Tensor | None = None
    group: int = 1
    old_log_q: Tensor | None = None
    temperature: float = 1.0
    written: bool = False


class FusedLoss(NamedTuple):
    """Outcome of `fused_loss`.

    Attributes:
        loss: differentiable sum over all terms, paths and steps, [].
        rows: number of valid paths at every step, [K].
        correct: number of these where the drafter's most likely token is the path's, [K].
    """

    loss: Tensor
    rows: Tensor
    correct: Tensor


def fused_loss(
    hidden: Tensor,
    head: Tensor,
    target: HeadTarget,
    paths: PathTarget,
    terms: Sequence[Term],
    acceptance: float = 0.0,
    chunk_rows: int | None = None,
) -> FusedLoss:
    """Σ_terms scale · Σ_{k, r} weights · divergence(p, softmax(hidden · headᵀ)).

    Args:
        hidden: the drafter's normed states, [K, R, h].
        head: the drafter's LM head, [Vd, h].
        target: the target's distribution at the rows that `paths` refers to.
        paths: R paths.
        terms: of the objective.
        acceptance: running share of accepted first draft tokens, 0 … 1, for weights that adapt to it.
        chunk_rows: steps × paths of a chunk; by default as many as the device computes at once.
    """
    lengths = paths.valid.sum(0).view(-1, paths.group).amax(-1)  # of the longest path of every anchor
    order = lengths.argsort(descending=True, stable=True)  # paths of similar length share a chunk
    steps = lengths[order].tolist()
    order = order[: sum(step > 0 for step in steps)]
    alive = (order[:, None] * paths.group + torch.arange(paths.group, device=order.device)).flatten()
    kept = paths._replace(
        labels=paths.labels[:, alive],
        rows=paths.rows[:, alive],
        valid=paths.valid[:, alive],
        share=None if paths.share is None else paths.share.expand_as(paths.labels)[:, alive],
        old_log_q=None if paths.old_log_q is None else paths.old_log_q[:, alive],
    )
    chunk_rows = chunk_rows or max(_LEAST_ROWS, chunk_size(4 * len(head), head.device))  # logits are float32
    fused: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Fused.apply
    return FusedLoss(*fused(hidden[:, alive], head, target, kept, steps, terms, acceptance, chunk_rows))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        target: HeadTarget,
        paths: PathTarget,
        lengths: list[int],
        terms: Sequence[Term],
        acceptance: float,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
        wide = torch.promote_types(compute, torch.float32)
        K, R, h = hidden.shape
        head_c, target = head.to(compute), target._replace(head=target.head.to(compute))
        grad_hidden = torch.zeros_like(hidden)
        grad_head = torch.zeros_like(head, dtype=wide) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), dtype=wide, device=head.device)
        correct = torch.zeros(K, device=head.device)
        chunks = list(_chunks(lengths, R, paths.group, chunk_rows))
        distinct = [torch.unique(paths.rows[chunk], return_inverse=True) for chunk in chunks]  # waits for the device
        with torch.autocast(device, enabled=False):
            for chunk, read in zip(chunks, distinct):
                states = hidden[chunk].reshape(-1, h).to(compute)  # [k C, h]
                logits = (states @ head_c.T).to(wide)  # [k C, Vd]
                rows = _rows(logits, _probabilities(target, read[0], read[1], wide), paths, chunk, acceptance)
                value, grad_logits = _sum(terms, rows)
                loss += value
                correct[: len(rows.valid)] += ((rows.proposed == rows.labels) & rows.valid).sum(1)
                grad_logits = _tempered(grad_logits.view(-1, len(head)), paths.temperature).to(compute)
                grad_hidden[chunk] = (grad_logits @ head_c).view(*rows.valid.shape, h).to(hidden.dtype)
                if grad_head is None:
                    continue
                if compute == wide:
                    grad_head.addmm_(grad_logits.T, states)
                else:
                    grad_head += (grad_logits.T @ states).to(wide)
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        count = paths.valid.sum(1)
        ctx.mark_non_differentiable(count, correct)  # one call: a second one would replace the first
        return loss, count, correct

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grads[0]
        return (
            (grad_hidden * scale).to(grad_hidden.dtype),
            None if grad_head is None else (grad_head * scale).to(grad_head.dtype),
            *[None] * 6,
        )


def _chunks(lengths: list[int], paths: int, group: int, chunk_rows: int) -> Iterator[tuple[slice, slice]]:
    """Slices of steps and paths, whole anchors each; `lengths` of the anchors fall, later steps are not computed."""
    end = 0
    while end < paths:
        start, steps = end, lengths[end // group]
        end = start + max(1, chunk_rows // (steps * group)) * group
        yield slice(steps), slice(start, end)


def _rows(
    logits: Tensor, target_p: Tensor, paths: PathTarget, chunk: tuple[slice, slice], acceptance: float
) -> PathRows:
    """The chunk's input of the objective; logits [k C, Vd] are overwritten, target_p is [k, C, Vd]."""
    labels, wide = paths.labels[chunk], logits.dtype  # [k, C]
    return PathRows(
        _tempered(logits, paths.temperature).view(*labels.shape, -1),
        target_p,
        labels,
        paths.valid[chunk],
        share=None if paths.share is None else paths.share[chunk].to(wide),
        group=paths.group,
        acceptance=acceptance,
        written=paths.written,
        old_log_q=None if paths.old_log_q is None else paths.old_log_q[chunk].to(wide),
    )


def _sum(terms: Sequence[Term], rows: PathRows) -> tuple[Tensor, Tensor]:
    """Loss [] and gradient [K, C, Vd] of all terms."""
    loss, gradient = rows.log_q.new_zeros(()), None
    for term in terms:
        weights = term.scale * rows.share * term.weights(rows)
        value, slope = term.divergence(rows)
        loss = loss + (weights * value).sum()
        slope = slope.mul_(weights[..., None])
        gradient = slope if gradient is None else gradient.add_(slope)
    assert gradient is not None
    return loss, gradient


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits divided by the temperature, in place."""
    return logits if temperature == 1 else logits.div_(temperature)


def _probabilities(target: HeadTarget, distinct: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
    """The target's p over the draft vocabulary with its true mass, [k, C, Vd], at rows distinct[inverse], [k, C]."""
    logits = (target.hidden[distinct].to(target.head.dtype) @ target.head.T).to(dtype)
    logits = target.cap(logits if target.bias is None else logits + target.bias.to(dtype))
    log_normaliser = target.log_normaliser[distinct, None].to(dtype)
    return _tempered(logits, target.temperature).sub_(log_normaliser).exp_()[inverse]
