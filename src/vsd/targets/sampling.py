"""The one place where a token is taken from logits."""

import torch
from torch import Tensor


def choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """A token for every row of logits [..., V]: the argmax at temperature 0, else one draw -> [...]."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() / temperature).softmax(-1)
    return torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1])
