"""Entries: the places of a text that can be drafted from.

Entry t pairs the target's features at position t with the token at t + 1; from it a drafter predicts the token at
t + 2 (EAGLE's alignment). This file is the one place that knows it.

Legend: B sequences, T tokens of the text, E entries, n h width of the features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vsd.targets.inputs import Padded


class Entries(NamedTuple):
    """E entries in each of B sequences.

    Attributes:
        aux: target features, [B, E, n h].
        next_ids: the token behind each entry's position, [B, E].
        first_ids: the token at position 0, which no entry holds, [B].
        positions: of the features, [B, E].
        seen: the entries that each attends to, itself included, [B, E, E] bool; None for one text: those up to it.
    """

    aux: Tensor
    next_ids: Tensor
    first_ids: Tensor
    positions: Tensor
    seen: Tensor | None = None

    @classmethod
    def of(cls, text: Padded, aux: Tensor, last: Tensor | None = None) -> "Entries":
        """Entries of right-padded texts.

        Args:
            aux: features of every token, [B, T, n h].
            last: the token behind each text, [B], for the entry of its last token; None where that is not used.
        """
        next_ids = text.ids.roll(-1, dims=1)
        if last is not None:
            next_ids = next_ids.scatter(1, text.lengths[:, None] - 1, last[:, None])
        return cls(aux, next_ids, text.ids[:, 0], text.first_row)

    def seen_from(self, roots: Tensor) -> Tensor:
        """The entries that those at roots [B, P] attend to, [B, P, E] bool."""
        if self.seen is None:
            return torch.arange(self.next_ids.shape[1], device=roots.device) <= roots[..., None]
        return rows_at(self.seen, roots)


def rows_at(x: Tensor, places: Tensor) -> Tensor:
    """x [B, N, w] at places [B, P], [B, P, w]."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
