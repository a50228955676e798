"""A preallocated key/value cache for the target: append a tree, keep the accepted rows, forget the rest.

Rows of a batch have their own lengths. Row b owns slots [0, lengths[b]); slot i holds position i. New nodes are
written for all rows at the same slots [fill, fill + N), fill = max(lengths), and attention masks hide the gap.
Committing moves the accepted nodes of each row to its own end. Nothing is ever copied but the accepted rows.

Legend: B batch, H key/value heads, C capacity, N nodes of one pass, A accepted nodes, D head dimension.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

_GROW = 256  # slots added at a time


class TreeLayer(CacheLayerMixin):
    """Keys and values of one decoder layer, [B, H, C, D]; `fill` is the first slot of the next pass."""

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.fill = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate on first use, when heads, dtype and device are known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        B, H, _, D = key_states.shape
        self.keys = key_states.new_zeros(B, H, self.capacity, D)
        self.values = value_states.new_zeros(B, H, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def reserve(self, slots: int) -> None:
        """Make room for `slots` slots; copies the cache, so callers that know the length say so as `capacity`."""
        assert self.keys is not None and self.values is not None
        have = self.keys.shape[2]
        if slots > have:
            more = -(-(slots - have) // _GROW) * _GROW
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, more))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, more))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [B, H, N, D] at slots [fill, fill + N); return views of slots [0, fill + N)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.fill + key_states.shape[2]
        self.reserve(end)
        assert self.keys is not None and self.values is not None
        self.keys[:, :, self.fill : end] = key_states
        self.values[:, :, self.fill : end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Slots that the next pass comes after."""
        return self.fill

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys seen by a pass of `query_length` nodes."""
        return self.fill + query_length, 0

    def get_max_length(self) -> int:
        """-1: grows without bound."""
        return -1

    def move(self, source: Tensor, destination: Tensor) -> None:
        """Copy slots source [B, A] to slots destination [B, A]."""
        for states in (self.keys, self.values):
            assert states is not None
            index = source[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
            rows = states.gather(2, index)
            states.scatter_(2, destination[:, None, :, None].expand_as(rows), rows)

    def select(self, rows: Tensor) -> None:
        """Keep only the batch rows `rows` [B']."""
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]


class TreeCache(Cache):
    """One `TreeLayer` per decoder layer, and the committed length of every row."""

    layers: list[TreeLayer]  # type: ignore[assignment]
    lengths: Tensor

    def __init__(
        self, num_layers: int, batch_size: int, capacity: int = _GROW, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(layers=[TreeLayer(capacity) for _ in range(num_layers)])
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)

    @property
    def fill(self) -> int:
        """First slot of the next pass."""
        return self.layers[0].fill

    def commit(self, nodes: Tensor, counts: Tensor) -> None:
        """Keep nodes[b, :counts[b]] of the last pass for each row b.

        nodes [B, A]: indices into the pass's N nodes, in path order; entries beyond counts[b] are ignored.
        """
        A = nodes.shape[1]
        offset = torch.arange(A, device=nodes.device)
        source = self.fill + nodes
        destination = self.lengths[:, None] + offset
        lengths = self.lengths + counts
        in_place = bool((source == destination)[offset < counts[:, None]].all())
        fill = int(lengths.max())
        for layer in self.layers:
            if not in_place:
                layer.reserve(int(destination.max()) + 1)
                layer.move(source, destination)
            layer.fill = fill
        self.lengths = lengths

    def select(self, rows: Tensor) -> None:
        """Keep only the batch rows `rows` [B'] (finished sequences leave the batch)."""
        self.lengths = self.lengths[rows]
        for layer in self.layers:
            layer.select(rows)
            layer.fill = int(self.lengths.max())


def visible(context: Tensor, fill: int, ancestors: Tensor) -> Tensor:
    """Which slots each node of a pass may attend to, [B, N, fill + N] bool.

    context [B, N or 1]: how many committed tokens each node sees; ancestors [B or 1, N, N] bool, True where node j is
    node i or one of its ancestors.
    """
    committed = torch.arange(fill, device=context.device) < context[..., None]  # [B, N or 1, fill]
    B, N = context.shape[0], ancestors.shape[1]
    return torch.cat([committed.expand(B, N, fill), ancestors.expand(B, N, N)], dim=-1)


def key_positions(lengths: Tensor, fill: int, positions: Tensor) -> Tensor:
    """Position of the key in every slot, [B, fill + N]: slot i holds position i; nodes hold positions [B, N]."""
    slots = torch.arange(fill, device=lengths.device).expand(lengths.shape[0], fill)
    return torch.cat([slots, positions], dim=-1)
