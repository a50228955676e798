"""Paths to train on: their roots, their tokens, and the target's row for every token.

Legend: B sequences, T tokens, E entries, Q drafted tokens of a sequence, P paths, K steps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Paths(NamedTuple):
    """P paths of K tokens in each of B sequences.

    Attributes:
        roots: the entry each path hangs from, [B, P]; in a text, its first token stands at root + 2.
        tokens: the path's tokens, target ids, [B, P, K].
        valid: which of them exist, [B, P, K] bool; none after one that does not.
        rows: the target's row that predicts each token, [B, P, K], counted over the whole batch.
        entries: the entry that holds each token, [B, P, K]; -1 where none does, as for drafted tokens.
    """

    roots: Tensor
    tokens: Tensor
    valid: Tensor
    rows: Tensor
    entries: Tensor

    def widths(self) -> list[int]:
        """For every step, how many paths from the first on must be run to have all valid ones."""
        P = self.valid.shape[1]
        last = torch.arange(1, P + 1, device=self.valid.device)[:, None] * self.valid.any(0)  # [P, K]
        found = last.amax(0).tolist()
        return [max(found[k:]) for k in range(len(found))]

    def consumed(self, next_ids: Tensor) -> Tensor:
        """Tokens a drafter reads along the paths, [K, B, P]: the one behind the root, then the path's own.

        next_ids [B, E]: the token behind every entry.
        """
        first = next_ids.gather(1, self.roots)
        return torch.cat([first[..., None], self.tokens[..., :-1]], dim=-1).permute(2, 0, 1)

    @classmethod
    def joined(cls, parts: "Sequence[Paths]") -> "Paths":
        """Several sets of paths of the same sequences side by side."""
        return cls(*(torch.cat(fields, dim=1) for fields in zip(*parts)))


def recorded(ids: Tensor, drafted: Tensor, real: Tensor, steps: int) -> Paths:
    """The text's own continuation below every root that is drafted from; row q of a sequence predicts drafted[q].

    Args:
        ids: tokens, [B, T].
        drafted: positions of the drafted tokens, ascending, [B, Q].
        real: which of them are not padding, [B, Q] bool.
    """
    B, Q = drafted.shape
    ahead = torch.arange(steps, device=ids.device)
    places = drafted[..., None] + ahead  # [B, Q, K]
    tokens = ids.gather(1, places.clamp(max=ids.shape[1] - 1).flatten(1)).view(B, Q, steps)
    index = torch.arange(Q, device=ids.device)[:, None] + ahead  # [Q, K] which drafted token step k would be
    at = index.clamp(max=Q - 1).flatten()
    following = drafted[:, at].view(B, Q, steps)
    exists = (index < Q) & real[:, at].view(B, Q, steps)
    valid = exists & (following == places)  # behind an answer's end stands another answer, or padding
    rows = index.clamp(max=Q - 1) + Q * torch.arange(B, device=ids.device)[:, None, None]
    return Paths(drafted - 2, tokens, valid.long().cumprod(-1).bool(), rows, places - 1)


def cut(paths: Paths, go_on: Tensor, uniform: Tensor) -> Paths:
    """Paths that end behind their token k with probability 1 - go_on [B, P, K] (of those that got so far).

    Args:
        uniform: numbers in [0, 1) that decide, [B, P, K].
    """
    survives = uniform < go_on
    reached = torch.cat([torch.ones_like(survives[..., :1]), survives[..., :-1]], dim=-1)
    return paths._replace(valid=paths.valid & reached.long().cumprod(-1).bool())


def longest_first(paths: Paths) -> Paths:
    """The paths of every sequence by falling length, so that the first ones are all that later steps need."""
    order = paths.valid.sum(-1).argsort(dim=1, descending=True, stable=True)  # [B, P]
    deep = order[..., None].expand_as(paths.tokens)
    return Paths(paths.roots.gather(1, order), *(field.gather(1, deep) for field in paths[1:]))
