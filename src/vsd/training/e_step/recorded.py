"""E-step of recorded paths: the continuations that the text itself holds.

The text is the target's, so at temperature 0 they are the posterior, and the target's pass is spared.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vsd.decoding.lookup import looked_up
from vsd.features import Texts
from vsd.objective import Part, Recorded
from vsd.paths import cut, longest_first, recorded
from vsd.training.e_step.base import Batch, Info, Models, Posterior
from vsd.training.random_source import RandomSource


class RecordedStep:
    """Whole continuations, or cut where the target is unsure; at every state, or only where lookup would not copy."""

    def __init__(self, part: Part, draw: Recorded, models: Models, longest: int) -> None:
        self.part, self.draw, self.models = part, draw, models

    def room(self, texts: Texts, epoch: int, steps: int) -> None:
        """None: the features say all."""

    def __call__(self, batch: Batch, random: RandomSource) -> tuple[Posterior, Info]:
        """The posterior of a batch."""
        texts, draw, models = batch.texts, self.draw, self.models
        paths = recorded(texts.inputs.ids, texts.drafted, texts.real, batch.steps)
        if draw.smoothing is not None:
            outside = models.draft_of[paths.tokens[..., 0]] < 0
            p = models.confidence(batch).masked_fill(outside, 0.0).flatten()
            numbers = _numbers(texts, batch.steps, random)
            paths = cut(paths, draw.smoothing + (1 - draw.smoothing) * p[paths.rows], numbers)
        if draw.lookup:
            copied = looked_up(texts.inputs.ids).gather(1, paths.roots + 1)  # [B, Q]
            paths = paths._replace(valid=paths.valid & ~copied[..., None])
        if draw != Recorded():
            paths = longest_first(paths)
        return Posterior(self.part, paths, models.recorded(batch.features)), Info()


def _numbers(texts: Texts, steps: int, random: RandomSource) -> Tensor:
    """Numbers in [0, 1) for the drafted tokens of every text, padding not counted, as it depends on other texts."""
    generators, counts = random.texts(texts.examples, "cut"), texts.real.sum(1).tolist()
    found = [torch.rand(count, steps, generator=one, device=one.device) for one, count in zip(generators, counts)]
    return pad_sequence(found, batch_first=True)  # [B, Q, K]
