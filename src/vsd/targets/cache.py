"""A preallocated key/value cache for the target: append a tree, keep the accepted rows, forget the rest.

Rows of a batch have their own lengths. Row b owns slots [0, lengths[b]); the position of the token in every slot is
kept beside its keys. New nodes are written for all rows at the same slots [fill, fill + N), fill = max(lengths), and
attention masks hide the gap. Committing moves the accepted nodes of each row to its own end, for all layers at once.
Nothing is ever copied but the accepted rows, and the committed slots of the rows that stay when others leave.

Legend: B batch, H key/value heads, C capacity, N nodes of one pass, A accepted nodes, D head dimension, M layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

_GROW = 256  # slots added at a time


class Store:
    """Keys and values of layers of one shape, [M, B, H, C, D] each."""

    def __init__(self, layers: int, capacity: int, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            states.new_zeros(layers, *states.shape[:2], capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.used = 0  # layers that have a place

    def holds(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Whether there is a place for one more layer, and states [B, H, N, D] fit it."""
        pairs = (self.keys, key_states), (self.values, value_states)
        return self.used < len(self.keys) and all(
            s.device == x.device and s.shape[1:3] == x.shape[:2] and s.shape[4] == x.shape[3] for s, x in pairs
        )

    def grow(self, slots: int) -> None:
        """Add `slots` slots; copies everything."""
        self.keys, self.values = (torch.nn.functional.pad(s, (0, 0, 0, slots)) for s in (self.keys, self.values))

    def move(self, source: Tensor, destination: Tensor) -> None:
        """Copy slots source [B, A] to slots destination [B, A]."""
        source, destination = source.to(self.keys.device), destination.to(self.keys.device)
        for states in (self.keys, self.values):
            index = source[None, :, None, :, None].expand(*states.shape[:1], -1, states.shape[2], -1, states.shape[4])
            rows = states.gather(3, index)
            states.scatter_(3, destination[None, :, None, :, None].expand_as(rows), rows)

    def select(self, rows: Tensor, slots: int) -> None:
        """Keep only the batch rows `rows` [B'] and their first slots; fewer rows move within the same memory."""
        rows = rows.to(self.keys.device)
        self.keys, self.values = (_selected(states, rows, slots) for states in (self.keys, self.values))


class Slots:
    """The slots of a cache, which all its layers share.

    The layers refer to this object and not to the cache: in a cycle they would wait for the garbage collector.

    Attributes:
        devices: of the decoder layers of the cache.
        positions: largest position (of several rows of positions) of the token in every slot, [B, C].
        stores: keys and values.
        fill: first slot of the next pass.
        written: where a traced pass writes, [N]; else None.
        reach: slots that it reads.
    """

    def __init__(self, devices: Sequence[torch.device], positions: Tensor) -> None:
        self.devices, self.positions = devices, positions
        self.stores: list[Store] = []
        self.fill = 0
        self.written: Tensor | None = None
        self.reach = 0

    @property
    def capacity(self) -> int:
        """Slots that there is memory for, C."""
        return self.positions.shape[1]

    def store_for(self, key_states: Tensor, value_states: Tensor) -> Store:
        """The store of layers with such states [B, H, N, D]; nearly always there is one for all layers of a device."""
        for store in self.stores:
            if store.holds(key_states, value_states):
                return store
        first = all(store.keys.device != key_states.device for store in self.stores)
        layers = self.devices.count(key_states.device) if first else 1
        self.stores.append(Store(layers, self.capacity, key_states, value_states))
        return self.stores[-1]

    def reserve(self, slots: int) -> None:
        """Make room for `slots` slots; copies the cache, so callers that know the length say so as `capacity`."""
        if slots > self.capacity:
            more = -(-(slots - self.capacity) // _GROW) * _GROW
            self.positions = torch.nn.functional.pad(self.positions, (0, more))
            for store in self.stores:
                store.grow(more)


class TreeLayer(CacheLayerMixin):
    """The cache of one decoder layer, as transformers uses it: one layer of a store."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take a place on first use, when heads, dtype and device are known."""
        self.store = self.slots.store_for(key_states, value_states)
        self.place = self.store.used
        self.store.used += 1
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [B, H, N, D] at slots [fill, fill + N); return what attention reads: slots [0, fill + N)."""
        slots = self.slots
        if slots.written is not None:
            self.keys.index_copy_(2, slots.written, key_states)
            self.values.index_copy_(2, slots.written, value_states)
            return self.keys[:, :, : slots.reach], self.values[:, :, : slots.reach]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        fill, end = slots.fill, slots.fill + key_states.shape[2]
        slots.reserve(end)
        self.look_up()
        self.keys[:, :, fill:end], self.values[:, :, fill:end] = key_states, value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def look_up(self) -> None:
        """Find this layer's keys and values, each [B, H, C, D], in its store, which may have grown or shrunk."""
        self.keys, self.values = self.store.keys[self.place], self.store.values[self.place]

    def get_seq_length(self) -> int:
        """Slots that the next pass comes after."""
        return self.slots.fill

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys seen by a pass of `query_length` nodes."""
        return (self.slots.fill + query_length if self.slots.written is None else self.slots.reach), 0

    def get_max_length(self) -> int:
        """-1: grows without bound."""
        return -1


class TreeCache(Cache):
    """One `TreeLayer` per decoder layer, and the committed length of every row.

    Args:
        devices: of the decoder layers.
        device: of everything but keys and values.

    Attributes:
        lengths: committed tokens of every row, [B].
        next: position of the token behind the committed ones, [B]: one above the largest.
        slots: keys, values and positions.
    """

    layers: list[TreeLayer]  # type: ignore[assignment]

    def __init__(
        self,
        devices: Sequence[torch.device],
        batch_size: int,
        capacity: int = _GROW,
        device: torch.device | str = "cpu",
    ) -> None:
        self.slots = Slots(devices, torch.zeros(batch_size, capacity, dtype=torch.long, device=device))
        super().__init__(layers=[TreeLayer(self.slots) for _ in devices])
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.next = torch.zeros_like(self.lengths)

    @contextmanager
    def traced(self, nodes: int, static: bool) -> Iterator[None]:
        """Make one pass of so many nodes traceable by a compiler; static: shapes do not depend on the context."""
        slots, end = self.slots, self.slots.fill + nodes
        slots.reserve(end)
        for layer in self.layers:
            layer.look_up()
        slots.written = torch.arange(slots.fill, end, device=self.lengths.device)
        slots.reach = slots.capacity if static else end
        try:
            yield
        finally:
            slots.written = None

    def place(self, positions: Tensor) -> Tensor:
        """Note the positions [B, N] or [R, B, N] of the nodes of the next pass; returns the largest of each, [B, N]."""
        slots, end = self.slots, self.slots.fill + positions.shape[-1]
        slots.reserve(end)
        largest = positions if positions.dim() == 2 else positions.amax(0)
        slots.positions[:, slots.fill : end] = largest
        return largest

    def commit(self, nodes: Tensor, counts: Tensor) -> None:
        """Keep nodes[b, :counts[b]] of the last pass for each row b.

        nodes [B, A]: indices into the pass's N nodes, in path order; entries beyond counts[b] are ignored.
        """
        offset = torch.arange(nodes.shape[1], device=nodes.device)
        slots = self.slots
        source = slots.fill + nodes
        destination = self.lengths[:, None] + offset
        kept = offset < counts[:, None]
        positions = slots.positions.gather(1, source)
        if bool(((source != destination) & kept).any()):
            slots.positions.scatter_(1, destination, positions)
            for store in slots.stores:
                store.move(source, destination)
        self.next = torch.maximum(self.next, positions.masked_fill(~kept, -1).amax(1) + 1)
        self.lengths = self.lengths + counts
        slots.fill = int(self.lengths.max())

    def truncate(self, lengths: Tensor) -> None:
        """Forget the tokens of every row behind its first lengths[b] ≥ 1."""
        self.lengths = lengths
        self.next = self.slots.positions.gather(1, lengths[:, None] - 1)[:, 0] + 1
        self.slots.fill = int(lengths.max())

    def select(self, rows: Tensor) -> None:
        """Keep only the batch rows `rows` [B']: finished sequences leave, repeated ones are copied."""
        slots = self.slots
        self.lengths, self.next, slots.positions = self.lengths[rows], self.next[rows], slots.positions[rows]
        slots.fill = int(self.lengths.max())
        for store in slots.stores:
            store.select(rows, slots.fill)


def _selected(states: Tensor, rows: Tensor, slots: int) -> Tensor:
    """Rows [B'] of states [M, B, H, C, D], with their first slots, [M, B', H, C, D]; a view where B' is at most B."""
    if len(rows) <= states.shape[1]:
        kept = states[:, : len(rows)]
    else:
        kept = states.new_zeros(states.shape[0], len(rows), *states.shape[2:])
    kept[:, :, :, :slots] = states[:, rows, :, :slots]  # read whole before it is written
    return kept


def visible(context: Tensor, fill: int, ancestors: Tensor) -> Tensor:
    """Which slots each node of a pass may attend to, [B, N, fill + N] bool.

    context [B, N or 1]: how many committed tokens each node sees; or [B, N, fill] bool: which. ancestors [B or 1, N, N]
    bool, True where node j is node i or one of its ancestors.
    """
    committed = context
    if context.dim() == 2:
        committed = torch.arange(fill, device=context.device) < context[..., None]  # [B, N or 1, fill]
    B, N = context.shape[0], ancestors.shape[1]
    return torch.cat([committed.expand(B, N, fill), ancestors.expand(B, N, N)], dim=-1)
