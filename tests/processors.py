"""Logits processors that make a wrong history visible."""

import torch
from torch import Tensor
from transformers import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TypicalLogitsWarper,
)


def alternate(ids: Tensor, scores: Tensor) -> Tensor:
    """Structured output: behind a token of the lower half of the vocabulary one of the upper half, and so on."""
    half = scores.shape[-1] // 2
    upper = torch.arange(scores.shape[-1], device=scores.device) >= half
    return scores.masked_fill(upper[None] == (ids[:, -1:] >= half), -torch.inf)


def positional(ids: Tensor, scores: Tensor) -> Tensor:
    """Favours a token that depends on the length of the history and on all of it."""
    favoured = (ids.sum(1) + 3 * ids.shape[1]) % scores.shape[-1]
    return scores.scatter_add(1, favoured[:, None], torch.full_like(scores[:, :1], 1.5))


class Counter:
    """Keeps a state: every call brings the whole history, one token longer than the call before; nothing else will do.

    It forbids every token that the answer has, until all have been used: a grammar that must not be asked twice.
    """

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.start = 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        row = ids[0].tolist()
        if not self.seen:
            self.start = len(row)
        else:
            assert row[:-1] == self.seen, "a history that plain decoding never has"
        self.seen = row
        answer = row[self.start :]
        used = set(answer[len(answer) // scores.shape[-1] * scores.shape[-1] :])
        return scores.index_fill(1, torch.tensor(sorted(used), dtype=torch.long), -torch.inf)


PROCESSORS = {
    "alternate": lambda: alternate,
    "positional": lambda: positional,
    "counter": Counter,
    "penalty": lambda: RepetitionPenaltyLogitsProcessor(1.4),
    "no bigram twice": lambda: NoRepeatNGramLogitsProcessor(2),
    "bias behind a token": lambda: SequenceBiasLogitsProcessor({(1, 2): 2.0, (0, 3): -3.0, (4,): 0.7}),
    "typical": lambda: TypicalLogitsWarper(0.8),
}
