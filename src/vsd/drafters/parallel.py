"""Block drafters: the states of all K positions behind a root come from one pass, whatever is drafted there.

Without a sequential correction q(z | x) = Π_t q_t(z_t | x) is a product of marginals (mean field). Paths are then drawn
and scored, and trees grown, without another pass. A correction makes q_t depend on the token before, z_{t-1}, too.

The best N - 1 prefixes of such a q are found exactly: at every level the N - 1 best prefixes suffice, as a prefix
outranks its continuations. `top_k` bounds the children of a node; 1 drafts a chain.

Legend: B batch, E entries, N tokens, P paths, U distinct roots of a sequence, K steps, h hidden, n h width of
the features, Vd draft vocabulary.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vsd.drafters.base import Objective
from vsd.drafters.lattice import Head
from vsd.drafters.proposals import Conditional, Conditionals, Proposals
from vsd.paths import Entries, Paths, TreeShape, rows_at


class Parallel(Proposals):
    """A drafter of whole blocks."""

    one_pass = True
    locality_slope: float = 0.0  # in training: subtracted from a block's scores for every position before its root
    lm_head: Any
    embed: Any

    @abstractmethod
    def blocks(self, entries: Entries, roots: Tensor, steps: int) -> Tensor:
        """Training: normed states of K = `steps` positions below roots [B, P], [B, P, K, h]."""

    @abstractmethod
    def block(self, state: Any, root: Tensor, steps: int) -> Tensor:
        """Decoding: the same states below `root` [B], [B, K, h]."""

    def joined(self, states: Tensor, before: Tensor) -> tuple[Tensor, Head]:
        """States [..., h'] and the head that makes logits of them, given the tokens before, target ids [...].

        A correction by the token before widens the states; without one the head is the LM head.
        """
        return states, self.lm_head.weight

    def forward(self, entries: Entries, paths: Paths, objective: Objective) -> Any:
        """See `Drafter.__call__`; paths with one root share its block."""
        some, which = distinct(paths.roots, entries.next_ids.shape[1])
        found = self.blocks(entries, some, paths.tokens.shape[-1])  # [B, U, K, h]
        states = found.gather(1, which[..., None, None].expand(-1, -1, *found.shape[2:])).permute(2, 0, 1, 3)
        return objective(*self.joined(states, paths.consumed(entries.next_ids)))

    def prepare(self, features: Callable[[], Tensor]) -> None:
        """Initialise weights from features [N, n h] of N tokens of the text, before training. By default none."""

    def with_locality(self, seen: Tensor, entries: Entries, roots: Tensor) -> Tensor:
        """`seen` from roots [B, P], [B, P, E] bool, as blocks attend: the same, or numbers to add to their scores.

        The queries of untrained blocks are alike, so their attention is nearly even, and the root, which tells most
        about the next tokens, is one among hundreds of entries. `locality_slope` gives it most of the weight. The
        trainer lowers the slope to 0, and meanwhile queries and keys learn to find the entries near the root.
        """
        if not self.locality_slope:
            return seen
        positions = entries.positions.float()
        added = positions[:, None] - positions.gather(1, roots)[..., None]  # minus the distances
        return added.mul_(self.locality_slope).masked_fill_(~seen, float("-inf"))

    @torch.no_grad()
    def sample(self, entries: Entries, roots: Tensor, steps: int, choose: Callable[[Tensor], Tensor]) -> None:
        """See `Drafter.sample`."""
        some, which = distinct(roots, entries.next_ids.shape[1])
        found = self.blocks(entries, some, steps)
        before, ids = entries.next_ids.gather(1, roots), self.vocabulary.ids
        for states in found.unbind(2):
            own = rows_at(states, which)
            before = ids[choose(self.log_probs(own, before))]

    def log_probs(self, states: Tensor, before: Tensor) -> Tensor:
        """log q [..., Vd], float32, of states [..., h] behind tokens [...], target ids; both may broadcast."""
        log_q: Tensor = self.lm_head(states).float().log_softmax(-1)
        return log_q

    def conditional(self, states: Tensor, before: Tensor) -> Conditional:
        """q, and its confidence, of states [B, 1, h] behind tokens [B, W], target ids."""
        return Conditional(self.log_probs(states, before))

    def beam(self, shape: TreeShape) -> int:
        """See `Proposals.beam`: nodes cost no pass, so the tree is the best one."""
        return 1 if shape.top_k == 1 else shape.nodes - 1

    def conditionals(self, state: Any, root: Tensor, depth: int) -> Conditionals:
        """See `Proposals.conditionals`."""
        states = self.block(state, root, depth)
        return lambda level, tokens, parents: self.conditional(states[:, level, None], tokens)


def distinct(roots: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Every root once, ascending, [B, U], rows with fewer ones filled up; and the place of each there, [B, P].

    Args:
        entries: number of entries of a sequence.
    """
    used = torch.zeros(len(roots), entries, dtype=torch.bool, device=roots.device).scatter(1, roots, True)
    place = (used.long().cumsum(1) - 1).gather(1, roots)
    most = int(used.sum(1).max())
    return used.int().argsort(dim=1, descending=True, stable=True)[:, :most], place
