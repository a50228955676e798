"""ViSpec drafter (Kang et al., arXiv:2509.15235): an EAGLE drafter that reads every image as a few vectors.

Text is read as in EAGLE-1 (arXiv:2401.15077). Entry t pairs the target's final hidden state f_t with the token at t + 1
and predicts the token at t + 2:

    x_t = fc([embed(x_{t+1}) ; img_fc([f_t ; g])])     input of the layer; g is the last image's vector, 0 before images
    r   = x_t + Attn(x_t);   out = r + MLP(post_attention_layernorm(r));   logits = head(out)

`out` estimates f_{t+1}, and is fed back in its place. `img_fc` starts as [1 ; 0]: g adds nothing yet.

Learned queries attend to an image, to the target's input embeddings at its placeholders. The last query gives g, which
goes to the text up to the next image. The others give vectors that are inputs of the layer at the last placeholders of
the image; its other placeholders are left out of the drafter's text. Positions stay those of the target.

From the paper's code: weights, names of tensors, initial values. Ours: texts with and without images in one batch; a
reduced draft vocabulary, whose head starts as the target's rows (the whole one shares the target's LM head, as there).
An image is a run of placeholders: a target that splits a picture into tiles has an image a tile. The code adds noise
to f_t in training; we do not.

Legend: B batch, E entries, Z entries that the layer reads, A new tokens, R images, Q queries, h hidden, H heads, D head
dimension, L decoder layers of the target.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vsd.drafters.dflash.model import SharedHead
from vsd.drafters.eagle3.layer import EagleLayer
from vsd.drafters.eagle3.recurrent import Recurrent, Roots
from vsd.drafters.entry_cache import EntryCache
from vsd.drafters.feature_drafter import FeatureDrafterConfig
from vsd.drafters.vispec.images import Images
from vsd.drafters.vocabulary import DraftVocabulary
from vsd.errors import ConfigurationError, MismatchError
from vsd.paths import Entries, rows_at
from vsd.targets import Padded, TargetInfo

_DECIDED = ("aux_layers", "hidden_size", "target_hidden_size", "image_token_id")


class ViSpecConfig(FeatureDrafterConfig):
    """Sizes of a ViSpec drafter, and which target it belongs to.

    `image_token_id` is the target's placeholder. `image_queries` is Q: Q - 1 vectors stand for an image. The features
    are the first layer's input and the final hidden states: `aux_layers` is (0, L).
    """

    model_type = "vsd_vispec"

    aux_layers: tuple[int, ...] | list[int] = (0, 1)
    image_token_id: int = 0
    image_queries: int = 2

    @property
    def shares_head(self) -> bool:
        """Whether the draft head is the target's LM head."""
        return self.draft_vocab_size == self.vocab_size


class ImageAdaptor(nn.Module):
    """Learned queries that attend to the embeddings of an image, without positions."""

    def __init__(self, config: ViSpecConfig) -> None:
        super().__init__()
        h, H, D = config.hidden_size, config.num_attention_heads, config.head_dim
        self.q = nn.Parameter(torch.randn(config.image_queries, H, D) * D**-0.5)
        self.k_proj = nn.Linear(h, H * D, bias=False)
        self.v_proj = nn.Linear(h, H * D, bias=False)
        self.o_proj = nn.Linear(H * D, h, bias=False)

    def forward(self, embeds: Tensor, inside: Tensor) -> Tensor:
        """Vectors [B, R, Q, h] of images whose entries are inside [B, R, E]; embeds [B, E, h].

        Those of empty images are without meaning, but finite.
        """
        Q, H, D = self.q.shape
        B, R, _ = inside.shape
        keys, values = (x.unflatten(-1, (H, D)).transpose(1, 2) for x in (self.k_proj(embeds), self.v_proj(embeds)))
        queries = self.q.transpose(0, 1)[None, :, None].expand(B, H, R, Q, D).flatten(2, 3)
        seen = (inside | ~inside.any(-1, keepdim=True)).repeat_interleave(Q, dim=1)[:, None]  # [B, 1, R Q, E]
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)  # [B, H, R Q, D]
        vectors: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2)).unflatten(1, (R, Q))
        return vectors


class ViSpecLayer(EagleLayer):
    """A decoder layer without a norm before its attention."""

    def __init__(self, config: ViSpecConfig) -> None:
        super().__init__(config, first=False)
        self.input_layernorm = nn.Identity()  # type: ignore[assignment]


class Reading(NamedTuple):
    """The entries of texts that the layer reads, in their order; behind them those that it does not.

    Attributes:
        order: index among all entries, [B, Z].
        real: which of them the layer reads, [B, Z] bool.
        counts: how many of all entries up to each one it reads, [B, E].
        fed: the target's state beside the vector of the last image, [B, Z, 2 h].
        inputs: of the layer, [B, Z, h].
    """

    order: Tensor
    real: Tensor
    counts: Tensor
    fed: Tensor
    inputs: Tensor


class ViSpecDrafter(Recurrent):
    """The drafter; see the module's docstring for the equations. The image's vector is fed back beside the output."""

    title = "ViSpec drafter"
    config_class = ViSpecConfig
    reads_final = True

    def __init__(self, config: ViSpecConfig) -> None:
        if type(config.image_queries) is not int or config.image_queries < 1:
            raise MismatchError(f"image_queries must be a positive integer, not {config.image_queries!r}")
        super().__init__(config)
        h = config.hidden_size
        self.fc = nn.Linear(2 * h, h)
        self.img_fc = nn.Linear(2 * h, h)
        self.imadpt = ImageAdaptor(config)
        self.layers = nn.ModuleList([ViSpecLayer(config)])
        if not config.shares_head:
            self.lm_head = nn.Linear(h, config.draft_vocab_size, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]
        self.post_init()
        with torch.no_grad():
            self.img_fc.weight.copy_(torch.eye(h, 2 * h))
            self.img_fc.bias.zero_()

    @classmethod
    def for_target(cls, target: TargetInfo, vocabulary: DraftVocabulary, **overrides: Any) -> "ViSpecDrafter":
        """See `FeatureDrafter.for_target`; the draft head starts as the target's."""
        drafter = super().for_target(target, vocabulary, **overrides)
        if not drafter.config.shares_head:
            with torch.no_grad():
                drafter.lm_head.weight.copy_(target.head_weight[vocabulary.ids])
        return drafter

    @classmethod
    def fields_for(cls, target: TargetInfo, overrides: dict[str, Any]) -> dict[str, Any]:
        """See `FeatureDrafter.fields_for`.

        Raises:
            ConfigurationError: a target that reads no images; fields that the target decides.
        """
        if target.images is None:
            raise ConfigurationError("family vispec is for targets that read images: choose another family")
        if fixed := sorted({*_DECIDED} & {*overrides}):
            raise ConfigurationError(f"drafter_options: the target decides {', '.join(fixed)}: leave them out")
        layers = (0, target.config.num_hidden_layers)
        fields = super().fields_for(target, {"aux_layers": layers})
        return {**fields, "image_inputs": None, "image_token_id": target.images.placeholder}

    def attach(self, target: TargetInfo) -> None:
        """See `Drafter.attach`; a drafter of the whole vocabulary shares the target's LM head."""
        if target.images is None:
            raise MismatchError("a ViSpec drafter compresses images, and the target reads none: give its own target")
        super().attach(target)
        config = self.config
        pairs = {
            "image token": (config.image_token_id, target.images.placeholder),
            "aux_layers": (list(config.aux_layers), [0, target.config.num_hidden_layers]),
            "hidden size": (config.hidden_size, target.hidden_size),
        }
        for name, (mine, theirs) in pairs.items():
            if mine != theirs:
                raise MismatchError(f"this drafter was trained for another target: {name} {mine}, not {theirs}")
        if config.shares_head:
            object.__setattr__(self, "lm_head", SharedHead(target))

    def decoder_layers(self) -> list[ViSpecLayer]:
        """See `FeatureDrafter.decoder_layers`."""
        return list(self.layers)  # type: ignore[arg-type]

    def read(self, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See `Recurrent.read`."""
        inputs: Tensor = self.fc(torch.cat([embeds, self.img_fc(hidden)], dim=-1))
        return inputs, inputs

    def fed_back(self, hidden: Tensor, output: Tensor) -> Tensor:
        """See `Recurrent.fed_back`: the output, and the image's vector as before."""
        return torch.cat([output, hidden[..., output.shape[-1] :]], dim=-1)

    def predicting(self, hidden: Tensor) -> Tensor:
        """See `Recurrent.predicting`."""
        return hidden[..., : self.config.hidden_size]

    def roots(self, entries: Entries, roots: Tensor) -> Roots:
        """See `Recurrent.roots`."""
        found = self._reading(entries, entries.next_ids == self.config.image_token_id)
        positions = entries.positions.gather(1, found.order)
        shared = self.layer.self_attn.keys_values(found.inputs, self.rotary_emb(found.inputs, positions))
        seen = entries.seen_from(roots).gather(2, found.order[:, None].expand(-1, roots.shape[1], -1))
        counts = found.counts.gather(1, roots)
        fed = rows_at(found.fed, counts - 1)
        return Roots(fed, shared, seen & found.real[:, None], entries.positions.gather(1, roots), counts)

    def begin(self, prompt: Padded, aux: Tensor, root: Tensor, capacity: int) -> EntryCache:
        """See `Drafter.begin`; a root is text, whatever its token."""
        entries, last = Entries.of(prompt, aux.to(self.dtype), root), prompt.lengths[:, None] - 1
        behind = torch.arange(aux.shape[1], device=aux.device) < last
        found = self._reading(entries, behind & (entries.next_ids == self.config.image_token_id))
        state = self.new_cache(len(root), capacity)
        positions = entries.positions.gather(1, found.order)
        self._extend(state, found.inputs, found.fed, found.counts.gather(1, last)[:, 0], positions)
        return state

    def advance(self, state: EntryCache, aux: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """See `Drafter.advance`."""
        assert state.hidden is not None
        A, h = tokens.shape[1], self.config.hidden_size
        fed = torch.cat([aux[..., h:].to(self.dtype), state.hidden[..., h:].expand(-1, A, -1)], dim=-1)
        inputs, _ = self.read(self.embed(tokens).to(self.dtype), fed)
        self._extend(state, inputs, fed, counts, state.next[:, None] + torch.arange(A, device=tokens.device))

    def _reading(self, entries: Entries, images: Tensor) -> Reading:
        """The entries that the layer reads; `images` [B, E] bool: those that hold a token of an image."""
        h, Q, found = self.config.hidden_size, self.config.image_queries, Images.of(images, entries.seen)
        vectors = self.imadpt(entries.aux[..., :h].roll(-1, dims=1), found.inside)  # [B, R, Q, h]
        read = ~found.here | (found.left < Q - 1)
        order = (~read).long().argsort(dim=1, stable=True)[:, : int(read.sum(1).max())]
        here, begun, left, ids = (x.gather(1, order) for x in (found.here, found.begun, found.left, entries.next_ids))
        last = F.pad(vectors[:, :, -1], (0, 0, 1, 0))  # [B, R + 1, h], of no image first
        fed = torch.cat([rows_at(entries.aux[..., h:], order), rows_at(last, begun)], dim=-1)
        inputs, _ = self.read(self.embed(ids).to(fed.dtype), fed)
        place = ((begun - 1) * Q + Q - 2 - left).clamp(min=0, max=vectors.shape[1] * Q - 1)
        inputs = torch.where(here[..., None], rows_at(vectors.flatten(1, 2), place), inputs)
        return Reading(order, read.gather(1, order), read.cumsum(1), fed, inputs)

    def _extend(self, state: EntryCache, inputs: Tensor, fed: Tensor, counts: Tensor, positions: Tensor) -> None:
        """Commit entries [B, A], row b the first counts[b] of them; the output of the last one is the root's."""
        slots, last, attention = state.behind(inputs.shape[1]), counts[:, None] - 1, self.layer.self_attn
        rotary = self.rotary_emb(inputs, positions)
        state.append(0, slots, *attention.keys_values(inputs, rotary))
        state.commit(state.lengths + counts, positions.gather(1, last)[:, 0] + 1)
        x, (cos, sin) = rows_at(inputs, last), (rows_at(part, last) for part in rotary)
        attended = state.attend(0, attention.queries(x, (cos, sin)), state.committed[:, None])
        state.hidden = self.fed_back(rows_at(fed, last), self.layer.finish(x, attended))
