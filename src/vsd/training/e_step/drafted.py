"""E-step of paths drawn from the drafter, the paper's: S paths an anchor, all scored by the target in one pass.

Legend: B batch, A anchors, S paths of an anchor, K steps, Vd draft vocabulary.
"""

import torch
from torch import Tensor

from vsd.features import Texts
from vsd.objective import Drafted, Part
from vsd.objective.utility import effective_sample_size, self_normalised, utility
from vsd.training.e_step.base import Anchors, Batch, Info, Models, Posterior, weight_per_anchor
from vsd.training.random_source import RandomSource
from vsd.verification.rejection import acceptance


class DraftedStep:
    """A path's share among those of its anchor is ∝ exp(β U); a path ends with the answer, at an EOS."""

    def __init__(self, part: Part, draw: Drafted, models: Models, longest: int) -> None:
        self.part, self.draw, self.models = part, draw, models
        models.target  # noqa: B018  refuses at once a target without its layers

    def room(self, texts: Texts, epoch: int, steps: int) -> int:
        """All tokens of all paths but the last one of each; equal prefixes share their tokens, so some stay free."""
        return self.draw.anchors * self.draw.samples * (steps - 1)

    @torch.no_grad()
    def __call__(self, batch: Batch, random: RandomSource) -> tuple[Posterior, Info]:
        """All anchors of a batch together weigh as much as its drafted tokens, times `draw.weight`."""
        draw, models, generator = self.draw, self.models, random.batch("draw")
        S, A = draw.samples, draw.anchors
        roots = Anchors.sampled(batch, A, generator).roots.repeat_interleave(S, 1)
        tokens, log_q = sample_paths(models, batch, roots, draw.temperature, generator)
        paths, scored = models.score(batch, roots, tokens)
        kept = scored.log_p.exp() if models.rule == "target" else acceptance(scored.log_p, log_q)
        worth = utility((kept * paths.valid).movedim(-1, 0)).unflatten(1, (A, S))
        share = self_normalised(draw.tempering * worth)  # [B, A, S]
        weight = (weight_per_anchor(draw, batch) * share).flatten(1)[..., None].expand_as(paths.valid)
        target = models.head_target(scored.hidden, scored.log_normaliser)
        return Posterior(self.part, paths, target, weight, S), Info(worth, effective_sample_size(share))


def sample_paths(
    models: Models, batch: Batch, roots: Tensor, temperature: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A path below every root [B, P] by ancestral sampling: tokens and their log q as served, [B, P, K] each.

    Args:
        temperature: > 0, of sampling from q as it is served.
    """
    tokens, log_q = [], []
    ids, served = models.drafter.vocabulary.ids, models.draft_temperature

    def choose(log_probs: Tensor) -> Tensor:
        log_probs = log_probs if served == 1 else (log_probs / served).log_softmax(-1)
        law = (log_probs / temperature).softmax(-1)
        drawn = torch.multinomial(law.flatten(0, 1), 1, generator=generator).view(*roots.shape, 1)
        tokens.append(ids[drawn[..., 0]])
        log_q.append(log_probs.gather(-1, drawn)[..., 0])
        return drawn[..., 0]

    with models.autocast():
        models.drafter.sample(batch.entries, roots, batch.steps, choose)
    return torch.stack(tokens, -1), torch.stack(log_q, -1)
