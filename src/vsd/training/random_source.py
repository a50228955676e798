"""Random draws of a training run: generators seeded by their purpose, so that a resumed run draws the same."""

import hashlib

import torch


class RandomSource:
    """Generators of one batch.

    Args:
        seed: of the run.
        epoch: of the batch.
        key: identifies batch and process.
    """

    def __init__(self, seed: int, epoch: int, key: str, device: torch.device) -> None:
        self.seed, self.epoch, self.key, self.device = seed, epoch, key, device

    def batch(self, use: str) -> torch.Generator:
        """A generator for one use in this batch."""
        return self.seeded(f"{self.key}, {use}")

    def seeded(self, use: str) -> torch.Generator:
        """A generator for one use in the run: the same for the same key."""
        key = f"{self.seed}, {use}"
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little")
        return torch.Generator(self.device).manual_seed(seed)
