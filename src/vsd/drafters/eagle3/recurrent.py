"""EAGLE's recurrence: one decoder layer whose output is fed back in place of the target's features.

Entry t gives the layer the target's features at t and the token at t + 1; its output predicts the token at t + 2.
Drafting further feeds the output back with the drafted token. Step k from root t sees the step-0 keys of the entries
and only its own keys of steps 1 … k; its rotary position is that of the root, plus k. `states` (training) and `expand`
(decoding) share every operation but the bookkeeping of keys.

Legend: B batch, E entries, P paths, K steps, W nodes of a level, L slots, h hidden, s width of what is fed back,
Hkv key/value heads, D head dimension, Vd draft vocabulary.
"""

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vsd.drafters.attention import attend_block
from vsd.drafters.autoregressive import Autoregressive
from vsd.drafters.eagle3.layer import EagleLayer
from vsd.drafters.entry_cache import EntryCache
from vsd.drafters.feature_drafter import FeatureDrafter
from vsd.paths import Entries, Paths


class Roots(NamedTuple):
    """Roots of paths, and the entries that the layer reads.

    Attributes:
        hidden: at the roots, in place of what is fed back later, [B, P, s].
        shared: keys and values of the entries, [B, Hkv, E, D] each.
        seen: the entries that each root attends to, [B, P, E] bool.
        positions: of the roots, [B, P].
        counts: entries of a text up to each root, [B, P].
    """

    hidden: Tensor
    shared: tuple[Tensor, Tensor]
    seen: Tensor
    positions: Tensor
    counts: Tensor


class Recurrent(Autoregressive, FeatureDrafter):
    """A drafter of one decoder layer; a family says what the layer reads."""

    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    rotary_emb: Any

    @abstractmethod
    def roots(self, entries: Entries, roots: Tensor) -> Roots:
        """The roots [B, P] of texts."""

    @abstractmethod
    def read(self, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's input for tokens' embeddings [..., h] and what was fed back [..., s].

        Returns:
            What its residual connections start from, [..., h], and the input of its attention.
        """

    @abstractmethod
    def fed_back(self, hidden: Tensor, output: Tensor) -> Tensor:
        """What is fed back next, [..., s]: from what was fed back before, and the layer's output [..., h]."""

    @abstractmethod
    def predicting(self, hidden: Tensor) -> Tensor:
        """What enters the draft head, [..., h], of what would be fed back, [..., s]."""

    @property
    def layer(self) -> EagleLayer:
        """Its decoder layer."""
        only: EagleLayer = self.decoder_layers()[0]
        return only

    def states(self, entries: Entries, paths: Paths) -> Tensor:
        """Draft K steps from every root along given tokens (EAGLE-3's training-time test), [K, B, P, h].

        Step k is run for the first paths only, as many as some sequence has valid ones: sort them longest first
        (`longest_first`). States of steps that are not run are zeros.
        """
        hidden, shared, seen, at, _ = self.roots(entries, paths.roots)
        step: Callable[..., Any] = self._step
        if self.gradient_checkpointing and self.training:
            step = partial(self._gradient_checkpointing_func, self._step)
        own, steps = _none(shared, paths.roots), []
        P = paths.roots.shape[1]
        consumed = self.embed(paths.consumed(entries.next_ids))  # [K, B, P, h]
        for k, (embeds, W) in enumerate(zip(consumed, paths.widths())):
            kept = own[0][:, :, :W], own[1][:, :, :W]
            hidden, own = step(hidden[:, :W], embeds[:, :W], at[:, :W] + k, shared, seen[:, :W], kept, k > 0)
            steps.append(F.pad(self.predicting(hidden), (0, 0, 0, P - W)))
        return torch.stack(steps)

    @torch.no_grad()
    def sample(self, entries: Entries, roots: Tensor, steps: int, choose: Callable[[Tensor], Tensor]) -> None:
        """See `Drafter.sample`."""
        ids = self.vocabulary.ids
        embeds = self.embed(entries.next_ids.gather(1, roots))
        hidden, shared, seen, at, _ = self.roots(entries, roots)
        own = _none(shared, roots)
        for k in range(steps):
            hidden, own = self._step(hidden, embeds, at + k, shared, seen, own, k > 0)
            embeds = self.embed(ids[choose(self.log_probs(hidden))])

    @torch.no_grad()
    def begin_at(self, entries: Entries, roots: Tensor, room: int) -> EntryCache:
        """See `Drafter.begin_at`."""
        hidden, shared, seen, at, counts = self.roots(entries, roots)
        first = self.embed(entries.next_ids.gather(1, roots))
        hidden, _ = self._step(hidden, first, at, shared, seen, _none(shared, roots), False)
        (B, P), E = roots.shape, shared[0].shape[2]
        state = self.new_cache(B * P, E + room)
        state.keys[0, :, :, :E], state.values[0, :, :, :E] = (x.repeat_interleave(P, 0) for x in shared)
        state.commit(counts.flatten(), at.flatten() + 1)
        state.hidden = hidden.flatten(0, 1)[:, None]
        return state

    def _step(
        self,
        hidden: Tensor,
        embeds: Tensor,
        positions: Tensor,
        shared: tuple[Tensor, Tensor],
        seen: Tensor,
        own: tuple[Tensor, Tensor],
        drafted: bool,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One step of all roots: hidden [B, P, s], embeds [B, P, h], positions [B, P] -> next hidden, and `own`.

        `own`: every root's keys and values of the steps 1 … k before, [B, Hkv, P, k, D]; this step's are added.
        """
        layer, attention = self.layer, self.layer.self_attn
        residual, a = self.read(embeds, hidden)
        rotary = self.rotary_emb(residual, positions)
        if drafted:  # step 0 is among the shared keys
            keys, values = (x[:, :, :, None] for x in attention.keys_values(a, rotary))
            own = torch.cat([own[0], keys], dim=3), torch.cat([own[1], values], dim=3)
        every = torch.ones(1, own[0].shape[3], dtype=torch.bool, device=seen.device)
        block = own[0].flatten(2, 3), own[1].flatten(2, 3)
        attended = attend_block(attention.queries(a, rotary), shared, seen, block, every)
        return self.fed_back(hidden, layer.finish(residual, attended)), own

    def expand(self, state: EntryCache, hidden: Tensor, tokens: Tensor, depth: int, seen: Tensor) -> Tensor:
        """See `Autoregressive.expand`; hidden states are what is fed back."""
        layer, attention = self.layer, self.layer.self_attn
        W, S = seen.shape[1:]
        positions = (state.next - 1 + depth)[:, None]  # [B, 1]
        residual, a = self.read(self.embed(tokens).to(self.dtype), hidden)
        rotary = self.rotary_emb(residual, positions)
        state.draft(0, state.fill + S - W, *attention.keys_values(a, rotary))
        allowed = torch.cat([state.committed[:, None].expand(-1, W, -1), seen], dim=-1)
        attended = state.attend(0, attention.queries(a, rotary), allowed)
        return self.fed_back(hidden, layer.finish(residual, attended))

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Draft distribution in float32: log q [..., Vd] of what is fed back, [..., s]."""
        log_q: Tensor = self.lm_head(self.predicting(hidden)).float().log_softmax(-1)
        return log_q


def _none(shared: tuple[Tensor, Tensor], roots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of no step of roots [B, P], [B, Hkv, P, 0, D] each."""
    keys, values = (x.new_empty(*x.shape[:2], roots.shape[1], 0, x.shape[3]) for x in shared)
    return keys, values
