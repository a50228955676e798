"""The input of weights and divergences: drafter and target at every step of a chunk of paths.

Derived quantities are computed at their first use and kept.

Legend: K steps, C paths, Vd draft vocabulary.
"""

from functools import cached_property

import torch
from torch import Tensor

from vsd.drafters import of_label


class PathRows:
    """Drafter and target at every step of some paths.

    Attributes:
        log_q: log-probabilities of the drafter, [K, C, Vd].
        p: probabilities of the target over the draft vocabulary, with their true mass (not renormalised), [K, C, Vd].
        labels: draft id of the path's token, [K, C]; -1 where the draft vocabulary lacks it.
        valid: the steps that exist, [K, C] bool; all steps of a path before the first invalid one.
        written: whether the tokens are the target's own, as recorded ones are, or the drafter's.
        share: the E-step's weight of every step, [K, C]; 1 for recorded paths.
        old_log_q: log-probability of the path's token for the drafter at the start of training, [K, C], or None.
        group: paths of one anchor are adjacent, `group` at a time.
        acceptance: running share of accepted first draft tokens, 0 … 1.
    """

    def __init__(
        self,
        logits: Tensor,
        p: Tensor,
        labels: Tensor,
        valid: Tensor,
        *,
        share: Tensor | None = None,
        group: int = 1,
        acceptance: float = 0.0,
        old_log_q: Tensor | None = None,
        written: bool = False,
    ) -> None:
        """`logits` [K, C, Vd] is overwritten. `share` is None for recorded paths."""
        self.log_q = logits.sub_(logits.logsumexp(-1, keepdim=True))
        self.p, self.labels, self.valid = p, labels, valid
        self.written = written or share is None
        self.share = torch.ones_like(self.log_q[..., 0]) if share is None else share
        self.old_log_q = old_log_q
        self.group, self.acceptance = group, acceptance

    @cached_property
    def q(self) -> Tensor:
        """Probabilities of the drafter, [K, C, Vd]."""
        return self.log_q.exp()

    @cached_property
    def proposed(self) -> Tensor:
        """The drafter's most likely token, draft id [K, C]."""
        return self.log_q.argmax(-1)

    @cached_property
    def known(self) -> Tensor:
        """Valid steps whose token is in the draft vocabulary, [K, C] bool."""
        return self.valid & (self.labels >= 0)

    @cached_property
    def label_log_q(self) -> Tensor:
        """log q of the path's token, [K, C]; -inf where the draft vocabulary lacks it."""
        return of_label(self.log_q, self.labels, float("-inf"))

    @cached_property
    def label_p(self) -> Tensor:
        """p of the path's token, [K, C]; 0 where the draft vocabulary lacks it."""
        return of_label(self.p, self.labels, 0.0)

    @cached_property
    def rank(self) -> Tensor:
        """Number of tokens that q ranks above the path's, [K, C]; Vd where the draft vocabulary lacks it."""
        above = (self.log_q > self.label_log_q[..., None]).sum(-1)
        return torch.where(self.labels >= 0, above, self.log_q.shape[-1])

    @cached_property
    def overlap(self) -> Tensor:
        """Σ_v min(p_v, q_v), [K, C]: the probability that rejection sampling accepts a token drawn from q."""
        return torch.minimum(self.p, self.q).sum(-1)
