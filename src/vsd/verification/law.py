"""The law of one request's tokens: what is done to the target's logits before a token is chosen, and who draws.

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

_BLIND = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)  # see the scores alone


class Law(NamedTuple):
    """How the tokens of one request are chosen.

    Attributes:
        processors: applied to the logits one after another, temperature among them.
        temperature: of the drafter, where it samples.
        generator: draws; None takes the best (temperature 0).
        eos: tokens that end an answer: what would follow is cut off, so processors are not asked.
    """

    processors: LogitsProcessorList
    temperature: float
    generator: torch.Generator | None
    eos: frozenset[int]

    @property
    def plain(self) -> bool:
        """Whether the argmax of the logits is all there is to it."""
        return not self.processors and self.generator is None

    def process(self, history: Callable[[], list[int]], scores: Tensor) -> Tensor:
        """Scores [1, V] of the token after a history, processed; the history is built if anything reads it."""
        read = any(not isinstance(processor, _BLIND) for processor in self.processors)
        ids = torch.tensor([history() if read else []], dtype=torch.long, device=scores.device)  # [1, T]
        return self.processors(ids, scores)  # type: ignore[arg-type]
