"""The frozen target: one forward pass over any packed set of nodes.

Legend: B batch, N tokens or nodes of one pass, R rows of positions, h hidden size, n feature layers, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vsd.errors import ConfigurationError, TargetError
from vsd.targets.cache import TreeCache
from vsd.targets.decoder import Decoder, Output
from vsd.targets.images import ImageReader
from vsd.targets.info import TargetInfo, end_ids, outer_modules
from vsd.targets.inputs import Inputs, Padded


class Prefill(NamedTuple):
    """Texts of T tokens that the target has read: a later pass goes on from any of their tokens.

    Attributes:
        hidden: final hidden states, [B, T, h].
        cache: keys and values of all tokens, those of the padding included, which no node of a later pass should see.
    """

    hidden: Tensor
    cache: TreeCache


class Target(TargetInfo):
    """A causal LM, frozen, in evaluation mode.

    Passes return `Output`: the final hidden states, and the inputs of the decoder layers that the caller names. Layer
    indices count *inputs* (vLLM's convention, equal to `hidden_states[i]`).

    Args:
        model: any transformers causal LM with full or sliding-window attention; it may have a vision tower.
        tokenizer: its tokenizer.
        images: reads its images; None for text alone.

    Attributes:
        parameters: number of the model's weights.

    Raises:
        TargetError: the attention or the LM head of the model is of a kind this class would get wrong.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "",
        images: ImageReader | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.decoder = Decoder(model)
        outer = outer_modules(model)  # now: packing hides weights later
        self.parameters = sum(weight.numel() for weight in model.parameters())
        eos_ids = end_ids(model.generation_config, tokenizer)
        super().__init__(name, tokenizer, model.config.get_text_config(), eos_ids, lambda: outer, images)
        self.fingerprint()  # for the same reason
        self._check_head()

    @property
    def head(self) -> nn.Module:
        """The LM head, packed where the model's is."""
        return cast(nn.Module, self.model.get_output_embeddings())

    def new_cache(self, batch_size: int, capacity: int) -> TreeCache:
        """An empty cache for this model."""
        return self.decoder.new_cache(batch_size, capacity)

    @torch.no_grad()
    def prefill(self, inputs: Padded, cache: TreeCache, layers: Sequence[int] = ()) -> Output:
        """Read prompts into an empty cache and commit them."""
        return self.decoder.prefill(inputs, cache, layers)

    @torch.no_grad()
    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        ancestors: Tensor,
        cache: TreeCache,
        context: Tensor | None = None,
        layers: Sequence[int] = (),
    ) -> Output:
        """One pass over nodes ids [B, N] at positions [B, N]; see `Decoder.nodes`."""
        return self.decoder.nodes(ids, positions, ancestors, cache, context, layers)

    def read(self, texts: Padded, room: int, layers: Sequence[int] = ()) -> tuple[Prefill, Tensor]:
        """Read texts and their padding into a new cache with `room` more slots; behind it features [B, T, n h]."""
        B, T = texts.ids.shape
        cache = self.new_cache(B, T + room)
        output = self.prefill(texts._replace(lengths=torch.full_like(texts.lengths, T)), cache, layers)
        return Prefill(output.hidden, cache), output.aux

    @torch.no_grad()
    def features(self, inputs: Padded, layers: Sequence[int] = ()) -> Output:
        """Of whole sequences, without a cache: the features that a drafter is trained on."""
        return self.decoder.sequences(inputs, layers)

    def compile(self, static: bool | None = None, **options: Any) -> None:
        """Compile passes over a filled cache; see `Decoder.compile`."""
        self.decoder.compile(static, **options)

    def check_layers(self, layers: Sequence[int]) -> None:
        """Refuse features of decoder layers that do not exist.

        Raises:
            ConfigurationError: naming them.
        """
        count = len(self.decoder.layers)
        if not all(0 <= layer < count for layer in layers):
            raise ConfigurationError(f"features of layers {list(layers)} of a target that has {count}")

    @torch.no_grad()
    def _check_head(self) -> None:
        """Refuse a model that does more to its logits than `logits` does, rather than draft from wrong ones."""
        ids = [token % self.vocab_size for token in range(4)]
        inputs = Padded.of([Inputs(ids)], self.device)
        own = self.model(input_ids=inputs.ids).logits.float()
        ours = self.logits(self.features(inputs).hidden)
        if own.shape != ours.shape or not torch.allclose(own, ours, rtol=5e-2, atol=5e-2 * float(own.abs().max())):
            raise TargetError(
                f"{type(self.model).__name__} transforms its logits in a way that is not understood; please report it"
            )
