"""A target without its layers: tokenizer, end tokens, context length, embedding, final norm and LM head.

Export, import and training on recorded text from a feature store need nothing else. `Target` adds the layers;
`load_target_info` reads a checkpoint without them.

Legend: N tokens, h hidden size, V vocabulary.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from vsd.errors import TargetError
from vsd.targets.images import ImageReader

_HEAD_ROWS = 256  # logits of so many tokens at once


class OuterModules(NamedTuple):
    """Modules of a causal LM around its decoder layers.

    Of `last_layer`, and of the vision tower and what connects it, only one-dimensional parameters are used, to tell
    fine-tunes apart.
    """

    embedding: nn.Module
    norm: nn.Module
    head: nn.Module
    last_layer: nn.Module
    vision: tuple[nn.Module, ...] = ()


class TargetInfo:
    """A target as drafters, data and export see it.

    Args:
        name: hub id, folder or `.gguf` file it was loaded from.
        config: of its language model.
        read: called at the first use of a weight.
        images: reads its images; None for a target of text.

    Attributes:
        eos_ids: tokens that end an answer.
        vocab_size: V, the rows of the LM head.
        hidden_size: h.
        context: positions that the target has; None where its configuration does not say.
    """

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        eos_ids: tuple[int, ...],
        read: Callable[[], OuterModules],
        images: ImageReader | None = None,
    ) -> None:
        self.images = images
        self.name, self.tokenizer, self.config, self.eos_ids = name, tokenizer, config, eos_ids
        self.vocab_size: int = config.vocab_size
        self.hidden_size: int = config.hidden_size
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._read = read

    @cached_property
    def outer(self) -> OuterModules:
        """Embedding, final norm and LM head."""
        return self._read()

    @property
    def head(self) -> nn.Module:
        """The LM head."""
        return self.outer.head

    @cached_property
    def embedding_weight(self) -> Tensor:
        """[V, h]."""
        return cast(Tensor, self.outer.embedding.weight)

    @cached_property
    def head_weight(self) -> Tensor:
        """[V, h]."""
        return cast(Tensor, self.outer.head.weight)

    @cached_property
    def head_bias(self) -> Tensor | None:
        """[V]; None in most models."""
        return cast(Tensor | None, getattr(self.outer.head, "bias", None))

    @property
    def device(self) -> torch.device:
        """Where inputs must be."""
        return self.embedding_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.embedding_weight.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [..., h] of token ids [...], as the target itself embeds them."""
        return cast(Tensor, self.outer.embedding(ids))

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm [..., h] of the last layer's output [..., h]: what enters the LM head."""
        return cast(Tensor, self.outer.norm(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """LM-head logits [..., V] in float32 of final hidden states [..., h]."""
        return self.cap(self.head(hidden).float())

    def logit(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """LM-head logits [...], float32, of one token [...] for each of hidden [..., h]."""
        logits = (hidden.float() * self.head_weight[tokens].float()).sum(-1)
        return self.cap(logits if self.head_bias is None else logits + self.head_bias[tokens].float())

    def log_normaliser(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """logsumexp [N] of the logits at a temperature, float32, of final hidden states [N, h], in chunks of rows."""
        found = []
        for rows in hidden.split(_HEAD_ROWS):
            logits = self.logits(rows)
            found.append((logits if temperature == 1 else logits / temperature).logsumexp(-1))
        return torch.cat(found)

    def cap(self, logits: Tensor) -> Tensor:
        """Soft-capping of logits (Gemma 2); the identity in most models."""
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)

    def fingerprint(self, layers: Sequence[int] = ()) -> str:
        """Sixteen hex digits that change with weights, architecture and the feature layers used, not with precision."""
        shape = {k: getattr(self.config, k, None) for k in ("model_type", "hidden_size", "num_hidden_layers")}
        digest = hashlib.sha256(json.dumps([shape, self.vocab_size, list(layers)], sort_keys=True).encode())
        digest.update(self._weights_sample)
        return digest.hexdigest()[:16]

    @cached_property
    def _weights_sample(self) -> bytes:
        """Rows of embedding and head, the last layer's norms and biases, and those of the vision tower."""
        rows = slice(None, None, max(1, self.vocab_size // 64))
        sampled = self.outer.last_layer, *self.outer.vision
        norms = [p for module in sampled for p in module.parameters() if p.dim() == 1]
        # Multiples of 2^-14 are the same whichever of bfloat16, float16 and float32 the weights are loaded in.
        return b"".join(
            (weight.detach().cpu().bfloat16().float() * 2**14).round().int().numpy().tobytes()
            for weight in (self.embedding_weight[rows], self.head_weight[rows], *norms)
        )


def outer_modules(model: PreTrainedModel) -> OuterModules:
    """The modules around the layers of a causal LM.

    Raises:
        TargetError: it has no LM head, or its decoder layers cannot be found.
    """
    decoder, layers = decoder_of(model)
    head = model.get_output_embeddings()
    if head is None:
        raise TargetError(f"{type(model).__name__} has no LM head: a target must be a causal LM")
    norms = [
        module
        for module in decoder.children()
        if (weights := list(module.parameters())) and all(p.dim() == 1 for p in weights)
    ]
    norm = norms[-1] if norms else nn.Identity()
    text = language_model(model)
    others = () if text is model.base_model else (part for part in model.base_model.children() if part is not text)
    return OuterModules(model.get_input_embeddings(), norm, head, layers[-1], tuple(others))


def decoder_of(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The module of a causal LM that holds its decoder layers, and the layers; never those of a vision tower.

    Raises:
        TargetError: they cannot be found.
    """
    count = model.config.get_text_config().num_hidden_layers
    for decoder in language_model(model).modules():
        for module in decoder.children():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return decoder, module
    raise TargetError(f"cannot find the {count} decoder layers of {type(model).__name__}")


def language_model(model: PreTrainedModel) -> nn.Module:
    """The part of a model that reads embeddings of tokens and images."""
    if model.config.get_text_config() is model.config:
        return model.base_model
    return cast(nn.Module, model.get_decoder())


def end_ids(generation: GenerationConfig | None, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer: the generation config's, else the tokenizer's."""
    ids = generation.eos_token_id if generation else None
    ids = ids if ids is not None else tokenizer.eos_token_id
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)
