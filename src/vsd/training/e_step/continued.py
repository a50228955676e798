"""E-step of alternative continuations, sampled from the target at positions where its confidence is low.

The target states p of the new states as it writes them, so no further pass scores them. Where a server gives the
features and the target's layers are not here, the server also continues the texts. The continuations of a text are kept
for some epochs (`vsd.training.e_step.kept`).

Legend: B batch, Q drafted tokens of a sequence, A anchors, L tokens of a continuation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vsd.features import ServedFeatures, Texts
from vsd.objective import Continued, Part
from vsd.paths import Continuations, along, check_length, continue_text, extended, longest_first
from vsd.paths.continued import other_token
from vsd.paths.entries import rows_at
from vsd.targets.sampling import drawn_at
from vsd.training.e_step.base import Batch, Info, Models, Posterior
from vsd.training.e_step.kept import Kept
from vsd.training.random_source import RandomSource, uniform

_LEAST_DOUBT = 1e-3  # weight of a position where the target is sure: every text has anchors


class ContinuedStep:
    """Draws continuations, and remembers them for `draw.epochs` epochs."""

    def __init__(self, part: Part, draw: Continued, models: Models, longest: int) -> None:
        check_length(models.info, longest, draw.length)
        if models.server is None:
            models.check_whole()
        self.part, self.draw, self.models = part, draw, models
        self.period, self.kept = 0, Kept()

    def room(self, texts: Texts, epoch: int, steps: int) -> int | None:
        """All tokens of all continuations but the last one of each; None where some are kept: the others are few."""
        kept = self._kept_in(epoch)
        known = any(example in kept for example in texts.examples.tolist())
        return None if known else self.draw.anchors * (self.draw.length - 1)

    def __call__(self, batch: Batch, random: RandomSource) -> tuple[Posterior, Info]:
        """The continuations of a text weigh as much as the text, times `draw.weight`."""
        texts, models = batch.texts, self.models
        found = self._continuations(batch, random)
        paths = along(found, models.exist(found.tokens), texts.inputs.ids.shape[1], batch.steps)
        paths = longest_first(paths)
        share = self.draw.weight * texts.real.sum(1) / paths.valid[..., 0].sum(1)  # [B]
        target = models.head_target(found.hidden.flatten(0, 2), found.log_normaliser)
        weights = share[:, None, None].expand_as(paths.valid)
        entries = extended(batch.entries, found)
        return Posterior(self.part, paths, target, weights, entries=entries, written=True), Info()

    @torch.no_grad()
    def _continuations(self, batch: Batch, random: RandomSource) -> Continuations:
        """Those kept, and new ones for texts that have none."""
        kept = self._kept_in(random.epoch)
        examples = batch.texts.examples.tolist()
        found = [kept.get(example) for example in examples]
        new = [row for row, one in enumerate(found) if one is None]
        if new:
            generators = [random.seeded(f"{examples[row]}, {self.period}") for row in new]
            some = batch if len(new) == len(examples) else batch.some(new)
            for row, *fields in zip(new, *self._draw(some, generators)):
                found[row] = Continuations(*(field.to("cpu", copy=True) for field in fields))
                kept.add(examples[row], found[row])
        return Continuations(*(torch.stack(fields).to(batch.texts.real.device) for fields in zip(*found)))

    def _kept_in(self, epoch: int) -> Kept:
        """Those that are kept in an epoch; at its start they may all go."""
        period = epoch // self.draw.epochs
        if period != self.period:
            self.period, self.kept = period, Kept()
        return self.kept

    def _draw(self, batch: Batch, generators: list[torch.Generator]) -> Continuations:
        """Every text by a generator of its own: but for rounding, its batch does not matter."""
        draw, models, texts = self.draw, self.models, batch.texts
        numbers = uniform(generators, draw.anchors, 1 + draw.length)
        doubt = (1 - models.confidence(batch)).clamp(min=_LEAST_DOUBT) * texts.real  # [B, Q]
        chosen = drawn_at(doubt[:, None].expand(-1, draw.anchors, -1), numbers[..., 0])
        roots = texts.drafted.gather(1, chosen) - 2
        if models.server is not None:
            return self._on_server(models.server, batch, chosen, numbers[..., 1], generators)
        served, layers = models.temperature, models.drafter.needs.layers
        return continue_text(
            models.target, texts.inputs, roots, draw.length, served, numbers[..., 1:], layers, batch.prefill
        )

    def _on_server(
        self,
        server: ServedFeatures,
        batch: Batch,
        chosen: Tensor,
        numbers: Tensor,
        generators: Sequence[torch.Generator],
    ) -> Continuations:
        """As `continue_text`; a first token, which differs from the text's, is drawn here, and the others there.

        Args:
            chosen: indices of the first tokens among the drafted ones, [B, A].
            numbers: decide the first tokens, [B, A].
        """
        info, ids, temperature = self.models.info, batch.texts.inputs.ids, self.models.temperature
        places = batch.texts.drafted.gather(1, chosen)  # [B, A]
        hidden = rows_at(batch.features.hidden, chosen).to(info.dtype)
        first = other_token(info.logits(hidden) / temperature, ids, places, numbers)
        texts = [
            [*ids[b, :place].tolist(), token]
            for b, (row, tokens) in enumerate(zip(places.tolist(), first.tolist()))
            for place, token in zip(row, tokens)
        ]
        seeds = [
            int(seed)
            for g in generators
            for seed in torch.randint(1 << 31, first.shape[1:], generator=g, device=g.device)
        ]
        found = server.continued(texts, self.draw.length - 1, seeds)
        tokens, later, aux = (x.to(ids.device).unflatten(0, first.shape) for x in found)
        hidden = torch.cat([hidden[:, :, None], later], 2)  # [B, A, L, h]
        normaliser = info.log_normaliser(hidden.flatten(0, 2), temperature).view(hidden.shape[:3])
        return Continuations(places - 2, torch.cat([first[..., None], tokens], -1), hidden, normaliser, aux)
