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

Legend: B batch, E entries, P paths, Q queries, K steps, A new tokens, W nodes of a level, L slots, h hidden, H heads,
D head dimension, V target vocabulary, Vd draft vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, rotate_half

from vsd.drafters.autoregressive import Autoregressive
from vsd.drafters.base import FeatureSpec
from vsd.drafters.eagle3.state import Eagle3State
from vsd.drafters.vocabulary import DraftVocabulary
from vsd.errors import MismatchError
from vsd.paths import Entries, Paths
from vsd.targets import Padded, TargetInfo
from vsd.targets.packed import pack_linears


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
    rope_parameters: dict[str, Any] | None = None
    initializer_range: float = 0.02
    aux_layers: tuple[int, ...] | list[int] = (2, 15, 27)
    target_hidden_size: int | None = None
    target_fingerprint: str | None = None
    tie_word_embeddings: bool = False


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
        merged: Tensor = self.o_proj(heads.transpose(1, 2).flatten(-2))
        return merged


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
        finished: Tensor = residual + self.mlp(self.post_attention_layernorm(residual))
        return finished


class Eagle3Drafter(Autoregressive, PreTrainedModel):
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
        self.embed: Callable[[Tensor], Tensor] = _detached
        self.post_init()

    @classmethod
    def for_target(cls, target: TargetInfo, vocabulary: DraftVocabulary, **overrides: Any) -> "Eagle3Drafter":
        """A new drafter, randomly initialised, with the target's width and rotary embedding.

        Args:
            overrides: any field of `Eagle3Config`.
        """
        layers = overrides.get("aux_layers") or default_layers(target.config.num_hidden_layers)
        config = target.config
        heads = config.num_attention_heads
        fields = {
            "vocab_size": target.vocab_size,
            "draft_vocab_size": vocabulary.size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
            "max_position_embeddings": config.max_position_embeddings,
            "rope_parameters": _full_rotary(config),
            "aux_layers": list(layers),
            "target_fingerprint": target.fingerprint(layers),
        }
        drafter = cls(Eagle3Config(**{**fields, **overrides}))
        drafter.d2t.copy_(vocabulary.d2t)
        drafter.t2d.copy_(vocabulary.t2d)
        drafter.to(target.device)  # type: ignore[arg-type]
        drafter.attach(target)
        return drafter

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> "Eagle3Drafter":  # type: ignore[override]
        """Load a saved drafter; every tensor must be there, and none may be left over.

        Raises:
            MismatchError: there is no drafter at `path`, or its tensors are not exactly those of the architecture.
        """
        options: dict[str, Any] = {"use_safetensors": True, "dtype": torch.float32, **kwargs}
        options["ignore_mismatched_sizes"] = True  # named below, with what else is wrong
        load: Callable[..., Any] = super().from_pretrained
        try:
            drafter, found = load(path, *args, output_loading_info=True, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise MismatchError(f"cannot load a drafter from '{path}': {str(error).splitlines()[0]}") from error
        wrong = {kind: sorted(keys) for kind, keys in found.items() if keys}
        if wrong:
            raise MismatchError(f"'{path}' is not an EAGLE-3 drafter as its config describes it: {wrong}")
        own: Eagle3Drafter = drafter
        return own

    @property
    def needs(self) -> FeatureSpec:
        """Three decoder layers of the target."""
        return FeatureSpec(tuple(self.config.aux_layers))

    def attach(self, target: TargetInfo) -> None:
        """See `Drafter.attach`; the drafter embeds tokens as the target does."""
        config = self.config
        fingerprint = target.fingerprint(config.aux_layers)
        pairs = {
            "vocabulary": (config.vocab_size, target.vocab_size),
            "hidden size": (config.target_hidden_size or config.hidden_size, target.hidden_size),
            "fingerprint": (config.target_fingerprint or fingerprint, fingerprint),
        }
        for name, (mine, theirs) in pairs.items():
            if mine != theirs:
                raise MismatchError(f"this drafter was trained for another target: {name} {mine}, not {theirs}")
        count = target.config.num_hidden_layers
        if not all(0 <= layer < count for layer in config.aux_layers):
            raise MismatchError(f"features of layers {list(config.aux_layers)} of a target that has {count}")
        self.embed = lambda ids: target.embed(ids)  # not a method: a copy of the drafter would copy the target

    @property
    def vocabulary(self) -> DraftVocabulary:
        """From `d2t`."""
        return DraftVocabulary(torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t, len(self.t2d))

    def states(self, entries: Entries, paths: Paths) -> Tensor:
        """Draft K steps from every root along given tokens (EAGLE-3's training-time test), [K, B, P, h], normed.

        Step k is run for the first paths only, as many as some sequence has valid ones: sort them longest first
        (`longest_first`). States of steps that are not run are zeros.
        """
        hidden, shared, seen, at = self._roots(entries, paths.roots)
        step: Callable[..., Any] = self._step
        if self.gradient_checkpointing and self.training:
            step = partial(self._gradient_checkpointing_func, self._step)
        own: list[tuple[Tensor, Tensor]] = []
        steps = []
        P = paths.roots.shape[1]
        consumed = self.embed(paths.consumed(entries.next_ids))  # [K, B, P, h]
        for k, (embeds, W) in enumerate(zip(consumed, paths.widths())):
            own = [(keys[:, :, :W], values[:, :, :W]) for keys, values in own]
            hidden, own = step(hidden[:, :W], embeds[:, :W], at[:, :W] + k, shared, seen[:, :W], own, k > 0)
            steps.append(F.pad(self.norm(hidden), (0, 0, 0, P - W)))
        return torch.stack(steps)

    @torch.no_grad()
    def sample(self, entries: Entries, roots: Tensor, steps: int, choose: Callable[[Tensor], Tensor]) -> None:
        """See `Drafter.sample`."""
        ids = self.vocabulary.ids
        embeds = self.embed(entries.next_ids.gather(1, roots))
        hidden, shared, seen, at = self._roots(entries, roots)
        own: list[tuple[Tensor, Tensor]] = []
        for k in range(steps):
            hidden, own = self._step(hidden, embeds, at + k, shared, seen, own, k > 0)
            embeds = self.embed(ids[choose(self.log_probs(hidden))])

    @torch.no_grad()
    def begin_at(self, entries: Entries, roots: Tensor, room: int) -> "Eagle3State":
        """See `Drafter.begin_at`."""
        hidden, (keys, values), seen, at = self._roots(entries, roots)
        first = self.embed(entries.next_ids.gather(1, roots))
        hidden, _ = self._step(hidden, first, at, (keys, values), seen, [], False)
        (B, P), T = roots.shape, entries.next_ids.shape[1]
        state = Eagle3State.empty(self.config, B * P, T + room, self.norm.weight)
        state.keys[:, :, :T], state.values[:, :, :T] = keys.repeat_interleave(P, 0), values.repeat_interleave(P, 0)
        state.commit(roots.flatten() + 1, at.flatten() + 1)
        state.hidden = hidden.flatten(0, 1)[:, None]
        return state

    def _roots(self, entries: Entries, roots: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
        """Fused features of roots, [B, P, h]; all entries' step-0 keys and values; `seen_from`; positions [B, P]."""
        layer = self.midlayer
        fused = self.fc(entries.aux)  # [B, E, h]
        a, rotary = layer.join(self.embed(entries.next_ids), fused), self.rotary_emb(fused, entries.positions)
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

    def begin(self, prompt: Padded, aux: Tensor, root: Tensor, capacity: int) -> "Eagle3State":
        """See `Drafter.begin`."""
        entries = Entries.of(prompt, aux, root)
        state = Eagle3State.empty(self.config, len(root), capacity, self.norm.weight)
        self._extend(state, aux, entries.next_ids, prompt.lengths, entries.positions)
        return state

    def advance(self, state: "Eagle3State", aux: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """See `Drafter.advance`."""
        positions = state.next[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        self._extend(state, aux, tokens, counts, positions)

    def _extend(self, state: "Eagle3State", aux: Tensor, next_ids: Tensor, counts: Tensor, positions: Tensor) -> None:
        """Commit entries [B, A], row b the first counts[b] of them, and draft one step from the last."""
        layer, attention = self.midlayer, self.midlayer.self_attn
        fused = self.fc(aux.to(self.dtype))
        a, (cos, sin) = layer.join(self.embed(next_ids).to(self.dtype), fused), self.rotary_emb(fused, positions)
        state.append(*attention.keys_values(a, (cos, sin)))
        last = (counts - 1)[:, None, None]
        pick = lambda x: x.gather(1, last.expand(-1, 1, x.shape[-1]))  # noqa: E731
        state.commit(state.lengths + counts, pick(positions[..., None])[:, 0, 0] + 1)
        attended = _attend(attention.queries(pick(a), (pick(cos), pick(sin))), state, state.committed[:, None])
        state.hidden = layer.finish(pick(fused), attended)

    def expand(self, state: "Eagle3State", hidden: Tensor, tokens: Tensor, depth: int, seen: Tensor) -> Tensor:
        """See `Autoregressive.expand`; hidden states are those before `norm`."""
        layer, attention = self.midlayer, self.midlayer.self_attn
        W, S = seen.shape[1:]
        positions = (state.next - 1 + depth)[:, None]  # [B, 1]
        embeds = self.embed(tokens).to(self.dtype)
        a, rotary = layer.join(embeds, hidden), self.rotary_emb(hidden, positions)
        state.draft(*attention.keys_values(a, rotary), state.fill + S - W)
        allowed = torch.cat([state.committed[:, None].expand(-1, W, -1), seen], dim=-1)
        return layer.finish(hidden, _attend(attention.queries(a, rotary), state, allowed))

    def freeze(self) -> None:
        """See `Drafter.freeze`; queries are asked of fewer entries than keys and values."""
        pack_linears(self.eval().requires_grad_(False), together=(("k_proj", "v_proj"), ("gate_proj", "up_proj")))

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Draft distribution in float32: hidden [..., h] before `norm` -> log q [..., Vd]."""
        log_q: Tensor = self.lm_head(self.norm(hidden)).float().log_softmax(-1)
        return log_q


def default_layers(num_layers: int) -> tuple[int, ...]:
    """EAGLE-3's three feature layers, by input index: [2, L/2, L-3]; spread evenly where there are fewer than six."""
    if num_layers < 6:
        return (0, num_layers // 2, num_layers - 1)
    return (2, num_layers // 2, num_layers - 3)


def _detached(ids: Tensor) -> Tensor:
    raise MismatchError("this drafter has no target yet: call `attach` first")


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x [B, H, Q, D] with cos, sin [B or 1, Q or 1, D]."""
    cos, sin = rotary
    rotated: Tensor = x * cos[:, None] + rotate_half(x) * sin[:, None]
    return rotated


def _attend(queries: Tensor, state: Eagle3State, seen: Tensor) -> Tensor:
    """Queries [B, H, W, D] over the first L slots of the state, seen [B, W, L] bool -> [B, H, W, D]."""
    keys, values = state.keys[:, :, : seen.shape[-1]], state.values[:, :, : seen.shape[-1]]
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
    out: Tensor = (shared.flatten(2, 3) @ values).unflatten(2, (G, Q))
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
