"""Random draws of a training run: generators seeded by their purpose, so that a resumed run draws the same.

What is drawn for a text depends on seed, text and step, neither on the other texts of its batch nor on the process. So
the division of a step into processes and batches may change when a run is resumed.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class RandomSource:
    """Generators of one step.

    Args:
        seed: of the run.
        epoch: of the step.
        step: its number.
    """

    def __init__(self, seed: int, epoch: int, step: int, device: torch.device) -> None:
        self.seed, self.epoch, self.step, self.device = seed, epoch, step, device

    def texts(self, examples: Tensor, use: str) -> list[torch.Generator]:
        """A generator for one use in this step, for each of some examples [B]."""
        return [self.seeded(f"{self.step}, {example}, {use}") for example in examples.tolist()]

    def seeded(self, use: str) -> torch.Generator:
        """A generator for one use in the run: the same for the same key."""
        key = f"{self.seed}, {use}"
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little")
        return torch.Generator(self.device).manual_seed(seed)


def uniform(generators: Sequence[torch.Generator], *shape: int) -> Tensor:
    """Numbers in [0, 1) from each of B generators, [B, *shape]."""
    return torch.stack([torch.rand(shape, generator=one, device=one.device) for one in generators])
