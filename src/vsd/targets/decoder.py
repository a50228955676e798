"""One forward pass of a causal LM over any packed set of nodes: explicit positions, an explicit mask and a `TreeCache`.

Nothing here knows an architecture. Features are read by hooks at the inputs of decoder layers. Targets and drafters
that are language models themselves share this code.

Legend: B batch, N tokens or nodes of one pass, L keys, R rows of positions, h hidden size, n feature layers.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from transformers import PreTrainedConfig, PreTrainedModel

from vsd.errors import ConfigurationError, TargetError
from vsd.targets import attention
from vsd.targets.cache import TreeCache, visible
from vsd.targets.info import decoder_of
from vsd.targets.inputs import Padded
from vsd.targets.packed import PackedLinear, join_linears

_KNOWN_ATTENTION = {"full_attention", "sliding_attention"}
_STATIC_CAPACITY = 512  # slots that a cache has at least, once the passes over it are compiled

Masks = Tensor | dict[str, Tensor] | None


class Output(NamedTuple):
    """Of one pass: `hidden` [B, N, h] enters the LM head; `aux` [B, N, n h] holds the inputs of n decoder layers.

    The layer behind the last one is the LM head: its input is `hidden`.
    """

    hidden: Tensor
    aux: Tensor


class Decoder:
    """The decoder of a causal LM.

    Args:
        model: any transformers causal LM with full or sliding-window attention; its attention implementation is set.

    Attributes:
        window: of sliding attention, in tokens; None where no layer slides.

    Raises:
        TargetError: attention of another kind.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(attention.NAME)
        self.model = model
        self.layers = decoder_of(model)[1]
        self.window, self._mixed = _attention_kind(model.config.get_text_config())
        accepted = inspect.signature(model.base_model.forward).parameters
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"
        self._types = [name for name in ("token_type_ids", "mm_token_type_ids") if name in accepted]
        self._static = False
        self._compiled: Callable[..., Output] | None = None

    @property
    def device(self) -> torch.device:
        """Where inputs must be."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[return-value]

    def new_cache(self, batch_size: int, capacity: int) -> TreeCache:
        """An empty cache for this model."""
        if self._static:  # every capacity is compiled for: let there be few
            capacity = max(_STATIC_CAPACITY, 1 << (capacity - 1).bit_length())
        weights = (next(layer.parameters(), None) for layer in self.layers)  # none where all are packed
        devices = [self.device if weight is None else weight.device for weight in weights]
        return TreeCache(devices, batch_size, capacity, self.device)

    def prefill(self, inputs: Padded, cache: TreeCache, layers: Sequence[int] = ()) -> Output:
        """Read prompts into an empty cache and commit them.

        Masks are the model's own: layers with full attention need none. Padding is on the right, where no token of the
        text sees it, and its slots lie behind each row's length, where no later pass sees them.
        """
        B, N = inputs.ids.shape
        cache.place(inputs.positions)
        output = self._run(inputs.ids, inputs.positions, None, cache, layers, self.extras(inputs))
        cache.commit(torch.arange(N, device=inputs.ids.device).expand(B, N), inputs.lengths)
        return output

    def nodes(
        self,
        ids: Tensor,
        positions: Tensor,
        ancestors: Tensor,
        cache: TreeCache,
        context: Tensor | None = None,
        layers: Sequence[int] = (),
    ) -> Output:
        """One pass over nodes ids [B, N] at positions [B, N] or [R, B, N].

        Every node sees its row's committed cache, or the first context[b, n] tokens of it, or those that context
        [B, N, fill] (bool) marks; and the nodes that ancestors [B or 1, N, N] (bool) marks, itself included. Nothing is
        committed: call `cache.commit` with the nodes to keep.

        Args:
            layers: decoder layers whose inputs are returned as `aux`.
        """
        queries, slots = cache.place(positions), cache.slots
        allowed = visible(cache.lengths[:, None] if context is None else context, slots.fill, ancestors)
        if self._compiled is None or slots.fill == 0:  # an empty cache has no slots to compile for
            masks = self._masks(allowed, queries, slots.positions)
            return self._run(ids, positions, masks, cache, layers, {})
        with cache.traced(ids.shape[1], self._static):
            allowed = F.pad(allowed, (0, slots.reach - allowed.shape[-1]))
            return self._compiled(ids, positions, self._masks(allowed, queries, slots.positions), cache, layers)

    def sequences(self, inputs: Padded, layers: Sequence[int] = ()) -> Output:
        """One pass over whole sequences without a cache, by the model's own causal masks: padding is on the right."""
        return self._run(inputs.ids, inputs.positions, None, None, layers, self.extras(inputs))

    def packed(self, ids: Tensor, positions: Tensor, seen: Tensor) -> Output:
        """One pass over nodes ids [B, N] without a cache; seen [B, N, N] bool: which of them each attends to."""
        return self._run(ids, positions, self._masks(seen, positions, positions), None, (), {})

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
            ConfigurationError: the weights are packed, or spread over several devices.
        """
        if len({weight.device for weight in self.model.parameters()}) > 1:
            raise ConfigurationError("a target on several GPUs cannot be compiled: leave out --compile")
        if any(isinstance(module, PackedLinear) for module in self.model.modules()):
            raise ConfigurationError("packed weights cannot be compiled: load_target(…, pack=False)")
        join_linears(self.model)
        probe = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.model.base_model(input_ids=probe, output_hidden_states=True)  # transformers sets up its hooks for it now
        self._static = self.device.type == "cuda" if static is None else static
        base, last = torch.compile(self.model.base_model, dynamic=not self._static, **options), len(self.layers)

        def run(ids: Tensor, positions: Tensor, masks: Masks, cache: TreeCache, layers: Sequence[int]) -> Output:
            with torch.no_grad(), inductor_config.patch(freezing=self.device.type == "cpu"):
                inputs = self._inputs(ids, positions, masks, cache)
                output = base(**inputs, output_hidden_states=True)  # the compiler would not see hooks
            hidden = output.last_hidden_state
            return Output(hidden, _joined(dict(enumerate(output.hidden_states[:last])), layers, hidden))

        self._compiled = run

    def _run(
        self,
        ids: Tensor,
        positions: Tensor,
        masks: Masks,
        cache: TreeCache | None,
        layers: Sequence[int],
        extras: dict[str, Tensor],
    ) -> Output:
        taken: dict[int, Tensor] = {}

        def take(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                taken[index] = args[0] if args else kwargs["hidden_states"]

            return hook

        inner = [i for i in layers if i < len(self.layers)]
        hooks = [self.layers[i].register_forward_pre_hook(take(i), with_kwargs=True) for i in inner]
        try:
            inputs = self._inputs(ids, positions, masks, cache)
            hidden: Tensor = self.model.base_model(**inputs, **extras).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        return Output(hidden, _joined(taken, layers, hidden))

    def extras(self, inputs: Padded) -> dict[str, Tensor]:
        """What only a pass over images reads; some models also ask which tokens are images', such as Gemma 3."""
        extras = inputs.merged
        if extras:
            are_images = (inputs.ids == self.model.config.image_token_id).long()
            extras |= dict.fromkeys(self._types, are_images)
        return extras

    def _inputs(self, ids: Tensor, positions: Tensor, masks: Masks, cache: TreeCache | None) -> dict[str, Any]:
        """Arguments of the model's `forward`; transformers 5.24 has renamed the cache."""
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": masks, "use_cache": cache is not None}
        return inputs | {self._cache_name: cache}

    def _masks(self, allowed: Tensor, queries: Tensor, keys: Tensor) -> Masks:
        """Additive masks [B, 1, N, L] from allowed [B, N, L] and positions of queries [B, N] and keys [B, ≥ L]."""
        if self.window is None:
            return self._additive(allowed)
        near = queries[:, :, None] - keys[:, None, : allowed.shape[-1]] < self.window
        sliding = self._additive(allowed & near)
        if not self._mixed:
            return sliding
        return {"full_attention": self._additive(allowed), "sliding_attention": sliding}

    def _additive(self, allowed: Tensor) -> Tensor:
        mask = torch.zeros(allowed.shape, dtype=self.model.dtype, device=allowed.device)
        return mask.masked_fill_(~allowed, torch.finfo(self.model.dtype).min)[:, None]


def _joined(inputs: Mapping[int, Tensor], layers: Sequence[int], hidden: Tensor) -> Tensor:
    """Features [B, N, n h] of n layers; of width 0 where no layer is asked for."""
    taken = [inputs.get(i, hidden).to(hidden.device) for i in layers]
    return torch.cat(taken, dim=-1) if taken else hidden.new_empty(*hidden.shape[:-1], 0)


def _attention_kind(config: PreTrainedConfig) -> tuple[int | None, bool]:
    """(window or None, whether full and sliding layers are mixed)."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds - _KNOWN_ATTENTION:
        unknown = ", ".join(sorted(kinds - _KNOWN_ATTENTION))
        raise TargetError(f"{unknown} is not supported: a draft tree needs full or sliding-window attention")
    if kinds == {"full_attention"} or window is None:
        return None, False
    return window, kinds == _KNOWN_ATTENTION
