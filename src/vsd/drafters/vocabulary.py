"""The draft vocabulary: the target tokens a drafter can propose (EAGLE-3, arXiv:2503.01840; FR-Spec, 2502.14856).

Checkpoints store it as `d2t`, an offset (target_id = draft_id + d2t[draft_id]), and `t2d`, a mask over the target's
tokens. Draft rows ascend in target id. Build it from the tokens that are trained on: another text covers fewer of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vsd.errors import ConfigurationError, DataError, MismatchError


class DraftVocabulary(NamedTuple):
    """Vd of V target tokens.

    Attributes:
        ids: target id of every draft row, ascending, [Vd] int64.
        target_size: V.
        coverage: share of the counted tokens that can be drafted.
    """

    ids: Tensor
    target_size: int
    coverage: float = 1.0

    @property
    def size(self) -> int:
        """Vd."""
        return len(self.ids)

    @property
    def rows(self) -> Tensor:
        """Draft row of every target token, [V]; -1 where it cannot be drafted."""
        rows = torch.full((self.target_size,), -1, device=self.ids.device)
        rows[self.ids] = torch.arange(self.size, device=self.ids.device)
        return rows

    @property
    def d2t(self) -> Tensor:
        """Offsets, [Vd] int64."""
        return self.ids - torch.arange(self.size, device=self.ids.device)

    @property
    def t2d(self) -> Tensor:
        """Which target tokens can be drafted, [V] bool."""
        return torch.zeros(self.target_size, dtype=torch.bool, device=self.ids.device).index_fill_(0, self.ids, True)


def draft_ids(place: object, d2t: Tensor, t2d: Tensor) -> Tensor:
    """The target ids [Vd] of a checkpoint's offsets d2t [Vd], checked with its mask t2d [V].

    Raises:
        MismatchError: d2t holds ids instead of offsets, is no ascending map into V tokens, or t2d names others.
    """
    V, offsets = len(t2d), d2t.long()
    ids = torch.arange(len(offsets), device=d2t.device) + offsets
    if looks_absolute(offsets, t2d):
        raise MismatchError(f"d2t of '{place}' holds token ids, not offsets: subtract 0, 1, 2, … from its entries")
    if not 0 <= ids.min() <= ids.max() < V or (ids.diff() <= 0).any():
        raise MismatchError(f"d2t of '{place}' is no ascending map into {V} tokens: another target's?")
    if not torch.equal(t2d.nonzero()[:, 0], ids):
        raise MismatchError(f"t2d and d2t of '{place}' do not agree")
    return ids


def looks_absolute(d2t: Tensor, t2d: Tensor | None) -> bool:
    """Whether d2t [Vd] holds the target ids themselves: those of the mask t2d [V], or, without one, no two neighbours.

    Offsets stay equal where two tokens that can be drafted are neighbours, and no draft vocabulary is without such.
    """
    if t2d is not None:
        return torch.equal(t2d.nonzero()[:, 0], d2t) and bool(d2t.any())
    return len(d2t) > 1 and bool((d2t.diff() > 0).all())


def of_label(values: Tensor, labels: Tensor, missing: float) -> Tensor:
    """values [..., Vd] at draft ids labels [...]; `missing` where the label is -1, a token that cannot be drafted."""
    return values.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels < 0, missing)


def draft_vocabulary(tokens: Tensor, vocab_size: int, size: int) -> DraftVocabulary:
    """The `size` most frequent of `tokens` [n]; see `most_frequent`."""
    return most_frequent(torch.bincount(tokens.flatten().cpu(), minlength=vocab_size), size)


def most_frequent(counts: Tensor, size: int) -> DraftVocabulary:
    """The `size` tokens with the largest counts [V]; ties, and places left over, go to the smaller id.

    Raises:
        ConfigurationError: `size` is not within 1 … V.
        DataError: there are no tokens.
    """
    vocab_size = len(counts)
    if not 0 < size <= vocab_size:
        raise ConfigurationError(f"a draft vocabulary of {size} does not fit a target vocabulary of {vocab_size}")
    if not counts.any():
        raise DataError("there are no supervised tokens to build a draft vocabulary from")
    chosen = counts.argsort(descending=True, stable=True)[:size].sort().values
    return DraftVocabulary(chosen, vocab_size, float(counts[chosen].sum() / counts.sum()))
