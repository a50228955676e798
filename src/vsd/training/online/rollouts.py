"""Rollouts: answers with all that training needs of the target, kept from the passes that decoded them.

A pass reads tokens and yields the target's states there. The accepted ones follow each other without a gap, so the
states of a whole text are those of its prompt and then of its passes: equal, but for rounding, to a pass over the text.

Legend: B prompts, T tokens of a text, Q drafted tokens of it, n h width of the features, h hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vsd.decoding import Engine, Result, Sampling
from vsd.decoding.engine import States
from vsd.features import Features
from vsd.targets import Inputs, Target


class Rollout(NamedTuple):
    """A prompt with its answer.

    Attributes:
        prompt, response: token ids.
        passes: verification passes of the target, the prompt's not counted.
        features: aux [T, n h], hidden [Q, h] and log_normaliser [Q], on the CPU.
    """

    prompt: list[int]
    response: list[int]
    passes: int
    features: Features


def roll_out(
    engine: Engine, prompts: Sequence[Inputs], samplings: Sequence[Sampling], temperature: float
) -> list[Rollout]:
    """Answer prompts together; those whose answer is a single token are left out.

    Args:
        temperature: of the normaliser of the target's distribution.
    """
    results = [Result(prompt) for prompt in prompts]
    states: list[list[tuple[Tensor, Tensor]]] = [[] for _ in prompts]  # (aux, hidden) of every pass

    def keep(read: States) -> None:
        hidden, aux = read.output
        for b, (i, count) in enumerate(zip(read.rows, read.counts)):
            first = 0 if states[i] else count - 1  # of the prompt's hidden states only the last is needed
            states[i].append((aux[b, :count].bfloat16(), hidden[b, first:count].bfloat16()))

    for _ in engine.stream(results, samplings, keep):
        pass
    return [
        _rollout(engine.target, result, kept, temperature)
        for result, kept in zip(results, states)
        if len(result.tokens) > 1
    ]


def _rollout(target: Target, result: Result, kept: list[tuple[Tensor, Tensor]], temperature: float) -> Rollout:
    """The text and its features; those of its last token, which nothing uses, may be 0."""
    T, Q = len(result.prompt.ids) + len(result.tokens), len(result.tokens) - 1
    aux, hidden = (torch.cat(field) for field in zip(*kept))
    aux = F.pad(aux, (0, 0, 0, max(0, T - len(aux))))[:T]
    hidden = hidden[1 : Q + 1]  # the first one predicts the first token, which is not drafted
    normaliser = target.log_normaliser(hidden.to(target.head_weight.dtype), temperature).float()
    features = Features(aux.cpu(), hidden.cpu(), normaliser.cpu())
    return Rollout(result.prompt.ids, result.tokens, len(result.accepted), features)
