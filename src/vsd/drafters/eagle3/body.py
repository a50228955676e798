"""Common to EAGLE-3 and P-EAGLE drafters: fused features, decoder layers over committed entries, draft head.

Legend: B batch, A new entries, n layers, L slots, h hidden, n h width of the features.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from vsd.drafters.base import FeatureSpec
from vsd.drafters.eagle3.layer import EagleLayer
from vsd.drafters.entry_cache import EntryCache
from vsd.drafters.feature_drafter import FeatureDrafter, FeatureDrafterConfig
from vsd.paths import Entries
from vsd.targets import Padded, TargetInfo


class EagleBody(FeatureDrafter):
    """Weights around the layers, and the reading of decided tokens.

    If images are read by SGLang's rule, the features begin with the target's input embeddings.
    """

    image_rules = ("placeholder", "embeddings")
    placeholder: int | None = None  # of images, where their embeddings are read

    def __init__(self, config: FeatureDrafterConfig) -> None:
        super().__init__(config)
        self.fc = nn.Linear(config.feature_width, config.hidden_size, bias=False)
        self.add_layers(config)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]

    @abstractmethod
    def add_layers(self, config: Any) -> None:
        """Create the decoder layers, under the names that checkpoints have."""

    @abstractmethod
    def decoder_layers(self) -> Sequence[EagleLayer]:
        """Its layers; the first one reads token embeddings, too."""

    @property
    def needs(self) -> FeatureSpec:
        """See `Drafter.needs`."""
        layers = tuple(self.config.aux_layers)
        return FeatureSpec((0, *layers) if self.config.image_inputs == "embeddings" else layers)

    def attach(self, target: TargetInfo) -> None:
        """See `Drafter.attach`."""
        super().attach(target)
        if self.config.image_inputs == "embeddings" and target.images is not None:
            self.placeholder = target.images.placeholder

    def embedded(self, next_ids: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of the tokens [B, A] of entries, [B, A, h], and the features that `fc` reads, [B, A, n h].

        The target's input embedding of an entry's token, which stands at t + 1, is among the features of the next one.
        """
        embeds = self.embed(next_ids)
        if self.placeholder is None:
            return embeds, aux
        inputs, read = aux.split([embeds.shape[-1], aux.shape[-1] - embeds.shape[-1]], dim=-1)
        images = (next_ids == self.placeholder)[..., None]
        return torch.where(images, inputs.roll(-1, dims=1).to(embeds.dtype), embeds), read

    def begin(self, prompt: Padded, aux: Tensor, root: Tensor, capacity: int) -> EntryCache:
        """See `Drafter.begin`."""
        entries = Entries.of(prompt, aux, root)
        state = self.new_cache(len(root), capacity)
        self._extend(state, aux, entries.next_ids, prompt.lengths, entries.positions)
        return state

    def advance(self, state: EntryCache, aux: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """See `Drafter.advance`."""
        positions = state.next[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        self._extend(state, aux, tokens, counts, positions)

    def _extend(self, state: EntryCache, aux: Tensor, next_ids: Tensor, counts: Tensor, positions: Tensor) -> None:
        """Commit entries [B, A], row b the first counts[b] of them; the output of the last one is the root's."""
        slots, last = state.behind(next_ids.shape[1]), (counts - 1)[:, None, None]
        pick = lambda x: x.gather(1, last.expand(-1, 1, x.shape[-1]))  # noqa: E731
        state.commit(state.lengths + counts, pick(positions[..., None])[:, 0, 0] + 1)
        embeds, read = (x.to(self.dtype) for x in self.embedded(next_ids, aux))
        hidden = self.fc(read)
        rotary = self.rotary_emb(hidden, positions)
        layers = self.decoder_layers()
        seen = state.up_to(slots) if len(layers) > 1 else state.committed[:, None]
        for i, layer in enumerate(layers):
            a = layer.input(embeds, hidden)
            state.append(i, slots, *layer.self_attn.keys_values(a, rotary))
            if i == len(layers) - 1:  # only the root's output is used
                a, hidden, rotary, seen = pick(a), pick(hidden), tuple(map(pick, rotary)), state.committed[:, None]
            hidden = layer.finish(hidden, state.attend(i, layer.self_attn.queries(a, rotary), seen))
        state.hidden = hidden
