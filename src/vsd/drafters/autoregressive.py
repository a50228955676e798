"""Drafting token by token: draft trees as EAGLE-2 grows them (Li et al., arXiv:2406.16858), and sampled chains.

For every family whose q(z_t | x, z_<t) comes from one small pass a token. Level 1 of a tree is the root's k best
children. Then repeatedly: run the k best nodes of the newest level, give each its k best children, add all of them to
a pool. The tree is the root and the best N - 1 nodes of the pool by cumulative log-probability. A child never outranks
its parent, so the kept nodes are connected. With `p_min` nodes below that probability are left out, and drafting ends
at the level where the whole beam is below it.

Legend: B batch, P paths, K steps, W nodes, k beam width, S nodes drafted before and in this pass, h hidden, V target
and Vd draft vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vsd.drafters.base import Objective
from vsd.drafters.vocabulary import DraftVocabulary, of_label
from vsd.paths import Chain, Entries, Paths, Tree, TreeShape, best_nodes
from vsd.targets.sampling import Generators, draw, probabilities


class Autoregressive(ABC):
    """Proposals of a drafter that drafts one token after another.

    The state of such a drafter holds `hidden` [B, 1, h], its output for the root.
    """

    lm_head: Any

    @property
    @abstractmethod
    def vocabulary(self) -> DraftVocabulary:
        """The target tokens it can propose."""

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

    def propose(self, state: Any, root: Tensor, shape: TreeShape) -> Tree:
        """See `Drafter.propose`."""
        B, k = root.shape[0], shape.top_k
        ids, hidden = self.vocabulary.ids, state.hidden
        beam_logp, best = self.log_probs(hidden[:, 0]).topk(k)  # [B, k]
        beam = ids[best]
        tokens, scores = [root[:, None], beam], [torch.zeros_like(beam_logp[:, :1]), beam_logp]
        parents, depths = [torch.zeros_like(beam[:, :1]), torch.zeros_like(beam)], [0] + [1] * k
        hidden = hidden.expand(-1, k, -1)
        seen = torch.zeros(B, k, 0, dtype=torch.bool, device=root.device)
        own = torch.eye(k, dtype=torch.bool, device=root.device).expand(B, k, k)
        beam_nodes = torch.arange(1, k + 1, device=root.device).expand(B, k)  # indices of the beam in the pool
        for depth in range(1, shape.depth):
            if shape.p_min and float(beam_logp.max()) < shape.floor:
                break
            seen = torch.cat([seen, own], dim=-1)
            hidden = self.expand(state, hidden, beam, depth, seen)
            child_logp, best = self.log_probs(hidden).topk(k)  # [B, k, k]
            child_logp = (beam_logp[..., None] + child_logp).flatten(1)
            children = ids[best].flatten(1)
            tokens.append(children)
            scores.append(child_logp)
            parents.append(beam_nodes.repeat_interleave(k, dim=1))
            depths += [depth + 1] * k**2
            beam_logp, chosen = child_logp.topk(k)
            beam = children.gather(1, chosen)
            beam_nodes = 1 + k + (depth - 1) * k**2 + chosen
            parent = (chosen // k)[..., None]
            hidden = hidden.gather(1, parent.expand(-1, -1, hidden.shape[-1]))
            seen = seen.gather(1, parent.expand(-1, -1, seen.shape[-1]))
        level = torch.tensor(depths, device=root.device).expand(B, -1)
        return _pruned(Tree(torch.cat(tokens, 1), torch.cat(parents, 1), level, torch.cat(scores, 1)), shape)

    def draw(
        self, state: Any, root: Tensor, shape: TreeShape, temperature: Sequence[float], generators: Generators
    ) -> Chain:
        """See `Drafter.draw`.

        Below a token under `shape.p_min` nothing is drafted, but the token itself stays: whether a token is verified
        must not depend on the token.
        """
        B, hidden = root.shape[0], state.hidden
        divisor = torch.tensor([t or 1.0 for t in temperature], device=root.device)[:, None]
        ids = self.vocabulary.ids
        path, distributions, log_q = [root], [], [torch.zeros(B, device=root.device)]
        for step in range(shape.depth):
            if shape.p_min and float(log_q[-1].max()) < shape.floor:
                break
            q = probabilities(self.log_probs(hidden[:, 0]) / divisor, generators)  # [B, Vd]
            drawn = draw(q, generators)
            distributions.append(q.log())
            log_q.append(log_q[-1] + distributions[-1].gather(1, drawn[:, None])[:, 0])
            path.append(ids[drawn])
            if step + 1 < shape.depth:
                hidden = self._next(state, hidden, path[-1], step + 1)
        nodes = torch.arange(len(path), device=root.device)
        parents = (nodes - 1).clamp(min=0).expand(B, -1)
        tree = Tree(torch.stack(path, 1), parents, nodes.expand(B, -1), torch.stack(log_q, 1))
        return Chain(tree, torch.stack(distributions, 1), ids)

    def log_q(self, state: Any, tokens: Tensor, temperature: float) -> Tensor:
        """See `Drafter.log_q`."""
        hidden, rows, found = state.hidden, self.vocabulary.rows, []
        for step, token in enumerate(tokens.T):
            law = (self.log_probs(hidden[:, 0]) / temperature).log_softmax(-1)
            found.append(of_label(law, rows[token], float("-inf")))
            if step + 1 < tokens.shape[1]:
                hidden = self._next(state, hidden, token, step + 1)
        return torch.stack(found, 1)

    def _next(self, state: Any, hidden: Tensor, token: Tensor, depth: int) -> Tensor:
        """The output [B, 1, h] behind one more token [B] of a chain."""
        seen = torch.ones(len(token), 1, depth, dtype=torch.bool, device=token.device)
        return self.expand(state, hidden, token[:, None], depth, seen)


def _pruned(pool: Tree, shape: TreeShape) -> Tree:
    """The best nodes of the pool; with `p_min` no more than any row has above it."""
    nodes = shape.nodes
    if shape.p_min:
        nodes = min(nodes, int((pool.log_q >= shape.floor).sum(1).max()))
    return best_nodes(pool, nodes)
