"""State of an EAGLE-3 drafter that is decoding: keys and values of committed entries, then of the tree being drafted.

Legend: B batch, H key/value heads, C slots, A entries or nodes, D head dimension, h hidden.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from vsd.drafters.eagle3.model import Eagle3Config


class Eagle3State:
    """Row b owns slots [0, lengths[b]); drafted nodes are written behind the longest row, from slot `fill` on.

    Attributes:
        keys, values: [B, H, C, D].
        lengths: committed entries, [B].
        next: position of the next entry, [B].
        hidden: output for the root, before the final norm, [B, 1, h].
    """

    hidden: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.lengths = torch.zeros(len(keys), dtype=torch.long, device=keys.device)
        self.next = torch.zeros_like(self.lengths)
        self.fill = 0

    @classmethod
    def empty(cls, config: "Eagle3Config", batch_size: int, capacity: int, like: Tensor) -> "Eagle3State":
        """No entries, room for `capacity`; dtype and device are those of `like`."""
        shape = (batch_size, config.num_key_value_heads, capacity, config.head_dim)
        return cls(like.new_zeros(shape), like.new_zeros(shape))

    @property
    def committed(self) -> Tensor:
        """Which slots hold committed entries, [B, fill] bool."""
        return torch.arange(self.fill, device=self.lengths.device) < self.lengths[:, None]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Write entries [B, H, A, D] behind each row's own; `commit` says how many of them count."""
        slots = self.lengths[:, None] + torch.arange(keys.shape[2], device=keys.device)  # [B, A]
        self._reserve(int(slots.max()) + 1)
        index = slots[:, None, :, None].expand_as(keys)
        self.keys.scatter_(2, index, keys)
        self.values.scatter_(2, index, values)

    def commit(self, lengths: Tensor, position: Tensor) -> None:
        """From now on rows have `lengths` [B] entries, and the next one's position is `position` [B]."""
        self.lengths, self.next = lengths, position
        self.fill = int(lengths.max())

    def draft(self, keys: Tensor, values: Tensor, slot: int) -> None:
        """Write drafted nodes [B, H, A, D] from `slot` on."""
        end = slot + keys.shape[2]
        self._reserve(end)
        self.keys[:, :, slot:end], self.values[:, :, slot:end] = keys, values

    def select(self, rows: Tensor) -> None:
        """Keep only the batch rows `rows` [B']."""
        self.keys, self.values, self.hidden = self.keys[rows], self.values[rows], self.hidden[rows]
        self.commit(self.lengths[rows], self.next[rows])

    def _reserve(self, slots: int) -> None:
        more = slots - self.keys.shape[2]
        if more > 0:
            self.keys, self.values = (F.pad(states, (0, 0, 0, more)) for states in (self.keys, self.values))
