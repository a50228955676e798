"""EAGLE-3 drafter (Li et al., arXiv:2503.01840): one decoder layer over the target's fused hidden states.

Entry t pairs the target's features at position t with the token at t + 1 and predicts the token at t + 2:

    g_t = fc(aux_t)                                              once, from three target layers
    a   = [input_layernorm(embed(x_{t+1})) ; hidden_norm(g_t)]   2h wide, into q, k, v
    r   = g_t + Attn(a);   out = r + MLP(post_attention_layernorm(r));   logits = lm_head(norm(out))

Drafting further feeds `out` (before `norm`) back in place of g, with the drafted token. Step k from root t sees the
step-0 keys 0 … t and only its own keys of steps 1 … k; its rotary position is t + k. `states` (training) and
`advance`/`expand` (decoding) share every operation but the bookkeeping of keys.

Tensor names are those of `LlamaForCausalLMEagle3` checkpoints. Token embeddings are the target's (`attach`), so tied
and untied targets are alike and a checkpoint holds the drafter alone.

Legend: B batch, E entries, P paths, K steps, A new tokens, W nodes of a level, L slots, h hidden, H heads, D head
dimension, V target vocabulary, Vd draft vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vsd.drafters.attention import attend_block
from vsd.drafters.autoregressive import Autoregressive
from vsd.drafters.eagle3.body import EagleBody
from vsd.drafters.eagle3.layer import EagleLayer
from vsd.drafters.entry_cache import EntryCache
from vsd.drafters.feature_drafter import FeatureDrafterConfig
from vsd.paths import Entries, Paths


class Eagle3Config(FeatureDrafterConfig):
    """Sizes of an EAGLE-3 drafter, and which target it belongs to."""

    model_type = "vsd_eagle3"


class Eagle3Drafter(Autoregressive, EagleBody):
    """The drafter; see the module's docstring for the equations."""

    title = "EAGLE-3 drafter"
    config_class = Eagle3Config
    supports_gradient_checkpointing = True

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        self.post_init()

    def add_layers(self, config: Eagle3Config) -> None:
        """See `EagleBody.add_layers`."""
        self.midlayer = EagleLayer(config, first=True)

    def decoder_layers(self) -> list[EagleLayer]:
        """See `EagleBody.decoder_layers`."""
        return [self.midlayer]

    def states(self, entries: Entries, paths: Paths) -> Tensor:
        """Draft K steps from every root along given tokens (EAGLE-3's training-time test), [K, B, P, h], normed.

        Step k is run for the first paths only, as many as some sequence has valid ones: sort them longest first
        (`longest_first`). States of steps that are not run are zeros.
        """
        hidden, shared, seen, at = self._roots(entries, paths.roots)
        step: Callable[..., Any] = self._step
        if self.gradient_checkpointing and self.training:
            step = partial(self._gradient_checkpointing_func, self._step)
        own, steps = _none(shared, paths.roots), []
        P = paths.roots.shape[1]
        consumed = self.embed(paths.consumed(entries.next_ids))  # [K, B, P, h]
        for k, (embeds, W) in enumerate(zip(consumed, paths.widths())):
            kept = own[0][:, :, :W], own[1][:, :, :W]
            hidden, own = step(hidden[:, :W], embeds[:, :W], at[:, :W] + k, shared, seen[:, :W], kept, k > 0)
            steps.append(F.pad(self.norm(hidden), (0, 0, 0, P - W)))
        return torch.stack(steps)

    @torch.no_grad()
    def sample(self, entries: Entries, roots: Tensor, steps: int, choose: Callable[[Tensor], Tensor]) -> None:
        """See `Drafter.sample`."""
        ids = self.vocabulary.ids
        embeds = self.embed(entries.next_ids.gather(1, roots))
        hidden, shared, seen, at = self._roots(entries, roots)
        own = _none(shared, roots)
        for k in range(steps):
            hidden, own = self._step(hidden, embeds, at + k, shared, seen, own, k > 0)
            embeds = self.embed(ids[choose(self.log_probs(hidden))])

    @torch.no_grad()
    def begin_at(self, entries: Entries, roots: Tensor, room: int) -> EntryCache:
        """See `Drafter.begin_at`."""
        hidden, shared, seen, at = self._roots(entries, roots)
        first = self.embed(entries.next_ids.gather(1, roots))
        hidden, _ = self._step(hidden, first, at, shared, seen, _none(shared, roots), False)
        (B, P), T = roots.shape, entries.next_ids.shape[1]
        state = self.new_cache(B * P, T + room)
        state.keys[0, :, :, :T], state.values[0, :, :, :T] = (x.repeat_interleave(P, 0) for x in shared)
        state.commit(roots.flatten() + 1, at.flatten() + 1)
        state.hidden = hidden.flatten(0, 1)[:, None]
        return state

    def _roots(self, entries: Entries, roots: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
        """Fused features of roots, [B, P, h]; all entries' step-0 keys and values; `seen_from`; positions [B, P]."""
        layer = self.midlayer
        fused = self.fc(entries.aux)  # [B, E, h]
        a, rotary = layer.input(self.embed(entries.next_ids), fused), self.rotary_emb(fused, entries.positions)
        shared = layer.self_attn.keys_values(a, rotary)
        hidden = fused.gather(1, roots[..., None].expand(-1, -1, fused.shape[-1]))
        return hidden, shared, entries.seen_from(roots), entries.positions.gather(1, roots)

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
        """One step of all roots: hidden, embeds [B, P, h], positions [B, P] -> next hidden, and `own` with its keys.

        `own`: every root's keys and values of the steps 1 … k before, [B, Hkv, P, k, D].
        """
        layer, attention = self.midlayer, self.midlayer.self_attn
        a, rotary = layer.input(embeds, hidden), self.rotary_emb(hidden, positions)
        if drafted:  # step 0 is among the shared keys
            keys, values = (x[:, :, :, None] for x in attention.keys_values(a, rotary))
            own = torch.cat([own[0], keys], dim=3), torch.cat([own[1], values], dim=3)
        every = torch.ones(1, own[0].shape[3], dtype=torch.bool, device=seen.device)
        block = own[0].flatten(2, 3), own[1].flatten(2, 3)
        attended = attend_block(attention.queries(a, rotary), shared, seen, block, every)
        return layer.finish(hidden, attended), own

    def expand(self, state: EntryCache, hidden: Tensor, tokens: Tensor, depth: int, seen: Tensor) -> Tensor:
        """See `Autoregressive.expand`; hidden states are those before `norm`."""
        layer, attention = self.midlayer, self.midlayer.self_attn
        W, S = seen.shape[1:]
        positions = (state.next - 1 + depth)[:, None]  # [B, 1]
        embeds = self.embed(tokens).to(self.dtype)
        a, rotary = layer.input(embeds, hidden), self.rotary_emb(hidden, positions)
        state.draft(0, state.fill + S - W, *attention.keys_values(a, rotary))
        allowed = torch.cat([state.committed[:, None].expand(-1, W, -1), seen], dim=-1)
        return layer.finish(hidden, state.attend(0, attention.queries(a, rotary), allowed))

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Draft distribution in float32: hidden [..., h] before `norm` -> log q [..., Vd]."""
        log_q: Tensor = self.lm_head(self.norm(hidden)).float().log_softmax(-1)
        return log_q


def _none(shared: tuple[Tensor, Tensor], roots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of no step of roots [B, P], [B, Hkv, P, 0, D] each."""
    keys, values = (x.new_empty(*x.shape[:2], roots.shape[1], 0, x.shape[3]) for x in shared)
    return keys, values
