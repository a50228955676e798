"""What objectives see: one chunk of paths, with what drafter and target say of every step.

Everything is worked out when first asked for, and once.

Legend: K steps, C paths, Vd draft vocabulary.
"""

from functools import cached_property

import torch
from torch import Tensor

from vsd.drafters import of_label


class PathRows:
    """Drafter and target at every step of some paths.

    Attributes:
        log_q: the drafter's log-probabilities, [K, C, Vd].
        p: the target's probabilities over the draft vocabulary, with their true mass, [K, C, Vd].
        labels: draft id of the path's token, [K, C]; -1 where the draft vocabulary lacks it.
        valid: which steps exist, [K, C] bool; a path is valid up to some step and then no more.
        written: whether the tokens are the target's own, as recorded ones are, or drawn from the drafter.
        share: the E-step's weight of every step of every path, [K, C]; 1 for recorded ones.
        old_log_q: what the drafter that training began with says of the path's token, [K, C]; None: nobody asked it.
        group: paths of one anchor follow each other, `group` at a time.
        acceptance: share of first drafted tokens that were accepted lately, 0 … 1.
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
        """`logits` [K, C, Vd] is overwritten; `share` None says that the paths are recorded."""
        self.log_q = logits.sub_(logits.logsumexp(-1, keepdim=True))
        self.p, self.labels, self.valid = p, labels, valid
        self.written = written or share is None
        self.share = torch.ones_like(self.log_q[..., 0]) if share is None else share
        self.old_log_q = old_log_q
        self.group, self.acceptance = group, acceptance

    @cached_property
    def q(self) -> Tensor:
        """The drafter's probabilities, [K, C, Vd]."""
        return self.log_q.exp()

    @cached_property
    def proposed(self) -> Tensor:
        """The drafter's likeliest token, draft id [K, C]."""
        return self.log_q.argmax(-1)

    @cached_property
    def known(self) -> Tensor:
        """Valid steps whose token can be drafted, [K, C] bool."""
        return self.valid & (self.labels >= 0)

    @cached_property
    def label_log_q(self) -> Tensor:
        """log q of the path's token, [K, C]; -inf where it cannot be drafted."""
        return of_label(self.log_q, self.labels, float("-inf"))

    @cached_property
    def label_p(self) -> Tensor:
        """p of the path's token, [K, C]; 0 where it cannot be drafted."""
        return of_label(self.p, self.labels, 0.0)

    @cached_property
    def rank(self) -> Tensor:
        """How many tokens the drafter prefers to the path's, [K, C]; Vd where it cannot be drafted."""
        above = (self.log_q > self.label_log_q[..., None]).sum(-1)
        return torch.where(self.labels >= 0, above, self.log_q.shape[-1])

    @cached_property
    def overlap(self) -> Tensor:
        """Σ_v min(p, q), [K, C]: how often rejection sampling keeps a token drawn from q."""
        return torch.minimum(self.p, self.q).sum(-1)
