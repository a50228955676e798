"""LM head, log-softmax, divergence and gradient in one pass over chunks of rows: [tokens, vocab] never exists.

The target's row serves all K steps that predict the same token, so p is computed once for them. Gradients are found
in the forward pass (the loss is a sum over rows) and only scaled in the backward pass.

Legend: K steps, R rows (predicted tokens), C rows of a chunk, h hidden, V target vocabulary, Vd draft vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsd.objective.divergence import Divergence, cross_entropy

_CHUNK_ROWS = 256  # [256, 8192] in float32 stays in a CPU's last-level cache


class HeadTarget(NamedTuple):
    """The target's side of every row.

    Attributes:
        hidden: its final hidden states, [R, h].
        head, bias: the rows of its LM head that the draft vocabulary has, [Vd, h] and [Vd] or None.
        log_normaliser: logsumexp of its logits over the *whole* vocabulary, [R].
        cap: what it does to logits after the head.
        labels: draft id of the recorded token, -1 where the draft vocabulary lacks it, [R].
    """

    hidden: Tensor
    head: Tensor
    bias: Tensor | None
    log_normaliser: Tensor
    cap: Callable[[Tensor], Tensor]
    labels: Tensor


class FusedLoss(NamedTuple):
    """`loss`: weighted sum, differentiable. Per step: `rows` weighted above 0, and those whose argmax is `correct`."""

    loss: Tensor
    rows: Tensor
    correct: Tensor


def fused_loss(
    hidden: Tensor,
    head: Tensor,
    target: HeadTarget,
    weights: Tensor,
    divergence: Divergence = cross_entropy,
    chunk_rows: int = _CHUNK_ROWS,
) -> FusedLoss:
    """Σ weights · divergence(p, softmax(hidden · headᵀ)).

    Args:
        hidden: the drafter's normed states, [K, R, h]; row r of every step predicts the token of target row r.
        head: the drafter's LM head, [Vd, h].
        weights: [K, R]; rows of weight 0 in every step are skipped.
    """
    alive = (weights != 0).any(0).nonzero()[:, 0]
    target = target._replace(
        hidden=target.hidden[alive],
        log_normaliser=target.log_normaliser[alive],
        labels=target.labels[alive],
    )
    return FusedLoss(*_Fused.apply(hidden[:, alive], head, target, weights[:, alive], divergence, chunk_rows))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        target: HeadTarget,
        weights: Tensor,
        divergence: Divergence,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
        wide = torch.promote_types(compute, torch.float32)
        K, R, h = hidden.shape
        weights = weights.to(wide)
        head_c, target_head = head.to(compute), target.head.to(compute)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros(head.shape, dtype=wide, device=head.device)
        loss = torch.zeros((), dtype=wide, device=head.device)
        correct = torch.zeros(K, device=head.device)
        C = max(1, chunk_rows // K)
        with torch.autocast(device, enabled=False):
            for start in range(0, R, C):
                rows = slice(start, start + C)
                p = _probabilities(target, target_head, rows, wide)  # [C, Vd]
                states = hidden[:, rows].reshape(-1, h).to(compute)  # [K C, h]
                z = (states @ head_c.T).to(wide).view(K, -1, p.shape[-1])  # [K, C, Vd]
                alive = weights[:, rows] != 0
                correct += ((z.argmax(-1) == target.labels[rows]) & alive).sum(1)
                value, grad_z = divergence(z, p)
                loss += (weights[:, rows] * value).sum()
                grad_z = grad_z.mul_(weights[:, rows, None]).view(-1, p.shape[-1]).to(compute)
                grad_hidden[:, rows] = (grad_z @ head_c).view(K, -1, h).to(hidden.dtype)
                if compute == wide:
                    grad_head.addmm_(grad_z.T, states)
                else:
                    grad_head += (grad_z.T @ states).to(wide)
        ctx.save_for_backward(grad_hidden, grad_head.to(head.dtype))
        rows_alive = (weights != 0).sum(1)
        ctx.mark_non_differentiable(rows_alive, correct)  # one call: a second replaces the first
        return loss, rows_alive, correct

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grads[0]
        return (
            (grad_hidden * scale).to(grad_hidden.dtype),
            (grad_head * scale).to(grad_head.dtype),
            None,
            None,
            None,
            None,
        )


def _probabilities(target: HeadTarget, head: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """The target's p over the draft vocabulary with its true mass, [C, Vd]."""
    logits = (target.hidden[rows].to(head.dtype) @ head.T).to(dtype)
    logits = target.cap(logits if target.bias is None else logits + target.bias.to(dtype))
    return logits.sub_(target.log_normaliser[rows, None].to(dtype)).exp_()
