"""Entries and paths of plain token tensors, and a drafter's states along them."""

from typing import Any

import torch
from torch import Tensor

from vsd.paths import Entries, Paths
from vsd.targets import Inputs, Padded, Target


def padded(*rows: list[int]) -> Padded:
    return Padded.of([Inputs(row) for row in rows])


def text(ids: Tensor, lengths: Tensor | None = None) -> Padded:
    """Right-padded ids [B, T] as a batch of texts."""
    lengths = torch.full((len(ids),), ids.shape[1]) if lengths is None else lengths
    return Padded(ids, lengths, torch.arange(ids.shape[1]).expand_as(ids), ())


def entries(target: Target, ids: Tensor, layers: tuple[int, ...]) -> Entries:
    """Entries of texts ids [B, T]; the last one holds no token of the text."""
    return Entries.of(text(ids), target.features(text(ids), layers).aux)


def paths(roots: Tensor, tokens: Tensor, held: Tensor | None = None) -> Paths:
    """Paths [B, P, K] all of whose steps exist."""
    held = torch.full_like(tokens, -1) if held is None else held
    return Paths(roots, tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(tokens), held)


def states(drafter: Any, entries: Entries, paths: Paths) -> Tensor:
    """The drafter's states along paths, [K, B, P, h]."""
    found: Tensor = drafter(entries, paths, lambda hidden, head: hidden)
    return found
