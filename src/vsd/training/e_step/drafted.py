"""E-step of paths drawn from the drafter, the paper's: S paths an anchor, all scored by the target in one pass.

Legend: B batch, A anchors, S paths of an anchor, K steps, Vd draft vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vsd.features import Texts
from vsd.objective import Drafted, Part
from vsd.objective.utility import effective_sample_size, self_normalised, utility
from vsd.targets.sampling import drawn_at
from vsd.training.e_step.base import Anchors, Batch, Info, Models, Posterior, weight_per_anchor
from vsd.training.random_source import RandomSource, uniform
from vsd.verification.rejection import acceptance


class DraftedStep:
    """A path's share among those of its anchor is ∝ exp(β U); a path ends with the answer, at an EOS."""

    def __init__(self, part: Part, draw: Drafted, models: Models, longest: int) -> None:
        self.part, self.draw, self.models = part, draw, models
        models.check_whole()

    def room(self, texts: Texts, epoch: int, steps: int) -> int:
        """All tokens of all paths but the last one of each; equal prefixes share their tokens, so some stay free."""
        return self.draw.anchors * self.draw.samples * (steps - 1)

    @torch.no_grad()
    def __call__(self, batch: Batch, random: RandomSource) -> tuple[Posterior, Info]:
        """The anchors of a text weigh as much as its drafted tokens, times `draw.weight`."""
        draw, models, generators = self.draw, self.models, random.texts(batch.texts.examples, "draw")
        S, A = draw.samples, draw.anchors
        roots = Anchors.sampled(batch, A, generators).roots.repeat_interleave(S, 1)
        tokens, log_q = sample_paths(models, batch, roots, draw.temperature, generators)
        paths, scored = models.score(batch, roots, tokens)
        kept = scored.log_p.exp() if models.rule == "target" else acceptance(scored.log_p, log_q)
        worth = utility((kept * paths.valid).movedim(-1, 0)).unflatten(1, (A, S))
        share = self_normalised(draw.tempering * worth)  # [B, A, S]
        weight = (weight_per_anchor(draw, batch)[..., None] * share).flatten(1)[..., None].expand_as(paths.valid)
        target = models.head_target(scored.hidden, scored.log_normaliser)
        return Posterior(self.part, paths, target, weight, S), Info(worth, effective_sample_size(share))


def sample_paths(
    models: Models, batch: Batch, roots: Tensor, temperature: float, generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """A path below every root [B, P] by ancestral sampling: tokens and their log q as served, [B, P, K] each.

    Args:
        temperature: > 0, of sampling from q as it is served.
        generators: one for every text, B.
    """
    tokens: list[Tensor] = []
    log_q: list[Tensor] = []
    ids, served = models.drafter.vocabulary.ids, models.draft_temperature
    numbers = uniform(generators, batch.steps, roots.shape[1]).unbind(1)

    def choose(log_probs: Tensor) -> Tensor:
        log_probs = log_probs if served == 1 else (log_probs / served).log_softmax(-1)
        law = (log_probs / temperature).softmax(-1)
        each = zip(law, numbers[len(tokens)])  # text by text: the law's sums take twice its memory
        drawn = torch.stack([drawn_at(weights, number) for weights, number in each])[..., None]  # [B, P, 1]
        tokens.append(ids[drawn[..., 0]])
        log_q.append(log_probs.gather(-1, drawn)[..., 0])
        return drawn[..., 0]

    with models.autocast():
        models.drafter.sample(batch.entries, roots, batch.steps, choose)
    return torch.stack(tokens, -1), torch.stack(log_q, -1)
