"""The draft vocabulary: the target tokens a drafter can propose (EAGLE-3, arXiv:2503.01840; FR-Spec, 2502.14856).

`d2t` is an offset: target_id = draft_id + d2t[draft_id]. `t2d` marks the target tokens that are in. Draft rows ascend
in target id. Build it from the tokens that are trained on: another text covers fewer of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vsd.errors import VSDError


class DraftVocabulary(NamedTuple):
    """`d2t` [Vd] int64 offsets, `t2d` [V] bool, `coverage`: share of the counted tokens that can be drafted."""

    d2t: Tensor
    t2d: Tensor
    coverage: float


def of_label(values: Tensor, labels: Tensor, missing: float) -> Tensor:
    """values [..., Vd] at draft ids labels [...]; `missing` where the label is -1, a token that cannot be drafted."""
    return values.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels < 0, missing)


def draft_vocabulary(tokens: Tensor, vocab_size: int, size: int) -> DraftVocabulary:
    """The `size` most frequent of `tokens` [n]; ties, and places left over, go to the smaller id.

    Raises:
        VSDError: `size` is not within 1 … `vocab_size`, or there are no tokens.
    """
    if not 0 < size <= vocab_size:
        raise VSDError(f"a draft vocabulary of {size} does not fit a target vocabulary of {vocab_size}")
    if tokens.numel() == 0:
        raise VSDError("there are no supervised tokens to build a draft vocabulary from")
    counts = torch.bincount(tokens.flatten().cpu(), minlength=vocab_size)
    chosen = counts.argsort(descending=True, stable=True)[:size].sort().values
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[chosen] = True
    return DraftVocabulary(chosen - torch.arange(size), t2d, float(counts[chosen].sum() / counts.sum()))
