"""The law of one request's tokens: processors of the target's logits, and the generator that samples from them.

Legend: T tokens of a history, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

_HISTORY_FREE = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


class Law(NamedTuple):
    """The law of the tokens of one request.

    Attributes:
        processors: applied to the logits in this order, temperature among them.
        temperature: of the drafter, where its chain is sampled.
        generator: of the samples; None takes the argmax (temperature 0).
        eos: end tokens of an answer: later tokens are cut off, so processors are not called for them.
    """

    processors: LogitsProcessorList
    temperature: float
    generator: torch.Generator | None
    eos: frozenset[int]

    @property
    def plain(self) -> bool:
        """Whether every token is the argmax of the unprocessed logits."""
        return not self.processors and self.generator is None

    def process(self, history: Callable[[], list[int]], scores: Tensor) -> Tensor:
        """Processed scores [1, V] of the token after a history, which is built only if a processor reads it."""
        read = any(not isinstance(processor, _HISTORY_FREE) for processor in self.processors)
        ids = torch.tensor([history() if read else []], dtype=torch.long, device=scores.device)  # [1, T]
        return self.processors(ids, scores)  # type: ignore[arg-type]
