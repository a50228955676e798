"""What one decoder answered, and how long it took."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vsd.decoding import Result
from vsd.evaluation.bootstrap import Counts


def totals(index: npt.ArrayLike, values: npt.ArrayLike) -> Counts:
    """Sum of the values of every index 0, 1, …"""
    return np.bincount(index, weights=values).astype(np.float64)


@dataclass
class Answers:
    """Results of one decoder, and seconds of its batches.

    Attributes:
        prompts, turns: for every answer, the number of its prompt and of the prompt's turn.
        results: the answers.
        batches: for every batch of answers decoded together, (number of its group of prompts, new tokens, seconds).
        passes: target passes after prefill; one pass serves all answers of a batch.
        draft, verify, commit, prefill: total seconds by kind of work.
    """

    prompts: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    batches: list[tuple[int, int, float]] = field(default_factory=list)
    passes: int = 0
    draft: float = 0.0
    verify: float = 0.0
    commit: float = 0.0
    prefill: float = 0.0

    def by_prompt(self, per_answer: Sequence[float]) -> Counts:
        """Sums over the turns of each prompt, the unit of the bootstrap."""
        return totals(self.prompts, per_answer)

    def per_pass(self) -> tuple[Counts, Counts]:
        """(new tokens after prefill, verification passes) of every prompt."""
        tokens = self.by_prompt([sum(r.delivered) for r in self.results])
        return tokens, self.by_prompt([len(r.delivered) for r in self.results])

    def rate(self) -> tuple[Counts, Counts]:
        """(new tokens, seconds) of every group of prompts that were decoded together."""
        groups, tokens, seconds = zip(*self.batches)
        index = np.unique(groups, return_inverse=True)[1]
        return totals(index, tokens), totals(index, seconds)
