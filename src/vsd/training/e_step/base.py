"""Shared by all E-steps: their batch, the posterior that they return, and the models that they use.

Legend: B batch, T tokens, Q drafted tokens of a sequence, A anchors, P paths, S paths of an anchor, K steps, h hidden,
V target and Vd draft vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from vsd.drafters import of_label
from vsd.drafters.lattice import Head, logits
from vsd.errors import ConfigurationError
from vsd.features import Features, ServedFeatures, Texts
from vsd.objective import Drafted, HeadTarget, Part, Proposed, Rule
from vsd.paths import Entries, Paths, Scored, score_paths
from vsd.targets import Prefill, Target, TargetInfo
from vsd.targets.sampling import drawn_at
from vsd.training.random_source import uniform


class Batch(NamedTuple):
    """Texts with the target's features.

    Attributes:
        steps: K, of paths, now.
        prefill: the target's cache of the texts, where the pass that gave the features also filled one; else E-steps
            that go on from the texts read them once more.
    """

    texts: Texts
    features: Features
    steps: int
    prefill: Prefill | None = None

    @property
    def entries(self) -> Entries:
        """The entries of the texts."""
        return Entries.of(self.texts.inputs, self.features.aux)

    def some(self, rows: list[int]) -> "Batch":
        """Only these texts, without the cache."""
        return Batch(self.texts.some(rows), Features(*(field[rows] for field in self.features)), self.steps)


class Posterior(NamedTuple):
    """The outcome of an E-step for one part of the objective: paths and their weights.

    Attributes:
        target: the target's side of the paths' rows.
        share: weight of every token, [B, P, K]; None for recorded paths: 1 each.
        group: so many paths of an anchor stand side by side.
        old_log_q: log q of every token by the drafter that training began with, [B, P, K], where it is needed.
        entries: the entries that the paths hang from, where they are more than the texts'.
        written: whether the tokens are the target's own although they are weighed.
    """

    part: Part
    paths: Paths
    target: HeadTarget
    share: Tensor | None = None
    group: int = 1
    old_log_q: Tensor | None = None
    entries: Entries | None = None
    written: bool = False


class Info(NamedTuple):
    """For the log.

    Attributes:
        utility: expected accepted tokens of every drafted path, or tree.
        effective: effective sample size of every anchor's paths.
    """

    utility: Tensor | None = None
    effective: Tensor | None = None


class Models:
    """The models that E-steps use.

    Args:
        target: `TargetInfo` is enough for recorded paths, and for continuations of a server.
        drafter: as it is trained.
        rule: of verification.
        temperature: at which the target is served: its p is taken there. By `rejection` the drafter draws at it, too;
            trees are grown by its log-probabilities as they are.
        autocast: the precision in which a drafter is run; the target has its own.
        server: continues texts in the target's place.
    """

    def __init__(
        self,
        target: TargetInfo,
        drafter: Any,
        rule: Rule,
        temperature: float,
        autocast: Callable[[], AbstractContextManager[Any]],
        server: ServedFeatures | None = None,
    ) -> None:
        self.server = server
        self.info, self.drafter, self.rule, self.autocast = target, drafter, rule, autocast
        self.temperature, self.draft_temperature = temperature, temperature if rule == "rejection" else 1.0
        vocabulary = drafter.vocabulary
        self.head = target.head_weight[vocabulary.ids].detach()  # [Vd, h]
        self.bias = None if target.head_bias is None else target.head_bias[vocabulary.ids].detach()  # [Vd]
        self.draft_of = vocabulary.rows  # [V]

    @property
    def target(self) -> Target:
        """The target with its layers.

        Raises:
            ConfigurationError: as `check_whole`.
        """
        self.check_whole()
        return cast(Target, self.info)

    def check_whole(self) -> None:
        """Refuse a target without its layers.

        Raises:
            ConfigurationError: only embeddings, final norm and LM head were loaded.
        """
        if not isinstance(self.info, Target):
            raise ConfigurationError("paths that are neither recorded nor a server's need the whole target: load it")

    def recorded(self, features: Features) -> HeadTarget:
        """The target's side of the texts' own tokens."""
        return self.head_target(features.hidden.flatten(0, 1), features.log_normaliser)

    def head_target(self, hidden: Tensor, log_normaliser: Tensor) -> HeadTarget:
        """The target's side of rows with given final hidden states."""
        return HeadTarget(hidden, self.head, self.bias, log_normaliser.flatten(), self.info.cap, self.temperature)

    def confidence(self, batch: Batch) -> Tensor:
        """p of the texts' drafted tokens, [B, Q]."""
        hidden, log_normaliser = batch.features.hidden, batch.features.log_normaliser
        tokens = batch.texts.inputs.ids.gather(1, batch.texts.drafted)
        return (self.info.logit(hidden, tokens) / self.temperature - log_normaliser).exp()

    def score(self, batch: Batch, roots: Tensor, tokens: Tensor) -> tuple[Paths, Scored]:
        """Drafted paths [B, P, K] up to their first EOS, scored by the target."""
        scored = score_paths(self.target, batch.texts.inputs, roots, tokens, self.temperature, batch.prefill)
        return drafted_paths(roots, tokens, self.exist(tokens), scored.rows), scored

    def exist(self, tokens: Tensor) -> Tensor:
        """Which tokens [B, P, K] of paths exist and are not behind an EOS."""
        ends = torch.isin(tokens, torch.tensor(self.info.eos_ids, device=tokens.device)).long()
        return (ends.cumsum(-1) == ends) & (tokens >= 0)

    def log_q(self, drafter: nn.Module, batch: Batch, paths: Paths) -> Tensor:
        """log q of every token of some paths, [B, P, K]; -inf where it cannot be drafted."""
        labels = self.draft_of[paths.tokens].movedim(-1, 0)

        def of_tokens(states: Tensor, head: Head) -> Tensor:
            return of_label(logits(states, head).float().log_softmax(-1), labels, float("-inf"))

        with self.autocast():
            found: Tensor = drafter(batch.entries, paths, of_tokens)
        return found.movedim(0, -1)


class Anchors(NamedTuple):
    """Roots of paths [B, A], and the index of each among the batch's drafted positions, chosen [B, A]."""

    roots: Tensor
    chosen: Tensor

    @classmethod
    def sampled(cls, batch: Batch, count: int, generators: Sequence[torch.Generator]) -> "Anchors":
        """`count` roots of every sequence, uniformly among those drafted from, with replacement."""
        chosen = drawn_at(batch.texts.real[:, None].expand(-1, count, -1), uniform(generators, count))
        return cls(batch.texts.drafted.gather(1, chosen) - 2, chosen)


def drafted_paths(roots: Tensor, tokens: Tensor, valid: Tensor, rows: Tensor) -> Paths:
    """Paths whose tokens no entry holds."""
    tokens = tokens.clamp(min=0)
    return Paths(roots, tokens, valid, rows, torch.full_like(tokens, -1))


def weight_per_anchor(draw: Drafted | Proposed, batch: Batch) -> Tensor:
    """Weight of an anchor [B, 1]: all of a text weigh as much as its drafted tokens, times `draw.weight`."""
    return draw.weight * batch.texts.real.sum(1, keepdim=True) / draw.anchors
