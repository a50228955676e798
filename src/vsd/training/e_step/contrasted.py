"""E-step of GTO: the longest accepted path of each draft tree, weighed by the tree's advantage over a reference's.

Legend: B batch, A anchors, L leaves of a tree, K steps.
"""

import copy

import torch
from torch import Tensor

from vsd.features import Texts
from vsd.objective import Contrasted, Part
from vsd.objective.gto import draft_tree_reward, standardised
from vsd.objective.utility import utility
from vsd.paths import recorded
from vsd.training.e_step.base import Anchors, Batch, Info, Models, Posterior, drafted_paths, weight_per_anchor
from vsd.training.e_step.proposed import TreeScores, score_trees, trees
from vsd.training.random_source import RandomSource


class ContrastedStep:
    """The reference is the drafter that training began with, frozen."""

    def __init__(self, part: Part, draw: Contrasted, models: Models, longest: int) -> None:
        self.part, self.draw, self.models = part, draw, models
        self.reference = copy.deepcopy(models.drafter).eval().requires_grad_(False)
        if models.rule != "greedy":
            models.check_whole()

    def room(self, texts: Texts, epoch: int, steps: int) -> int | None:
        """All drafted nodes of both trees; None at temperature 0, where the text holds the target's choices."""
        return None if self.models.rule == "greedy" else 2 * self.draw.anchors * (self.draw.shape.nodes - 1)

    @torch.no_grad()
    def __call__(self, batch: Batch, random: RandomSource) -> tuple[Posterior, Info]:
        """The anchors of a text weigh as much as its drafted tokens, times `draw.weight`."""
        draw, models = self.draw, self.models
        anchors = Anchors.sampled(batch, draw.anchors, random.texts(batch.texts.examples, "draw"))
        both = (models.drafter, self.reference)
        mine, theirs = (trees(models, drafter, draw.shape, batch, anchors.roots) for drafter in both)
        tokens, fresh = (torch.cat(pair, dim=2) for pair in zip(mine, theirs))  # [B, A, L + L', K]
        if models.rule == "greedy":
            scores = compare_trees(models, batch, anchors, tokens)
        else:
            scores = score_trees(models, batch, anchors.roots, tokens)
        own, kept, fresh = mine[0].shape[2], scores.kept.movedim(-1, 0), fresh.movedim(-1, 0)  # [K, B, A, L + L']
        reward = draft_tree_reward(kept[..., :own], fresh[..., :own])  # [B, A]
        advantage = standardised(reward - draft_tree_reward(kept[..., own:], fresh[..., own:]))
        best = utility(kept)[..., :own].argmax(-1)[..., None, None].expand(-1, -1, 1, batch.steps)
        fields = (x.gather(2, best)[:, :, 0] for x in (tokens, scores.valid, scores.rows))
        paths = drafted_paths(anchors.roots, *fields)
        share = (weight_per_anchor(draw, batch) * advantage)[..., None].expand_as(paths.valid)
        old_log_q = models.log_q(self.reference, batch, paths)
        return Posterior(self.part, paths, scores.target, share, old_log_q=old_log_q), Info(reward)


def compare_trees(models: Models, batch: Batch, anchors: Anchors, tokens: Tensor) -> TreeScores:
    """Tokens [B, A, L, K] at temperature 0, without a pass of the target: the text holds its choices."""
    texts = batch.texts
    text = recorded(texts.inputs.ids, texts.drafted, texts.real, batch.steps)
    deep = anchors.chosen[..., None].expand(-1, -1, batch.steps)
    truth, exists, rows = (x.gather(1, deep)[:, :, None] for x in (text.tokens, text.valid, text.rows))  # [B, A, 1, K]
    kept = (tokens == truth) & exists
    valid = kept.long().cumprod(-1).bool()
    return TreeScores(models.recorded(batch.features), kept.float(), valid, rows.expand_as(tokens))
