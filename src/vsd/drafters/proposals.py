"""Draft trees and sampled chains from any q(z_t | x, z_<t).

A family says what its q is along drafted paths (`conditionals`); trees, chains and the log q of a given chain follow.

Trees are grown as in EAGLE-2 (Li et al., arXiv:2406.16858). Level 1 of a tree is the root's k best children. Then
repeatedly: give each of the best nodes of the newest level (the beam) its k best children, add all of them to a pool.
The tree is the root and the best N - 1 nodes of the pool by cumulative log-probability. A child never outranks its
parent, so the kept nodes are connected. With `p_min` nodes below that probability are left out, and drafting ends at
the level where the whole beam is below it.

Some drafters also predict whether their likeliest token will be accepted (a confidence head). With `p_min` the
probability of a node is then theirs: c for the likeliest child of a node, and the rest, 1 - c, in the ratio of q for
the others. That of a chain is the product of its confidences.

Legend: B batch, K steps, W nodes of a level, k children of a node, V target and Vd draft vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsd.drafters.vocabulary import DraftVocabulary, of_label
from vsd.paths import Chain, Tree, TreeShape, best_nodes
from vsd.targets.sampling import Generators, draw, probabilities


class Conditional(NamedTuple):
    """q of the children of W nodes.

    Attributes:
        log_q: [B, W, Vd] in float32, or [B, 1, Vd] where all nodes have one law.
        log_c: log-probability that the likeliest child is accepted if the node is, [B, W]; None: not predicted.
    """

    log_q: Tensor
    log_c: Tensor | None = None


Conditionals = Callable[[int, Tensor, Tensor], Conditional]
"""The law of the children of a level's nodes, called from the root downwards, once for every level.

Takes the depth of the nodes (0: the root alone), their tokens [B, W], target ids, and the index of each one's parent
among the nodes of the call before, [B, W].
"""


class Proposals(ABC):
    """Proposals of a drafter whose q along drafted paths is known."""

    one_pass: bool = False

    @property
    @abstractmethod
    def vocabulary(self) -> DraftVocabulary:
        """The target tokens it can propose."""

    @abstractmethod
    def conditionals(self, state: Any, root: Tensor, depth: int) -> Conditionals:
        """q along paths of at most `depth` tokens below `root` [B], the token decided last."""

    def confidence(self, states: Tensor) -> Tensor | None:
        """See `Drafter.confidence`; most families predict none."""
        return None

    @abstractmethod
    def beam(self, shape: TreeShape) -> int:
        """Nodes of a level that get children."""

    def propose(self, state: Any, root: Tensor, shape: TreeShape) -> Tree:
        """See `Drafter.propose`."""
        law, ids, k = self.conditionals(state, root, shape.depth), self.vocabulary.ids, shape.top_k
        zero = torch.zeros_like(root[:, None])
        tokens, parents, depths, scores = [root[:, None]], [zero], [0], [torch.zeros_like(zero, dtype=torch.float32)]
        nodes, pool = zero, 1  # the beam, as indices of the pool, and the pool's size
        beam, above, beam_logp = root[:, None], zero, scores[0]
        for depth in range(shape.depth):
            if depth and shape.p_min and float(beam_logp.max()) < shape.floor:
                break
            found = law(depth, beam, above)
            logp, best = found.log_q.topk(k)  # [B, W or 1, k]
            if shape.p_min and found.log_c is not None:
                logp = _calibrated(logp, found.log_c)
            logp = (beam_logp[..., None] + logp).flatten(1)  # [B, W k]
            children = ids[best].expand(-1, beam.shape[1], -1).flatten(1)
            tokens.append(children)
            scores.append(logp)
            parents.append(nodes.repeat_interleave(k, dim=1))
            depths += [depth + 1] * logp.shape[1]
            chosen = _best(logp, self.beam(shape))
            beam_logp, beam, above = logp.gather(1, chosen), children.gather(1, chosen), chosen // k
            nodes, pool = pool + chosen, pool + logp.shape[1]
        level = torch.tensor(depths, device=root.device).expand(len(root), -1)
        return _pruned(Tree(torch.cat(tokens, 1), torch.cat(parents, 1), level, torch.cat(scores, 1)), shape)

    def draw(
        self, state: Any, root: Tensor, shape: TreeShape, temperature: Sequence[float], generators: Generators
    ) -> Chain:
        """See `Drafter.draw`.

        Below a token under `shape.p_min` nothing is drafted, but the token itself stays: whether a token is verified
        must not depend on the token. A confidence is known before the token is drawn, and so ends the chain before it;
        the first token is always drafted.
        """
        law, ids = self.conditionals(state, root, shape.depth), self.vocabulary.ids
        none = torch.zeros_like(root[:, None])
        divisor = torch.tensor([t or 1.0 for t in temperature], device=root.device)[:, None]
        path, distributions, log_q = [root], [], [torch.zeros(len(root), device=root.device)]
        score = log_q[0]
        for step in range(shape.depth):
            if _ends(score, shape):
                break
            found = law(step, path[-1][:, None], none)
            if found.log_c is not None:
                score = score + found.log_c[:, 0]
                if step and _ends(score, shape):
                    break
            q = probabilities(found.log_q[:, 0] / divisor, generators)  # [B, Vd]
            drawn = draw(q, generators)
            distributions.append(q.log())
            log_q.append(log_q[-1] + distributions[-1].gather(1, drawn[:, None])[:, 0])
            score = log_q[-1] if found.log_c is None else score
            path.append(ids[drawn])
        nodes = torch.arange(len(path), device=root.device)
        parents = (nodes - 1).clamp(min=0).expand(len(root), -1)
        tree = Tree(torch.stack(path, 1), parents, nodes.expand(len(root), -1), torch.stack(log_q, 1))
        return Chain(tree, torch.stack(distributions, 1), ids)

    def log_q(self, state: Any, root: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        """See `Drafter.log_q`."""
        law, rows, none = self.conditionals(state, root, tokens.shape[1]), self.vocabulary.rows, torch.zeros_like(root)
        above, found = torch.cat([root[:, None], tokens[:, :-1]], dim=1), []
        for step, token in enumerate(tokens.T):
            log_q = (law(step, above[:, step, None], none[:, None]).log_q[:, 0] / temperature).log_softmax(-1)
            found.append(of_label(log_q, rows[token], float("-inf")))
        return torch.stack(found, 1)


def _ends(scores: Tensor, shape: TreeShape) -> bool:
    """Whether all rows [B] are below `p_min`."""
    return bool(shape.p_min) and float(scores.max()) < shape.floor


def _calibrated(log_q: Tensor, log_c: Tensor) -> Tensor:
    """log-probabilities [B, W, k] of the likeliest children, from log c [B, W] and log q [B, W or 1, k], best first."""
    rest = (1 - log_q[..., :1].exp()).clamp(min=torch.finfo(log_q.dtype).eps)
    left = (-log_c.expm1()).clamp(min=torch.finfo(log_c.dtype).tiny)[..., None]
    return torch.cat([log_c[..., None], log_q[..., 1:] + (left / rest).log()], dim=-1)


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the best `count` of scores [B, n], best first; all in their order where there are no more."""
    if scores.shape[1] <= count:
        return torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    return scores.topk(count).indices


def _pruned(pool: Tree, shape: TreeShape) -> Tree:
    """The best nodes of the pool; with `p_min` no more than any row has above it."""
    nodes = shape.nodes
    if shape.p_min:
        nodes = min(nodes, int((pool.log_q >= shape.floor).sum(1).max()))
    return best_nodes(pool, nodes)
