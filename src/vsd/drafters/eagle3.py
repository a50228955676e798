"""EAGLE-3 drafter (Li et al., arXiv:2503.01840): one decoder layer over the target's fused hidden states.

Entry t pairs the target's features at position t with the token at t + 1 and predicts the token at t + 2:

    g_t = fc(aux_t)                                              once, from three target layers
    a   = [input_layernorm(embed(x_{t+1})) ; hidden_norm(g_t)]   2h wide, into q, k, v
    r   = g_t + Attn(a);   out = r + MLP(post_attention_layernorm(r));   logits = lm_head(norm(out))

Drafting further feeds `out` (before `norm`) back in place of g, with the drafted token. Step k from root t sees the
step-0 keys 0 … t and only its own keys of steps 1 … k; its rotary position is t + k. `forward` (training) and
`extend`/`expand` (decoding) share every operation but the bookkeeping of keys.

Tensor names are those of `LlamaForCausalLMEagle3` checkpoints. Token embeddings stay the target's: callers pass
embedded tokens, so tied and untied targets are alike and a checkpoint holds the drafter alone.

Legend: B batch, T entries, Q roots (training) or nodes (decoding), K steps, W beam width, C cache slots, h hidden,
H heads, D head dimension, V target vocabulary, Vd draft vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, rotate_half

from vsd.drafters.vocabulary import DraftVocabulary
from vsd.errors import VSDError


class Eagle3Config(PreTrainedConfig):
    """Sizes of an EAGLE-3 drafter, and which target it belongs to.

    `aux_layers` are decoder-layer *input* indices of the target (vLLM's convention).
    """

    model_type = "vsd_eagle3"

    vocab_size: int = 32000
    draft_vocab_size: int = 8192
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    head_dim: int = 64
    hidden_act: str = "silu"
    mlp_bias: bool = False
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 8192
    rope_parameters: dict | None = None
    initializer_range: float = 0.02
    aux_layers: tuple[int, ...] | list[int] = (2, 15, 27)
    target_hidden_size: int | None = None
    target_fingerprint: str | None = None
    tie_word_embeddings: bool = False


class DraftCache:
    """Keys and values of committed entries, then of the tree being drafted: [B, H, C, D], lengths [B]."""

    def __init__(self, config: Eagle3Config, batch_size: int, capacity: int, like: Tensor) -> None:
        shape = (batch_size, config.num_key_value_heads, capacity, config.head_dim)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=like.device)
        self.fill = 0

    def write(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Write [B, H, A, D] to slots [B, A]."""
        index = slots[:, None, :, None].expand_as(keys)
        self.keys.scatter_(2, index, keys)
        self.values.scatter_(2, index, values)

    def reserve(self, slots: int) -> None:
        """Make room for `slots` slots."""
        more = slots - self.keys.shape[2]
        if more > 0:
            self.keys = F.pad(self.keys, (0, 0, 0, more))
            self.values = F.pad(self.values, (0, 0, 0, more))

    def select(self, rows: Tensor) -> None:
        """Keep only the batch rows `rows` [B']."""
        self.keys, self.values, self.lengths = self.keys[rows], self.values[rows], self.lengths[rows]
        self.fill = int(self.lengths.max())


class Eagle3Attention(nn.Module):
    """Grouped-query attention whose input is 2h wide."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        width = 2 * config.hidden_size
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def queries(self, a: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """[B, Q, 2h] -> rotated queries [B, H, Q, D]."""
        return _rotate(self.q_proj(a).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2), rotary)

    def keys_values(self, a: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[B, T, 2h] -> rotated keys and values, each [B, Hkv, T, D]."""
        keys = self.k_proj(a).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        values = self.v_proj(a).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        return _rotate(keys, rotary), values

    def merge(self, heads: Tensor) -> Tensor:
        """[B, H, Q, D] -> [B, Q, h]."""
        return self.o_proj(heads.transpose(1, 2).flatten(-2))


class Eagle3Layer(nn.Module):
    """The drafter's one decoder layer."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.self_attn = Eagle3Attention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def join(self, embeds: Tensor, hidden: Tensor) -> Tensor:
        """Token embeddings and features, each [..., h] -> attention input [..., 2h]."""
        return torch.cat([self.input_layernorm(embeds), self.hidden_norm(hidden)], dim=-1)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Both residual connections: features [B, Q, h], attention heads [B, H, Q, D] -> [B, Q, h]."""
        residual = hidden + self.self_attn.merge(attended)
        return residual + self.mlp(self.post_attention_layernorm(residual))


class Eagle3Drafter(PreTrainedModel):
    """The drafter; see the module's docstring for the equations."""

    config_class = Eagle3Config
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    config: Eagle3Config
    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        self.fc = nn.Linear(
            len(config.aux_layers) * (config.target_hidden_size or config.hidden_size),
            config.hidden_size,
            bias=False,
        )
        self.midlayer = Eagle3Layer(config)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]
        self.register_buffer("d2t", torch.full((config.draft_vocab_size,), -1))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        self.post_init()

    @classmethod
    def for_target(cls, target: Any, vocabulary: DraftVocabulary, **overrides: Any) -> "Eagle3Drafter":
        """A new drafter, randomly initialised, with the target's width and rotary embedding.

        Args:
            target: a `vsd.targets.Target`.
            overrides: any field of `Eagle3Config`.
        """
        config = target.config
        heads = config.num_attention_heads
        fields = {
            "vocab_size": target.vocab_size,
            "draft_vocab_size": len(vocabulary.d2t),
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
            "max_position_embeddings": config.max_position_embeddings,
            "rope_parameters": _full_rotary(config),
            "aux_layers": list(target.aux_layers),
            "target_fingerprint": target.fingerprint(),
        }
        drafter = cls(Eagle3Config(**{**fields, **overrides}))
        drafter.d2t.copy_(vocabulary.d2t)
        drafter.t2d.copy_(vocabulary.t2d)
        drafter.to(target.device)
        return drafter

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> "Eagle3Drafter":  # type: ignore[override]
        """Load a saved drafter; every tensor must be there, and none may be left over.

        Raises:
            VSDError: there is no drafter at `path`, or its tensors are not exactly those of the architecture.
        """
        options: dict[str, Any] = {"use_safetensors": True, "dtype": torch.float32, **kwargs}
        options["ignore_mismatched_sizes"] = True  # named below, with what else is wrong
        load: Callable[..., Any] = super().from_pretrained
        try:
            drafter, found = load(path, *args, output_loading_info=True, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise VSDError(f"cannot load a drafter from '{path}': {str(error).splitlines()[0]}") from error
        wrong = {kind: sorted(keys) for kind, keys in found.items() if keys}
        if wrong:
            raise VSDError(f"'{path}' is not an EAGLE-3 drafter as its config describes it: {wrong}")
        return drafter

    def check_target(self, target: Any) -> None:
        """Refuse a target this drafter was not trained for.

        Raises:
            VSDError: naming what differs.
        """
        config = self.config
        pairs = {
            "vocabulary": (config.vocab_size, target.vocab_size),
            "hidden size": (config.target_hidden_size or config.hidden_size, target.hidden_size),
            "features": (list(config.aux_layers), list(target.aux_layers)),
            "fingerprint": (config.target_fingerprint or target.fingerprint(), target.fingerprint()),
        }
        for what, (mine, theirs) in pairs.items():
            if mine != theirs:
                raise VSDError(f"this drafter was trained for another target: {what} {mine}, not {theirs}")

    def draft_ids(self) -> Tensor:
        """Target token of every draft row, [Vd]."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def draft_of(self) -> Tensor:
        """Draft row of every target token, [V]; -1 where it cannot be drafted."""
        rows = torch.full((len(self.t2d),), -1, device=self.d2t.device)
        rows[self.draft_ids()] = torch.arange(len(self.d2t), device=self.d2t.device)
        return rows

    def forward(
        self,
        aux: Tensor,
        next_embeds: Tensor,
        roots: Tensor,
        path_embeds: Tensor,
        objective: Callable[[Tensor, Tensor], Any] | None = None,
        widths: Sequence[int] | None = None,
        positions: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> Any:
        """Draft K steps from every root with given tokens (EAGLE-3's training-time test).

        Args:
            aux: target features [B, T, 3h].
            next_embeds: embeddings of the tokens behind the entries, at 1 … T, [B, T, h].
            roots: entries to draft from, [B, Q].
            path_embeds: what step k consumes, [K, B, Q, h]: the token behind the root, then the path's own.
            objective: called with the result and the LM head's weight [Vd, h] before this module returns, so
                that whatever wraps it sees all of the backward pass.
            widths: how many of the roots are run at each step, never rising; None: all. The rest of a step is zeros.
            positions: of the entries, [B, T], where they are not one text: 0 … T - 1.
            seen: which entries each sees, itself included, [B, T, T] bool; where they are one text: those up to it.

        Returns:
            Normed hidden states [K, B, Q, h], of which `lm_head` of row k predicts the path's token k; or
            whatever `objective` makes of them.
        """
        hidden, shared, seen, at = self._roots(aux, next_embeds, roots, positions, seen)
        step: Callable[..., Any] = self._step
        if self.gradient_checkpointing and self.training:
            step = partial(self._gradient_checkpointing_func, self._step)
        own: list[tuple[Tensor, Tensor]] = []
        steps = []
        Q = roots.shape[1]
        for k, embeds in enumerate(path_embeds):
            W = Q if widths is None else widths[k]
            own = [(keys[:, :, :W], values[:, :, :W]) for keys, values in own]
            hidden, own = step(hidden[:, :W], embeds[:, :W], at[:, :W] + k, shared, seen[:, :W], own, k > 0)
            steps.append(F.pad(self.norm(hidden), (0, 0, 0, Q - W)))
        stacked = torch.stack(steps)
        return stacked if objective is None else objective(stacked, self.lm_head.weight)

    @torch.no_grad()
    def sample(
        self,
        aux: Tensor,
        next_embeds: Tensor,
        roots: Tensor,
        embeds: Tensor,
        steps: int,
        choose: Callable[[Tensor], Tensor],
    ) -> None:
        """Draft `steps` tokens below every root, letting the caller choose them.

        Args:
            aux, next_embeds, roots: as in `forward`.
            embeds: embeddings of the tokens at root + 1, [B, Q, h].
            choose: given log q [B, Q, Vd] of a step, the embeddings [B, Q, h] of the tokens to go on with.
        """
        hidden, shared, seen, at = self._roots(aux, next_embeds, roots)
        own: list[tuple[Tensor, Tensor]] = []
        for k in range(steps):
            hidden, own = self._step(hidden, embeds, at + k, shared, seen, own, k > 0)
            embeds = choose(self.log_probs(hidden))

    @torch.no_grad()
    def stand(self, aux: Tensor, next_embeds: Tensor, roots: Tensor, slots: int) -> tuple["DraftCache", Tensor]:
        """As decoding stands at roots [B, Q] of a text: a cache of B Q rows, and hidden [B Q, 1, h] drafted from.

        Args:
            aux, next_embeds: as in `forward`.
            slots: room for so many drafted nodes.
        """
        hidden, (keys, values), seen, at = self._roots(aux, next_embeds, roots)
        first = next_embeds.gather(1, roots[..., None].expand(-1, -1, next_embeds.shape[-1]))
        hidden, _ = self._step(hidden, first, at, (keys, values), seen, [], False)
        (B, Q), T = roots.shape, aux.shape[1]
        cache = self.new_cache(B * Q, T + slots)
        cache.keys[:, :, :T], cache.values[:, :, :T] = keys.repeat_interleave(Q, 0), values.repeat_interleave(Q, 0)
        cache.lengths = roots.flatten() + 1
        cache.fill = int(cache.lengths.max())
        return cache, hidden.flatten(0, 1)[:, None]

    def _roots(
        self,
        aux: Tensor,
        next_embeds: Tensor,
        roots: Tensor,
        positions: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
        """Fused features of roots, [B, Q, h]; all entries' step-0 keys and values; whom roots see; where they stand."""
        layer = self.midlayer
        fused = self.fc(aux)  # [B, T, h]
        entries = torch.arange(aux.shape[1], device=aux.device)
        places = entries[None] if positions is None else positions
        shared = layer.self_attn.keys_values(layer.join(next_embeds, fused), self.rotary_emb(fused, places))
        hidden = fused.gather(1, roots[..., None].expand(-1, -1, fused.shape[-1]))
        if seen is None:
            seen = entries <= roots[..., None]  # [B, Q, T]
        else:
            seen = seen.gather(1, roots[..., None].expand(-1, -1, seen.shape[-1]))
        return hidden, shared, seen, roots if positions is None else positions.gather(1, roots)

    def _step(
        self,
        hidden: Tensor,
        embeds: Tensor,
        positions: Tensor,
        shared: tuple[Tensor, Tensor],
        seen: Tensor,
        own: list[tuple[Tensor, Tensor]],
        drafted: bool,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """One step of all roots: hidden, embeds [B, Q, h], positions [B, Q] -> next hidden, and the keys it adds."""
        layer, attention = self.midlayer, self.midlayer.self_attn
        a, rotary = layer.join(embeds, hidden), self.rotary_emb(hidden, positions)
        if drafted:  # step 0 is among the shared keys
            own = [*own, attention.keys_values(a, rotary)]
        attended = _attend_with_own(attention.queries(a, rotary), *shared, seen, own)
        return layer.finish(hidden, attended), own

    def new_cache(self, batch_size: int, capacity: int) -> DraftCache:
        """An empty cache; `capacity` counts committed entries and the slots of one tree."""
        return DraftCache(self.config, batch_size, capacity, self.norm.weight)

    def extend(self, aux: Tensor, next_embeds: Tensor, counts: Tensor, cache: DraftCache) -> Tensor:
        """Commit new entries, row b the first counts[b] of them, and draft one step from the last.

        aux [B, A, 3h], next_embeds [B, A, h], counts [B] -> hidden [B, 1, h], before `norm`.
        """
        layer, attention = self.midlayer, self.midlayer.self_attn
        fused = self.fc(aux.to(self.dtype))
        slots = cache.lengths[:, None] + torch.arange(aux.shape[1], device=aux.device)  # [B, A]
        a, (cos, sin) = layer.join(next_embeds.to(self.dtype), fused), self.rotary_emb(fused, slots)
        cache.reserve(int(slots.max()) + 1)
        cache.write(*attention.keys_values(a, (cos, sin)), slots)
        cache.lengths = cache.lengths + counts
        cache.fill = int(cache.lengths.max())
        last = (counts - 1)[:, None, None]
        pick = lambda x: x.gather(1, last.expand(-1, 1, x.shape[-1]))  # noqa: E731
        seen = torch.arange(cache.fill, device=aux.device) < cache.lengths[:, None]
        attended = _attend(attention.queries(pick(a), (pick(cos), pick(sin))), cache, seen[:, None])
        return layer.finish(pick(fused), attended)

    def expand(self, hidden: Tensor, embeds: Tensor, depth: int, scratch: Tensor, cache: DraftCache) -> Tensor:
        """Run W drafted nodes of one depth of the tree.

        Args:
            hidden: output of each node's parent, [B, W, h], before `norm`.
            embeds: embedding of each node's token, [B, W, h].
            depth: 1 for children of the root.
            scratch: which slots after the committed ones each node sees, [B, W, S] bool; its own is among the
                last W, which this call writes.

        Returns:
            Hidden states [B, W, h], before `norm`.
        """
        layer, attention = self.midlayer, self.midlayer.self_attn
        W, S = scratch.shape[1:]
        positions = (cache.lengths - 1 + depth)[:, None]  # [B, 1]
        a, rotary = layer.join(embeds.to(self.dtype), hidden), self.rotary_emb(hidden, positions)
        keys, values = attention.keys_values(a, rotary)
        end = cache.fill + S
        cache.reserve(end)
        cache.keys[:, :, end - W : end], cache.values[:, :, end - W : end] = keys, values
        committed = torch.arange(cache.fill, device=hidden.device) < cache.lengths[:, None]  # [B, fill]
        seen = torch.cat([committed[:, None].expand(-1, W, -1), scratch], dim=-1)
        return layer.finish(hidden, _attend(attention.queries(a, rotary), cache, seen))

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Draft distribution in float32: hidden [..., h] before `norm` -> log q [..., Vd]."""
        return self.lm_head(self.norm(hidden)).float().log_softmax(-1)


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x [B, H, Q, D] with cos, sin [B or 1, Q or 1, D]."""
    cos, sin = rotary
    return x * cos[:, None] + rotate_half(x) * sin[:, None]


def _attend(queries: Tensor, cache: DraftCache, seen: Tensor) -> Tensor:
    """Queries [B, H, W, D] over the first L slots of the cache, seen [B, W, L] bool -> [B, H, W, D]."""
    keys, values = cache.keys[:, :, : seen.shape[-1]], cache.values[:, :, : seen.shape[-1]]
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen[:, None], enable_gqa=True)


def _attend_with_own(
    queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, own: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Attention over shared step-0 keys [B, Hkv, T, D], masked by seen [B, Q, T], and each query's own later keys.

    queries [B, H, Q, D]; `own`: a (key, value) pair [B, Hkv, Q, D] for every later step -> [B, H, Q, D].
    """
    _, H, Q, D = queries.shape
    G = H // keys.shape[1]  # queries per key/value head
    grouped = queries.unflatten(1, (-1, G)) * D**-0.5  # [B, Hkv, G, Q, D]
    shared = (grouped.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, (G, Q))
    shared = shared.masked_fill(~seen[:, None, None], float("-inf"))
    scores = torch.cat([shared, *[(grouped * k[:, :, None]).sum(-1, keepdim=True) for k, _ in own]], dim=-1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(values.dtype)  # [B, Hkv, G, Q, T + k]
    shared, *later = weights.split([keys.shape[2]] + [1] * len(own), dim=-1)
    out = (shared.flatten(2, 3) @ values).unflatten(2, (G, Q))
    for weight, (_, v) in zip(later, own):
        out = out + weight * v[:, :, None]
    return out.flatten(1, 2)


def _full_rotary(config: Any) -> dict[str, Any]:
    """The target's rotary parameters, as one full-width rotation (mixed and partial ones have no drafter twin)."""
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    if "full_attention" in parameters:
        parameters = dict(parameters["full_attention"])
    parameters.pop("partial_rotary_factor", None)
    return {"rope_type": "default", "rope_theta": 10000.0} | parameters
