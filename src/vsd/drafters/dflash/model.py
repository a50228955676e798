"""DFlash drafter (arXiv:2602.06036): a block of queries over keys and values that the target's features give.

    c_t = hidden_norm(fc(aux_t))        the context: keys and values of every layer at its position
    x   = [embed(root token), embed(mask token) × K]        queries, at the positions behind the context
    x   = x + Attn(input_layernorm(x), [c ; block]);   x = x + MLP(post_attention_layernorm(x))        n layers

Layers are Qwen3's, with norms of every head's queries and keys. `norm` of the states at mask positions enters the draft
head. The tokens of a block see each other in both directions, or with `causal` only backwards. The draft head starts as
the target's rows; a draft vocabulary that is the target's whole one shares its LM head, frozen.

With `sample_from_anchor` the root's own position predicts the first token, and there is one mask token fewer.

Legend: B batch, E entries, A new entries, P paths, K steps, J queries of a block, n layers, h hidden, H heads, D head
dimension, n h width of the features.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from vsd.drafters.attention import attend_block, rotate
from vsd.drafters.entry_cache import EntryCache
from vsd.drafters.feature_drafter import FeatureDrafter, FeatureDrafterConfig
from vsd.drafters.mask_token import mask_token
from vsd.drafters.parallel import Parallel
from vsd.drafters.vocabulary import DraftVocabulary
from vsd.paths import Entries
from vsd.targets import Padded, TargetInfo

Rotary = tuple[Tensor, Tensor]
_LAYERS = 5  # of target features, and of a new drafter


class DFlashConfig(FeatureDrafterConfig):
    """Sizes of a DFlash drafter, and which target it belongs to."""

    model_type = "vsd_dflash"

    num_hidden_layers: int = _LAYERS
    mask_token_id: int = 0
    causal: bool = False
    sample_from_anchor: bool = False

    @property
    def shares_head(self) -> bool:
        """Whether the draft head is the target's LM head."""
        return self.draft_vocab_size == self.vocab_size


class DFlashAttention(nn.Module):
    """Grouped-query attention with normed queries and keys."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        h, D = config.hidden_size, config.head_dim
        self.head_dim = D
        self.q_proj = nn.Linear(h, config.num_attention_heads * D, bias=False)
        self.k_proj = nn.Linear(h, config.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(h, config.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * D, h, bias=False)
        self.q_norm = Qwen3RMSNorm(D, eps=config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(D, eps=config.rms_norm_eps)

    def queries(self, x: Tensor, rotary: Rotary) -> Tensor:
        """[B, Q, h] -> rotated queries [B, H, Q, D]."""
        return rotate(self.q_norm(self._heads(self.q_proj(x))).transpose(1, 2), rotary)

    def keys_values(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """[B, T, h] -> rotated keys and values, each [B, Hkv, T, D]."""
        keys = rotate(self.k_norm(self._heads(self.k_proj(x))).transpose(1, 2), rotary)
        return keys, self._heads(self.v_proj(x)).transpose(1, 2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim)


class DFlashLayer(nn.Module):
    """A decoder layer whose attention over keys and values is computed outside."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.self_attn = DFlashAttention(config)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, queries: int, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """States x [B, P J, h] of blocks of J = `queries` tokens, after the layer.

        Args:
            attend: maps the input of attention to its heads' output, [B, P J, h] -> [B, H, P J, D].
        """

        def attention(a: Tensor) -> Tensor:
            output: Tensor = self.self_attn.o_proj(attend(a).transpose(1, 2).flatten(-2))
            return output

        x = x + self.around_attention(self.input_layernorm(x), queries, attention)
        return x + self.around_mlp(self.post_attention_layernorm(x), queries, self.mlp)

    def around_attention(self, x: Tensor, queries: int, run: Callable[[Tensor], Tensor]) -> Tensor:
        """The sublayer `run` on its normed input x [B, P J, h]."""
        return run(x)

    def around_mlp(self, x: Tensor, queries: int, run: Callable[[Tensor], Tensor]) -> Tensor:
        """The sublayer `run` on its normed input x [B, P J, h]."""
        return run(x)


class DFlashDrafter(Parallel, FeatureDrafter):
    """The drafter; see the module's docstring for the equations."""

    title = "DFlash drafter"
    config_class = DFlashConfig
    layer_class: type[DFlashLayer] = DFlashLayer
    supports_gradient_checkpointing = True

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        self.fc = nn.Linear(config.feature_width, config.hidden_size, bias=False)
        self.hidden_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList([self.layer_class(config) for _ in range(config.num_hidden_layers)])
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not config.shares_head:
            self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]
        self.post_init()

    @classmethod
    def for_target(cls, target: TargetInfo, vocabulary: DraftVocabulary, **overrides: Any) -> "DFlashDrafter":
        """See `FeatureDrafter.for_target`; final norm and draft head start as the target's."""
        drafter = super().for_target(target, vocabulary, **overrides)
        if drafter.config.hidden_size == target.hidden_size:
            with torch.no_grad():
                ones = torch.ones(1, target.hidden_size, device=target.device, dtype=target.dtype)
                drafter.norm.weight.copy_(target.norm(ones)[0])
                if not drafter.config.shares_head:
                    drafter.lm_head.weight.copy_(target.head_weight[vocabulary.ids])
        return drafter

    @classmethod
    def fields_for(cls, target: TargetInfo, overrides: dict[str, Any]) -> dict[str, Any]:
        """See `FeatureDrafter.fields_for`; features come from layers spread evenly over the target."""
        count = target.config.num_hidden_layers
        layers = overrides.get("aux_layers") or spread_layers(count, min(_LAYERS, count - 1))
        fields = super().fields_for(target, {**overrides, "aux_layers": layers})
        return {**fields, "mask_token_id": mask_token(target)}

    def attach(self, target: TargetInfo) -> None:
        """See `Drafter.attach`; a drafter of the whole vocabulary shares the target's LM head."""
        super().attach(target)
        if self.config.shares_head:
            object.__setattr__(self, "lm_head", SharedHead(target))

    def decoder_layers(self) -> list[DFlashLayer]:
        """See `FeatureDrafter.decoder_layers`."""
        return list(self.layers)  # type: ignore[arg-type]

    def blocks(self, entries: Entries, roots: Tensor, steps: int) -> Tensor:
        """See `Parallel.blocks`."""
        (_B, P), order = roots.shape, torch.arange(self._queries(steps), device=roots.device)
        context = self.hidden_norm(self.fc(entries.aux))
        first = entries.next_ids.gather(1, roots)[..., None]  # [B, P, 1]
        x = self._queried(first, len(order)).flatten(1, 2)  # [B, P J, h]
        places = (entries.positions.gather(1, roots)[..., None] + 1 + order).flatten(1)
        rotary, own_rotary = self.rotary_emb(context, entries.positions), self.rotary_emb(context, places)
        seen, own_seen = self.with_locality(entries.seen_from(roots), entries, roots), self._own_seen(order)
        run: Callable[..., Tensor] = _layer
        if self.gradient_checkpointing and self.training:
            run = partial(self._gradient_checkpointing_func, _layer)
        for layer in self.decoder_layers():
            x = run(layer, x, context, rotary, own_rotary, seen, own_seen)
        return self._predicting(self.norm(x).unflatten(1, (P, -1)), steps)

    def begin(self, prompt: Padded, aux: Tensor, root: Tensor, capacity: int) -> EntryCache:
        """See `Drafter.begin`."""
        return self._begun(aux, prompt.lengths, prompt.first_row, capacity)

    @torch.no_grad()
    def begin_at(self, entries: Entries, roots: Tensor, room: int) -> EntryCache:
        """See `Drafter.begin_at`; entries must be those of one text."""
        (B, P), E = roots.shape, entries.aux.shape[1]
        rows = torch.arange(B, device=roots.device).repeat_interleave(P)
        return self._begun(entries.aux[rows], roots.flatten() + 1, entries.positions[rows], E + room)

    def advance(self, state: EntryCache, aux: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """See `Drafter.advance`; the tokens themselves are not read."""
        positions = state.next[:, None] + torch.arange(aux.shape[1], device=aux.device)
        self._extend(state, aux, counts, positions)

    def block(self, state: EntryCache, root: Tensor, steps: int) -> Tensor:
        """See `Parallel.block`."""
        order = torch.arange(self._queries(steps), device=root.device)
        x = self._queried(root[:, None], len(order)).to(self.dtype)
        rotary = self.rotary_emb(x, state.next[:, None] + order)
        committed = state.committed[:, None].expand(-1, len(order), -1)
        seen = torch.cat([committed, self._own_seen(order).expand(len(root), -1, -1)], dim=-1)
        for i, layer in enumerate(self.decoder_layers()):
            x = layer(x, len(order), partial(_attend_cached, state, i, layer.self_attn, rotary, seen))
        return self._predicting(self.norm(x)[:, None], steps)[:, 0]

    def _begun(self, aux: Tensor, counts: Tensor, positions: Tensor, capacity: int) -> EntryCache:
        state = self.new_cache(len(aux), capacity)
        self._extend(state, aux, counts, positions)
        return state

    def _extend(self, state: EntryCache, aux: Tensor, counts: Tensor, positions: Tensor) -> None:
        """Commit entries [B, A], row b the first counts[b] of them."""
        context = self.hidden_norm(self.fc(aux.to(self.dtype)))
        rotary, slots = self.rotary_emb(context, positions), state.behind(aux.shape[1])
        for i, layer in enumerate(self.decoder_layers()):
            state.append(i, slots, *layer.self_attn.keys_values(context, rotary))
        last = positions.gather(1, counts[:, None] - 1)[:, 0]
        state.commit(state.lengths + counts, last + 1)

    def _queries(self, steps: int) -> int:
        """J: the root, and mask tokens."""
        return steps if self.config.sample_from_anchor else steps + 1

    def _queried(self, first: Tensor, count: int) -> Tensor:
        """Embeddings [..., J, h] of root tokens [..., 1] and J - 1 mask tokens."""
        masks = torch.full_like(first, self.config.mask_token_id).expand(*first.shape[:-1], count - 1)
        embeds: Tensor = self.embed(torch.cat([first, masks], dim=-1))
        return embeds

    def _own_seen(self, order: Tensor) -> Tensor:
        """Which tokens of a block see which, [J, J] bool."""
        backwards = order <= order[:, None]
        return backwards if self.config.causal else torch.ones_like(backwards)

    def _predicting(self, states: Tensor, steps: int) -> Tensor:
        """Of states [B, P, J, h] those that predict, [B, P, K, h]."""
        return states[:, :, -steps:]


class SharedHead:
    """The target's LM head, not a part of the drafter's weights."""

    def __init__(self, target: TargetInfo) -> None:
        self.target = target

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedHead":
        """A copy of the drafter shares the target, too."""
        return self

    @property
    def weight(self) -> Tensor:
        """[V, h]."""
        return self.target.head_weight

    def __call__(self, states: Tensor) -> Tensor:
        """Logits [..., V] of states [..., h]."""
        return F.linear(states.to(self.weight.dtype), self.weight)


def spread_layers(layers: int, count: int) -> tuple[int, ...]:
    """`count` feature layers, by input index, from 2 to L - 2; 1 … L - 1 where the target has fewer than six."""
    if layers < 6:
        return tuple(range(1, layers))
    return tuple(round(2 + i * (layers - 4) / max(1, count - 1)) for i in range(count))


def _layer(
    layer: DFlashLayer, x: Tensor, context: Tensor, rotary: Rotary, own_rotary: Rotary, seen: Tensor, own_seen: Tensor
) -> Tensor:
    """A layer in training: x [B, P J, h] over the context [B, E, h] that every path sees, and over its own block."""
    attention = layer.self_attn

    def attend(a: Tensor) -> Tensor:
        shared, own = attention.keys_values(context, rotary), attention.keys_values(a, own_rotary)
        return attend_block(attention.queries(a, own_rotary), shared, seen, own, own_seen)

    after: Tensor = layer(x, len(own_seen), attend)
    return after


def _attend_cached(
    state: EntryCache, index: int, attention: DFlashAttention, rotary: Rotary, seen: Tensor, a: Tensor
) -> Tensor:
    """Attention of layer `index` in decoding: a [B, J, h] over the cache and over its own block, seen [B, J, L]."""
    state.draft(index, state.fill, *attention.keys_values(a, rotary))
    return state.attend(index, attention.queries(a, rotary), seen)
