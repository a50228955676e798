"""P-EAGLE drafter: EAGLE-3 that drafts a block in one pass (arXiv:2602.01469).

EAGLE-3's entries (see `vsd.drafters.eagle3.model`) run through one to four layers; the first reads token embeddings and
fused features, 2h wide. The root's output predicts the first token. For the tokens behind it K - 1 mask nodes stand at
the positions that follow: in place of features they have fc(mask_hidden), a learned vector, and in place of a token the
mask token's embedding. A mask node sees the entries up to its root, the mask nodes of its block before it, and itself.

Tensor names are those of P-EAGLE checkpoints: EAGLE-3's with `layers.i` for `midlayer`, and `mask_hidden`.

Legend: B batch, E entries, P paths, K steps, n layers, h hidden, n h width of the features.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsd.drafters.attention import attend_block
from vsd.drafters.eagle3.body import EagleBody
from vsd.drafters.eagle3.layer import EagleLayer
from vsd.drafters.entry_cache import EntryCache
from vsd.drafters.feature_drafter import FeatureDrafterConfig
from vsd.drafters.mask_token import mask_token
from vsd.drafters.parallel import Parallel
from vsd.paths import Entries, rows_at
from vsd.targets import TargetInfo

Rotary = tuple[Tensor, Tensor]


class PeagleConfig(FeatureDrafterConfig):
    """Sizes of a P-EAGLE drafter, and which target it belongs to."""

    model_type = "vsd_peagle"

    num_hidden_layers: int = 3
    mask_token_id: int = 0


class PeagleDrafter(Parallel, EagleBody):
    """The drafter; see the module's docstring for the equations."""

    title = "P-EAGLE drafter"
    config_class = PeagleConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: PeagleConfig) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        self.mask_hidden = nn.Parameter(torch.randn(1, config.feature_width))
        self.post_init()

    @classmethod
    def fields_for(cls, target: TargetInfo, overrides: dict[str, Any]) -> dict[str, Any]:
        """See `FeatureDrafter.fields_for`."""
        return {**super().fields_for(target, overrides), "mask_token_id": mask_token(target)}

    def add_layers(self, config: PeagleConfig) -> None:
        """See `EagleBody.add_layers`."""
        self.layers = nn.ModuleList([EagleLayer(config, first=i == 0) for i in range(config.num_hidden_layers)])

    def decoder_layers(self) -> list[EagleLayer]:
        """See `EagleBody.decoder_layers`."""
        return list(self.layers)  # type: ignore[arg-type]

    @torch.no_grad()
    def prepare(self, features: Callable[[], Tensor]) -> None:
        """See `Parallel.prepare`: mask nodes have mean features; layers of EAGLE-3 were trained on such inputs."""
        self.mask_hidden.copy_(features().mean(0, keepdim=True))

    def blocks(self, entries: Entries, roots: Tensor, steps: int) -> Tensor:
        """See `Parallel.blocks`: entries run through all layers, mask nodes beside them."""
        (B, P), M = roots.shape, steps - 1
        at = entries.positions.gather(1, roots)
        places = (at[..., None] + 1 + torch.arange(M, device=at.device)).flatten(1)  # [B, P M]
        embeds, aux = self.embedded(entries.next_ids, entries.aux)
        hidden, (mask_embeds, masks) = self.fc(aux), self._mask_input()
        seen = entries.seen_from(roots)
        added = self.with_locality(seen, entries, roots)
        every = entries.seen_from(torch.arange(entries.next_ids.shape[1], device=at.device).expand(B, -1))
        rotary, mask_rotary = self.rotary_emb(hidden, entries.positions), self.rotary_emb(hidden, places)
        run: Callable[..., tuple[Tensor, Tensor]] = self._layer
        if self.gradient_checkpointing and self.training:
            run = partial(self._gradient_checkpointing_func, self._layer)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.decoder_layers()):
            inputs = layer.input(embeds, hidden), layer.input(mask_embeds, masks)
            queried = (roots, seen) if i == last else (None, every)  # of the last layer only the roots' output is used
            hidden, masks = run(layer, hidden, masks, inputs, (rotary, mask_rotary), queried, added)
        states = torch.cat([hidden[:, :, None], masks.view(B, P, M, hidden.shape[-1])], dim=2)
        normed: Tensor = self.norm(states)
        return normed

    def _layer(
        self,
        layer: EagleLayer,
        hidden: Tensor,
        masks: Tensor,
        inputs: tuple[Tensor, Tensor],
        rotary: tuple[Rotary, Rotary],
        queried: tuple[Tensor | None, Tensor],
        added: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One layer: hidden [B, E, h] of the entries (in the last layer [B, P, h] of roots), masks [B, P M, h].

        Args:
            inputs: of attention, [B, E, ·] and [1 or B, 1 or P M, ·].
            rotary: of the entries and of the mask nodes.
            queried: the entries whose output is wanted, None for all, and the entries that each of them sees.
            added: of the mask nodes of every path, see `Parallel.with_locality`, [B, P, E].
        """
        attention, (a, mask_a) = layer.self_attn, inputs
        shared = attention.keys_values(a, rotary[0])
        wanted, allowed = queried
        own_rotary = rotary[0]
        if wanted is not None:
            a, hidden, *own = (rows_at(x.expand(len(wanted), -1, -1), wanted) for x in (a, hidden, *rotary[0]))
            own_rotary = (own[0], own[1])
        queries = attention.queries(a, own_rotary)
        attended = F.scaled_dot_product_attention(queries, *shared, attn_mask=allowed[:, None], enable_gqa=True)
        hidden = layer.finish(hidden, attended)
        (B, P, _), places = added.shape, rotary[1][0].shape[1]
        M = places // P
        if not M:
            return hidden, masks.new_zeros(B, 0, masks.shape[-1])
        causal = torch.ones(M, M, dtype=torch.bool, device=added.device).tril()
        keys, values = attention.keys_values(mask_a, rotary[1])
        values = values.expand(B, -1, places, -1)
        queries = attention.queries(mask_a, rotary[1])
        return hidden, layer.finish(masks, attend_block(queries, shared, added, (keys, values), causal))

    def block(self, state: EntryCache, root: Tensor, steps: int) -> Tensor:
        """See `Parallel.block`: the root's output is known, the mask nodes run."""
        assert state.hidden is not None
        states, M = state.hidden, steps - 1
        if M:
            order = torch.arange(M, device=root.device)
            masks_embeds, masks = self._mask_input()
            rotary = self.rotary_emb(masks, state.next[:, None] + order)
            own = (order <= order[:, None]).expand(len(root), M, M)
            seen = torch.cat([state.committed[:, None].expand(-1, M, -1), own], dim=-1)
            for i, layer in enumerate(self.decoder_layers()):
                a = layer.input(masks_embeds, masks)
                keys, values = layer.self_attn.keys_values(a, rotary)
                state.draft(i, state.fill, keys, values.expand_as(keys))
                masks = layer.finish(masks, state.attend(i, layer.self_attn.queries(a, rotary), seen))
            states = torch.cat([states, masks], dim=1)
        normed: Tensor = self.norm(states)
        return normed

    @torch.no_grad()
    def begin_at(self, entries: Entries, roots: Tensor, room: int) -> EntryCache:
        """See `Drafter.begin_at`; entries must be those of one text."""
        (B, P), E = roots.shape, entries.next_ids.shape[1]
        rows = torch.arange(B, device=roots.device).repeat_interleave(P)
        state = self.new_cache(B * P, E + room)
        self._extend(state, entries.aux[rows], entries.next_ids[rows], roots.flatten() + 1, entries.positions[rows])
        return state

    def _mask_input(self) -> tuple[Tensor, Tensor]:
        """Embedding and fused features of a mask node, [1, 1, h] each."""
        token = torch.tensor([[self.config.mask_token_id]], device=self.mask_hidden.device)
        embeds: Tensor = self.embed(token).to(self.dtype)
        fused: Tensor = self.fc(self.mask_hidden)[None]
        return embeds, fused
