"""The one place where a token is taken from logits.

Legend: R rows, V vocabulary. A row's generator draws its tokens; where there is none, temperature is 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = Sequence[torch.Generator | None]


def choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """A token for every row of logits [..., V]: the argmax at temperature 0, else one draw -> [...]."""
    if temperature == 0:
        return logits.argmax(-1)
    uniform = torch.rand(logits.shape[:-1], generator=generator, dtype=torch.float64, device=logits.device)
    return drawn_at((logits.float() / temperature).softmax(-1), uniform)


def drawn_at(weights: Tensor, uniform: Tensor) -> Tensor:
    """What weights [..., V] draw at uniform numbers [...] in [0, 1), by their inverse distribution function -> [...].

    One number for each draw; `multinomial` takes one for every index.
    """
    below = weights.cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(below, (uniform * below[..., -1])[..., None], right=True)[..., 0]
    return drawn.clamp(max=below.shape[-1] - 1)


def probabilities(scores: Tensor, generators: Generators) -> Tensor:
    """The law each row draws from, [R, V]: softmax of scores [R, V], or all mass on the best."""
    p = scores.float().softmax(-1)
    if None not in generators:
        return p
    best = torch.zeros_like(p).scatter_(-1, scores.argmax(-1, keepdim=True), 1)
    greedy = torch.tensor([generator is None for generator in generators], device=p.device)
    return torch.where(greedy[:, None], best, p)


def draw(p: Tensor, generators: Generators) -> Tensor:
    """One token of every row's law p [R, V] -> [R]; what a row draws depends on its own generator alone.

    argmax p/e with e ~ Exp(1) has law p; `torch.multinomial` draws like this, but all rows from one generator.
    """
    noise = torch.ones_like(p)
    for row, generator in zip(noise, generators):
        if generator is not None:
            row.exponential_(generator=generator)
    return (p / noise).argmax(-1)
