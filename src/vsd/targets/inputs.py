"""The inputs of a model: token ids with their positions, and whatever else the prompt's pass reads.

Every layer hands these on whole, so that a new kind of input (pixel values of images) changes only its producer, the
data layer, and its consumer, the target.

Legend: B sequences, N tokens of the longest one, R rows of positions (3 for M-RoPE).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """One sequence.

    Attributes:
        ids: token ids.
        positions: [N] or [R, N]; None: 0 … N - 1.
        extras: further arguments of the model's `forward` for the pass that reads the prompt, such as pixel values.
            Those of several sequences are concatenated along their first dimension.
    """

    ids: list[int]
    positions: Tensor | None = None
    extras: Mapping[str, Tensor] = {}

    def followed_by(self, ids: Sequence[int]) -> "Inputs":
        """The sequence with more text behind it: each token's position is one above the largest before."""
        if self.positions is None:
            return self._replace(ids=[*self.ids, *ids])
        more = int(self.positions.max()) + 1 + torch.arange(len(ids), device=self.positions.device)
        positions = torch.cat([self.positions, more.expand(*self.positions.shape[:-1], -1)], dim=-1)
        return self._replace(ids=[*self.ids, *ids], positions=positions)


class Padded(NamedTuple):
    """A batch of sequences, padded on the right.

    Attributes:
        ids: [B, N].
        lengths: [B].
        positions: [B, N] or [R, B, N]; padding continues the sequence.
        extras: as in `Inputs`, of all sequences.
    """

    ids: Tensor
    lengths: Tensor
    positions: Tensor
    extras: dict[str, Tensor]

    @classmethod
    def of(cls, sequences: Sequence[Inputs], device: torch.device | str = "cpu") -> "Padded":
        """Pad and stack sequences."""
        lengths = [len(sequence.ids) for sequence in sequences]
        width = max(lengths)
        filled = [sequence.followed_by([0] * (width - len(sequence.ids))) for sequence in sequences]
        positions = [torch.arange(width) if one.positions is None else one.positions for one in filled]
        extras = {
            name: torch.cat([one.extras[name] for one in sequences if name in one.extras]).to(device)
            for name in dict.fromkeys(name for one in sequences for name in one.extras)
        }
        return cls(
            torch.tensor([one.ids for one in filled], device=device),
            torch.tensor(lengths, device=device),
            torch.stack(torch.broadcast_tensors(*positions), dim=-2).to(device),
            extras,
        )

    @property
    def first_row(self) -> Tensor:
        """Positions [B, N]: the only row, or the first of several, as drafters with plain rotary embeddings use it."""
        return self.positions if self.positions.dim() == 2 else self.positions[0]

    def only(self, rows: Tensor | list[int]) -> "Padded":
        """Some rows of a batch of text alone."""
        return Padded(self.ids[rows], self.lengths[rows], self.positions[..., rows, :], {})
