"""LM head, log-softmax, objective and gradient in one pass over chunks of paths: [tokens, vocab] never exists.

A chunk holds whole paths, so that a step's weight may depend on the steps before and behind it; the target's row for a
token that several paths of the chunk predict is computed once. Gradients are found in the forward pass (the loss is a
sum over paths) and only scaled in the backward pass.

Legend: K steps, R paths, C paths of a chunk, U rows of the target, h hidden, V target and Vd draft vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsd.objective.algebra import Term
from vsd.objective.rows import PathRows

_CHUNK_ROWS = 256  # [256, 8192] in float32 stays in a CPU's last-level cache


class HeadTarget(NamedTuple):
    """The target's side of every row.

    Attributes:
        hidden: its final hidden states, [U, h].
        head, bias: the rows of its LM head that the draft vocabulary has, [Vd, h] and [Vd] or None.
        log_normaliser: logsumexp of its logits over the *whole* vocabulary, at the temperature, [U].
        cap: what it does to logits after the head.
        temperature: at which it is served.
    """

    hidden: Tensor
    head: Tensor
    bias: Tensor | None
    log_normaliser: Tensor
    cap: Callable[[Tensor], Tensor]
    temperature: float = 1.0


class PathTarget(NamedTuple):
    """What R paths predict.

    Attributes:
        labels: draft id of every token, [K, R]; -1 where the draft vocabulary lacks it.
        rows: which of the target's rows predicts it, [K, R].
        valid: which steps exist, [K, R] bool; no step after one that does not.
        share: the E-step's weight of every path, [R], or step, [K, R]; None for recorded paths, which weigh 1.
        group: paths of one anchor follow each other, `group` at a time.
        old_log_q: log-probability of every token for the drafter that training began with, [K, R], if it matters.
        temperature: at which the drafter draws.
        written: whether the tokens are the target's own although they are weighed; recorded ones are.
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
    """`loss`: differentiable sum. Per step: how many `rows` there are, and in how many the argmax is `correct`."""

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
    chunk_rows: int = _CHUNK_ROWS,
) -> FusedLoss:
    """Σ_terms scale · Σ_{k, r} weights · divergence(p, softmax(hidden · headᵀ)).

    Args:
        hidden: the drafter's normed states, [K, R, h].
        head: the drafter's LM head, [Vd, h].
        acceptance: share of first drafted tokens accepted lately, for weights that adapt to it.
    """
    lengths = paths.valid.sum(0).unflatten(0, (-1, paths.group)).amax(-1)  # of the longest path of every anchor
    order = lengths.argsort(descending=True, stable=True)  # like lengths in one chunk
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
    return FusedLoss(*_Fused.apply(hidden[:, alive], head, target, kept, steps, terms, acceptance, chunk_rows))


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
        head_c, target_head = head.to(compute), target.head.to(compute)
        grad_hidden = torch.zeros_like(hidden)
        grad_head = torch.zeros(head.shape, dtype=wide, device=head.device)
        loss = torch.zeros((), dtype=wide, device=head.device)
        correct = torch.zeros(K, device=head.device)
        end = 0
        with torch.autocast(device, enabled=False):
            while end < R:
                start, steps = end, lengths[end // paths.group]
                end = start + max(1, chunk_rows // (steps * paths.group)) * paths.group
                chunk = (slice(steps), slice(start, end))  # what no path of the chunk reaches is not computed
                states = hidden[chunk].reshape(-1, h).to(compute)  # [k C, h]
                logits = (states @ head_c.T).to(wide).view(steps, -1, len(head))  # [k, C, Vd]
                rows = PathRows(
                    _tempered(logits, paths.temperature),
                    _probabilities(target, target_head, paths.rows[chunk], wide),
                    paths.labels[chunk],
                    paths.valid[chunk],
                    share=None if paths.share is None else paths.share[chunk].to(wide),
                    group=paths.group,
                    acceptance=acceptance,
                    written=paths.written,
                    old_log_q=None if paths.old_log_q is None else paths.old_log_q[chunk].to(wide),
                )
                correct[:steps] += ((rows.proposed == rows.labels) & rows.valid).sum(1)
                value, grad_logits = _sum(terms, rows)
                loss += value
                grad_logits = _tempered(grad_logits.view(-1, len(head)), paths.temperature).to(compute)
                grad_hidden[chunk] = (grad_logits @ head_c).view(steps, -1, h).to(hidden.dtype)
                if compute == wide:
                    grad_head.addmm_(grad_logits.T, states)
                else:
                    grad_head += (grad_logits.T @ states).to(wide)
        ctx.save_for_backward(grad_hidden, grad_head.to(head.dtype))
        count = paths.valid.sum(1)
        ctx.mark_non_differentiable(count, correct)  # one call: a second replaces the first
        return loss, count, correct

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grads[0]
        return (
            (grad_hidden * scale).to(grad_hidden.dtype),
            (grad_head * scale).to(grad_head.dtype),
            *[None] * 6,
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
    """Divided in place."""
    return logits if temperature == 1 else logits.div_(temperature)


def _probabilities(target: HeadTarget, head: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The target's p over the draft vocabulary with its true mass, [K, C, Vd], at rows [K, C]."""
    wanted, where = rows.unique(return_inverse=True)
    logits = (target.hidden[wanted].to(head.dtype) @ head.T).to(dtype)
    logits = target.cap(logits if target.bias is None else logits + target.bias.to(dtype))
    return _tempered(logits, target.temperature).sub_(target.log_normaliser[wanted, None].to(dtype)).exp_()[where]
