"""The draft vocabulary: the target tokens a drafter can propose (EAGLE-3, arXiv:2503.01840; FR-Spec, 2502.14856).

Checkpoints store it as `d2t`, an offset (target_id = draft_id + d2t[draft_id]), and `t2d`, a mask over the target's
tokens. Draft rows ascend in target id. Build it from the tokens that are trained on: another text covers fewer of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vsd.errors import ConfigurationError, DataError


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


def of_label(values: Tensor, labels: Tensor, missing: float) -> Tensor:
    """values [..., Vd] at draft ids labels [...]; `missing` where the label is -1, a token that cannot be drafted."""
    return values.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels < 0, missing)


def draft_vocabulary(tokens: Tensor, vocab_size: int, size: int) -> DraftVocabulary:
    """The `size` most frequent of `tokens` [n]; ties, and places left over, go to the smaller id.

    Raises:
        ConfigurationError: `size` is not within 1 … `vocab_size`.
        DataError: there are no tokens.
    """
    if not 0 < size <= vocab_size:
        raise ConfigurationError(f"a draft vocabulary of {size} does not fit a target vocabulary of {vocab_size}")
    if tokens.numel() == 0:
        raise DataError("there are no supervised tokens to build a draft vocabulary from")
    counts = torch.bincount(tokens.flatten().cpu(), minlength=vocab_size)
    chosen = counts.argsort(descending=True, stable=True)[:size].sort().values
    return DraftVocabulary(chosen, vocab_size, float(counts[chosen].sum() / counts.sum()))
