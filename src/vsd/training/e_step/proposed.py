"""E-step of the draft trees that decoding would propose, scored by the target: every node counts once.

Legend: B batch, A anchors, L leaves of a tree, K steps.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vsd.features import Texts
from vsd.objective import HeadTarget, Part, Proposed
from vsd.objective.gto import draft_tree_reward
from vsd.paths import NO_TOKEN, TreeShape, leaf_paths
from vsd.training.e_step.base import Anchors, Batch, Info, Models, Posterior, drafted_paths, weight_per_anchor
from vsd.training.random_source import RandomSource


class ProposedStep:
    """Trees below some roots of every sequence, as the paths to their leaves."""

    def __init__(self, part: Part, draw: Proposed, models: Models, longest: int) -> None:
        self.part, self.draw, self.models = part, draw, models
        models.check_whole()

    def room(self, texts: Texts, epoch: int, steps: int) -> int:
        """All drafted nodes."""
        return self.draw.anchors * (self.draw.shape.nodes - 1)

    @torch.no_grad()
    def __call__(self, batch: Batch, random: RandomSource) -> tuple[Posterior, Info]:
        """The anchors of a text weigh as much as its drafted tokens, times `draw.weight`."""
        draw, models = self.draw, self.models
        anchors = Anchors.sampled(batch, draw.anchors, random.texts(batch.texts.examples, "draw"))
        tokens, fresh = trees(models, models.drafter, draw.shape, batch, anchors.roots)  # [B, A, L, K]
        scores = score_trees(models, batch, anchors.roots, tokens)
        reward = draft_tree_reward(scores.kept.movedim(-1, 0), fresh.movedim(-1, 0))  # [B, A]
        share = (weight_per_anchor(draw, batch)[..., None, None] * (fresh & scores.valid)).flatten(1, 2)
        L = tokens.shape[2]
        roots = anchors.roots.repeat_interleave(L, 1)
        paths = drafted_paths(roots, *(x.flatten(1, 2) for x in (tokens, scores.valid, scores.rows)))
        return Posterior(self.part, paths, scores.target, share, L), Info(reward)


class TreeScores(NamedTuple):
    """The target along the paths to the leaves of trees, [B, A, L, K] each: acceptance, steps to train, rows."""

    target: HeadTarget
    kept: Tensor
    valid: Tensor
    rows: Tensor


def trees(models: Models, drafter: Any, shape: TreeShape, batch: Batch, roots: Tensor) -> tuple[Tensor, Tensor]:
    """The trees that decoding would propose below roots [B, A], cut or filled up to K steps.

    Returns:
        Tokens [B, A, L, K], `NO_TOKEN` behind a leaf (a tree with fewer leaves ends in empty paths); and which tokens
        no earlier path of the tree has in the same place, [B, A, L, K] bool: one for every node.
    """
    entries = batch.entries
    with models.autocast():
        state = drafter.begin_at(entries, roots, shape.depth * shape.top_k)
        tree = drafter.propose(state, entries.next_ids.gather(1, roots).flatten(), shape)
    more = (0, batch.steps - shape.depth)
    tokens, fresh = (field.unflatten(0, roots.shape) for field in leaf_paths(tree, shape.depth))
    return F.pad(tokens, more, value=NO_TOKEN), F.pad(fresh, more)


def score_trees(models: Models, batch: Batch, roots: Tensor, tokens: Tensor) -> TreeScores:
    """Tokens [B, A, L, K] below roots [B, A], scored by a pass of the target."""
    L = tokens.shape[2]
    paths, scored = models.score(batch, roots.repeat_interleave(L, 1), tokens.flatten(1, 2))
    kept = scored.log_p.exp() * paths.valid
    fields = (x.unflatten(1, (-1, L)) for x in (kept, paths.valid, scored.rows))
    return TreeScores(models.head_target(scored.hidden, scored.log_normaliser), *fields)
