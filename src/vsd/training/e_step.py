"""The E-step: which paths are trained, what the target makes of them, and how much each counts.

One method for each kind of paths (`vsd.objective.algebra`): the text's own, which at temperature 0 are the posterior;
what the target could have said instead; paths drawn from the drafter; the trees decoding would propose; those against
a frozen drafter's.

Legend: B batch, T tokens, Q drafted tokens of a sequence, A anchors, P paths, S paths of an anchor, L leaves of its
tree, K steps, h hidden, V target and Vd draft vocabulary.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vsd.decoding.lookup import looked_up
from vsd.drafters import Eagle3Drafter, of_label
from vsd.objective import Continued, Contrasted, Drafted, HeadTarget, Part, Proposed, Recorded
from vsd.objective.gto import draft_tree_reward, standardised
from vsd.objective.utility import effective_sample_size, self_normalised, utility
from vsd.paths import (
    NO_TOKEN,
    Continuations,
    Entries,
    Paths,
    Scored,
    TreeShape,
    along,
    beside,
    consumed,
    continue_text,
    cut,
    draw_paths,
    draw_trees,
    longest_first,
    recorded,
    score_paths,
)
from vsd.targets import Target
from vsd.targets.sampling import drawn_at
from vsd.training.features import Features
from vsd.verification.rejection import acceptance

_MEMORY = 4 << 30  # bytes of continuations that a process keeps
_LEAST_DOUBT = 1e-3  # so that a text the target was sure of everywhere has anchors, too


class Batch(NamedTuple):
    """Some texts.

    Attributes:
        ids: [B, T].
        drafted: positions of drafted tokens, [B, Q].
        real: which of them are not padding, [B, Q].
        examples: which they are, [B].
        steps: K.
    """

    ids: Tensor
    drafted: Tensor
    real: Tensor
    examples: Tensor
    features: Features
    steps: int

    def some(self, rows: list[int]) -> "Batch":
        """Only these texts."""
        ids, drafted, real, examples = (field[rows] for field in self[:4])
        return Batch(ids, drafted, real, examples, Features(*(field[rows] for field in self.features)), self.steps)

    @property
    def text(self) -> Entries:
        """What its texts can be drafted from."""
        return Entries(self.features.aux, self.ids.roll(-1, dims=1))


class Posterior(NamedTuple):
    """The E-step's outcome for one part of the objective.

    Attributes:
        share: weight of every token, [B, P, K]; None for recorded paths: 1 each.
        group: so many paths of an anchor stand side by side.
        old_log_q: what the drafter that training began with says of every token, [B, P, K], if it was asked.
        entries: what the paths hang from, where that is more than the text.
        written: whether the tokens are the target's own although they are weighed.
        utility: expected accepted tokens of every drawn path, or tree, for the log.
        effective: effective sample size of every anchor's paths, for the log.
    """

    part: Part
    paths: Paths
    target: HeadTarget
    share: Tensor | None = None
    group: int = 1
    old_log_q: Tensor | None = None
    entries: Entries | None = None
    written: bool = False
    utility: Tensor | None = None
    effective: Tensor | None = None


class EStep:
    """What the target knows and the drafter can say, and a memory of continuations.

    Args:
        rule: of verification.
        temperature: at which the target is served: its p is taken there. By `rejection` the drafter draws at it, too;
            trees are grown by its log-probabilities as they are.
        autocast: the precision in which a drafter is run; the target has its own.
    """

    def __init__(
        self,
        target: Target,
        drafter: Eagle3Drafter,
        rule: str,
        temperature: float,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        self.target, self.rule, self.autocast = target, rule, autocast
        self.temperature, self.draft_temperature = temperature, temperature if rule == "rejection" else 1.0
        ids = drafter.draft_ids()
        self.head = target.head_weight[ids].detach()  # [Vd, h]
        self.bias = None if target.head_bias is None else target.head_bias[ids].detach()  # [Vd]
        self.draft_of = drafter.draft_of()  # [V]
        self._season, self._remembered = 0, dict[int, Continuations]()  # by example

    def recorded(self, part: Part, text: Recorded, batch: Batch, generator: torch.Generator) -> Posterior:
        """The text's own continuations, whole or cut where the target itself is unsure, everywhere or beyond lookup.

        At temperature 0 they are the posterior: the target's pass is spared.
        """
        paths, features = recorded(*batch[:3], batch.steps), batch.features
        if text.smoothing is not None:
            p = self._confidence(batch).masked_fill(self.draft_of[paths.tokens[..., 0]] < 0, 0.0).flatten()
            paths = cut(paths, text.smoothing + (1 - text.smoothing) * p[paths.rows], generator)
        if text.lookup:
            copied = looked_up(batch.ids).gather(1, paths.roots + 1)  # [B, Q]
            paths = paths._replace(valid=paths.valid & ~copied[..., None])
        if text != Recorded():
            paths = longest_first(paths)
        return Posterior(part, paths, self._said(features))

    @torch.no_grad()
    def continued(
        self, part: Part, draw: Continued, batch: Batch, epoch: int, chance: Callable[[str], torch.Generator]
    ) -> Posterior:
        """What the target could have said instead: new states, whose law it has stated already in saying it.

        A text's continuations weigh as much as the text, times `draw.weight`.

        Args:
            chance: the same for the same words, whenever it is asked.
        """
        season = epoch // draw.epochs
        if season != self._season:
            self._season, self._remembered = season, {}
        examples = batch.examples.tolist()
        new = [row for row, example in enumerate(examples) if example not in self._remembered]
        if new:
            texts = batch.some(new)
            generators = [chance(f"{examples[row]}, {season}") for row in new]
            for row, *fields in zip(new, *self._continue(texts, draw, generators)):
                self._remembered[examples[row]] = Continuations(*(field.to("cpu", copy=True) for field in fields))
        kept = zip(*(self._remembered[example] for example in examples))
        found = Continuations(*(torch.stack(fields).to(batch.ids.device) for fields in kept))
        self._forget()
        paths = longest_first(along(found, self._exist(found.tokens), batch.ids.shape[1], batch.steps))
        share = draw.weight * batch.real.sum(1) / paths.valid[..., 0].sum(1)  # [B]
        says = self._head_target(found.hidden.flatten(0, 2), found.log_normaliser)
        weights = share[:, None, None].expand_as(paths.valid)
        return Posterior(part, paths, says, weights, entries=beside(batch.text, found), written=True)

    def _continue(self, batch: Batch, draw: Continued, generators: list[torch.Generator]) -> Continuations:
        """Every text by a generator of its own: but for rounding, it does not matter which batch it is in."""
        numbers = [torch.rand(draw.anchors, 1 + draw.length, generator=g, device=g.device) for g in generators]
        uniform = torch.stack(numbers)  # [B, A, 1 + L]
        doubt = (1 - self._confidence(batch)).clamp(min=_LEAST_DOUBT) * batch.real  # [B, Q]
        chosen = drawn_at(doubt[:, None].expand(-1, draw.anchors, -1), uniform[..., 0])
        roots = batch.drafted.gather(1, chosen) - 2
        return continue_text(self.target, batch.ids, roots, draw.length, self.temperature, uniform[..., 1:])

    def _forget(self) -> None:
        """What was drawn last, when there is too much: what stays is then met again in every epoch."""
        room = _MEMORY // sum(field.nbytes for field in next(iter(self._remembered.values())))
        for example in list(self._remembered)[room:]:
            del self._remembered[example]

    @torch.no_grad()
    def drafted(
        self, part: Part, draw: Drafted, batch: Batch, drafter: Eagle3Drafter, generator: torch.Generator
    ) -> Posterior:
        """S paths below some roots of every sequence, drawn from the drafter and scored by the target in one pass.

        A path ends with the answer, at an EOS. Its share among those of its anchor grows with the number of its tokens
        that the verifier keeps; all anchors of the batch together weigh as much as the batch's drafted tokens.
        """
        S, A = draw.samples, draw.anchors
        roots = _anchors(batch, A, generator).roots.repeat_interleave(S, 1)
        with self.autocast():
            tokens, log_q = draw_paths(
                drafter,
                self.target,
                batch.features.aux,
                batch.ids,
                roots,
                batch.steps,
                draw.temperature,
                generator,
                self.draft_temperature,
            )
        paths, scored = self._score(batch, roots, tokens)
        kept = scored.log_p.exp() if self.rule == "target" else acceptance(scored.log_p, log_q)
        worth = utility((kept * paths.valid).movedim(-1, 0)).unflatten(1, (A, S))
        share = self_normalised(draw.tempering * worth)  # [B, A, S]
        weight = (_per_anchor(draw, batch) * share).flatten(1)[..., None].expand_as(paths.valid)
        effective = effective_sample_size(share)
        return Posterior(part, paths, self._says(scored), weight, S, utility=worth, effective=effective)

    @torch.no_grad()
    def proposed(
        self, part: Part, draw: Proposed, batch: Batch, drafter: Eagle3Drafter, generator: torch.Generator
    ) -> Posterior:
        """The trees decoding would propose below some roots of every sequence; every node of them counts once."""
        anchors = _anchors(batch, draw.anchors, generator)
        tokens, fresh = self._trees(drafter, draw.shape, batch, anchors.roots)  # [B, A, L, K]
        says, kept, valid, rows = self._judge(batch, anchors, tokens)
        reward = draft_tree_reward(kept.movedim(-1, 0), fresh.movedim(-1, 0))  # [B, A]
        share = (_per_anchor(draw, batch) * (fresh & valid)).flatten(1, 2)
        L = tokens.shape[2]
        roots = anchors.roots.repeat_interleave(L, 1)
        paths = Paths(roots, *(x.flatten(1, 2) for x in (tokens.clamp(min=0), valid, rows)))
        return Posterior(part, paths, says, share, L, utility=reward)

    @torch.no_grad()
    def contrasted(
        self,
        part: Part,
        draw: Contrasted,
        batch: Batch,
        drafter: Eagle3Drafter,
        beginning: Eagle3Drafter,
        generator: torch.Generator,
    ) -> Posterior:
        """The longest accepted path of each tree; its share is how much better the tree is than `beginning`'s."""
        anchors = _anchors(batch, draw.anchors, generator)
        mine, theirs = (self._trees(d, draw.shape, batch, anchors.roots) for d in (drafter, beginning))
        tokens, fresh = (torch.cat(pair, dim=2) for pair in zip(mine, theirs))  # [B, A, L + L', K]
        says, kept, valid, rows = (self._compare if self.rule == "greedy" else self._judge)(batch, anchors, tokens)
        own, kept, fresh = mine[0].shape[2], kept.movedim(-1, 0), fresh.movedim(-1, 0)  # [K, B, A, L + L']
        reward = draft_tree_reward(kept[..., :own], fresh[..., :own])  # [B, A]
        advantage = standardised(reward - draft_tree_reward(kept[..., own:], fresh[..., own:]))
        best = utility(kept)[..., :own].argmax(-1)[..., None, None].expand(-1, -1, 1, batch.steps)
        path = Paths(anchors.roots, *(x.gather(2, best)[:, :, 0] for x in (tokens.clamp(min=0), valid, rows)))
        share = (_per_anchor(draw, batch) * advantage)[..., None].expand_as(path.valid)
        old_log_q = self._log_q(beginning, batch, path)
        return Posterior(part, path, says, share, old_log_q=old_log_q, utility=reward)

    def _compare(self, batch: Batch, anchors: "_Anchors", tokens: Tensor) -> tuple[HeadTarget, Tensor, Tensor, Tensor]:
        """What the target thinks of tokens [B, A, P, K] at temperature 0: the text says it.

        Returns its side, then [B, A, P, K] each: acceptance, which steps are to be trained, the target's rows.
        """
        _, *text = recorded(*batch[:3], batch.steps)
        deep = anchors.chosen[..., None].expand(-1, -1, batch.steps)
        truth, exists, rows = (x.gather(1, deep)[:, :, None] for x in text)  # [B, A, 1, K]
        kept = (tokens == truth) & exists
        return self._said(batch.features), kept.float(), kept.long().cumprod(-1).bool(), rows.expand_as(tokens)

    def _judge(self, batch: Batch, anchors: "_Anchors", tokens: Tensor) -> tuple[HeadTarget, Tensor, Tensor, Tensor]:
        """The same above temperature 0: the target is asked."""
        P = tokens.shape[2]
        paths, scored = self._score(batch, anchors.roots.repeat_interleave(P, 1), tokens.flatten(1, 2))
        kept = scored.log_p.exp() * paths.valid
        return self._says(scored), *(x.unflatten(1, (-1, P)) for x in (kept, paths.valid, scored.rows))

    def _trees(self, drafter: Eagle3Drafter, shape: TreeShape, batch: Batch, roots: Tensor) -> tuple[Tensor, Tensor]:
        """`draw_trees`, cut or filled up to K steps."""
        with self.autocast():
            tokens, fresh = draw_trees(drafter, self.target, batch.features.aux, batch.ids, roots, shape)
        more = (0, batch.steps - shape.depth)
        return F.pad(tokens, more, value=NO_TOKEN), F.pad(fresh, more)

    def _score(self, batch: Batch, roots: Tensor, tokens: Tensor) -> tuple[Paths, Scored]:
        """Drawn paths [B, P, K], each up to its first EOS, and the target's opinion of them."""
        scored = score_paths(self.target, batch.ids, batch.drafted.amax(1) + 1, roots, tokens, self.temperature)
        return Paths(roots, tokens.clamp(min=0), self._exist(tokens), scored.rows), scored

    def _exist(self, tokens: Tensor) -> Tensor:
        """Which tokens [B, P, K] of paths are there, and not behind an EOS."""
        ends = torch.isin(tokens, torch.tensor(self.target.eos_ids, device=tokens.device)).long()
        return (ends.cumsum(-1) == ends) & (tokens >= 0)

    def _confidence(self, batch: Batch) -> Tensor:
        """p of the text's drafted tokens, [B, Q]."""
        hidden, log_normaliser = batch.features.hidden, batch.features.log_normaliser
        words = batch.ids.gather(1, batch.drafted)
        return (self.target.logit(hidden, words) / self.temperature - log_normaliser).exp()

    def _log_q(self, drafter: Eagle3Drafter, batch: Batch, paths: Paths) -> Tensor:
        """A drafter's log-probability of every token of some paths, [B, P, K]; -inf where it cannot be drafted."""
        with self.autocast():
            text = batch.text
            hidden = drafter(
                text.aux,
                self.target.embed(text.next_ids),
                paths.roots,
                self.target.embed(consumed(text.next_ids, paths)),
            )
            log_q = drafter.lm_head(hidden).float().log_softmax(-1)  # [K, B, P, Vd]
        return of_label(log_q, self.draft_of[paths.tokens].movedim(-1, 0), float("-inf")).movedim(0, -1)

    def _said(self, features: Features) -> HeadTarget:
        """The target's side of the text's own tokens."""
        return self._head_target(features.hidden.flatten(0, 1), features.log_normaliser)

    def _says(self, scored: Scored) -> HeadTarget:
        """The target's side of tokens it has scored."""
        return self._head_target(scored.hidden, scored.log_normaliser)

    def _head_target(self, hidden: Tensor, log_normaliser: Tensor) -> HeadTarget:
        return HeadTarget(hidden, self.head, self.bias, log_normaliser.flatten(), self.target.cap, self.temperature)


class _Anchors(NamedTuple):
    """Where paths hang: roots [B, A], and which of the batch's drafted positions that is, chosen [B, A]."""

    roots: Tensor
    chosen: Tensor


def _per_anchor(draw: Drafted | Proposed, batch: Batch) -> Tensor:
    """Weight of an anchor: all of a batch together weigh as much as its drafted tokens, times `draw.weight`."""
    return draw.weight * batch.real.sum() / (len(batch.ids) * draw.anchors)


def _anchors(batch: Batch, count: int, generator: torch.Generator) -> _Anchors:
    """`count` roots of every sequence, evenly among those drafted from, with replacement."""
    chosen = torch.multinomial(batch.real.float(), count, replacement=True, generator=generator)
    return _Anchors(batch.drafted.gather(1, chosen) - 2, chosen)
