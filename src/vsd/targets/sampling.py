"""Sampling of tokens from logits or probabilities; all sampling of the package is here.

Legend: R rows, V vocabulary. Each row has a generator of its own; None stands for temperature 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = Sequence[torch.Generator | None]


def choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One token for each row of logits [..., V] -> [...]: the argmax at temperature 0, else a sample."""
    if temperature == 0:
        return logits.argmax(-1)
    uniform = torch.rand(logits.shape[:-1], generator=generator, dtype=torch.float64, device=logits.device)
    return drawn_at((logits.float() / temperature).softmax(-1), uniform)


def drawn_at(weights: Tensor, uniform: Tensor) -> Tensor:
    """Indices drawn in proportion to weights [..., V] at uniform numbers [...] in [0, 1) -> [...].

    By the inverse distribution function: one random number for each draw, where `multinomial` needs V.
    """
    below = weights.cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(below, (uniform * below[..., -1])[..., None], right=True)[..., 0]
    return drawn.clamp(max=below.shape[-1] - 1)


def probabilities(scores: Tensor, generators: Generators) -> Tensor:
    """The distribution of each row, [R, V]: softmax of scores [R, V]; without a generator all mass on the argmax."""
    p = scores.float().softmax(-1)
    if None not in generators:
        return p
    best = torch.zeros_like(p).scatter_(-1, scores.argmax(-1, keepdim=True), 1)
    greedy = torch.tensor([generator is None for generator in generators], device=p.device)
    return torch.where(greedy[:, None], best, p)


def draw(p: Tensor, generators: Generators) -> Tensor:
    """One token from each row of p [R, V] -> [R]; a row's sample depends on its own generator only.

    argmax p/e with e ~ Exp(1) has distribution p. `torch.multinomial` samples in the same way, but with one generator
    for all rows.
    """
    noise = torch.ones_like(p)
    for row, generator in zip(noise, generators):
        if generator is not None:
            row.exponential_(generator=generator)
    return (p / noise).argmax(-1)
