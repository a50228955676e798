"""LM head, log-softmax, objective and gradient, fused over chunks of paths: no tensor [K, R, Vd] over all paths.

A chunk holds whole paths, so that the weight of a step may depend on all steps of its path. A target row that several
paths of a chunk share is computed once. The loss is a sum over paths, so the forward pass computes the gradients, too,
and the backward pass only scales them.

Legend: K steps, R paths, C paths of a chunk, k steps of a chunk, U rows of the target, h hidden, V target and Vd draft
vocabulary; of a lattice: n candidates, r rank.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsd.chunks import chunk_size
from vsd.drafters.lattice import Candidates, Head, candidates
from vsd.objective.algebra import Term
from vsd.objective.confidence import Confidence, confidence_loss
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
    head: Head,
    target: HeadTarget,
    paths: PathTarget,
    terms: Sequence[Term],
    acceptance: float = 0.0,
    chunk_rows: int | None = None,
    confidence: Confidence | None = None,
) -> FusedLoss:
    """Σ_terms scale · Σ_{k, r} weights · divergence(p, softmax(hidden · headᵀ)).

    Args:
        hidden: the drafter's normed states, [K, R, h].
        head: the drafter's LM head, [Vd, h], or a lattice, on which the loss of the logits without it is added.
        target: the target's distribution at the rows that `paths` refers to.
        paths: R paths.
        terms: of the objective.
        acceptance: running share of accepted first draft tokens, 0 … 1, for weights that adapt to it.
        chunk_rows: steps × paths of a chunk; by default as many as the device computes at once.
        confidence: of the drafter along the paths, [K, R]; its loss is added.
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
    weight, codebook, top_k = (head, None, 0) if isinstance(head, Tensor) else head
    chunk_rows = chunk_rows or max(_LEAST_ROWS, chunk_size(4 * len(weight), weight.device))  # logits are float32
    fused: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Fused.apply
    logits, rule = (None, None) if confidence is None else (confidence.logits[:, alive], confidence.rule)
    fixed = _Fixed(target, kept, steps, terms, acceptance, chunk_rows, top_k, rule)
    return FusedLoss(*fused(hidden[:, alive], weight, codebook, logits, fixed))


class _Fixed(NamedTuple):
    """What has no gradient; `top_k` candidates of a lattice, 0 without one."""

    target: HeadTarget
    paths: PathTarget
    lengths: list[int]
    terms: Sequence[Term]
    acceptance: float
    chunk_rows: int
    top_k: int
    rule: Any


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, codebook: Tensor | None, confidence: Tensor | None, fixed: _Fixed
    ) -> tuple[Tensor, Tensor, Tensor]:
        device, paths, terms = hidden.device.type, fixed.paths, fixed.terms
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
        wide = torch.promote_types(compute, torch.float32)
        (K, R, _), h = hidden.shape, head.shape[1]
        head_c, target = head.to(compute), fixed.target._replace(head=fixed.target.head.to(compute))
        codes_c = None if codebook is None else codebook.to(compute)
        grad_hidden = torch.zeros_like(hidden)
        grad_head = torch.zeros_like(head, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_codes = None if codebook is None else torch.zeros_like(codebook, dtype=wide)
        grad_confidence = None if confidence is None else torch.zeros_like(confidence)
        loss = torch.zeros((), dtype=wide, device=head.device)
        correct = torch.zeros(K, device=head.device)
        chunks = list(_chunks(fixed.lengths, R, paths.group, fixed.chunk_rows))
        distinct = [torch.unique(paths.rows[chunk], return_inverse=True) for chunk in chunks]  # waits for the device
        with torch.autocast(device, enabled=False):
            for chunk, read in zip(chunks, distinct):
                joined = hidden[chunk].flatten(0, 1).to(compute)  # [k C, h + r]
                states, context = joined.tensor_split([h], dim=-1)
                logits = (states @ head_c.T).to(wide)  # [k C, Vd]
                found = None if codes_c is None else candidates(logits, context, codes_c, fixed.top_k)
                p = _probabilities(target, read[0], read[1], wide)
                rows, value, grad_logits, grad_scores = _sums(terms, logits, found, p, chunk, fixed)
                loss += value
                correct[: len(rows.valid)] += ((rows.proposed == rows.labels) & rows.valid).sum(1)
                if confidence is not None and grad_confidence is not None:
                    value, slope = confidence_loss(Confidence(confidence[chunk], fixed.rule), rows)
                    loss += value
                    grad_confidence[chunk] = slope.to(confidence.dtype)
                grad_logits = grad_logits.view(-1, len(head)).to(compute)
                grad_states = grad_logits @ head_c
                if found is not None and grad_scores is not None and grad_codes is not None:
                    scores = grad_scores.flatten(0, 1).to(compute)  # [k C, n]
                    grad_states = torch.cat([grad_states, (scores[:, None] @ found.codes)[:, 0]], dim=-1)
                    edges = scores[..., None] * context[:, None]
                    grad_codes.index_add_(0, found.tokens.flatten(), edges.flatten(0, 1).to(wide))
                grad_hidden[chunk] = grad_states.view(*rows.valid.shape, -1).to(hidden.dtype)
                if grad_head is None:
                    continue
                if compute == wide:
                    grad_head.addmm_(grad_logits.T, states)
                else:
                    grad_head += (grad_logits.T @ states).to(wide)
        grad_head = None if grad_head is None else grad_head.to(head.dtype)
        grad_codes = None if codebook is None or grad_codes is None else grad_codes.to(codebook.dtype)
        ctx.save_for_backward(grad_hidden, grad_head, grad_codes, grad_confidence)
        count = paths.valid.sum(1)
        ctx.mark_non_differentiable(count, correct)  # one call: a second one would replace the first
        return loss, count, correct

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        scaled = [None if grad is None else (grad * grads[0]).to(grad.dtype) for grad in ctx.saved_tensors]
        return (*scaled, None)


def _chunks(lengths: list[int], paths: int, group: int, chunk_rows: int) -> Iterator[tuple[slice, slice]]:
    """Slices of steps and paths, whole anchors each; `lengths` of the anchors fall, later steps are not computed."""
    end = 0
    while end < paths:
        start, steps = end, lengths[end // group]
        end = start + max(1, chunk_rows // (steps * group)) * group
        yield slice(steps), slice(start, end)


def _sums(
    terms: Sequence[Term],
    logits: Tensor,
    found: Candidates | None,
    p: Tensor,
    chunk: tuple[slice, slice],
    fixed: _Fixed,
) -> tuple[PathRows, Tensor, Tensor, Tensor | None]:
    """The chunk's rows under q, loss [], gradient in the logits [k, C, Vd] and, on a lattice, in the scores [k, C, n].

    On a lattice q has n tokens, and the logits of a position alone are trained, too, but only on the target's paths:
    a path of the drafter is drawn from q, not from them.
    """
    labels, temperature = fixed.paths.labels[chunk], fixed.paths.temperature
    if found is None:
        rows = _rows(logits, p, labels, chunk, fixed)
        value, slope = _sum(terms, rows)
        return rows, value, _tempered(slope, temperature), None
    tokens = found.tokens.view(*labels.shape, -1)  # [k, C, n]
    places = (tokens == labels[..., None]).int()
    own = torch.where(places.any(-1), places.argmax(-1), -1)
    rows = _rows(found.scores, p.gather(-1, tokens), own, chunk, fixed)
    value, slope = _sum(terms, rows)
    slope, gradient = _tempered(slope, temperature), torch.zeros_like(p)
    if rows.written:
        more, gradient = _sum(terms, _rows(logits, p, labels, chunk, fixed))
        value, gradient = value + more, _tempered(gradient, temperature)
    return rows, value, gradient.scatter_add_(-1, tokens, slope), slope


def _rows(logits: Tensor, p: Tensor, labels: Tensor, chunk: tuple[slice, slice], fixed: _Fixed) -> PathRows:
    """The chunk's input of the objective; logits [k C, Vd] are overwritten, p is [k, C, Vd], labels are [k, C]."""
    paths, wide = fixed.paths, logits.dtype
    return PathRows(
        _tempered(logits, paths.temperature).view(*labels.shape, -1),
        p,
        labels,
        paths.valid[chunk],
        share=None if paths.share is None else paths.share[chunk].to(wide),
        group=paths.group,
        acceptance=fixed.acceptance,
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
