"""The frozen target: features for the drafter, and one forward pass over any packed set of nodes.

Nothing here knows an architecture. Auxiliary hidden states are read by hooks at the inputs of decoder layers; a
pass over tree nodes is an ordinary forward pass with explicit positions, an explicit mask and a `TreeCache`.

Legend: B batch, N tokens or nodes of one pass, L keys, h hidden size, V vocabulary.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from vsd.errors import VSDError
from vsd.targets import attention
from vsd.targets.cache import TreeCache, key_positions, visible
from vsd.targets.packed import PackedLinear, join_linears

_KNOWN_ATTENTION = {"full_attention", "sliding_attention"}
_HEAD_ROWS = 256  # logits of so many tokens at once
_STATIC_CAPACITY = 512  # slots that a cache has at least, once the passes over it are compiled


class TargetOutput(NamedTuple):
    """What one pass yields: `hidden` [B, N, h] enters the LM head, `aux` [B, N, 3h] feeds the drafter."""

    hidden: Tensor
    aux: Tensor


class Target:
    """A causal LM, frozen, in evaluation mode.

    Args:
        model: any transformers causal LM with full or sliding-window attention.
        tokenizer: its tokenizer.
        aux_layers: decoder layers whose *inputs* are the drafter's features (vLLM's convention, equal to
            `hidden_states[i]`); default [2, L/2, L-3], EAGLE-3's.

    Raises:
        VSDError: the attention or the LM head of the model is of a kind this class would get wrong.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        aux_layers: tuple[int, ...] | None = None,
        name: str = "",
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        if model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(attention.NAME)
        self.tokenizer = tokenizer
        self.name = name
        self.config = model.config.get_text_config()
        self.layers = _decoder_layers(model, self.config.num_hidden_layers)
        self.window, self._mixed = _attention_kind(self.config)
        head = model.get_output_embeddings()
        if head is None:
            raise VSDError(f"{type(model).__name__} has no LM head: a target must be a causal LM")
        self.head_weight = cast(Tensor, head.weight)  # [V, h]
        self.head_bias: Tensor | None = getattr(head, "bias", None)  # [V]
        self.embedding_weight = cast(Tensor, model.get_input_embeddings().weight)  # [V, h]
        self._softcap: float | None = getattr(self.config, "final_logit_softcapping", None)
        self._sample = self._weights_sample()  # now: packing hides weights later
        self._static = False
        accepted = inspect.signature(model.base_model.forward).parameters
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"
        self._compiled: Callable[[Tensor, Tensor, Any, TreeCache], TargetOutput] | None = None
        self.take_features(aux_layers or default_aux_layers(len(self.layers)))
        self._check_head()

    @property
    def device(self) -> torch.device:
        """Where inputs must be."""
        return self.embedding_weight.device

    @property
    def hidden_size(self) -> int:
        """h."""
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        """V, the rows of the LM head."""
        return self.head_weight.shape[0]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return end_ids(self.model.generation_config, self.tokenizer)

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [..., h] of token ids [...], as the model itself embeds them."""
        return self.model.get_input_embeddings()(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """LM-head logits [..., V] in float32 of final hidden states [..., h]."""
        return self.cap(self.model.get_output_embeddings()(hidden).float())

    def logit(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """LM-head logits [...], float32, of one token [...] for each of hidden [..., h]."""
        logits = (hidden.float() * self.head_weight[tokens].float()).sum(-1)
        return self.cap(logits if self.head_bias is None else logits + self.head_bias[tokens].float())

    def log_normaliser(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """logsumexp [N] of the logits at a temperature, float32, of final hidden states [N, h], some rows at a time."""
        found = []
        for rows in hidden.split(_HEAD_ROWS):
            logits = self.logits(rows)
            found.append((logits if temperature == 1 else logits / temperature).logsumexp(-1))
        return torch.cat(found)

    def cap(self, logits: Tensor) -> Tensor:
        """What the model does to the logits after the head (soft-capping in Gemma 2; nothing in most models)."""
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)

    def new_cache(self, batch_size: int, capacity: int) -> TreeCache:
        """An empty cache for this model."""
        if self._static:  # every capacity is compiled for: let there be few
            capacity = max(_STATIC_CAPACITY, 1 << (capacity - 1).bit_length())
        return TreeCache(len(self.layers), batch_size, capacity, self.device)

    @torch.no_grad()
    def prefill(self, ids: Tensor, lengths: Tensor, cache: TreeCache) -> TargetOutput:
        """Read right-padded prompts ids [B, N] of the given lengths [B] into an empty cache and commit them."""
        N = ids.shape[1]
        positions = torch.arange(N, device=ids.device).expand(ids.shape[0], N)
        causal = torch.ones(1, N, N, dtype=torch.bool, device=ids.device).tril()
        output = self.forward(ids, positions, causal, cache)
        cache.commit(positions, lengths)
        return output

    @torch.no_grad()
    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        ancestors: Tensor,
        cache: TreeCache,
        context: Tensor | None = None,
    ) -> TargetOutput:
        """One pass over nodes ids [B, N] at positions [B, N].

        Every node sees its row's committed cache, or the first context[b, n] tokens of it, or those that context
        [B, N, fill] (bool) marks; and the nodes that ancestors [B or 1, N, N] (bool) marks, itself included. Nothing is
        committed: call `cache.commit` with the nodes to keep.
        """
        allowed = visible(cache.lengths[:, None] if context is None else context, cache.fill, ancestors)
        keys = key_positions(cache.lengths, cache.fill, positions)
        if self._compiled is None or cache.fill == 0:  # prompts come in all lengths
            return self._run(ids, positions, self._masks(allowed, positions, keys), cache)
        with cache.traced(ids.shape[1], self._static):
            unused = (0, cache.reach - allowed.shape[-1])
            masks = self._masks(F.pad(allowed, unused), positions, F.pad(keys, unused))
            return self._compiled(ids, positions, masks, cache)

    @torch.no_grad()
    def compile(self, static: bool | None = None, **options: Any) -> None:
        """Compile passes over a filled cache with `torch.compile`.

        It takes a minute or two: worth it for a server, not for one answer. Packed weights cannot be traced; load the
        target with `pack=False`, the compiler packs them itself.

        Args:
            static: let no shape depend on the context, as CUDA graphs want it, and compile once for every tree size,
                batch size and capacity; default on CUDA. Else trees and contexts of all sizes share one compilation.
            options: for `torch.compile`.

        Raises:
            VSDError: the target's weights are packed.
        """
        if any(isinstance(module, PackedLinear) for module in self.model.modules()):
            raise VSDError("packed weights cannot be compiled: load_target(…, pack=False)")
        join_linears(self.model)
        probe = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.model.base_model(input_ids=probe, output_hidden_states=True)  # what transformers sets up for it, now
        self._static = self.device.type == "cuda" if static is None else static
        base = torch.compile(self.model.base_model, dynamic=not self._static, **options)

        def run(ids: Tensor, positions: Tensor, masks: Any, cache: TreeCache) -> TargetOutput:
            with torch.no_grad(), inductor_config.patch(freezing=self.device.type == "cpu"):
                inputs = self._inputs(ids, positions, masks, cache)
                output = base(**inputs, output_hidden_states=True)  # the compiler would not see hooks
            taken = [output.hidden_states[i] for i in self.aux_layers]
            return TargetOutput(output.last_hidden_state, torch.cat(taken, dim=-1))

        self._compiled = run

    @torch.no_grad()
    def features(self, ids: Tensor) -> TargetOutput:
        """Features of whole right-padded sequences ids [B, N], no cache: what a drafter is trained on."""
        N = ids.shape[1]
        positions = torch.arange(N, device=ids.device).expand(ids.shape[0], N)
        # Padding is on the right, so the model's own causal (and sliding) masks are right, and faster than ours.
        return self._run(ids, positions, None, None)

    def take_features(self, layers: Sequence[int]) -> None:
        """Yield the inputs of these decoder layers as `aux` from now on.

        Raises:
            VSDError: there are no such layers.
        """
        if not layers or not all(0 <= layer < len(self.layers) for layer in layers):
            raise VSDError(f"features of layers {list(layers)} of a target that has {len(self.layers)}")
        self.aux_layers = tuple(layers)
        self._fingerprint = self._digest()

    def fingerprint(self) -> str:
        """Sixteen hex digits that change with the weights, the architecture or the features taken."""
        return self._fingerprint

    def _digest(self) -> str:
        shape = {k: getattr(self.config, k, None) for k in ("model_type", "hidden_size", "num_hidden_layers")}
        digest = hashlib.sha256(json.dumps([shape, self.vocab_size, self.aux_layers], sort_keys=True).encode())
        digest.update(self._sample)
        return digest.hexdigest()[:16]

    def _weights_sample(self) -> bytes:
        """Some weights, the same whichever precision they are loaded in."""
        rows = slice(None, None, max(1, self.vocab_size // 64))
        norms = [p for p in self.layers[-1].parameters() if p.dim() == 1]  # different in every fine-tune
        # Multiples of 2^-14 are the same whichever of bfloat16, float16 and float32 the weights are loaded in.
        return b"".join(
            (weight.detach().cpu().bfloat16().float() * 2**14).round().int().numpy().tobytes()
            for weight in (self.embedding_weight[rows], self.head_weight[rows], *norms)
        )

    def _run(self, ids: Tensor, positions: Tensor, masks: Any, cache: TreeCache | None) -> TargetOutput:
        taken: dict[int, Tensor] = {}

        def take(index: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                taken[index] = args[0] if args else kwargs["hidden_states"]

            return hook

        hooks = [self.layers[i].register_forward_pre_hook(take(i), with_kwargs=True) for i in self.aux_layers]
        try:
            hidden = self.model.base_model(**self._inputs(ids, positions, masks, cache)).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        return TargetOutput(hidden, torch.cat([taken[i] for i in self.aux_layers], dim=-1))

    def _inputs(self, ids: Tensor, positions: Tensor, masks: Any, cache: TreeCache | None) -> dict[str, Any]:
        """What the decoder is called with; transformers 5.24 has renamed the cache."""
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": masks, "use_cache": cache is not None}
        return inputs | {self._cache_name: cache}

    def _masks(self, allowed: Tensor, queries: Tensor, keys: Tensor) -> Tensor | dict[str, Tensor]:
        """Additive masks [B, 1, N, L] from allowed [B, N, L] and positions of queries [B, N] and keys [B, L]."""
        if self.window is None:
            return self._additive(allowed)
        near = queries[:, :, None] - keys[:, None, :] < self.window
        sliding = self._additive(allowed & near)
        if not self._mixed:
            return sliding
        return {"full_attention": self._additive(allowed), "sliding_attention": sliding}

    def _additive(self, allowed: Tensor) -> Tensor:
        mask = torch.zeros(allowed.shape, dtype=self.model.dtype, device=allowed.device)
        return mask.masked_fill_(~allowed, torch.finfo(self.model.dtype).min)[:, None]

    @torch.no_grad()
    def _check_head(self) -> None:
        """Refuse a model that does more to its logits than `logits` does, rather than draft from wrong ones."""
        ids = torch.arange(4, device=self.device)[None] % self.vocab_size
        own = self.model(input_ids=ids).logits.float()
        ours = self.logits(self.features(ids).hidden)
        if own.shape != ours.shape or not torch.allclose(own, ours, rtol=5e-2, atol=5e-2 * float(own.abs().max())):
            raise VSDError(
                f"{type(self.model).__name__} transforms its logits in a way that is not understood; please report it"
            )


def end_ids(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end an answer: the generation config's, else the tokenizer's."""
    ids = generation.eos_token_id if generation else None
    ids = ids if ids is not None else tokenizer.eos_token_id
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def default_aux_layers(num_layers: int) -> tuple[int, ...]:
    """EAGLE-3's three layers, by input index: [2, L/2, L-3]; spread evenly where there are fewer than six."""
    if num_layers < 6:
        return (0, num_layers // 2, num_layers - 1)
    return (2, num_layers // 2, num_layers - 3)


def _decoder_layers(model: PreTrainedModel, count: int) -> nn.ModuleList:
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise VSDError(f"cannot find the {count} decoder layers of {type(model).__name__}")


def _attention_kind(config: Any) -> tuple[int | None, bool]:
    """(window or None, whether full and sliding layers are mixed)."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds - _KNOWN_ATTENTION:
        raise VSDError(f"{', '.join(sorted(kinds - _KNOWN_ATTENTION))} is not supported: a draft tree needs attention")
    if kinds == {"full_attention"} or window is None:
        return None, False
    return window, kinds == _KNOWN_ATTENTION
