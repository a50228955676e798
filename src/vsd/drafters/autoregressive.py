"""Drafting token by token: q(z_t | x, z_<t) comes from one small pass a level of the tree.

Legend: B batch, P paths, K steps, W nodes of a level, S nodes drafted before and in this pass, h hidden, Vd draft
vocabulary.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from vsd.drafters.base import Objective
from vsd.drafters.proposals import Conditional, Conditionals, Proposals
from vsd.paths import Entries, Paths, TreeShape


class Autoregressive(Proposals):
    """A drafter that drafts one token after another.

    The state of such a drafter holds `hidden` [B, 1, h], its output for the root.
    """

    lm_head: Any

    @abstractmethod
    def states(self, entries: Entries, paths: Paths) -> Tensor:
        """Its states along given paths, [K, B, P, h]; `lm_head` of row k predicts the path's token k."""

    @abstractmethod
    def log_probs(self, hidden: Tensor) -> Tensor:
        """log q [..., Vd], float32, of outputs [..., h]."""

    @abstractmethod
    def expand(self, state: Any, hidden: Tensor, tokens: Tensor, depth: int, seen: Tensor) -> Tensor:
        """Run W drafted nodes of one depth.

        Args:
            hidden: outputs of the nodes' parents, [B, W, h].
            tokens: of the nodes, target ids, [B, W].
            depth: 1 for children of the root.
            seen: which drafted nodes each attends to, itself included, [B, W, S] bool; the last W are these nodes.

        Returns:
            Outputs [B, W, h].
        """

    def forward(self, entries: Entries, paths: Paths, objective: Objective) -> Any:
        """See `Drafter.__call__`."""
        return objective(self.states(entries, paths), self.lm_head.weight)

    def beam(self, shape: TreeShape) -> int:
        """See `Proposals.beam`: a node of the beam costs a part of a pass."""
        return shape.top_k

    def conditionals(self, state: Any, root: Tensor, depth: int) -> Conditionals:
        """See `Proposals.conditionals`."""
        hidden, seen = state.hidden, torch.zeros(len(root), 1, 0, dtype=torch.bool, device=root.device)

        def law(level: int, tokens: Tensor, parents: Tensor) -> Conditional:
            nonlocal hidden, seen
            if level:
                (B, W), above = tokens.shape, parents[..., None]
                own = torch.eye(W, dtype=torch.bool, device=tokens.device).expand(B, W, W)
                seen = torch.cat([seen.gather(1, above.expand(-1, -1, seen.shape[-1])), own], dim=-1)
                hidden = hidden.gather(1, above.expand(-1, -1, hidden.shape[-1]))
                hidden = self.expand(state, hidden, tokens, level, seen)
            return Conditional(self.log_probs(hidden))

        return law
