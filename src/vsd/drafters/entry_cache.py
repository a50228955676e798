"""Keys and values of a drafter that is decoding: those of committed entries, then those of the draft.

Legend: n layers of the drafter, B batch, H key/value heads, C slots, L used slots, A entries or drafted nodes,
D head dimension, h hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class EntryCache:
    """Row b owns slots [0, lengths[b]); drafted nodes are written behind the longest row, from slot `fill` on.

    Attributes:
        keys, values: [n, B, H, C, D].
        lengths: committed entries, [B].
        next: position of the next entry, [B].
        hidden: output of the last layer for the root, before the final norm, [B, 1, h], in families that use it.
    """

    hidden: Tensor | None = None

    def __init__(self, layers: int, rows: int, heads: int, capacity: int, head_dim: int, like: Tensor) -> None:
        """No entries, room for `capacity`; dtype and device are those of `like`."""
        self.keys = like.new_zeros(layers, rows, heads, capacity, head_dim)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=like.device)
        self.next = torch.zeros_like(self.lengths)
        self.fill = 0

    @property
    def committed(self) -> Tensor:
        """Which slots hold committed entries, [B, fill] bool."""
        return torch.arange(self.fill, device=self.lengths.device) < self.lengths[:, None]

    def reserve(self, slots: int) -> None:
        """Make room for so many slots."""
        more = slots - self.keys.shape[3]
        if more > 0:
            self.keys, self.values = (F.pad(states, (0, 0, 0, more)) for states in (self.keys, self.values))

    def behind(self, count: int) -> Tensor:
        """Slots of `count` new entries behind each row's own, [B, count]."""
        slots = self.lengths[:, None] + torch.arange(count, device=self.lengths.device)
        self.reserve(int(slots.max()) + 1)
        return slots

    def up_to(self, slots: Tensor) -> Tensor:
        """Which slots entries at `slots` [B, A] see, their own included, [B, A, L] bool."""
        return torch.arange(int(slots.max()) + 1, device=slots.device) <= slots[..., None]

    def append(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write entries [B, H, A, D] to slots [B, A]; `commit` says how many of them count."""
        index = slots[:, None, :, None].expand_as(keys)
        self.keys[layer].scatter_(2, index, keys)
        self.values[layer].scatter_(2, index, values)

    def commit(self, lengths: Tensor, position: Tensor) -> None:
        """From now on rows have `lengths` [B] entries, and the next one's position is `position` [B]."""
        self.lengths, self.next = lengths, position
        self.fill = int(lengths.max())

    def draft(self, layer: int, slot: int, keys: Tensor, values: Tensor) -> None:
        """Write drafted nodes [B, H, A, D] from `slot` on."""
        end = slot + keys.shape[2]
        self.reserve(end)
        self.keys[layer, :, :, slot:end], self.values[layer, :, :, slot:end] = keys, values

    def attend(self, layer: int, queries: Tensor, seen: Tensor) -> Tensor:
        """Queries [B, H', A, D] over the first L slots, seen [B, A, L] bool -> [B, H', A, D]."""
        keys, values = (states[layer, :, :, : seen.shape[-1]] for states in (self.keys, self.values))
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen[:, None], enable_gqa=True)

    def select(self, rows: Tensor) -> None:
        """Keep only the batch rows `rows` [B']."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.hidden = None if self.hidden is None else self.hidden[rows]
        self.commit(self.lengths[rows], self.next[rows])
